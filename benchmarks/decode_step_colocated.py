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

import numpy as np

from jmoe.cell_config import CellConfig
from jmoe.config import ModelConfig
from jmoe.sharding.mesh_config import MeshConfig

FEW, MANY = 2, 50
LAYERS = {"qwen3-30b-a3b": 12, "mixtral-8x7b": 8, "tiny": 2}  # what one GPU of 80 GB holds, and what peers were timed at
VLLM_MS = {("qwen3-30b-a3b", 12, 16): 4.521, ("qwen3-30b-a3b", 12, 128): 7.661}  # 0.26.0, torch.compile, one H100
Around = Callable[[], Any] | None


def cell_of(args: argparse.Namespace, model: ModelConfig, rows: int) -> CellConfig:
    """One device, one micro-batch, pages for the context and the tokens that are timed."""
    max_pages = -(-(args.context + MANY + 1) // args.page_len)
    return CellConfig(
        model, MeshConfig.colocate(1).resolve(model.num_experts), rows=rows, chunk_len=16, num_steps=FEW,
        page_len=args.page_len, num_pages=1 + rows * max_pages, max_len=max_pages * args.page_len,
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
    """One colocated cell on one device, with random weights made there, and its programs of FEW and MANY steps."""

    def __init__(self, cell: CellConfig, distinct_layers: int, log: Callable[[str], None]):
        import jax

        from jmoe.cell_runtime import CellRuntime

        self.runtimes = {
            n: CellRuntime(dataclasses.replace(cell, num_steps=n), jax.devices(), "colocated") for n in (FEW, MANY)
        }
        self.many = self.runtimes[MANY]
        with ThreadPoolExecutor(2) as pool:
            started = time.perf_counter()
            compiling = [pool.submit(runtime.compile, ("decode", False)) for runtime in self.runtimes.values()]
            self.weights = random_weights(self.many, distinct_layers)
            log(f"weights there after {time.perf_counter() - started:.1f} s")
            for future in compiling:
                future.result()
            self.compile_s = time.perf_counter() - started

    def step_s(self, context: int, repeats: int, around: Around) -> float:
        """Seconds of one step: the slope between the two calls, medians of `repeats`."""
        from jmoe.colocated_timing import ColocatedTimer
        from jmoe.decode_batch import decode_batch

        inputs, medians = decode_batch(self.many.cell, context).array, {}
        for n, runtime in self.runtimes.items():
            runtime.adopt(*self.weights)
            ColocatedTimer(runtime, context, around=around).fill_pages()
            times = []
            with around() if around is not None else nullcontext():
                for _ in range(repeats + 1):
                    start = time.perf_counter()
                    tokens = runtime.run(("decode", False), inputs)["tokens"]
                    times.append(time.perf_counter() - start)
            if not (tokens >= 0).all():
                raise RuntimeError("expected a token from every row in every step, got idle rows")
            medians[n] = statistics.median(times[1:])
            if n == FEW:
                runtime.close()  # its pages: two caches may not fit
        return (medians[MANY] - medians[FEW]) / (MANY - FEW)


def random_weights(runtime, distinct_layers: int):
    """(attention, experts) on the device, normal of standard deviation fan_in^-1/2; layers beyond share arrays."""
    import jax
    import jax.numpy as jnp

    from jmoe.models.model import array_specs

    found: dict[str, Any] = {}

    def draw(path: str, struct, fan_in: int):
        name, _, rest = path.partition(".")
        if name == "layers" and distinct_layers:
            layer, _, rest = rest.partition(".")
            path = f"layers.{int(layer) % distinct_layers}.{rest}"
        if path not in found:
            key = jax.random.key(sum(ord(c) * 31**n for n, c in enumerate(path)) % 2**31)
            found[path] = _normal(struct, fan_in)(key) if fan_in else jnp.ones(struct.shape, struct.dtype)
        return found[path]

    def of(structs, specs):
        found.clear()
        return {path: draw(path, struct, specs[path].fan_in) for path, struct in structs.items()}

    specs = array_specs(runtime.cell.model)
    return tuple(of(structs, part) for structs, part in zip(runtime.abstract.params(), specs, strict=True))


def _normal(struct, fan_in: int):
    import jax

    return jax.jit(
        lambda key: jax.random.normal(key, struct.shape, struct.dtype) * np.array(fan_in**-0.5, struct.dtype),
        out_shardings=struct.sharding,
    )


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
    f"{'active':>6} {'attn us':>8} {'router':>7} {'experts':>8} {'head us':>8} {'rest us':>8} {'comp s':>6}"
)


def report(args: argparse.Namespace, model: ModelConfig, rows: int, result: dict[str, Any]) -> str:
    """One row of the table. "rest" is the step less its stages: what no stage accounts for."""
    floor = floor_bytes(model, rows, args.context, result["active"]) / result["read_bytes_per_s"]
    step, layers = result["step_s"], len(model.moe_layers)
    stages = [result.get(f"{name}_s", float("nan")) * 1e6 for name in ("attention", "router", "experts", "head")]
    rest = step * 1e6 - layers * sum(stages[:3]) - stages[3]
    vllm = VLLM_MS.get((args.model, model.num_layers, rows))
    return (
        f"{args.model:>14} {model.num_layers:>3} {rows:>5} {step * 1e3:>8.3f} {floor * 1e3:>8.3f} "
        f"{100 * floor / step:>7.1f} {vllm or '-':>7} {rows / step:>9,.0f} {result['active']:>6.1f} "
        f"{stages[0]:>8.1f} {stages[1]:>7.1f} {stages[2]:>8.1f} {stages[3]:>8.1f} {rest:>8.1f} "
        f"{result['compile_s']:>6.1f}"
    )


def measure(args: argparse.Namespace, models: dict[str, ModelConfig], around: Around, log: Callable[[str], None]) -> int:
    """Every batch size in turn, in this process; the table so far after each."""
    from jmoe.serving.executors.inline import start_jax

    start_jax(args.platform, 1)
    from device_time import where

    from jmoe.colocated_timing import ColocatedTimer

    layers = args.layers or LAYERS[args.model]
    model = dataclasses.replace(models[args.model], num_layers=layers)
    read = read_bandwidth(args.platform, around)
    table, record = [HEADER], []
    for rows in args.tokens:
        log(f"{args.model}, {layers} layers, batch {rows}")
        cell = Cell(cell_of(args, model, rows), args.distinct_layers, log)
        result = {"read_bytes_per_s": read, "compile_s": cell.compile_s}
        result["step_s"] = cell.step_s(args.context, args.calls, around)
        log(f"{result['step_s'] * 1e3:.3f} ms a step; counting active experts")
        timer = ColocatedTimer(cell.many, args.context, around=around)
        result["active"] = float(timer.active_experts(MANY)[FEW:].mean())
        if args.stages:
            log("timing the stages alone")
            result |= dataclasses.asdict(timer.stages())
        record.append({"tokens": rows, **result})
        table.append(report(args, model, rows, result))
        print("\n".join(table))
        print(f"{where()}, context {args.context}, {model.dtype}, reads at {read / 1e12:.3f} TB/s\n", flush=True)
        cell.many.close()
        del cell, timer
        if args.json:
            with open(args.json, "w") as file:
                json.dump({"model": args.model, "layers": layers, "context": args.context, "cells": record}, file)
    print("decode_step: done")
    return 0
