"""Keeps events of chosen iterations, and says where the attention devices' time went in them. No JAX."""

import dataclasses

import numpy as np

from jmoe.planner.lanes import LANES, Lane, Recorder
from jmoe.planner.simulation_report import EventTable
from jmoe.schedule import Stage

# What an attention device's time goes into: work, or waiting for the micro-batch that it takes next to
#   wait_attention     be finished by slower attention replicas, so that its dispatch can be complete
#   wait_expert_queue  get its turn at experts that are busy with another micro-batch
#   wait_imbalance     be finished by the last expert node, counted from the mean node's end
TIME_KINDS = (
    "attention",
    "head",
    "wait_attention",
    "wait_dispatch",
    "wait_expert_queue",
    "wait_expert",
    "wait_imbalance",
    "wait_combine",
)


@dataclasses.dataclass(slots=True)
class _Phases:
    """When a micro-batch's last stage passed each point, in the first cell."""

    attention_end: float
    dispatched: float = 0.0
    expert_start: float = 0.0
    expert_mean_end: float = 0.0
    expert_end: float = 0.0


class EventRecorder:
    """Collects rows for an `EventTable` and splits the attention lane's waiting by what it waited for."""

    def __init__(self, num_layers: int):
        self._num_layers = num_layers
        self._rows: list[tuple[int, int, int, int, float, float]] = []
        self._seconds = dict.fromkeys(TIME_KINDS, 0.0)
        self._phases: dict[int, _Phases] = {}
        self._attention_free: np.ndarray | None = None

    def at(self, iteration: int) -> Recorder:
        """The recorder of one iteration, to hand to `LaneWalker.walk`."""
        self._phases, self._attention_free = {}, None

        def record(lane: Lane, stage: Stage, start: np.ndarray, end: np.ndarray) -> None:
            start, end = start[0], end[0]
            row = (LANES.index(lane), iteration, stage.layer, stage.micro_batch, float(start.min()), float(end.max()))
            self._rows.append(row)
            self._account(lane, stage, start, end)

        return record

    def table(self) -> EventTable:
        """Everything recorded so far."""
        columns = list(zip(*self._rows, strict=True)) or [()] * 6
        return EventTable(*(np.array(c, np.int64 if i < 4 else np.float64) for i, c in enumerate(columns)))

    def time_share(self) -> dict[str, float]:
        """Share of the recorded attention-device time by kind, summing to 1."""
        total = sum(self._seconds.values())
        return {kind: seconds / total if total else 0.0 for kind, seconds in self._seconds.items()}

    def _account(self, lane: Lane, stage: Stage, start: np.ndarray, end: np.ndarray) -> None:
        if lane == "attention":
            if self._attention_free is not None:
                self._account_wait(self._phases.get(stage.micro_batch), self._attention_free, start)
            kind = "head" if stage.layer == self._num_layers else "attention"
            self._seconds[kind] += float((end - start).mean())
            self._phases[stage.micro_batch] = _Phases(float(end.max()))
            self._attention_free = end
            return
        phases = self._phases[stage.micro_batch]
        if lane == "dispatch":
            phases.dispatched = float(end.max())
        elif lane == "expert":
            phases.expert_start = float(start[end.argmax()])
            phases.expert_mean_end, phases.expert_end = float(end.mean()), float(end.max())

    def _account_wait(self, phases: _Phases | None, free: np.ndarray, start: np.ndarray) -> None:
        """Cuts each device's wait [free, start] at the points where the awaited micro-batch moved on."""
        if phases is None:
            return
        cuts: tuple[tuple[str, float], ...] = (
            ("wait_attention", phases.attention_end),
            ("wait_dispatch", phases.dispatched),
            ("wait_expert_queue", phases.expert_start),
            ("wait_expert", phases.expert_mean_end),
            ("wait_imbalance", phases.expert_end),
            ("wait_combine", np.inf),
        )
        since = free
        for kind, until in cuts:
            upto = np.maximum(since, np.minimum(start, until))
            self._seconds[kind] += float((upto - since).mean())
            since = upto
