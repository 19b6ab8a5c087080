"""The four lanes of the ping-pong pipeline, walked tick by tick with data dependencies and lane occupancy. No JAX.

One walk moves every device of every cell at once: state is an array over (cell, device), an event is a few array
operations. The order of work comes from `jmoe.schedule.Schedule` and from nowhere else.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, Protocol

import numpy as np

from jmoe.schedule import Schedule, Stage

ExchangeLanes = Literal["chain", "separate"]
Lane = Literal["attention", "dispatch", "expert", "combine"]
LANES: tuple[Lane, ...] = ("attention", "dispatch", "expert", "combine")


class Carrier(Protocol):
    """How one direction's exchanges of a pass move: `Transfer` in closed form, or messages through a network."""

    def carry(
        self, stage: Stage, start: np.ndarray, port_free: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Moves one stage's rows.

        Args:
          stage: whose rows.
          start: `[C, senders]` when each sender starts.
          port_free: `[C, receivers]` when each receiver can take rows in.

        Returns:
          `[C, senders]` when each sender has sent, `[C, receivers]` when each receiver has all its bytes, and how much
          later they are usable (a scalar or `[C, 1]`).
        """
        ...

    def busy_s(self) -> tuple[float, float]:
        """Port seconds of the mean sender and of the mean receiver in the whole pass."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class Transfer:
    """How long each end of one direction's exchanges is busy, for every stage of a pass.

    A sender deals its bytes evenly over the receivers, so its last bytes for each of them leave together; a receiver's
    port works from the first byte on and cannot finish before the slowest sender has.

    Attributes:
      send_s: `[L, m, C, senders]` a sender's port time: its messages one after the other.
      receive_s: `[L, m, C, receivers]` a receiver's port time: what all senders push at it (incast).
      latency_s: from the last byte sent to the row usable at the receiver; a scalar or `[L, m, C, 1]`.
    """

    send_s: np.ndarray
    receive_s: np.ndarray
    latency_s: np.ndarray

    def carry(
        self, stage: Stage, start: np.ndarray, port_free: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As in `Carrier`."""
        index = stage.layer, stage.micro_batch
        sent = start + self.send_s[index]
        received = np.maximum(port_free, start.min(axis=1, keepdims=True)) + self.receive_s[index]
        received = np.maximum(received, sent.max(axis=1, keepdims=True))
        return sent, received, self.latency_s if self.latency_s.ndim == 0 else self.latency_s[index]

    def busy_s(self) -> tuple[float, float]:
        """As in `Carrier`."""
        send, receive = self.send_s, self.receive_s
        return (
            float(send.sum() / (send.shape[2] * send.shape[3])),
            float(receive.sum() / (receive.shape[2] * receive.shape[3])),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class PassTimes:
    """The times of one pass over all layers and micro-batches: one decode iteration of C cells of M + N devices.

    Attributes:
      attention_s: `[L + 1, m, C, M]` seconds; entry L is the head.
      expert_s: `[L, m, C, N]` seconds.
      dispatch, combine: the two directions of the exchange.
    """

    attention_s: np.ndarray
    expert_s: np.ndarray
    dispatch: Carrier
    combine: Carrier


@dataclasses.dataclass(frozen=True, slots=True)
class LaneEvent:
    """One stage on one lane, over all devices of all cells.

    Attributes:
      start_s: `[C, devices]`; of an exchange, the senders.
      end_s: `[C, devices]`; of an exchange, when the receivers can use their rows.
      sent_s, port_free_s, received_s: of an exchange, when senders were done, when receivers could take rows in, and
        when they had all bytes; None of a compute stage.
    """

    lane: Lane
    stage: Stage
    start_s: np.ndarray
    end_s: np.ndarray
    sent_s: np.ndarray | None = None
    port_free_s: np.ndarray | None = None
    received_s: np.ndarray | None = None


Recorder = Callable[[LaneEvent], None]


class LaneWalker:
    """Walks a schedule again and again; lanes keep their occupancy from one pass to the next.

    A stage starts when its lane on that device is free and what it reads has arrived. In the "chain" an exchange also
    waits, on each device, for the exchange before it (a sequence number travels through them; an exchange that carries
    both directions ends when both have). With "separate" lanes dispatches and combines queue apart, each in order.

    Args:
      schedule: the order of work.
      num_cells, attention, expert: C, M and N.
      exchange_lanes: "chain" where the roles call exchanges together, "separate" where each calls alone; None is the
        schedule's own.

    Raises:
      ValueError: "separate" with a schedule whose exchanges carry both directions at once.
    """

    def __init__(
        self,
        schedule: Schedule,
        num_cells: int,
        attention: int,
        expert: int,
        exchange_lanes: ExchangeLanes | None = None,
    ):
        if exchange_lanes is None:
            exchange_lanes = "separate" if schedule.directions == "separate" else "chain"
        if exchange_lanes not in ("chain", "separate"):
            raise ValueError(f"exchange_lanes: expected 'chain' or 'separate', got {exchange_lanes!r}")
        if exchange_lanes == "separate" and schedule.directions == "both":
            raise ValueError("exchange_lanes: expected 'chain' for a schedule with directions 'both', got 'separate'")
        self._schedule = schedule
        self._chain = exchange_lanes == "chain"
        micro_batches = range(schedule.num_micro_batches)
        zero_a, zero_e = np.zeros((num_cells, attention)), np.zeros((num_cells, expert))
        self._attention_free, self._expert_free = zero_a, zero_e
        # port occupancy, by direction; in the chain both directions of a device always hold the same time
        self._dispatch_ports, self._combine_ports = (zero_a, zero_e), (zero_e, zero_a)
        # what each micro-batch has last finished, by kind of work
        self._attention_end = [zero_a for _ in micro_batches]
        self._dispatched = [zero_e for _ in micro_batches]
        self._expert_end = [zero_e for _ in micro_batches]
        self._combined = [zero_a for _ in micro_batches]

    @property
    def end_s(self) -> np.ndarray:
        """`[C]` when the last device of each cell has finished all that it was given."""
        return np.maximum(self._attention_free.max(axis=1), self._combine_ports[1].max(axis=1))

    def walk(self, times: PassTimes, record: Recorder | None = None) -> np.ndarray:
        """Walks one pass.

        Returns:
          `[m, C, M]` seconds: when each micro-batch's head ended on each attention replica.
        """
        num_layers = self._schedule.num_layers
        heads = []
        for tick in self._schedule.ticks:
            if tick.attention is not None:
                self._attention(tick.attention, times.attention_s, record)
                if tick.attention.layer == num_layers:
                    heads.append(self._attention_end[tick.attention.micro_batch])
            if tick.expert is not None:
                self._expert(tick.expert, times.expert_s, record)
            if tick.exchange is not None:
                self._exchange(tick.exchange.dispatch, tick.exchange.combine, times, record)
        return np.stack(heads)

    def _attention(self, stage: Stage, attention_s: np.ndarray, record: Recorder | None) -> None:
        start = np.maximum(self._attention_free, self._combined[stage.micro_batch])
        end = start + attention_s[stage.layer, stage.micro_batch]
        self._attention_free = self._attention_end[stage.micro_batch] = end
        if record is not None:
            record(LaneEvent("attention", stage, start, end))

    def _expert(self, stage: Stage, expert_s: np.ndarray, record: Recorder | None) -> None:
        start = np.maximum(self._expert_free, self._dispatched[stage.micro_batch])
        end = start + expert_s[stage.layer, stage.micro_batch]
        self._expert_free = self._expert_end[stage.micro_batch] = end
        if record is not None:
            record(LaneEvent("expert", stage, start, end))

    def _exchange(
        self, dispatch: Stage | None, combine: Stage | None, times: PassTimes, record: Recorder | None
    ) -> None:
        if dispatch is not None and combine is not None:
            # one call: a device takes nothing in before its own rows are there
            attention = np.maximum(self._dispatch_ports[0], self._attention_end[dispatch.micro_batch])
            expert = np.maximum(self._combine_ports[0], self._expert_end[combine.micro_batch])
            self._dispatch_ports, self._combine_ports = (attention, expert), (expert, attention)
        attention_done, expert_done = self._dispatch_ports
        if dispatch is not None:
            attention_done, expert_done = self._dispatch(dispatch, times.dispatch, record)
        if combine is not None:
            combined = self._combine(combine, times.combine, record)
            attention_done = np.maximum(attention_done, combined[1])
            expert_done = np.maximum(expert_done, combined[0])
        if self._chain:
            self._dispatch_ports, self._combine_ports = (attention_done, expert_done), (expert_done, attention_done)

    def _dispatch(self, stage: Stage, carrier: Carrier, record: Recorder | None) -> tuple[np.ndarray, np.ndarray]:
        """Moves rows to the experts; when the call is over on the attention and on the expert devices."""
        start = np.maximum(self._attention_end[stage.micro_batch], self._dispatch_ports[0])
        port_free = self._dispatch_ports[1]
        sent, received, latency_s = carrier.carry(stage, start, port_free)
        arrived = self._dispatched[stage.micro_batch] = received + latency_s
        self._dispatch_ports = (sent, received)
        if record is not None:
            record(LaneEvent("dispatch", stage, start, arrived, sent, port_free, received))
        return sent + latency_s, arrived

    def _combine(self, stage: Stage, carrier: Carrier, record: Recorder | None) -> tuple[np.ndarray, np.ndarray]:
        """Moves rows back; when the call is over on the expert and on the attention devices."""
        start = np.maximum(self._expert_end[stage.micro_batch], self._combine_ports[0])
        port_free = self._combine_ports[1]
        sent, received, latency_s = carrier.carry(stage, start, port_free)
        arrived = self._combined[stage.micro_batch] = received + latency_s
        self._combine_ports = (sent, received)
        if record is not None:
            record(LaneEvent("combine", stage, start, arrived, sent, port_free, received))
        return sent + latency_s, arrived
