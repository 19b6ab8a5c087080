"""The proof of the whole: greedy tokens equal the single-device reference's, whatever the meshes and micro-batches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cell_driver import generate, pages_of
from small_models import AWKWARD, EVEN, random_model, random_prompts, reference_tokens, source_of

import jmoe.role_programs as role_programs
from jmoe.cell_config import CellConfig
from jmoe.cell_runtime import CellRuntime
from jmoe.errors import SequenceMismatchError
from jmoe.sharding.mesh_config import MeshConfig
from jmoe.sharding.placement import ExpertPlacement

MAX_TOKENS = 18


def cell_of(config, mesh: MeshConfig, num_prompts: int = 7, **sizes) -> CellConfig:
    lanes = mesh.attention * mesh.num_micro_batches
    sizes = {"chunk_len": 8, "num_steps": 4, "page_len": 4, "num_pages": 120, "max_len": 64} | sizes
    return CellConfig(config, mesh.resolve(config.num_experts), rows=-(-num_prompts // lanes), **sizes)


def runtime_of(cell: CellConfig, model=None) -> CellRuntime:
    runtime = CellRuntime(cell, jax.devices(), "inline")
    runtime.load(source_of(model or random_model(cell.model)), lambda _: None)
    return runtime


def tokens_of(cell: CellConfig, prompts, model=None):
    runtime = runtime_of(cell, model)
    runtime.compile(("prefill", False), ("decode", False))
    return generate(runtime.run, cell, prompts, MAX_TOKENS)[0]


MESHES = [(m, n, b) for m, n in ((1, 1), (2, 2), (3, 5), (2, 1), (1, 4)) for b in (1, 2, 3, 4)]
OTHERS = {
    "attention tensor 2": (EVEN, MeshConfig(2, 2, attention_tensor=2)),
    "attention tensor 4, KV heads replicated": (EVEN, MeshConfig(1, 2, attention_tensor=4)),
    "expert tensor 2": (EVEN, MeshConfig(1, 2, 3, expert_tensor=2)),
    "tensor 2 on both": (EVEN, MeshConfig(2, 2, 4, attention_tensor=2, expert_tensor=2)),
    "tensor 3 and 2: slices of a sixth": (AWKWARD, MeshConfig(1, 2, attention_tensor=3, expert_tensor=2)),
    "two experts replicated": (AWKWARD, MeshConfig(2, 3, placement=ExpertPlacement(((0, 1, 5), (2, 3, 0), (4, 5))))),
    "experts out of order": (AWKWARD, MeshConfig(1, 2, placement=ExpertPlacement(((5, 0, 3), (1, 4, 2))))),
    "m = 6": (AWKWARD, MeshConfig(1, 2, 6)),
    "m = 4, one direction an exchange": (AWKWARD, MeshConfig(2, 1, 4, directions="one")),
    "m = 3, lockstep": (AWKWARD, MeshConfig(1, 2, 3, directions="both")),
}


@pytest.mark.parametrize(("attention", "expert", "num_micro_batches"), MESHES)
def test_tokens_equal_the_reference(attention, expert, num_micro_batches):
    prompts = random_prompts(AWKWARD)
    cell = cell_of(AWKWARD, MeshConfig(attention, expert, num_micro_batches))
    assert tokens_of(cell, prompts) == reference_tokens(AWKWARD, prompts, MAX_TOKENS)


@pytest.mark.parametrize("name", OTHERS)
def test_tokens_equal_the_reference_with(name):
    config, mesh = OTHERS[name]
    prompts = random_prompts(config)
    assert tokens_of(cell_of(config, mesh), prompts) == reference_tokens(config, prompts, MAX_TOKENS)


def test_neighbours_and_pages_do_not_matter():
    """A request alone gives what it gives among six others, in a slot whose pages others used before."""
    prompts = random_prompts(AWKWARD)
    cell = cell_of(AWKWARD, MeshConfig(1, 2, 2))
    runtime = runtime_of(cell)
    together, _ = generate(runtime.run, cell, prompts, MAX_TOKENS)
    alone, _ = generate(runtime.run, cell, prompts[1:2], MAX_TOKENS)
    assert alone == together[1:2]


def test_a_stop_token_ends_a_row_and_not_its_neighbours():
    prompts = random_prompts(AWKWARD)
    want = reference_tokens(AWKWARD, prompts, MAX_TOKENS)
    stop = want[0][5]
    cell = cell_of(AWKWARD, MeshConfig(1, 1, 2))
    runtime = runtime_of(cell)
    got, _ = generate(runtime.run, cell, prompts, MAX_TOKENS, stop=(stop,))
    assert got == [tokens[: tokens.index(stop) + 1] if stop in tokens else tokens for tokens in want]


def test_bounded_capacity_is_counted(monkeypatch):
    """With room for fewer rows than are sent, rows are dropped, and the count says how many."""
    cell = cell_of(AWKWARD, MeshConfig(1, 2, 1))
    route_rows = role_programs.route_rows

    def cramped(topk_idx, topk_weights, valid, spread, placement, capacity):
        routes = route_rows(topk_idx, topk_weights, valid, spread, placement, capacity)
        few = jnp.minimum(routes.num_rows, 2)
        position = jnp.where(routes.position < 2, routes.position, -1)
        return dataclasses.replace(
            routes, num_rows=few, position=position, num_dropped=jnp.sum(routes.num_rows - few)
        )

    monkeypatch.setattr(role_programs, "route_rows", cramped)
    _, results = generate(runtime_of(cell).run, cell, random_prompts(AWKWARD), 2)
    assert sum(r["dropped_rows"] for r in results) > 0


# Sabotage: each of these must turn the comparison red, or it proves nothing.


def test_sabotage_swapped_experts():
    """The placement says (1, 0, 2) but the weights stand as (0, 1, 2): two experts answer for each other."""
    prompts = random_prompts(AWKWARD)
    model = random_model(AWKWARD)
    attention, experts = model.arrays_by_path()
    swapped = {path: array[np.array([1, 0, 2, 3, 4, 5])] for path, array in experts.items()}
    wrong = type(model).from_arrays(AWKWARD, attention, swapped)
    got = tokens_of(cell_of(AWKWARD, MeshConfig(1, 2, 2)), prompts, wrong)
    assert got != reference_tokens(AWKWARD, prompts, MAX_TOKENS)


def _tokens_with_routes(monkeypatch, change):
    route_rows = role_programs.route_rows
    monkeypatch.setattr(role_programs, "route_rows", lambda *args: change(route_rows(*args)))
    return tokens_of(cell_of(AWKWARD, MeshConfig(1, 2, 2)), random_prompts(AWKWARD))


def test_sabotage_dropped_row(monkeypatch):
    got = _tokens_with_routes(
        monkeypatch, lambda r: dataclasses.replace(r, position=jnp.where(r.position == 1, -1, r.position))
    )
    assert got != reference_tokens(AWKWARD, random_prompts(AWKWARD), MAX_TOKENS)


def test_sabotage_ignored_weight(monkeypatch):
    got = _tokens_with_routes(
        monkeypatch, lambda r: dataclasses.replace(r, topk_weights=r.topk_weights.at[..., 0].set(1.0))
    )
    assert got != reference_tokens(AWKWARD, random_prompts(AWKWARD), MAX_TOKENS)


@pytest.mark.parametrize("device", [0, 1])
def test_an_exchange_out_of_step_is_an_error(device):
    cell = cell_of(AWKWARD, MeshConfig(1, 1, 2))
    runtime = runtime_of(cell)
    prompts = random_prompts(AWKWARD)
    generate(runtime.run, cell, prompts[:1], 2)
    runtime.set_sequence(device, 12345)
    with pytest.raises(SequenceMismatchError, match=r"expected .* got"):
        generate(runtime.run, cell, prompts[:1], 2)


def test_pages_of_the_driver_are_disjoint():
    cell = cell_of(AWKWARD, MeshConfig(2, 1, 2))
    per_replica = [np.concatenate([pages_of(cell, n) for n in range(7) if n % 2 == r]) for r in range(2)]
    assert all(len(set(p)) == len(p) and 0 not in p for p in per_replica)
