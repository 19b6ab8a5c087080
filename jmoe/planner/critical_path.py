"""Where the time went: the chain of events that the end of an iteration waited for, walked backwards. No JAX."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from jmoe.planner.lanes import LaneEvent

# An excess is what the critical device took over the mean device of its role: imbalance, stragglers.
CRITICAL_KINDS: tuple[str, ...] = (
    "attention", "attention_excess", "head", "dispatch", "expert", "expert_excess", "combine", "before",
)  # fmt: skip

_Place = tuple[str, int, float]  # role, device, time


def critical_seconds(events: Sequence[LaneEvent], num_layers: int) -> dict[str, float]:
    """Cuts the time of one iteration of one cell into what its critical path did.

    From the last head's end backwards: an event starts when the last thing that it waits for has ended, on the same
    device (its lane, its port) or at the other end of an exchange. Start and end times come from maxima and sums, so
    the predecessor is found by equal time.

    Args:
      events: all events of the iteration, in the order of the schedule, arrays over the devices of one cell.
      num_layers: L; an attention stage of layer L is the head.

    Returns:
      Seconds by kind (`CRITICAL_KINDS`), summing to the time between the first start and the last end; "before" is a
      wait for something of an earlier iteration.
    """
    first = min(float(event.start_s.min()) for event in events)
    index = _index(events)
    seconds = dict.fromkeys(CRITICAL_KINDS, 0.0)
    last = max((e for e in events if e.lane == "attention"), key=lambda e: e.end_s.max())
    place: _Place = ("attention", int(last.end_s.argmax()), float(last.end_s.max()))
    seen: set[int] = set()
    while place[2] > first:
        found = next((e for e in reversed(index.get(place, ())) if id(e) not in seen), None)
        if found is None:
            seconds["before"] += place[2] - first
            break
        seen.add(id(found))
        before = _predecessor(found, place)
        _attribute(seconds, found, place, before, num_layers)
        place = before
    return seconds


def _index(events: Sequence[LaneEvent]) -> dict[_Place, list[LaneEvent]]:
    """Events by where and when they let a device go on."""
    index: dict[_Place, list[LaneEvent]] = defaultdict(list)
    for event in events:
        if event.sent_s is None:
            _add(index, event, event.lane, event.end_s)
            continue
        sender, receiver = _roles(event)
        assert event.received_s is not None
        latency = float((event.end_s - event.received_s).max())
        for ends in {latency, 0.0}:
            _add(index, event, sender, event.sent_s + ends)
        _add(index, event, receiver, event.end_s)
        if latency:
            _add(index, event, receiver, event.received_s)
    return index


def _add(index: dict[_Place, list[LaneEvent]], event: LaneEvent, role: str, ends: np.ndarray) -> None:
    for device, end in enumerate(ends.tolist()):
        index[role, device, end].append(event)


def _roles(event: LaneEvent) -> tuple[str, str]:
    return ("attention", "expert") if event.lane == "dispatch" else ("expert", "attention")


def _predecessor(event: LaneEvent, place: _Place) -> _Place:
    """Where and when the event that ended at `place` began, as far as `place` waited for it."""
    role, device, _ = place
    if event.sent_s is None or role == _roles(event)[0]:
        return role, device, float(event.start_s[device])
    assert event.port_free_s is not None and event.received_s is not None
    sender = _roles(event)[0]
    if event.received_s[device] == event.sent_s.max():  # the slowest sender held it up
        slowest = int(event.sent_s.argmax())
        return sender, slowest, float(event.start_s[slowest])
    if event.port_free_s[device] >= event.start_s.min():  # its own port was late
        return role, device, float(event.port_free_s[device])
    earliest = int(event.start_s.argmin())
    return sender, earliest, float(event.start_s[earliest])


def _attribute(seconds: dict[str, float], event: LaneEvent, place: _Place, before: _Place, num_layers: int) -> None:
    took = place[2] - before[2]
    if event.sent_s is not None:
        seconds[event.lane] += took
    elif event.lane == "attention" and event.stage.layer == num_layers:
        seconds["head"] += took
    else:
        excess = max(0.0, took - float((event.end_s - event.start_s).mean()))
        seconds[f"{event.lane}_excess"] += excess
        seconds[event.lane] += took - excess
