"""A planning problem, and a cell of it: M, N, tensor sizes, m and schedule, priced for any number of rows. No JAX."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import numpy as np

from jmoe.planner.expert_placement import PlacedExperts, place_experts
from jmoe.planner.formulas import ScheduleKind, head_time, total_time
from jmoe.planner.hardware import Catalogue, GpuKind
from jmoe.planner.model_shape import ModelShape
from jmoe.planner.performance import (
    ExchangeModel,
    Memory,
    Precision,
    Roofline,
    StageTimes,
    Transport,
    distinct_nodes,
    drawn_excess,
)
from jmoe.planner.workload import Workload, busiest_replica

TimesFactory = Callable[[GpuKind, GpuKind], StageTimes]


@dataclasses.dataclass(frozen=True)
class Problem:
    """A model, the GPUs, the workload and the precision: what is to be planned.

    Args:
      pool: GPU kinds and how many of each may be used.
      times: makes the stage times of a pair of kinds (attention, expert); the roofline unless given.
      histogram: rows of each expert in some traffic; then experts are replicated and placed by it, where memory
        allows, instead of contiguous and balanced, and the busiest node's load follows from it.
    """

    model: ModelShape
    catalogue: Catalogue
    pool: Mapping[str, int]
    workload: Workload = dataclasses.field(default_factory=Workload)
    precision: Precision = dataclasses.field(default_factory=Precision)
    times: TimesFactory | None = None
    histogram: tuple[float, ...] | None = None

    def __post_init__(self):
        if self.histogram is not None and len(self.histogram) != self.model.num_experts:
            raise ValueError(
                f"Problem.histogram: expected {self.model.num_experts} counts (the model's experts), "
                f"got {len(self.histogram)}"
            )

    @functools.cached_property
    def _placements(self) -> dict[tuple[int, int], PlacedExperts]:
        return {}

    def placed(self, num_nodes: int, slots: int) -> PlacedExperts | None:
        """Experts placed by the histogram on nodes that hold `slots` of them; None without a histogram or room."""
        if self.histogram is None or num_nodes * slots < self.model.num_experts:
            return None
        # More than two replicas' worth of spare slots a node no longer helps, and each is memory and search time.
        slots = min(slots, -(-self.model.num_experts // num_nodes) + 2, self.model.num_experts)
        key = (num_nodes, slots)
        if key not in self._placements:
            self._placements[key] = place_experts(self.histogram, num_nodes, slots)
        return self._placements[key]

    @functools.cached_property
    def context(self) -> tuple[float, float]:
        """Mean and variance of a decode slot's KV tokens."""
        return self.workload.mean_context, self.workload.context_variance

    def stage_times(self, attention: GpuKind, expert: GpuKind) -> StageTimes:
        if self.times is not None:
            return self.times(attention, expert)
        return Roofline(self.model, attention, expert, self.precision)


