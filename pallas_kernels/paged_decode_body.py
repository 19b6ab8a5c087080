"""Decode attention over pages on Hopper (Mosaic GPU): what a thread block does.

A block is a stream: one warpgroup loads pages by TMA, some tiles of 64 tokens ahead, one computes. scores^T = K q^T and
out^T = V^T p^T, so that tokens and head size fill wgmma's M and the few query heads of a KV head are its N. See
`paged_decode_plan` for what a stream reads and `paged_decode_share` for how streams meet.
"""

import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe.pallas_kernels import paged_decode_share as sharing
from jmoe.pallas_kernels import simt
from jmoe.pallas_kernels.grouped_matmul_threads import load_by_row
from jmoe.pallas_kernels.paged_decode_plan import MASKED, TILE, UNIT, Decode
from jmoe.pallas_kernels.paged_decode_stream import Stream, load_pages, num_tiles

LOG2E = math.log2(math.e)
LAYOUT = plgpu.Layout.WGMMA
TURNED = plgpu.Layout.WGMMA_TRANSPOSED  # the same, by columns: what is stored transposed
BYTES = plgpu.Layout.WGMMA_UPCAST_2X  # of 8-bit elements that will be 16-bit ones in LAYOUT
BY_HEAD = LAYOUT.reduce(0)
AT_ONCE = 4  # partial results of a KV head's 8 query heads on their way: 48 registers; half as many of 16


def _down(vector, length):
    """[n] -> [length, n]."""
    return lax.broadcast_in_dim(vector, (length, vector.shape[0]), (1,))


def _filled(value, shape, layout):
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _tokens(width):
    return plgpu.broadcasted_iota(jnp.int32, (TILE, width), 0, layout=LAYOUT)


