"""The Mosaic GPU body of push: blocks that send, and blocks that receive, each with its own share and its own flag.

Block b of a round moves every blocks-th unit of the message, a unit being 16 bytes a thread. It tells its twin on the
other device by a flag of its own, so no block waits for another of its device. All blocks fit on the GPU at once.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe.pallas_kernels import simt, simt_peer
from jmoe.pallas_kernels.push_plan import (
    BLOCK_THREADS,
    CREDIT_BYTES,
    FLAG_BYTES,
    MAX_BLOCKS,
    SEQUENCE_MASK,
    TABLE_DEADLINE,
    TABLE_HEAD,
    TABLE_OWN,
    TABLE_SLOT_UNITS,
    TAGGED_UNITS,
    TIMED_OUT,
    VECTOR_BYTES,
    MailboxMap,
    Message,
    PushPlan,
)
from jmoe.pallas_kernels.simt import Pointer, Word

IN_FLIGHT = 8  # 16-byte loads of a thread that are under way at once
BATCHES_A_FLAG = 1  # a flag says how far a block is, every 16 KiB: the receiver copies while more arrives
EPOCH = 4096  # flags of one message; a flag is epoch * EPOCH + how many of them are done


def push_pallas(plan: PushPlan, table, sequence, rows, counts, columns, index) -> tuple[Any, ...]:
    """The fields of `Pushed`; see `push`."""
    sends, receives, rounds = plan.sends, plan.receives, plan.mailbox.num_rounds
    for message in (sends, receives):
        if message is not None:
            message.check()
    given = [table, sequence.reshape(1)]
    if sends is not None:
        given += [rows.reshape(-1, sends.width), counts, *(c.reshape(-1) for c in columns)]
        given += [] if index is None else [index.reshape(-1)]
    num_blocks = [0 if m is None else rounds * m.blocks(rounds) for m in (sends, receives)]
    types = [jax.ShapeDtypeStruct((sum(num_blocks) * 2,), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)]
    if receives is not None:
        places = rounds * receives.capacity
        types += [jax.ShapeDtypeStruct((rounds,), jnp.int32), jax.ShapeDtypeStruct((places, receives.width), receives.dtype)]
        types += [jax.ShapeDtypeStruct((places * words,), jnp.int32) for words in receives.columns]

    def push_rows(*refs):
        simt.program(_program(plan, num_blocks, index is not None), *refs)

    faults, after, *found = plgpu.kernel(
        push_rows,
        out_type=tuple(types),
        scratch_types=[plgpu.SMEM((4,), jnp.int32)],
        grid=(sum(num_blocks),),
        grid_names=("block",),
    )(*given)
    faults, after = faults.reshape(-1, 2), after.reshape(())
    if receives is None:
        return None, (), None, faults, after
    counts_out, rows_out, *columns_out = found
    shape = (rounds, receives.capacity)
    columns_out = tuple(c.reshape(*shape, w) for c, w in zip(columns_out, receives.columns, strict=True))
    return rows_out.reshape(*shape, receives.width), columns_out, counts_out, faults, after


class _Call:
    """What both halves of the kernel look up first: addresses, numbers, this block's place."""

    def __init__(self, plan: PushPlan, table: Pointer, sequence: Pointer, shared: Pointer, faults: Pointer):
        self.plan, self.table, self.shared, self.faults = plan, table, shared, faults
        self.thread, self.block = simt.thread(), simt.block()
        self.own = simt_peer.address(table.load(TABLE_OWN), table.load(TABLE_OWN + 1))
        self.deadline, self.slot_units = table.load(TABLE_DEADLINE), table.load(TABLE_SLOT_UNITS)
        self.sequence = sequence.load(0)

    def peer(self, r: Word) -> tuple[Pointer, Word]:
        """The mailbox of the round's peer, and whether there is one."""
        low, high = self.table.load(r * 2 + TABLE_HEAD), self.table.load(r * 2 + (TABLE_HEAD + 1))
        return simt_peer.address(low, high), simt_peer.negated(low.equals(0) & high.equals(0))

    def number(self, offset: int) -> Word:
        return (self.sequence + offset) & SEQUENCE_MASK

    def patience(self) -> Word:
        """Ticks that a wait may last: none once one has expired."""
        return simt_peer.load_word(self.own, MailboxMap.dead // 4).equals(0).select(self.deadline, 0)

    def wait(self, pointer: Pointer, least: Word, patience: Word) -> tuple[Word, Word]:
        """One thread waits, the block learns: (reached, high word)."""
        with simt.when(self.thread.equals(0)):
            waited = simt_peer.wait(pointer, least, patience)
            self.shared.store(0, waited.reached.select(1, 0))
            self.shared.store(1, waited.high)
        simt.barrier()
        return self.shared.load(0) >= 1, self.shared.load(1)

    def say(self, expected: Word, got: Word) -> None:
        """This block's entry of the faults; one thread."""
        self.faults.store(self.block * 2, expected)
        self.faults.store(self.block * 2 + 1, got)

    def give_up(self, number: Word) -> None:
        """A wait has expired: says so, and lets every later one of this device expire at once."""
        self.say(number, simt.word(TIMED_OUT))
        simt_peer.store_word(self.own, MailboxMap.dead // 4, 1)

    def count(self, start: int, place: Word, blocks: int, epoch: Word) -> None:
        """The owner's counters: each block advances its own, and those of blocks that this kernel doesn't have."""
        with simt.when(self.thread.equals(0)):

            def advance(i):
                self.own.store(i + start // 4, epoch + 1)
                return []

            simt.loop(place, MAX_BLOCKS, blocks, [], advance)


def _program(plan: PushPlan, num_blocks: list[int], gathers: bool) -> Callable[..., None]:
    def program(table: Pointer, sequence: Pointer, *rest: Pointer):
        *rest, shared = rest
        taken = (2 + len(plan.sends.columns) + gathers) if plan.sends is not None else 0
        sent, (faults, after, *received) = rest[:taken], rest[taken:]
        call = _Call(plan, table, sequence, shared, faults)
        with simt.when(call.block.equals(0) & call.thread.equals(0)):
            after.store(0, call.number(plan.advance))
        if plan.sends is not None:
            with simt.when(call.block < num_blocks[0]):
                _send(call, plan.sends, num_blocks[0], gathers, *sent)
        if plan.receives is not None:
            with simt.when(call.block >= num_blocks[0]):
                _receive(call, plan.receives, num_blocks, *received)

    return program


def _send(call: _Call, message: Message, num_blocks: int, gathers: bool, rows, counts, *rest: Pointer) -> None:
    """One block's share of one round's message: wait for the slot, write, say so."""
    columns, index = (rest[:-1], rest[-1]) if gathers else (rest, None)
    mailbox, blocks = call.plan.mailbox, message.blocks(call.plan.mailbox.num_rounds)
    r, b, thread = call.block // blocks, call.block % blocks, call.thread
    peer, there = call.peer(r)
    count = _within(counts.load(r), message.capacity)
    share = _Share(message, count, b, blocks, thread)
    epoch = simt_peer.load_word(call.own, call.block + MailboxMap.sent // 4)
    number = call.number(call.plan.send_offset)
    with simt.when(thread.equals(0)):
        call.say(simt.word(-1), simt.word(-1))

    def source(row: Word) -> Pointer:
        place = _smaller(row, simt.word(message.capacity - 1)) + r * message.capacity
        return rows.skip(place if index is None else index.load(place), message.row_bytes)

    share.source = source
    places = share.places(simt.word(0))
    with simt.when(there):
        # On their way while the block waits for the slot: the first rows, and each column's first words.
        begun = share.load(places)
        columns = [_Column(c.skip(r, message.capacity * w * 4), w, share) for c, w in zip(columns, message.columns, strict=True)]
        credit = call.own.skip(r, CREDIT_BYTES).skip(simt.word(mailbox.credits), 1)
        ready, _ = call.wait(credit, epoch - (mailbox.num_slots - 1), call.patience())
        with simt.when(ready):
            line, tagged = _Line(mailbox, peer, r, b, epoch), share.is_tagged(message)
            with simt.when(thread.equals(0)):
                simt_peer.store_tagged(line.flag, 0, [count, number], line.tag)
            with simt.when(tagged):
                _send_tagged(line, share, begun, columns)
            with simt.when(simt_peer.negated(tagged)):
                _send_bulk(_slot(call, peer, r, epoch), line, share, begun, columns)
        with simt.when(simt_peer.negated(ready)), simt.when(thread.equals(0)):
            call.give_up(number)
    call.count(MailboxMap.sent, call.block, num_blocks, epoch)


def _receive(call: _Call, message: Message, num_blocks: list[int], counts, rows, *columns: Pointer) -> None:
    """One block's share of one round's message: wait for its twin, copy, look at the number."""
    mailbox, blocks = call.plan.mailbox, message.blocks(call.plan.mailbox.num_rounds)
    place = call.block - num_blocks[0]
    r, b, thread = place // blocks, place % blocks, call.thread
    peer, there = call.peer(r)
    epoch = simt_peer.load_word(call.own, place + MailboxMap.received // 4)
    expected = call.number(call.plan.receive_offset)
    with simt.when(thread.equals(0)):
        call.say(simt.word(-1), simt.word(-1))
    with simt.when(there):
        # All that the calls before took is taken: the kernel boundary says so. Not the thread that waits below.
        with simt.when(b.equals(0) & thread.equals(BLOCK_THREADS - 1)):
            credit = peer.skip(r, CREDIT_BYTES).skip(simt.word(mailbox.credits), 1)
            simt_peer.release(credit, epoch, simt.word(0))
        simt.barrier()  # the fault's first word is said, and all have read the counter that ends this kernel
        line, patience = _Line(mailbox, call.own, r, b, epoch), call.patience()
        arrived, (count, got) = simt_peer.wait_tagged([(line.flag, 0)], 2, line.tag, patience)
        share = _Share(message, _within(count, message.capacity), b, blocks, thread)
        with simt.when(b.equals(0) & thread.equals(0)):
            counts.store(r, arrived.select(share.count, 0))
            with simt.when(arrived & simt_peer.negated(got.equals(expected))):
                call.say(expected, got)
        with simt.when(simt_peer.negated(arrived)):
            call.give_up(expected)
        with simt.when(arrived):
            out = rows.skip(r, message.capacity * message.row_bytes)
            share.target = lambda row: out.skip(row, message.row_bytes)
            targets = [c.skip(r, message.capacity * w * 4) for c, w in zip(columns, message.columns, strict=True)]
            tagged = share.is_tagged(message)
            with simt.when(tagged):
                _take_tagged(call, line, share, targets, expected, patience)
            with simt.when(simt_peer.negated(tagged)):
                _take_bulk(call, _slot(call, call.own, r, epoch), line, share, targets, expected, patience)
    with simt.when(simt_peer.negated(there)), simt.when(b.equals(0) & thread.equals(0)):
        counts.store(r, 0)
    call.count(MailboxMap.received, place, num_blocks[1], epoch)


class _Line:
    """A block's line to its twin: its flag, and its part of the slot for tagged messages."""

    def __init__(self, where: MailboxMap, mailbox: Pointer, r: Word, b: Word, epoch: Word):
        self.b, self.epoch, self.tag = b, epoch, epoch + 1
        number = r * where.num_slots + (epoch & (where.num_slots - 1))
        self.flag = mailbox.skip(simt.word(where.flags), 1).skip(number * where.max_blocks + b, FLAG_BYTES)
        slot = mailbox.skip(simt.word(where.tagged), 1).skip(number, where.tagged_slot_bytes)
        self._rows = slot.skip(b, TAGGED_UNITS * 2 * BLOCK_THREADS * VECTOR_BYTES)
        self._columns = slot.skip(simt.word(where.tagged_rows_bytes), 1)
        self._column_bytes = where.tagged_column_bytes

    @property
    def progress(self) -> Pointer:
        return self.flag.skip(simt.word(FLAG_BYTES // 2), 1)

    def halves(self, unit: int, thread: Word) -> list[tuple[Pointer, Word]]:
        """Where the two halves of this thread's 16 bytes of the block's unit number `unit` go."""
        return [(self._rows, thread + (unit * 2 + half) * BLOCK_THREADS) for half in range(2)]

    def column(self, number: int) -> Pointer:
        return self._columns.skip(simt.word(number), self._column_bytes)


def _send_tagged(line: _Line, share: "_Share", begun: list["_Held"], columns: list["_Column"]) -> None:
    """What each thread holds goes out with tags, twice the bytes: nothing waits for a fence."""
    for i, held in enumerate(begun[:TAGGED_UNITS]):
        with simt.when(held.place.inside):
            for half, (pointer, index) in enumerate(line.halves(i, share.thread)):
                simt_peer.store_tagged(pointer, index, held.words[half * 2 : half * 2 + 2], line.tag)
    for number, column in enumerate(columns):
        with simt.when(column.inside):
            simt_peer.store_tagged(line.column(number), column.first, [column.held], line.tag)


def _take_tagged(
    call: _Call, line: _Line, share: "_Share", columns: list[Pointer], expected: Word, patience: Word
) -> None:
    for i in range(TAGGED_UNITS):
        at = share.place(i)
        with simt.when(at.inside):
            arrived, words = simt_peer.wait_tagged(line.halves(i, share.thread), 2, line.tag, patience)
            simt_peer.store_vector_if(arrived, share.target(at.row), at.vector, words)
            with simt.when(simt_peer.negated(arrived)):
                call.give_up(expected)
    for number, (target, words) in enumerate(zip(columns, share.message.columns, strict=True)):
        first = share.b * BLOCK_THREADS + share.thread
        with simt.when(first < share.count * words):
            arrived, [word] = simt_peer.wait_tagged([(line.column(number), first)], 1, line.tag, patience)
            target.store(first, word)
            with simt.when(simt_peer.negated(arrived)):
                call.give_up(expected)


def _send_bulk(slot: Pointer, line: _Line, share: "_Share", begun: list["_Held"], columns: list["_Column"]) -> None:
    """Plain stores; after each chunk one thread says how far the block is, behind a fence."""
    share.target = lambda row: slot.skip(row, share.message.row_bytes)
    for column, start in zip(columns, share.message.column_starts, strict=True):
        column.store(slot.skip(simt.word(start), 1))

    def release(chunk: Word) -> None:
        simt.barrier()
        with simt.when(share.thread.equals(0)):
            simt_peer.release(line.progress, line.epoch * EPOCH + chunk + 1, simt.word(0))

    def send_chunk(chunk):
        share.move(chunk)
        release(chunk)
        return []

    share.move(0, begun)
    release(simt.word(0))
    simt.loop(1, share.chunks(), 1, [], send_chunk)


def _take_bulk(
    call: _Call, slot: Pointer, line: _Line, share: "_Share", columns: list[Pointer], expected: Word, patience: Word
) -> None:
    message = share.message
    share.source = lambda row: slot.skip(row, message.row_bytes)

    def first_chunk() -> None:
        begun = share.load(share.places(simt.word(0)))
        sent = [
            _Column(slot.skip(simt.word(start), 1), words, share)
            for start, words in zip(message.column_starts, message.columns, strict=True)
        ]
        for column, target in zip(sent, columns, strict=True):
            column.store(target)
        share.move(0, begun)

    def take(chunk: Word, patience: Word, copy: Callable[[], None]) -> None:
        reached, _ = call.wait(line.progress, line.epoch * EPOCH + chunk + 1, patience)
        with simt.when(reached):
            copy()
        with simt.when(simt_peer.negated(reached) & share.thread.equals(0)):
            call.give_up(expected)

    def take_chunk(chunk):
        simt.barrier()  # all have read what the wait before said
        take(chunk, call.patience(), lambda: share.move(chunk))
        return []

    take(simt.word(0), patience, first_chunk)
    simt.loop(1, share.chunks(), 1, [], take_chunk)


class _Place(NamedTuple):
    """16 bytes of a row: which, and whether the message holds them."""

    row: Word
    vector: Word
    inside: Word


class _Held(NamedTuple):
    """16 bytes in registers."""

    place: _Place
    words: list[Word]


class _Share:
    """Which units of a message of `count` rows block b moves: unit b, b + blocks, ... in batches and chunks."""

    source: Callable[[Word], Pointer]  # where a row is read; a row beyond the message is never read
    target: Callable[[Word], Pointer]

    def __init__(self, message: Message, count: Word, b: Word, blocks: int, thread: Word):
        self.message, self.count, self.b, self.blocks, self.thread = message, count, b, blocks, thread
        self.units = (count + (message.rows_a_unit - 1)) // message.rows_a_unit * message.units_a_row

    def chunks(self) -> Word:
        """Flags that the block writes: one at least."""
        step = self.blocks * IN_FLIGHT * BATCHES_A_FLAG
        return (self.b < self.units).select((self.units - self.b + (step - 1)) // step, 1)

    def is_tagged(self, message: Message) -> Word:
        """Whether the message goes with tags: both sides find the same."""
        small = self.units < self.blocks * TAGGED_UNITS + 1
        most = max(message.columns, default=0)
        return small & (self.count * most < self.blocks * BLOCK_THREADS + 1)

    def place(self, i: int, first: Word | int = 0) -> "_Place":
        """This thread's part of unit number `i` of the batch that begins at `first`."""
        unit = self.b + i * self.blocks + first
        row, vector = self._place(unit)
        return _Place(row, vector, (unit < self.units) & (row < self.count) & (vector < self.message.row_vectors))

    def places(self, first: Word) -> list[tuple["_Place", Pointer]]:
        """This thread's parts of the batch, and where they are read."""
        found = [self.place(i, first) for i in range(IN_FLIGHT)]
        return [(at, self.source(at.row)) for at in found]

    def load(self, places: list[tuple["_Place", Pointer]]) -> list["_Held"]:
        """A batch: all its loads are under way at once."""
        return [_Held(at, simt_peer.load_vector_if(at.inside, source, at.vector)) for at, source in places]

    def store(self, batch: list["_Held"]) -> None:
        for held in batch:
            at = held.place
            simt_peer.store_vector_if(at.inside, self.target(at.row), at.vector, held.words)

    def move(self, chunk: Any, begun: list["_Held"] | None = None) -> None:
        """One chunk's units; the first batch may have been loaded before."""
        width = self.blocks * IN_FLIGHT
        start = simt.word(chunk) * (width * BATCHES_A_FLAG) if isinstance(chunk, int) else chunk * (width * BATCHES_A_FLAG)
        if begun is not None:
            self.store(begun)

        def batch(first):
            self.store(self.load(self.places(first)))
            return []

        stop = _smaller(self.units, start + width * BATCHES_A_FLAG)
        simt.loop(start if begun is None else start + width, stop, width, [], batch)

    def _place(self, unit: Word) -> tuple[Word, Word]:
        """The row and its 16-byte vector that this thread moves of a unit."""
        message = self.message
        if message.rows_a_unit > 1:
            row = self.thread // message.row_vectors
            row = (row < message.rows_a_unit).select(unit * message.rows_a_unit + row, message.capacity)
            return row, self.thread % message.row_vectors
        return unit // message.units_a_row, unit % message.units_a_row * BLOCK_THREADS + self.thread


class _Column:
    """A round's column of 32-bit words, spread over its blocks: the first one of each thread is loaded at once."""

    def __init__(self, source: Pointer, words: int, share: _Share):
        self.source, self.total, self.stride = source, share.count * words, share.blocks * BLOCK_THREADS
        self.first = share.b * BLOCK_THREADS + share.thread
        self.inside = self.first < self.total
        self.held = source.load(self.inside.select(self.first, 0))

    def store(self, target: Pointer) -> None:
        def copy(i):
            target.store(i, self.source.load(i))
            return []

        with simt.when(self.inside):
            target.store(self.first, self.held)
            simt.loop(self.first + self.stride, self.total, self.stride, [], copy)


def _slot(call: _Call, mailbox: Pointer, r: Word, epoch: Word) -> Pointer:
    """The rows of a message in the mailbox of who reads it."""
    where = call.plan.mailbox
    number = r * where.num_slots + (epoch & (where.num_slots - 1))
    return simt_peer.beyond(mailbox.skip(simt.word(where.data), 1), number, call.slot_units, VECTOR_BYTES)


def _within(count: Word, capacity: int) -> Word:
    """A row count that can't lead outside."""
    return (count < 0).select(0, _smaller(count, simt.word(capacity)))


def _smaller(a: Word, b: Word) -> Word:
    return (a < b).select(a, b)
