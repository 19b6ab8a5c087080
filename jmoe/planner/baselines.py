"""Deployments without disaggregation on the same GPUs, priced with the same constants: is it worth it at all?"""

import dataclasses
import functools
from typing import Any, Literal

import numpy as np

from jmoe.planner.collectives import collective_s
from jmoe.planner.deployment import Problem, largest_rows
from jmoe.planner.expert_placement import PlacedExperts
from jmoe.planner.formulas import head_time
from jmoe.planner.hardware import GpuKind
from jmoe.planner.performance import Memory, Roofline, distinct_nodes, drawn_excess

Mode = Literal["tensor", "pipeline", "wide"]


@dataclasses.dataclass(frozen=True, slots=True)
class BaselineOptions:
    """What a colocated system may do.

    Attributes:
      modes: "tensor": attention and experts over all GPUs of one or two hosts, nothing overlapped; "pipeline":
        tensor parallel inside a host, layers cut over two; "wide": data-parallel attention, experts over all GPUs.
      expert_parallel: in "tensor" and "pipeline", whether whole experts may stand on different GPUs (TensorRT-LLM
        has it); tensor-sliced experts are always tried.
      max_batch: most requests of an engine; None for what memory and the SLO allow.
      max_wide: most GPUs of one "wide" cell.
      hosts: how many hosts a "tensor" or "pipeline" engine may take.
    """

    modes: tuple[Mode, ...] = ("tensor", "pipeline", "wide")
    expert_parallel: bool = True
    max_batch: int | None = None
    max_wide: int = 320
    hosts: tuple[int, ...] = (1, 2)


