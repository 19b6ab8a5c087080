"""The compiled K-step call: nothing read or written by the host inside it, and no weight copied."""

import dataclasses
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_plan import computations, faults
from imaginary_gpus import imaginary_gpus
from jax.sharding import Mesh

from jmoe.cell_config import CellConfig
from jmoe.config import ModelConfig
from jmoe.lowering import AbstractCell, lower_program
from jmoe.pallas_kernels import choice
from jmoe.schedule import build_schedule
from jmoe.sharding.mesh_config import AXIS, MeshConfig
from jmoe.sharding.meshes import program_mesh

# Mixtral-8x7B's layers; 37 pages more than needed, so that no gathered array has the size of a page pool.
MODEL = ModelConfig("mixtral", 32000, 4096, 2, 32, 8, 128, 8, 2, 14336)
BY_NAME = {"bfloat16": "bf16", "float32": "f32", "int32": "s32", "bool": "pred"}


PLANS = [(role, 4, "ppermute") for role in ("attention", "expert", "inline")]
PLANS += [(role, 3, "push") for role in ("attention", "expert")]  # of `processes` and of `inline` alike


def cell_of(num_micro_batches: int, transport: str = "ppermute") -> CellConfig:
    return cell_on(MeshConfig(1, 1, num_micro_batches, transport=transport))  # type: ignore[arg-type]


