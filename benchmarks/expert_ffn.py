"""The expert FFN of one device against its floor and its peers, from given top-k, at the shapes of four models.

    python benchmarks/expert_ffn.py                                      # everything, about half an hour on an H100
    python benchmarks/expert_ffn.py --models qwen3-30b-a3b --tokens 16,128 --dtypes bf16 --no-peers
    python benchmarks/expert_ffn.py --models tiny --tokens 16 --implementations xla --no-peers    # runs on a CPU

"%" is floor over time, the floor being max(bytes of the active experts' weights and scales and of the rows in and out
over the read bandwidth, 6 * pairs * D * F over the product rate), both measured in the same run, the product rate for
each case in a run of its length: the clock falls under load (`device_profile.product_rate`). Whole FFN: permute,
grouped products, SwiGLU, combine. Products: from the end of our permute to the end of the second product. Error:
relative, against float64 of the bf16 weights at sampled rows. "same" says whether two calls gave the same bits. jax
programs are timed on the device by the profiler (each call one CUDA graph, from its first kernel's start to its last
one's end), torch by CUDA graph replay, both over rotating inputs, medians. --json also holds each kernel's time.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import expert_ffn_peers as peers
import jax
import jax.numpy as jnp
import numpy as np
from device_profile import ceilings, compile_call, product_rate, profile_call
from device_time import relative_error, where
from expert_ffn_cases import (
    MODELS,
    ROUTINGS,
    Case,
    Inputs,
    active_experts,
    call_shapes,
    floor_of,
    make_inputs,
    make_weights,
    scaled_weights,
    truth,
)

from jmoe.pallas_kernels.expert_ffn import expert_ffn


@dataclasses.dataclass(frozen=True)
class Result:
    """One implementation at one case; `note` says why there is no time."""

    model: str
    tokens: int
    dtype: str
    routing: str
    active: float
    floor_us: float
    product_tflops: float  # a second, of plain products in a run of the case's length
    name: str
    us: float | None = None
    percent: float | None = None
    products_us: float | None = None
    products_percent: float | None = None
    error: float | None = None
    same: bool | None = None
    kernels_us: dict[str, float] | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the measurements of one case share. `scaled`: the weights in float8, where the case is of float8."""

    case: Case
    inputs: list[Inputs]
    weights: tuple[jax.Array, ...]
    scaled: tuple[Any, ...]
    sampled: np.ndarray
    want: np.ndarray
    blank: Result
    around: Callable[[], Any] | None

    def alone(self) -> Any:
        """What device work stands in."""
        return self.around() if self.around is not None else contextlib.nullcontext()

    def result(self, name: str, seconds: float, products: float | None, outs: list[Any]) -> Result:
        floor = self.blank.floor_us
        return dataclasses.replace(
            self.blank,
            name=name,
            us=seconds * 1e6,
            percent=floor / seconds / 1e4,
            products_us=None if products is None else products * 1e6,
            products_percent=None if products is None else floor / products / 1e4,
            error=relative_error(np.asarray(outs[0], np.float32)[self.sampled], self.want),
            same=bool(np.array_equal(np.asarray(outs[0]), np.asarray(outs[1]))),
        )

    def calls(self) -> list[tuple[Any, ...]]:
        weights = self.weights if self.case.dtype == "bf16" else self.scaled
        return [(i.rows, i.local_idx, i.topk_weights, *weights) for i in self.inputs]


ROUNDS = 3  # of a case's calls: all its inputs in turn
OUT: Any = {"out_dtype": jnp.bfloat16}  # as the public kernels give it, and as the floor counts
COMPILING = 8  # programs at a time
BEFORE = ("permute_rows", "count_pairs", "place_pairs", "copy_rows")  # kernels of ours beside the products
BEHIND = ("unpermute",)
NO_CEILINGS: dict[str, float] = dict.fromkeys(
    ("read_bytes_per_s", "bf16_flops", "fp8_flops"), float("nan")
)  # a CPU says no percent


def measure_jax(setting: Setting, name: str, program: Any) -> Result:
    """A compiled FFN: its time on the device (on a CPU, by the wall clock), error and bits."""
    calls = setting.calls()
    if jax.default_backend() != "gpu":
        start = time.perf_counter()
        outs = jax.block_until_ready([program(*arguments) for arguments in (*calls, calls[0])])
        seconds = (time.perf_counter() - start) / len(outs)
        return setting.result(name, seconds, None, [outs[0], outs[-1]])
    names: Any = {"before_products": BEFORE, "behind_products": BEHIND}
    found = profile_call(program, calls, rounds=ROUNDS, around=setting.around, **names)
    if not name.startswith("jmoe"):
        return setting.result(name, found.seconds, None, found.outputs)
    kernels = {kernel: seconds * 1e6 for kernel, seconds in found.kernels.items()}
    result = setting.result(name, found.seconds, found.products, found.outputs)
    return dataclasses.replace(result, kernels_us=kernels)


def measure_torch(setting: Setting) -> Iterator[Result]:
    torch = peers.torch_or_none()
    if torch is None:
        yield dataclasses.replace(setting.blank, name="torch", note="no torch with CUDA here")
        return
    kind = peers.TorchPeers if setting.case.dtype == "bf16" else peers.TorchScaledPeers
    with setting.alone():
        found = kind(torch, setting.inputs, setting.weights)
        torch.cuda.synchronize()
    for name, (whole, products) in found.thunks().items():
        try:
            with setting.alone():
                outs = [whole[0]().cpu().numpy() for _ in range(2)]
            seconds = peers.graph_seconds(torch, whole, setting.around)
            alone = None if products is None else peers.graph_seconds(torch, products, setting.around)
            yield setting.result(name, seconds, alone, outs)
        except (RuntimeError, AttributeError, NotImplementedError) as error:
            yield dataclasses.replace(setting.blank, name=name, note=first_line(error))
    del found
    torch.cuda.empty_cache()


