"""The search: every attention:expert deployment of a pool of GPUs, each with the largest batch that its SLO allows."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

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
)
from jmoe.planner.workload import Workload, busiest_replica

Objective = Literal["gpu", "price", "watt"]
TimesFactory = Callable[[GpuKind, GpuKind], StageTimes]


@dataclasses.dataclass(frozen=True, slots=True)
class SearchOptions:
    """What to try.

    Attributes:
      tensor_sizes: candidates for the ranks of an attention replica and of an expert node.
      schedules: (num_micro_batches, schedule kind) pairs. At m of 1 and 2 the chains "one" and "both" are the same;
        from m = 4 on "both" is never slower, and it is what MeshConfig's directions="auto" takes.
      max_rows: most decode slots of one micro-batch of one replica.
      transport: how rows travel, "exact" or the padded "ppermute".
      num_replicas, num_nodes: try only these M and N; None for all.
      max_expert_copies: replicas of every expert that N > E may hold.
      network_only: keep the exchange on the NICs even where both roles fit one scale-up domain.
    """

    tensor_sizes: tuple[int, ...] = (1, 2, 4, 8)
    schedules: tuple[tuple[int, ScheduleKind], ...] = (
        (1, "one"), (2, "one"), (3, "one"), (3, "both"), (4, "both"), (5, "both"), (6, "both"),
    )  # fmt: skip
    max_rows: int = 4096
    transport: Transport = "exact"
    num_replicas: tuple[int, ...] | None = None
    num_nodes: tuple[int, ...] | None = None
    max_expert_copies: int = 4
    network_only: bool = False


@dataclasses.dataclass(frozen=True)
class Problem:
    """A model, the GPUs, the workload and the precision: what is to be planned.

    Args:
      pool: GPU kinds and how many of each may be used.
      times: makes the stage times of a pair of kinds (attention, expert); the roofline unless given.
    """

    model: ModelShape
    catalogue: Catalogue
    pool: Mapping[str, int]
    workload: Workload = dataclasses.field(default_factory=Workload)
    precision: Precision = dataclasses.field(default_factory=Precision)
    times: TimesFactory | None = None

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

    @property
    def local_experts(self) -> np.ndarray:
        """Experts on the fullest node."""
        return np.ceil(self.problem.model.num_experts / self.num_nodes)

    @property
    def one_domain(self) -> np.ndarray:
        same = self.attention_gpu.name == self.expert_gpu.name and not self.network_only
        return np.asarray(same & (self.num_gpus <= self.attention_gpu.scale_up_domain))

    @property
    def node_share(self) -> np.ndarray:
        """Share of all (token, expert) pairs that the busiest node gets: its experts', over their copies."""
        model = self.problem.model
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
        tokens = rows * self.num_replicas * np.minimum(copies * self._imbalance / self.num_nodes, 1.0)
        expert = times.expert_s(pairs * self.node_share, self.local_experts, self.expert_tensor, tokens)
        exchange = ExchangeModel(model, self.attention_gpu, self.expert_gpu, problem.precision, self.transport)
        measured = getattr(times, "exchange_s", None)
        price = measured or exchange.exchange_s
        wire = price(
            rows, self.num_replicas, self.num_nodes, self.attention_tensor, self.expert_tensor, self._imbalance,
            self.one_domain,
        )  # fmt: skip
        return attention, expert, wire

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
        return total + head_time(m, times.head_s(rows, self.attention_tensor), slowest)


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


def search(problem: Problem, options: SearchOptions = SearchOptions()) -> Any:
    """Algorithm 1 of arXiv 2504.02263 over any M:N: prices every configuration and says why the rest fell.

    Args:
      problem: what is to be planned.
      options: what to try.

    Returns:
      A pandas DataFrame with one row a configuration tried, best per its largest batch; `jmoe.planner.table` ranks
      and explains its rows. Rejected ones have a `status` other than "ok", with `need` and `have`.
    """
    from jmoe.planner.table import to_frame  # pandas only where a table is wanted

    parts: list[dict[str, Any]] = []
    kinds = [problem.catalogue[name] for name in problem.pool]
    for attention, expert in itertools.product(kinds, kinds):
        for attention_tensor, expert_tensor in itertools.product(options.tensor_sizes, options.tensor_sizes):
            if attention_tensor > attention.scale_up_domain or expert_tensor > expert.scale_up_domain:
                continue
            if problem.model.splits_attention(attention_tensor) and problem.model.splits_experts(expert_tensor):
                parts += _search_pair(problem, options, attention, expert, attention_tensor, expert_tensor)
    return to_frame(parts, problem)