def cell_on(mesh: MeshConfig) -> CellConfig:
    rows, max_len = 128, 1056
    num_pages = 38 + rows * mesh.num_micro_batches * (max_len // 16)
    mesh = mesh.resolve(MODEL.num_experts)
    return CellConfig(MODEL, mesh, rows=rows, chunk_len=128, num_steps=4, num_pages=num_pages, max_len=max_len)


def forbidden_sizes(cell: CellConfig, mesh: Mesh) -> set[tuple[str, int]]:
    """Of every weight matrix and page pool on one device."""
    whole = dataclasses.replace(cell, mesh=dataclasses.replace(cell.mesh, transport="ppermute", directions="one"))
    abstract = AbstractCell(whole, mesh, "colocated" if cell.mesh.colocated else "inline")
    attention, experts = abstract.params()
    shapes = [*attention.values(), *experts.values()]
    sizes = {(BY_NAME[str(a.dtype)], math.prod(a.shape[1:])) for a in shapes if math.prod(a.shape) > 1 << 20}
    return sizes | {("bf16", math.prod(abstract.page_shape()))}


@pytest.fixture(scope="module")
def imaginary_mesh():
    """Two GPUs that are not there."""
    return Mesh(np.array(imaginary_gpus(2)), (AXIS,))


@pytest.mark.aot
@pytest.mark.parametrize(("role", "num_micro_batches", "transport"), PLANS)
def test_plan_ahead_of_time(imaginary_mesh, role, num_micro_batches, transport):
    """With "push" a role's program stands over its own GPU: no conditional, no collective, one kernel a stage."""
    cell = cell_of(num_micro_batches, transport)
    mesh = program_mesh(cell.mesh, list(imaginary_mesh.devices), role)
    text = lower_program(cell, mesh, role, ("decode", False)).compile().as_text()
    found = faults(text, forbidden_sizes(cell, mesh), conditionals=(role, transport) == ("inline", "ppermute"))
    assert not found
    if transport == "ppermute":
        assert "collective-permute" in text
        return
    assert mesh.devices.size == 1 and not any(f" {word}" in text for word in COLLECTIVES)
    pushes = sum(" custom-call(" in line and "push_rows" in line for line in text.splitlines())
    ticks = build_schedule(len(MODEL.moe_layers), num_micro_batches, "separate").ticks_of(role)
    assert pushes == sum(tick.exchange is not None for tick in ticks)


COLLECTIVES = ("collective-permute", "all-gather", "all-to-all", "all-reduce")
COLOCATED = {
    "one device": (MeshConfig.colocate(1), ()),
    "expert parallel": (MeshConfig.colocate(2), ("all-gather", "all-to-all")),
    "tensor parallel, m = 2": (MeshConfig.colocate(2, tensor=2, num_micro_batches=2), ("all-reduce",)),
}


@pytest.mark.aot
@pytest.mark.parametrize("name", COLOCATED)
def test_plan_of_a_colocated_cell(imaginary_mesh, name):
    """Nothing moves between meshes, nothing is conditional; on one device there is no collective at all."""
    mesh, collectives = COLOCATED[name]
    cell = cell_on(mesh)
    devices = Mesh(imaginary_mesh.devices[: mesh.num_devices], (AXIS,))
    text = lower_program(cell, devices, "colocated", ("decode", False)).compile().as_text()
    found = {word for word in COLLECTIVES if f" {word}" in text}
    assert found >= set(collectives) and "collective-permute" not in found and (collectives or not found)
    assert not faults(text, forbidden_sizes(cell, devices))


@pytest.mark.aot
def test_plan_of_a_colocated_cell_on_hopper(imaginary_mesh, monkeypatch):
    """The few kernels: none that only adds partial sums up, no weight copied or joined with another, no logits."""
    monkeypatch.setattr(choice, "has_hopper", lambda: True)
    cell = cell_on(MeshConfig.colocate(1))
    cell = dataclasses.replace(cell, model=dataclasses.replace(MODEL, num_layers=3))
    devices = Mesh(imaginary_mesh.devices[:1], (AXIS,))
    text = lower_program(cell, devices, "colocated", ("decode", False)).compile().as_text()
    assert not faults(text, forbidden_sizes(cell, devices))
    kernels = text.count('custom_call_target="mosaic_gpu')
    assert kernels == 3 * 8 + 2 + 1, "residual_norm before the projections of all layers but the first, and the head"
    assert f"f32[{cell.rows},{MODEL.vocab_size}]" not in text


@pytest.mark.aot
def test_no_kernel_of_a_prefill_gets_a_slice(imaginary_mesh, monkeypatch):
    """A Mosaic kernel refuses operands off a multiple of 256 bytes: no address within the packed inputs will do."""
    monkeypatch.setattr(choice, "has_hopper", lambda: True)
    # A page table of 128 pages: XLA takes a slice whose size, not whose start, is a multiple of 128 bytes.
    cell = dataclasses.replace(cell_on(MeshConfig.colocate(1)), kernels="pallas", max_len=2048)
    devices = Mesh(imaginary_mesh.devices[:1], (AXIS,))
    text = lower_program(cell, devices, "colocated", ("prefill", False)).compile().as_text()
    holding = [n for n, lines in computations(text).items() if any('target="mosaic_gpu' in line for line in lines)]
    assert holding and not [name for name in holding if "slice" in name]


@pytest.mark.aot
def test_a_copied_weight_is_found(imaginary_mesh):
    """Sabotage: a scan over stacked weights copies each layer's slice."""
    device = jax.sharding.SingleDeviceSharding(imaginary_mesh.devices.flat[0])
    stacked = jax.ShapeDtypeStruct((4, 4096, 4096), jnp.bfloat16, sharding=device)
    x = jax.ShapeDtypeStruct((128, 4096), jnp.bfloat16, sharding=device)

    def run(x, stacked):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stacked)[0]

    text = jax.jit(run).lower(x, stacked).compile().as_text()
    assert any("moves a weight" in fault for fault in faults(text, {("bf16", 4096 * 4096)}))


@pytest.mark.aot
def test_a_loop_without_a_known_count_is_found(imaginary_mesh):
    """Sabotage: a loop that ends when a value says so reads it on the host."""
    device = jax.sharding.SingleDeviceSharding(imaginary_mesh.devices.flat[0])
    x = jax.ShapeDtypeStruct((128,), jnp.float32, sharding=device)
    text = jax.jit(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x * 2, x)).lower(x).compile().as_text()
    assert any("loop predicate" in fault for fault in faults(text, set()))


@pytest.mark.gpu
@pytest.mark.parametrize(("role", "num_micro_batches", "transport"), PLANS[2:])
def test_plan_on_gpu(role, num_micro_batches, transport):
    """The same on the plan that the GPU at hand really gets, autotuned."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if len(jax.devices("cuda")) < 2:
        pytest.skip("needs two GPUs")
    cell = cell_of(num_micro_batches, transport)
    mesh = program_mesh(cell.mesh, jax.devices("cuda"), role)
    text = lower_program(cell, mesh, role, ("decode", False)).compile().as_text()
    assert not faults(text, forbidden_sizes(cell, mesh), conditionals=role == "inline")
