"""What a person sees of a plan: throughput against batch, the Pareto front, the ping-pong timeline. No JAX."""

import pathlib
from typing import Any

import numpy as np

from jmoe.planner.baselines import BaselineOptions
from jmoe.planner.choice import cell_text
from jmoe.planner.deployment import Problem
from jmoe.planner.lanes import LANES
from jmoe.planner.latency_front import cell_of, colocated_front, latency_front
from jmoe.planner.plan_file import Objective
from jmoe.planner.simulation_report import EventTable
from jmoe.planner.simulator import ConstantTimes, simulate
from jmoe.planner.table import OBJECTIVES, pareto
from jmoe.planner.timeline_trace import write_trace
from jmoe.schedule import build_schedule

# Okabe-Ito: distinguishable with any colour vision.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
LANE_NAMES = {
    "attention": "attention",
    "dispatch": "dispatch (A to E)",
    "expert": "experts",
    "combine": "combine (E to A)",
}
LAYERS_DRAWN = 4


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("--plot needs matplotlib: pip install 'jmoe[planner]'") from error
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def draw_plan(
    problem: Problem, table: Any, colocated: Any, best: Any, objective: Objective, folder: pathlib.Path
) -> list[pathlib.Path]:
    """Draws everything about a plan into a folder.

    Args:
      problem, table, colocated: what was planned, and the frames of `search` and `baselines`.
      best: the chosen row of `table`.
      objective: which throughput to show.
      folder: made if need be.

    Returns:
      The files: throughput.png, pareto.png, timeline.png and timeline.json (open it at ui.perfetto.dev).
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in ("throughput.png", "pareto.png", "timeline.png", "timeline.json")]
    draw_throughput(problem, best, objective, paths[0])
    draw_pareto(problem, table, colocated, best, objective, paths[1])
    events = timeline_events(problem, best)
    draw_timeline(events, cell_text(best), int(best["num_micro_batches"]), paths[2])
    write_trace(events, cell_text(best), paths[3])
    return paths


def draw_throughput(problem: Problem, row: Any, objective: Objective, path: pathlib.Path) -> None:
    """Throughput and time between tokens of one cell against its batch, with the SLO and the chosen batch."""
    pyplot = _pyplot()
    cell = cell_of(problem, row)
    rows = np.unique(np.geomspace(1, max(2, 2 * int(row["rows"])), 60).astype(int))
    step = np.array([float(cell.step(np.array([r]))[0]) for r in rows])
    batch = rows * int(row["attention"]) * int(row["num_micro_batches"])
    cost = {"gpu": row["num_gpus"], "price": row["price"], "watt": row["watts"]}[objective]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(batch, batch / step / cost, color=COLOURS[0], label=f"tokens/s per {objective}")
    axes.axvline(row["batch"], color="0.4", linestyle="--", linewidth=1)
    axes.annotate(
        f"batch {row['batch']}, held by {row['limit']}", (row["batch"], 0.03), xycoords=("data", "axes fraction"),
        xytext=(-6, 0), textcoords="offset points", rotation=90, va="bottom", ha="right", color="0.3",
    )  # fmt: skip
    axes.set(xlabel="requests in the cell", ylabel=f"tokens/s per {objective}", title=cell_text(row), ylim=(0, None))
    time_axes = axes.twinx()
    time_axes.plot(batch, step * 1e3, color=COLOURS[1], label="time between tokens")
    time_axes.axhline(problem.workload.slo_s * 1e3, color=COLOURS[5], linestyle=":", label="SLO")
    time_axes.set(ylabel="ms between tokens", ylim=(0, None))
    lines = axes.get_lines()[:1] + time_axes.get_lines()
    axes.legend(lines, [line.get_label() for line in lines], loc="center right")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def draw_pareto(
    problem: Problem, table: Any, colocated: Any, best: Any, objective: Objective, path: pathlib.Path
) -> None:
    """Every configuration, and the fronts of throughput against time between tokens and against price."""
    pyplot = _pyplot()
    column = OBJECTIVES[objective]
    fronts = {
        "disaggregated": latency_front(problem, table, objective),
        "colocated": colocated_front(problem, BaselineOptions(), objective),
    }
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for frame, name, colour in ((table, "disaggregated", COLOURS[0]), (colocated, "colocated", COLOURS[1])):
        good = frame[frame["status"] == "ok"]
        if not len(good):
            continue
        some = good.sample(min(len(good), 4000), random_state=0)
        left.scatter(some["step_s"] * 1e3, some[column], s=4, color=colour, alpha=0.15, linewidths=0, rasterized=True)
        right.scatter(some["price"], some["tokens_s"], s=4, color=colour, alpha=0.15, linewidths=0, rasterized=True)
        step, gain = fronts[name]
        left.step(step * 1e3, gain, where="post", color=colour, label=name)
        front = pareto(frame, "price")
        right.step(front["price"], front["tokens_s"], where="post", color=colour, label=name)
    left.plot(best["step_s"] * 1e3, best[column], "*", color=COLOURS[5], markersize=13, label="chosen")
    right.plot(best["price"], best["tokens_s"], "*", color=COLOURS[5], markersize=13, label="chosen")
    left.axvline(problem.workload.slo_s * 1e3, color="0.5", linestyle=":", label="SLO")
    left.set(xlabel="ms between tokens", ylabel=f"tokens/s per {objective}", title="throughput against latency")
    left.set_xscale("log")
    ticks = [t for t in (5, 10, 20, 50, 100, 200, 500, 1000) if left.get_xlim()[0] <= t <= left.get_xlim()[1]]
    left.set_xticks(ticks, [str(t) for t in ticks])
    left.minorticks_off()
    right.set(xlabel="price of the cell (L20 = 1)", ylabel="tokens/s of the cell", title="throughput against price")
    for axes in (left, right):
        axes.set_ylim(bottom=0)
        axes.legend(loc="upper left")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def timeline_events(problem: Problem, row: Any) -> EventTable:
    """The chosen plan's first layers on the four lanes, from the simulator walking the schedule that is built."""
    layers = min(LAYERS_DRAWN, problem.model.num_moe_layers)
    schedule = build_schedule(layers, int(row["num_micro_batches"]), row["schedule"])
    cell = cell_of(problem, row)
    times = problem.stage_times(cell.attention_gpu, cell.expert_gpu)
    head = float(times.head_s(np.array([int(row["rows"])]), int(row["attention_tensor"]))[0])
    constant = ConstantTimes(float(row["attention_s"]), float(row["expert_s"]), float(row["exchange_s"]), head)
    events = simulate(schedule, constant, record_iterations=1).events
    assert events is not None
    return events