def prepare(case: Case, args: argparse.Namespace, pool: concurrent.futures.Executor) -> dict[str, Any]:
    """Name to a future program: ours in each implementation, and jax's peers."""
    candidates = {}
    for implementation in args.implementations:
        candidates[f"jmoe {implementation}"] = functools.partial(expert_ffn, implementation=implementation, **OUT)
    if "jax" in args.peers and case.dtype == "bf16":
        candidates |= peers.jax_peers(case.tokens)
    return {name: pool.submit(compile_call, f, call_shapes(case)) for name, f in candidates.items()}


def measure(setting: Setting, programs: dict[str, Any], args: argparse.Namespace) -> Iterator[Result]:
    """Ours, then the peers of this machine."""
    for name, program in programs.items():
        try:
            yield measure_jax(setting, name, program.result())
        except Exception as error:  # one that can't run here is a row that says why
            yield dataclasses.replace(setting.blank, name=name, note=first_line(error))
    if "torch" in args.peers:
        yield from measure_torch(setting)


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:120]


def table(results: list[Result]) -> str:
    """Every row, good or bad, as Markdown."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    head = "| model | T | dtype | routing | active | floor us | TFLOP/s | by | us | % | products us | % | error |same|"
    lines = [head, "|" + "---|" * (head.count("|") - 1)]
    for r in results:
        last = r.note or f"{number(r.error, '.1e')} | {'-' if r.same is None else 'yes' if r.same else 'no'}"
        numbers = [number(v, f) for v, f in zip(
            (r.us, r.percent, r.products_us, r.products_percent), (".1f", ".1f", ".1f", ".1f"), strict=True
        )]  # fmt: skip
        shape = f"{r.model} | {r.tokens} | {r.dtype} | {r.routing} | {r.active:.1f} | {r.floor_us:.1f}"
        shape = f"{shape} | {r.product_tflops:.0f} | {r.name}"
        lines.append(f"| {shape} | {' | '.join(numbers)} | {last} |")
    return "\n".join(lines)


def cases(args: argparse.Namespace, model: str) -> list[Case]:
    return [Case(model, t, d, r) for d in args.dtypes for t in args.tokens for r in args.routings]


def settings(name: str, args: argparse.Namespace, found: dict[str, float], around: Any) -> Iterator[Setting]:
    """The cases of one model, which share its weights, and its dtypes the truth."""
    weights = make_weights(MODELS[name])
    scaled = scaled_weights(weights) if "fp8" in args.dtypes else ()
    truths = {}
    for case in cases(args, name):
        inputs = make_inputs(case)
        drawn = case.tokens, case.routing
        if drawn not in truths:
            truths[drawn] = truth(inputs[0], weights)
        rate = product_rate_of(case, inputs, found, around)
        floor_us = floor_of(case, inputs, found | {f"{case.dtype}_flops": rate}) * 1e6
        blank = Result(name, case.tokens, case.dtype, case.routing, active_experts(inputs), floor_us, rate / 1e12, "")
        sampled, want = truths[drawn]
        yield Setting(case, inputs, weights, scaled, sampled, want, blank, around)


def product_rate_of(case: Case, inputs: list[Inputs], found: dict[str, float], around: Any) -> float:
    """Of a run that is as long as the case's would be at its floor."""
    if jax.default_backend() != "gpu":
        return found[f"{case.dtype}_flops"]
    return product_rate(case.dtype, floor_of(case, inputs, found) * len(inputs) * ROUNDS, around)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = lambda text: [name for name in text.split(",") if name]  # noqa: E731
    parser.add_argument("--models", type=names, default=[m for m in MODELS if m != "tiny"])
    parser.add_argument("--tokens", type=lambda text: [int(t) for t in text.split(",")], default=[16, 128, 512, 4096])
    parser.add_argument("--dtypes", type=names, default=["bf16", "fp8"])
    parser.add_argument("--routings", type=names, default=list(ROUTINGS))
    parser.add_argument("--implementations", type=names, default=["pallas"])
    parser.add_argument("--peers", type=names, default=["torch", "jax"], help="of torch,jax")
    parser.add_argument("--no-peers", dest="peers", action="store_const", const=[])
    parser.add_argument("--json", help="also write the rows to this file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None, around: Callable[[], Any] | None = None) -> int:
    args = parse(argv)
    results = []
    with concurrent.futures.ThreadPoolExecutor(COMPILING) as pool:
        programs = {}  # of a case and its other routings
        for case in (case for model in args.models for case in cases(args, model)):
            if case.shape not in programs:
                programs[case.shape] = prepare(case, args, pool)
        found = ceilings(around) if jax.default_backend() == "gpu" else NO_CEILINGS
        print(where(), {name: f"{value / 1e12:.3g}e12" for name, value in found.items()}, file=sys.stderr, flush=True)
        for model in args.models:
            for setting in settings(model, args, found, around):
                for result in measure(setting, programs[setting.case.shape], args):
                    results.append(result)
                    print(table([result]).splitlines()[-1], file=sys.stderr, flush=True)
                    write_json(args.json, found, results)
    print(f"{where()}; {', '.join(f'{name} {value:.3e}' for name, value in found.items())}")
    print(table(results))
    return 0


def write_json(path: str | None, found: dict[str, float], results: list[Result]) -> None:
    if path:
        with open(path, "w") as file:
            json.dump({"where": where(), "ceilings": found, "rows": [vars(r) for r in results]}, file, indent=1)


if __name__ == "__main__":
    raise SystemExit(main())