def _search_pair(
    problem: Problem, options: SearchOptions, attention: GpuKind, expert: GpuKind, tensor_a: int, tensor_e: int
) -> list[dict[str, Any]]:
    """All M, N, m and schedules of one pair of kinds and tensor sizes."""
    grid = _cells(problem, options, attention, expert, tensor_a, tensor_e)
    if grid is None:
        return []
    replicas, nodes = grid
    memory = Memory(problem.model, problem.precision)
    local = np.ceil(problem.model.num_experts / nodes)
    expert_need, expert_have = local * memory.expert_bytes / tensor_e, expert.usable_bytes
    tokens = float(memory.max_kv_tokens(attention, tensor_a))
    context = problem.context[0] * problem.workload.attention_imbalance
    parts = []
    for m, schedule in options.schedules:
        cell = Deployment(
            problem, attention, expert, tensor_a, tensor_e, m, schedule, replicas, nodes, options.transport,
            options.network_only,
        )  # fmt: skip
        most = np.full(replicas.shape, min(options.max_rows, max(0, int(tokens // (m * context)))))
        status = np.where(expert_need > expert_have, "expert memory", np.where(most < 1, "attention memory", "ok"))
        most = np.where(status == "ok", most, 0)
        rows = largest_rows(cell.step, most, problem.workload.slo_s)
        status = np.where((status == "ok") & (rows < 1), "slo", status)
        parts.append(_record(cell, rows, most, status, expert_need, memory, options.max_rows))
    return parts


def _cells(
    problem: Problem, options: SearchOptions, attention: GpuKind, expert: GpuKind, tensor_a: int, tensor_e: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Flat arrays of M and N that the pool has the GPUs for."""
    pool, experts = problem.pool, problem.model.num_experts
    most_m, most_n = pool[attention.name] // tensor_a, pool[expert.name] // tensor_e
    # Every M up to 64, then steps of 1/16; of the N that put equally many experts on the fullest node only the least.
    all_m = np.unique([m for m in range(1, most_m + 1) if m <= 64 or m % (1 << (m.bit_length() - 5)) == 0])
    all_n = {-(-experts // local) for local in range(1, experts + 1)}
    all_n |= {experts * copies for copies in range(2, options.max_expert_copies + 1)}
    m = np.asarray(options.num_replicas or all_m, np.int64)
    n = np.asarray(options.num_nodes or sorted(all_n), np.int64)
    m, n = (x.ravel() for x in np.meshgrid(m[m <= most_m], n[n <= most_n], indexing="ij"))
    if attention.name == expert.name:
        fits = m * tensor_a + n * tensor_e <= pool[attention.name]
        m, n = m[fits], n[fits]
    return (m, n) if m.size else None


def _record(
    cell: Deployment,
    rows: np.ndarray,
    most: np.ndarray,
    status: np.ndarray,
    expert_need: np.ndarray,
    memory: Memory,
    max_rows: int,
) -> dict[str, Any]:
    """Columns of one Deployment's cells."""
    priced = np.maximum(rows, 1)
    attention, expert, exchange = cell.stages(priced)
    step = cell.step_of(priced, attention, expert, exchange)
    period = step / cell.problem.model.num_moe_layers / cell.num_micro_batches
    at_memory = np.where(most >= max_rows, "rows cap", "KV memory")
    need = np.select(
        [status == "expert memory", status == "attention memory", status == "slo"],
        [expert_need / 1e9, np.full_like(expert_need, memory.attention_weight_bytes / cell.attention_tensor / 1e9),
         step * 1e3], np.nan,
    )  # fmt: skip
    return {
        "mode": "disaggregated",
        "attention_gpu": cell.attention_gpu.name,
        "expert_gpu": cell.expert_gpu.name,
        "attention": cell.num_replicas,
        "expert": cell.num_nodes,
        "attention_tensor": cell.attention_tensor,
        "expert_tensor": cell.expert_tensor,
        "num_micro_batches": cell.num_micro_batches,
        "schedule": cell.schedule,
        "rows": rows,
        "batch": rows * cell.num_replicas * cell.num_micro_batches,
        "attention_gpus": cell.num_replicas * cell.attention_tensor,
        "expert_gpus": cell.num_nodes * cell.expert_tensor,
        "step_s": step,
        "attention_s": attention,
        "expert_s": expert,
        "exchange_s": exchange,
        "attention_busy": attention / period,
        "expert_busy": expert / period,
        "limit": np.where(rows >= most, at_memory, "SLO"),
        "status": status,
        "need": need,
    }
