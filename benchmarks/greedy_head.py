"""The head of a greedy decode step against its floor, on the GPU at hand.

    python benchmarks/greedy_head.py                                  # Qwen3-30B-A3B at 16, 64 and 128 rows
    python benchmarks/greedy_head.py --vocab 32000 --hidden 4096 --rows 128
    python benchmarks/greedy_head.py --by-token --halves 1 2 3        # as embeddings stand; tiles of 128, 256, 384

XLA's form writes the logits and reads them back; the kernel keeps each row's largest. Floor: weights and rows over the
read bandwidth of the same run. Time: from one call's first kernel to the next one's, by JAX's profiler; behind it that
of each kernel. "equal": rows whose token is the one that XLA's form found; "same": two calls gave the same tokens.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from device_profile import calls_of, profile
from device_time import where

from jmoe.pallas_kernels.greedy_head import greedy_head
from jmoe.pallas_kernels.greedy_head_mosaic import choose_head, greedy_head_pallas

CALLS = 6


def forms_of(args: argparse.Namespace, rows: int) -> dict[str, Callable[..., jax.Array]]:
    found = {
        name: functools.partial(greedy_head, by_token=args.by_token, implementation=name) for name in ("xla", "pallas")
    }
    chosen = choose_head(-(-rows // 8) * 8, args.hidden, args.vocab, args.by_token)
    for halves in args.halves:
        head = dataclasses.replace(chosen, halves=halves)
        found[f"tiles of {head.tile}"] = functools.partial(greedy_head_pallas, by_token=args.by_token, head=head)
    return found


def rows_of(args: argparse.Namespace, rows: int, weights: jax.Array, bandwidth: float, around: Any) -> Iterator[str]:
    x = jax.random.normal(jax.random.key(rows, impl="rbg"), (rows, args.hidden), jnp.bfloat16)
    floor = (x.nbytes + weights.nbytes) / bandwidth
    want = None
    for name, form in forms_of(args, rows).items():
        measured = profile(calls_of(form, [(x, weights)], CALLS), CALLS, around=around)
        got, again = (np.asarray(measured.outputs[i]) for i in (0, -1))
        want = got if want is None else want
        slowest = sorted(measured.kernels.items(), key=lambda item: -item[1])[:3]
        kernels = ", ".join(f"{kernel[:40]} {seconds * 1e6:.1f}" for kernel, seconds in slowest)
        yield (
            f"{rows:4d} rows {name:12s} floor {floor * 1e6:6.1f} us | took {measured.seconds * 1e6:6.1f} us "
            f"= {measured.seconds / floor:5.3f} floors | equal {np.sum(got == want)} same {np.array_equal(got, again)} "
            f"| {kernels}"
        )


def lines(args: argparse.Namespace, around: Any) -> Iterator[str]:
    yield where()
    big = [(jnp.full((1 << 28,), i, jnp.float32),) for i in range(2)]
    bandwidth = 4 * (1 << 28) / profile(calls_of(jnp.sum, big, 4), 4, around=around).seconds
    del big
    yield f"reads {bandwidth / 1e12:.2f} TB/s"
    shape = (args.vocab, args.hidden) if args.by_token else (args.hidden, args.vocab)
    weights = jax.random.normal(jax.random.key(0, impl="rbg"), shape, jnp.bfloat16)
    for rows in args.rows:
        yield from rows_of(args, rows, weights, bandwidth, around)


def main(argv: list[str] | None = None, around: Callable[[], Any] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--by-token", action="store_true", help="weights [vocab, hidden]")
    parser.add_argument("--halves", type=int, nargs="*", default=[], help="of a consumer, 64 columns each: also these")
    for line in lines(parser.parse_args(argv), around):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
