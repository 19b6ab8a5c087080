"""Requests in, tokens out: `jmoe serve` under load from real gRPC clients, offline and online, on one host.

Starts a server over random weights, then measures
  steady   every slot busy with fixed lengths: output tokens/s against batch / step time (the same prompts, run by the
           executor alone): what serving loses to everything outside the step
  offline  all requests at once: throughput, and the request rate that saturates the server
  online   Poisson arrivals at --rate, or at --load shares of that rate: TTFT, TPOT, ITL, end-to-end latency, goodput

    python benchmarks/serve_throughput.py --model qwen3-30b-a3b --layers 12 --colocated 1 --batch 128
    python benchmarks/serve_throughput.py --platform cpu            tiny, under a minute

Lengths are lognormal around --input-len and --output-len (--fixed-len: exactly those); outputs ignore end of sequence.
Times in the JSON have the names that `vllm bench serve` gives them.
"""

import argparse
import json
import math
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time

from serve_clients import send_all
from serve_metrics import Record, metrics, steady_tokens_per_s

# What --platform cpu sets where nothing else was asked for.
TINY = {
    "model": "tiny", "layers": 2, "batch": 4, "max_len": 64, "chunk_len": 32, "page_len": 8, "input_len": 20,
    "output_len": 12, "steady_output_len": 32, "num_prompts": 12, "clients": 1, "load": [0.5], "num_steps": 4,
    "micro_batches": 1, "max_prefill_tokens": 64,
}  # fmt: skip
FULL = {
    "model": "qwen3-30b-a3b", "layers": 0, "batch": 128, "max_len": 2048, "chunk_len": 512, "page_len": 16,
    "input_len": 571, "output_len": 159, "steady_output_len": 256, "num_prompts": 0, "clients": 4, "load": [0.5, 0.8],
    "num_steps": 8, "micro_batches": 1, "max_prefill_tokens": 4096,
}  # fmt: skip
SIGMA = 0.7  # of the logarithm of a length


