"""`jmoe profile`: measures stage times over a grid on the GPUs at hand, for the planner to interpolate."""

import dataclasses
import datetime
from collections.abc import Callable, Sequence

import jax
import numpy as np

from jmoe.cell_config import CellConfig
from jmoe.cell_runtime import CellRuntime
from jmoe.config import RANDOM_WEIGHTS, ModelConfig
from jmoe.planner.measured_grid import Grid
from jmoe.planner.performance import Precision
from jmoe.planner.profile_file import Profile
from jmoe.sharding.mesh_config import MeshConfig
from jmoe.stage_timing import StageTimer

PAGE_LEN = 16


@dataclasses.dataclass(frozen=True)
class ProfileGrid:
    """Where to measure.

    Attributes:
      rows: requests of one micro-batch.
      context: KV tokens of each.
      num_local_experts: experts on one node; for each, `rows` tokens with the model's top-k among them.
      num_layers: layers of the model that is timed: weights of more than a few are needed only to leave the caches.
    """

    rows: Sequence[int]
    context: Sequence[int]
    num_local_experts: Sequence[int]
    num_layers: int = 4


def measure_profile(
    model: ModelConfig, name: str, gpu: str, grid: ProfileGrid, progress: Callable[[str], None]
) -> Profile:
    """Times attention, expert, exchange and head stages on two devices of this process, tensor size 1, random weights.

    Args:
      model: its facts; name: as `jmoe plan --model` will be given it.
      gpu: the hardware catalogue's name of these devices.
      grid: points.
      progress: gets a line a point.

    Raises:
      ValueError: fewer than two devices, or an empty axis.
    """
    model = dataclasses.replace(
        model, num_layers=grid.num_layers, dense_layers=(), dense_ffn_size=0,
        max_position=max(model.max_position, max(grid.context) + PAGE_LEN),
    )  # fmt: skip
    attention = np.zeros((1, len(grid.context), len(grid.rows)))
    head, exchange, num_bytes = np.zeros((1, len(grid.rows))), np.zeros(len(grid.rows)), []
    for j, rows in enumerate(grid.rows):
        timer = _timer(model, rows, grid.context[0])
        for i, context in enumerate(grid.context):
            timer = timer if i == 0 else _timer(model, rows, context)
            attention[0, i, j] = timer.attention_s()
            progress(f"attention, {rows} rows of {context} tokens: {attention[0, i, j] * 1e6:,.0f} us")
        head[0, j], exchange[j] = timer.head_s(), timer.exchange_s()
        num_bytes.append(timer.num_bytes)
        progress(f"exchange, {timer.num_bytes:,} bytes: {exchange[j] * 1e6:,.1f} us")
    pairs = [rows * model.num_experts_per_tok for rows in grid.rows]
    return Profile(
        gpu=gpu,
        device=jax.devices()[0].device_kind,
        date=datetime.date.today().isoformat(),
        versions={"jax": jax.__version__},
        model=name,
        precision=Precision(),
        grids={
            "attention_s": Grid({"tensor": (1,), "context": tuple(grid.context), "rows": tuple(grid.rows)}, attention),
            "expert_s": Grid(
                {"tensor": (1,), "num_local_experts": tuple(grid.num_local_experts), "rows": tuple(pairs)},
                _expert_times(model, grid, pairs, progress)[None],
            ),
            "exchange_s": Grid({"num_bytes": tuple(num_bytes)}, exchange),
            "head_s": Grid({"tensor": (1,), "rows": tuple(grid.rows)}, head),
        },
    )


def _expert_times(model: ModelConfig, grid: ProfileGrid, pairs: Sequence[int], progress) -> np.ndarray:
    """[num_local_experts, pairs] seconds; with fewer local experts than k a token makes fewer pairs."""
    times = np.zeros((len(grid.num_local_experts), len(pairs)))
    for i, held in enumerate(grid.num_local_experts):
        chosen = min(model.num_experts_per_tok, held)
        part = dataclasses.replace(model, num_experts=held, num_experts_per_tok=chosen)
        for j, count in enumerate(pairs):
            times[i, j] = _timer(part, max(1, count // chosen), PAGE_LEN).expert_s()
            progress(f"experts, {held} on the node, {count} (token, expert) pairs: {times[i, j] * 1e6:,.0f} us")
    return times


def _timer(model: ModelConfig, rows: int, context: int) -> StageTimer:
    max_len = context + PAGE_LEN
    cell = CellConfig(
        model, MeshConfig(1, 1, num_micro_batches=1).resolve(model.num_experts), rows=rows, chunk_len=PAGE_LEN,
        page_len=PAGE_LEN, num_pages=1 + rows * -(-max_len // PAGE_LEN), max_len=max_len,
    )  # fmt: skip
    runtime = CellRuntime(cell, jax.devices(), "inline")
    runtime.load(f"{RANDOM_WEIGHTS}0", lambda _: None)
    return StageTimer(runtime, context)
