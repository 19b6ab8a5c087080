"""Both products of the expert FFN in one kernel on Hopper, so that the memory never stands idle between them.

One thread block an SM takes items of the gated product and then, its loads running on, those of the down product
(`grouped_matmul_mosaic` says how an item is done; a stage holds gate and up, or two neighbouring blocks of down). Who
comes first takes the next item: shared out in turn, some blocks would read 5 % more than others and end last.
The rows of a down item are there once all gated items of its expert are done, which is counted in memory; items are
taken in the order of the experts, so few ever wait: the first expert's are done long before.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe.pallas_kernels import choice, simt
from jmoe.pallas_kernels import expert_products_share as sharing
from jmoe.pallas_kernels.block_scaled import quantize_rows
from jmoe.pallas_kernels.grouped_blocks import UNIT, fits_experts
from jmoe.pallas_kernels.grouped_items import Groups, Item
from jmoe.pallas_kernels.grouped_load import Loader
from jmoe.pallas_kernels.grouped_matmul import SCALED, ExpertBlocks
from jmoe.pallas_kernels.grouped_matmul_mosaic import kernel
from jmoe.pallas_kernels.grouped_multiply import TURNED, Multiplier
from jmoe.pallas_kernels.grouped_multiply_rows import RowMultiplier
from jmoe.pallas_kernels.grouped_product import HALF, Product, both_products, check_blocks, scratch


def expert_products(
    rows, gate_proj, up_proj, down_proj, group_sizes, group_starts, rows_scales=None, *, blocks, num_sms=None,
    interpret=False,
):  # fmt: skip
    """down[e](silu(x gate[e]) * (x up[e])) for the rows of each group, `group_starts[e]` on; see `grouped_matmul`.

    Args:
      rows: `[rows, D]` bfloat16, or float8_e4m3fn with scales; a multiple of 8 rows.
      gate_proj, up_proj, down_proj: `[E, D, F]` twice and `[E, F, D]`, or `BlockScaled` of float8.
      group_sizes, group_starts: `[E]` int32.
      rows_scales: `[rows, D / 128]` float32 or None.
      blocks: how the work is cut; with float8 block_out is a multiple of 128.
      num_sms: thread blocks; all of them must be able to run at once: the first num_sms items are bound to them, and
        who waits for one that can't begin fails after seconds. None for the SMs of the GPU at hand, 132 without one.
      interpret: run by the interpreter, which has no atomics: as two kernels.

    Returns:
      `[rows, D]` bfloat16; rows of no group: anything. Between the products stands bfloat16, with float8 rounded once
      more as `quantize_rows` does.
    """
    shape = shape_of(rows, gate_proj, blocks, num_sms or choice.num_sms(), interpret)
    small = shape.gated.small
    gate, up, down = (w.values if small else w for w in (gate_proj, up_proj, down_proj))
    scales = [w.scales if small else None for w in (gate_proj, up_proj, down_proj)]
    if not interpret:
        return _kernel(shape)(rows, gate, up, down, group_sizes, group_starts, rows_scales, *scales)[2]
    groups = group_sizes, group_starts, None
    hidden = kernel(shape.gated)(rows, gate, up, *groups, rows_scales, *scales[:2])
    hidden, rows_scales = quantize_rows(hidden) if small else (hidden, None)
    return kernel(shape.down)(hidden, down, down, *groups, rows_scales, scales[2], scales[2])


@dataclasses.dataclass(frozen=True)
class Shape:
    """The two products, of equal stages."""

    gated: Product
    down: Product

    @property
    def queue(self) -> int:
        """Items that the loads may be ahead of the products, and two: each has a stage or more."""
        return self.gated.stages + 2


def shape_of(rows: Any, gate: Any, blocks: ExpertBlocks, num_sms: int, interpret: bool) -> Shape:
    """What is fixed when the kernel is compiled; raises ValueError for blocks that don't fit."""
    small = rows.dtype.itemsize == 1
    (num_experts, *_), (num_rows, hidden) = gate.shape, rows.shape
    width = gate.shape[1] if small else gate.shape[2]
    of_kind = blocks.block_out % SCALED == 0 if small else not blocks.rows_first
    fits = of_kind and fits_experts(blocks, num_rows, hidden, width)
    if not fits or num_rows % UNIT:
        raise ValueError(
            f"expert_ffn: expected rows a multiple of {UNIT}, block_out and block_in that divide hidden and width, one "
            f"of them twice, with float8 block_out a multiple of {SCALED}, rows_first with float8 only, got {num_rows} "
            f"rows and {blocks} for hidden {hidden} and width {width}"
        )
    shape = Shape(*both_products(num_rows, num_experts, hidden, width, blocks, small, num_sms, interpret))
    check_blocks(shape.gated)
    check_blocks(shape.down)
    return shape


def _kernel(shape: Shape):
    gated, down, b = shape.gated, shape.down, shape.gated.blocks
    scales = jax.ShapeDtypeStruct((gated.rows, gated.num_out // SCALED), jnp.float32) if gated.small else None
    body = _body(shape)
    body.__name__ = "expert_products"  # what a profiler shows
    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((gated.rows, gated.num_out), gated.in_dtype),
            scales,
            jax.ShapeDtypeStruct((down.rows, down.num_out), down.out_dtype),
            jax.ShapeDtypeStruct((sharing.num_counters(gated.num_experts),), jnp.int32),
        ),
        grid=(gated.num_sms,),
        grid_names=("sm",),
        num_threads=1 + b.consumers,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        scratch_types=[
            *scratch(gated),
            plgpu.SMEM((shape.queue,), jnp.int32),
            plgpu.Barrier(num_barriers=shape.queue),
        ],
    )


