"""What the thread blocks of decode attention work out and count for themselves, thread by thread.

A head's streams draw tickets and count the ends of pieces in scratch memory that nobody cleared: the head's first
stream makes counters of the words, the others wait for that, and who counts last ends it. A fill by XLA would be a
kernel of its own, 1.5 us.

A stream begins with the row of its own number, if there is one. Its second warpgroup meanwhile works out in what order
all other items come: each row has the places from its begin on, as many as it has items left.
"""

import functools

from jmoe.pallas_kernels import simt, simt_marks
from jmoe.pallas_kernels.paged_decode_plan import CLASSES, PIECES, TILE_UNITS, UNIT, Decode
from jmoe.pallas_kernels.simt import WARP, Pointer, Word

THREADS = 128
WARPS = THREADS // WARP
# Words of a stream: its ticket, and the first piece of the item at that place; how many items come behind the first
# wave; how many pieces ended before this one; of the warps their longest items, tiles, and items of two classes a word.
TICKET, CODE, BEHIND, BEFORE, LONGEST, TILES, SUMS = 0, 1, 2, 3, 4, 8, 12
WORDS = SUMS + CLASSES // 2 * WARPS
# Of a head's counters, 64 bits each: tickets, and the pieces of each row that ended.
TICKETS, ENDED = 0, 1
HALF = 1 << 16  # of a word: no head has so many items
WHOLE = 1 << 15  # beside a row's number of items


def num_counters(rows: int) -> int:
    return ENDED + rows


