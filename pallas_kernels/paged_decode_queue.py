"""What the thread blocks of decode attention work out and count for themselves, thread by thread.

A head's streams take pieces and count the ends of pieces in scratch memory that nobody cleared: the head's first stream
clears the head's counters and marks them, the others wait for the marks, and who takes the last ticket wipes them. A
fill by XLA would be a kernel of its own, 1.5 us.

A stream begins with the row of its own number, if there is one. Its second warpgroup meanwhile works out in what order
all others come: each row has the places from its begin on, as many as it has pieces left.
"""

import functools

from jmoe.pallas_kernels import simt, simt_marks
from jmoe.pallas_kernels.paged_decode_plan import CLASSES, PIECES, TILE_UNITS, UNIT, Decode
from jmoe.pallas_kernels.simt import WARP, Pointer, Word

THREADS = 128
WARPS = THREADS // WARP
# Words of a stream: its ticket, and the piece at that place of the queue; how many pieces come behind the first wave; how
# many there were before the one that ended; longest pieces of the warps; their pieces of two classes a word.
TICKET, CODE, BEHIND, BEFORE, LONGEST, SUMS = 0, 1, 2, 3, 4, 8
WORDS = SUMS + CLASSES // 2 * WARPS
# Of a head's counters, behind the marks: tickets, and pieces of each row that ended.
TICKETS, ENDED = 2, 4
HALF = 1 << 16  # of a word: no head has so many pieces


def num_counters(rows: int) -> int:
    return ENDED + rows


def open_program(shape: Decode):
    """A head's first stream clears the head's counters, then marks them: `program(counters)`."""

    def program(counters: Pointer) -> None:
        thread = simt.thread_of_warpgroup()
        with simt.when(simt.block() < shape.num_kv_heads):
            for i in range(TICKETS, num_counters(shape.rows), THREADS):
                with simt.when(thread + i < num_counters(shape.rows)):
                    counters.store(thread + i, 0)
        simt.barrier()
        with simt.when(thread.equals(0) & (simt.block() < shape.num_kv_heads)):
            simt_marks.mark(counters)

    return program


