"""What one block of a push moves: its units of a message, 16 bytes a thread each, and its words of each column."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jmoe.pallas_kernels import simt, simt_peer
from jmoe.pallas_kernels.push_plan import BLOCK_THREADS, TAGGED_UNITS, Message
from jmoe.pallas_kernels.simt import Pointer, Word

IN_FLIGHT = 8  # 16-byte loads of a thread that are under way at once
BATCHES_A_FLAG = 1  # a flag says how far a block is, every 16 KiB: the receiver copies while more arrives


class Place(NamedTuple):
    """16 bytes of a row: which, and whether the message holds them."""

    row: Word
    vector: Word
    inside: Word


class Held(NamedTuple):
    """16 bytes in registers."""

    place: Place
    words: list[Word]


class Share:
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

    def place(self, i: int, first: Word | int = 0) -> "Place":
        """This thread's part of unit number `i` of the batch that begins at `first`."""
        unit = self.b + i * self.blocks + first
        row, vector = self._place(unit)
        return Place(row, vector, (unit < self.units) & (row < self.count) & (vector < self.message.row_vectors))

    def places(self, first: Word) -> list[tuple["Place", Pointer]]:
        """This thread's parts of the batch, and where they are read."""
        found = [self.place(i, first) for i in range(IN_FLIGHT)]
        return [(at, self.source(at.row)) for at in found]

    def load(self, places: list[tuple["Place", Pointer]]) -> list["Held"]:
        """A batch: all its loads are under way at once."""
        return [Held(at, simt_peer.load_vector_if(at.inside, source, at.vector)) for at, source in places]

    def store(self, batch: list["Held"]) -> None:
        for held in batch:
            at = held.place
            simt_peer.store_vector_if(at.inside, self.target(at.row), at.vector, held.words)

    def move(self, chunk: Any, begun: list["Held"] | None = None) -> None:
        """One chunk's units; the first batch may have been loaded before."""
        width = self.blocks * IN_FLIGHT
        start = (
            simt.word(chunk) * (width * BATCHES_A_FLAG) if isinstance(chunk, int) else chunk * (width * BATCHES_A_FLAG)
        )
        if begun is not None:
            self.store(begun)

        def batch(first):
            self.store(self.load(self.places(first)))
            return []

        stop = smaller(self.units, start + width * BATCHES_A_FLAG)
        simt.loop(start if begun is None else start + width, stop, width, [], batch)

    def _place(self, unit: Word) -> tuple[Word, Word]:
        """The row and its 16-byte vector that this thread moves of a unit."""
        message = self.message
        if message.rows_a_unit > 1:
            row = self.thread // message.row_vectors
            row = (row < message.rows_a_unit).select(unit * message.rows_a_unit + row, message.capacity)
            return row, self.thread % message.row_vectors
        return unit // message.units_a_row, unit % message.units_a_row * BLOCK_THREADS + self.thread


class Column:
    """A round's column of 32-bit words, spread over its blocks: the first one of each thread is loaded at once."""

    def __init__(self, source: Pointer, words: int, share: Share):
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


def within(count: Word, capacity: int) -> Word:
    """A row count that can't lead outside."""
    return (count < 0).select(0, smaller(count, simt.word(capacity)))


def smaller(a: Word, b: Word) -> Word:
    return (a < b).select(a, b)
