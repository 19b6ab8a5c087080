"""Grouped products on Hopper (Mosaic GPU): the weights are wgmma's M side, the rows of one group its N.

One thread block an SM walks over (expert, columns, block of rows); its first warpgroup keeps TMA some stages ahead,
also over the seam between two items, so that reading never pauses; the others multiply, each its share of the columns.
"""

import dataclasses
import math
from typing import Any, Literal

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
    parts: int  # blocks of weights in a stage
    split: Literal["gated", "columns", "terms"]  # what several parts are: gate and up, or neighbours in one operand
    small: bool  # float8
    out_dtype: Any
    blocks: GroupedBlocks
    num_sms: int
    interpret: bool
    older_groups: bool
    row_parts: int = 1  # blocks of rows that a stage has room for
    to_float8: bool = False  # whether results are rounded to float8

    @property
    def gated(self) -> bool:
        return self.split == "gated"

    @property
    def rows_first(self) -> bool:
        """Whether consumers share the rows, not the columns: `grouped_multiply_rows`."""
        return getattr(self.blocks, "rows_first", False)

    @property
    def share(self) -> int:
        """Columns of one consumer in a part."""
        return self.blocks.block_out // (1 if self.rows_first else self.blocks.consumers)

    @property
    def depth(self) -> int:
        """The sum's terms in a stage."""
        return self.blocks.block_in * (self.parts if self.split == "terms" else 1)

    @property
    def steps(self) -> int:
        """Of an item."""
        return self.num_in // self.depth

    @property
    def tiles(self) -> int:
        """Items side by side."""
        return self.num_out // (self.blocks.block_out * (self.parts if self.split == "columns" else 1))

    @property
    def sums(self) -> list[tuple[int, int]]:
        """(part, number of HALF columns) of each sum of a consumer."""
        return [(part, half) for part in range(self.parts_of_sums) for half in range(self.share // HALF)]

    @property
    def parts_of_sums(self) -> int:
        return 1 if self.split == "terms" else self.parts

    def column(self, tile: Any, part: int) -> Any:
        """The first column of an item's part, in the weights."""
        return (tile * self.parts + part if self.split == "columns" else tile) * self.blocks.block_out

    def term(self, step: Any, part: int) -> Any:
        """The first term of a step's part, in the weights."""
        return step * self.depth + (part * self.blocks.block_in if self.split == "terms" else 0)

    @property
    def in_dtype(self) -> Any:
        return jnp.float8_e4m3fn if self.small else jnp.bfloat16

    @property
    def stage_bytes(self) -> int:
        b = self.blocks
        rows = b.block_rows * self.row_parts
        return (self.parts * b.block_out + rows) * b.block_in * jnp.dtype(self.in_dtype).itemsize

    @property
    def out_tiles(self) -> tuple[int, ...]:
        """Of results in shared memory: one a consumer, or all, where float8 needs 128 columns for a scale."""
        if self.rows_first:
            return self.blocks.consumers, 64, SCALED
        tiles = self.blocks.block_out // HALF if self.to_float8 else self.blocks.consumers
        return tiles, self.blocks.block_rows, HALF

    @property
    def out_bytes(self) -> int:
        return math.prod(self.out_tiles) * jnp.dtype(self.out_dtype).itemsize

    @property
    def out_transforms(self) -> tuple[Any, ...]:
        return () if self.interpret else _transforms(self.out_dtype)

    @property
    def other_bytes(self) -> int:
        """Of shared memory, beside the stages."""
        return self.out_bytes + (1 + self.blocks.consumers) * 3 * (self.num_experts + 1) * 4

    @property
    def stages(self) -> int:
        fits = (SMEM_BYTES - self.other_bytes) // self.stage_bytes
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
        "gated" if len(weights) == 2 else "columns",
        small,
        jnp.dtype(out_dtype),
        blocks,
        num_sms,
        interpret,
        older_groups,
    )
    check_blocks(shape)
    pad = [None] * (2 - len(weights))
    scales = [*scales, None, None][:2]
    missing = num_rows - rows.shape[0]
    if missing:  # rare: what `permute` pads, and tokens times k, are whole tiles
        rows, row_weights, rows_scales = (
            None if x is None else jnp.pad(x, ((0, missing), *[(0, 0)] * (x.ndim - 1)))
            for x in (rows, row_weights, rows_scales)
        )
    operands = (rows, *values, *pad, group_sizes, group_starts, row_weights, rows_scales, *scales)
    return kernel(shape)(*operands)[: num_rows - missing]


def check_blocks(shape: Product) -> None:
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


def kernel(shape: Product):
    b = shape.blocks
    body = _body(shape)
    body.__name__ = "gated_grouped_matmul" if shape.gated else "grouped_matmul"  # what a profiler shows
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((shape.rows, shape.num_out), shape.out_dtype),
        grid=(shape.num_sms,),
        grid_names=("sm",),
        num_threads=1 + b.consumers,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        scratch_types=scratch(shape),
    )


def scratch(shape: Product) -> list[Any]:
    """Shared memory: stages of weights and rows, tiles of results, words, full and free."""
    b, stages = shape.blocks, shape.stages
    transforms = _transforms(shape.in_dtype)
    tile = (b.block_out, b.block_in) if shape.small else (b.block_in, b.block_out)
    return [
        plgpu.SMEM((stages, shape.parts, *tile), shape.in_dtype, transforms=transforms),
        plgpu.SMEM((stages, shape.row_parts, b.block_rows, b.block_in), shape.in_dtype, transforms=transforms),
        plgpu.SMEM(shape.out_tiles, shape.out_dtype, transforms=shape.out_transforms),
        plgpu.SMEM((1 + b.consumers, 3, shape.num_experts + 1), jnp.int32),
        plgpu.Barrier(num_arrivals=shape.row_parts + shape.parts, num_barriers=stages),
        plgpu.Barrier(num_arrivals=b.consumers, num_barriers=stages),
    ]


