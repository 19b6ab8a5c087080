"""From the ranked table to a decision: the plan, whether to disaggregate at all, or what would be needed. No JAX."""

import dataclasses
import math
from typing import Any

from jmoe.planner.deployment import Problem, expert_slots
from jmoe.planner.hardware import GpuKind
from jmoe.planner.performance import Memory
from jmoe.planner.plan_file import Objective, Plan
from jmoe.planner.search import SearchOptions
from jmoe.planner.table import OBJECTIVES, explain, rank
from jmoe.sharding.mesh_config import MeshConfig
from jmoe.sharding.placement import ExpertPlacement

PAGE_LEN = 16


class NoPlanError(ValueError):
    """No configuration meets the request; the message says what would."""


def choose(problem: Problem, table: Any, colocated: Any, objective: Objective, model: str) -> Plan:
    """The best disaggregated cell as a plan, with the advice that the colocated rows lead to.

    Args:
      problem: what was planned.
      table: the frame of `search`.
      colocated: the frame of `baselines`, possibly empty.
      objective: what to rank by.
      model: name or path to write into the plan.

    Raises:
      NoPlanError: nothing fits, or nothing meets the SLO; with what would be needed.
    """
    ranked = rank(table, objective) if len(table) else table
    if not len(ranked):
        raise NoPlanError(what_is_needed(problem, table))
    best = ranked.iloc[0]
    rivals = rank(colocated, objective) if len(colocated) else colocated
    column = OBJECTIVES[objective]
    rival = rivals.iloc[0] if len(rivals) else None
    gain = best[column] / rival[column] if rival is not None else math.inf
    advice = "disaggregate" if gain >= 1 else "do not disaggregate"
    return Plan(
        model=model,
        mesh=mesh_of(best, problem),
        rows=int(best["rows"]),
        num_pages=_num_pages(best, problem),
        page_len=PAGE_LEN,
        gpus={"attention": str(best["attention_gpu"]), "expert": str(best["expert_gpu"])},
        num_cells=num_cells(best, problem),
        precision=dataclasses.asdict(problem.precision),
        slo_ms=problem.workload.slo_s * 1e3,
        objective=objective,
        predicted=_figures(best),
        advice=advice,
        colocated={} if rival is None else _figures(rival) | {"mode": str(rival["mode"]), "gain": float(gain)},
        why=explain(best, problem),
    )


def mesh_of(row: Any, problem: Problem) -> MeshConfig:
    """The MeshConfig of a table row; replicated experts and placements by a histogram are written out."""
    nodes, num_experts = int(row["expert"]), problem.model.num_experts
    slots = expert_slots(problem, problem.catalogue[row["expert_gpu"]], int(row["expert_tensor"]))
    placed = problem.placed(nodes, slots)
    placement = placed.placement if placed is not None else None
    if placement is None and nodes > num_experts:
        placement = ExpertPlacement(tuple((n % num_experts,) for n in range(nodes)))
    return MeshConfig(
        attention=int(row["attention"]),
        expert=nodes,
        num_micro_batches=int(row["num_micro_batches"]),
        attention_tensor=int(row["attention_tensor"]),
        expert_tensor=int(row["expert_tensor"]),
        placement=placement,
        directions="auto" if row["schedule"] == "separate" else row["schedule"],  # "auto" is that where rows are pushed
    )


