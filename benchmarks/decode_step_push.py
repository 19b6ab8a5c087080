"""decode_step.py with transport "push": roles apart, in one process and in two, against colocated on the same GPUs.

The tick is a slope over layers, (step[L layers] - step[L / 2]) / (L / 2 x m), on the same weights, so that heads and
the pipeline's filling drop out; a step is a call's time over its steps, with two calls in flight. "plan us" is what the
planner's closed form says of the schedule that is built, from the stage times of the same run.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from jmoe.cell_config import CellConfig
from jmoe.config import ModelConfig
from jmoe.planner.formulas import layer_period
from jmoe.sharding.mesh_config import MeshConfig

KEY = ("decode", False)
PAGE_LEN = 16
Log = Callable[[str], None]
HEADER = (
    f"{'executor':>9} {'L':>3} {'tokens':>6} {'ctx':>5} {'m':>2} {'dirs':>8} {'T_a us':>7} {'T_e us':>7} {'T_c us':>6} "
    f"{'2-way':>6} {'head us':>7} {'tick us':>8} {'T_f/tick':>8} {'flr/tick':>8} {'excess':>6} {'plan us':>8} "
    f"{'off %':>6} {'step ms':>8} {'tokens/s':>9} {'comp s':>6}"
)
AGAINST = (
    f"{'batch':>6} {'ctx':>5} {'apart ms':>8} {'planned':>8} {'off %':>6} {'colocated ms':>12} {'planned':>8} "
    f"{'off %':>6} {'apart / colocated tokens/s':>26} {'planned':>8}"
)


def cell_of(args: argparse.Namespace, model: ModelConfig, mesh: MeshConfig, rows: int, context: int) -> CellConfig:
    """Pages for the context and one call's tokens: every call begins at the same place."""
    max_pages = -(-(context + args.num_steps + 1) // PAGE_LEN)
    lanes = mesh.num_micro_batches
    return CellConfig(
        model, mesh.resolve(model.num_experts, "push"), rows=rows, chunk_len=16, num_steps=args.num_steps,
        page_len=PAGE_LEN, num_pages=1 + lanes * rows * max_pages, max_len=max_pages * PAGE_LEN,
        num_top_logprobs=0,
    )  # fmt: skip


class Measured:
    """One cell, in full depth and in half, with the same weights: a runtime each, compiling since they were made."""

    def __init__(self, args: argparse.Namespace, cell: CellConfig, pool: ThreadPoolExecutor):
        import jax

        from jmoe.cell_runtime import CellRuntime
        from jmoe.role_pair import RolePair

        self.cell, self.args = cell, args
        half = dataclasses.replace(cell, model=dataclasses.replace(cell.model, num_layers=cell.model.num_layers // 2))
        cells = [cell] if cell.mesh.colocated else [cell, half]
        self.runtimes: list[Any] = [
            CellRuntime(c, jax.devices(), "colocated") if c.mesh.colocated else RolePair(c, jax.devices())
            for c in cells
        ]
        self._compiling = [pool.submit(self._compile, runtime) for runtime in self.runtimes]

    def _compile(self, runtime: Any) -> float:
        start = time.perf_counter()
        runtime.compile(KEY)
        return time.perf_counter() - start

    def adopt(self, weights: tuple[dict[str, Any], dict[str, Any]], context: int) -> None:
        """Takes the weights, and random pages: zeros draw less power and run faster than what a server reads."""
        from jmoe.colocated_timing import ColocatedTimer

        for runtime in self.runtimes:
            layers = {f"layers.{i}." for i in range(runtime.cell.model.num_layers)}
            runtime.adopt(*({p: a for p, a in part.items() if _belongs(p, layers)} for part in weights))
            ColocatedTimer(getattr(runtime, "attention", runtime), context).fill_pages()

    def wait(self) -> float:
        """Until both have compiled; seconds of the longer."""
        return max(future.result() for future in self._compiling)

    def step_s(self, context: int) -> list[float]:
        """Seconds of one step, full depth first."""
        from jmoe.decode_batch import decode_batch

        return [
            seconds_per_step(r.submit, r.collect, decode_batch(r.cell, context).array, self.args) for r in self.runtimes
        ]

    def close(self) -> None:
        """Frees the devices for the next cell."""
        for runtime in self.runtimes:
            runtime.close()


def _belongs(path: str, layers: set[str]) -> bool:
    return not path.startswith("layers.") or any(path.startswith(layer) for layer in layers)


def seconds_per_step(submit: Callable, collect: Callable, inputs: np.ndarray, args: argparse.Namespace) -> float:
    """Median over `args.calls` calls, two in flight, of a call's time over its steps; tokens must repeat bitwise."""
    first, times = None, []
    under_way = [submit(KEY, inputs) for _ in range(2)]
    last = time.perf_counter()
    for n in range(args.calls + 3):
        under_way.append(submit(KEY, inputs))
        tokens = collect(under_way.pop(0))["tokens"]
        now = time.perf_counter()
        times.append(now - last)
        last = now
        first = tokens if first is None else first
        if not (tokens >= 0).all() or not np.array_equal(tokens, first):
            raise RuntimeError(f"call {n}: expected a token from every row, the same in every call, got others")
    for call in under_way:
        collect(call)
    return float(np.median(times[3:])) / args.num_steps


def weights_of(cell: CellConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """(attention, experts), drawn on the devices that hold them."""
    import jax

    from jmoe.checkpoints.random_weights import RandomWeights
    from jmoe.device_params import DeviceParams
    from jmoe.sharding.meshes import program_mesh

    source, placed = RandomWeights(cell.model, 0), []
    for role in ("attention", "expert"):
        mesh = program_mesh(cell.mesh, jax.devices(), role)
        first = cell.mesh.program_devices(role).start
        placed.append(DeviceParams(cell, mesh, first).place(role, source, lambda _: None))
    return placed[0], placed[1]


def row_of(executor: str, cell: CellConfig, context: int, stages: dict, result: dict, floor_s: float) -> str:
    """One row of the table."""
    m, mesh = cell.mesh.num_micro_batches, cell.mesh
    layers = len(cell.model.moe_layers)
    a, e, c = (stages[name] for name in ("attention_s", "expert_s", "exchange_s"))
    both, tick = stages["exchange_both_s"], result["tick_s"]
    wire = both if mesh.directions == "both" else c
    planned = float(layer_period(mesh.directions, m, a, e, wire)) / m
    slowest = max(a, e, wire)
    return (
        f"{executor:>9} {layers:>3} {cell.rows:>6} {context:>5} {m:>2} {mesh.directions:>8} {a * 1e6:>7.1f} "
        f"{e * 1e6:>7.1f} {c * 1e6:>6.1f} {both * 1e6:>6.1f} {stages['head_s'] * 1e6:>7.1f} {tick * 1e6:>8.1f} "
        f"{slowest / tick:>8.3f} {floor_s / tick:>8.3f} {(tick - slowest) * 1e6:>6.1f} {planned * 1e6:>8.1f} "
        f"{100 * (planned / tick - 1):>+6.1f} {result['step_s'] * 1e3:>8.3f} "
        f"{mesh.attention * m * cell.rows / result['step_s']:>9,.0f} {result['compile_s']:>6.1f}"
    )


def in_processes(args: argparse.Namespace, cell: CellConfig, context: int, inline: dict, log: Log) -> dict:
    """The same cell, each role in a process of its own; its tick is inline's plus what its steps take more, by tick."""
    from jmoe.decode_batch import decode_batch
    from jmoe.serving.executors.processes import ProcessesExecutor
    from jmoe.serving.executors.protocol import ProgramKey

    start = time.perf_counter()
    executor = ProcessesExecutor(cell, "random:0", platform=args.platform, programs=[ProgramKey(*KEY)], progress=log)
    ready_s = time.perf_counter() - start
    try:
        inputs = decode_batch(cell, context)

        def collect(_: Any) -> dict[str, np.ndarray]:
            return {"tokens": executor.collect().tokens}

        def submit(key: Any, _: Any) -> None:
            executor.submit(ProgramKey(*key), inputs)

        step_s = seconds_per_step(submit, collect, inputs.array, args)
    finally:
        executor.close()
    ticks = len(cell.model.moe_layers) * cell.mesh.num_micro_batches
    return {
        "step_s": step_s, "compile_s": ready_s, "tick_s": inline["tick_s"] + (step_s - inline["step_s"]) / ticks,
    }  # fmt: skip


def planned_steps(args: argparse.Namespace, model: ModelConfig, m: int, rows: int, context: int) -> tuple[float, float]:
    """Seconds of a step as the planner's roofline has it: roles apart on two GPUs, and colocated on both."""
    import jax

    from jmoe.planner.baselines import Engine
    from jmoe.planner.deployment import Deployment, Problem
    from jmoe.planner.hardware import load_catalogue
    from jmoe.planner.model_shape import ModelShape
    from jmoe.planner.workload import Workload

    shape = ModelShape.from_config(model)
    kinds, one = load_catalogue(), np.array([1])
    name = "h200" if "H200" in jax.devices()[0].device_kind else "h100"
    gpu, problem = kinds[name], Problem(shape, kinds, {name: 2}, Workload((context,), (1,)))
    apart = Deployment(problem, gpu, gpu, 1, 1, m, "separate", one, one).step(np.array([rows]))
    beside = Engine(problem, gpu, "wide", 1, 1, 2, 2, 1).step(np.array([-(-m * rows // 2)]))
    return float(apart[0]), float(beside[0])


def measure(args: argparse.Namespace, models: dict[str, ModelConfig], floors: Callable, log: Log) -> int:
    """Every cell in turn, all of them compiling from the start; the tables so far after each."""
    from jmoe.serving.executors.inline import start_jax

    start_jax(args.platform, 2)
    from decode_step_colocated import LAYERS, read_bandwidth
    from device_time import where

    model = dataclasses.replace(models[args.model], num_layers=args.layers or LAYERS[args.model])
    contexts = args.contexts or [args.context]
    wanted = list(itertools.product(args.tokens, contexts, args.micro_batches))
    table, against, record = [HEADER], [AGAINST], []
    with ThreadPoolExecutor(8) as pool:
        mesh = {m: MeshConfig(1, 1, m, directions=args.directions, transport="push") for m in args.micro_batches}
        cells = {key: cell_of(args, model, mesh[key[2]], key[0], key[1]) for key in wanted}
        measured = {key: Measured(args, cell, pool) for key, cell in cells.items()}
        beside = {}
        if args.against_colocated:
            together = MeshConfig.colocate(2)
            batches = {key: -(-key[0] * key[2] // 2) for key in wanted}
            beside = {key: Measured(args, cell_of(args, model, together, batches[key], key[1]), pool) for key in wanted}
        weights, stages, read = weights_of(next(iter(cells.values()))), {}, 0.0
        log("weights are there")
        for one in (*measured.values(), *beside.values()):
            one.wait()  # a compiler beside it disturbs what is timed
        for key, cell in cells.items():
            rows, context, m = key
            one = measured[key]
            one.adopt(weights, context)
            result: dict[str, Any] = {"compile_s": one.wait()}
            read = read or read_bandwidth(args.platform, None)
            result["step_s"], half_s = one.step_s(context)
            layers = len(cell.model.moe_layers) - len(one.runtimes[1].cell.model.moe_layers)
            result["tick_s"] = (result["step_s"] - half_s) / (layers * m)
            log(f"{key}: {result['step_s'] * 1e3:.3f} ms a step")
            if key[:2] not in stages:
                from jmoe.stage_timing import time_stages

                stages[key[:2]] = dataclasses.asdict(time_stages(one.runtimes[0], context))
                log("stages timed alone")
            if args.timeline:
                from role_timeline import role_timeline

                from jmoe.decode_batch import decode_batch

                inputs = decode_batch(cell, context).array
                print(role_timeline(functools.partial(one.runtimes[0].run, KEY, inputs)), flush=True)
            if args.soak_s:
                from decode_soak import soak

                soak(one.runtimes[0], context, args.soak_s, log)
            one.close()
            floor = max(floors(cell, context)) / read
            table.append(row_of("inline", cell, context, stages[key[:2]], result, floor))
            record.append({"tokens": rows, "context": context, "micro_batches": m, **stages[key[:2]], **result})
            if "processes" in args.executors:
                apart = in_processes(args, cell, context, result, log)
                table.append(row_of("processes", cell, context, stages[key[:2]], apart, floor))
                record[-1]["processes"] = apart
            print("\n".join(table), flush=True)
        del weights
        if beside:
            weights = weights_of(next(iter(beside.values())).cell)
        for key, other in beside.items():
            rows, context, m = key
            other.adopt(weights, context)
            other.wait()
            step_s = record[wanted.index(key)]["step_s"]
            (colocated_s,) = other.step_s(context)
            other.close()
            planned, planned_colocated = planned_steps(args, model, m, rows, context)
            batch = other.cell.mesh.attention * other.cell.rows
            record[wanted.index(key)] |= {"colocated_step_s": colocated_s, "planned": [planned, planned_colocated]}
            against.append(
                f"{batch:>6} {context:>5} {step_s * 1e3:>8.3f} {planned * 1e3:>8.3f} "
                f"{100 * (planned / step_s - 1):>+6.1f} {colocated_s * 1e3:>12.3f} {planned_colocated * 1e3:>8.3f} "
                f"{100 * (planned_colocated / colocated_s - 1):>+6.1f} {colocated_s / step_s:>26.3f} "
                f"{planned_colocated / planned:>8.3f}"
            )
            print("\n".join(against), flush=True)
    print(f"{where()}, {args.model}, {model.dtype}, reads at {read / 1e12:.3f} TB/s")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"model": args.model, "layers": model.num_layers, "cells": record}, file, indent=1)
    print("decode_step: done")
    return 0