def draw_timeline(events: EventTable, title: str, num_micro_batches: int, path: pathlib.Path) -> None:
    """Four lanes, time to the right, a colour a micro-batch, the layer written on each bar."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(13, 3.6), layout="constrained")
    scale, last_layer = 1e3, int(events.layer.max())
    for lane, layer, micro_batch, start, end in zip(
        events.lane, events.layer, events.micro_batch, events.start_s, events.end_s, strict=True
    ):
        axes.barh(
            -lane, (end - start) * scale, left=start * scale, height=0.8, color=COLOURS[micro_batch % len(COLOURS)],
            edgecolor="white", linewidth=0.8,
        )  # fmt: skip
        if (end - start) > 0.02 * events.end_s.max():
            text = "head" if layer == last_layer else f"L{layer}"
            axes.text((start + end) / 2 * scale, -lane, text, ha="center", va="center", color="white", fontsize=8)
    axes.set_yticks([-i for i in range(len(LANES))], [LANE_NAMES[lane] for lane in LANES])
    axes.set(xlabel="ms", title=f"{title}: the first {last_layer} layers and the head", xlim=(0, None))
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=COLOURS[i % len(COLOURS)]) for i in range(num_micro_batches)]
    axes.legend(handles, [f"micro-batch {i}" for i in range(num_micro_batches)], loc="upper left",
                bbox_to_anchor=(1.0, 1.0), frameon=False)  # fmt: skip
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
