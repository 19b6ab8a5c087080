"""The Mosaic GPU body of greedy_head: weights are wgmma's M side, rows its N, and logits never leave the registers.

A thread block an SM walks over tiles of columns; its first warpgroup keeps TMA some stages ahead, also over the seam
between two tiles, so that reading never pauses. The rows, 512 KB at 128 of Qwen3, don't fit beside that: they come from
L2 with every step, so tiles are as wide as registers allow (384 columns: 16 KB of rows a step of 48 KB of weights).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe.pallas_kernels import greedy_head_largest as largest
from jmoe.pallas_kernels.choice import NUM_SMS
from jmoe.pallas_kernels.greedy_head import UNIT

SMEM_BYTES = 225 * 1024  # of 227, the rest for barriers and alignment
CONSUMERS = 2
MOST_HALVES = 3


@dataclasses.dataclass(frozen=True)
class Head:
    """What is fixed when the kernel is compiled.

    Attributes:
      rows: a multiple of 8.
      num_in: terms; vocab: columns; both multiples of UNIT.
      by_token: whether the weights stand as `[vocab, num_in]`.
      halves: of a consumer's columns of a tile, UNIT each.
      num_sms: most thread blocks.
      interpret: leave out what the interpreter lacks.
    """

    rows: int
    num_in: int
    vocab: int
    by_token: bool
    halves: int
    num_sms: int = NUM_SMS
    interpret: bool = False

    @property
    def share(self) -> int:
        """Columns of one consumer."""
        return self.halves * UNIT

    @property
    def tile(self) -> int:
        """Columns of a tile. The last one begins early enough to be whole: some columns are then compared twice."""
        return CONSUMERS * self.share

    @property
    def tiles(self) -> int:
        return -(-self.vocab // self.tile)

    @property
    def blocks(self) -> int:
        return min(self.num_sms, self.tiles)

    @property
    def steps(self) -> int:
        """Of one tile."""
        return self.num_in // UNIT

    @property
    def stages(self) -> int:
        kept = CONSUMERS * largest.WORDS * self.rows * 4
        return (SMEM_BYTES - kept) // ((self.tile + self.rows) * UNIT * 2)


def choose_head(rows: int, num_in: int, vocab: int, by_token: bool, num_sms: int = NUM_SMS) -> Head:
    """Tiles that leave the fewest columns to the SM that has most; of those the widest."""
    heads = [Head(rows, num_in, vocab, by_token, halves, num_sms) for halves in range(MOST_HALVES, 0, -1)]
    return min((h for h in heads if h.tile <= vocab), key=lambda h: -(-h.tiles // h.num_sms) * h.tile)


def greedy_head_pallas(rows: jax.Array, weights: jax.Array, by_token: bool, head: Head | None = None) -> jax.Array:
    """See `greedy_head`."""
    num_rows = len(rows)
    rows = jnp.pad(rows, ((0, -num_rows % 8), (0, 0)))
    head = head or choose_head(len(rows), rows.shape[1], weights.shape[0 if by_token else 1], by_token)
    keys, columns = _kernel(head)(rows, weights)  # [rows, slots]
    first = jnp.int32(largest.LEAST), jnp.int32(largest.NOWHERE)
    return lax.reduce((keys, columns), first, largest.better_of, (1,))[1][:num_rows]


def _kernel(head: Head):
    transforms = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
    tile = (head.tile, UNIT) if head.by_token else (UNIT, head.tile)
    found = jax.ShapeDtypeStruct((head.rows, head.blocks * CONSUMERS), jnp.int32)
    return plgpu.kernel(
        _body(head),
        out_type=(found, found),
        grid=(head.blocks,),
        grid_names=("sm",),
        num_threads=1 + CONSUMERS,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        scratch_types=[
            plgpu.SMEM((head.stages, *tile), jnp.bfloat16, transforms=transforms),
            plgpu.SMEM((head.stages, head.rows, UNIT), jnp.bfloat16, transforms=transforms),
            plgpu.SMEM((CONSUMERS, largest.WORDS, head.rows), jnp.int32),
            plgpu.Barrier(num_arrivals=2, num_barriers=head.stages),
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=head.stages),
        ],
    )


def _body(head: Head):
    def greedy_head(rows_g, weights_g, keys_g, columns_g, weights_s, rows_s, kept_s, full, free):
        block, role = lax.axis_index("sm"), lax.axis_index("wg")
        tiles = (head.tiles - block + (head.blocks - 1)) // head.blocks  # of this block: every `blocks`-th

        @pl.when(role == 0)
        def _():
            if not head.interpret:
                plgpu.set_max_registers(40, action="decrease")
                plgpu.griddepcontrol_wait()
                plgpu.griddepcontrol_launch_dependents()
            _load(head, rows_g, weights_g, weights_s, rows_s, full, free, block, tiles)

        @pl.when(role > 0)
        def _():
            if not head.interpret:
                plgpu.set_max_registers(232, action="increase")
            own = role - 1
            kept = kept_s.at[own]

            def visit(n, _):
                sums = _multiply(head, weights_s, rows_s, full, free, n * head.steps, own)
                largest.keep(head, kept, sums, _first(head, block, n) + own * head.share, n)

            lax.fori_loop(0, tiles, visit, None)
            largest.give(head, kept, keys_g, columns_g, block * CONSUMERS + own)

    return greedy_head


def _first(head: Head, block: Any, n: Any) -> Any:
    """The first column of a block's n-th tile. Neighbours read neighbours: together whole lines of the weights."""
    return jnp.minimum((n * head.blocks + block) * head.tile, head.vocab - head.tile)


