"""The colocated half of decode_step.py: a whole decode step with both roles on one GPU, against its byte floor.

A step is (t[50 tokens] - t[2 tokens]) / 48, each a compiled call, embedding, logits and argmax included. The floor is
what a step must read (attention and router weights, the experts that the router really drew, the KV cache of the
context, the head's weights) over the read bandwidth measured in the same run.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

from jmoe.cell_config import CellConfig
from jmoe.config import ModelConfig
from jmoe.sharding.mesh_config import MeshConfig

FEW, MANY = 2, 50
LAYERS = {"qwen3-30b-a3b": 12, "mixtral-8x7b": 8, "tiny": 2}  # what 80 GB hold, and what peers were timed at
VLLM_MS = {("qwen3-30b-a3b", 12, 16): 4.521, ("qwen3-30b-a3b", 12, 128): 7.661}  # 0.26.0, torch.compile, one H100
Around = Callable[[], Any] | None


def cell_of(args: argparse.Namespace, model: ModelConfig, rows: int) -> CellConfig:
    """One device, one micro-batch, pages for the context and the tokens that are timed."""
    max_pages = -(-(args.context + MANY + 1) // args.page_len)
    return CellConfig(
        model, MeshConfig.colocate(1).resolve(model.num_experts), rows=rows, chunk_len=16, num_steps=FEW,
        page_len=args.page_len, num_pages=1 + rows * max_pages, max_len=max_pages * args.page_len, kernels=args.layer,
    )  # fmt: skip


def floor_bytes(model: ModelConfig, rows: int, context: int, active: float) -> float:
    """Bytes that one step must read."""
    width = 4 if model.dtype == "float32" else 2
    projections = 2 * model.hidden_size * (model.num_heads + model.num_kv_heads) * model.head_dim
    kv = 2 * context * model.num_kv_heads * model.head_dim * rows
    moe = model.hidden_size * (model.num_experts + 3 * active * model.expert_ffn_size)
    head = model.hidden_size * model.vocab_size
    return width * (model.num_layers * (projections + kv + moe) + head)


class Cell:
    """One colocated cell on one device: its programs of FEW and MANY steps, compiling since it was made."""

    def __init__(self, cell: CellConfig, args: argparse.Namespace, around: Around, pool: ThreadPoolExecutor):
        import jax

        from jmoe.cell_runtime import CellRuntime
        from jmoe.colocated_timing import ColocatedTimer

        self.runtimes = {
            n: CellRuntime(dataclasses.replace(cell, num_steps=n), jax.devices(), "colocated") for n in (FEW, MANY)
        }
        self.many = self.runtimes[MANY]
        self.timer = ColocatedTimer(self.many, args.context, around=around)
        self._args, self._pool = args, pool
        self._compiling = [pool.submit(self._compile, n) for n in self.runtimes]

    def _compile(self, num_steps: int) -> float:
        start = time.perf_counter()
        self.runtimes[num_steps].compile(("decode", False))
        return time.perf_counter() - start

    def adopt(self, weights: tuple[dict[str, Any], dict[str, Any]]) -> None:
        """Takes the weights and fills the pages."""
        from jmoe.colocated_timing import ColocatedTimer

        for runtime in self.runtimes.values():
            runtime.adopt(*weights)
            ColocatedTimer(runtime, self._args.context).fill_pages()
        self._counting = self._pool.submit(self.timer.compile_active_experts, MANY)

    def wait(self) -> None:
        """Until everything has compiled."""
        self.compile_s = max(future.result() for future in self._compiling)
        self.count_active = self._counting.result()

    def step_s(self, context: int, repeats: int, around: Around) -> float:
        """Seconds of one step: the slope between the two calls, medians of `repeats`."""
        from jmoe.decode_batch import decode_batch

        inputs, medians = decode_batch(self.many.cell, context).array, {}
        for n, runtime in self.runtimes.items():
            times = []
            with around() if around is not None else nullcontext():
                for _ in range(repeats + 1):
                    start = time.perf_counter()
                    tokens = runtime.run(("decode", False), inputs)["tokens"]
                    times.append(time.perf_counter() - start)
            if not (tokens >= 0).all():
                raise RuntimeError("expected a token from every row in every step, got idle rows")
            medians[n] = statistics.median(times[1:])
        return (medians[MANY] - medians[FEW]) / (MANY - FEW)

    def kernels(self, context: int) -> str:
        """Every kernel of a step, by the profiler."""
        from step_kernels import step_kernels

        from jmoe.decode_batch import decode_batch

        inputs = decode_batch(self.many.cell, context).array
        return step_kernels(lambda: self.many.run(("decode", False), inputs), MANY, self.many.cell.model.num_layers)

    def close(self) -> None:
        """Frees the GPU for the next batch size."""
        for runtime in self.runtimes.values():
            runtime.close()


def random_weights(runtime):
    """(attention, experts) on the device, normal of standard deviation fan_in^-1/2."""
    from jmoe.checkpoints.random_weights import RandomWeights
    from jmoe.device_params import DeviceParams

    params, source = DeviceParams(runtime.cell, runtime.mesh), RandomWeights(runtime.cell.model, 0)
    return tuple(params.place(role, source, lambda _: None) for role in ("attention", "expert"))


def read_bandwidth(platform: str, around: Around) -> float:
    """Bytes a second that a sum of 2 GB of float32 reads (64 MB on CPU)."""
    import jax
    import jax.numpy as jnp
    from device_time import seconds_per_call

    size = 1 << (28 if platform == "gpu" else 23)
    big = [(jax.random.uniform(jax.random.key(i), (size,), jnp.float32),) for i in range(2)]
    return 4 * size / seconds_per_call(jnp.sum, big, few=2, many=8, around=around)


HEADER = (
    f"{'model':>14} {'L':>3} {'batch':>5} {'ms/step':>8} {'floor ms':>8} {'% floor':>7} {'vLLM ms':>7} {'tokens/s':>9} "
    f"{'active':>6} {'attn us':>8} {'experts':>8} {'head us':>8} {'rest us':>8} {'comp s':>6}"
)


def report(args: argparse.Namespace, model: ModelConfig, rows: int, result: dict[str, Any]) -> str:
    """One row of the table. "rest" is the step less its stages: what no stage accounts for."""
    floor = floor_bytes(model, rows, args.context, result["active"]) / result["read_bytes_per_s"]
    step, layers = result["step_s"], len(model.moe_layers)
    stages = [result.get(f"{name}_s", float("nan")) * 1e6 for name in ("attention", "experts", "head")]
    rest = step * 1e6 - layers * sum(stages[:2]) - stages[2]
    vllm = VLLM_MS.get((args.model, model.num_layers, rows))
    return (
        f"{args.model:>14} {model.num_layers:>3} {rows:>5} {step * 1e3:>8.3f} {floor * 1e3:>8.3f} "
        f"{100 * floor / step:>7.1f} {vllm or '-':>7} {rows / step:>9,.0f} {result['active']:>6.1f} "
        f"{stages[0]:>8.1f} {stages[1]:>8.1f} {stages[2]:>8.1f} {rest:>8.1f} "
        f"{result['compile_s']:>6.1f}"
    )


def measure(
    args: argparse.Namespace, models: dict[str, ModelConfig], around: Around, log: Callable[[str], None]
) -> int:
    """Every batch size in turn, in this process; the table so far after each."""
    from jmoe.serving.executors.inline import start_jax

    start_jax(args.platform, 1)
    from device_time import where

    layers = args.layers or LAYERS[args.model]
    model = dataclasses.replace(models[args.model], num_layers=layers)
    read = read_bandwidth(args.platform, around)
    table, record = [HEADER], []
    with ThreadPoolExecutor(4 * len(args.tokens)) as pool:  # all compile before anything is timed
        start = time.perf_counter()
        cells = {rows: Cell(cell_of(args, model, rows), args, around, pool) for rows in args.tokens}
        weights = random_weights(cells[args.tokens[0]].many)
        log(f"{args.model}, {layers} layers: weights there after {time.perf_counter() - start:.1f} s")
        for cell in cells.values():
            cell.adopt(weights)
        for cell in cells.values():
            cell.wait()
        log(f"pages and programs there after {time.perf_counter() - start:.1f} s")
    for rows, cell in cells.items():
        result = {"read_bytes_per_s": read, "compile_s": cell.compile_s}
        result["step_s"] = cell.step_s(args.context, args.calls, around)
        log(f"batch {rows}: {result['step_s'] * 1e3:.3f} ms a step; counting active experts")
        result["active"] = float(cell.count_active()[FEW:].mean())
        if args.stages:
            log("timing the stages alone")
            result |= dataclasses.asdict(cell.timer.stages())
        if args.kernels:
            print(cell.kernels(args.context), flush=True)
        record.append({"tokens": rows, **result})
        table.append(report(args, model, rows, result))
        print("\n".join(table))
        print(f"{where()}, context {args.context}, {model.dtype}, reads at {read / 1e12:.3f} TB/s\n", flush=True)
        cell.close()
        if args.json:
            with open(args.json, "w") as file:
                json.dump({"model": args.model, "layers": layers, "context": args.context, "cells": record}, file)
    print("decode_step: done")
    return 0
