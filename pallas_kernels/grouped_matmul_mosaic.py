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

from jmoe.pallas_kernels.grouped_blocks import NUM_SMS, UNIT, choose_blocks
from jmoe.pallas_kernels.grouped_items import Groups, Item
from jmoe.pallas_kernels.grouped_matmul import SCALED, GroupedBlocks
from jmoe.pallas_kernels.grouped_multiply import HALF, Multiplier

SMEM_BYTES = 225 * 1024  # of 227, the rest for barriers and alignment


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
    older_groups: bool

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
        return self.blocks.consumers * self.blocks.block_rows * HALF * jnp.dtype(self.out_dtype).itemsize

    @property
    def out_transforms(self) -> tuple[Any, ...]:
        return () if self.interpret else _transforms(self.out_dtype)

    @property
    def stages(self) -> int:
        words = (1 + self.blocks.consumers) * 3 * (self.num_experts + 1) * 4
        fits = (SMEM_BYTES - self.out_bytes - words) // self.stage_bytes
        return min(self.blocks.num_stages or fits, fits)


def grouped(
    rows, weights, group_sizes, group_starts, row_weights, rows_scales, *, out_dtype, blocks=None, num_sms=NUM_SMS,
    interpret=False, older_groups=False,
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
      older_groups: see `grouped_matmul`.

    Returns:
      `[rows, out]`.
    """
    small = rows_scales is not None
    values = [w.values if small else w for w in weights]
    scales = [w.scales for w in weights] if small else []
    num_experts, num_in, num_out = values[0].shape[0], rows.shape[1], values[0].shape[1 if small else 2]
    if blocks is None:
        blocks = choose_blocks(rows.shape[0], num_experts, num_in, num_out, len(weights), small)
    num_rows = -(-rows.shape[0] // UNIT) * UNIT
    shape = Product(
        num_rows,
        num_in,
        num_out,
        num_experts,
        len(weights),
        small,
        jnp.dtype(out_dtype),
        blocks,
        num_sms,
        interpret,
        older_groups,
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
    )
    if not fits or shape.stages < 2:
        raise ValueError(
            f"grouped_matmul: expected block_rows a multiple of 8 up to min(256, rows), block_out a multiple of 64 a "
            f"consumer that divides out, block_in a multiple of {SCALED if shape.small else 64} that divides in, two "
            f"stages of shared memory at least; got {b} for rows {shape.rows}, in {shape.num_in}, out {shape.num_out}"
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
            plgpu.SMEM((b.consumers, b.block_rows, HALF), shape.out_dtype, transforms=shape.out_transforms),
            plgpu.SMEM((1 + b.consumers, 3, shape.num_experts + 1), jnp.int32),
            plgpu.Barrier(num_arrivals=1 + parts, num_barriers=stages),
            plgpu.Barrier(num_arrivals=b.consumers, num_barriers=stages),
        ],
    )


def _transforms(dtype: Any) -> tuple[Any, ...]:
    """As wgmma and TMA want a tile: 8 rows of 128 bytes, swizzled."""
    return plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(128)


def _body(shape: Product):
    b, stages, parts = shape.blocks, shape.stages, shape.parts
    steps, tiles = shape.num_in // b.block_in, shape.num_out // b.block_out
    i32 = jnp.int32

    def body(
        rows_g, gate_g, up_g, sizes_g, starts_g, row_weights_g, rows_scales_g, gate_scales_g, up_scales_g, out_g,
        weights_s, rows_s, out_s, words_s, full, free,
    ):  # fmt: skip
        block, role = lax.axis_index("sm"), lax.axis_index("wg")
        words = None if shape.interpret else words_s.at[role]
        groups = Groups(shape.num_experts, b.block_rows, tiles, shape.rows, sizes_g, starts_g, words)

        def follow():
            """What the kernel before this one wrote is there; the next one may start."""
            if not shape.interpret:
                plgpu.griddepcontrol_wait()
                plgpu.griddepcontrol_launch_dependents()

        def load_weights(item: Item, k, slot):
            columns, terms = pl.ds(item.tile * b.block_out, b.block_out), pl.ds(k * b.block_in, b.block_in)
            cells = (item.expert, columns, terms) if shape.small else (item.expert, terms, columns)
            for part, source in enumerate((gate_g, up_g)[:parts]):
                plgpu.copy_gmem_to_smem(source.at[cells], weights_s.at[slot, part], full.at[slot])

        def load_rows(item: Item, k, slot):
            cells = pl.ds(item.first, b.block_rows), pl.ds(k * b.block_in, b.block_in)
            plgpu.copy_gmem_to_smem(rows_g.at[cells], rows_s.at[slot], full.at[slot])

        @pl.when(role == 0)
        def _load():
            if not shape.interpret:
                plgpu.set_max_registers(40, action="decrease")
            early = min(stages, steps) if shape.older_groups else 0  # weights that are asked for before rows are there
            if not early:
                follow()
            groups.line_up()

            def visit(item: Item):
                if early:

                    @pl.when(item.step == 0)
                    def _():
                        lax.fori_loop(0, early, lambda k, _: load_weights(item, k, k), None)
                        follow()
                        lax.fori_loop(0, early, lambda k, _: load_rows(item, k, k), None)

                def load(k, _):
                    slot = lax.rem(item.step + k, i32(stages))

                    @pl.when(item.step + k >= stages)
                    def _():
                        plgpu.barrier_wait(free.at[slot])

                    load_weights(item, k, slot)
                    load_rows(item, k, slot)

                lax.fori_loop(jnp.where(item.step == 0, early, 0), steps, load, None)

            num_steps = groups.walk(block, shape.num_sms, steps, visit)
            if early:
                follow()  # a block without items, too, ends after the kernel before
            for last in range(1, stages + 1):  # nobody leaves while another may still arrive

                @pl.when(num_steps >= last)
                def _(last=last):
                    plgpu.barrier_wait(free.at[lax.rem(num_steps - last, i32(stages))])

        @pl.when(role > 0)
        def _multiply():
            if not shape.interpret:
                plgpu.set_max_registers(232, action="increase")
            follow()
            groups.line_up()
            scales = (rows_scales_g, (gate_scales_g, up_scales_g)[:parts])
            multiplier = Multiplier(
                shape, role - 1, steps, weights_s, rows_s, out_s, full, free, row_weights_g, scales, out_g
            )
            groups.walk(block, shape.num_sms, steps, multiplier.visit)
            plgpu.wait_smem_to_gmem(0)

    return body