def num_cells(row: Any, problem: Problem) -> int:
    """How many cells of this row the pool holds."""
    need: dict[str, int] = {}
    for role in ("attention", "expert"):
        need[row[f"{role}_gpu"]] = need.get(row[f"{role}_gpu"], 0) + int(row[f"{role}_gpus"])
    return min(problem.pool[kind] // count for kind, count in need.items() if count)


def _num_pages(row: Any, problem: Problem) -> int:
    """Pages for the KV tokens of a replica's slots: what fits, page 0 included."""
    memory = Memory(problem.model, problem.precision)
    gpu = problem.catalogue[row["attention_gpu"]]
    return int(memory.max_kv_tokens(gpu, int(row["attention_tensor"])) // PAGE_LEN)


def _figures(row: Any) -> dict[str, float]:
    names = ("batch", "num_gpus", "price", "watts", "tokens_s", *OBJECTIVES.values())
    figures = {name: float(row[name]) for name in names}
    figures["step_ms"] = float(row["step_s"]) * 1e3
    for stage in ("attention", "expert", "exchange"):
        figures[f"{stage}_us"] = float(row[f"{stage}_s"]) * 1e6
    return figures


def what_is_needed(problem: Problem, table: Any) -> str:
    """Why nothing came out, and what would: GPUs for a model that does not fit, the reachable time for an SLO."""
    slow = table[table["status"] == "slo"] if len(table) else table
    if len(slow):
        row = slow.sort_values("need").iloc[0]
        return (
            f"--slo-ms: expected at least {math.ceil(row['need'] * 10) / 10:g} ms, the least that any of the "
            f"{len(table):,} configurations reaches ({cell_text(row)}, one row a micro-batch), "
            f"got {problem.workload.slo_s * 1e3:g} ms"
        )
    if len(table) and (table["status"] == "not measured").any():
        return "--profile: expected times for a tensor size and local experts that fit the GPUs, got none; measure more"
    memory = Memory(problem.model, problem.precision)
    total = (memory.attention_weight_bytes + problem.model.num_experts * memory.expert_bytes) / 1e9
    needs = []
    for name in problem.pool:
        gpu = problem.catalogue[name]
        attention, experts = least_gpus(problem, gpu)
        if attention and experts:
            needs.append(f"{name}: {attention} for attention and {experts} for experts ({gpu.memory_gb:g} GB each)")
        else:
            needs.append(f"{name}: no number, a host of them can't hold one expert or an attention replica")
    have = ", ".join(f"{count} {name}" for name, count in problem.pool.items())
    return (
        f"--gpus: expected enough memory for the {total:,.0f} GB of {problem.model.name} at "
        f"{problem.precision.weight_bytes:g} bytes a weight, with KV pages beside it; needed at least: "
        f"{'; '.join(needs)}; got {have}"
    )


def least_gpus(problem: Problem, gpu: GpuKind) -> tuple[int, int]:
    """Fewest GPUs of a kind for one attention replica with one row, and for all experts; 0 where none suffice."""
    model, memory = problem.model, Memory(problem.model, problem.precision)
    sizes = [t for t in SearchOptions().tensor_sizes if t <= gpu.scale_up_domain]
    holds = [t for t in sizes if model.splits_attention(t) and memory.max_kv_tokens(gpu, t) >= problem.context[0]]
    nodes = []
    for tensor in sizes:
        per_node = int(tensor * gpu.usable_bytes // memory.expert_bytes)
        if model.splits_experts(tensor) and per_node:
            nodes.append(tensor * -(-model.num_experts // per_node))
    return min(holds, default=0), min(nodes, default=0)


def cell_text(row: Any) -> str:
    """A cell in a few words: `7 x tp4 h20 : 32 x tp2 l40s`."""

    def role(name: str) -> str:
        tensor = int(row[f"{name}_tensor"])
        return f"{int(row[name])}{f' x tp{tensor}' if tensor > 1 else ''} {row[f'{name}_gpu']}"

    if row["mode"] == "disaggregated":
        return f"{role('attention')} : {role('expert')}"
    gpus = f"{int(row['num_gpus'])} {row['attention_gpu']}"
    experts = f"ep{int(row['expert'])}" if int(row["expert"]) > 1 else "sliced experts"
    if row["mode"] == "wide":
        replicas = f"dp{int(row['attention'])}"
        if row["attention_tensor"] > 1:
            replicas += f" tp{int(row['attention_tensor'])}"
        overlap = ", two batches overlapped" if row["num_micro_batches"] == 2 else ""
        return f"{gpus}: {replicas} {experts}{overlap}"
    stages = f" pp{int(row['num_micro_batches'])}" if row["mode"] == "pipeline" else ""
    return f"{gpus}: tp{int(row['attention_tensor'])}{stages} {experts}"
