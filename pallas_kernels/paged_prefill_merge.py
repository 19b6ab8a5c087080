"""Merges the partial results of what the prefill plan made parts of, in order of position (Mosaic GPU)."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe.pallas_kernels.paged_prefill_block import BY_ROW, LAYOUT, LOWEST, PrefillShape, across, store_rows
from jmoe.pallas_kernels.paged_prefill_plan import (
    FIRST_ITEM,
    FIRST_TOKEN,
    HEAD_BLOCK,
    LEAD,
    NUM_PARTS,
    NUM_TOKENS,
    PART,
    ROW_TILE,
    PrefillPlan,
)

COLUMNS = 32  # of the head size, in one thread block of the merge: short parts, many at a time


def merge_parts(shape: PrefillShape, out, acc, ml, plan: PrefillPlan, gaps, scales, sinks):
    """Writes zeros to the tokens of no row, and softmax-weighted sums of parts to the rows that have such.

    out = sum_j 2^(m_j - m) acc_j / (sum_j 2^(m_j - m) l_j + 2^(sink - m)), j in order of position, m the largest m_j.

    Args:
      shape: of the attention kernel.
      out: `[tokens, Q, H]`, whole items already written.
      acc, ml: float32 `[parts, rows, H]` and `[parts, 2, rows]`.
      plan: as of the attention kernel.
      gaps: `[n, 2]` int32, begins and ends of the tokens that get zeros.
      scales: `[2]` float32, the second of a value.
      sinks: `[head blocks, rows]` float32 in log2, or anything without sinks.

    Returns:
      `out`, complete.
    """
    _, num_heads, head_dim = out.shape
    num_blocks, consumers = plan.merges.shape[0], shape.tiles.consumers

    parts = head_dim // COLUMNS
    helpers = max(num_blocks * consumers * parts // gaps.shape[0], 1)  # thread blocks that share a gap's tokens
    vector = math.gcd(num_heads * head_dim // 128, 8)

    def fill_gaps(gaps_g, out_g, zeros_s, me):
        z = plgpu.layout_cast(
            jnp.zeros(zeros_s.shape, out.dtype), plgpu.Layout.WG_STRIDED(zeros_s.shape, vec_size=vector)
        )

        def fill(i, _):
            begin, end = gaps_g[i, 0] + lax.div(me, jnp.int32(gaps.shape[0])), gaps_g[i, 1]

            @pl.when(begin < end)
            def _():
                zeros_s[...] = z
                plgpu.commit_smem()

                def token(j, _):
                    plgpu.copy_smem_to_gmem(zeros_s, out_g.at[begin + j * helpers])

                lax.fori_loop(0, lax.div(end - begin + helpers - 1, jnp.int32(helpers)), token, None)
                plgpu.wait_smem_to_gmem(0)

        first = lax.rem(me, jnp.int32(gaps.shape[0]))
        count = jnp.where(me < helpers * gaps.shape[0], 1, 0)
        if num_blocks * consumers * parts < gaps.shape[0]:
            count = lax.div(gaps.shape[0] - 1 - me, jnp.int32(num_blocks * consumers * parts)) + 1
        lax.fori_loop(0, count, lambda i, c: fill(first + i * num_blocks * consumers * parts, c), None)

    def prefill_merge(acc_g, ml_g, items_g, merges_g, gaps_g, scales_g, sinks_g, out_g, o_s, zeros_s):
        block, consumer, part = (lax.axis_index(name) for name in ("block", "consumer", "columns"))
        fill_gaps(gaps_g, out_g, zeros_s, (block * consumers + consumer) * parts + part)
        item, num_parts = merges_g[block, FIRST_ITEM], merges_g[block, NUM_PARTS]
        my_rows = pl.ds(consumer * ROW_TILE, ROW_TILE)
        my_columns = pl.ds(part * COLUMNS, COLUMNS)

        @pl.when(num_parts > 0)
        def _():
            first = items_g[item, PART]

            def add(j, carry):
                acc, m, total = carry
                m_j = plgpu.load(ml_g.at[first + j, 0, my_rows], (), layout=BY_ROW, optimized=False)
                total_j = plgpu.load(ml_g.at[first + j, 1, my_rows], (), layout=BY_ROW, optimized=False)
                acc_j = plgpu.load(acc_g.at[first + j, my_rows, my_columns], (), layout=LAYOUT, optimized=False)
                m_new = jnp.maximum(m, m_j)
                old, new = jnp.exp2(m - m_new), jnp.exp2(m_j - m_new)
                return acc * across(old, COLUMNS) + acc_j * across(new, COLUMNS), m_new, total * old + total_j * new

            acc = plgpu.layout_cast(jnp.zeros((ROW_TILE, COLUMNS), jnp.float32), LAYOUT)
            m = plgpu.layout_cast(jnp.full((ROW_TILE,), LOWEST, jnp.float32), BY_ROW)
            total = plgpu.layout_cast(jnp.zeros((ROW_TILE,), jnp.float32), BY_ROW)
            acc, m, total = lax.fori_loop(0, num_parts, add, (acc, m, total))
            head_block = items_g[item, HEAD_BLOCK]
            if shape.with_sinks:
                sink = plgpu.load(sinks_g.at[head_block, my_rows], (), layout=BY_ROW, optimized=False)
                total = total + jnp.exp2(sink - m)
            o_s[...] = (acc * across(scales_g[1] / total, COLUMNS)).astype(out.dtype)
            plgpu.commit_smem()
            token, lead, count = (items_g[item, column] for column in (FIRST_TOKEN, LEAD, NUM_TOKENS))
            store_rows(shape, o_s, out_g, token, lead, count, head_block, consumer, my_columns)
            plgpu.wait_smem_to_gmem(0)

    merged = jax.new_ref(out)
    plgpu.kernel(
        prefill_merge,
        out_type=(),
        grid=(num_blocks, consumers, parts),
        grid_names=("block", "consumer", "columns"),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        scratch_types=[plgpu.SMEM((ROW_TILE, COLUMNS), out.dtype), plgpu.SMEM((num_heads, head_dim), out.dtype)],
    )(acc, ml, plan.items, plan.merges, gaps, scales, sinks, merged)
    return merged[...]
