"""Discrete events over the four lanes, driven by `jmoe.schedule`: what a deployment will do. No JAX.

Two ways to say how long things take: `ConstantTimes`, for the closed forms and for refining a search, or any object
with `passes`, such as `jmoe.planner.decode_model.DecodeModel` (growing sequences, drawn routing, stragglers).
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from jmoe.planner.event_recorder import EventRecorder
from jmoe.planner.lanes import ExchangeLanes, Lane, LaneWalker, PassTimes, Transfer
from jmoe.planner.simulation_report import SimulationReport
from jmoe.schedule import Schedule

MAX_ITERATIONS = 1_000_000
MAX_TOKENS_TIMED = 200_000_000  # iterations * micro-batches * replicas of all cells: 1.6 GB of times


class TimeModel(Protocol):
    """Anything that can say how long every stage of every pass takes."""

    @property
    def num_cells(self) -> int: ...

    @property
    def attention(self) -> int: ...

    @property
    def expert(self) -> int: ...

    @property
    def num_gpus(self) -> int: ...

    def tokens_per_iteration(self, num_micro_batches: int) -> float: ...

    def passes(self, schedule: Schedule, seed: int) -> Iterator[PassTimes]: ...


@dataclasses.dataclass(frozen=True, slots=True)
class ConstantTimes:
    """Constant times of one micro-batch of one layer: T_a, T_e and the one-way T_c, in seconds.

    Attributes:
      attention_s, expert_s, exchange_s: T_a, T_e, T_c.
      head_s: final norm, logits and sampling of one micro-batch.
      rows: tokens of one micro-batch over all replicas, for the throughput.
      num_gpus: GPUs of the cell, for the throughput per GPU.
    """

    attention_s: float
    expert_s: float
    exchange_s: float
    head_s: float = 0.0
    rows: float = 1.0
    num_gpus: int = 1

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if not (value := getattr(self, field.name)) >= 0:
                raise ValueError(f"ConstantTimes.{field.name}: expected at least 0, got {value}")
        if self.num_gpus < 1:
            raise ValueError(f"ConstantTimes.num_gpus: expected at least 1, got {self.num_gpus}")

    @property
    def num_cells(self) -> int:
        return 1

    @property
    def attention(self) -> int:
        return 1

    @property
    def expert(self) -> int:
        return 1

    def tokens_per_iteration(self, num_micro_batches: int) -> float:
        """Output tokens of one iteration."""
        return self.rows * num_micro_batches

    def passes(self, schedule: Schedule, seed: int) -> Iterator[PassTimes]:
        """The same pass for ever; `seed` has nothing to decide."""
        layers, m = schedule.num_layers, schedule.num_micro_batches
        attention = np.full((layers + 1, m, 1, 1), float(self.attention_s))
        attention[layers] = self.head_s
        exchange = np.full((layers, m, 1, 1), float(self.exchange_s))
        transfer = Transfer(exchange, exchange, np.zeros(()))
        times = PassTimes(attention, np.full((layers, m, 1, 1), float(self.expert_s)), transfer, transfer)
        while True:
            yield times


def simulate(
    schedule: Schedule,
    times: TimeModel,
    num_iterations: int = 1,
    *,
    exchange_lanes: ExchangeLanes | None = None,
    record_iterations: int = 0,
    seed: int = 0,
) -> SimulationReport:
    """Walks the schedule `num_iterations` times and reports what happened.

    Args:
      schedule: from `jmoe.schedule.build_schedule`; one pass is one decode iteration.
      times: how long things take.
      num_iterations: decode iterations, 1 to 1,000,000.
      exchange_lanes: "chain" as the programs are built (each exchange waits for the one before), or "separate" for two
        exchange lanes, one a direction.
      record_iterations: how many iterations, spread evenly over the run, to keep events of (first cell).
      seed: of everything drawn; the same seed gives the same report.

    Returns:
      The report.

    Raises:
      ValueError: a count out of range, or lanes that the schedule cannot have.

    Source: lanes and schedule of MegaScale-Infer (arXiv 2504.02263), section 4.1.
    """
    if not 1 <= num_iterations <= MAX_ITERATIONS:
        raise ValueError(f"simulate.num_iterations: expected 1 to {MAX_ITERATIONS}, got {num_iterations}")
    if not 0 <= record_iterations <= num_iterations:
        raise ValueError(f"simulate.record_iterations: expected 0 to {num_iterations}, got {record_iterations}")
    shape = num_iterations, schedule.num_micro_batches, times.num_cells, times.attention
    if math.prod(shape) > MAX_TOKENS_TIMED:
        raise ValueError(
            f"simulate.num_iterations: expected at most {MAX_TOKENS_TIMED} iterations * micro-batches * replicas, "
            f"got {math.prod(shape)}"
        )
    walker = LaneWalker(schedule, times.num_cells, times.attention, times.expert, exchange_lanes)
    recorded = set(np.linspace(0, num_iterations - 1, record_iterations).astype(int).tolist())
    recorder = EventRecorder(schedule.num_layers)
    busy = np.zeros((6,))
    heads = np.empty(shape)
    passes = times.passes(schedule, seed)
    for iteration in range(num_iterations):
        pass_times = next(passes)
        heads[iteration] = walker.walk(pass_times, recorder.at(iteration) if iteration in recorded else None)
        busy += _busy(pass_times)
    total_s = float(heads.max())
    return SimulationReport(
        num_iterations=num_iterations,
        num_gpus=times.num_gpus,
        tokens_per_iteration=times.tokens_per_iteration(schedule.num_micro_batches),
        total_s=total_s,
        iteration_s=np.diff(heads.max(axis=(1, 3)), axis=0, prepend=0.0),
        tpot_s=np.diff(heads, axis=0) if num_iterations > 1 else heads,
        lane_utilisation=_utilisation(busy, total_s),
        time_share=recorder.time_share() if recorded else {},
        events=recorder.table() if recorded else None,
    )


def _busy(times: PassTimes) -> np.ndarray:
    """Seconds in which the mean device of each end of each lane is busy in one pass."""
    compute = [p.sum() / (p.shape[2] * p.shape[3]) for p in (times.attention_s, times.expert_s)]
    return np.array([*compute, *times.dispatch.busy_s(), *times.combine.busy_s()])


def _utilisation(busy: np.ndarray, total_s: float) -> dict[Lane, float]:
    if total_s == 0:
        return {"attention": 0.0, "dispatch": 0.0, "expert": 0.0, "combine": 0.0}
    attention, expert, *exchange = (busy / total_s).tolist()
    return {
        "attention": attention,
        "dispatch": max(exchange[0], exchange[1]),
        "expert": expert,
        "combine": max(exchange[2], exchange[3]),
    }