def _load(head: Head, rows_g, weights_g, weights_s, rows_s, full, free, block, tiles) -> None:
    """The first warpgroup keeps TMA `stages` steps ahead."""
    stages, steps = jnp.int32(head.stages), jnp.int32(head.steps)
    total = tiles * steps

    def load(i, _):
        slot = lax.rem(i, stages)

        @pl.when(i >= stages)
        def _():
            plgpu.barrier_wait(free.at[slot])

        terms = pl.ds(lax.rem(i, steps) * UNIT, UNIT)
        columns = pl.ds(_first(head, block, lax.div(i, steps)), head.tile)
        cells = (columns, terms) if head.by_token else (terms, columns)
        plgpu.copy_gmem_to_smem(weights_g.at[cells], weights_s.at[slot], full.at[slot])
        plgpu.copy_gmem_to_smem(rows_g.at[:, terms], rows_s.at[slot], full.at[slot])

    lax.fori_loop(0, total, load, None)

    def drain(i, _):  # nobody leaves while another may still arrive
        plgpu.barrier_wait(free.at[lax.rem(i, stages)])

    lax.fori_loop(jnp.maximum(total - stages, 0), total, drain, None)


def _multiply(head: Head, weights_s, rows_s, full, free, begin, own) -> tuple[Any, ...]:
    """Logits of a consumer's share of a tile, [UNIT, rows] float32 for each half; `begin` is its first step."""
    stages = jnp.int32(head.stages)

    def part(slot, half):
        columns = pl.ds(own * head.share + half * UNIT, UNIT)
        return weights_s.at[slot, columns] if head.by_token else weights_s.at[slot, :, columns].T

    def products(*accs):
        def step(k, _):
            slot = lax.rem(begin + k, stages)
            plgpu.barrier_wait(full.at[slot])
            for half, acc in enumerate(accs):
                plgpu.wgmma(acc, part(slot, half), rows_s.at[slot].T)
            # At once, not a step later: reading takes twice as long as this, and the stage is missing until then.
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(free.at[slot])

        lax.fori_loop(0, head.steps, step, None)
        return tuple(acc[...] for acc in accs)

    kind = plgpu.ACC((UNIT, head.rows), jnp.float32)  # pyright: ignore[reportPrivateImportUsage]
    found: Any = pl.run_scoped(products, *[kind] * head.halves)
    return found
