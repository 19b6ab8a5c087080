"""decode_step.py with transport "push": roles apart, in one process and in several, against colocated on the same GPUs.

The tick is a slope over layers, (step[L layers] - step[L / 2]) / (L / 2 x m), on the same weights, so that heads and
the pipeline's filling drop out; a step is a call's time over its steps, with two calls in flight. "plan us" is what the
planner's closed form says of the schedule that is built, from the stage times of the same run.
"""

import argparse
import dataclasses
import functools
import itertools
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from decode_step_cells import KEY, Log, Measured, cell_of, in_processes, weights_of

from jmoe.cell_config import CellConfig
from jmoe.config import ModelConfig
from jmoe.planner.formulas import layer_period
from jmoe.sharding.mesh_config import MeshConfig

HEADER = (
    f"{'executor':>9} {'L':>3} {'tokens':>6} {'ctx':>5} {'m':>2} {'dirs':>8} {'T_a us':>7} {'T_e us':>7} {'T_c us':>6} "
    f"{'2-way':>6} {'head us':>7} {'tick us':>8} {'T_f/tick':>8} {'flr/tick':>8} {'excess':>6} {'plan us':>8} "
    f"{'off %':>6} {'step ms':>8} {'tokens/s':>9} {'comp s':>6}"
)
AGAINST = (
    f"{'batch':>6} {'ctx':>5} {'apart ms':>8} {'planned':>8} {'off %':>6} {'colocated ms':>12} {'planned':>8} "
    f"{'off %':>6} {'apart / colocated tokens/s':>26} {'planned':>8}"
)


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


def planned_steps(cell: CellConfig, context: int) -> tuple[float, float]:
    """Seconds of a step as the planner's roofline has it: roles apart, and colocated on as many GPUs."""
    import jax

    from jmoe.planner.baselines import Engine
    from jmoe.planner.deployment import Deployment, Problem
    from jmoe.planner.hardware import load_catalogue
    from jmoe.planner.model_shape import ModelShape
    from jmoe.planner.workload import Workload

    mesh, kinds = cell.mesh, load_catalogue()
    name = "h200" if "H200" in jax.devices()[0].device_kind else "h100"
    gpu, gpus = kinds[name], mesh.num_devices
    problem = Problem(ModelShape.from_config(cell.model), kinds, {name: gpus}, Workload((context,), (1,)))
    apart = Deployment(
        problem, gpu, gpu, mesh.attention_tensor, mesh.expert_tensor, mesh.num_micro_batches, mesh.directions,
        np.array([mesh.attention]), np.array([mesh.expert]),
    ).step(np.array([cell.rows]))  # fmt: skip
    beside = Engine(problem, gpu, "wide", 1, 1, gpus, gpus, 1).step(np.array([_share(cell, gpus)]))
    return float(apart[0]), float(beside[0])


