"""Keeps events of chosen iterations of the first cell: rows for a timeline, devices for the critical path. No JAX."""

import dataclasses

import numpy as np

from jmoe.planner.critical_path import CRITICAL_KINDS, critical_seconds
from jmoe.planner.lanes import LANES, LaneEvent, Recorder
from jmoe.planner.simulation_report import EventTable


def _first_cell(event: LaneEvent) -> LaneEvent:
    arrays = {
        field.name: value[0]
        for field in dataclasses.fields(event)
        if isinstance(value := getattr(event, field.name), np.ndarray)
    }
    return dataclasses.replace(event, **arrays)


class EventRecorder:
    """Collects the events of whole iterations."""

    def __init__(self, num_layers: int):
        self._num_layers = num_layers
        self._iterations: dict[int, list[LaneEvent]] = {}

    def at(self, iteration: int) -> Recorder:
        """The recorder of one iteration, to hand to `LaneWalker.walk`."""
        events = self._iterations.setdefault(iteration, [])
        return lambda event: events.append(_first_cell(event))

    def table(self) -> EventTable:
        """Everything recorded so far."""
        rows = [
            (LANES.index(e.lane), i, e.stage.layer, e.stage.micro_batch, float(e.start_s.min()), float(e.end_s.max()))
            for i, events in self._iterations.items()
            for e in events
        ]
        columns = list(zip(*rows, strict=True)) or [()] * 6
        return EventTable(*(np.array(c, np.int64 if i < 4 else np.float64) for i, c in enumerate(columns)))

    def time_share(self) -> dict[str, float]:
        """Share of the recorded iterations' critical paths by kind, summing to 1."""
        seconds = dict.fromkeys(CRITICAL_KINDS, 0.0)
        for events in self._iterations.values():
            for kind, value in critical_seconds(events, self._num_layers).items():
                seconds[kind] += value
        total = sum(seconds.values())
        return {kind: value / total if total else 0.0 for kind, value in seconds.items()}
