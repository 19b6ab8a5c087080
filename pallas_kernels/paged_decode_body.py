"""Decode attention over pages on Hopper (Mosaic GPU): what a thread block does.

A block is a stream: one warpgroup loads pages by TMA, some tiles of 64 tokens ahead, one computes. scores^T = K q^T and
out^T = V^T p^T, so that tokens and head size fill wgmma's M and the few query heads of a KV head are its N. See
`paged_decode_plan` for what a stream reads and how streams meet.
"""

import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe.pallas_kernels import paged_decode_plan as planning
from jmoe.pallas_kernels import paged_decode_share as sharing
from jmoe.pallas_kernels import simt
from jmoe.pallas_kernels.grouped_matmul_threads import load_by_row
from jmoe.pallas_kernels.paged_decode_plan import MASKED, PIECES, TILE, TILE_UNITS, UNIT, Decode

LOG2E = math.log2(math.e)
LAYOUT = plgpu.Layout.WGMMA
TURNED = plgpu.Layout.WGMMA_TRANSPOSED  # the same, by columns: what is stored transposed
BYTES = plgpu.Layout.WGMMA_UPCAST_2X  # of 8-bit elements that will be 16-bit ones in LAYOUT
BY_HEAD = LAYOUT.reduce(0)


def _num_tiles(length):
    return lax.div(length + (TILE_UNITS - 1), jnp.int32(TILE_UNITS))


def _down(vector, length):
    """[n] -> [length, n]."""
    return lax.broadcast_in_dim(vector, (length, vector.shape[0]), (1,))


def _filled(value, shape, layout):
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _tokens(width):
    return plgpu.broadcasted_iota(jnp.int32, (TILE, width), 0, layout=LAYOUT)


