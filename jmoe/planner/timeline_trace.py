"""Simulated or planned events as a trace that Perfetto and chrome://tracing open. No JAX."""

import json
import pathlib
from typing import Any

from jmoe.planner.lanes import LANES
from jmoe.planner.simulation_report import EventTable


def trace_events(events: EventTable, title: str) -> dict[str, Any]:
    """The Trace Event Format's object: one process, a thread a lane, a complete event a stage (microseconds)."""
    head = int(events.layer.max(initial=0))
    named: list[dict[str, Any]] = [{"name": "process_name", "ph": "M", "pid": 1, "args": {"name": title}}]
    for number, lane in enumerate(LANES):
        named.append({"name": "thread_name", "ph": "M", "pid": 1, "tid": number, "args": {"name": lane}})
        named.append({"name": "thread_sort_index", "ph": "M", "pid": 1, "tid": number, "args": {"sort_index": number}})
    columns = (events.lane, events.iteration, events.layer, events.micro_batch, events.start_s, events.end_s)
    for lane, iteration, layer, micro_batch, start, end in zip(*(c.tolist() for c in columns), strict=True):
        stage = "head" if layer == head and LANES[lane] == "attention" else f"layer {layer}"
        named.append(
            {
                "name": f"{stage}, micro-batch {micro_batch}",
                "cat": LANES[lane],
                "ph": "X",
                "pid": 1,
                "tid": lane,
                "ts": start * 1e6,
                "dur": (end - start) * 1e6,
                "args": {"iteration": iteration, "layer": layer, "micro_batch": micro_batch},
            }
        )
    return {"traceEvents": named, "displayTimeUnit": "ms"}


def write_trace(events: EventTable, title: str, path: str | pathlib.Path) -> None:
    """Writes the trace as JSON; open it at ui.perfetto.dev."""
    pathlib.Path(path).write_text(json.dumps(trace_events(events, title)))
