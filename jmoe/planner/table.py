"""The table of everything that was tried: build it, rank it, keep it, and ask it why. pandas is imported when used."""

import pathlib
from typing import Any

import numpy as np

from jmoe.planner.deployment import Problem
from jmoe.planner.plan_file import Objective

OBJECTIVES: dict[Objective, str] = {
    "gpu": "tokens_s_per_gpu",
    "price": "tokens_s_per_price",
    "watt": "tokens_s_per_watt",
}
SHAPE = ("mode", "attention_gpu", "expert_gpu", "attention", "expert", "attention_tensor", "expert_tensor")


def _pandas() -> Any:
    try:
        import pandas
    except ImportError as error:
        raise ImportError("the planner's tables need pandas and pyarrow: pip install 'jmoe[planner]'") from error
    return pandas


def to_frame(parts: list[dict[str, Any]], problem: Problem) -> Any:
    """One DataFrame from columns, with prices, watts and the throughput columns worked out."""
    pandas = _pandas()
    if not parts:
        return pandas.DataFrame({"status": [], "mode": []})
    sizes = [np.size(part["rows"]) for part in parts]
    columns = {
        name: np.concatenate([np.broadcast_to(part[name], size) for part, size in zip(parts, sizes, strict=True)])
        for name in parts[0]
    }
    for name in ("price", "watts"):
        values = {kind: getattr(problem.catalogue[kind], name) for kind in problem.pool}
        each = {role: np.array([values[kind] for kind in columns[f"{role}_gpu"]]) for role in ("attention", "expert")}
        columns[name] = columns["attention_gpus"] * each["attention"] + columns["expert_gpus"] * each["expert"]
    columns["num_gpus"] = columns["attention_gpus"] + columns["expert_gpus"]
    ok = columns["status"] == "ok"
    columns["tokens_s"] = np.where(ok, columns["batch"] / columns["step_s"], 0.0)
    for name, cost in (("gpu", "num_gpus"), ("price", "price"), ("watt", "watts")):
        columns[f"tokens_s_per_{name}"] = columns["tokens_s"] / columns[cost]
    frame = pandas.DataFrame(columns)
    for name in ("mode", "attention_gpu", "expert_gpu", "schedule", "limit", "status"):
        frame[name] = frame[name].astype("category")
    return frame


def rank(frame: Any, objective: Objective, per_shape: bool = True) -> Any:
    """Configurations that meet the SLO, best first; per_shape keeps the best m and schedule of each (M, N, sizes)."""
    good = frame[frame["status"] == "ok"].sort_values(
        [OBJECTIVES[objective], "num_gpus", "step_s"], ascending=[False, True, True]
    )
    if not per_shape:
        return good
    good = good.drop_duplicates(list(SHAPE))
    # Colocated cells of more hosts often do exactly the same a GPU; the smallest stands for them.
    return good[~good.assign(value=good[OBJECTIVES[objective]].round(6)).duplicated(["mode", "value"])]


def pareto(frame: Any, cost: str = "step_s", objective: Objective = "gpu") -> Any:
    """The front: no other configuration has both more throughput and less `cost`.

    Args:
      cost: the column to keep small, "step_s" or "price".
      objective: which throughput to keep large; with cost="price" the total one is meant and this is ignored.
    """
    gain = "tokens_s" if cost == "price" else OBJECTIVES[objective]
    good = frame[frame["status"] == "ok"].sort_values([cost, gain], ascending=[True, False])
    best = good[gain].cummax()
    return good[(good[gain] >= best) & ~best.duplicated()]


def find(frame: Any, **columns: Any) -> Any:
    """Rows whose columns have these values: find(frame, attention=4, expert=8, num_micro_batches=3)."""
    for name, value in columns.items():
        if name not in frame.columns:
            raise ValueError(f"find: expected columns of the table ({', '.join(frame.columns)}), got {name!r}")
        frame = frame[frame[name] == value]
    return frame


def explain(row: Any, problem: Problem, best: Any | None = None, objective: Objective = "gpu") -> str:
    """One line on a row: why it was rejected, or what holds it back (and how far behind the best it is)."""
    slo_ms = problem.workload.slo_s * 1e3
    status = row["status"]
    if status == "expert memory":
        have = problem.catalogue[row["expert_gpu"]].usable_bytes / 1e9
        return f"rejected: its experts need {row['need']:.1f} GB a GPU, {row['expert_gpu']} has {have:.1f} usable"
    if status == "attention memory":
        have = problem.catalogue[row["attention_gpu"]].usable_bytes / 1e9
        return (
            f"rejected: {row['need']:.1f} GB of attention weights and the KV pages of {row['num_micro_batches']} rows "
            f"do not fit the {have:.1f} usable GB of {row['attention_gpu']}"
        )
    if status == "not measured":
        return "rejected: the profile has no times for these tensor sizes, local experts or rows"
    if status == "slo":
        return f"rejected: {row['need']:.0f} ms between tokens at one row a micro-batch, the SLO is {slo_ms:.0f} ms"
    text = f"batch held by {row['limit']}; {_slowest(row)}"
    if best is not None:
        column = OBJECTIVES[objective]
        behind = 1 - row[column] / best[column]
        text = "best; " + text if behind <= 0 else f"{behind:.1%} behind; {text}"
    return text


def _slowest(row: Any) -> str:
    times = {"attention": row["attention_s"], "experts": row["expert_s"], "exchange": row["exchange_s"]}
    name = max(times, key=lambda key: times[key])
    if row["mode"] != "disaggregated":
        return f"{name} take most" if name == "experts" else f"{name} takes most"
    return f"slowest lane: {name} ({times[name] * 1e6:.0f} us)"


def write_parquet(frame: Any, path: str | pathlib.Path) -> None:
    """Keeps the table."""
    frame.to_parquet(path, index=False)


def read_parquet(path: str | pathlib.Path) -> Any:
    """A table that was kept."""
    return _pandas().read_parquet(path)
