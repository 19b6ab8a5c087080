"""Grouped products on Hopper (Mosaic GPU): the weights are wgmma's M side, the rows of one group its N.

One thread block an SM walks over (expert, columns, block of rows); its first warpgroup keeps TMA some stages ahead,
also over the seam between two items, so that reading never pauses; the others multiply, each its share of the columns.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe.pallas_kernels.grouped_blocks import UNIT, choose_blocks
from jmoe.pallas_kernels.grouped_matmul import SCALED, GroupedBlocks
from jmoe.pallas_kernels.grouped_matmul_threads import copy_words, load_by_row, store_rows

SMEM_BYTES = 225 * 1024  # of 227, the rest for barriers and alignment
LAYOUT = plgpu.Layout.WGMMA
TURNED = plgpu.Layout.WGMMA_TRANSPOSED  # pairs along M: what is stored by rows
BY_ROW = LAYOUT.reduce(0)
NUM_SMS = 132
accumulator: Any = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]


@dataclasses.dataclass(frozen=True)
class Product:
    """What is fixed when the kernel is compiled."""

    rows: int
    num_in: int
    num_out: int
    num_experts: int
    parts: int  # 2: gate and up
    small: bool  # float8
    out_dtype: Any
    blocks: GroupedBlocks
    num_sms: int
    interpret: bool

    @property
    def share(self) -> int:
        """Columns of one consumer."""
        return self.blocks.block_out // self.blocks.consumers

    @property
    def in_dtype(self) -> Any:
        return jnp.float8_e4m3fn if self.small else jnp.bfloat16

    @property
    def stage_bytes(self) -> int:
        b = self.blocks
        return (self.parts * b.block_out + b.block_rows) * b.block_in * jnp.dtype(self.in_dtype).itemsize

    @property
    def out_bytes(self) -> int:
        return self.blocks.block_rows * self.blocks.block_out * jnp.dtype(self.out_dtype).itemsize

    @property
    def out_transforms(self) -> tuple[Any, ...]:
        return () if self.interpret else _transforms(self.out_dtype)

    @property
    def stages(self) -> int:
        words = (1 + self.blocks.consumers) * 2 * self.num_experts * 4
        fits = (SMEM_BYTES - self.out_bytes - words) // self.stage_bytes
        return min(self.blocks.num_stages or fits, fits)


def grouped(
    rows, weights, group_sizes, group_starts, row_weights, rows_scales, *, out_dtype, blocks=None, num_sms=NUM_SMS,
    interpret=False,
):  # fmt: skip
    """See `grouped_matmul`; `weights` holds one operand, or gate and up. Rows of no group: anything.

    Args:
      rows: `[rows, in]` bfloat16, or float8_e4m3fn with scales.
      weights: arrays `[E, in, out]`, or of float8 `BlockScaled`.
      group_sizes: `[E]` int32; group_starts: the same or None.
      row_weights: `[rows]` float32 or None.
      rows_scales: `[rows, in / 128]` float32 or None.
      out_dtype: bfloat16 or float32.
      blocks: None for `choose_blocks`.
      num_sms: thread blocks.
      interpret: run by the interpreter.

    Returns:
      `[rows, out]`.
    """
    small = rows_scales is not None
    values = [w.values if small else w for w in weights]
    scales = [w.scales for w in weights] if small else []
    num_experts, num_in, num_out = values[0].shape[0], rows.shape[1], values[0].shape[1 if small else 2]
    if blocks is None:
        blocks = choose_blocks(rows.shape[0], num_experts, num_out, len(weights), small)
    num_rows = -(-rows.shape[0] // UNIT) * UNIT
    shape = Product(
        num_rows, num_in, num_out, num_experts, len(weights), small, jnp.dtype(out_dtype), blocks, num_sms, interpret
    )
    _check_blocks(shape)
    pad = [None] * (2 - len(weights))
    scales = [*scales, None, None][:2]
    missing = num_rows - rows.shape[0]
    if missing:  # rare: what `permute` pads, and tokens times k, are whole tiles
        rows, row_weights, rows_scales = (
            None if x is None else jnp.pad(x, ((0, missing), *[(0, 0)] * (x.ndim - 1)))
            for x in (rows, row_weights, rows_scales)
        )
    operands = (rows, *values, *pad, group_sizes, group_starts, row_weights, rows_scales, *scales)
    return _kernel(shape)(*operands)[: num_rows - missing]


def _check_blocks(shape: Product) -> None:
    b = shape.blocks
    fits = (
        b.block_rows % 8 == 0
        and 8 <= b.block_rows <= min(256, shape.rows)
        and shape.num_out % b.block_out == 0
        and b.block_out % (64 * b.consumers) == 0
        and shape.num_in % b.block_in == 0
        and b.block_in % (SCALED if shape.small else 64) == 0
        and (not shape.small or b.block_in == SCALED)
    )
    if not fits or shape.stages < 2:
        raise ValueError(
            f"grouped_matmul: expected block_rows a multiple of 8 up to min(256, rows), block_out a multiple of 64 a "
            f"consumer that divides out, block_in one of {SCALED if shape.small else 64} that divides in, two stages "
            f"of shared memory at least; got {b} for rows {shape.rows}, in {shape.num_in}, out {shape.num_out}"
        )


def _kernel(shape: Product):
    b, stages, parts = shape.blocks, shape.stages, shape.parts
    transforms = _transforms(shape.in_dtype)
    tile = (b.block_out, b.block_in) if shape.small else (b.block_in, b.block_out)
    body = _body(shape)
    body.__name__ = "gated_grouped_matmul" if parts == 2 else "grouped_matmul"  # what a profiler shows
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((shape.rows, shape.num_out), shape.out_dtype),
        grid=(shape.num_sms,),
        grid_names=("sm",),
        num_threads=1 + b.consumers,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        scratch_types=[
            plgpu.SMEM((stages, parts, *tile), shape.in_dtype, transforms=transforms),
            plgpu.SMEM((stages, b.block_rows, b.block_in), shape.in_dtype, transforms=transforms),
            plgpu.SMEM((b.consumers, b.block_rows, shape.share), shape.out_dtype, transforms=shape.out_transforms),
            plgpu.SMEM((1 + b.consumers, 2, shape.num_experts), jnp.int32),
            plgpu.Barrier(num_arrivals=1 + parts, num_barriers=stages),
            plgpu.Barrier(num_arrivals=b.consumers, num_barriers=stages),
        ],
    )


def _transforms(dtype: Any) -> tuple[Any, ...]:
    """As wgmma and TMA want a tile: 8 rows of 128 bytes, swizzled."""
    return plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(128)


def _body(shape: Product):
    b, stages, parts, share = shape.blocks, shape.stages, shape.parts, shape.share
    steps = shape.num_in // b.block_in
    tiles_out = shape.num_out // b.block_out
    i32 = jnp.int32

    def body(
        rows_g, gate_g, up_g, sizes_g, starts_g, row_weights_g, rows_scales_g, gate_scales_g, up_scales_g, out_g,
        weights_s, rows_s, out_s, words_s, full, free,
    ):  # fmt: skip
        block, role = lax.axis_index("sm"), lax.axis_index("wg")
        weights_g = (gate_g, up_g)[:parts]
        scales_g = (gate_scales_g, up_scales_g)[:parts]
        if not shape.interpret:
            plgpu.griddepcontrol_wait()
            plgpu.griddepcontrol_launch_dependents()

            starts = [] if starts_g is None else [starts_g, words_s.at[role, 1]]
            copy_words(shape.num_experts, sizes_g, words_s.at[role, 0], *starts)

        def size_of(e):
            return sizes_g[e] if shape.interpret else words_s[role, 0, e]

        def start_of(e, before):
            if starts_g is None:
                return before
            return starts_g[e] if shape.interpret else words_s[role, 1, e]

        def skipped_of(e, before):
            """Rows before the group in its first block: TMA takes tiles of 8 rows, and would fill zeros in."""
            return lax.rem(start_of(e, before), i32(UNIT))

        def blocks_of(e, before):
            span = jnp.where(size_of(e) > 0, size_of(e) + skipped_of(e, before), 0)
            return lax.div(span + (b.block_rows - 1), i32(b.block_rows))

        def advance(item, e, base, before):
            """The expert whose items hold `item`: base is its first, before the rows of all earlier experts."""

            def passes(state):
                e, base, before = state
                here = jnp.minimum(e, shape.num_experts - 1)
                return (e < shape.num_experts) & (item >= base + blocks_of(here, before) * tiles_out)

            def step(state):
                e, base, before = state
                return e + 1, base + blocks_of(e, before) * tiles_out, before + size_of(e)

            return lax.while_loop(passes, step, (e, base, before))

        def walk(visit):
            """visit(expert, column tile, first row, rows skipped, rows meant, first step) for this block's items."""

            def step(state):
                item, e, base, before, first_step = state
                num_blocks = blocks_of(e, before)
                tile, row_block = lax.div(item - base, num_blocks), lax.rem(item - base, num_blocks)
                others = skipped_of(e, before)  # in the first block
                begin = start_of(e, before) - others + row_block * b.block_rows
                skipped = jnp.where(row_block == 0, others, 0)
                end = jnp.minimum(size_of(e) + others - row_block * b.block_rows, b.block_rows)
                first = jnp.minimum(begin, shape.rows - b.block_rows)  # no block reaches behind the last row
                first = pl.multiple_of(first, UNIT)
                visit(e, tile, first, begin - first + skipped, end - skipped, first_step)
                item = item + shape.num_sms
                return item, *advance(item, e, base, before), first_step + steps

            start = (block, *advance(block, i32(0), i32(0), i32(0)), i32(0))
            return lax.while_loop(lambda state: state[1] < shape.num_experts, step, start)[4]

        @pl.when(role == 0)
        def _load():
            if not shape.interpret:
                plgpu.set_max_registers(40, action="decrease")

            def visit(e, tile, first, _skipped, _meant, first_step):
                def load(k, _):
                    slot = lax.rem(first_step + k, i32(stages))

                    @pl.when(first_step + k >= stages)
                    def _():
                        plgpu.barrier_wait(free.at[slot])

                    terms = pl.ds(k * b.block_in, b.block_in)
                    for part, source in enumerate(weights_g):
                        columns = pl.ds(tile * b.block_out, b.block_out)
                        cells = (e, columns, terms) if shape.small else (e, terms, columns)
                        plgpu.copy_gmem_to_smem(source.at[cells], weights_s.at[slot, part], full.at[slot])
                    plgpu.copy_gmem_to_smem(
                        rows_g.at[pl.ds(first, b.block_rows), terms], rows_s.at[slot], full.at[slot]
                    )

                lax.fori_loop(0, steps, load, None)

            num_steps = walk(visit)
            for last in range(1, stages + 1):  # nobody leaves while another may still arrive

                @pl.when(num_steps >= last)
                def _(last=last):
                    plgpu.barrier_wait(free.at[lax.rem(num_steps - last, i32(stages))])

        @pl.when(role > 0)
        def _multiply():
            if not shape.interpret:
                plgpu.set_max_registers(232, action="increase")
            own = role - 1

            def products(e, tile, first, first_step):
                """[share, block_rows] float32 a part."""

                def sums(*accs):
                    def step(k, _):
                        slot = lax.rem(first_step + k, i32(stages))
                        plgpu.barrier_wait(full.at[slot])
                        for part, acc in enumerate(accs):
                            side = weights_s.at[slot, part, :, pl.ds(own * share, share)].T
                            plgpu.wgmma(acc, side, rows_s.at[slot].T)
                        plgpu.wgmma_wait(parts)  # of the step before this one nothing is still read

                        @pl.when(k > 0)
                        def _():
                            plgpu.barrier_arrive(free.at[lax.rem(first_step + k - 1, i32(stages))])

                    lax.fori_loop(0, steps, step, None)
                    return tuple(acc[...] for acc in accs)

                found = pl.run_scoped(sums, *[accumulator((share, b.block_rows), jnp.float32)] * parts)  # pyright: ignore[reportCallIssue]
                plgpu.barrier_arrive(free.at[lax.rem(first_step + steps - 1, i32(stages))])
                return found

            def factors(source, first, column=0):
                if not shape.interpret:
                    return load_by_row(source, b.block_rows, first, i32(column))
                cells = source.at[pl.ds(first, b.block_rows)]
                cells = cells if len(source.shape) == 1 else cells.at[:, column]
                return plgpu.load(cells, layout=BY_ROW, optimized=False)  # pyright: ignore[reportCallIssue]

            def scaled_products(e, tile, first, first_step):
                """The same; every 128 terms are summed by themselves and scaled: wgmma's float8 sums keep few bits."""
                scale_row = lax.div(tile * b.block_out + own * share, i32(SCALED))

                def step(k, sums):
                    slot = lax.rem(first_step + k, i32(stages))
                    scales = [scales[e, scale_row, k] for scales in scales_g]
                    by_row = factors(rows_scales_g, first, k)
                    plgpu.barrier_wait(full.at[slot])
                    new = []
                    for part in range(parts):

                        def product(acc, part=part):
                            plgpu.wgmma(acc, weights_s.at[slot, part, pl.ds(own * share, share)], rows_s.at[slot].T)
                            return acc[...]

                        found = pl.run_scoped(product, accumulator((share, b.block_rows), jnp.float32))
                        factor = lax.broadcast_in_dim(by_row * scales[part], (share, b.block_rows), (1,))
                        new.append(sums[part] + found * factor)
                    plgpu.barrier_arrive(free.at[slot])
                    return tuple(new)

                none = plgpu.layout_cast(jnp.zeros((share, b.block_rows), jnp.float32), LAYOUT)
                return lax.fori_loop(0, steps, step, (none,) * parts)

            def visit(e, tile, first, skipped, meant, first_step):
                found = (scaled_products if shape.small else products)(e, tile, first, first_step)
                out = found[0] if parts == 1 else found[0] / (1 + jnp.exp(-found[0])) * found[1]
                if row_weights_g is not None:
                    by_row = factors(row_weights_g, first)
                    out = out * lax.broadcast_in_dim(by_row, (share, b.block_rows), (1,))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                out_s.at[own].T[...] = plgpu.layout_cast(out.astype(shape.out_dtype), TURNED)
                plgpu.commit_smem()
                column = tile * b.block_out + own * share
                if shape.interpret:
                    store_pieces(column, first, skipped, meant)
                    return

                @pl.when(meant == b.block_rows)
                def _():
                    cells = pl.ds(first, b.block_rows), pl.ds(column, share)
                    plgpu.copy_smem_to_gmem(out_s.at[own], out_g.at[cells])

                @pl.when(meant < b.block_rows)
                def _():
                    store_rows(out_s.at[own], out_g, shape.out_transforms, share, first, skipped, meant, column)

            def store_pieces(column, first, skipped, meant):
                """The interpreter's: it has no single threads. Pieces of a power of two rows, the largest first."""
                size = 1 << (b.block_rows.bit_length() - 1)
                while size:

                    @pl.when((meant & size) != 0)
                    def _(size=size):
                        done = skipped + (meant & ~(2 * size - 1))
                        cells = pl.ds(first + done, size), pl.ds(column, share)
                        plgpu.copy_smem_to_gmem(out_s.at[own, pl.ds(done, size)], out_g.at[cells])

                    size //= 2

            walk(visit)
            plgpu.wait_smem_to_gmem(0)

    return body
