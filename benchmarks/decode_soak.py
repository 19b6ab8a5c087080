"""A soak of decode calls, for decode_step.py --soak-s: the same tokens every time, no growth, no hang."""

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

KEY = ("decode", False)


def soak(runtime: Any, context: int, seconds: float, log: Callable[[str], None]) -> None:
    """Decode calls for so many seconds, two in flight: the same tokens from the same state every time, no growth."""
    import jax

    from jmoe.decode_batch import decode_batch

    inputs = decode_batch(runtime.cell, context).array
    first = runtime.run(KEY, inputs)["tokens"]
    before, until, calls = _held(jax.devices()), time.monotonic() + seconds, 0
    under_way = [runtime.submit(KEY, inputs)]
    while time.monotonic() < until:
        under_way.append(runtime.submit(KEY, inputs))
        tokens = runtime.collect(under_way.pop(0))["tokens"]
        calls += 1
        if not np.array_equal(tokens, first):
            raise RuntimeError(f"soak: call {calls}: expected the first call's tokens, got others")
    runtime.collect(under_way.pop())
    after = _held(jax.devices())
    cell = runtime.cell
    ticks = (calls + 2) * cell.num_steps * cell.mesh.num_micro_batches * len(cell.model.moe_layers)
    log(f"soak: {seconds:.0f} s, {calls + 2} calls, {ticks:,} ticks, the same tokens in every call")
    log(f"soak: MiB held by each device {before[:-1]} -> {after[:-1]}, by the process {before[-1]} -> {after[-1]}")


def _held(devices) -> list[int]:
    """MiB in use on each device, and of this process in memory."""
    used = [(device.memory_stats() or {}).get("bytes_in_use", 0) >> 20 for device in devices]
    with open("/proc/self/statm") as file:
        return [*used, int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20]
