"""Attention of prefill chunks over pages against its floor and against dense peers of the same lengths.

    python benchmarks/prefill_attention.py                                # everything, a minute on an H100
    python benchmarks/prefill_attention.py --cases "2k@4k,8k@32k" --no-peers
    python benchmarks/prefill_attention.py --cases tiny --implementations xla --no-peers --no-times     # runs on a CPU

48 query heads, 8 KV heads, head size 128. "2k@4k" is 2048 queries behind 4096 positions, "16 x 16 rows" 16 queries of
each of 16 sequences of 4k to 32k. Floor: max(bytes / read bandwidth, causal operations / bf16 product rate), measured
in the same run; "%ops" and "%bytes" are its two sides over the time of the attention and merge kernels. "plan" is the
time of what depends on lengths alone: XLA does it once for all layers of a program. All programs are compiled first, in
threads. Error: relative, against float64 at sampled
queries and heads; of a peer, at the last query. "same" says whether two calls gave the same bits. Peers without a mask
compute more; "as causal" is their time times causal over all operations.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import jax
import numpy as np
import prefill_attention_peers as peers
from device_profile import calls_of, ceilings, profile
from device_time import relative_error, where
from prefill_attention_cases import CASES, H, Inputs, Q, make_inputs, num_bytes, num_flops, truth

from jmoe.pallas_kernels.ragged_paged_attention import Implementation, ragged_paged_attention

KERNELS = ("prefill_attention", "prefill_merge")


def prepared(name: str, implementation: Implementation, page_len: int, kv_dtype: str) -> tuple[list[Inputs], Any]:
    """Inputs of a case, and a compiled program of two calls on each."""
    rows = CASES[name]
    small = num_bytes(rows, kv_dtype) < 4e8
    inputs = [make_inputs(rows, page_len, kv_dtype, seed) for seed in range(3 if small else 1)]
    function = jax.jit(functools.partial(ragged_paged_attention, implementation=implementation))
    return inputs, calls_of(function, [i.arguments() for i in inputs], 2 * len(inputs))


def ours(setting: tuple[Any, ...], inputs: list[Inputs], program: Any, found: dict[str, float], around: Any) -> str:
    """A line of the table: one implementation at one case."""
    name, implementation, page_len, kv_dtype = setting
    rows = CASES[name]
    measured = profile(program, 2 * len(inputs), repeats=3, around=around)
    kernels = sum(t for kernel, t in measured.kernels.items() if any(k in kernel for k in KERNELS))
    merge = sum(t for kernel, t in measured.kernels.items() if KERNELS[1] in kernel)
    seconds = kernels or measured.seconds
    ops, read = num_flops(rows), num_bytes(rows, kv_dtype)
    floors = ops / found["bf16_flops"], read / found["read_bytes_per_s"]
    out, again = (measured.outputs[i] for i in (0, len(inputs)))
    plan = measured.seconds - seconds
    case = f"{name:17s} {kv_dtype:4s} {page_len:3d} {implementation:22s}"
    rest = f"(merge {merge * 1e6:5.1f}, plan {plan * 1e6:5.1f})"
    took = f"floor {max(floors) * 1e6:8.1f} us, took {seconds * 1e6:8.1f} us {rest}"
    sides = f"{100 * floors[0] / seconds:5.1f} %ops {100 * floors[1] / seconds:5.1f} %bytes"
    right = f"error {_error(inputs[0], out):.2e} same {bool((out == again).all())}"
    return (
        f"{case} {took} = {100 * max(floors) / seconds:5.1f} % | {ops / seconds / 1e12:6.1f} TFLOP/s {sides} | {right}"
    )


def _error(inputs: Inputs, out: jax.Array) -> float:
    tokens, heads, want = truth(inputs)
    return relative_error(np.asarray(out[tokens, heads].astype(np.float32)), want)


def check(name: str, implementation: Implementation, page_len: int, kv_dtype: str) -> str:
    inputs = make_inputs(CASES[name], page_len, kv_dtype, 0)
    out = ragged_paged_attention(*inputs.arguments(), implementation=implementation)
    return f"{name:17s} {kv_dtype:4s} {page_len:3d} {implementation:22s} error {_error(inputs, out):.2e}"


def dense_peers(name: str, dense: peers.Dense, found: dict[str, float], around: Any) -> Iterator[str]:
    """Lines of the peers, for cases of one row."""
    [(before, new)] = CASES[name]
    ops, every = num_flops(CASES[name]), 4.0 * Q * H * new * (before + new)
    want = np.zeros(0)
    for found_one in peers.measure(dense, around):
        if isinstance(found_one, tuple):
            yield f"{name:17s}          {found_one[0]:22s} not measured: {found_one[1]}"
            continue
        peer, seconds, last = found_one.name, found_one.seconds, found_one.last
        if peer == "truth":
            want = last
            continue
        masked = "no mask" not in peer
        causal = seconds if masked else seconds * ops / every
        yield (
            f"{name:17s}          {peer:22s} took {seconds * 1e6:8.1f} us, as causal {causal * 1e6:8.1f} us | "
            f"{ops / causal / 1e12:6.1f} TFLOP/s {100 * ops / causal / found['bf16_flops']:5.1f} %ops | "
            f"error {relative_error(last, want):.2e}"
        )


def lines(args: argparse.Namespace, around: Any) -> Iterator[str]:
    yield where()
    settings = [
        (name, implementation, page_len, kv_dtype)
        for kv_dtype in args.kv_dtypes.split(",")
        for page_len in args.page_lens
        for name in args.cases.split(",")
        for implementation in args.implementations.split(",")
    ]
    if args.no_times:
        yield from (check(*setting) for setting in settings)
        return
    with futures.ThreadPoolExecutor(8) as threads:
        programs = [threads.submit(prepared, *setting) for setting in settings]
        dense = [name for name in args.cases.split(",") if not args.no_peers and len(CASES[name]) == 1]
        of_peers = [threads.submit(peers.prepared, *CASES[name][0]) for name in dense]
        futures.wait(programs)
        futures.wait(of_peers)
    found = ceilings(around)
    yield ", ".join(f"{name} {value / 1e12:.2f}e12" for name, value in found.items())
    for setting, program in zip(settings, programs, strict=True):
        yield ours(setting, *program.result(), found, around)
    for name, peer in zip(dense, of_peers, strict=True):
        yield from dense_peers(name, peer.result(), found, around)


def main(argv: list[str] | None = None, around: Callable[[], Any] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(name for name in CASES if name != "tiny"))
    parser.add_argument("--implementations", default="pallas")
    parser.add_argument("--page-lens", type=lambda text: [int(n) for n in text.split(",")], default=[64])
    parser.add_argument("--kv-dtypes", default="bf16")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--no-times", action="store_true", help="only the error")
    for line in lines(parser.parse_args(argv), around):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
