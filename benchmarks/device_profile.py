"""Kernel times on the device, by JAX's profiler: not disturbed by the host, which wall clocks of microseconds are."""

import collections
import contextlib
import dataclasses
import glob
import statistics
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from device_time import _calls


@dataclasses.dataclass(frozen=True)
class Profile:
    """Of one call, in seconds: from its first kernel's start to the next call's, and each kernel by name."""

    seconds: float
    kernels: dict[str, float]
    outputs: Any  # of every call of the last run


def calls_of(function: Callable[..., Any], inputs: Sequence[tuple[Any, ...]], calls: int) -> Callable[[], Any]:
    """A compiled program of `calls` calls in a row over the inputs in turn; may be made in a thread of its own."""
    return _calls(function, inputs, calls)


def profile(
    program: Callable[[], Any], calls: int, *, repeats: int = 5, around: Callable[[], Any] | None = None
) -> Profile:
    """Device time of one call: the span of a program of `calls` calls over `calls`, median of `repeats` runs.

    Args:
      program: of `calls_of`; its inputs together larger than L2.
      calls: in the program; `repeats`: runs of it under the profiler.
      around: makes a context manager that the device work stands in.

    Returns:
      The span, gaps between launches included, and per kernel name its median time times its launches a call.
    """
    spans, kernels, outputs = [], collections.defaultdict(list), None
    with around() if around is not None else contextlib.nullcontext():
        jax.block_until_ready(program())
        for _ in range(repeats):
            with tempfile.TemporaryDirectory() as folder:
                with jax.profiler.trace(folder):
                    outputs = jax.block_until_ready(program())
                events = events_of(folder)
            spans.append((max(start + length for start, length, _ in events) - min(events)[0]) / calls)
            for _, length, name in events:
                kernels[name].append(length)
    each = {n: statistics.median(times) * len(times) / calls / repeats / 1e9 for n, times in kernels.items()}
    return Profile(statistics.median(spans) / 1e9, each, outputs)


def ceilings(around: Callable[[], Any] | None = None) -> dict[str, float]:
    """As `device_time.ceilings`, on the device's clock: `read_bytes_per_s`, `bf16_flops`, `fp8_flops`.

    Products of normal random operands: a GPU's clock depends on how many bits flip.
    """
    big = [(jnp.full((1 << 28,), i, jnp.float32),) for i in range(2)]
    found = {"read_bytes_per_s": 4 * (1 << 28) / profile(calls_of(jnp.sum, big, 4), 4, around=around).seconds}
    del big
    size = 8192

    def product(x, y):
        return jax.lax.dot_general(x, y, (((1,), (1,)), ((), ())), preferred_element_type=jnp.bfloat16)

    for name, dtype in (("bf16_flops", jnp.bfloat16), ("fp8_flops", jnp.float8_e4m3fn)):
        keys = [jax.random.key(seed, impl="rbg") for seed in range(4)]
        a, b, c, d = (jax.random.normal(k, (size, size), jnp.float32).astype(dtype) for k in keys)
        seconds = profile(calls_of(product, [(a, b), (c, d)], 8), 8, around=around).seconds
        found[name] = 2 * size**3 / seconds
    return found


def events_of(folder: str) -> list[tuple[float, float, str]]:
    """(start, length, name) of everything on the GPU's streams, in nanoseconds."""
    [path] = glob.glob(folder + "/**/*.xplane.pb", recursive=True)
    found = []
    for plane in jax.profiler.ProfileData.from_file(path).planes:
        if "GPU" in plane.name:
            lines = [line for line in plane.lines if line.name.startswith("Stream")]
            found += [(event.start_ns, event.duration_ns, event.name) for line in lines for event in line.events]
    if not found:
        raise ValueError("device_profile: expected kernels on a GPU's streams, the profiler saw none")
    return found
