"""How the thread blocks of decode attention share the pieces of a call: by counters in memory, thread by thread.

Blocks get unequal shares of the memory's bandwidth (1.3 to 1 seen on an H100), so a stream takes the next piece of its
KV head whenever it has requested all of the last one. Which stream has a piece changes no bit of its result. The
counters stand in scratch memory that nobody cleared: each head's first stream clears them and writes two 32-bit marks;
the others wait for the marks, and the stream that ends last wipes them. A fill by XLA would be a kernel of its own,
1.5 us.
"""

from jmoe.pallas_kernels import simt, simt_marks
from jmoe.pallas_kernels.paged_decode_plan import LONGEST, PIECES, SHORTEST, TILE_UNITS, UNIT, Decode
from jmoe.pallas_kernels.simt import WARP, Pointer, Word

THREADS = 128
NEXT, DONE, ARRIVED = 2, 3, 4  # of a head's counters: behind the marks, and before one for each row
TAG_BITS = 4
TAGS = 1 << TAG_BITS  # claims that may stand in the ring; more than a stream's tiles on their way and two
# A stream's words: tags and claims; the number of claims; the next claim's piece; found counts; sums of the warps; and
# from ENDS on the number of pieces of all rows up to each.
CLAIMS, PIECE, FOUND, SUMS, ENDS = 16, 17, 18, 20, 24


def num_words(rows: int) -> int:
    return ENDS + rows


def num_counters(rows: int) -> int:
    return ARRIVED + rows


def plan_program(shape: Decode, with_tokens: bool):
    """The loading warpgroup counts every row's pieces: `program(start_pos, num_tokens if with_tokens, words)`."""
    rows = shape.rows
    per_thread = -(-rows // THREADS)

    def program(*pointers: Pointer) -> None:
        start_pos, num_tokens, words = pointers if with_tokens else (pointers[0], None, pointers[1])
        thread = simt.thread() % THREADS
        lane, warp = thread % WARP, thread // WARP

        def pieces_of(row: Word) -> Word:
            there = row < rows
            safe = there.select(row, rows - 1)
            start = start_pos.load(safe)
            return there.select(_num_pieces(shape, start, num_tokens.load(safe) if num_tokens is not None else 1), 0)

        mine = [pieces_of(thread * per_thread + i) for i in range(per_thread)]
        total = sum(mine[1:], start=mine[0])
        before = simt.warp_sum_before(total, lane)
        with simt.when(lane.equals(WARP - 1)):
            words.store(warp + SUMS, before + total)
        with simt.when(thread < TAGS):
            words.store(thread, (thread + 1) % TAGS)  # not the tag that a claim will have there
        with simt.when(thread.equals(0)):
            words.store(CLAIMS, 0)
        simt.barrier()
        for w in range(THREADS // WARP):
            before = before + (warp < w + 1).select(0, words.load(SUMS + w))
        for i, count in enumerate(mine):
            before = before + count
            row = thread * per_thread + i
            with simt.when(row < rows):
                words.store(row + ENDS, before)
        simt.barrier()

    return program


def _num_pieces(shape: Decode, start: Word, tokens: Word | int) -> Word:
    """As `Cuts.of`."""
    cuts = shape.cuts
    units = (start + tokens + (UNIT - 1)) // UNIT
    if shape.sliding_window is not None:
        low = start + (1 - shape.sliding_window)
        units = units - (low < 0).select(0, low) // UNIT
    units = (units < 1).select(1, units)
    count = _ceil(units, LONGEST)
    count = (count < cuts.wanted).select(cuts.wanted, count)
    count = (count < cuts.most).select(count, cuts.most)
    shortest = _ceil(units, SHORTEST)
    count = (count < shortest).select(count, shortest)
    length = _ceil(_ceil(units, count), TILE_UNITS) * TILE_UNITS
    return _ceil(units, length)


def _ceil(dividend: Word, divisor: Word | int) -> Word:
    return (dividend + divisor - 1) // divisor


def claim_program(shape: Decode):
    """One thread of the loading warpgroup takes the stream's next piece: `program(words, counters of its head)`.

    The first is the stream's own number, for which nobody need wait. It goes into the ring as (row * PIECES + piece) *
    TAGS and a tag, for both warpgroups to `see`; a row behind the last says that there are no more.
    """

    def program(words: Pointer, counters: Pointer) -> None:
        with simt.when((simt.thread() % THREADS).equals(WARP)):  # not the thread that starts copies
            claim = words.load(CLAIMS)
            words.store(CLAIMS, claim + 1)
            words.store(PIECE, simt.block() // shape.num_kv_heads)
            with simt.when(claim >= 1):
                words.store(PIECE, _add(counters, NEXT) + shape.streams_of_head)
            piece = words.load(PIECE)
            row, end = simt.word(0), simt.word(shape.rows)
            for _ in range(shape.rows.bit_length()):
                middle = (row + end) // 2
                safe = (middle < shape.rows).select(middle, shape.rows - 1)
                behind = (row < end) & (words.load(safe + ENDS) < piece + 1)
                row, end = behind.select(middle + 1, row), behind.select(end, middle)
            before = (row < 1).select(0, words.load((row < 1).select(0, row - 1) + ENDS))
            first = (row < shape.rows).select(piece - before, 0)
            simt_marks.put(words, claim % TAGS, (row * PIECES + first) * TAGS + claim % TAGS)

    return program


def see_program(words: Pointer, claim: Word) -> None:
    """Waits until the ring holds that claim."""
    simt_marks.see(words, claim % TAGS, TAG_BITS, claim % TAGS)


def open_program(shape: Decode):
    """A head's first stream clears the head's counters, then marks them: `program(counters)`."""

    def program(counters: Pointer) -> None:
        thread = simt.thread() % THREADS
        with simt.when(simt.block() < shape.num_kv_heads):
            for i in range(NEXT, num_counters(shape.rows), THREADS):
                with simt.when(thread + i < num_counters(shape.rows)):
                    counters.store(thread + i, 0)
        simt.barrier()
        with simt.when(thread.equals(0) & (simt.block() < shape.num_kv_heads)):
            simt_marks.mark(counters)

    return program


def arrive_program(counters: Pointer, words: Pointer, row: Word) -> None:
    """After a partial result was stored: words[FOUND] says how many of the row were there before."""
    simt.barrier()
    with simt.when((simt.thread() % THREADS).equals(0)):
        words.store(FOUND, _add(counters, row + ARRIVED))
    simt.barrier()


def leave_program(shape: Decode):
    """The last stream of a head wipes the marks: `program(counters)`, once nothing else of the head is counted."""

    def program(counters: Pointer) -> None:
        simt.barrier()
        with simt.when((simt.thread() % THREADS).equals(0)):
            found = _add(counters, DONE)
            with simt.when(found.equals(shape.streams_of_head - 1)):
                simt_marks.wipe(counters)

    return program


def _add(counters: Pointer, index: Word | int) -> Word:
    """Adds one once the counters are marked; what was there before."""
    simt_marks.wait(counters)
    return simt_marks.add_one(counters, index)
