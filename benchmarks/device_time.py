"""How benchmarks time a GPU: a slope between call counts in one program over rotating buffers, beside its own ceilings.

Imported by the kernel benchmarks; run alone it prints the ceilings of the machine at hand.
"""

import contextlib
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

KEPT_BYTES = 1 << 30  # outputs of one program that stay in memory until its end


def seconds_per_call(
    function: Callable[..., Any],
    inputs: Sequence[tuple[Any, ...]],
    *,
    few: int = 4,
    many: int = 24,
    repeats: int = 7,
    around: Callable[[], Any] | None = None,
) -> float:
    """(t[many calls] - t[few calls]) / (many - few), each count of calls one compiled program, medians of `repeats`.

    Args:
      function: of one element of `inputs`, unpacked; traced.
      inputs: argument tuples that the calls take in turn; together larger than L2, or the cache is what is measured.
      few, many: calls in the two programs.
      repeats: timed runs of each program.
      around: makes a context manager that the device work stands in (a lock, where several programs share a GPU);
        compilation stays outside.

    Returns:
      Seconds of one call, the launch of a program left out.
    """
    programs = [_calls(function, inputs, count) for count in (few, many)]
    with around() if around is not None else contextlib.nullcontext():
        for program in programs:
            jax.block_until_ready(program())
        times: list[list[float]] = [[], []]
        for _ in range(repeats):
            for program, found in zip(programs, times, strict=True):
                start = time.perf_counter()
                jax.block_until_ready(program())
                found.append(time.perf_counter() - start)
    return (statistics.median(times[1]) - statistics.median(times[0])) / (many - few)


def _calls(function: Callable[..., Any], inputs: Sequence[tuple[Any, ...]], count: int) -> Callable[[], Any]:
    """One compiled program of `count` calls in a row; none can be merged, moved past another or dropped.

    A barrier whose result for an operand is unused lets go of that operand, and calls on the same inputs become one. So
    every call's output goes through every later barrier and out of the program: whole, which costs no launch, or above
    KEPT_BYTES in all its first element (a launch of about 2 us, nothing beside a call that writes so much).
    """
    outputs = jax.tree.leaves(jax.eval_shape(function, *inputs[0]))
    whole = count * sum(leaf.size * leaf.dtype.itemsize for leaf in outputs) <= KEPT_BYTES

    def run(inputs):
        kept = []
        for i in range(count):
            arguments, kept = jax.lax.optimization_barrier((inputs[i % len(inputs)], kept))
            out = function(*arguments)
            if not whole:
                out = [leaf.ravel()[:1] for leaf in jax.tree.leaves(jax.lax.optimization_barrier(out))]
            kept.append(out)
        return jax.lax.optimization_barrier(kept)

    compiled = jax.jit(run).lower(list(inputs)).compile()
    return lambda: compiled(list(inputs))


def ceilings(around: Callable[[], Any] | None = None) -> dict[str, float]:
    """What this GPU gives anyone: `read_bytes_per_s`, `bf16_flops` and (where it has fp8) `fp8_flops`, on random data.

    Reading: the sum of 2 GB of float32. Products: 8192^3 on uniform random operands.
    """
    big = [(jax.random.uniform(jax.random.key(i), (1 << 28,), jnp.float32),) for i in range(2)]
    reads = seconds_per_call(jnp.sum, big, few=2, many=8, around=around)
    found = {"read_bytes_per_s": 4 * (1 << 28) / reads}
    del big
    size = 8192
    keys = jax.random.split(jax.random.key(1), 4)
    for name, dtype in (("bf16_flops", jnp.bfloat16), ("fp8_flops", jnp.float8_e4m3fn)):
        a, b, c, d = (jax.random.uniform(k, (size, size), jnp.float32, -1, 1).astype(dtype) for k in keys)

        def product(x, y):
            return jax.lax.dot_general(x, y, (((1,), (1,)), ((), ())), preferred_element_type=jnp.bfloat16)

        found[name] = 2 * size**3 / seconds_per_call(product, [(a, b), (c, d)], few=2, many=12, around=around)
    return found


def floor_s(num_bytes: float, num_flops: float, read_bytes_per_s: float, flops: float) -> float:
    """max(bytes / read bandwidth, operations / product rate), in seconds."""
    return max(num_bytes / read_bytes_per_s, num_flops / flops)


def where() -> str:
    """Device, jax version and commit: what every printed table names."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return f"{jax.devices()[0].device_kind}, jax {jax.__version__}, commit {commit or 'unknown'}"


def relative_error(got: Any, want: Any) -> float:
    """||got - want|| / ||want|| in float64; NaN is infinite."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    error = float(np.linalg.norm(got - want) / np.linalg.norm(want))
    return error if error == error else float("inf")


def main() -> int:
    found = ceilings()
    print(where())
    print(f"reads {found['read_bytes_per_s'] / 1e12:.2f} TB/s")
    print(f"products bf16 {found['bf16_flops'] / 1e12:.0f} TFLOP/s, fp8 {found['fp8_flops'] / 1e12:.0f} TFLOP/s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
