"""The search: every attention:expert deployment of a pool of GPUs, each with the largest batch that its SLO allows."""

import dataclasses
import itertools
from typing import Any

import numpy as np

from jmoe.planner.deployment import Deployment, Problem, largest_rows
from jmoe.planner.formulas import ScheduleKind
from jmoe.planner.hardware import GpuKind
from jmoe.planner.performance import Memory, Transport


@dataclasses.dataclass(frozen=True, slots=True)
class SearchOptions:
    """What to try.

    Attributes:
      tensor_sizes: candidates for the ranks of an attention replica and of an expert node.
      schedules: (num_micro_batches, schedule kind) pairs; None for those that are built: "separate" for cells in one
        scale-up domain (transport "push"), "one" and "both" for the rest. At m of 1 and 2 the chains "one" and "both"
        are the same; from m = 4 on "both" is never slower, and it is what MeshConfig's directions="auto" takes.
      max_rows: most decode slots of one micro-batch of one replica.
      transport: how rows travel, "exact" or the padded "ppermute".
      num_replicas, num_nodes: try only these M and N; None for all.
      max_expert_copies: replicas of every expert that N > E may hold.
      network_only: keep the exchange on the NICs even where both roles fit one scale-up domain.
    """

    tensor_sizes: tuple[int, ...] = (1, 2, 4, 8)
    schedules: tuple[tuple[int, ScheduleKind], ...] | None = None
    max_rows: int = 4096
    transport: Transport = "exact"
    num_replicas: tuple[int, ...] | None = None
    num_nodes: tuple[int, ...] | None = None
    max_expert_copies: int = 4
    network_only: bool = False


CHAINS: tuple[tuple[int, ScheduleKind], ...] = (
    (1, "one"), (2, "one"), (3, "one"), (3, "both"), (4, "both"), (5, "both"), (6, "both"),
)  # fmt: skip
PUSHES: tuple[tuple[int, ScheduleKind], ...] = tuple((m, "separate") for m in (1, 2, 3, 4))


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
    parts: list[dict[str, Any]] = []
    for (replicas, nodes), schedules in _built(options, attention, expert, tensor_a, tensor_e, *grid):
        if replicas.size:
            parts += _price(problem, options, attention, expert, tensor_a, tensor_e, replicas, nodes, schedules)
    return parts


def _built(options: SearchOptions, attention: GpuKind, expert: GpuKind, tensor_a: int, tensor_e: int, m, n):
    """Cells (M, N) with the schedules that are built for them."""
    if options.schedules is not None:
        return [((m, n), options.schedules)]
    in_domain = (attention.name == expert.name) & (m * tensor_a + n * tensor_e <= attention.scale_up_domain)
    pushed = in_domain & (options.transport == "exact" and not options.network_only)
    return [((m[pushed], n[pushed]), PUSHES), ((m[~pushed], n[~pushed]), CHAINS)]


def _price(
    problem: Problem,
    options: SearchOptions,
    attention: GpuKind,
    expert: GpuKind,
    tensor_a: int,
    tensor_e: int,
    replicas: np.ndarray,
    nodes: np.ndarray,
    schedules: tuple[tuple[int, ScheduleKind], ...],
) -> list[dict[str, Any]]:
    """The largest batch of every cell and schedule, as columns."""
    memory = Memory(problem.model, problem.precision)
    any_schedule = Deployment(problem, attention, expert, tensor_a, tensor_e, 1, "one", replicas, nodes)
    expert_need, expert_have = any_schedule.local_experts * memory.expert_bytes / tensor_e, expert.usable_bytes
    tokens = float(memory.max_kv_tokens(attention, tensor_a))
    context = problem.context[0] * problem.workload.attention_imbalance
    parts = []
    for m, schedule in schedules:
        cell = Deployment(
            problem, attention, expert, tensor_a, tensor_e, m, schedule, replicas, nodes, options.transport,
            options.network_only,
        )  # fmt: skip
        most = np.full(replicas.shape, min(options.max_rows, max(0, int(tokens // (m * context)))))
        status = np.where(expert_need > expert_have, "expert memory", np.where(most < 1, "attention memory", "ok"))
        most = np.where(status == "ok", most, 0)
        rows = largest_rows(cell.step, most, problem.workload.slo_s)
        least = cell.step(np.ones_like(most))
        status = np.where((status == "ok") & (rows < 1), np.where(np.isfinite(least), "slo", "not measured"), status)
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
    # An unmeasured stage is infinite; it is busy for none of the time.
    pace = cell.problem.model.num_moe_layers * cell.num_micro_batches / np.where(np.isfinite(step), step, np.inf)
    busy = {name: np.where(np.isfinite(t), t, 0.0) * pace for name, t in (("a", attention), ("e", expert))}
    at_memory = np.where(most >= max_rows, "rows cap", "KV memory")
    attention_need = np.full_like(expert_need, memory.attention_weight_bytes / cell.attention_tensor)
    reasons = {"expert memory": expert_need / 1e9, "attention memory": attention_need / 1e9, "slo": step * 1e3}
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
        "attention_busy": busy["a"],
        "expert_busy": busy["e"],
        "limit": np.where(rows >= most, at_memory, "SLO"),
        "status": status,
        "need": np.select([status == name for name in reasons], list(reasons.values()), np.nan),
    }
