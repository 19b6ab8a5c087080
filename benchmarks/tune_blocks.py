"""Measures block sizes of the Mosaic GPU kernels on the GPU at hand, and writes the best into the committed table.

    python benchmarks/tune_blocks.py --ops expert_products --models qwen3-30b-a3b --tokens 16,128
    python benchmarks/tune_blocks.py ... --write                # also into pallas_kernels/block_table.json

Every candidate is compiled (several at a time, of all problems), run once and compared with the heuristic's choice, and
timed on the device; a candidate that can't run, or is further off than 1e-2, is a line that says so. An op joins by a
function of the arguments that yields `Problem`s, in PROBLEMS.
"""

import argparse
import concurrent.futures
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from device_profile import compile_call, profile_call
from device_time import relative_error, where
from expert_ffn_cases import MODELS, Case, make_inputs, make_weights

from jmoe.pallas_kernels.block_table import write_blocks

COMPILING = 8  # candidates compiled at a time


@dataclasses.dataclass(frozen=True)
class Problem:
    """One entry of the table in the making.

    Attributes:
      op, dtype, shape: the key, as the op itself asks `find_blocks`.
      candidates: block sizes to try.
      make: a traceable function for given block sizes; None for the heuristic's.
      inputs: argument tuples that the calls take in turn.
      meant: of an output of the first input, some part that means something.
    """

    op: str
    dtype: Any
    shape: dict[str, int]
    candidates: Sequence[dict[str, int]]
    make: Callable[[dict[str, int] | None], Callable[..., Any]]
    inputs: Sequence[tuple[Any, ...]]
    meant: Callable[[Any], Any] = lambda output: output


@dataclasses.dataclass(frozen=True)
class Tried:
    """One candidate: seconds, or why there are none. blocks is None for the heuristic's choice."""

    blocks: dict[str, int] | None
    seconds: float | None
    note: str = ""


def compile_all(problem: Problem, pool: concurrent.futures.Executor) -> list[tuple[dict[str, int] | None, Any]]:
    """(blocks, future program) of the heuristic's choice (None) and of every candidate."""
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), problem.inputs[0])
    choices = [None, *problem.candidates]
    return [(blocks, pool.submit(compile_call, problem.make(blocks), shapes)) for blocks in choices]


def tune(
    problem: Problem, programs: list[tuple[dict[str, int] | None, Any]], around: Callable[[], Any] | None = None
) -> list[Tried]:
    """Every candidate, fastest first, those that can't run last."""

    def outputs(program: Callable[..., Any]) -> list[np.ndarray]:
        return [np.asarray(problem.meant(leaf)) for leaf in jax.tree.leaves(program(*problem.inputs[0]))]

    want, tried = None, []
    for blocks, program in programs:
        try:
            got = outputs(program.result())
            want = got if want is None else want
            error = max(relative_error(a, b) for a, b in zip(got, want, strict=True))
            if error > 1e-2:
                tried.append(Tried(blocks, None, f"wrong: {error:.1e}"))
                continue
            tried.append(Tried(blocks, profile_call(program.result(), problem.inputs, around=around).seconds))
        except Exception as error:  # too much shared memory, a tile that doesn't divide: a line of the report
            tried.append(Tried(blocks, None, f"{type(error).__name__}: {str(error).strip()[:80]}"))
    return sorted(tried, key=lambda t: float("inf") if t.seconds is None else t.seconds)


def _grouped_problems(op: str, args: argparse.Namespace) -> Iterator[Problem]:
    """The grouped products at the shapes of the expert FFN's benchmark, uniform routing."""
    from expert_ffn_tuning import expert_problem, grouped_problem

    for name in args.models:
        weights = make_weights(MODELS[name])
        for dtype in args.dtypes:
            for tokens in args.tokens:
                case = Case(name, tokens, dtype, "uniform")
                inputs = make_inputs(case)
                yield expert_problem(case, inputs, weights) if op in FFN else grouped_problem(op, case, inputs, weights)


FFN = ("expert_products",)
PROBLEMS: dict[str, Callable[[str, argparse.Namespace], Iterator[Problem]]] = {
    "expert_products": _grouped_problems,
    "gated_grouped_matmul": _grouped_problems,
    "grouped_matmul": _grouped_problems,
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = lambda text: [name for name in text.split(",") if name]  # noqa: E731
    parser.add_argument("--ops", type=names, default=list(PROBLEMS))
    parser.add_argument("--models", type=names, default=[m for m in MODELS if m != "tiny"])
    parser.add_argument("--tokens", type=lambda text: [int(t) for t in text.split(",")], default=[16, 128, 512, 4096])
    parser.add_argument("--dtypes", type=names, default=["bf16"])
    parser.add_argument("--write", action="store_true", help="put the best into the table")
    parser.add_argument("--show", type=int, default=5, help="candidates to print of each problem")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None, around: Callable[[], Any] | None = None) -> int:
    args = parse(argv)
    with concurrent.futures.ThreadPoolExecutor(COMPILING) as pool:
        problems = [(op, problem) for op in args.ops for problem in PROBLEMS[op](op, args)]
        programs = [compile_all(problem, pool) for _, problem in problems]
        for (op, problem), compiled in zip(problems, programs, strict=True):
            print(op, np.dtype(problem.dtype).name, problem.shape, flush=True)
            tried = tune(problem, compiled, around)
            for one in tried[: args.show]:
                time = "-" if one.seconds is None else f"{one.seconds * 1e6:9.2f} us"
                print(f"  {time} {one.blocks or 'the heuristic'} {one.note}", flush=True)
            best = tried[0]
            if args.write and best.blocks is not None and best.seconds is not None:
                us = best.seconds * 1e6
                write_blocks(op, problem.dtype, problem.shape, best.blocks, us=us, measured=where())
            if best.seconds is None:
                print(f"no candidate of {op} ran at {problem.shape}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
