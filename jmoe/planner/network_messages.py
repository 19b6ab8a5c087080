"""What goes into the simulated network and what comes out of it. No JAX."""

import dataclasses
from typing import Literal

import numpy as np


@dataclasses.dataclass(frozen=True, slots=True)
class Messages:
    """Messages in the order in which their senders post them; arrays of equal length.

    Attributes:
      sender, receiver: endpoint ids.
      num_bytes: sizes, at least 1.
      ready_s: when a message may be posted.

    Raises:
      ValueError: lengths that differ, or an empty message.
    """

    sender: np.ndarray
    receiver: np.ndarray
    num_bytes: np.ndarray
    ready_s: np.ndarray

    def __post_init__(self):
        lengths = {len(getattr(self, f.name)) for f in dataclasses.fields(self)}
        if len(lengths) != 1:
            raise ValueError(f"Messages: expected arrays of equal length, got lengths {sorted(lengths)}")
        if len(self.num_bytes) and self.num_bytes.min() < 1:
            raise ValueError(f"Messages.num_bytes: expected at least 1, got {self.num_bytes.min()}")

    def __len__(self) -> int:
        return len(self.sender)

    def __add__(self, other: "Messages") -> "Messages":
        """Both sets; a sender in both posts its messages of the first set first where they are ready together."""
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in dataclasses.fields(self))
        return Messages(*(np.concatenate(pair) for pair in pairs))


@dataclasses.dataclass(frozen=True, slots=True)
class Deliveries:
    """What became of the messages.

    Attributes:
      arrived_s: `[messages]` when the last chunk was usable at the receiver.
      num_out_of_order: messages of which chunks came out of order.
      num_marks: acknowledgements that carried a congestion mark.
      longest_wait_s: of a chunk at a switch port.
    """

    arrived_s: np.ndarray
    num_out_of_order: int
    num_marks: int
    longest_wait_s: float


def many_to_many(
    num_bytes: np.ndarray,
    senders: np.ndarray,
    receivers: np.ndarray,
    ready_s: np.ndarray | float = 0.0,
    posting: Literal["rotated", "same"] = "rotated",
) -> Messages:
    """One direction of an exchange: every sender's message to every receiver, empty ones left out.

    Args:
      num_bytes: `[senders, receivers]`.
      senders, receivers: endpoint ids.
      ready_s: `[senders]` or one time.
      posting: "rotated" starts sender i of M at receiver i * N // M of N, so that receivers share the load at every
        moment; "same" starts all senders at receiver 0 (incast).

    Returns:
      The messages, each sender's in the order in which it posts them.
    """
    num_senders, num_receivers = num_bytes.shape
    first = np.arange(num_senders)[:, None] * num_receivers // num_senders * (posting == "rotated")
    order = (first + np.arange(num_receivers)[None, :]) % num_receivers
    sizes = np.take_along_axis(num_bytes, order, axis=1)
    sender = np.broadcast_to(np.asarray(senders)[:, None], order.shape)
    ready = np.broadcast_to(np.broadcast_to(ready_s, (num_senders,))[:, None], order.shape)
    keep = sizes > 0
    return Messages(sender[keep], np.asarray(receivers)[order][keep], sizes[keep], ready[keep])
