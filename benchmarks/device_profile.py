"""Kernel times on the device, by JAX's profiler: not disturbed by the host, which wall clocks of microseconds are."""

import collections
import contextlib
import dataclasses
import functools
import glob
import math
import statistics
import tempfile
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from device_time import _calls

DTYPES = {"bf16": jnp.bfloat16, "fp8": jnp.float8_e4m3fn}  # of products whose rate is measured
PRODUCT_SIZE = 8192
TRACING = threading.Lock()  # Python's part of a compilation: taken in turn, so that the first is done first


@dataclasses.dataclass(frozen=True)
class Profile:
    """Of one call, in seconds: from its first kernel's start to the next call's, and each kernel by name."""

    seconds: float
    kernels: dict[str, float]
    outputs: Any  # of every call of the last run
    products: float | None = None  # see `profile_call`


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


def compile_call(function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    """One call as a program of its own, on a GPU one CUDA graph: several may be compiled in threads of their own.

    Args:
      function: traceable; arguments: arrays, or their ShapeDtypeStructs.

    Returns:
      The compiled program, to be called with arrays.
    """
    options: Any = {"xla_gpu_graph_min_graph_size": 1} if jax.default_backend() == "gpu" else None
    with TRACING:
        lowered = jax.jit(function).lower(*arguments)
    return lowered.compile(compiler_options=options)


def profile_call(
    program: Any,
    inputs: Sequence[tuple[Any, ...]],
    *,
    rounds: int = 3,
    around: Callable[[], Any] | None = None,
    before_products: Sequence[str] = (),
    behind_products: Sequence[str] = (),
) -> Profile:
    """Device time of one call of `compile_call`: its first kernel's start to its last one's end, median.

    Args:
      program: launched `rounds` times over all inputs in turn, without waiting in between.
      inputs: argument tuples, together larger than L2.
      around: makes a context manager that the device work stands in.
      before_products, behind_products: how the names of kernels that are not products start.

    Returns:
      outputs: of the first input, from the first and the last round. kernels: the sum of each name's launches of one
      call, median; a kernel that is launched early (programmatic dependent launch) counts its wait. products: from the
      end of the last kernel of `before_products` to the end of the last that is of neither kind.
    """
    with around() if around is not None else contextlib.nullcontext():
        outputs, events = _launch(program, inputs, rounds)
    calls = rounds * len(inputs)
    if len(events) % calls:
        raise ValueError(
            f"device_profile: expected as many kernels from each of {calls} calls, got {len(events)}: "
            f"{collections.Counter(name for _, _, name in events)}"
        )
    each = len(events) // calls
    spans, products, kernels = [], [], collections.defaultdict(list)
    for first in range(0, len(events), each):
        call = events[first : first + each]
        spans.append(max(start + length for start, length, _ in call) - call[0][0])
        products.append(_products(call, before_products, behind_products))
        for name in {name for _, _, name in call}:
            kernels[name].append(sum(length for _, length, other in call if other == name))
    medians = {name: statistics.median(lengths) / 1e9 for name, lengths in kernels.items()}
    return Profile(statistics.median(spans) / 1e9, medians, outputs, statistics.median(products) / 1e9)


def _launch(program: Any, inputs: Sequence[tuple[Any, ...]], rounds: int) -> tuple[list[Any], list[Any]]:
    """Outputs of the first input from the first and the last round, and the events of all rounds in their order."""
    jax.block_until_ready([program(*inputs[0]), program(*inputs[-1])])
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = options.host_tracer_level = 0  # a trace of the host takes a second to write
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            outputs, last = [], None
            for number in range(rounds):
                for n, arguments in enumerate(inputs):
                    last = program(*arguments)
                    if n == 0 and number in (0, rounds - 1):
                        outputs.append(last)
            jax.block_until_ready((outputs, last))
        return outputs, sorted(events_of(folder))


def _products(call: list[tuple[float, float, str]], before: Sequence[str], behind: Sequence[str]) -> float:
    ends = [start + length for start, length, name in call if name.startswith(tuple(before))]
    others = [start + length for start, length, name in call if not name.startswith((*before, *behind))]
    return max(others, default=call[0][0]) - max(ends, default=call[0][0])


def ceilings(around: Callable[[], Any] | None = None) -> dict[str, float]:
    """As `device_time.ceilings`, on the device's clock: `read_bytes_per_s`, `bf16_flops`, `fp8_flops`.

    The products are a few calls; see `product_rate` for what a longer run gives.
    """
    big = [(jnp.full((1 << 28,), i, jnp.float32),) for i in range(2)]
    read = compile_call(jnp.sum, big[0])
    found = {"read_bytes_per_s": 4 * (1 << 28) / profile_call(read, big, around=around).seconds}
    del big
    return found | {f"{dtype}_flops": product_rate(dtype, around=around) for dtype in DTYPES}


def product_rate(dtype: str, seconds: float = 0.0, around: Callable[[], Any] | None = None) -> float:
    """Operations a second of a plain product, 8192^3, in a run as long as what it is compared with: its median call.

    A GPU lowers its clock under load: an H200 gives 1,560 TFLOP/s of float8 in the first 4 ms, 1,320 in 170 ms.

    Args:
      dtype: of DTYPES; the operands are normal random, since the clock depends on how many bits flip.
      seconds: how long the run is to be; six calls at least.
    """
    program, inputs = _product(dtype)
    about = 2 * PRODUCT_SIZE**3 / (1.5e15 if dtype == "fp8" else 0.8e15)
    rounds = max(3, math.ceil(seconds / about / len(inputs)))
    return 2 * PRODUCT_SIZE**3 / profile_call(program, inputs, rounds=rounds, around=around).seconds


@functools.cache
def _product(dtype: str) -> tuple[Any, list[tuple[Any, Any]]]:
    """The compiled product and two pairs of operands, together larger than L2."""

    def product(x, y):
        return jax.lax.dot_general(x, y, (((1,), (1,)), ((), ())), preferred_element_type=jnp.bfloat16)

    keys = [jax.random.key(seed, impl="rbg") for seed in range(4)]
    a, b, c, d = (jax.random.normal(k, (PRODUCT_SIZE,) * 2, jnp.float32).astype(DTYPES[dtype]) for k in keys)
    return compile_call(product, (a, b)), [(a, b), (c, d)]


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