def body_of(shape: Decode):
    group, head_dim, n, stages, dtype = shape.group, shape.head_dim, shape.columns, shape.stages, shape.dtype
    num_heads, num_kv_heads, window = shape.num_heads, shape.num_kv_heads, shape.sliding_window
    soft_cap = shape.logit_soft_cap

    def body(
        q_g, k_g, v_g, table_g, start_g, tokens_g, k_scale_g, v_scale_g, sinks_g, plan_g,
        out_g, acc_g, ml_g, counters_g,
        k_s, v_s, wide_s, q_s, p_s, o_s, words_s, k_full, v_full, k_free, v_free, planned,
    ):  # fmt: skip
        stream, role = lax.axis_index("stream"), lax.axis_index("wg")
        if not shape.interpret:
            plgpu.griddepcontrol_wait()
            plgpu.griddepcontrol_launch_dependents()
        head = lax.rem(stream, jnp.int32(num_kv_heads))
        counters = None if shape.interpret else counters_g.at[head]

        def bounds_of(row):
            row = jnp.minimum(row, shape.rows - 1)
            return planning.bounds(start_g[row], 1 if tokens_g is None else tokens_g[row], window)

        def place(row):
            """Rows of q that fill the columns, and how many of the first ones belong to others."""
            want = row * num_heads + head * group
            start = jnp.minimum(want, shape.flat_rows - n)
            return start, want - start

        def see(claim):
            """Row and piece of a claim of this stream."""
            if shape.interpret:
                word = plan_g[lax.div(stream, jnp.int32(num_kv_heads)), claim]
            else:
                simt.program(sharing.see_program, words_s, words=(claim,))
                word = lax.div(words_s[lax.rem(claim, jnp.int32(sharing.TAGS))], jnp.int32(sharing.TAGS))
            return lax.div(word, jnp.int32(PIECES)), lax.rem(word, jnp.int32(PIECES))

        def part(units, index):
            """First unit of a row's piece, how many, and how many pieces the row has."""
            count, length = shape.cuts.of(units)
            return index * length, jnp.minimum(length, units - index * length), count

        @pl.when(role == 1)
        def _load():
            def piece(row, base, length, tile):

                def load(i, _):
                    slot = lax.rem(tile + i, jnp.int32(stages))
                    where = []
                    for j in range(TILE_UNITS):  # behind the piece's end its last unit again, out of L2
                        token = (base + jnp.minimum(i * TILE_UNITS + j, length - 1)) * UNIT
                        page = table_g[row, lax.div(token, jnp.int32(shape.page_len))]
                        where.append((page, pl.ds(lax.rem(token, jnp.int32(shape.page_len)), UNIT), head))
                    for pages, smem, full, free in ((k_g, k_s, k_full, k_free), (v_g, v_s, v_full, v_free)):

                        @pl.when(tile + i >= stages)
                        def _(free=free):
                            plgpu.barrier_wait(free.at[slot])

                        for j, cells in enumerate(where):
                            to = smem.at[slot, pl.ds(j * UNIT, UNIT)]
                            plgpu.copy_gmem_to_smem(pages.at[cells], to, full.at[slot])

                lax.fori_loop(0, _num_tiles(length), load, None)

            def claim():
                if not shape.interpret:
                    simt.program(sharing.claim_program(shape), words_s, counters)

            def step(state):
                at, tile, (row, index), (low, _, units) = state
                claim()
                unit, length, _ = part(units, index)
                piece(row, lax.div(low, jnp.int32(UNIT)) + unit, length, tile)
                ahead = see(at + 1)
                return at + 1, tile + _num_tiles(length), ahead, bounds_of(ahead[0])

            if not shape.interpret:
                plan = sharing.plan_program(shape, tokens_g is not None)
                simt.program(plan, start_g, *([] if tokens_g is None else [tokens_g]), words_s)
                plgpu.barrier_arrive(planned)
            claim()
            first = see(jnp.int32(0))
            start = jnp.int32(0), jnp.int32(0), first, bounds_of(first[0])
            num_tiles = lax.while_loop(lambda state: state[2][0] < shape.rows, step, start)[1]
            for last in range(1, stages + 1):  # nobody leaves while another may still arrive

                @pl.when(num_tiles >= last)
                def _(last=last):
                    slot = lax.rem(num_tiles - last, jnp.int32(stages))
                    plgpu.barrier_wait(k_free.at[slot])
                    plgpu.barrier_wait(v_free.at[slot])

        @pl.when(role == 0)
        def _compute():
            if not shape.interpret:
                simt.program(sharing.open_program(shape), counters)
                plgpu.barrier_wait(planned)
            scale = k_scale_g[0] * (head_dim**-0.5 * LOG2E)

            def fetch(row):
                rows = pl.ds(place(jnp.minimum(row, shape.rows - 1))[0], n)
                return bounds_of(row), plgpu.load(q_g.at[rows].T, (), layout=TURNED, optimized=False)

            def sinks_of(first):
                if shape.interpret:
                    return plgpu.load(sinks_g.at[pl.ds(first, n)], (), layout=BY_HEAD, optimized=False)
                return load_by_row(sinks_g, n, first, jnp.int32(0))

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

            def meet(row):
                """If this stream came last: all pieces of the row, in order, the next on its way while one is added."""
                count = part(bounds_of(row)[2], jnp.int32(0))[2]
                simt.program(sharing.arrive_program, counters, words_s, words=(row,))

                def add(i, carry):
                    (acc, m, total), (acc_i, m_i, total_i) = carry
                    ahead = partial(row, jnp.minimum(i + 1, count - 1))
                    m_new = jnp.maximum(m, m_i)
                    old, new = jnp.exp2(m - m_new), jnp.exp2(m_i - m_new)
                    acc = acc * _down(old, head_dim) + acc_i * _down(new, head_dim)
                    return (acc, m_new, total * old + total_i * new), ahead

                @pl.when(words_s[sharing.FOUND] == count - 1)
                def _():
                    begin = partial(row, jnp.int32(0)), partial(row, jnp.int32(1))
                    (acc, m, total), _ = lax.fori_loop(1, count, add, begin)
                    write(row, acc, m, total)

            def widened(pages, slot, free, end):
                """Float8 pages as wgmma reads them, zeros from `end` on."""
                plgpu.commit_smem()  # other warps' last products may still read what stands there
                for part in range(head_dim // 64):  # few at a time: 128 registers a thread for two streams an SM
                    own = pl.ds(part * 64, 64)
                    small = plgpu.load(pages.at[slot, :, own], (), layout=BYTES, optimized=False)
                    wide = plgpu.layout_cast(small.astype(dtype), LAYOUT)
                    wide_s[:, own] = jnp.where(_tokens(64) < end, wide, jnp.zeros_like(wide))
                plgpu.barrier_arrive(free.at[slot])
                plgpu.commit_smem()
                return wide_s

            def scores_of(slot):
                """[TILE, n] float32."""
                keys = widened(k_s, slot, k_free, TILE) if shape.small_pages else k_s.at[slot]

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
                if shape.small_pages:
                    return widened(v_s, slot, v_free, end)

                @pl.when(end < TILE)
                def _():
                    for part in range(head_dim // 64):  # few at a time: 128 registers a thread for two streams an SM
                        some = v_s.at[slot, :, pl.ds(part * 64, 64)]
                        values = plgpu.load(some, (), layout=LAYOUT)
                        some[...] = jnp.where(_tokens(64) < end, values, jnp.zeros_like(values))

                return v_s.at[slot]

            def piece(row, index, fetched, tile):
                """How many tiles it was, and whether it was the whole row."""
                (low, high, units), queries = fetched
                unit, length, count = part(units, index)
                if shape.small_pages:
                    queries = (queries.astype(jnp.float32) * scale).astype(dtype)
                q_s.T[...] = queries
                plgpu.commit_smem()
                base = (lax.div(low, jnp.int32(UNIT)) + unit) * UNIT

                def attend(i, carry):
                    acc, m, total = carry
                    slot = lax.rem(tile + i, jnp.int32(stages))
                    plgpu.barrier_wait(k_full.at[slot])
                    s = scores_of(slot)
                    start = base + i * TILE
                    end = jnp.minimum(high - start, length * UNIT - i * TILE)  # of what this piece holds, in the tile
                    token = _tokens(n)
                    s = jnp.where((token < end) & (token >= low - start), s, MASKED)
                    m_new = jnp.maximum(m, s.max(axis=0))
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
                acc, m, total = lax.fori_loop(0, _num_tiles(length), attend, none)
                total = total.sum(axis=0)

                @pl.when(count == 1)
                def _():
                    write(row, acc, m, total)

                @pl.when(count > 1)
                def _():
                    acc_g[row, head, index] = acc
                    ml_g[row, head, index, 0] = m
                    ml_g[row, head, index, 1] = total

                return _num_tiles(length), count == 1

            def meet_if(owed):
                if not shape.interpret:
                    pl.when(owed >= 0)(lambda: meet(owed))

            def step(state):
                """What a piece left is counted a piece later, when it has long arrived: nothing waits for memory."""
                at, tile, (row, index), fetched, owed = state
                ahead = see(at + 1)
                fetched_ahead = fetch(ahead[0])
                tiles, whole = piece(row, index, fetched, tile)
                meet_if(owed)
                return at + 1, tile + tiles, ahead, fetched_ahead, jnp.where(whole, -1, row)

            first = see(jnp.int32(0))
            start = jnp.int32(0), jnp.int32(0), first, fetch(first[0]), jnp.int32(-1)
            meet_if(lax.while_loop(lambda state: state[2][0] < shape.rows, step, start)[4])
            if not shape.interpret:
                simt.program(sharing.leave_program(shape), counters)
            plgpu.wait_smem_to_gmem(0)

    return body