def plan_program(shape: Decode, with_tokens: bool):
    """The order of the items behind the first wave, by one warpgroup, as `decode_plan`; a first stream opens counters.

    `program(start_pos, num_tokens if with_tokens, counters, words, rows)`: words[BEHIND] says how many items there are,
    rows `[rows]` where each row's begin and how many it has, as begin * HALF + number, with WHOLE if it is one item.
    """
    per_thread = -(-shape.rows // THREADS)

    def program(*pointers: Pointer) -> None:
        start_pos, *tokens, counters, words, rows = pointers
        thread = simt.thread_of_warpgroup()
        lane, warp = thread % WARP, thread // WARP
        mine = [thread * per_thread + i for i in range(per_thread)]
        units = [_num_units(shape, row, start_pos, tokens[0] if with_tokens else None) for row in mine]
        tiles = [_ceil(of_row, TILE_UNITS) for of_row in units]
        there = [row < shape.rows for row in mine]
        total = sum((yes.select(of_row, 0) for yes, of_row in zip(there, tiles, strict=True)), start=simt.word(0))
        total = simt.warp_sum(total)
        with simt.when(lane.equals(0)):
            words.store(warp + TILES, total)
        simt.barrier()
        total = sum((words.load(TILES + w) for w in range(WARPS)), start=simt.word(0))
        most = shape.whole_tiles(total, _larger, _smaller, lambda a, b: a // b)
        cuts = [_items(shape, *row, most) for row in zip(units, tiles, strict=True)]
        with simt.when(simt.block() < shape.num_kv_heads):
            with simt.when(thread.equals(0)):
                simt_marks.count_from_zero(counters, TICKETS)
            for row, yes, (count, _, _) in zip(mine, there, cuts, strict=True):
                with simt.when(yes & (count >= 2)):
                    simt_marks.count_from_zero(counters, row + ENDED)
        left = [
            yes.select(count - (row < shape.first_wave).count(), 0)
            for row, yes, (count, _, _) in zip(mine, there, cuts, strict=True)
        ]
        longest = simt.warp_largest(functools.reduce(_larger, [length for _, length, _ in cuts]))
        with simt.when(lane.equals(0)):
            words.store(warp + LONGEST, longest)
        simt.barrier()
        longest = functools.reduce(_larger, [words.load(LONGEST + w) for w in range(WARPS)])
        ranks = [(length * CLASSES - 1) // longest for _, length, _ in cuts]  # the longest are of the last class

        def of_pair(pair: int, rank: Word, count: Word) -> Word:
            """A row's items where its class is one of these two."""
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
        for row, rank, count, (_, _, whole) in zip(mine, ranks, left, cuts, strict=True):
            place = places[0]
            for number in range(1, CLASSES):
                place = rank.equals(CLASSES - 1 - number).select(places[number], place)
            with simt.when(row < shape.rows):
                rows.store(row, place * HALF + whole * WHOLE + count)
            places = [place + rank.equals(CLASSES - 1 - number).select(count, 0) for number, place in enumerate(places)]
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


def _items(shape: Decode, units: Word, tiles: Word, most: Word) -> tuple[Word, Word, Word]:
    """Of a row: how many it has, units of the first, and whether it is one item, as it has `most` tiles at most."""
    count, length = _cut(shape, units)
    whole = (count < 2) | (tiles < most + 1)
    return whole.select(1, count), whole.select(tiles * TILE_UNITS, length), whole.count()


def _larger(a: Word, b: Word | int) -> Word:
    return (a < b).select(b, a)


def _smaller(a: Word, b: Word | int) -> Word:
    return (a < b).select(a, b)


def _ceil(dividend: Word, divisor: Word | int) -> Word:
    return (dividend + divisor - 1) // divisor


def take_program(shape: Decode):
    """The next ticket, before the last tile of an item: `program(counters, words, first, cut, row)`.

    words[TICKET] is it once a barrier has followed. `first`: the stream has drawn none yet. `cut`: the item is one
    piece of several of that row, which will be counted.
    """

    def program(counters: Pointer, words: Pointer, first: Word, cut: Word, row: Word) -> None:
        with simt.when(simt.thread_of_warpgroup().equals(0)):
            with simt.when(first.equals(1)):
                simt_marks.wait_for_counter(counters, TICKETS)
            ticket = simt_marks.count(counters, TICKETS)
            with simt.when(cut.equals(1)):
                simt_marks.wait_for_counter(counters, row + ENDED)
            words.store(TICKET, ticket)

    return program


def begin_program(shape: Decode):
    """For a stream behind the first wave, as if it had drawn the ticket of its number: `program(words)`."""

    def program(words: Pointer) -> None:
        with simt.when(simt.thread_of_warpgroup().equals(0)):
            words.store(TICKET, simt.block() // shape.num_kv_heads - shape.streams_of_head)

    return program


def find_program(shape: Decode):
    """The item of a ticket: `program(counters, words, rows)`; words[CODE], `end` if there is none left.

    Who holds the head's last ticket ends the counter: each stream draws until there is no item for it.
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
            begin, number = begin_and_number // HALF, begin_and_number % WHOLE
            with simt.when(there & (place >= begin) & (place < begin + number)):
                words.store(CODE, row * PIECES + place - begin + (row < shape.first_wave).count())
        with simt.when(thread.equals(0) & (place >= behind)):
            words.store(CODE, shape.end)
        last = _larger(behind + (shape.first_wave - shape.streams_of_head), 0) + (shape.streams_of_head - 1)
        with simt.when(thread.equals(0) & ticket.equals(last)):
            simt_marks.stop_counting(counters, TICKETS)
        simt.barrier()

    return program


def ended_program(shape: Decode):
    """Counts a piece whose partial result was stored: `program(counters, words, row, pieces)`.

    words[BEFORE]: how many ended before, of so many; who counts the last ends the counter.
    """

    def program(counters: Pointer, words: Pointer, row: Word, pieces: Word) -> None:
        simt.barrier()
        with simt.when(simt.thread_of_warpgroup().equals(0)):
            before = simt_marks.count(counters, row + ENDED, "acq_rel")
            words.store(BEFORE, before)
            with simt.when(before.equals(pieces - 1)):
                simt_marks.stop_counting(counters, row + ENDED)
        simt.barrier()

    return program
