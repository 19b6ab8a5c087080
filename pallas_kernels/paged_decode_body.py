"""Decode attention over pages on Hopper (Mosaic GPU): what a thread block does.

A block is a stream: one warpgroup loads pages by TMA, some tiles of 64 tokens ahead, one computes, or two, every other
tile each. scores^T = K q^T and out^T = V^T p^T, so that tokens and head size fill wgmma's M and the few query heads of
a KV head are its N. See `paged_decode_plan` for what a stream reads, `paged_decode_queue` for how streams share it and
`paged_decode_sums` for what becomes of a piece's sums.
"""

import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe.pallas_kernels.paged_decode_plan import MASKED, TILE, UNIT, Decode
from jmoe.pallas_kernels.paged_decode_stream import Stream, load_pages, num_tiles
from jmoe.pallas_kernels.paged_decode_sums import BY_HEAD, LAYOUT, TURNED, Sums, down, filled

LOG2E = math.log2(math.e)
BYTES = plgpu.Layout.WGMMA_UPCAST_2X  # of 8-bit elements that will be 16-bit ones in LAYOUT


def _tokens(width):
    return plgpu.broadcasted_iota(jnp.int32, (TILE, width), 0, layout=LAYOUT)


def _over_tokens(kind: str, value, scratch):
    """The maximum ("max") or sum ("add") of each column, in the warpgroup's own scratch: Pallas has one for all."""
    result = plgpu.ShapeDtypeStruct(value.shape[1:], jnp.float32, BY_HEAD)

    @plgpu.inline_mgpu(arg_types=(LAYOUT, plgpu.RefType()), return_type=result)
    def inlined(_ctx, *given):
        array, scratch_s = given
        return array.reduce(kind, 0, scratch=scratch_s)

    return inlined(value, scratch)


