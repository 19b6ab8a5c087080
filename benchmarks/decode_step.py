"""One decode step over two meshes: T_a, T_e, T_c, the tick, and what share of it is work.

    python benchmarks/decode_step.py                          # Mixtral-8x7B layers on the GPUs of this host
    python benchmarks/decode_step.py --model tiny --platform cpu --context 64 --tokens 4
    python benchmarks/decode_step.py --colocated --model qwen3-30b-a3b      # both roles on one GPU, batch 16 and 128
    python benchmarks/decode_step.py --colocated --model tiny --layers 1 --platform cpu --context 64 --tokens 4
    python benchmarks/decode_step.py --transport push --tokens 128 --contexts 1024 4096 --against-colocated
    python benchmarks/decode_step.py --transport push --tokens 128 --micro-batches 3 --soak-s 480   # twice, say

Each executor runs in a process of its own. Times are medians; the tick is a call's time over steps x layers x
micro-batches, its heads taken off. "plan us" is what the planner's closed form says of the schedule that is built, from
the same stage times. "eff %" is max(T_a, T_e) over the tick. Floors: bytes that a stage must read over the read
bandwidth measured in the same run.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jmoe.cell_config import CellConfig
from jmoe.config import ModelConfig
from jmoe.planner.formulas import total_time
from jmoe.sharding.mesh_config import MeshConfig

MODELS = {
    "mixtral-8x7b": ModelConfig(
        "mixtral", 32000, 4096, 32, 32, 8, 128, 8, 2, 14336, rope_theta=1e6, max_position=32768
    ),
    "qwen3-30b-a3b": ModelConfig(
        "qwen3_moe", 151936, 2048, 48, 32, 4, 128, 128, 8, 768, qk_norm=True, rope_theta=1e6, max_position=32768
    ),
    "tiny": ModelConfig("mixtral", 131, 64, 4, 8, 4, 16, 8, 2, 96),
}  # fmt: skip


def cell_of(args: argparse.Namespace, executor: str, tokens: int, num_micro_batches: int) -> CellConfig:
    layers = (args.inline_layers if executor == "inline" else 0) or args.layers
    model = dataclasses.replace(MODELS[args.model], num_layers=layers or MODELS[args.model].num_layers)
    mesh = MeshConfig(
        args.attention, args.expert, num_micro_batches,
        attention_tensor=args.attention_tensor, expert_tensor=args.expert_tensor,
    ).resolve(model.num_experts)  # fmt: skip
    max_len = args.context + 16 * -(-(args.num_steps * (args.calls + 2)) // 16)
    max_pages = -(-max_len // 16)
    return CellConfig(
        model, mesh, rows=tokens, chunk_len=16, num_steps=args.num_steps, page_len=16,
        num_pages=1 + num_micro_batches * tokens * max_pages, max_len=max_len,
    )  # fmt: skip


def child(args: argparse.Namespace) -> None:
    """Measures one executor on one cell and prints a JSON line."""
    cell = cell_of(args, args.child, args.tokens[0], args.micro_batches[0])
    result = {}
    started = time.perf_counter()
    if args.child == "processes":
        from jmoe.serving.executors.processes import ProcessesExecutor

        executor = ProcessesExecutor(cell, "random:0", platform=args.platform, progress=_log)
    else:
        from jmoe.serving.executors.inline import InlineExecutor

        executor = InlineExecutor(cell, "random:0", platform=args.platform, progress=_log)
    from jmoe.serving.executors.protocol import ProgramKey

    key = ProgramKey("decode", False)
    loaded = time.perf_counter()
    executor.compile([key], _log)
    result["load_s"], result["compile_s"] = loaded - started, time.perf_counter() - loaded
    try:
        result["step_s"] = _time_calls(executor, key, args)
        if args.child == "inline":
            from jmoe.stage_timing import time_stages

            _log("timing the stages alone")
            result |= dataclasses.asdict(time_stages(executor._open(), args.context))
            result |= _device_facts()
    finally:
        executor.close()
    print("RESULT " + json.dumps(result), flush=True)


def _time_calls(executor, key, args: argparse.Namespace) -> float:
    """Median seconds of one decode step within calls of num_steps."""
    from jmoe.decode_batch import decode_batch

    inputs = decode_batch(executor.cell, args.context)
    times = []
    for n in range(args.calls + 2):
        start = time.perf_counter()
        outputs = executor.run(key, inputs)
        times.append(time.perf_counter() - start)
        if n == 0 and not (outputs.tokens >= 0).all():
            raise RuntimeError("expected a token from every row in every step, got idle rows")
    return statistics.median(times[2:]) / executor.cell.num_steps


def _device_facts() -> dict:
    """Device name, versions, and the read bandwidth: the sum of 4 GiB of bf16 (64 MiB on CPU), slope over repeats."""
    import jax
    import jax.numpy as jnp

    device = jax.devices()[0]
    size = (4 << 30) // 2 if device.platform == "gpu" else (64 << 20) // 2
    x = jax.device_put(jnp.ones((size // 4096, 4096), jnp.bfloat16), device)
    read = jax.jit(lambda x: jnp.max(x, axis=1))
    jax.block_until_ready(read(x))

    def run(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            out = read(x)
        jax.block_until_ready(out)
        return time.perf_counter() - start

    seconds = statistics.median((run(9) - run(1)) / 8 for _ in range(5))
    return {"device": device.device_kind, "jax": jax.__version__, "read_bytes_per_s": 2 * size / seconds}


def floors(cell: CellConfig, context: int) -> tuple[int, int]:
    """Bytes that an attention stage and an expert stage must read, on one device."""
    c, t = cell.model, cell.mesh.attention_tensor
    width = 4 if c.dtype == "float32" else 2
    projections = 2 * c.hidden_size * (c.num_heads + c.num_kv_heads) * c.head_dim
    kv = 2 * context * c.num_kv_heads * c.head_dim * cell.rows
    experts = 3 * cell.mesh.placement.max_local_experts * c.hidden_size * c.expert_ffn_size // cell.mesh.expert_tensor
    return width * (projections + kv) // t + width * c.hidden_size * c.num_experts, width * experts


def wire(cell: CellConfig) -> tuple[int, float]:
    """Bytes that one attention device sends in a dispatch, and that over what its rows need (routing drawn uniform)."""
    from jmoe.sharding.message import MessageFormat
    from jmoe.sharding.rounds import build_rounds

    rounds, c = build_rounds(cell.mesh), cell.model
    dtype = np.dtype("uint16" if c.dtype == "bfloat16" else "f4")
    form = MessageFormat(cell.rows, c.hidden_size // rounds.num_slices, c.num_experts_per_tok, dtype)
    meetings = int((rounds.peer[0] >= 0).sum())
    sent = 4 * form.dispatch_words * meetings
    rng = np.random.default_rng(0)
    chosen = np.argsort(rng.random((cell.rows, c.num_experts)), axis=1)[:, : c.num_experts_per_tok]
    rows = sum(int(np.isin(chosen, node).any(axis=1).sum()) for node in cell.mesh.placement.nodes)
    return sent, sent / (rows * form.row_bytes * meetings / cell.mesh.expert)


def report(args: argparse.Namespace, executor: str, cell: CellConfig, stages: dict, result: dict) -> str:
    """One row of the table; `stages` has the stage times, `result` the executor's own."""
    layers, m, directions = len(cell.model.moe_layers), cell.mesh.num_micro_batches, cell.mesh.directions
    attention_s, expert_s = stages["attention_s"], stages["expert_s"]
    exchange_s = stages["exchange_both_s"] if directions == "both" else stages["exchange_s"]
    sent, ratio = wire(cell)
    floor_a, floor_e = (n / stages["read_bytes_per_s"] for n in floors(cell, args.context))
    tick = (result["step_s"] - m * stages["head_s"]) / (layers * m)
    planned = float(total_time(directions, layers, m, attention_s, expert_s, exchange_s)) / (layers * m)
    return (
        f"{executor:>9} {layers:>3} {cell.rows:>6} {m:>2} {directions:>4} {attention_s * 1e6:>7.0f} "
        f"{100 * floor_a / max(attention_s, 1e-9):>4.0f} "
        f"{expert_s * 1e6:>7.0f} {100 * floor_e / max(expert_s, 1e-9):>4.0f} "
        f"{exchange_s * 1e6:>6.1f} {sent / 1e6:>6.2f} {ratio:>5.2f} {tick * 1e6:>8.0f} "
        f"{100 * max(attention_s, expert_s) / tick:>5.0f} {planned * 1e6:>8.0f} {100 * (planned / tick - 1):>+6.1f} "
        f"{result['step_s'] * 1e3:>8.2f} {cell.mesh.attention * m * cell.rows / result['step_s']:>9,.0f} "
        f"{result['compile_s']:>6.0f}"
    )


