"""Decode attention over pages on Hopper (Mosaic GPU): what a thread block does.

A block is a stream: one warpgroup loads pages by TMA, some tiles of 64 tokens ahead, two compute, every other tile each.
scores^T = K q^T and out^T = V^T p^T, so that tokens and head size fill wgmma's M and the few query heads of a KV head
are its N. See `paged_decode_plan` for what a stream reads and `paged_decode_queue` for how streams share the pieces.
"""

import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe.pallas_kernels import paged_decode_queue as queue
from jmoe.pallas_kernels import simt
from jmoe.pallas_kernels.grouped_matmul_threads import load_by_row
from jmoe.pallas_kernels.paged_decode_plan import MASKED, TILE, UNIT, Decode
from jmoe.pallas_kernels.paged_decode_queue import THREADS
from jmoe.pallas_kernels.paged_decode_stream import Stream, load_pages, num_tiles

LOG2E = math.log2(math.e)
LAYOUT = plgpu.Layout.WGMMA
TURNED = plgpu.Layout.WGMMA_TRANSPOSED  # the same, by columns: what is stored transposed
BYTES = plgpu.Layout.WGMMA_UPCAST_2X  # of 8-bit elements that will be 16-bit ones in LAYOUT
BY_HEAD = LAYOUT.reduce(0)
AT_ONCE = 64  # numbers a thread of partial results on their way: of 8, where a KV head has up to 8 query heads of 128


def _down(vector, length):
    """[n] -> [length, n]."""
    return lax.broadcast_in_dim(vector, (length, vector.shape[0]), (1,))


def _filled(value, shape, layout):
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _tokens(width):
    return plgpu.broadcasted_iota(jnp.int32, (TILE, width), 0, layout=LAYOUT)


def _over_tokens(kind: str, value, scratch):
    """The maximum ("max") or sum ("add") of each column, by a warpgroup in a scratch of its own: Pallas has one for all."""
    result = plgpu.ShapeDtypeStruct(value.shape[1:], jnp.float32, BY_HEAD)

    @plgpu.inline_mgpu(arg_types=(LAYOUT, plgpu.RefType()), return_type=result)
    def inlined(_ctx, array, scratch_s):
        return array.reduce(kind, 0, scratch=scratch_s)

    return inlined(value, scratch)


def body_of(shape: Decode):
    group, head_dim, n, dtype = shape.group, shape.head_dim, shape.columns, shape.dtype
    num_heads, num_kv_heads = shape.num_heads, shape.num_kv_heads
    soft_cap = shape.logit_soft_cap

    def body(
        q_g, k_g, v_g, table_g, start_g, tokens_g, k_scale_g, v_scale_g, sinks_g, whole_g, plan_g,
        out_g, acc_g, ml_g, counters_g,
        k_s, v_s, wide_s, raw_q_s, q_s, p_s, o_s, run_s, half_s, ml_s, reduced_s, words_s, rows_s,
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

        def place(row):
            """Rows of q that fill the columns, and how many of the first ones belong to others."""
            want = row * num_heads + head * group
            start = jnp.minimum(want, shape.flat_rows - n)
            return start, want - start

        @pl.when(role == shape.consumers)
        def _load():
            sides = (k_g, k_s, shape.stages, k_full, k_free), (v_g, v_s, shape.value_stages, v_full, v_free)
            load_pages(stream, planned, table_g, (q_g, lambda row: place(row)[0], raw_q_s), sides)

        @pl.when(role < shape.consumers)
        def _compute():
            if not shape.interpret:

                @pl.when(role == 0)
                def _():
                    stream.plan()
                    plgpu.barrier_arrive(planned)

            scale = k_scale_g[0] * (head_dim**-0.5 * LOG2E)

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

            def merge(row, count):
                """All pieces of a row, in order; some on their way together, as each takes a microsecond to come."""
                at_once = min(8, AT_ONCE * THREADS // (n * head_dim)) // (1 if shape.consumers == 2 else 4)

                def step(i, found):
                    first = i * at_once
                    together = [partial(row, jnp.minimum(first + j, count - 1)) for j in range(at_once)]
                    for j, piece in enumerate(together):
                        more = add(found, piece)
                        there = first + j < count
                        found = tuple(jnp.where(there, new, old) for new, old in zip(more, found, strict=True))
                    return found

                none = tuple(_filled(value, (n,), BY_HEAD) for value in (MASKED, 0))
                rounds = lax.div(count + (at_once - 1), jnp.int32(at_once))
                write(row, *lax.fori_loop(0, rounds, step, (_filled(0, (head_dim, n), LAYOUT), *none)))

            run, half = (run_s, ml_s.at[0]), (half_s, ml_s.at[1])

            def store(place, acc, m, total):
                place[0][...], place[1][0], place[1][1] = acc, m, total

            def stored(place):
                m, total = (plgpu.load(place[1].at[i], (), layout=BY_HEAD, optimized=False) for i in (0, 1))
                return plgpu.load(place[0], (), layout=LAYOUT, optimized=False), m, total

            def hand_over(number, found):
                """The second consumer's tiles of the stream's piece of this number."""

                @pl.when(number > 0)
                def _():
                    plgpu.barrier_wait(joined)

                store(half, *found)
                plgpu.barrier_arrive(halved)

            def join(found):
                """Both consumers' tiles: a sum of two is the same, whoever has the even ones."""
                plgpu.barrier_wait(halved)
                both = add(found, stored(half))
                plgpu.barrier_arrive(joined)
                return both

            def end(row, piece, count, found):
                """Of a piece: added up where the row is one item, else a partial result; who ends the last adds those up."""
                whole = stream.whole(row)
                found = lax.cond(whole & (piece > 0), lambda: add(stored(run), found), lambda: found)

                @pl.when(whole & (piece == count - 1))
                def _():
                    write(row, *found)

                @pl.when(whole & (piece < count - 1))
                def _():
                    store(run, *found)

                @pl.when(jnp.logical_not(whole))
                def _():
                    keep(row, piece, *found)
                    if not shape.interpret:
                        simt.program(queue.ended_program(shape), stream.counters_g, words_s, words=(row, count))
                        pl.when(words_s[queue.BEFORE] == count - 1)(lambda: merge(row, count))

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
                    end(row, piece, count, found)
                else:
                    pl.when(role == 1)(lambda: hand_over(number, found))
                    pl.when(role == 0)(lambda: end(row, piece, count, join(found)))
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
                    p = jnp.exp2(s - _down(m_new, TILE))
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
                    return acc * _down(alpha, head_dim) + new, m_new, total * _down(alpha, TILE) + p

                none = _filled(0, (head_dim, n), LAYOUT), _filled(MASKED, (n,), BY_HEAD), _filled(0, (TILE, n), LAYOUT)
                acc, m, total = lax.fori_loop(0, lax.div(tiles + (shape.consumers - 1) - own, jnp.int32(shape.consumers)), attend, none)
                return acc, m, over_tokens("add", total)

            def step(state):
                number, tile, code = state
                tile = tile + attend_to(code, number, tile)
                return number + 1, tile, stream.heard(number + 1)

            start = jnp.int32(0), jnp.int32(0), stream.heard(jnp.int32(0))
            number, *_ = lax.while_loop(lambda state: state[2] < shape.end, step, start)

            if shape.consumers == 2:

                @pl.when((role == 1) & (number > 0))
                def _():
                    plgpu.barrier_wait(joined)

            plgpu.wait_smem_to_gmem(0)

    return body
