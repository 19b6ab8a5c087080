"""The Mosaic GPU body of thin_matmul: weights are wgmma's M side, rows its N, the terms of all tiles shared out evenly.

All (tile of columns, step of terms) stand in one line, tile by tile, and each SM takes an equal stretch of it: every SM
reads equally much, whatever the shape. A tile that several SMs share gets a partial sum from each, in a slot of its
own, and XLA adds the slots in their order in whatever reads them: no atomics, so the sum repeats bit for bit. Or each
tile's terms are cut into as many parts, one a block, for a kernel that adds up all slots itself.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe.pallas_kernels.choice import NUM_SMS
from jmoe.pallas_kernels.thin_matmul import TERMS

SMEM_BYTES = 225 * 1024  # of 227, the rest for barriers and alignment
TURNED = plgpu.Layout.WGMMA_TRANSPOSED  # pairs along M: what is stored by rows
SHARE = 64  # columns of one consumer


@dataclasses.dataclass(frozen=True)
class Shares:
    """How one product is shared out.

    Attributes:
      rows: a multiple of 8.
      num_in: terms.
      columns: of each weight.
      block_out: columns of a tile, SHARE for each consumer.
      block_in: terms of a step.
      num_sms: thread blocks.
      interpret: leave out what the interpreter lacks.
      parts: of each tile, one a block; 0 for one stretch of the line a block.
    """

    rows: int
    num_in: int
    columns: tuple[int, ...]
    block_out: int
    block_in: int = TERMS
    num_sms: int = NUM_SMS
    interpret: bool = False
    parts: int = 0

    @property
    def steps(self) -> int:
        """Of one tile."""
        return self.num_in // self.block_in

    @property
    def total(self) -> int:
        return sum(self.columns) // self.block_out * self.steps

    @property
    def stretch(self) -> int:
        """Steps of one block; the last ones may have fewer."""
        return -(-self.steps // self.parts) if self.parts else -(-self.total // self.num_sms)

    @property
    def blocks(self) -> int:
        return self.total // self.steps * self.parts if self.parts else -(-self.total // self.stretch)

    def place(self, block) -> tuple[Any, Any]:
        """A block's first step on the line, and how many it has."""
        if not self.parts:
            begin = block * self.stretch
            return begin, jnp.minimum(self.stretch, self.total - begin)
        first = lax.rem(block, jnp.int32(self.parts)) * self.stretch
        return block // self.parts * self.steps + first, jnp.minimum(self.stretch, self.steps - first)

    @property
    def sharers(self) -> np.ndarray:
        """Blocks that share each tile."""
        if self.parts:
            return np.full(self.total // self.steps, self.parts)
        first = np.arange(0, self.total, self.steps)
        return (first + self.steps - 1) // self.stretch - first // self.stretch + 1

    @property
    def stages(self) -> int:
        stage = (self.block_out + self.rows) * self.block_in * 2
        return min((SMEM_BYTES - self.rows * self.block_out * 4) // stage, 2 * self.stretch)


def choose_shares(rows: int, num_in: int, columns: tuple[int, ...]) -> Shares:
    """Narrow tiles for few rows, which leave fewer partial sums; wide ones where rows would be read too often."""
    return Shares(rows, num_in, columns, 64 if rows <= 32 else 128)


def choose_parts(rows: int, num_in: int, columns: tuple[int, ...], num_sms: int = NUM_SMS) -> Shares:
    """As many parts of each tile as there are SMs for, none of them without a step."""
    whole = Shares(rows, num_in, columns, 128)
    parts = max(1, min(num_sms // (whole.total // whole.steps), whole.steps))
    parts = -(-whole.steps // -(-whole.steps // parts))
    return dataclasses.replace(whole, parts=parts)


def thin_partials_pallas(rows: jax.Array, weights: Sequence[jax.Array], shares: Shares | None = None) -> jax.Array:
    """See `thin_partials`; `[parts, rows, out]` float32, as many parts as suit the SMs."""
    num_rows = len(rows)
    rows = jnp.pad(rows, ((0, -num_rows % 8), (0, 0)))
    shares = shares or choose_parts(len(rows), rows.shape[1], tuple(w.shape[1] for w in weights))
    return _kernel(shares)(rows, *weights)[:, :num_rows]


def thin_matmul_pallas(rows: jax.Array, weights: Sequence[jax.Array], shares: Shares | None = None) -> jax.Array:
    """See `thin_matmul`."""
    num_rows = len(rows)
    rows = jnp.pad(rows, ((0, -num_rows % 8), (0, 0)))
    shares = shares or choose_shares(len(rows), rows.shape[1], tuple(w.shape[1] for w in weights))
    partials = _kernel(shares)(rows, *weights)  # [slots, rows, out] float32
    sharers = np.repeat(shares.sharers, shares.block_out)
    slots = range(len(partials))
    terms = [partials[s] if (sharers > s).all() else jnp.where(sharers > s, partials[s], 0.0) for s in slots]
    return sum(terms[1:], terms[0])[:num_rows].astype(rows.dtype)


def _kernel(shares: Shares):
    consumers, stages = shares.block_out // SHARE, shares.stages
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.kernel(
        _body(shares),
        out_type=jax.ShapeDtypeStruct((int(shares.sharers.max()), shares.rows, sum(shares.columns)), jnp.float32),
        grid=(shares.blocks,),
        grid_names=("sm",),
        num_threads=1 + consumers,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        scratch_types=[
            plgpu.SMEM((stages, shares.block_in, shares.block_out), jnp.bfloat16, transforms=transforms),
            plgpu.SMEM((stages, shares.rows, shares.block_in), jnp.bfloat16, transforms=transforms),
            plgpu.SMEM((consumers, shares.rows, SHARE), jnp.float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
        ],
    )


def _body(shares: Shares):
    num_weights = len(shares.columns)

    def thin_matmul(rows_g, *refs):
        weights_g, (out_g, weights_s, rows_s, out_s, full, free) = refs[:num_weights], refs[num_weights:]
        begin, count = shares.place(lax.axis_index("sm"))

        @pl.when(lax.axis_index("wg") == 0)
        def _():
            if not shares.interpret:
                plgpu.set_max_registers(40, action="decrease")
            _load(shares, rows_g, weights_g, weights_s, rows_s, full, free, begin, count)

        @pl.when(lax.axis_index("wg") > 0)
        def _():
            if not shares.interpret:
                plgpu.set_max_registers(232 if shares.block_out <= 128 else 104, action="increase")
            own = lax.axis_index("wg") - 1
            _multiply(shares, weights_s, rows_s, out_s, out_g, full, free, begin, count, own)

    return thin_matmul


def _load(shares: Shares, rows_g, weights_g, weights_s, rows_s, full, free, begin, count) -> None:
    """The first warpgroup keeps TMA `stages` steps ahead; weights, which no kernel makes, are asked for first."""
    stages, firsts = shares.stages, np.cumsum([0, *shares.columns]) // shares.block_out

    def load_weights(i, _):
        tile, slot = (begin + i) // shares.steps, lax.rem(i, jnp.int32(stages))
        terms = pl.ds(lax.rem(begin + i, jnp.int32(shares.steps)) * shares.block_in, shares.block_in)
        for n, source in enumerate(weights_g):
            first, stop = int(firsts[n]), int(firsts[n + 1])

            @pl.when((tile >= first) & (tile < stop))
            def _(source=source, first=first):
                columns = pl.ds((tile - first) * shares.block_out, shares.block_out)
                plgpu.copy_gmem_to_smem(source.at[terms, columns], weights_s.at[slot], full.at[slot])

    def load_rows(i, _):
        terms = pl.ds(lax.rem(begin + i, jnp.int32(shares.steps)) * shares.block_in, shares.block_in)
        slot = lax.rem(i, jnp.int32(stages))
        plgpu.copy_gmem_to_smem(rows_g.at[:, terms], rows_s.at[slot], full.at[slot])

    def load_both(i, _):
        plgpu.barrier_wait(free.at[lax.rem(i, jnp.int32(stages))])
        load_weights(i, None)
        load_rows(i, None)

    ahead = jnp.minimum(count, stages)
    lax.fori_loop(0, ahead, load_weights, None)
    if not shares.interpret:
        plgpu.griddepcontrol_wait()
        plgpu.griddepcontrol_launch_dependents()
    lax.fori_loop(0, ahead, load_rows, None)
    lax.fori_loop(ahead, count, load_both, None)

    def drain(i, _):  # nobody leaves while another may still arrive
        plgpu.barrier_wait(free.at[lax.rem(i, jnp.int32(stages))])

    lax.fori_loop(count - ahead, count, drain, None)


def _multiply(shares: Shares, weights_s, rows_s, out_s, out_g, full, free, begin, count, own) -> None:
    """A consumer multiplies its SHARE of the columns, tile after tile of the block's stretch."""
    stages = jnp.int32(shares.stages)

    def part_of_tile(i):
        tile = (begin + i) // shares.steps
        stop = jnp.minimum(count, (tile + 1) * shares.steps - begin)

        def products(acc):
            def step(j, _):
                slot = lax.rem(j, stages)
                plgpu.barrier_wait(full.at[slot])
                plgpu.wgmma(acc, weights_s.at[slot, :, pl.ds(own * SHARE, SHARE)].T, rows_s.at[slot].T)
                plgpu.wgmma_wait(1)  # of the step before this one nothing is still read

                @pl.when(j > i)
                def _():
                    plgpu.barrier_arrive(free.at[lax.rem(j - 1, stages)])

            lax.fori_loop(i, stop, step, None)
            return acc[...]

        acc = plgpu.ACC((SHARE, shares.rows), jnp.float32)  # pyright: ignore[reportPrivateImportUsage]
        found: Any = pl.run_scoped(products, acc)
        plgpu.barrier_arrive(free.at[lax.rem(stop - 1, stages)])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        out_s.at[own].T[...] = plgpu.layout_cast(found, TURNED)
        plgpu.commit_smem()
        if shares.parts:
            slot = (begin - tile * shares.steps) // shares.stretch
        else:
            slot = begin // shares.stretch - tile * shares.steps // shares.stretch
        columns = pl.ds(tile * shares.block_out + own * SHARE, SHARE)
        plgpu.copy_smem_to_gmem(out_s.at[own], out_g.at[slot, :, columns])
        return stop

    lax.while_loop(lambda i: i < count, part_of_tile, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)
