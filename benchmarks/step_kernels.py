"""Where a decode step goes: its kernels in order, a layer's and the head's, with their times on the device."""

import collections
import itertools
import statistics
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
from device_profile import events_of

Event = tuple[float, float, str]  # start, length in nanoseconds, name


def step_kernels(call: Callable[[], Any], num_steps: int, num_layers: int) -> str:
    """Runs a call of `num_steps` decode steps under JAX's profiler and says what its kernels took.

    A layer's kernels follow each other in the same order in every layer, so the line of all launches is cut where
    a layer's first one returns, and the most frequent piece is a layer; the longest of the others holds the head.

    Returns:
      Lines of text: the totals a step, then each launch of a layer and of the head: median us, gap before it, name.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            call()
        events = sorted(events_of(folder))
    busy = sum(length for _, length, _ in events) / num_steps / 1e3
    span = (events[-1][0] + events[-1][1] - events[0][0]) / num_steps / 1e3
    pieces = _pieces(events, num_steps * num_layers)
    lines = [f"{len(events) / num_steps:.1f} launches a step, busy {busy:.1f} us of {span:.1f}"]
    for title, piece in zip(("a layer", "behind the last layer"), pieces.most_common(2), strict=False):
        lines += _table(title, piece[0], _same(events, piece[0], num_steps * num_layers))
    return "\n".join(lines)


def _cuts(events: Sequence[Event], launches: int) -> list[int]:
    """Where the kernel stands that is launched once a layer: the first such name."""
    counts = collections.Counter(name for _, _, name in events)
    name = min((n for n, count in counts.items() if count == launches), default=events[0][2], key=_order(events))
    return [i for i, event in enumerate(events) if event[2] == name] + [len(events)]


def _order(events: Sequence[Event]) -> Callable[[str], int]:
    return [name for _, _, name in events].index


def _pieces(events: Sequence[Event], launches: int) -> collections.Counter[tuple[str, ...]]:
    cuts = _cuts(events, launches)
    return collections.Counter(tuple(name for _, _, name in events[a:b]) for a, b in itertools.pairwise(cuts))


def _same(events: Sequence[Event], names: tuple[str, ...], launches: int) -> list[Sequence[Event]]:
    cuts = _cuts(events, launches)
    parts = [events[a:b] for a, b in itertools.pairwise(cuts)]
    return [part for part in parts if tuple(name for _, _, name in part) == names]


def _table(title: str, names: tuple[str, ...], parts: list[Sequence[Event]]) -> list[str]:
    lengths = [statistics.median(part[i][1] for part in parts) / 1e3 for i in range(len(names))]
    gaps = [0.0] + [
        statistics.median(part[i][0] - part[i - 1][0] - part[i - 1][1] for part in parts) / 1e3
        for i in range(1, len(names))
    ]
    rows = [f"  {us:8.2f} us  gap {gap:6.2f}  {name[:90]}" for us, gap, name in zip(lengths, gaps, names, strict=True)]
    return [f"{title}: {len(names)} launches, {sum(lengths):.1f} us (median of {len(parts)})", *rows]
