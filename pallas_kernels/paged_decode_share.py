"""What the thread blocks of decode attention work out and count for themselves, thread by thread.

Every warpgroup finds its range from the lengths. Streams that share a row count their pieces in scratch memory that
nobody cleared: each head's first stream clears the head's counters and marks them, the others wait for the marks, and
the stream that ends last wipes them. A fill by XLA would be a kernel of its own, 1.5 us.
"""

import functools

from jmoe.pallas_kernels import simt, simt_marks
from jmoe.pallas_kernels.paged_decode_plan import PIECES, SPARE, TILE_UNITS, UNIT, Decode
from jmoe.pallas_kernels.simt import WARP, Pointer, Word

THREADS = 128
# Words of a warpgroup: begin and end of its range as row * PIECES + piece; what `arrive_program` found of the row that
# the range begins in and of the one that it ends in; sums and maxima of the warps; what `keep_words` spares registers.
BEGIN, END, BEFORE, COVER, SUMS, LONGEST, KEPT, WORDS = 0, 1, 2, 4, 8, 12, 16, 32
# Of a head's counters, behind the marks: streams that ended; pieces of each row that are there; and how many of them
# are in the row's first partial result.
DONE, ARRIVED = 2, 4


def num_counters(rows: int) -> int:
    return ARRIVED + 2 * rows


def plan_program(shape: Decode, with_tokens: bool):
    """`program(start_pos, num_tokens if with_tokens, words)`, by one warpgroup; as `decode_plan`."""
    rows = shape.rows
    per_thread = -(-rows // THREADS)

    def program(*pointers: Pointer) -> None:
        start_pos, num_tokens, words = pointers if with_tokens else (pointers[0], None, pointers[1])
        thread = simt.thread() % THREADS
        lane, warp = thread % WARP, thread // WARP

        def units_of(row: Word) -> Word:
            safe = (row < rows).select(row, rows - 1)
            start = start_pos.load(safe)
            return _num_units(shape, start, num_tokens.load(safe) if num_tokens is not None else 1)

        mine = [units_of(thread * per_thread + i) for i in range(per_thread)]
        tiles = [(thread * per_thread + i < rows).select(_ceil(units, TILE_UNITS), 0) for i, units in enumerate(mine)]
        total = sum(tiles[1:], start=tiles[0])
        before = simt.warp_sum_before(total, lane)
        longest = simt.warp_largest(functools.reduce(_larger, tiles))
        with simt.when(lane.equals(WARP - 1)):
            words.store(warp + SUMS, before + total)
            words.store(warp + LONGEST, longest)
        with simt.when(thread.equals(0)):
            words.store(BEGIN, rows * PIECES)
            words.store(END, rows * PIECES)
        simt.barrier()
        sums = [words.load(SUMS + w) for w in range(THREADS // WARP)]
        for w, tiles_of_warp in enumerate(sums):
            before = before + (warp < w + 1).select(0, tiles_of_warp)
        share = _share(shape, sums, [words.load(LONGEST + w) for w in range(THREADS // WARP)])
        first = simt.block() // shape.num_kv_heads * share
        for i, (units, count) in enumerate(zip(mine, tiles, strict=True)):
            for word, position in ((BEGIN, first), (END, first + share)):
                with simt.when((position >= before) & (position < before + count)):
                    words.store(word, _code(shape, thread * per_thread + i, units, position - before))
            before = before + count
        simt.barrier()

    return program


def _num_units(shape: Decode, start: Word, tokens: Word | int) -> Word:
    units = (start + tokens + (UNIT - 1)) // UNIT
    if shape.sliding_window is not None:
        low = start + (1 - shape.sliding_window)
        units = units - (low < 0).select(0, low) // UNIT
    return (units < 1).select(1, units)


def _code(shape: Decode, row: Word, units: Word, tile: Word) -> Word:
    """The first piece that begins at a row's tile or behind it."""
    count = _ceil(units, shape.shortest // UNIT)
    count = (count < shape.most).select(count, shape.most)
    tiles = _ceil(_ceil(units, count), TILE_UNITS)
    piece = _ceil(tile, tiles)
    return (piece < _ceil(units, tiles * TILE_UNITS)).select(row * PIECES + piece, (row + 1) * PIECES)


def _share(shape: Decode, sums: list[Word], longest: list[Word]) -> Word:
    """Tiles of a range: an equal part of all, or whole rows of the longest where that leaves few ranges idle."""
    share = _ceil(sum(sums[1:], start=sums[0]), shape.ranges)
    row = functools.reduce(_larger, longest)
    whole = _ceil(share, row) * row
    return (whole < share + share // SPARE + 1).select(whole, share)


def _larger(a: Word, b: Word) -> Word:
    return (a < b).select(b, a)


def _ceil(dividend: Word, divisor: Word | int) -> Word:
    return (dividend + divisor - 1) // divisor


def keep_words(words: Pointer, *numbers: Word) -> None:
    """Puts numbers that all threads know into shared memory; a barrier must follow."""
    simt.barrier()  # none is read any more
    with simt.when((simt.thread() % THREADS).equals(0)):
        for i, number in enumerate(numbers):
            words.store(KEPT + i, number)


def open_program(shape: Decode):
    """A head's first stream clears the head's counters, then marks them: `program(counters)`."""

    def program(counters: Pointer) -> None:
        thread = simt.thread() % THREADS
        with simt.when(simt.block() < shape.num_kv_heads):
            for i in range(DONE, num_counters(shape.rows), THREADS):
                with simt.when(thread + i < num_counters(shape.rows)):
                    counters.store(thread + i, 0)
        simt.barrier()
        with simt.when(thread.equals(0) & (simt.block() < shape.num_kv_heads)):
            simt_marks.mark(counters)

    return program


def arrive_program(shape: Decode):
    """Once all partial results were stored: `program(counters, words, row, pieces, row, pieces, cover)`.

    Counts the pieces that this stream leaves of the row that its range begins in, and of the one that it ends in (whose
    first partial result holds `cover` pieces, if any). words[BEFORE + i] and words[COVER + i] say what is there of each
    before, and in its first partial result. Two warps, so that one doesn't wait for the other.
    """

    def program(counters: Pointer, words: Pointer, *given: Word) -> None:
        simt.barrier()
        thread = simt.thread() % THREADS
        for i, (row, pieces) in enumerate((given[:2], given[2:4])):
            with simt.when(thread.equals(i * WARP) & (pieces >= 1)):
                simt_marks.wait(counters)
                if i == 1:
                    with simt.when(given[4] >= 1):
                        counters.store(row + ARRIVED + shape.rows, given[4])
                words.store(BEFORE + i, simt_marks.add(counters, row + ARRIVED, pieces))
                words.store(COVER + i, counters.load(row + ARRIVED + shape.rows))
        simt.barrier()

    return program


def leave_program(shape: Decode):
    """The last stream of a head wipes the marks: `program(counters)`, once nothing else of the head is counted."""

    def program(counters: Pointer) -> None:
        simt.barrier()
        with simt.when((simt.thread() % THREADS).equals(0)):
            simt_marks.wait(counters)
            with simt.when(simt_marks.add(counters, DONE, 1).equals(shape.ranges - 1)):
                simt_marks.wipe(counters)

    return program
