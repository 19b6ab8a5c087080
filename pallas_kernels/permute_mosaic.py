"""The Mosaic GPU bodies of permute and unpermute: threads that count, sums over warps, rows copied by 16-byte vectors.

Up to MAX_FUSED_PAIRS pairs one kernel does all: every block counts the experts anew (a few KB out of L2), then each of
its warps finds the place of one pair and copies its row. Above that, counting again in every block would take
O(pairs^2): see `permute_many_mosaic`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe.pallas_kernels import simt
from jmoe.pallas_kernels import simt_floats as floats
from jmoe.pallas_kernels.permute_many_mosaic import CHUNK, load_chunk, num_chunks, permute_many, row_types
from jmoe.pallas_kernels.permute_rows_mosaic import VECTOR_BYTES, Row, store
from jmoe.pallas_kernels.simt import BLOCK_THREADS, WARP, Pointer, Word

MAX_FUSED_PAIRS = 2048
LOADS = 8  # of 16 bytes that a thread of unpermute has in flight: k rows of one vector, or more vectors of fewer rows
WARPS = BLOCK_THREADS // WARP


def permute_pallas(
    rows: jax.Array, local_idx: jax.Array, num_experts: int, align: int, padded: int, float8: bool
) -> tuple[Any, ...]:
    """The fields of `Permuted`, `padded` rows of them; see `permute`."""
    num_rows, k = local_idx.shape
    row, pairs = Row(rows.shape[1], rows.dtype, float8), num_rows * k
    row.check("permute")
    if pairs > MAX_FUSED_PAIRS:
        return permute_many(rows, local_idx, num_experts, align, padded, row)

    def permute_rows(*refs):
        simt.follow()
        simt.program(_fused(pairs, k, num_experts, align, row), *refs)

    groups = jax.ShapeDtypeStruct((num_experts,), jnp.int32)
    sizes, starts, positions, out, *scales = plgpu.kernel(
        permute_rows,
        out_type=(groups, groups, jax.ShapeDtypeStruct((pairs,), jnp.int32), *row_types(row, padded)),
        scratch_types=[plgpu.SMEM((_round_up(pairs, 4),), jnp.int32), plgpu.SMEM((num_experts,), jnp.int32)],
        grid=(1 + _ceil_div(pairs * num_chunks(row), WARPS),),
        grid_names=("block",),
    )(rows, local_idx.reshape(-1))
    return out, sizes, starts, positions.reshape(num_rows, k), scales[0] if scales else None


def unpermute_pallas(
    rows: jax.Array, positions: jax.Array, topk_weights: jax.Array | None, older_positions: bool, out_dtype: Any
) -> jax.Array:
    """`unpermute` in one kernel: a thread sums some vectors of 16 bytes of k rows, all loads in flight; see there."""
    num_rows, k = positions.shape
    width = rows.shape[1]
    lanes = VECTOR_BYTES // rows.dtype.itemsize
    if rows.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32) or width % lanes:
        raise ValueError(
            f"unpermute: 'pallas' expected 16- or 32-bit floats, rows of a multiple of {VECTOR_BYTES} bytes, got "
            f"{rows.dtype} and {width} columns"
        )
    chunks = _ceil_div(width // lanes, BLOCK_THREADS)
    each = max(1, min(chunks, LOADS // k))
    blocks = _ceil_div(chunks, each)

    def unpermute_rows(*refs):
        if not older_positions:
            simt.follow()
        weighted = topk_weights is not None
        simt.program(_combine(k, width, lanes, each, blocks, rows.dtype, weighted, older_positions, out_dtype), *refs)
        if older_positions:
            simt.follow()

    kernel = plgpu.kernel(
        unpermute_rows,
        out_type=jax.ShapeDtypeStruct((num_rows, width), out_dtype),
        grid=(num_rows * blocks,),
        grid_names=("block",),
    )
    weights = () if topk_weights is None else (topk_weights.reshape(-1),)
    return kernel(rows, positions.reshape(-1), *weights)


def _combine(
    k: int, width: int, lanes: int, each: int, blocks: int, dtype: Any, weighted: bool, early: bool, out_dtype: Any
) -> Callable[..., None]:
    """Block b sums `each` chunks of row b // blocks, from chunk b % blocks * each on. early: positions are read before
    the rows are there."""
    vectors = width // lanes

    def program(rows: Pointer, positions: Pointer, *weights_and_out: Pointer):
        *weights, out = weights_and_out
        row = simt.block() // blocks
        first = simt.thread() + simt.block() % blocks * (each * BLOCK_THREADS)
        places = [positions.load(row * k + j) for j in range(k)]
        if early:
            simt.follow_inside()
        shares = [floats.Float.load(weights[0], row * k + j) for j in range(k)] if weighted else []
        sources = [rows.skip((place < 0).select(0, place), width * jnp.dtype(dtype).itemsize) for place in places]
        indices = [first + n * BLOCK_THREADS for n in range(each)]
        terms = []
        for index in indices:
            safe = (index < vectors).select(index, vectors - 1)
            terms.append([source.load_vector(safe, lanes, simt.element_type(dtype)) for source in sources])
        for index, loaded in zip(indices, terms, strict=True):
            total = floats.Floats.zeros(lanes)
            for j, term in enumerate(map(floats.Floats.of, loaded)):
                heard = places[j] >= 0
                if weighted:
                    term, heard = term.times(shares[j]), heard & shares[j].is_not_zero()
                total = total + term.where(heard)
            with simt.when(index < vectors):
                _store_sums(out.skip(row, width * out_dtype.itemsize), total, index, lanes, out_dtype)

    return program


def _store_sums(target: Pointer, total: floats.Floats, index: Word, lanes: int, out_dtype: Any) -> None:
    if out_dtype == jnp.bfloat16:
        target.store_vector(index, total.to(simt.element_type(out_dtype)), 2 * lanes)
        return
    for i, four in enumerate(total.fours()):
        target.store_vector(index * (lanes // 4) + i, four)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _round_up(a: int, b: int) -> int:
    return _ceil_div(a, b) * b


def _padded(count: Word, align: int) -> Word:
    return count if align == 1 else (count + (align - 1)) // align * align


def _fused(pairs: int, k: int, num_experts: int, align: int, row: Row) -> Callable[..., None]:
    """Block 0 says sizes and starts; each warp of the others moves up to 4 KB of one pair's row."""
    chunks = num_chunks(row)

    def program(rows: Pointer, local_idx: Pointer, sizes: Pointer, starts: Pointer, positions: Pointer, *rest: Pointer):
        out, *scales, ids, counts = rest
        thread, lane, block = simt.thread(), simt.thread() % WARP, simt.block()
        item = (block - 1) * WARPS + simt.warp()
        mine = (block >= 1) & (item < pairs * chunks)
        item = mine.select(item, 0)  # a warp with nothing to move still counts
        pair, chunk = item // chunks, item % chunks
        parts = load_chunk(row, rows.skip(pair // k, row.row_bytes), chunk * CHUNK + lane)
        _count(local_idx, ids, counts, thread, pairs, num_experts)
        with simt.when(mine):
            expert = ids.load(pair)
            first = lane.equals(0) & chunk.equals(0)
            with simt.when((expert < 0) & first):
                positions.store(pair, -1)
            with simt.when(expert >= 0):
                place = _sum_below(counts, expert, lane, align) + _rank(ids, pair, expert, lane)
                with simt.when(first):
                    positions.store(pair, place)
                store(row, parts, out, scales[0] if scales else None, place)
        with simt.when(block.equals(0) & simt.warp().equals(0)):
            _say_groups(counts, sizes, starts, lane, num_experts, align)

    return program


def _count(local_idx: Pointer, ids: Pointer, counts: Pointer, thread: Word, pairs: int, num_experts: int) -> None:
    """Copies the ids to shared memory and counts each expert's."""
    steps = _ceil_div(pairs, BLOCK_THREADS)
    full = pairs // BLOCK_THREADS
    held = [local_idx.load(thread + step * BLOCK_THREADS) for step in range(full)]  # all in flight at once

    def zero(index):
        counts.store(index, 0)
        return []

    simt.loop(thread, num_experts, BLOCK_THREADS, [], zero)
    simt.barrier()

    def take(index, expert):
        ids.store(index, expert)
        with simt.when(expert >= 0):
            counts.add(expert, 1)

    for step, expert in enumerate(held):
        take(thread + step * BLOCK_THREADS, expert)
    if steps > full:
        last = thread + full * BLOCK_THREADS
        with simt.when(last < pairs):
            take(last, local_idx.load(last))
    simt.barrier()


def _sum_below(counts: Pointer, expert: Word, lane: Word, align: int) -> Word:
    """Rows of the groups before `expert`, padding included; a warp together."""

    def add(index, total):
        return [total + _padded(counts.load(index), align)]

    [total] = simt.loop(lane, expert, WARP, [simt.word(0)], add)
    return simt.warp_sum(total)


def _rank(ids: Pointer, pair: Word, expert: Word, lane: Word) -> Word:
    """Pairs before `pair` with the same expert; a warp together, four ids a lane and step."""

    def add(index, total):
        words = simt.words_of(ids.load_vector(index, 4, simt.i32()))
        for i, word in enumerate(words):
            total = total + (word.equals(expert) & (index * 4 + i < pair)).count()
        return [total]

    [total] = simt.loop(lane, (pair + 3) // 4, WARP, [simt.word(0)], add)
    return simt.warp_sum(total)


def _say_groups(counts: Pointer, sizes: Pointer, starts: Pointer, lane: Word, num_experts: int, align: int) -> None:
    """A warp says every expert's size and start; a lane takes consecutive experts."""
    each = _ceil_div(num_experts, WARP)
    held = []
    for i in range(each):
        expert = lane * each + i
        inside = expert < num_experts
        held.append((expert, inside, inside.select(counts.load(inside.select(expert, 0)), 0)))
    padded = [_padded(size, align) for _, _, size in held]
    start = simt.warp_sum_before(sum(padded[1:], padded[0]), lane)
    for (expert, inside, size), rows in zip(held, padded, strict=True):
        with simt.when(inside):
            sizes.store(expert, size)
            starts.store(expert, start)
        start = start + rows