@dataclasses.dataclass(frozen=True)
class Deployment:
    """Arrays of cells that share GPU kinds, tensor sizes, m and schedule, and differ in M, N (and rows).

    Broadcasting arrays M and N; `step` prices rows for all of them at once.
    """

    problem: Problem
    attention_gpu: GpuKind
    expert_gpu: GpuKind
    attention_tensor: int
    expert_tensor: int
    num_micro_batches: int
    schedule: ScheduleKind
    num_replicas: np.ndarray
    num_nodes: np.ndarray
    transport: Transport = "exact"
    network_only: bool = False

    @property
    def num_gpus(self) -> np.ndarray:
        return self.num_replicas * self.attention_tensor + self.num_nodes * self.expert_tensor

    @functools.cached_property
    def _placed(self) -> list[PlacedExperts | None]:
        """By cell: the placement that the histogram asks for."""
        slots = expert_slots(self.problem, self.expert_gpu, self.expert_tensor)
        return [self.problem.placed(int(n), slots) for n in np.ravel(self.num_nodes)]

    @functools.cached_property
    def local_experts(self) -> np.ndarray:
        """Experts on the fullest node."""
        even = np.ceil(self.problem.model.num_experts / self.num_nodes)
        if self.problem.histogram is None:
            return even
        held = [p.placement.max_local_experts if p else np.nan for p in self._placed]
        return np.where(np.isnan(held), even, held)

    @property
    def one_domain(self) -> np.ndarray:
        same = self.attention_gpu.name == self.expert_gpu.name and not self.network_only
        return np.asarray(same & (self.num_gpus <= self.attention_gpu.scale_up_domain))

    @functools.cached_property
    def node_share(self) -> np.ndarray:
        """Share of all (token, expert) pairs that the busiest node gets: its experts', over their copies."""
        model = self.problem.model
        if self.problem.histogram is not None:
            shares = np.array([p.loads.max() / p.loads.sum() if p else 1.0 for p in self._placed])
            return np.minimum(shares * self.problem.workload.expert_imbalance, 1.0)
        copies = np.maximum(1, np.floor(self.num_nodes / model.num_experts))
        even = np.minimum(self.local_experts / (model.num_experts * copies), 1.0)
        return np.minimum(even * self.problem.workload.expert_imbalance, 1.0)

    @property
    def _imbalance(self) -> np.ndarray:
        """Load of the busiest node over the mean."""
        return np.maximum(1.0, self.node_share * self.num_nodes)

    def stages(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """T_a, T_e and T_c for rows decode slots of one micro-batch of one replica."""
        problem, model = self.problem, self.problem.model
        times = problem.stage_times(self.attention_gpu, self.expert_gpu)
        attention = times.attention_s(rows, self._busiest_context(rows), self.attention_tensor)
        pairs = rows * self.num_replicas * model.num_experts_per_tok
        copies = distinct_nodes(model.num_experts, model.num_experts_per_tok, self.num_nodes)
        excess = self._drawn_excess(rows)
        imbalance = self._imbalance * excess
        tokens = rows * self.num_replicas * np.minimum(copies * imbalance / self.num_nodes, 1.0)
        busiest = pairs * np.minimum(self.node_share * excess, 1.0)
        expert = times.expert_s(busiest, self.local_experts, self.expert_tensor, tokens)
        exchange = ExchangeModel(model, self.attention_gpu, self.expert_gpu, problem.precision, self.transport)
        wire = times.exchange_s(
            exchange, rows, self.num_replicas, self.num_nodes, self.attention_tensor, self.expert_tensor,
            imbalance, self.one_domain,
        )  # fmt: skip
        # A push is a kernel on each role's one stream, before every stage: the roles' own time, not the link's alone.
        pushes = self.schedule == "separate" and self.transport == "exact"
        push_s = np.where(self.one_domain & pushes, self.attention_gpu.kernels.push_us * 1e-6, 0.0)
        return attention + push_s, expert + push_s, wire

    def _drawn_excess(self, rows: np.ndarray) -> np.ndarray | float:
        """Chance excess of the busiest node, where the workload asks for it."""
        model = self.problem.model
        if not self.problem.workload.drawn_routing:
            return 1.0
        return drawn_excess(
            model.num_experts, model.num_experts_per_tok, self.local_experts, self.num_nodes, rows * self.num_replicas
        )

    def _busiest_context(self, rows: np.ndarray) -> np.ndarray:
        """Mean context on the replica that a stage waits for."""
        mean, variance = self.problem.context
        factor = busiest_replica(variance, mean, np.maximum(rows, 1), self.num_replicas)
        return mean * factor * self.problem.workload.attention_imbalance

    def step(self, rows: np.ndarray) -> np.ndarray:
        """Time between two tokens of a request: one pass of all micro-batches through all layers and the head."""
        return self.step_of(rows, *self.stages(rows))

    def step_of(self, rows: np.ndarray, attention: np.ndarray, expert: np.ndarray, exchange: np.ndarray) -> np.ndarray:
        """As `step`, from stage times."""
        problem, model, m = self.problem, self.problem.model, self.num_micro_batches
        times = problem.stage_times(self.attention_gpu, self.expert_gpu)
        total = total_time(self.schedule, model.num_moe_layers, m, attention, expert, exchange)
        if model.num_dense_layers:
            context = problem.context[0] * problem.workload.attention_imbalance
            total = total + m * model.num_dense_layers * times.dense_s(rows, context, self.attention_tensor)
        slowest = np.maximum(np.maximum(attention, expert), exchange)
        heads = head_time(m, times.head_s(rows, self.attention_tensor), slowest)
        return total + heads + self.attention_gpu.step_host_s


def expert_slots(problem: Problem, gpu: GpuKind, tensor: int) -> int:
    """How many experts a node of `tensor` GPUs can hold."""
    return int(tensor * gpu.usable_bytes // Memory(problem.model, problem.precision).expert_bytes)


def largest_rows(step: Callable[[np.ndarray], np.ndarray], most: np.ndarray, slo_s: float) -> np.ndarray:
    """Binary search: the most rows, up to `most`, whose step meets the SLO; 0 where not even one does.

    Args:
      step: time of a step for an integer array of rows, not decreasing in rows.
      most: bound for each cell, int array.
    """
    low = np.where((most >= 1) & (step(np.ones_like(most)) <= slo_s), 1, 0)
    high = np.where(low == 1, most, 0)
    low = np.where(step(np.maximum(high, 1)) <= slo_s, high, low)
    while np.any(low < high):
        middle = (low + high + 1) // 2
        fits = step(np.maximum(middle, 1)) <= slo_s
        low, high = np.where(fits, middle, low), np.where(fits, high, middle - 1)
        high = np.maximum(high, low)
    return low