def plan_program(shape: Decode, with_tokens: bool):
    """The order of the pieces behind the first wave, by one warpgroup, as `decode_plan`.

    `program(start_pos, num_tokens if with_tokens, words, rows)`: words[BEHIND] says how many they are, rows `[rows]`
    where each row's begin and how many it has, as begin * HALF + number.
    """
    per_thread = -(-shape.rows // THREADS)

    def program(*pointers: Pointer) -> None:
        start_pos, *tokens, words, rows = pointers
        thread = simt.thread_of_warpgroup()
        lane, warp = thread % WARP, thread // WARP
        mine = [thread * per_thread + i for i in range(per_thread)]
        cuts = [_cut(shape, _num_units(shape, row, start_pos, tokens[0] if with_tokens else None)) for row in mine]
        left = [
            (row < shape.rows).select(count - (row < shape.first_wave).count(), 0)
            for row, (count, _) in zip(mine, cuts, strict=True)
        ]
        longest = simt.warp_largest(functools.reduce(_larger, [length for _, length in cuts]))
        with simt.when(lane.equals(0)):
            words.store(warp + LONGEST, longest)
        simt.barrier()
        longest = functools.reduce(_larger, [words.load(LONGEST + w) for w in range(WARPS)])
        ranks = [(length * CLASSES - 1) // longest for _, length in cuts]  # the longest are of the last class

        def of_pair(pair: int, rank: Word, count: Word) -> Word:
            """A row's pieces where its class is one of these two."""
            low = rank.equals(CLASSES - 1 - 2 * pair).select(count, 0)
            return low + rank.equals(CLASSES - 2 - 2 * pair).select(count * HALF, 0)

        counts = [
            sum((of_pair(pair, *row) for row in zip(ranks, left, strict=True)), start=simt.word(0))
            for pair in range(CLASSES // 2)
        ]
        before = [simt.warp_sum_before(count, lane) for count in counts]
        for pair in range(CLASSES // 2):
            with simt.when(lane.equals(WARP - 1)):
                words.store(warp + (SUMS + pair * WARPS), before[pair] + counts[pair])
        simt.barrier()
        begin = simt.word(0)  # of a class
        places = []  # of each class, for this thread's first row
        for pair in range(CLASSES // 2):
            sums = [words.load(SUMS + pair * WARPS + w) for w in range(WARPS)]
            earlier = before[pair]
            for w, count in enumerate(sums):
                earlier = earlier + (warp < w + 1).select(0, count)
            total = sum(sums[1:], start=sums[0])
            places += [begin + earlier % HALF, begin + total % HALF + earlier // HALF]
            begin = begin + total % HALF + total // HALF
        for row, rank, count in zip(mine, ranks, left, strict=True):
            place = places[0]
            for number in range(1, CLASSES):
                place = rank.equals(CLASSES - 1 - number).select(places[number], place)
            with simt.when(row < shape.rows):
                rows.store(row, place * HALF + count)
            places = [
                place + rank.equals(CLASSES - 1 - number).select(count, 0) for number, place in enumerate(places)
            ]
        with simt.when(thread.equals(0)):
            words.store(BEHIND, begin)
        simt.barrier()

    return program


def _num_units(shape: Decode, row: Word, start_pos: Pointer, num_tokens: Pointer | None) -> Word:
    """Of a row; one, if there is no such row."""
    there = row < shape.rows
    safe = there.select(row, 0)
    start = start_pos.load(safe)
    units = (start + (num_tokens.load(safe) if num_tokens is not None else 1) + (UNIT - 1)) // UNIT
    if shape.sliding_window is not None:
        low = start + (1 - shape.sliding_window)
        units = units - (low < 0).select(0, low) // UNIT
    return (there & (units >= 1)).select(units, 1)


def _cut(shape: Decode, units: Word) -> tuple[Word, Word]:
    """As `Decode.cut`."""
    count = shape.wanted(units, _larger, _smaller, lambda a, b: a // b)
    count = _larger(_smaller(count, shape.most), 1)
    length = _ceil(_ceil(units, count), TILE_UNITS) * TILE_UNITS
    return _ceil(units, length), length


def _larger(a: Word, b: Word | int) -> Word:
    return (a < b).select(b, a)


def _smaller(a: Word, b: Word | int) -> Word:
    return (a < b).select(a, b)


def _ceil(dividend: Word, divisor: Word | int) -> Word:
    return (dividend + divisor - 1) // divisor


def take_program(shape: Decode):
    """The next ticket: `program(counters, words)`; words[TICKET] once a barrier has followed."""

    def program(counters: Pointer, words: Pointer) -> None:
        with simt.when(simt.thread_of_warpgroup().equals(0)):
            simt_marks.wait(counters)
            words.store(TICKET, simt_marks.take(counters, TICKETS))

    return program


def begin_program(shape: Decode):
    """For a stream behind the first wave, as if it had drawn the ticket of its number: `program(words)`."""

    def program(words: Pointer) -> None:
        with simt.when(simt.thread_of_warpgroup().equals(0)):
            words.store(TICKET, simt.block() // shape.num_kv_heads - shape.streams_of_head)

    return program


def find_program(shape: Decode):
    """The piece of a ticket: `program(counters, words, rows)`; words[CODE], `end` if there is none left.

    Who holds the head's last ticket wipes the marks: each stream draws until there is no piece for it.
    """
    per_thread = -(-shape.rows // THREADS)

    def program(counters: Pointer, words: Pointer, rows: Pointer) -> None:
        simt.barrier()
        thread, behind = simt.thread_of_warpgroup(), words.load(BEHIND)
        ticket = words.load(TICKET)
        place = ticket + (shape.streams_of_head - shape.first_wave)
        for i in range(per_thread):
            row = thread * per_thread + i
            there = row < shape.rows
            begin_and_number = rows.load(there.select(row, 0))
            begin, number = begin_and_number // HALF, begin_and_number % HALF
            with simt.when(there & (place >= begin) & (place < begin + number)):
                words.store(CODE, row * PIECES + place - begin + (row < shape.first_wave).count())
        with simt.when(thread.equals(0) & (place >= behind)):
            words.store(CODE, shape.end)
        spare = shape.streams_of_head - 1
        last = _larger(behind + (shape.first_wave - shape.streams_of_head), 0) + spare
        with simt.when(thread.equals(0) & ticket.equals(last)):
            simt_marks.wipe(counters)
        simt.barrier()

    return program


def announce_program(shape: Decode):
    """Tells the other warpgroup which piece is next, once it is told to look: `program(messages, number, code)`."""

    def program(messages: Pointer, number: Word, code: Word) -> None:
        with simt.when(simt.thread_of_warpgroup().equals(0)):
            messages.store(number, code)

    return program


def ended_program(shape: Decode):
    """Counts a piece whose partial result was stored: `program(counters, words, row)`; words[BEFORE]: those before."""

    def program(counters: Pointer, words: Pointer, row: Word) -> None:
        simt.barrier()
        with simt.when(simt.thread_of_warpgroup().equals(0)):
            words.store(BEFORE, simt_marks.add(counters, row + ENDED, 1))
        simt.barrier()

    return program
