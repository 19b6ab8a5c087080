"""Orbax: one checkpoint into two meshes, one role alone, and back to the same logits."""

import jax
import numpy as np
import pytest
from small_models import AWKWARD, EVEN, random_model

from jmoe.checkpoints.orbax_io import restore_orbax, role_mesh, save_orbax
from jmoe.models.model import Model
from jmoe.sharding.mesh_config import MeshConfig


def same(restored, expected) -> bool:
    return restored.keys() == expected.keys() and all(
        np.array_equal(np.asarray(restored[path]), np.asarray(expected[path])) for path in expected
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("orbax") / "checkpoint"
    model = random_model(EVEN)
    save_orbax(folder, EVEN, *model.arrays_by_path())
    return folder, model.arrays_by_path()


def test_two_meshes_in_one_call(saved):
    folder, (attention, experts) = saved
    mesh = MeshConfig(attention=2, attention_tensor=2, expert=3, expert_tensor=2)
    devices = jax.devices()
    halves = [role_mesh(mesh, devices, role) for role in ("attention", "expert")]
    restored = restore_orbax(folder, attention=halves[0], experts=halves[1])
    assert restored.config == EVEN
    assert same(restored.attention, attention)
    assert same(restored.experts, experts)
    for arrays, held in ((restored.attention, devices[:4]), (restored.experts, devices[4:10])):
        assert all(array.sharding.device_set == set(held) for array in arrays.values())
    # Shards, not copies: 8 query heads over 2 ranks, 6 experts over 3 nodes, 40 columns over 2 ranks.
    assert restored.attention["layers.0.q_proj"].addressable_shards[0].data.shape == (48, 4, 16)
    assert restored.experts["layers.0.gate_proj"].addressable_shards[0].data.shape == (2, 48, 20)
    assert restored.attention["embed"].addressable_shards[0].data.shape == (131, 48)  # 2 does not divide 131


@pytest.mark.parametrize("role", ["attention", "expert"])
def test_one_role_alone(saved, role):
    folder, (attention, experts) = saved
    mesh = role_mesh(MeshConfig(attention=1, expert=2), jax.devices(), role)
    restored = restore_orbax(folder, **{"attention" if role == "attention" else "experts": mesh})
    if role == "attention":
        assert restored.experts is None
        assert same(restored.attention, attention)
    else:
        assert restored.attention is None
        assert same(restored.experts, experts)


def test_saved_from_two_meshes_restored_on_others(saved, tmp_path):
    folder, (attention, experts) = saved
    devices = jax.devices()
    first = MeshConfig(attention=1, attention_tensor=2, expert=3)
    halves = [role_mesh(first, devices, role) for role in ("attention", "expert")]
    sharded = restore_orbax(folder, attention=halves[0], experts=halves[1])
    save_orbax(tmp_path / "again", EVEN, sharded.attention, sharded.experts)
    other = MeshConfig(attention=3, expert=2, expert_tensor=2)
    halves = [role_mesh(other, devices, role) for role in ("attention", "expert")]
    back = restore_orbax(tmp_path / "again", attention=halves[0], experts=halves[1])
    assert same(back.attention, attention)
    assert same(back.experts, experts)
    Model.from_arrays(back.config, back.attention, back.experts)  # every parameter has its place


def test_refusals(saved, tmp_path):
    folder, (attention, experts) = saved
    with pytest.raises(ValueError, match="already exists"):
        save_orbax(folder, EVEN, attention, experts)
    with pytest.raises(ValueError, match=r"expected shape .* got"):
        save_orbax(tmp_path / "x", AWKWARD, attention, experts)
    with pytest.raises(ValueError, match="got neither"):
        restore_orbax(folder)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        restore_orbax(tmp_path / "nowhere", attention=role_mesh(MeshConfig(), jax.devices(), "attention"))
