"""What both sides of a push agree on: the map of a mailbox, the words of an address table, and one message's sizes.

A mailbox is memory of the device that reads it. Its owner keeps counters there; each of its peers writes messages and
flags into a section of its own (one a round), and how many messages it has taken back into the sender's mailbox.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

VECTOR_BYTES = 16
BLOCK_THREADS = 128
MAX_BLOCKS = 128  # that send, and as many that receive: two small blocks a multiprocessor, so all run at once
FLAG_BYTES = 32  # of each block: a tagged header (row count, tag, number, tag), then how far its bulk is
CREDIT_BYTES = 128
TAGGED_UNITS = 2  # units of each block that a tagged message may have
MAX_COLUMNS = 4

# The address table: int32 words. Head, then two words a round: the peer's mailbox, 0 for no peer.
TABLE_DEVICE = 0  # this device's index on the joint axis
TABLE_SLOT_UNITS = 1  # bytes of a message slot / 16
TABLE_DEADLINE = 2  # of one wait, in units of 1.024 us
TABLE_OWN = 4  # this device's own mailbox: low word, high word
TABLE_HEAD = 8
TICK_NS = 1024

SEQUENCE_MASK = 0x3FFFFFFF  # message numbers wrap here, far from int32's sign
TIMED_OUT = -(2**31)  # in place of the number that should have arrived


@dataclasses.dataclass(frozen=True, slots=True)
class MailboxMap:
    """Byte offsets within a mailbox of `num_rounds` sections of `num_slots` slots, a power of two."""

    num_rounds: int
    num_slots: int

    def __post_init__(self):
        if not 1 <= self.num_rounds <= MAX_BLOCKS:
            raise ValueError(f"MailboxMap.num_rounds: expected 1 to {MAX_BLOCKS}, got {self.num_rounds}")
        if self.num_slots < 2 or self.num_slots & (self.num_slots - 1):
            raise ValueError(f"MailboxMap.num_slots: expected a power of two, at least 2, got {self.num_slots}")

    # The owner's counters: messages sent and received so far, one word for each block that may ask.
    sent = 0
    received = 4 * MAX_BLOCKS
    dead = 8 * MAX_BLOCKS  # set by the first wait that expires: every later one gives up at once
    credits = 8 * MAX_BLOCKS + 128

    @property
    def flags(self) -> int:
        return self.credits + self.num_rounds * CREDIT_BYTES

    @property
    def max_blocks(self) -> int:
        """That share one round's message."""
        return MAX_BLOCKS // self.num_rounds

    @property
    def tagged(self) -> int:
        """Small messages in 8-byte halves of a word and its tag: first rows, then columns."""
        return _round_up(self.flags + self.num_rounds * self.num_slots * self.max_blocks * FLAG_BYTES, 4096)

    @property
    def tagged_rows_bytes(self) -> int:
        return self.max_blocks * TAGGED_UNITS * BLOCK_THREADS * VECTOR_BYTES * 2

    @property
    def tagged_column_bytes(self) -> int:
        return self.max_blocks * BLOCK_THREADS * 8

    @property
    def tagged_slot_bytes(self) -> int:
        return self.tagged_rows_bytes + MAX_COLUMNS * self.tagged_column_bytes

    @property
    def data(self) -> int:
        return _round_up(self.tagged + self.num_rounds * self.num_slots * self.tagged_slot_bytes, 4096)

    def num_bytes(self, slot_bytes: int) -> int:
        """Of the whole mailbox."""
        return self.data + self.num_rounds * self.num_slots * slot_bytes

    @property
    def table_words(self) -> int:
        return TABLE_HEAD + 2 * self.num_rounds


@dataclasses.dataclass(frozen=True, slots=True)
class Message:
    """Sizes of one message: `capacity` rows of `width` elements, then columns of 32-bit words, each by row.

    Args:
      capacity: the most rows.
      width: elements of a row.
      dtype: of a row's elements.
      columns: words a row of each column.
    """

    capacity: int
    width: int
    dtype: Any
    columns: tuple[int, ...] = ()

    @property
    def row_bytes(self) -> int:
        return self.width * jnp.dtype(self.dtype).itemsize

    @property
    def row_vectors(self) -> int:
        return self.row_bytes // VECTOR_BYTES

    @property
    def rows_a_unit(self) -> int:
        """Rows that the threads of a block move at once, 16 bytes each; 1 where a row takes them all."""
        return max(1, BLOCK_THREADS // self.row_vectors)

    @property
    def units_a_row(self) -> int:
        return -(-self.row_vectors // BLOCK_THREADS)

    @property
    def max_units(self) -> int:
        return -(-self.capacity // self.rows_a_unit) * self.units_a_row

    @property
    def column_starts(self) -> tuple[int, ...]:
        """Where each column begins within a slot, in bytes."""
        starts, at = [], _round_up(self.capacity * self.row_bytes, VECTOR_BYTES)
        for words in self.columns:
            starts.append(at)
            at += _round_up(self.capacity * words * 4, VECTOR_BYTES)
        return tuple(starts)

    @property
    def num_bytes(self) -> int:
        """Of a slot that holds it."""
        tail = sum(_round_up(self.capacity * words * 4, VECTOR_BYTES) for words in self.columns)
        return _round_up(self.capacity * self.row_bytes, VECTOR_BYTES) + tail

    def bytes_needed(self, num_rows: int) -> int:
        """Of `num_rows` rows and their columns."""
        return num_rows * (self.row_bytes + 4 * sum(self.columns))

    def blocks(self, num_rounds: int) -> int:
        """Blocks that move one round's message: what both sides compute alike."""
        return max(1, min(MAX_BLOCKS // num_rounds, self.max_units))

    def check(self) -> None:
        """ValueError for rows that can't be moved by 16-byte vectors, or too many columns."""
        if len(self.columns) > MAX_COLUMNS:
            raise ValueError(f"push: expected at most {MAX_COLUMNS} columns, got {len(self.columns)}")
        if self.row_bytes % VECTOR_BYTES or not self.row_bytes:
            raise ValueError(
                f"push: 'pallas' expected rows of a multiple of {VECTOR_BYTES} bytes, got {self.width} of {self.dtype}"
            )


@dataclasses.dataclass(frozen=True, slots=True)
class PushPlan:
    """One call: what is sent, what is received, under which numbers.

    Args:
      mailbox: the map, the same on all devices.
      sends: the message that goes to every peer; None if this call sends nothing.
      receives: the message that comes from every peer; None if it waits for none.
      send_offset, receive_offset: the messages' numbers less the sequence number that comes in.
      advance: what is added to it on its way out.
    """

    mailbox: MailboxMap
    sends: Message | None
    receives: Message | None
    send_offset: int = 0
    receive_offset: int = 0
    advance: int = 1


def slots_for(in_flight: int) -> int:
    """Slots with which a sender may be `in_flight` messages ahead of a receive: the one that is read stays taken."""
    return max(4, 2 ** math.ceil(math.log2(in_flight + 1)))


def _round_up(a: int, b: int) -> int:
    return -(-a // b) * b
