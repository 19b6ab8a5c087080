"""Both roles on the same devices: greedy tokens equal the single-device reference's, and so the two meshes'."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from cell_driver import generate
from small_models import AWKWARD, EVEN, random_model, random_prompts, reference_tokens, source_of

from jmoe.cell_config import CellConfig
from jmoe.cell_runtime import CellRuntime
from jmoe.decode_loop import CellProgram
from jmoe.sharding.mesh_config import MeshConfig
from jmoe.sharding.placement import ExpertPlacement
from jmoe.sharding.shared_devices import SharedDevices

MAX_TOKENS = 12
REPLICAS = ExpertPlacement(((0, 1, 5), (2, 3, 0), (4, 5)))
MESHES = {
    "one device": (AWKWARD, MeshConfig.colocate(1)),
    "two devices": (AWKWARD, MeshConfig.colocate(2)),
    "three devices, m = 2, uneven nodes": (
        AWKWARD, MeshConfig.colocate(3, num_micro_batches=2, placement=ExpertPlacement(((1, 0, 4), (5,), (2, 3))))
    ),
    "three devices, two experts replicated": (AWKWARD, MeshConfig.colocate(3, placement=REPLICAS)),
    "tensor 2": (EVEN, MeshConfig.colocate(2, tensor=2, num_micro_batches=2)),
    "two replicas of tensor 2, four expert nodes": (EVEN, MeshConfig(2, 4, 1, attention_tensor=2, colocated=True)),
    "four replicas, two expert nodes of tensor 2": (EVEN, MeshConfig(4, 2, 1, expert_tensor=2, colocated=True)),
}  # fmt: skip


def cell_of(config, mesh: MeshConfig, num_prompts: int = 7) -> CellConfig:
    lanes = mesh.attention * mesh.num_micro_batches
    return CellConfig(
        config, mesh.resolve(config.num_experts), rows=-(-num_prompts // lanes),
        chunk_len=8, num_steps=4, page_len=4, num_pages=120, max_len=64,
    )  # fmt: skip


@functools.cache
def compiled_runtime(cell: CellConfig) -> CellRuntime:
    """Kept for the tests of the same cell, programs and all."""
    return CellRuntime(cell, jax.devices(), "colocated")


def tokens_of(config, mesh: MeshConfig, model=None, *, anew: bool = False):
    """`anew` where a test changes what is traced."""
    cell = cell_of(config, mesh)
    runtime = CellRuntime(cell, jax.devices(), "colocated") if anew else compiled_runtime(cell)
    runtime.load(source_of(model or random_model(config)), lambda _: None)
    runtime.compile(("prefill", False), ("decode", False))
    return generate(runtime.run, cell, random_prompts(config), MAX_TOKENS)[0]


@pytest.mark.parametrize("name", MESHES)
def test_tokens_equal_the_reference(name):
    config, mesh = MESHES[name]
    assert tokens_of(config, mesh) == reference_tokens(config, random_prompts(config), MAX_TOKENS)


# Sabotage: each of these must turn the comparison red, or it proves nothing.


def test_sabotage_swapped_experts():
    config, mesh = MESHES["three devices, m = 2, uneven nodes"]
    model = random_model(config)
    attention, experts = model.arrays_by_path()
    swapped = {path: array[np.array([1, 0, 2, 3, 4, 5])] for path, array in experts.items()}
    got = tokens_of(config, mesh, type(model).from_arrays(config, attention, swapped))
    assert got != reference_tokens(config, random_prompts(config), MAX_TOKENS)


def test_sabotage_sums_of_another_replica(monkeypatch):
    combine = SharedDevices.combine
    monkeypatch.setattr(SharedDevices, "combine", lambda self, sums, dtype: combine(self, sums[::-1], dtype))
    config, mesh = MESHES["two devices"]
    assert tokens_of(config, mesh, anew=True) != reference_tokens(config, random_prompts(config), MAX_TOKENS)


def test_sampling_programs_run_colocated():
    """Their tokens at temperature 0 are the greedy program's; log-probabilities come along."""
    cell = cell_of(AWKWARD, MeshConfig.colocate(2))
    runtime = CellRuntime(cell, jax.devices(), "colocated")
    runtime.load(source_of(random_model(AWKWARD)), lambda _: None)
    got, results = generate(runtime.run, cell, random_prompts(AWKWARD), MAX_TOKENS, sampling=True)
    assert got == reference_tokens(AWKWARD, random_prompts(AWKWARD), MAX_TOKENS)
    assert all(np.isfinite(result["logprobs"]).all() for result in results)


def test_roles_that_need_different_numbers_of_devices_are_refused():
    with pytest.raises(ValueError, match=r"colocated: expected as many expert devices .* 2 x 1, got 3 x 1"):
        MeshConfig(2, 3, colocated=True)
    with pytest.raises(ValueError, match=r"tensor size that divides .* got 3 devices and tensor 2"):
        MeshConfig.colocate(3, tensor=2)
    with pytest.raises(ValueError, match=r"6 experts\), got 7 nodes"):
        MeshConfig.colocate(7).resolve(6)


def test_a_hidden_size_that_the_ranks_cannot_share_is_refused():
    with pytest.raises(ValueError, match=r"multiple of 5 \(attention_tensor\), got 48"):
        SharedDevices.of(MeshConfig.colocate(5, tensor=5), 48)


@pytest.mark.parametrize(("mesh", "role"), [(MeshConfig(), "colocated"), (MeshConfig.colocate(1), "inline")])
def test_a_role_that_the_mesh_does_not_have_is_refused(mesh, role):
    cell = cell_of(AWKWARD, mesh)
    with pytest.raises(ValueError, match="expected 'colocated' if"):
        CellProgram(cell, "decode", False, role)


def test_a_colocated_cell_takes_a_trip_through_the_command_stream():
    cell = cell_of(AWKWARD, MeshConfig.colocate(3, placement=REPLICAS))
    assert CellConfig.from_dict(cell.to_dict()) == cell
    assert dataclasses.replace(cell.mesh, colocated=False).num_devices == 2 * cell.mesh.num_devices