def _share(cell: CellConfig, num_gpus: int) -> int:
    """Rows of each of so many colocated GPUs for the same batch."""
    return -(-cell.mesh.attention * cell.mesh.num_micro_batches * cell.rows // num_gpus)


def mesh_of(args: argparse.Namespace, num_micro_batches: int) -> MeshConfig:
    """Any number of devices a role."""
    return MeshConfig(
        args.attention, args.expert, num_micro_batches, attention_tensor=args.attention_tensor,
        expert_tensor=args.expert_tensor, directions=args.directions, transport="push",
    )  # fmt: skip


Case = tuple[int, int, int]  # (tokens of a micro-batch, context, m)


class Sweep:
    """Every cell in turn, all of them compiling from the start; the tables so far after each.

    Args:
      args: what to measure.
      model: cut to the layers that fit.
      floors: (cell, context) -> bytes that an attention and an expert stage must read.
      log: gets lines.
    """

    def __init__(self, args: argparse.Namespace, model: ModelConfig, floors: Callable, log: Log):
        from decode_step_colocated import read_bandwidth

        self.args, self.model, self.log, self._floors = args, model, log, floors
        wanted = itertools.product(args.tokens, args.contexts or [args.context], args.micro_batches)
        self.cells = {case: cell_of(args, model, mesh_of(args, case[2]), case[0], case[1]) for case in wanted}
        self.read = read_bandwidth(args.platform, None)
        self.record: dict[Case, dict[str, Any]] = {}
        self._table, self._against = [HEADER], [AGAINST]
        self._stages: dict[tuple[int, int], dict[str, float]] = {}

    def run(self) -> None:
        """Measures everything."""
        with ThreadPoolExecutor(8) as pool:
            apart = {case: Measured(self.args, cell, pool) for case, cell in self.cells.items()}
            beside = {case: Measured(self.args, self._beside(case), pool) for case in self._compared()}
            weights = weights_of(next(iter(self.cells.values())))
            self.log("weights are there")
            for one in (*apart.values(), *beside.values()):
                one.wait()  # a compiler beside it disturbs what is timed
            for case, one in apart.items():
                one.adopt(weights, case[1])
                self._measure_apart(case, one)
            del weights
            weights = weights_of(next(iter(beside.values())).cell) if beside else ({}, {})
            for case, one in beside.items():
                one.adopt(weights, case[1])
                self._measure_beside(case, one)

    def _compared(self) -> list[Case]:
        return list(self.cells) if self.args.against_colocated else []

    def _beside(self, case: Case) -> CellConfig:
        """Both roles on each of the same devices, the same batch."""
        cell = self.cells[case]
        together = MeshConfig.colocate(cell.mesh.num_devices)
        return cell_of(self.args, self.model, together, _share(cell, cell.mesh.num_devices), case[1])

    def _measure_apart(self, case: Case, one: Measured) -> None:
        rows, context, m = case
        result: dict[str, Any] = {"compile_s": one.wait()}
        result["step_s"], half_s = one.step_s(context)
        layers = len(one.cell.model.moe_layers) - len(one.runtimes[1].cell.model.moe_layers)
        result["tick_s"] = (result["step_s"] - half_s) / (layers * m)
        self.log(f"{case}: {result['step_s'] * 1e3:.3f} ms a step")
        if case[:2] not in self._stages:
            from jmoe.stage_timing import time_stages

            self._stages[case[:2]] = dataclasses.asdict(time_stages(one.runtimes[0], context))
            self.log("stages timed alone")
        self._look_closer(one.runtimes[0], context)
        one.close()
        self.record[case] = {"tokens": rows, "context": context, "micro_batches": m, **self._stages[case[:2]], **result}
        self._add_row("inline", case, result)
        if "processes" in self.args.executors:
            apart = in_processes(self.args, one.cell, context, result, self.log)
            self.record[case]["processes"] = apart
            self._add_row("processes", case, apart)
        print("\n".join(self._table), flush=True)

    def _add_row(self, executor: str, case: Case, result: dict[str, Any]) -> None:
        cell, context = self.cells[case], case[1]
        floor_s = max(self._floors(cell, context)) / self.read
        self._table.append(row_of(executor, cell, context, self._stages[case[:2]], result, floor_s))

    def _look_closer(self, runtime: Any, context: int) -> None:
        """A tick's kernels, a soak: where they were asked for."""
        if self.args.timeline:
            from role_timeline import role_timeline

            from jmoe.decode_batch import decode_batch

            inputs = decode_batch(runtime.cell, context).array
            print(role_timeline(functools.partial(runtime.run, KEY, inputs)), flush=True)
        if self.args.soak_s:
            from decode_soak import soak

            soak(runtime, context, self.args.soak_s, self.log)

    def _measure_beside(self, case: Case, one: Measured) -> None:
        step_s = self.record[case]["step_s"]
        (colocated_s,) = one.step_s(case[1])
        one.close()
        planned, planned_colocated = planned_steps(self.cells[case], case[1])
        self.record[case] |= {"colocated_step_s": colocated_s, "planned": [planned, planned_colocated]}
        self._against.append(
            f"{one.cell.mesh.attention * one.cell.rows:>6} {case[1]:>5} {step_s * 1e3:>8.3f} {planned * 1e3:>8.3f} "
            f"{100 * (planned / step_s - 1):>+6.1f} {colocated_s * 1e3:>12.3f} {planned_colocated * 1e3:>8.3f} "
            f"{100 * (planned_colocated / colocated_s - 1):>+6.1f} {colocated_s / step_s:>26.3f} "
            f"{planned_colocated / planned:>8.3f}"
        )
        print("\n".join(self._against), flush=True)


def measure(args: argparse.Namespace, models: dict[str, ModelConfig], floors: Callable, log: Log) -> int:
    """Every cell that the options name; tables, and figures as JSON where a file was named."""
    from jmoe.serving.executors.inline import start_jax
    from jmoe.serving.transport import choose_transport

    mesh = mesh_of(args, args.micro_batches[0])
    choose_transport(mesh, args.platform, "inline")  # ValueError where rows can't be pushed
    if args.platform == "cpu" and args.executors:
        log(f"without {', '.join(args.executors)}: on CPU rows can't be pushed between processes")
        args.executors = []
    start_jax(args.platform, mesh.num_devices)
    from decode_step_colocated import LAYERS
    from device_time import where

    model = dataclasses.replace(models[args.model], num_layers=args.layers or LAYERS[args.model])
    sweep = Sweep(args, model, floors, log)
    sweep.run()
    print(f"{where()}, {args.model}, {model.dtype}, reads at {sweep.read / 1e12:.3f} TB/s")
    if args.json:
        with open(args.json, "w") as file:
            cells = [*sweep.record.values()]
            json.dump({"model": args.model, "layers": model.num_layers, "cells": cells}, file, indent=1)
    print("decode_step: done")
    return 0
