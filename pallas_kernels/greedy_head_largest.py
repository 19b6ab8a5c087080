"""The largest logit of each row so far and its column: what a consumer of greedy_head keeps from tile to tile.

Logits are compared as whole numbers in their order, NaN above infinity, -0 as 0; of equal ones the lower column wins,
so neither the order of tiles nor of threads matters.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import vector

from jmoe.pallas_kernels import simt
from jmoe.pallas_kernels.greedy_head import UNIT
from jmoe.pallas_kernels.simt import BLOCK_THREADS, WARP, Pointer, Word
from jmoe.pallas_kernels.simt_floats import Float

LEAST = -(1 << 31)  # below every logit's key
NOWHERE = (1 << 31) - 1  # behind every column
WARPS = BLOCK_THREADS // WARP
WORDS = 2 * WARPS  # a row of each: keys of the warps, then columns
Best = tuple[Any, Any]  # key and column


def better_of(one: Best, other: Best) -> Best:
    """Of two (key, column), arrays."""
    wins = (one[0] > other[0]) | ((one[0] == other[0]) & (one[1] < other[1]))
    return tuple(jnp.where(wins, a, b) for a, b in zip(one, other, strict=True))  # pyright: ignore[reportReturnType]


def keep(head: Any, kept: Any, sums: Sequence[Any], first: Any, tile: Any) -> None:
    """Compares a consumer's logits with what it has kept; the first tile overwrites.

    Args:
      head: the `Head`.
      kept: `[WORDS, rows]` int32 in shared memory.
      sums: `[UNIT, rows]` float32 each, in WGMMA's layout.
      first: column of the first of them.
      tile: number of the tile.
    """
    if head.interpret:
        _keep_whole(kept, sums, first, tile)
        return
    splat = plgpu.Layout.WG_SPLAT(())

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *[plgpu.Layout.WGMMA] * len(sums), splat, splat))
    def inlined(_ctx, kept_s, *given):
        *arrays, first, tile = given
        held = [array.registers.reshape(head.rows // 8, 2) for array in arrays]  # pairs of rows; columns c and c + 8
        program = keep_program(head.rows, len(sums))
        words = (Word(value.registers.flat[0]) for value in (first, tile))

        def logit(half, eight, row, pair):
            pairs = held[half][eight, row]
            return Float(vector.extract(pairs, dynamic_position=[], static_position=[pair]))

        program(logit, Pointer.of(kept_s), *words)

    inlined(kept, *sums, first, tile)


def keep_program(rows: int, halves: int) -> Any:
    """What a thread does of `keep`.

    It holds logits of columns 16 warp + lane / 4 and 8 more of each UNIT, of rows 8 i + 2 (lane % 4) and one more for
    every i. Eight lanes have the same rows; in the end each keeps those of every eighth i, so that a warp stores
    neighbouring words, and always by the same threads: no barrier is needed.
    """

    def program(logit: Any, kept: Pointer, first: Word, tile: Word) -> None:
        thread = simt.thread() % BLOCK_THREADS
        lane = thread % WARP
        warp, octet = thread // WARP, lane // 4
        column = first + warp * 16 + octet
        fresh = tile < 1
        for start in range(0, rows, UNIT):
            at = warp * rows + lane * 2 + start
            for pair in range(2):
                best: Best = (simt.word(LEAST), simt.word(NOWHERE))
                for i in range(start // 8, min(start + UNIT, rows) // 8):
                    found = _over_lanes(_of_thread(logit, halves, i, pair, column))
                    mine = octet.equals(i % 8)
                    best = mine.select(found[0], best[0]), mine.select(found[1], best[1])
                with simt.when(lane * 2 + start < rows):
                    columns = at + WARPS * rows
                    old = fresh.select(LEAST, kept.load(at + pair)), kept.load(columns + pair)
                    key, held = _better(best, old)
                    kept.store(at + pair, key)
                    kept.store(columns + pair, held)

    return program


def give(head: Any, kept: Any, keys: Any, columns: Any, slot: Any) -> None:
    """The largest of a consumer's warps, to keys[:, slot] and columns[:, slot] in global memory."""
    if head.interpret:
        keys[:, slot], columns[:, slot] = kept[0], kept[WARPS]
        return
    simt.program(give_program(head.rows, keys.shape[1]), kept, keys, columns, words=(slot,))


def give_program(rows: int, slots: int) -> Any:
    """A thread takes one row."""

    def program(kept: Pointer, keys: Pointer, columns: Pointer, slot: Word) -> None:
        row = simt.thread() % BLOCK_THREADS
        simt.barrier()
        with simt.when(row < rows):
            found = [(kept.load(row + w * rows), kept.load(row + (WARPS + w) * rows)) for w in range(WARPS)]
            best = found[0]
            for other in found[1:]:
                best = _better(best, other)
            keys.store(row * slots + slot, best[0])
            columns.store(row * slots + slot, best[1])

    return program


def _of_thread(logit: Any, halves: int, i: int, pair: int, column: Word) -> Best:
    """The largest of a thread's logits of one row, which come in the order of their columns."""
    best, at = None, column
    for half in range(halves):
        for row in range(2):
            key, here = _key(logit(half, i, row, pair)), column + (UNIT * half + 8 * row)
            if best is None:
                best = key
                continue
            larger = best < key
            best, at = larger.select(key, best), larger.select(here, at)
    return best, at


def _over_lanes(best: Best) -> Best:
    for distance in (4, 8, 16):
        best = _better(best, (simt.swap(best[0], distance), simt.swap(best[1], distance)))
    return best


def _better(one: Best, other: Best) -> Best:
    """The larger key; of equal ones the lower column."""
    loses = (one[0] < other[0]) | (one[0].equals(other[0]) & (other[1] < one[1]))
    return loses.select(other[0], one[0]), loses.select(other[1], one[1])


def _key(value: Float) -> Word:
    """A whole number in the order of floats: negative ones count down from 0."""
    bits = value.bits()
    return (bits < 0).select(simt.word(LEAST) - bits, bits)


def _keep_whole(kept: Any, sums: Sequence[Any], first: Any, tile: Any) -> None:
    """The interpreter's `keep`, which has no single threads."""
    logits = jnp.concatenate(sums)
    bits = lax.bitcast_convert_type(logits, jnp.int32)
    keys = jnp.where(jnp.isnan(logits), NOWHERE, jnp.where(bits < 0, jnp.int32(LEAST) - bits, bits))
    best = keys.max(axis=0)
    columns = lax.broadcasted_iota(jnp.int32, keys.shape, 0) + first
    found = best, jnp.where(keys == best, columns, NOWHERE).min(axis=0)
    old = jnp.where(tile == 0, LEAST, kept[0]), kept[WARPS]
    kept[0], kept[WARPS] = better_of(found, old)