def body_of(shape: Decode):
    head_dim, n, dtype = shape.head_dim, shape.columns, shape.dtype
    num_kv_heads, soft_cap = shape.num_kv_heads, shape.logit_soft_cap

    def body(
        q_g, k_g, v_g, table_g, start_g, tokens_g, k_scale_g, v_scale_g, sinks_g, whole_g, plan_g,
        out_g, acc_g, ml_g, counters_g,
        k_s, v_s, wide_s, raw_q_s, q_s, p_s, out_s, acc_s, ml_s, reduced_s, words_s, rows_s,
        k_full, v_full, k_free, v_free, announced, planned, halved, joined,
    ):  # fmt: skip
        block, role = lax.axis_index("stream"), lax.axis_index("wg")
        if not shape.interpret:
            plgpu.griddepcontrol_wait()
            plgpu.griddepcontrol_launch_dependents()
        head, number = lax.rem(block, jnp.int32(num_kv_heads)), lax.div(block, jnp.int32(num_kv_heads))
        stream = Stream(
            shape, number, head, start_g, tokens_g, whole_g, plan_g, counters_g.at[head],
            words_s, rows_s, announced,
        )  # fmt: skip

        sums = Sums(shape, stream, sinks_g, v_scale_g, out_g, acc_g, ml_g, out_s, acc_s, ml_s, halved, joined)

        @pl.when(role == shape.consumers)
        def _load():
            sides = (k_g, k_s, shape.stages, k_full, k_free), (v_g, v_s, shape.value_stages, v_full, v_free)
            load_pages(stream, planned, table_g, (q_g, raw_q_s), sides)

        @pl.when(role < shape.consumers)
        def _compute():
            if not shape.interpret:

                @pl.when(role == 0)
                def _():
                    stream.plan()
                    plgpu.barrier_arrive(planned)

            scale = k_scale_g[0] * (head_dim**-0.5 * LOG2E)

            def widened(pages, slot, free):
                """Float8 pages as wgmma reads them."""
                wide = wide_s.at[role]
                plgpu.commit_smem()  # other warps' products may still read what stands there
                for part in range(head_dim // 64):
                    own = pl.ds(part * 64, 64)
                    small = plgpu.load(pages.at[slot, :, own], (), layout=BYTES, optimized=False)
                    wide[:, own] = plgpu.layout_cast(small.astype(dtype), LAYOUT)
                plgpu.barrier_arrive(free.at[slot])
                plgpu.commit_smem()
                return wide

            def scores_of(slot):
                """[TILE, n] float32."""
                keys = widened(k_s, slot, k_free) if shape.small_pages else k_s.at[slot]

                def product(acc_ref):
                    plgpu.wgmma(acc_ref, keys, q_s.at[role].T)
                    return acc_ref[...]

                found = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((TILE, n), jnp.float32))
                if not shape.small_pages:
                    plgpu.barrier_arrive(k_free.at[slot])
                    found = found * scale
                if soft_cap is None:
                    return found
                return jnp.tanh(found * (1 / (soft_cap * LOG2E))) * (soft_cap * LOG2E)

            def values_of(slot, end):
                """The tile that wgmma reads. What stands behind the end is another's, and may be NaN."""
                tile = widened(v_s, slot, v_free) if shape.small_pages else v_s.at[slot]

                @pl.when(end < TILE)
                def _():
                    for part in range(head_dim // 64):
                        some = tile.at[:, pl.ds(part * 64, 64)]
                        values = plgpu.load(some, (), layout=LAYOUT)
                        some[...] = jnp.where(_tokens(64) < end, values, jnp.zeros_like(values))

                return tile

            def attend_to(code, number, tile):
                """The stream's piece of this number, whose tiles begin at number `tile`; how many they are."""
                queries = plgpu.load(raw_q_s.at[stream.message(number)].T, (), layout=TURNED, optimized=False)
                if shape.small_pages:
                    queries = (queries.astype(jnp.float32) * scale).astype(dtype)
                q_s.at[role].T[...] = queries
                plgpu.commit_smem()
                row, piece, count, first, length, low, high = stream.extent(code)
                base = (lax.div(low, jnp.int32(UNIT)) + first) * UNIT
                found = attended(tile, num_tiles(length), low - base, high - base)
                if shape.consumers == 1:
                    sums.end(row, piece, count, found)
                else:
                    pl.when(role == 1)(lambda: sums.hand_over(number, found))
                    pl.when(role == 0)(lambda: sums.end(row, piece, count, sums.join(found)))
                return num_tiles(length)

            def over_tokens(kind, value):
                if shape.interpret:
                    return value.max(axis=0) if kind == "max" else value.sum(axis=0)
                return _over_tokens(kind, value, reduced_s.at[role])

            def attended(tile, tiles, low, high):
                """acc, maxima and sums of the consumer's tiles of a piece; low and high from its first token on."""
                own = lax.rem(tile + role, jnp.int32(shape.consumers))  # the first; whose a tile is goes by its slot

                def attend(step, carry):
                    acc, m, total = carry
                    i = own + step * shape.consumers
                    k_slot, v_slot = (lax.rem(tile + i, jnp.int32(n)) for n in (shape.stages, shape.value_stages))
                    plgpu.barrier_wait(k_full.at[k_slot])
                    s = scores_of(k_slot)
                    start = i * TILE
                    end = high - start  # of the row's own tokens, in the tile
                    token = _tokens(n)
                    s = jnp.where((token < end) & (token >= low - start), s, MASKED)
                    m_new = jnp.maximum(m, jnp.round(over_tokens("max", s)))
                    p = jnp.exp2(s - down(m_new, TILE))
                    alpha = jnp.exp2(m - m_new)
                    p_s.at[role].T[...] = plgpu.layout_cast(p.astype(dtype), TURNED)
                    plgpu.barrier_wait(v_full.at[v_slot])
                    values = values_of(v_slot, end)
                    plgpu.commit_smem()

                    def product(acc_ref):
                        plgpu.wgmma(acc_ref, values.T, p_s.at[role].T)
                        return acc_ref[...]

                    new = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((head_dim, n), jnp.float32))
                    if not shape.small_pages:
                        plgpu.barrier_arrive(v_free.at[v_slot])
                    return acc * down(alpha, head_dim) + new, m_new, total * down(alpha, TILE) + p

                none = filled(0, (head_dim, n), LAYOUT), filled(MASKED, (n,), BY_HEAD), filled(0, (TILE, n), LAYOUT)
                mine = lax.div(tiles + (shape.consumers - 1) - own, jnp.int32(shape.consumers))
                acc, m, total = lax.fori_loop(0, mine, attend, none)
                return acc, m, over_tokens("add", total)

            def step(state):
                number, tile, code = state
                tile = tile + attend_to(code, number, tile)
                return number + 1, tile, stream.heard(number + 1)

            start = jnp.int32(0), jnp.int32(0), stream.heard(jnp.int32(0))
            number = lax.while_loop(lambda state: state[2] < shape.end, step, start)[0]

            if shape.consumers == 2:

                @pl.when((role == 1) & (number > 0))
                def _():
                    plgpu.barrier_wait(joined)

            plgpu.wait_smem_to_gmem(0)

    return body