def _transforms(dtype: Any) -> tuple[Any, ...]:
    """As wgmma and TMA want a tile: 8 rows of 128 bytes, swizzled."""
    return plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(128)


def _body(shape: Product):
    b, stages = shape.blocks, shape.stages

    def body(
        rows_g, gate_g, up_g, sizes_g, starts_g, row_weights_g, rows_scales_g, gate_scales_g, up_scales_g, out_g,
        weights_s, rows_s, out_s, words_s, full, free,
    ):  # fmt: skip
        block, role = lax.axis_index("sm"), lax.axis_index("wg")
        words = None if shape.interpret else words_s.at[role]
        groups = Groups(shape.num_experts, b.block_rows, shape.rows, sizes_g, starts_g, words)

        def walk(visit):
            """Every num_sms-th item from the block's first one; returns the steps of all of them."""
            return groups.walk(shape.tiles, shape.steps, visit, lambda item, _: item + shape.num_sms, (block, 0, 0))[2]

        def follow():
            """What the kernel before this one wrote is there; the next one may start."""
            if not shape.interpret:
                plgpu.griddepcontrol_wait()
                plgpu.griddepcontrol_launch_dependents()

        @pl.when(role == 0)
        def _load():
            if not shape.interpret:
                plgpu.set_max_registers(40, action="decrease")
            early = min(stages, shape.steps) if shape.older_groups else 0  # weights asked for before rows are there
            if not early:
                follow()
            groups.line_up()
            loader = Loader(shape, rows_g, (gate_g, up_g)[: shape.parts], weights_s, rows_s, full, free)

            def visit(item: Item):
                if early:

                    @pl.when(item.step == 0)
                    def _():
                        lax.fori_loop(0, early, lambda k, _: loader.weights(item, k, k), None)
                        follow()
                        lax.fori_loop(0, early, lambda k, _: loader.rows(item, k, k), None)

                loader.visit(item, jnp.where(item.step == 0, early, 0))

            num_steps = walk(visit)
            if early:
                follow()  # a block without items, too, ends after the kernel before
            loader.drain(num_steps)

        @pl.when(role > 0)
        def _multiply():
            if not shape.interpret:
                plgpu.set_max_registers(232, action="increase")
            follow()
            groups.line_up()
            scales = (rows_scales_g, (gate_scales_g, up_scales_g)[: shape.parts])
            multiplier = Multiplier(shape, role - 1, weights_s, rows_s, out_s, full, free, row_weights_g, scales, out_g)
            walk(multiplier.visit)
            plgpu.wait_smem_to_gmem(0)

    return body


@dataclasses.dataclass(frozen=True)
class Loader:
    """What the first warpgroup does: asks for the stages of one item after the other, some ahead of the consumers.

    Attributes:
      shape: the `Product`.
      rows_g: `[rows, in]`; sources: of each part the weights; both in global memory.
      weights_s, rows_s, full, free: the stages.
    """

    shape: Product
    rows_g: Any
    sources: tuple[Any, ...]
    weights_s: Any
    rows_s: Any
    full: Any
    free: Any

    def visit(self, item: Item, first_step: Any = 0) -> None:
        """The item's stages from `first_step` on, each as soon as its place is free."""
        stages = self.shape.stages

        def load(k, _):
            slot = lax.rem(item.step + k, jnp.int32(stages))

            @pl.when(item.step + k >= stages)
            def _():
                plgpu.barrier_wait(self.free.at[slot])

            self.weights(item, k, slot)
            self.rows(item, k, slot)

        lax.fori_loop(first_step, self.shape.steps, load, None)

    def weights(self, item: Item, k: Any, slot: Any) -> None:
        shape, b = self.shape, self.shape.blocks
        for part, source in enumerate(self.sources):
            columns = pl.ds(shape.column(item.tile, part), b.block_out)
            terms = pl.ds(shape.term(k, part), b.block_in)
            cells = (item.expert, columns, terms) if shape.small else (item.expert, terms, columns)
            plgpu.copy_gmem_to_smem(source.at[cells], self.weights_s.at[slot, part], self.full.at[slot])

    def rows(self, item: Item, k: Any, slot: Any) -> None:
        shape, b = self.shape, self.shape.blocks
        for part in range(shape.row_parts):
            if part * b.block_in >= shape.depth:
                plgpu.barrier_arrive(self.full.at[slot])  # for rows that the stage has room for and the product has not
                continue
            cells = pl.ds(item.first, b.block_rows), pl.ds(shape.term(k, part), b.block_in)
            plgpu.copy_gmem_to_smem(self.rows_g.at[cells], self.rows_s.at[slot, part], self.full.at[slot])

    def drain(self, num_steps: Any) -> None:
        """Nobody leaves while another may still arrive."""
        for last in range(1, self.shape.stages + 1):

            @pl.when(num_steps >= last)
            def _(last=last):
                plgpu.barrier_wait(self.free.at[lax.rem(num_steps - last, jnp.int32(self.shape.stages))])