def body_of(shape: Decode):
    group, head_dim, n, stages, dtype = shape.group, shape.head_dim, shape.columns, shape.stages, shape.dtype
    num_heads, num_kv_heads = shape.num_heads, shape.num_kv_heads
    soft_cap = shape.logit_soft_cap

    def body(
        q_g, k_g, v_g, table_g, start_g, tokens_g, k_scale_g, v_scale_g, sinks_g, plan_g,
        out_g, acc_g, ml_g, counters_g,
        k_s, v_s, wide_s, q_s, p_s, o_s, run_s, run_ml_s, words_s, k_full, v_full, k_free, v_free,
    ):  # fmt: skip
        stream, role = lax.axis_index("stream"), lax.axis_index("wg")
        if not shape.interpret:
            plgpu.griddepcontrol_wait()
            plgpu.griddepcontrol_launch_dependents()
            plan = sharing.plan_program(shape, tokens_g is not None)
            simt.program(plan, start_g, *([] if tokens_g is None else [tokens_g]), words_s.at[role])
        head = lax.rem(stream, jnp.int32(num_kv_heads))
        mine = Stream(shape, stream, head, start_g, tokens_g, plan_g, words_s.at[role])

        def place(row):
            """Rows of q that fill the columns, and how many of the first ones belong to others."""
            want = row * num_heads + head * group
            start = jnp.minimum(want, shape.flat_rows - n)
            return start, want - start

        def has_whole_rows():
            (_, first_piece), (_, end_piece) = mine.ends()
            return first_piece + end_piece == 0

        def leave():
            simt.program(sharing.leave_program(shape), counters_g.at[head])

        def leave_early():
            """A stream that has nothing to count need not wait for it at the end."""
            if not shape.interpret:
                pl.when(has_whole_rows())(leave)

        @pl.when(role == 1)
        def _load():
            load_pages(mine, table_g, ((k_g, k_s, k_full, k_free), (v_g, v_s, v_full, v_free)), behind=leave_early)

        @pl.when(role == 0)
        def _compute():
            if not shape.interpret:
                simt.program(sharing.open_program(shape), counters_g.at[head])
            scale = k_scale_g[0] * (head_dim**-0.5 * LOG2E)

            def queries_of(row):
                return plgpu.load(q_g.at[pl.ds(place(row)[0], n)].T, (), layout=TURNED, optimized=False)

            def fetch(row):
                """The queries of a row ahead, but for float8: it has no registers left for them."""
                return mine.bounds(row), None if shape.small_pages else queries_of(row)

            def sinks_of(first):
                if shape.interpret:
                    return plgpu.load(sinks_g.at[pl.ds(first, n)], (), layout=BY_HEAD, optimized=False)
                return load_by_row(sinks_g, n, first, jnp.int32(0), reduced=0)

            def write(row, acc, m, total):
                """total [n], already summed."""
                skipped = place(row)[1]
                if sinks_g is not None:
                    total = total + jnp.exp2(sinks_of(n + head * group - skipped) - m)
                out = acc * _down(v_scale_g[0] / total, head_dim)
                o_s.T[...] = plgpu.layout_cast(out.astype(shape.out_dtype), TURNED)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(o_s.at[pl.ds(skipped, group)], out_g.at[row, pl.ds(head * group, group)])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            def partial(row, index):
                at = row, head, index
                m, total = (plgpu.load(ml_g.at[*at, i], (), layout=BY_HEAD, optimized=False) for i in (0, 1))
                return plgpu.load(acc_g.at[at], (), layout=LAYOUT, optimized=False), m, total

            def keep(row, index, acc, m, total):
                acc_g[row, head, index] = acc
                ml_g[row, head, index, 0] = m
                ml_g[row, head, index, 1] = total

            def add(sum_of_earlier, piece):
                """Maxima are whole numbers, so the factors powers of two: no product is rounded."""
                (acc, m, total), (acc_i, m_i, total_i) = sum_of_earlier, piece
                m_new = jnp.maximum(m, m_i)
                old, new = jnp.exp2(m - m_new), jnp.exp2(m_i - m_new)
                acc = acc * _down(old, head_dim) + acc_i * _down(new, head_dim)
                return acc, m_new, total * old + total_i * new

            def merge(row, cover):
                """All pieces of a row, in order; some on their way together, as each takes a microsecond to come."""
                count, at_once = shape.cut(mine.bounds(row)[2])[0], AT_ONCE * 8 // n

                def step(i, found):
                    first = cover + i * at_once
                    together = [partial(row, jnp.minimum(first + j, count - 1)) for j in range(at_once)]
                    for j, piece in enumerate(together):
                        more = add(found, piece)
                        there = first + j < count
                        found = tuple(jnp.where(there, new, old) for new, old in zip(more, found, strict=True))
                    return found

                rounds = lax.div(count - cover + (at_once - 1), jnp.int32(at_once))
                write(row, *lax.fori_loop(0, rounds, step, partial(row, jnp.int32(0))))

            def meet():
                """At the end, when nothing else waits: counts what this stream left of the rows at its range's ends."""
                (first_row, first_piece), (end_row, end_piece) = mine.ends()
                rows = [jnp.minimum(row, shape.rows - 1) for row in (first_row, end_row)]
                first, last, count = mine.pieces(rows[0], mine.bounds(rows[0])[2])[:3]
                cover = jnp.where((end_row == first_row) & (first_piece > 0), 0, end_piece)
                left = jnp.where(first_piece > 0, last - first, 0), cover
                counts = count, shape.cut(mine.bounds(rows[1])[2])[0]
                given = rows[0], left[0], rows[1], left[1], cover
                simt.program(sharing.arrive_program(shape), counters_g.at[head], words_s.at[0], words=given)
                for i in (0, 1):

                    @pl.when((left[i] > 0) & (words_s[0, sharing.BEFORE + i] + left[i] == counts[i]))
                    def _(i=i):
                        merge(rows[i], words_s[0, sharing.COVER + i])

                leave()

            def widened(pages, slot, free):
                """Float8 pages as wgmma reads them."""
                # The first waits for other warps' products that read what stands there; all keep the parts apart: two
                # streams an SM have 128 registers a thread.
                for part in range(head_dim // 64):
                    plgpu.commit_smem()
                    own = pl.ds(part * 64, 64)
                    small = plgpu.load(pages.at[slot, :, own], (), layout=BYTES, optimized=False)
                    wide_s[:, own] = plgpu.layout_cast(small.astype(dtype), LAYOUT)
                plgpu.barrier_arrive(free.at[slot])
                plgpu.commit_smem()
                return wide_s

            def scores_of(slot):
                """[TILE, n] float32."""
                keys = widened(k_s, slot, k_free) if shape.small_pages else k_s.at[slot]

                def product(acc_ref):
                    plgpu.wgmma(acc_ref, keys, q_s.T)
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

            def segment(row, fetched, tile):
                """Its pieces: those from the row's first on are added up in shared memory, others left to a merge."""
                (low, high, units), queries = fetched
                first, last, count, each = mine.pieces(row, units)
                base = (lax.div(low, jnp.int32(UNIT)) + first * each) * UNIT
                tiles = num_tiles(jnp.minimum(last * each, units) - first * each)
                kept = row, first, last, count, num_tiles(each), tile, tiles, low - base, high - base
                if not shape.interpret:
                    simt.program(sharing.keep_words, words_s.at[0], words=kept)
                if queries is None:
                    q_s.T[...] = (queries_of(row).astype(jnp.float32) * scale).astype(dtype)
                else:
                    q_s.T[...] = queries
                plgpu.commit_smem()

                def read(*indices):
                    """What is not needed in between stands in shared memory: two streams an SM have 128 registers."""
                    return [kept[i] if shape.interpret else words_s[0, sharing.KEPT + i] for i in indices]

                def piece(index, _):
                    first, each, tile, tiles, low, high = read(1, 4, 5, 6, 7, 8)
                    begin = (index - first) * each
                    found = attended(tile, begin, jnp.minimum(begin + each, tiles), low, high)
                    row, first, last, count = read(0, 1, 2, 3)

                    def added():
                        so_far = plgpu.load(run_s, (), layout=LAYOUT, optimized=False)
                        m, total = (plgpu.load(run_ml_s.at[i], (), layout=BY_HEAD, optimized=False) for i in (0, 1))
                        return add((so_far, m, total), found)

                    found = lax.cond((first == 0) & (index > 0), added, lambda: found)

                    @pl.when((first == 0) & (index == count - 1))
                    def _():
                        write(row, *found)

                    @pl.when((first == 0) & (index < last - 1))
                    def _():
                        run_s[...], run_ml_s[0], run_ml_s[1] = found

                    @pl.when((first > 0) | ((index == last - 1) & (index < count - 1)))
                    def _():
                        keep(row, jnp.where(first > 0, index, 0), *found)

                lax.fori_loop(first, last, piece, None)
                return read(6)[0]

            def attended(tile, begin, end_tile, low, high):
                """acc, maxima and sums of tiles `begin` to `end_tile` of a segment."""

                def attend(i, carry):
                    acc, m, total = carry
                    slot = lax.rem(tile + i, jnp.int32(stages))
                    plgpu.barrier_wait(k_full.at[slot])
                    s = scores_of(slot)
                    start = i * TILE
                    end = high - start  # of the row's own tokens, in the tile
                    token = _tokens(n)
                    s = jnp.where((token < end) & (token >= low - start), s, MASKED)
                    m_new = jnp.maximum(m, jnp.round(s.max(axis=0)))
                    p = jnp.exp2(s - _down(m_new, TILE))
                    alpha = jnp.exp2(m - m_new)
                    p_s.T[...] = plgpu.layout_cast(p.astype(dtype), TURNED)
                    plgpu.barrier_wait(v_full.at[slot])
                    values = values_of(slot, end)
                    plgpu.commit_smem()

                    def product(acc_ref):
                        plgpu.wgmma(acc_ref, values.T, p_s.T)
                        return acc_ref[...]

                    new = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((head_dim, n), jnp.float32))
                    if not shape.small_pages:
                        plgpu.barrier_arrive(v_free.at[slot])
                    return acc * _down(alpha, head_dim) + new, m_new, total * _down(alpha, TILE) + p

                none = _filled(0, (head_dim, n), LAYOUT), _filled(MASKED, (n,), BY_HEAD), _filled(0, (TILE, n), LAYOUT)
                acc, m, total = lax.fori_loop(begin, end_tile, attend, none)
                return acc, m, total.sum(axis=0)

            mine.walk(fetch, segment)
            if not shape.interpret:
                pl.when(jnp.logical_not(has_whole_rows()))(meet)
            plgpu.wait_smem_to_gmem(0)

    return body