def _body(shape: Shape):
    gated, down, b = shape.gated, shape.down, shape.gated.blocks
    arrivals = b.consumers * gated.tiles  # of a block of rows
    ask = sharing.ask_program(gated.num_sms)

    def body(
        rows_g, gate_g, up_g, down_g, sizes_g, starts_g, rows_scales_g, gate_scales_g, up_scales_g, down_scales_g,
        hidden_g, hidden_scales_g, out_g, counters_g, weights_s, rows_s, out_s, words_s, full, free, met, queue_s,
        queued,
    ):  # fmt: skip
        block, role = lax.axis_index("sm"), lax.axis_index("wg")
        groups = Groups(gated.num_experts, b.block_rows, gated.rows, sizes_g, starts_g, words_s.at[role])
        stages = weights_s, rows_s, full, free

        def walk(advance, visit_gated, visit_down):
            """The block's items; returns the steps of all."""
            groups.line_up()
            state = groups.walk(gated.tiles, gated.steps, visit_gated, advance, (block, 0, 0))
            before = groups.num_blocks * gated.tiles
            return groups.walk(down.tiles, down.steps, visit_down, advance, state, before)[2]

        def place(count):
            return lax.rem(count, jnp.int32(shape.queue))

        def wait_for(item: Item):
            """Until the rows of a down item are there."""
            simt.program(sharing.wait_program, counters_g, words=(item.expert, item.blocks * arrivals, item.count))

        @pl.when(role == 0)
        def _load():
            plgpu.set_max_registers(40, action="decrease")
            simt.follow()
            first = Loader(gated, rows_g, (gate_g, up_g), *stages)
            second = Loader(down, hidden_g, (down_g, down_g), *stages)

            def load(loader, item: Item):
                """Asks which item is next; the answer delays the first item's loads if it is waited for before them."""
                early = jnp.where(item.count == 0, min(gated.stages, loader.shape.steps), 0)
                loader.visit(item, 0, early)
                simt.program(ask, counters_g, queue_s, words=(item.count, place(item.count + 1)))
                loader.visit(item, early)

            def load_down(item: Item):
                wait_for(item)
                load(second, item)

            def advance(_, count):
                simt.program(simt.barrier)
                plgpu.barrier_arrive(queued.at[place(count + 1)])
                return queue_s[place(count + 1)]

            second.drain(walk(advance, functools.partial(load, first), load_down))

        @pl.when(role > 0)
        def _multiply():
            plgpu.set_max_registers(232, action="increase")
            simt.follow()

            @pl.when((block == 0) & (role == 1))
            def _():
                simt.program(sharing.open_program(gated.num_experts), counters_g)

            simt.program(sharing.meet_program, counters_g)
            given = {"own": role - 1, "weights_s": weights_s, "rows_s": rows_s, "out_s": out_s, "full": full,
                     "free": free, "met": met}  # fmt: skip
            scales = rows_scales_g, gate_scales_g, up_scales_g, down_scales_g
            first, second = _multipliers(shape, given, scales, (hidden_g, hidden_scales_g), out_g)

            def multiply_gated(item: Item):
                """And says that the item's rows are there."""
                first.visit(item)
                plgpu.wait_smem_to_gmem(0)
                simt.program(sharing.arrive_program, counters_g, words=(item.expert,))

            def advance(_, count):
                plgpu.barrier_wait(queued.at[place(count + 1)])
                return queue_s[place(count + 1)]

            if gated.rows_first:
                first.open()
            walk(advance, multiply_gated, second.visit)
            simt.program(sharing.leave_program(b.consumers * gated.num_sms), counters_g)
            plgpu.wait_smem_to_gmem(0)

    return body


def _multipliers(shape: Shape, given: dict[str, Any], scales, hidden, out_g) -> tuple[Any, Any]:
    """What a consumer does with an item of the gated and of the down product.

    scales: of rows, gate, up, down; hidden: the rows between the products and their scales.
    """
    hidden_g, hidden_scales_g = hidden
    first = {**given, "shape": shape.gated, "scales": (scales[0], scales[1:3]), "out_g": hidden_g}
    second = {**given, "shape": shape.down, "scales": (hidden_scales_g, (scales[3], scales[3])), "out_g": out_g}
    if shape.gated.rows_first:
        return RowMultiplier(**first, out_scales_g=hidden_scales_g), RowMultiplier(**second)
    down = Multiplier(**second)
    if shape.gated.small:
        return ScaledMultiplier(**first, hidden_scales_g=hidden_scales_g), down
    return Multiplier(**first), down


@dataclasses.dataclass(frozen=True)
class ScaledMultiplier(Multiplier):
    """A consumer in the gated product with float8, whose results are rounded to float8.

    Attributes:
      hidden_scales_g: of the results' rows.
    """

    hidden_scales_g: Any = None

    def visit(self, item: Item) -> None:
        """Tiles of 64 columns, rounded to float8 with a scale for the 128 columns of two and a row."""
        shape = self.shape
        for half, out in enumerate(self.results(self.products(item))):
            tile = self.out_s.at[self.own * self.halves + half]
            tile.T[...] = plgpu.layout_cast(out.astype(shape.out_dtype), TURNED)
        plgpu.commit_smem()
        self.meet()
        for pair in range(shape.blocks.block_out // SCALED):
            tiles = self.out_s.at[pl.ds(pair * (SCALED // HALF), SCALED // HALF)]
            column = shape.column(item.tile, 0) + pair * SCALED
            scalars = item.first, item.skipped, item.meant, column, self.own
            sharing.store_float8(
                tiles, self.out_g, self.hidden_scales_g, shape.out_transforms, shape.blocks.consumers, *scalars
            )
        self.meet()  # the tiles may be written again
