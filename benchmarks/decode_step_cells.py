"""The cells of decode_step.py with transport "push": compiled, given weights, timed."""

import argparse
import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from jmoe.cell_config import CellConfig
from jmoe.config import ModelConfig
from jmoe.sharding.mesh_config import MeshConfig

KEY = ("decode", False)
PAGE_LEN = 16
Log = Callable[[str], None]


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