HEADER = (
    f"{'executor':>9} {'L':>3} {'tokens':>6} {'m':>2} {'dirs':>4} {'T_a us':>7} {'%flr':>4} {'T_e us':>7} {'%flr':>4} "
    f"{'T_c us':>6} {'MB out':>6} {'/need':>5} {'tick us':>8} {'eff %':>5} {'plan us':>8} {'off %':>6} {'step ms':>8} "
    f"{'tokens/s':>9} {'comp s':>6}"
)


def main(argv: Sequence[str] | None = None, around: Callable[[], Any] | None = None) -> int:
    """Runs the benchmark; `around` makes a context manager for timed device work where several programs share a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="mixtral-8x7b")
    parser.add_argument("--layers", type=int, default=0, help="decoder layers; 0 = all of the model")
    parser.add_argument("--inline-layers", type=int, default=0, help="fewer layers for inline and the stages (memory)")
    parser.add_argument("--tokens", type=int, nargs="+", help="tokens of one micro-batch (128 256; colocated 16 128)")
    parser.add_argument("--colocated", action="store_true", help="both roles on one device, and nothing of the rest")
    parser.add_argument("--page-len", type=int, default=16, help="colocated: tokens of a KV page")
    parser.add_argument("--kernels", action="store_true", help="colocated, on a GPU: every kernel of a step")
    parser.add_argument("--layer", choices=["auto", "xla", "pallas"], default="auto", help="colocated: its kernels")
    parser.add_argument("--no-stages", dest="stages", action="store_false", help="colocated: the step alone")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[3, 4])
    parser.add_argument("--transport", choices=["ppermute", "push"], default="ppermute", help="push: roles apart")
    parser.add_argument("--directions", choices=["auto", "one", "both", "separate"], default="auto", help="push alone")
    parser.add_argument("--contexts", type=int, nargs="+", help="push: several contexts")
    parser.add_argument("--against-colocated", action="store_true", help="push: also both roles on the same GPUs")
    parser.add_argument("--timeline", action="store_true", help="push: every kernel of one tick, on each device")
    parser.add_argument(
        "--soak-s", type=float, default=0, help="push: repeat each cell's calls for so long, and compare"
    )
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--attention", type=int, default=1)
    parser.add_argument("--expert", type=int, default=1)
    parser.add_argument("--attention-tensor", type=int, default=1)
    parser.add_argument("--expert-tensor", type=int, default=1)
    parser.add_argument(
        "--executors", nargs="*", default=["processes"], choices=["processes"],
        help="beside inline, which also times the stages",
    )  # fmt: skip
    parser.add_argument("--num-steps", type=int, default=4)
    parser.add_argument("--calls", type=int, default=6)
    parser.add_argument("--platform", choices=["gpu", "cpu"], default="gpu")
    parser.add_argument("--timeout-s", type=float, default=280)
    parser.add_argument("--json", help="also write every figure here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.colocated:
        import decode_step_colocated

        args.tokens = args.tokens or [16, 128]
        return decode_step_colocated.measure(args, MODELS, around, _log)
    args.tokens = args.tokens or [128, 256]
    if args.transport == "push":
        import decode_step_push

        return decode_step_push.measure(args, MODELS, floors, _log)
    if args.child:
        child(args)
        return 0
    return measure(args)


def measure(args: argparse.Namespace) -> int:
    """Every cell in turn; the table so far after each."""
    table, record, failed = [HEADER], [], False
    for tokens, m in itertools.product(args.tokens, args.micro_batches):
        results = {e: _run_child(args, e, tokens, m) for e in ("inline", *args.executors)}
        record.append({"tokens": tokens, "micro_batches": m, **results})
        stages = results["inline"]
        failed |= any(r is None for r in results.values())
        if stages is None:
            continue
        for executor, result in results.items():
            if result is not None:
                table.append(report(args, executor, cell_of(args, executor, tokens, m), stages, result))
        print("\n".join(table))
        print(
            f"{stages['device']}, jax {stages['jax']}, {args.model}, context {args.context}, "
            f"reads at {stages['read_bytes_per_s'] / 1e12:.2f} TB/s\n",
            flush=True,
        )
        if args.json:
            with open(args.json, "w") as file:
                json.dump({"argv": sys.argv[1:], "cells": record}, file, indent=1)
    print("decode_step: FAILED, see above" if failed else "decode_step: done")
    return int(failed)


def _run_child(args: argparse.Namespace, executor: str, tokens: int, m: int) -> dict | None:
    """One executor in its own process, bounded; its log passes through."""
    cell = ["--child", executor, "--tokens", str(tokens), "--micro-batches", str(m)]
    argv = [sys.executable, __file__, *sys.argv[1:], *cell]
    _log(f"{executor}: {tokens} tokens, m = {m}")
    try:
        done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, timeout=args.timeout_s, check=False)
    except subprocess.TimeoutExpired:
        _log(f"{executor}: not done in {args.timeout_s:.0f} s")
        return None
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    _log(f"{executor}: exit code {done.returncode}, no result")
    return None


def _log(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