@dataclasses.dataclass(frozen=True)
class Engine:
    """One colocated cell: `ranks` GPUs of a stage, `stages` of them, or data-parallel replicas of `ranks` each."""

    problem: Problem
    gpu: GpuKind
    mode: Mode
    ranks: int
    stages: int = 1
    replicas: int = 1
    expert_nodes: int = 1
    micro_batches: int = 1

    @property
    def num_gpus(self) -> int:
        return self.ranks * self.stages * self.replicas

    @property
    def _times(self) -> Roofline:
        return Roofline(self.problem.model, self.gpu, self.gpu, self.problem.precision)

    @property
    def expert_ranks(self) -> int:
        """GPUs that share one expert."""
        return max(1, self.num_gpus // self.stages // self.expert_nodes)

    @functools.cached_property
    def _placed(self) -> PlacedExperts | None:
        """By the histogram, if there is one, with room for one more expert a node."""
        even = -(-self.problem.model.num_experts // self.expert_nodes)
        return self.problem.placed(self.expert_nodes, even + 1) if self.expert_nodes > 1 else None

    @property
    def local_experts(self) -> int:
        """Experts on the fullest node."""
        if self._placed is not None:
            return self._placed.placement.max_local_experts
        return -(-self.problem.model.num_experts // self.expert_nodes)

    @property
    def _share(self) -> float:
        """Share of all (token, expert) pairs on the busiest node."""
        model, skew = self.problem.model, self.problem.workload.expert_imbalance
        if self._placed is not None:
            return min(1.0, float(self._placed.loads.max() / self._placed.loads.sum()) * skew)
        copies = max(1, self.expert_nodes // model.num_experts)
        return min(1.0, self.local_experts / (model.num_experts * copies) * skew)

    def weight_bytes(self) -> float:
        """Of the fullest GPU."""
        memory = Memory(self.problem.model, self.problem.precision)
        experts = self.local_experts * memory.expert_bytes / self.expert_ranks
        return (memory.attention_weight_bytes / self.ranks + experts) / self.stages

    def max_rows(self) -> int:
        """Requests of one replica that its KV pages can hold, of one micro-batch."""
        memory = Memory(self.problem.model, self.problem.precision)
        free = (self.gpu.usable_bytes - self.weight_bytes()) * self.ranks * self.stages
        context = self.problem.context[0] * self.problem.workload.attention_imbalance
        return max(0, int(free / memory.kv_token_bytes(self.ranks) / context / (self.micro_batches * self.stages)))

    def lanes(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Attention, experts and one-way exchange of one layer; rows requests of one replica's micro-batch."""
        problem, model, times = self.problem, self.problem.model, self._times
        # Ranks of one engine share every request; for the replicas of "wide" the mean context flatters the baseline.
        context = problem.context[0] * problem.workload.attention_imbalance
        attention = times.attention_s(rows, context, self.ranks)
        share = np.minimum(self._share * self._drawn_excess(rows), 1.0)
        pairs = rows * self.replicas * model.num_experts_per_tok * share
        expert = times.expert_products_s(pairs, self.local_experts, self.expert_ranks) + self.gpu.stage_overhead_s
        if self.mode != "wide":
            hidden = rows * model.hidden_size * 2
            return attention, expert + collective_s(self.gpu, hidden, self.ranks), np.zeros_like(rows, float)
        return attention, expert, self._all_to_all(rows)

    def _drawn_excess(self, rows: np.ndarray) -> np.ndarray | float:
        """Chance excess of the busiest node, where the workload asks for it; none where every GPU has every expert."""
        model = self.problem.model
        if not self.problem.workload.drawn_routing:
            return 1.0
        return drawn_excess(
            model.num_experts, model.num_experts_per_tok, self.local_experts, self.expert_nodes, rows * self.replicas
        )

    def _all_to_all(self, rows: np.ndarray) -> np.ndarray:
        """One way: every GPU sends its rows once to each other node that needs them."""
        model, gpu, precision = self.problem.model, self.gpu, self.problem.precision
        copies = distinct_nodes(model.num_experts, model.num_experts_per_tok, self.expert_nodes)
        row_bytes = model.hidden_size * max(precision.dispatch_bytes, precision.combine_bytes)
        sent = rows * copies * (1 - 1 / self.expert_nodes) * row_bytes / self.ranks
        sent = sent * np.maximum(1.0, self._share * self.expert_nodes * self._drawn_excess(rows))
        if self.num_gpus <= gpu.scale_up_domain:
            return sent / gpu.scale_up_bytes_s + gpu.kernels.scale_up_latency_us * 1e-6
        inside = gpu.scale_up_domain / self.num_gpus
        network = sent * (1 - inside) / gpu.nic_bytes_s + gpu.kernels.nic_latency_us * 1e-6
        return np.maximum(network, sent * inside / gpu.scale_up_bytes_s)

    def step(self, rows: np.ndarray) -> np.ndarray:
        """Time between two tokens of a request."""
        model, times = self.problem.model, self._times
        attention, expert, exchange = self.lanes(rows)
        compute = attention + expert
        layer = compute + 2 * exchange
        if self.micro_batches == 2:  # while one micro-batch computes the other one's rows travel
            layer = np.maximum(np.maximum(2 * compute, 4 * exchange), layer)
        context = self.problem.context[0] * self.problem.workload.attention_imbalance
        dense = model.num_dense_layers * times.dense_s(rows, context, self.ranks) if model.num_dense_layers else 0.0
        head = head_time(self.micro_batches, times.head_s(rows, self.ranks), compute)
        # A pipeline of s stages holds s batches of rows requests; each passes all stages for one token.
        return model.num_moe_layers * layer + self.micro_batches * dense + head + self.gpu.step_host_s


def baselines(problem: Problem, options: BaselineOptions = BaselineOptions()) -> Any:
    """Every colocated deployment of the pool, each at the largest batch its SLO allows.

    Returns:
      A DataFrame with the columns of `search`; `attention` and `expert` are the data-parallel replicas and the
      expert-parallel nodes, which stand on the same GPUs, all counted in attention_gpus.
    """
    from jmoe.planner.table import to_frame

    parts = []
    for name in problem.pool:
        for engine in engines(problem, problem.catalogue[name], options):
            parts.append(_record(engine, options))
    return to_frame(parts, problem)


def engines(problem: Problem, gpu: GpuKind, options: BaselineOptions) -> list[Engine]:
    """Every colocated cell that the options and the pool allow on one GPU kind."""
    return _host_engines(problem, gpu, options) + _wide_engines(problem, gpu, options)


def _host_engines(problem: Problem, gpu: GpuKind, options: BaselineOptions) -> list[Engine]:
    """One engine over one or two whole hosts, tensor parallel or as a pipeline."""
    model, available = problem.model, problem.pool[gpu.name]
    found = []
    host = gpu.gpus_per_host
    for hosts in options.hosts:
        for ranks, stages in {("tensor", hosts): (host * hosts, 1), ("pipeline", hosts): (host, hosts)}.values():
            mode = "tensor" if stages == 1 else "pipeline"
            if mode not in options.modes or ranks * stages > available or (mode == "pipeline" and hosts == 1):
                continue
            if not model.splits_attention(ranks):
                continue
            whole = {1, min(ranks, model.num_experts)} if options.expert_parallel else {1}
            for nodes in sorted(whole):
                if model.splits_experts(max(1, ranks // nodes)):
                    found.append(Engine(problem, gpu, mode, ranks, stages, 1, nodes))
    return found


def _wide_engines(problem: Problem, gpu: GpuKind, options: BaselineOptions) -> list[Engine]:
    """"wide: powers of two and whole hosts, with and without two overlapped batches."""
    model, host = problem.model, gpu.gpus_per_host
    most = min(problem.pool[gpu.name], options.max_wide) if "wide" in options.modes else 0
    found = []
    for ranks in (1, 2, 4, 8):
        if ranks > gpu.scale_up_domain or not model.splits_attention(ranks):
            continue
        sizes = {n for n in (ranks * 2**i for i in range(12)) if n <= most}
        sizes |= {n for n in range(host, most + 1, host) if n % ranks == 0}
        for size in sorted(sizes):
            nodes = min(size, model.num_experts * max(1, size // model.num_experts))
            for micro_batches in (1, 2):
                found.append(Engine(problem, gpu, "wide", ranks, 1, size // ranks, nodes, micro_batches))
    return found


def _record(engine: Engine, options: BaselineOptions) -> dict[str, Any]:
    most = engine.max_rows()
    in_flight = engine.replicas * engine.micro_batches * engine.stages
    capped = options.max_batch is not None and most * in_flight > options.max_batch
    if capped:
        most = max(1, int(options.max_batch or 0) // in_flight)
    bound = np.array([most])
    rows = largest_rows(engine.step, bound, engine.problem.workload.slo_s)
    fits = engine.weight_bytes() <= engine.gpu.usable_bytes and most >= 1
    status = "ok" if rows[0] >= 1 else "slo" if fits else "attention memory"
    priced = np.maximum(rows, 1)
    attention, expert, exchange = engine.lanes(priced)
    step = engine.step(priced)
    period = step / engine.problem.model.num_moe_layers / engine.micro_batches
    need = {"ok": np.nan, "slo": float(step[0]) * 1e3, "attention memory": engine.weight_bytes() / 1e9}[status]
    return {
        "mode": engine.mode,
        "attention_gpu": engine.gpu.name,
        "expert_gpu": engine.gpu.name,
        "attention": engine.replicas,
        "expert": engine.expert_nodes,
        "attention_tensor": engine.ranks,
        "expert_tensor": engine.expert_ranks,
        "num_micro_batches": engine.micro_batches * engine.stages,
        "schedule": "none",
        "rows": rows,
        "batch": rows * in_flight,
        "attention_gpus": engine.num_gpus,
        "expert_gpus": 0,
        "step_s": step,
        "attention_s": attention,
        "expert_s": expert,
        "exchange_s": exchange,
        "attention_busy": attention / period,
        "expert_busy": expert / period,
        "limit": np.where(rows >= most, "batch cap" if capped else "KV memory", "SLO"),
        "status": status,
        "need": need,
    }
