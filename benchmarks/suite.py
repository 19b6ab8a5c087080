"""Several benchmarks and the GPU tests one after another, each with a limit and a log: for a machine lent by the hour.

    python benchmarks/suite.py --list
    python benchmarks/suite.py one-gpu --logs logs                   # everything for one GPU
    python benchmarks/suite.py kernel-tests serve --logs logs --budget-s 540
    python benchmarks/suite.py two-gpus ffn=120 --logs logs          # a job's own limit, in seconds

A job that passes its limit is interrupted, then killed with all that it started; what it printed stays. With --budget-s
no job is given more than what is left, and none starts with less than 20 s.
"""

import argparse
import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time

QWEN3 = ["--model", "qwen3-30b-a3b"]
STEP = "benchmarks/decode_step.py"
PAIR_TESTS = [f"tests/test_{name}.py" for name in ("two_gpus", "two_gpus_push", "compiled_plan")]
TESTS = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
# Name: (seconds, arguments of the interpreter).
JOBS: dict[str, tuple[int, list[str]]] = {
    "kernel-tests": (300, [*TESTS, "tests/pallas_kernels"]),
    "pair-tests": (300, [*TESTS, *PAIR_TESTS]),
    "ffn": (300, ["benchmarks/expert_ffn.py"]),
    "decode-attention": (200, ["benchmarks/paged_attention.py"]),
    "prefill-attention": (200, ["benchmarks/prefill_attention.py"]),
    "colocated": (250, [STEP, "--colocated", *QWEN3, "--tokens", "16", "128", "--no-stages"]),
    "colocated-mixtral": (200, [STEP, "--colocated", "--model", "mixtral-8x7b", "--tokens", "128"]),
    "second-start": (200, ["benchmarks/second_start.py"]),
    "serve": (
        300, ["benchmarks/serve_throughput.py", *QWEN3, "--layers", "12", "--colocated", "1", "--batch", "128",
              "--chunk-len", "1024", "--max-prefill-tokens", "6144"],
    ),
    "tokens": (150, ["benchmarks/tokens_equal.py", "--ratios", "1:1"]),
    "exchange": (400, ["benchmarks/exchange.py"]),
    "apart": (
        400, [STEP, "--transport", "push", *QWEN3, "--layers", "8", "--tokens", "128",
              "--micro-batches", "2", "3", "--against-colocated"],
    ),
    "apart-mixtral": (
        300, [STEP, "--transport", "push", "--model", "mixtral-8x7b", "--layers", "4",
              "--tokens", "128", "--micro-batches", "3"],
    ),
    "soak": (
        590, [STEP, "--transport", "push", *QWEN3, "--layers", "8", "--tokens", "128",
              "--micro-batches", "3", "--executors", "--soak-s", "480"],
    ),
}  # fmt: skip
GROUPS = {
    "one-gpu": [
        "kernel-tests", "colocated", "serve", "second-start", "ffn", "decode-attention", "prefill-attention",
        "colocated-mixtral",
    ],
    "two-gpus": ["pair-tests", "tokens", "exchange", "apart", "apart-mixtral"],
}  # fmt: skip
LEAST_S = 20


def chosen(names: list[str]) -> list[tuple[str, int]]:
    """(job, limit) of names, groups and NAME=SECONDS."""
    found = []
    for text in names:
        name, _, limit = text.partition("=")
        for job in GROUPS.get(name, [name]):
            if job not in JOBS:
                raise SystemExit(f"expected some of {', '.join([*JOBS, *GROUPS])}, got {job}")
            found.append((job, int(limit) if limit else JOBS[job][0]))
    return found


def run(job: str, limit_s: float, log: pathlib.Path) -> str:
    """Runs one job; "ok", "failed (N)" or "killed"."""
    root = pathlib.Path(__file__).parents[1]
    env = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": f"{root}:{os.environ.get('PYTHONPATH', '')}"}
    env.setdefault("JAX_PLATFORMS", "cuda,cpu")
    with log.open("w") as out:
        argv = [sys.executable, *JOBS[job][1]]
        process = subprocess.Popen(
            argv, cwd=root, env=env, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, process_group=0
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
            process.send_signal(signal.SIGINT)  # so that it takes its files away
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # also what it has left behind
        process.wait()
    return "killed" if code is None else "ok" if code == 0 else f"failed ({code})"


def main() -> int:
    """Runs what was named; 1 if something did not end well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="jobs, groups, or NAME=SECONDS")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--logs", type=pathlib.Path, default=pathlib.Path("bench-results"))
    parser.add_argument("--tail", type=int, default=25, help="lines of each log to print")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="seconds of all jobs together")
    args = parser.parse_args()
    if args.list or not args.names:
        for name, (limit_s, argv) in JOBS.items():
            print(f"{name:>18} {limit_s:>4} s  {' '.join(argv)}")
        print("\n".join(f"{name:>18} {', '.join(jobs)}" for name, jobs in GROUPS.items()))
        return 0
    args.logs.mkdir(parents=True, exist_ok=True)
    begin, ends = time.monotonic(), {}
    for job, limit_s in chosen(args.names):
        left = args.budget_s - (time.monotonic() - begin)
        if left < LEAST_S:
            ends[job] = "not started"
            continue
        start, log = time.monotonic(), args.logs / f"{job}.log"
        ends[job] = run(job, min(limit_s, left), log)
        ends[job] += f" after {time.monotonic() - start:.0f} s"
        lines = log.read_text(errors="replace").splitlines()
        print(f"== {job}: {ends[job]}", *lines[-args.tail :], sep="\n", flush=True)
    print("== suite", *(f"{job:>18} {end}" for job, end in ends.items()), sep="\n")
    return int(not all(end.startswith("ok") for end in ends.values()))


if __name__ == "__main__":
    sys.exit(main())