def lengths(args: argparse.Namespace, rng: random.Random) -> tuple[int, int]:
    """(input, output) tokens of one request: lognormal of the asked-for means, cut to what max_len takes."""
    if args.fixed_len:
        return args.input_len, args.output_len

    def draw(mean: int) -> int:
        return max(1, round(rng.lognormvariate(math.log(mean) - SIGMA**2 / 2, SIGMA)))

    num_output = min(draw(args.output_len), args.max_len // 2)
    return min(draw(args.input_len), args.max_len - num_output), num_output


def make_requests(args: argparse.Namespace, count: int, rate: float, seed: int) -> list[dict]:
    """Requests with arrivals a Poisson process of `rate` a second; all at once for an infinite rate."""
    from serve_server import MODELS, prompts_of

    rng, when, requests = random.Random(seed), 0.0, []
    for _ in range(count):
        num_input, num_output = lengths(args, rng)
        requests.append({"at": when, "num_input": num_input, "output_len": num_output})
        when += 0.0 if math.isinf(rate) else rng.expovariate(rate)
    prompts = prompts_of(MODELS[args.model].vocab_size, [r.pop("num_input") for r in requests], seed)
    return [{**request, "prompt": prompt} for request, prompt in zip(requests, prompts, strict=True)]


class ServerProcess:
    """The server in a process of its own; its address and the step time that it measured alone."""

    def __init__(self, argv: list[str], timeout_s: float):
        command = [sys.executable, str(pathlib.Path(__file__)), "--server", *argv]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.address, self.facts = "", {}
        timer = threading.Timer(timeout_s, self._process.kill)
        timer.start()
        assert self._process.stdout is not None
        for line in self._process.stdout:
            name, _, value = line.partition(" ")
            if name == "ALONE":
                self.facts = json.loads(value)
            elif name == "SAYS" and "serving " in value:
                self.address = json.loads(value).rpartition(" on ")[2]
                break
        timer.cancel()
        if not self.address:
            raise RuntimeError(f"the server did not come up: exit code {self._process.wait()}")
        threading.Thread(target=self._process.stdout.read, daemon=True).start()  # it may say more

    def close(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()


def run(args: argparse.Namespace, server: ServerProcess, name: str, requests: list[dict]) -> list[Record]:
    """One phase, with a line now and then; what failed is printed and counted."""
    shown = 0.0

    def progress(count: int) -> None:
        nonlocal shown
        if time.monotonic() - shown > 2 or count == len(requests):
            shown = time.monotonic()
            _log(f"{name}: {count} of {len(requests)} requests")

    records = send_all(server.address, requests, args.clients, progress, args.timeout_s)
    for record in records:
        if record.error is not None:
            _log(f"{name}: a request failed: {record.error}")
    return records


def measure(args: argparse.Namespace, server: ServerProcess) -> dict[str, dict]:
    """All phases, by name."""
    from serve_server import MODELS, prompts_of

    step_s, phases = server.facts["step_s"], {}
    if args.steady:
        prompts = prompts_of(MODELS[args.model].vocab_size, [args.input_len] * args.batch, args.seed)
        requests = [{"at": 0.0, "prompt": prompt, "output_len": args.steady_output_len} for prompt in prompts]
        rate = steady_tokens_per_s(run(args, server, "steady", requests))
        phases["steady"] = {
            "batch": args.batch, "step_ms": 1e3 * step_s, "tokens_per_s": rate,
            "share_of_step": rate * step_s / args.batch, "start_s": server.facts["start_s"],
        }  # fmt: skip
    count, goodput = args.num_prompts or 4 * args.batch, dict(args.goodput)
    rates = {f"{args.rate:g} req/s": args.rate} if args.rate else {}
    if not args.rate:
        offline = run(args, server, "offline", make_requests(args, count, math.inf, args.seed + 1))
        phases["offline"] = {"request_rate": "inf", **metrics(offline, goodput)}
        saturation = phases["offline"]["request_throughput"]
        rates = {f"{load:.0%} load": load * saturation for load in args.load}
    for number, (name, rate) in enumerate(rates.items()):
        records = run(args, server, name, make_requests(args, count, rate, args.seed + 2 + number))
        phases[name] = {"request_rate": rate, **metrics(records, goodput)}
    return phases


def report(args: argparse.Namespace, phases: dict[str, dict]) -> str:
    """The table, and what was measured on what."""
    lines = [
        f"{'phase':>12} {'req':>5} {'fail':>4} {'req/s':>7} {'out tok/s':>9} {'all tok/s':>9} "
        f"{'TTFT p50':>9} {'p99':>8} {'TPOT p50':>9} {'p99':>7} {'p99/p50':>7} {'ITL p99':>8} {'E2E p99':>9} "
        f"{'goodput':>7}"
    ]
    for name, p in phases.items():
        if name != "steady":
            lines.append(
                f"{name:>12} {p['completed']:>5} {p['failed']:>4} {p['request_throughput']:>7.2f} "
                f"{p['output_throughput']:>9.0f} {p['total_token_throughput']:>9.0f} {p['median_ttft_ms']:>9.0f} "
                f"{p['p99_ttft_ms']:>8.0f} {p['median_tpot_ms']:>9.2f} {p['p99_tpot_ms']:>7.2f} "
                f"{p['p99_tpot_ms'] / p['median_tpot_ms']:>7.2f} {p['p99_itl_ms']:>8.1f} {p['p99_e2el_ms']:>9.0f} "
                f"{p.get('request_goodput', math.nan):>7.2f}"
            )
    if steady := phases.get("steady"):
        lines.append(
            f"steady: {steady['tokens_per_s']:,.0f} tokens/s of {args.batch / steady['step_ms'] * 1e3:,.0f} = batch "
            f"{args.batch} / {steady['step_ms']:.3f} ms a step: {100 * steady['share_of_step']:.1f} % (bar: 97); "
            f"the executor started in {steady['start_s']:.1f} s"
        )
    return "\n".join([*lines, where(args), "command: python benchmarks/serve_throughput.py " + " ".join(sys.argv[1:])])


def where(args: argparse.Namespace) -> str:
    """Device, versions, commit and what was served."""
    import importlib.metadata

    def output_of(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return ""

    folder = str(pathlib.Path(__file__).parent)
    commit = (
        os.environ.get("JMOE_COMMIT")
        or output_of("git", "-C", folder, "rev-parse", "--short", "HEAD")
        or "unknown commit"
    )
    device = f"{os.cpu_count()} CPU cores"
    if args.platform == "gpu":
        device = output_of("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").replace("\n", ", ") or "GPU"
    shape = f"{args.model}, {args.layers or 'all'} layers, batch {args.batch}, {args.num_steps} steps a call"
    return f"{device}, jax {importlib.metadata.version('jax')}, commit {commit}: {shape}, chunk {args.chunk_len}"


def _goodput(text: str) -> tuple[str, float]:
    name, _, limit = text.partition(":")
    if name not in ("ttft", "tpot", "e2el"):
        raise argparse.ArgumentTypeError(f"expected ttft:MS, tpot:MS or e2el:MS, got {text!r}")
    return name, float(limit)


def parse(argv: list[str]) -> argparse.Namespace:
    """The options, with what the platform sets where nothing was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--platform", choices=("gpu", "cpu"), default="gpu")
    for name in ("model", "layers", "batch", "max-len", "chunk-len", "page-len", "input-len", "output-len"):
        add(f"--{name}", type=str if name == "model" else int)
    add("--steady-output-len", type=int, help="tokens of each request of the steady phase")
    add("--num-prompts", type=int, help="requests of a phase (default: four for each slot)")
    add("--clients", type=int, help="client processes")
    add("--micro-batches", type=int, help="in flight")
    add("--num-pages", type=int, help="KV pages of a replica (default: every slot may reach max_len)")
    add("--num-steps", type=int, help="decode steps of one call (default 8; 4 on cpu)")
    add("--colocated", type=int, default=0, metavar="N", help="both roles on N devices; 0: --attention and --expert")
    add("--tensor", type=int, default=1, help="with --colocated")
    add("--attention", type=int, default=1)
    add("--expert", type=int, default=1)
    add("--executor", choices=("auto", "inline", "processes"), default="auto")
    add("--max-prefill-tokens", type=int, help="chunk budget between two decode calls (default 4096)")
    add("--calls-in-flight", type=int, default=2, help="1 shows the host between calls")
    add("--rate", type=float, default=0.0, help="requests a second, instead of shares of the saturating rate")
    add("--load", type=float, nargs="*", help="shares of the saturating rate (default 0.5 0.8)")
    add("--goodput", type=_goodput, nargs="*", default=[], metavar="NAME:MS", help="a good request's ttft, tpot, e2el")
    add("--fixed-len", action="store_true")
    add("--no-steady", dest="steady", action="store_false", help="leave the steady phase out")
    add("--compile-cache", default="auto", metavar="DIR|off")
    add("--seed", type=int, default=0)
    add("--timeout-s", type=float, default=900.0, help="of the start, and of each phase")
    add("--json", help="also write every figure here")
    add("--server", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for name, value in (TINY if args.platform == "cpu" else FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    os.environ["JAX_PLATFORMS"] = "cpu" if args.platform == "cpu" else "cuda,cpu"
    return args


def main() -> int:
    args = parse(sys.argv[1:])
    if args.server:
        import serve_server

        return serve_server.main(args)
    _log("starting the server")
    server = ServerProcess(sys.argv[1:], args.timeout_s)
    try:
        phases = measure(args, server)
    finally:
        server.close()
    print(report(args, phases), flush=True)
    if args.json:
        facts = {"backend": "jmoe", "model_id": args.model, "argv": sys.argv[1:], "where": where(args)}
        pathlib.Path(args.json).write_text(json.dumps({**facts, "phases": phases}, indent=1))
    failed = sum(phase.get("failed", 0) for phase in phases.values())
    print("serve_throughput: done" if not failed else f"serve_throughput: FAILED, {failed} requests", flush=True)
    return int(failed > 0)


def _log(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
