"""What both halves of a push look up: addresses, numbers, this block's place, and its line to its twin."""

from jmoe.pallas_kernels import simt, simt_peer
from jmoe.pallas_kernels.push_plan import (
    BLOCK_THREADS,
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
    PushPlan,
)
from jmoe.pallas_kernels.simt import Pointer, Word


class Call:
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


class Line:
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


def slot_of(call: Call, mailbox: Pointer, r: Word, epoch: Word) -> Pointer:
    """The rows of a message in the mailbox of who reads it."""
    where = call.plan.mailbox
    number = r * where.num_slots + (epoch & (where.num_slots - 1))
    return simt_peer.beyond(mailbox.skip(simt.word(where.data), 1), number, call.slot_units, VECTOR_BYTES)
