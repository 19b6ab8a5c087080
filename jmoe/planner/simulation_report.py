"""What a simulation answers: throughput, time per output token, lane utilisation, where the time went. No JAX."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from jmoe.planner.lanes import LANES, Lane


@dataclasses.dataclass(frozen=True, slots=True)
class EventTable:
    """Recorded events of the first cell, one row a (lane, stage), columns as arrays of equal length.

    Attributes:
      lane: index into `LANES`.
      iteration, layer, micro_batch: which stage; layer == num_layers is the head.
      start_s: when the first device of the lane started it.
      end_s: when the last device of the lane finished it.
    """

    lane: np.ndarray
    iteration: np.ndarray
    layer: np.ndarray
    micro_batch: np.ndarray
    start_s: np.ndarray
    end_s: np.ndarray

    def __len__(self) -> int:
        return len(self.lane)

    def of_lane(self, lane: Lane) -> "EventTable":
        """The rows of one lane."""
        keep = self.lane == LANES.index(lane)
        return EventTable(*(getattr(self, f.name)[keep] for f in dataclasses.fields(self)))


@dataclasses.dataclass(frozen=True, slots=True)
class SimulationReport:
    """The outcome of `simulate`.

    Attributes:
      num_iterations: decode iterations (passes) walked.
      num_gpus: GPUs of all cells.
      tokens_per_iteration: output tokens of one iteration over all cells.
      total_s: from the start to the end of the slowest cell's last head.
      iteration_s: `[num_iterations, C]` from the end of one iteration's last head to the next one's.
      tpot_s: `[intervals, m, C, M]` time between two tokens of a request, by micro-batch and attention replica.
      lane_utilisation: share of total_s in which a lane is busy, mean over its devices (for the exchanges: over the
        busier end of the two).
      time_share: what the critical path of the recorded iterations did, shares summing to 1 by `CRITICAL_KINDS` (of the
        first cell); empty without events.
      events: the first cell's recorded iterations, or None.
    """

    num_iterations: int
    num_gpus: int
    tokens_per_iteration: float
    total_s: float
    iteration_s: np.ndarray
    tpot_s: np.ndarray
    lane_utilisation: Mapping[Lane, float]
    time_share: Mapping[str, float]
    events: EventTable | None = None

    @property
    def tokens_per_s(self) -> float:
        """Decode throughput of all cells: tokens of an iteration over each cell's own mean iteration time."""
        per_cell = self.tokens_per_iteration / self.iteration_s.shape[1]
        return float((per_cell / self.iteration_s.mean(axis=0)).sum())

    @property
    def tokens_per_s_per_gpu(self) -> float:
        return self.tokens_per_s / self.num_gpus

    def tpot_percentiles(self, percentiles: tuple[float, ...] = (50.0, 90.0, 99.0)) -> dict[float, float]:
        """Percentiles of the time between two tokens, in seconds, over requests' micro-batches and iterations."""
        return dict(zip(percentiles, np.percentile(self.tpot_s, percentiles).tolist(), strict=True))
