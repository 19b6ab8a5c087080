"""permute for prefill sizes, in O(pairs) and three Mosaic GPU kernels: count per block of pairs, place, copy.

A counting sort whose order doesn't depend on timing: blocks of pairs stand in their order, in a block the warps' runs
of 128 pairs, in a run the lanes. Each row is read once and written k times.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe.pallas_kernels import simt
from jmoe.pallas_kernels.block_scaled import BLOCK, FLOAT8
from jmoe.pallas_kernels.permute_rows_mosaic import IN_FLIGHT, Part, Row, load, rounded, store
from jmoe.pallas_kernels.simt import BLOCK_THREADS, WARP, Pointer, Word

WARPS = BLOCK_THREADS // WARP
BLOCK_PAIRS = 512  # 32,768 pairs are 64 blocks: fewer would leave the counting slow, more the reading of the counts
RUN = BLOCK_PAIRS // WARPS  # pairs of one warp
CHUNK = WARP * IN_FLIGHT  # vectors of one warp
BATCH = 16  # counts that a thread has asked for at a time


def permute_many(
    rows: jax.Array, local_idx: jax.Array, num_experts: int, align: int, padded: int, row: Row
) -> tuple[Any, ...]:
    """The fields of `Permuted`; see `permute`."""
    num_rows, k = local_idx.shape
    pairs = num_rows * k
    blocks = -(-pairs // BLOCK_PAIRS)
    groups = jax.ShapeDtypeStruct((num_experts,), jnp.int32)
    ids = local_idx.reshape(-1)

    def count_pairs(*refs):
        simt.follow()
        simt.program(_count(pairs, num_experts), *refs)

    def place_pairs(*refs):
        simt.follow()
        simt.program(_place(pairs, blocks, num_experts, align), *refs)

    def copy_rows(*refs):
        simt.follow()
        simt.program(_copy(num_rows, k, row), *refs)

    counts = plgpu.kernel(
        count_pairs,
        out_type=jax.ShapeDtypeStruct((blocks, num_experts), jnp.int32),
        scratch_types=[plgpu.SMEM((num_experts,), jnp.int32)],
        grid=(blocks,),
        grid_names=("block",),
    )(ids)
    sizes, starts, positions = plgpu.kernel(
        place_pairs,
        out_type=(groups, groups, jax.ShapeDtypeStruct((pairs,), jnp.int32)),
        scratch_types=[plgpu.SMEM((2, num_experts), jnp.int32), plgpu.SMEM((WARPS, num_experts), jnp.int32)],
        grid=(blocks,),
        grid_names=("block",),
    )(ids, counts)
    out, *scales = plgpu.kernel(
        copy_rows,
        out_type=row_types(row, padded),
        grid=(-(-num_rows * num_chunks(row) // WARPS),),
        grid_names=("block",),
    )(rows, positions)
    return out, sizes, starts, positions.reshape(num_rows, k), scales[0] if scales else None


def row_types(row: Row, padded: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Of the permuted rows, and of their scales where they are rounded to float8."""
    if not row.float8:
        return (jax.ShapeDtypeStruct((padded, row.width), row.dtype),)
    scales = jax.ShapeDtypeStruct((padded, row.width // BLOCK), jnp.float32)
    return jax.ShapeDtypeStruct((padded, row.width), FLOAT8), scales


def num_chunks(row: Row) -> int:
    """Warps that share a row."""
    return -(-row.vectors // CHUNK)


def load_chunk(row: Row, source: Pointer, first: Word) -> list[Part]:
    """What one of them takes, ready to be stored."""
    steps = range(min(IN_FLIGHT, -(-row.vectors // WARP)))
    return rounded(row, load(row, source, first, steps, whole=row.vectors % (len(steps) * WARP) == 0))


def _each_expert(num_experts: int, body: Callable[[Word], None]) -> None:
    """A thread's share of the experts."""

    def step(expert):
        body(expert)
        return []

    simt.loop(simt.thread(), num_experts, BLOCK_THREADS, [], step)


def _count(pairs: int, num_experts: int) -> Callable[..., None]:
    """counts[b, e]: pairs of block b with expert e."""

    def program(ids: Pointer, counts: Pointer, own: Pointer):
        first = simt.block() * BLOCK_PAIRS + simt.thread()
        places = [first + step * BLOCK_THREADS for step in range(BLOCK_PAIRS // BLOCK_THREADS)]
        experts = [(place < pairs).select(ids.load((place < pairs).select(place, 0)), -1) for place in places]
        _each_expert(num_experts, lambda expert: own.store(expert, 0))
        simt.barrier()
        for expert in experts:
            with simt.when(expert >= 0):
                own.add(expert, 1)
        simt.barrier()
        target = counts.skip(simt.block(), num_experts * 4)
        _each_expert(num_experts, lambda expert: target.store(expert, own.load(expert)))

    return program


def _place(pairs: int, blocks: int, num_experts: int, align: int) -> Callable[..., None]:
    """Every block adds up the counts of all; then its warps place their runs one behind the other."""

    def program(
        ids: Pointer,
        counts: Pointer,
        sizes: Pointer,
        starts: Pointer,
        positions: Pointer,
        totals: Pointer,
        next_: Pointer,
    ):
        warp, lane = simt.warp(), simt.thread() % WARP
        first = simt.block() * BLOCK_PAIRS + warp * RUN + lane
        places = [first + step * WARP for step in range(RUN // WARP)]
        experts = [(place < pairs).select(ids.load((place < pairs).select(place, 0)), -1) for place in places]
        before = totals.skip(simt.word(1), num_experts * 4)
        mine = next_.skip(warp, num_experts * 4)

        def add_up(expert):
            total, earlier = _column(counts, expert, blocks, num_experts)
            totals.store(expert, total)
            before.store(expert, earlier)
            for w in range(WARPS):
                next_.store(expert + w * num_experts, 0)

        _each_expert(num_experts, add_up)
        simt.barrier()
        with simt.when(warp.equals(0)):
            _add_starts(totals, before, sizes, starts, lane, num_experts, align)
        for expert in experts:
            with simt.when(expert >= 0):
                mine.add(expert, 1)
        simt.barrier()
        _each_expert(num_experts, lambda expert: _line_up(next_, before.load(expert), expert, num_experts))
        simt.barrier()
        for place, expert in zip(places, experts, strict=True):
            _take(positions, mine, place, expert, lane, pairs)

    return program


def _column(counts: Pointer, expert: Word, blocks: int, num_experts: int) -> tuple[Word, Word]:
    """The sum of counts[:, expert], and of the blocks before this one."""
    total = earlier = simt.word(0)
    for start in range(0, blocks, BATCH):
        numbers = range(start, min(start + BATCH, blocks))
        for number, found in [(n, counts.load(expert + n * num_experts)) for n in numbers]:
            total = total + found
            earlier = earlier + (simt.block() >= number + 1).select(found, 0)
    return total, earlier


def _add_starts(
    totals: Pointer, before: Pointer, sizes: Pointer, starts: Pointer, lane: Word, num_experts: int, align: int
) -> None:
    """One warp: before[e] += start[e]; block 0 also says sizes and starts. A lane takes consecutive experts."""
    each = -(-num_experts // WARP)
    held = []
    for i in range(each):
        expert = lane * each + i
        inside = expert < num_experts
        held.append((expert, inside, inside.select(totals.load(inside.select(expert, 0)), 0)))
    padded = [(size + (align - 1)) // align * align for _, _, size in held]
    start = simt.warp_sum_before(sum(padded[1:], padded[0]), lane)
    for (expert, inside, size), rows in zip(held, padded, strict=True):
        with simt.when(inside):
            before.store(expert, before.load(expert) + start)
            with simt.when(simt.block().equals(0)):
                sizes.store(expert, size)
                starts.store(expert, start)
        start = start + rows


def _line_up(next_: Pointer, place: Word, expert: Word, num_experts: int) -> None:
    """next_[w, expert]: from a count to where warp w's first pair of this expert goes."""
    for w in range(WARPS):
        count = next_.load(expert + w * num_experts)
        next_.store(expert + w * num_experts, place)
        place = place + count


def _take(positions: Pointer, mine: Pointer, place: Word, expert: Word, lane: Word, pairs: int) -> None:
    """Lanes with the same expert stand in lane order; the last of them moves the warp's next place on."""
    earlier, alike = simt.warp_same(expert, lane)
    here = expert >= 0
    position = here.select(mine.load(here.select(expert, 0)) + earlier, -1)
    simt.warp_barrier()  # all have read before one writes
    with simt.when(here & (earlier + 1).equals(alike)):
        mine.store(expert, position + 1)
    simt.warp_barrier()
    with simt.when(place < pairs):
        positions.store(place, position)


def _copy(num_rows: int, k: int, row: Row) -> Callable[..., None]:
    """A warp takes up to 4 KB of one row and writes them to the row's k places."""

    def program(rows: Pointer, positions: Pointer, out: Pointer, *scales: Pointer):
        item = simt.block() * WARPS + simt.warp()
        with simt.when(item < num_rows * num_chunks(row)):
            number, first = item // num_chunks(row), item % num_chunks(row) * CHUNK + simt.thread() % WARP
            places = [positions.load(number * k + j) for j in range(k)]
            source = rows.skip(number, row.row_bytes)
            parts = load_chunk(row, source, first)
            for place in places:
                with simt.when(place >= 0):
                    store(row, parts, out, scales[0] if scales else None, (place >= 0).select(place, 0))

    return program
