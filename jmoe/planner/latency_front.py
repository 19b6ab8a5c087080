"""Throughput against latency at every batch size, not only the largest: what a stricter SLO would cost. No JAX."""

from typing import Any

import numpy as np

from jmoe.planner.baselines import BaselineOptions, engines
from jmoe.planner.deployment import Deployment, Problem
from jmoe.planner.plan_file import Objective
from jmoe.planner.table import OBJECTIVES

POINTS = 24  # batch sizes of one configuration, from one row to its largest
GROUP = ["attention_gpu", "expert_gpu", "attention_tensor", "expert_tensor", "num_micro_batches", "schedule"]


def cell_of(problem: Problem, row: Any) -> Deployment:
    """The Deployment of a disaggregated row."""
    kinds = problem.catalogue
    return Deployment(
        problem, kinds[row["attention_gpu"]], kinds[row["expert_gpu"]], int(row["attention_tensor"]),
        int(row["expert_tensor"]), int(row["num_micro_batches"]), row["schedule"],
        np.array([int(row["attention"])]), np.array([int(row["expert"])]),
    )  # fmt: skip


def front_of(step_s: np.ndarray, gain: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The points that no other beats in both: steps rising, gains rising."""
    order = np.lexsort((-gain, step_s))
    step_s, gain = step_s[order], gain[order]
    best = np.maximum.accumulate(gain)
    keep = np.r_[True, best[1:] > best[:-1]]
    return step_s[keep], gain[keep]


def latency_front(problem: Problem, table: Any, objective: Objective) -> tuple[np.ndarray, np.ndarray]:
    """The front of throughput per `objective` against time between tokens over all batch sizes.

    Of every group of tensor sizes, m, schedule and kinds, the M:N with most throughput and the one with the shortest
    step are swept from one row up; a front through all cells of the table would take minutes and look the same.

    Args:
      problem, table: what was planned, and the frame of `search`.
      objective: per what.

    Returns:
      Seconds between tokens, and tokens a second per objective; both rising.
    """
    good = table[table["status"] == "ok"]
    if not len(good):
        return np.zeros(0), np.zeros(0)
    groups = good.groupby(GROUP, observed=True)
    picks = set(groups[OBJECTIVES[objective]].idxmax()) | set(groups["step_s"].idxmin())
    steps, gains = [], []
    for _, row in good.loc[sorted(picks)].iterrows():
        rows = np.unique(np.geomspace(1, int(row["rows"]), POINTS).astype(int))
        step = cell_of(problem, row).step(rows)
        cost = {"gpu": row["num_gpus"], "price": row["price"], "watt": row["watts"]}[objective]
        steps.append(step)
        gains.append(rows * int(row["attention"]) * int(row["num_micro_batches"]) / step / cost)
    return front_of(np.concatenate(steps), np.concatenate(gains))


def colocated_front(
    problem: Problem, options: BaselineOptions, objective: Objective
) -> tuple[np.ndarray, np.ndarray]:
    """The same for deployments without disaggregation, every engine swept."""
    steps, gains = [np.zeros(0)], [np.zeros(0)]
    for name in problem.pool:
        gpu = problem.catalogue[name]
        for engine in engines(problem, gpu, options):
            if (most := engine.max_rows()) < 1:
                continue
            rows = np.unique(np.geomspace(1, most, POINTS).astype(int))
            step = engine.step(rows)
            kept = step <= problem.workload.slo_s
            batch = rows * engine.replicas * engine.micro_batches * engine.stages
            cost = engine.num_gpus * {"gpu": 1.0, "price": gpu.price, "watt": gpu.watts}[objective]
            steps.append(step[kept])
            gains.append((batch / step / cost)[kept])
    all_steps = np.concatenate(steps)
    return front_of(all_steps, np.concatenate(gains)) if all_steps.size else (all_steps, all_steps)
