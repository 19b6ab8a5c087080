"""Grouped products on Hopper (Mosaic GPU): the weights are wgmma's M side, the rows of one group its N.

One thread block an SM walks over (expert, columns, block of rows); its first warpgroup keeps TMA some stages ahead,
also over the seam between two items, so that reading never pauses; the others multiply, each its share of the columns.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe.pallas_kernels.choice import NUM_SMS
from jmoe.pallas_kernels.grouped_blocks import UNIT, choose_blocks
from jmoe.pallas_kernels.grouped_items import Groups, Item
from jmoe.pallas_kernels.grouped_load import Loader
from jmoe.pallas_kernels.grouped_matmul import ExpertBlocks
from jmoe.pallas_kernels.grouped_multiply import Multiplier
from jmoe.pallas_kernels.grouped_multiply_rows import RowMultiplier
from jmoe.pallas_kernels.grouped_product import Product, check_blocks, scratch


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
    if isinstance(blocks, ExpertBlocks) and blocks.rows_first:
        raise ValueError(f"grouped_matmul: expected blocks without rows_first, which is of both products, got {blocks}")
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


def _body(shape: Product):
    b, stages = shape.blocks, shape.stages

    def body(
        rows_g, gate_g, up_g, sizes_g, starts_g, row_weights_g, rows_scales_g, gate_scales_g, up_scales_g, out_g,
        weights_s, rows_s, out_s, words_s, full, free, met,
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
            given: Any = {"shape": shape, "own": role - 1, "weights_s": weights_s, "rows_s": rows_s, "out_s": out_s,
                          "full": full, "free": free, "met": met, "scales": scales, "out_g": out_g}  # fmt: skip
            rows_first = shape.rows_first
            multiplier = RowMultiplier(**given) if rows_first else Multiplier(**given, row_weights_g=row_weights_g)
            walk(multiplier.visit)
            plgpu.wait_smem_to_gmem(0)

    return body
