"""What each role's device does in one tick of a decode call, by JAX's profiler: kernels in order, beside the peer's."""

import glob
import itertools
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import jax

Event = tuple[float, float, str]  # start, length in nanoseconds, name


def role_timeline(call: Callable[[], Any], marker: str = "push") -> str:
    """Runs a call under the profiler and cuts each device's line of kernels where it pushes.

    Args:
      call: a decode call of both roles.
      marker: part of the name of the kernel that ends a stage.

    Returns:
      Lines of text: of each device the median length of its stages (from a push's end to the next push's start), of its
      pushes and of whole ticks, then the kernels of the tick in the middle with the gaps before them, in us.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            call()
        [path] = glob.glob(folder + "/**/*.xplane.pb", recursive=True)
        planes = [plane for plane in jax.profiler.ProfileData.from_file(path).planes if "GPU" in plane.name]
        lines = []
        for plane in planes:
            streams = [line for line in plane.lines if line.name.startswith("Stream")]
            events = sorted((e.start_ns, e.duration_ns, e.name) for line in streams for e in line.events)
            lines += _device(plane.name, events, marker)
    return "\n".join(lines)


def _device(name: str, events: list[Event], marker: str) -> list[str]:
    at = [i for i, event in enumerate(events) if marker in event[2]]
    if len(at) < 3:
        return [f"{name}: {len(events)} kernels, no ticks"]
    pairs = list(itertools.pairwise(at))
    stage = statistics.median(events[b][0] - events[a][0] - events[a][1] for a, b in pairs) / 1e3
    pushed = statistics.median(events[a][1] for a in at) / 1e3
    tick = statistics.median(events[b][0] - events[a][0] for a, b in pairs) / 1e3
    lines = [f"{name}: {len(events)} kernels; median stage {stage:.1f} us, push {pushed:.1f} us, tick {tick:.1f} us"]
    first, last = pairs[len(pairs) // 2]
    for before, event in zip(events[first - 1 : last], events[first : last + 1], strict=False):
        gap = (event[0] - before[0] - before[1]) / 1e3
        lines.append(f"  {event[1] / 1e3:8.2f} us  gap {gap:6.2f}  {event[2][:80]}")
    return lines
