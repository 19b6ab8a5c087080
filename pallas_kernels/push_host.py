"""The push on the host: mailboxes of one process in which threads meet, with the same slots, credits and bounded waits.

The reference of the GPU kernel, and what the `push` transport is tested with on CPU devices.
"""

import dataclasses
import itertools
import threading
import time
from typing import Any

import numpy as np

from jmoe.pallas_kernels.push_plan import (
    SEQUENCE_MASK,
    TABLE_DEADLINE,
    TABLE_HEAD,
    TABLE_OWN,
    TICK_NS,
    TIMED_OUT,
    Message,
    PushPlan,
)

_numbers = itertools.count(1)
_open: dict[int, "HostMailbox"] = {}


@dataclasses.dataclass
class HostMailbox:
    """What stands in device memory for a GPU: messages by (round, number), and the owner's counters."""

    changed: threading.Condition = dataclasses.field(default_factory=threading.Condition)
    messages: dict[tuple[int, int], tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    sent: int = 0
    begun: int = 0  # receiving calls
    dead: bool = False

    def open(self) -> int:
        """Makes it known to the process; returns its number."""
        number = next(_numbers)
        _open[number] = self
        return number


def close_host_mailbox(number: int) -> None:
    """Forgets it, and ends every wait in it."""
    if (mailbox := _open.pop(number, None)) is not None:
        with mailbox.changed:
            mailbox.dead = True
            mailbox.changed.notify_all()


def push_on_host(
    plan: PushPlan, table: Any, sequence: Any, sent: tuple[Any, ...]
) -> tuple[tuple[np.ndarray, ...], np.ndarray, np.int32]:
    """One device's call; see `push`.

    Args:
      plan: of the call.
      table: `[words]` int32, mailboxes by their number.
      sequence: int32.
      sent: (rows, index or None, counts, *columns), or () where nothing is sent.

    Returns:
      (rows, counts, *columns) or (), faults `[2 * rounds, 2]`, the next sequence number.
    """
    table, number = np.asarray(table), int(sequence)
    rounds, own = plan.mailbox.num_rounds, _open[int(table[TABLE_OWN])]
    seconds = float(table[TABLE_DEADLINE]) * TICK_NS * 1e-9
    peers = [_open.get(int(n)) for n in table[TABLE_HEAD::2][:rounds]]
    faults = np.full((2 * rounds, 2), -1, np.int32)
    epoch = _begin(own, plan)
    if plan.sends is not None:
        rows, index, counts, *columns = (None if a is None else np.asarray(a) for a in sent)
        for r, peer in enumerate(peers):
            if peer is not None and rows is not None and counts is not None:
                message = _gathered(plan.sends, r, rows, index, int(counts[r]), columns)
                header = (number + plan.send_offset) & SEQUENCE_MASK
                if not _write(own, peer, plan.mailbox.num_slots, r, epoch[0], (header, *message), seconds):
                    faults[r] = header, TIMED_OUT
    received: tuple[np.ndarray, ...] = ()
    if plan.receives is not None:
        received = empty_message(plan.receives, rounds)
        expected = (number + plan.receive_offset) & SEQUENCE_MASK
        for r, peer in enumerate(peers):
            if peer is not None:
                faults[rounds + r] = _read(own, r, epoch[1], received, expected, seconds)
    return received, faults, np.int32((number + plan.advance) & SEQUENCE_MASK)


def empty_message(message: Message, rounds: int) -> tuple[np.ndarray, ...]:
    """(rows, counts, *columns) of nothing."""
    shape = (rounds, message.capacity)
    columns = (np.zeros((*shape, words), np.int32) for words in message.columns)
    return np.zeros((*shape, message.width), message.dtype), np.zeros((rounds,), np.int32), *columns


def _begin(own: HostMailbox, plan: PushPlan) -> tuple[int, int]:
    """Counts this call: (number of its sent messages, of its received ones)."""
    with own.changed:
        epoch = own.sent, own.begun
        own.sent += plan.sends is not None
        own.begun += plan.receives is not None
        own.changed.notify_all()
    return epoch


def _gathered(message: Message, r: int, rows: np.ndarray, index: Any, count: int, columns: list[Any]) -> tuple:
    count = min(max(count, 0), message.capacity)
    flat = rows.reshape(-1, message.width)
    places = r * message.capacity + np.arange(count) if index is None else index[r, :count]
    return flat[places].copy(), *(column[r, :count].copy() for column in columns)


def _write(own: HostMailbox, peer: HostMailbox, num_slots: int, r: int, epoch: int, message: tuple, seconds: float):
    """Waits until the message of this slot before has been taken, then leaves this one; False if the wait expires."""
    with peer.changed:
        ready = _wait(peer, own, lambda: peer.begun > epoch - num_slots, seconds)
        if ready:
            peer.messages[r, epoch] = message
            peer.changed.notify_all()
    return ready


def _read(own: HostMailbox, r: int, epoch: int, received: tuple, expected: int, seconds: float) -> tuple[int, int]:
    with own.changed:
        if not _wait(own, own, lambda: (r, epoch) in own.messages, seconds):
            return expected, TIMED_OUT
        header, rows, *columns = own.messages.pop((r, epoch))
    received[1][r] = len(rows)
    for place, part in zip((received[0], *received[2:]), (rows, *columns), strict=False):
        place[r, : len(part)] = part
    return (-1, -1) if header == expected else (expected, header)


def _wait(at: HostMailbox, own: HostMailbox, ready: Any, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not ready():
        left = end - time.monotonic()
        if left <= 0 or own.dead or at.dead:
            own.dead = True
            return False
        at.changed.wait(min(left, 0.2))
    return True
