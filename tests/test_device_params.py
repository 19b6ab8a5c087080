"""DeviceParams: each device holds its own share of the right array, and nothing that it does not need."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import AWKWARD, EVEN

from jmoe import device_params
from jmoe.cell_config import CellConfig
from jmoe.checkpoints.quantized_experts import QuantizedExperts
from jmoe.config import ModelConfig
from jmoe.device_params import HALVES, ArraySource, DeviceParams
from jmoe.models.model import array_specs
from jmoe.sharding.mesh_config import MeshConfig
from jmoe.sharding.meshes import joint_mesh
from jmoe.sharding.placement import ExpertPlacement


class NumberedSource:
    """Every array counts up from 1, so that a value says where it comes from; remembers what was read."""

    def __init__(self, model: ModelConfig):
        specs = dict(zip(("attention", "expert"), array_specs(model), strict=True))
        self.arrays = {
            role: {p: np.arange(1, 1 + np.prod(s.shape), dtype=np.float32).reshape(s.shape) for p, s in part.items()}
            for role, part in specs.items()
        }
        self.reads = []

    def read(self, role, path, index=None):
        self.reads.append((role, path))
        return self.arrays[role][path][index if index is not None else ...]

    def read_experts(self, path, expert_ids, index=None):
        self.reads.append(("expert", path))
        return self.arrays["expert"][path][list(expert_ids)][(slice(None), *(index or ()))]


def cell_of(model: ModelConfig, mesh: MeshConfig) -> CellConfig:
    return CellConfig(model, mesh.resolve(model.num_experts), max_len=16, num_pages=20)


def place(model: ModelConfig, mesh: MeshConfig, role, source=None):
    """By path the devices' parts, `[num_devices, ...]`; and the source."""
    cell, source = cell_of(model, mesh), source or NumberedSource(model)
    params = DeviceParams(cell, joint_mesh(cell.mesh, jax.devices())).place(role, source, lambda _: None)
    return {path: np.asarray(array) for path, array in params.items()}, source


def test_attention_ranks_hold_their_heads_and_replicas_the_same():
    mesh = MeshConfig(2, 1, attention_tensor=2)
    placed, source = place(EVEN, mesh, "attention")
    whole = source.arrays["attention"]
    assert set(placed) == set(whole)
    for path, heads, axis in (("q_proj", 4, 1), ("k_proj", 1, 1), ("v_proj", 1, 1), ("o_proj", 4, 0)):
        parts, array = placed[f"layers.0.{path}"], whole[f"layers.0.{path}"]
        for device in range(4):
            rank = device % 2
            np.testing.assert_array_equal(parts[device], array.take(range(rank * heads, (rank + 1) * heads), axis))
    for device in range(4):
        np.testing.assert_array_equal(placed["layers.0.input_norm"][device], whole["layers.0.input_norm"])
        np.testing.assert_array_equal(placed["layers.0.router"][device], whole["layers.0.router"])


def test_kv_heads_are_replicated_where_ranks_outnumber_them():
    """Two KV heads over four ranks: ranks 0 and 1 hold the first, which their query heads attend to."""
    placed, source = place(EVEN, MeshConfig(1, 1, attention_tensor=4), "attention")
    for path in ("layers.2.k_proj", "layers.2.v_proj"):
        whole = source.arrays["attention"][path]
        for rank in range(4):
            np.testing.assert_array_equal(placed[path][rank], whole[:, rank // 2 : rank // 2 + 1])


@pytest.mark.parametrize("tied", [False, True])
def test_the_vocabulary_is_padded_on_the_last_rank(tied):
    """131 ids over two ranks: 66 and 65, and a row of zeros."""
    model = dataclasses.replace(EVEN, tie_word_embeddings=tied)
    placed, source = place(model, MeshConfig(1, 1, attention_tensor=2), "attention")
    embed = source.arrays["attention"]["embed"]
    joined = placed["embed"][:2].reshape(132, -1)
    np.testing.assert_array_equal(joined[:131], embed)
    assert not joined[131].any()
    assert ("lm_head" in placed) == (not tied)
    if not tied:
        joined = np.concatenate(list(placed["lm_head"][:2]), axis=1)
        np.testing.assert_array_equal(joined[:, :131], source.arrays["attention"]["lm_head"])
        assert not joined[:, 131].any()


@pytest.mark.parametrize("expert_tensor", [1, 2])
def test_nodes_hold_their_experts_in_local_order_padded_to_the_fullest(expert_tensor):
    placement = ExpertPlacement(((5, 0, 3), (1,), (4, 2, 0)))
    mesh = MeshConfig(1, 3, expert_tensor=expert_tensor, placement=placement)
    placed, source = place(AWKWARD, mesh, "expert")
    width = AWKWARD.expert_ffn_size // expert_tensor
    for path, whole in source.arrays["expert"].items():
        axis = 1 if path.endswith("down_proj") else 2
        for node, experts in enumerate(placement.nodes):
            for rank in range(expert_tensor):
                part = placed[path][1 + node * expert_tensor + rank]
                share = whole[list(experts)].take(range(rank * width, (rank + 1) * width), axis)
                np.testing.assert_array_equal(part[: len(experts)], share)
                assert part.shape[0] == 3 and not part[len(experts) :].any()


def test_devices_of_the_other_role_share_one_buffer_a_shape():
    model, mesh = AWKWARD, MeshConfig(1, 2)
    cell = cell_of(model, mesh)
    params = DeviceParams(cell, joint_mesh(cell.mesh, jax.devices()))
    source = NumberedSource(model)
    for role, idle in (("attention", (1, 2)), ("expert", (0,))):
        buffers: dict[tuple, set[int]] = {}
        for array in params.place(role, source, lambda _: None).values():
            for shard in array.addressable_shards:
                if shard.index[0].start in idle:
                    assert not np.asarray(shard.data).any()
                    key = (shard.device, shard.data.shape)
                    buffers.setdefault(key, set()).add(shard.data.unsafe_buffer_pointer())
        assert buffers and all(len(pointers) == 1 for pointers in buffers.values())


def test_a_share_is_read_once_for_all_replicas():
    placed, source = place(AWKWARD, MeshConfig(3, 1), "attention")
    assert sorted(source.reads) == sorted(("attention", path) for path in placed)


def test_a_live_models_arrays_give_the_same_shares():
    """`ArraySource` slices JAX arrays where they are."""
    arrays = NumberedSource(EVEN).arrays
    live = ArraySource(*(jax.tree.map(jnp.asarray, arrays[role]) for role in ("attention", "expert")))
    mesh = MeshConfig(1, 2, attention_tensor=4, expert_tensor=2)
    for role in ("attention", "expert"):
        want, _ = place(EVEN, mesh, role)
        got, _ = place(EVEN, mesh, role, live)
        assert set(got) == set(want)
        for path in want:
            np.testing.assert_array_equal(got[path], want[path])


def test_progress_counts_to_the_end():
    lines, cell = [], cell_of(AWKWARD, MeshConfig(1, 1))
    params = DeviceParams(cell, joint_mesh(cell.mesh, jax.devices()))
    total = len(params.place("attention", NumberedSource(AWKWARD), lines.append))
    assert lines[-1] == f"attention weights: {total} of {total} arrays"


@pytest.mark.parametrize(
    ("model", "mesh", "message"),
    [
        (AWKWARD, MeshConfig(attention_tensor=2), r"attention_tensor: layers.0.q_proj: .*a divisor of 9 .* got 2"),
        (
            dataclasses.replace(EVEN, dense_ffn_size=62),
            MeshConfig(attention_tensor=4),
            r"attention_tensor: layers.1.gate_proj: .*mlp: expected a divisor of 62 .* got 4",
        ),
        (
            dataclasses.replace(EVEN, num_heads=12, num_kv_heads=3),
            MeshConfig(attention_tensor=2),
            r"attention_tensor: layers.0.k_proj: .*kv_heads: expected a divisor or a multiple of 3 .* got 2",
        ),
        (AWKWARD, MeshConfig(expert_tensor=3), r"expert_tensor: layers.0.gate_proj: .*a divisor of 40 .* got 3"),
    ],
)
def test_tensor_sizes_that_do_not_fit_are_refused_before_anything_is_read(model, mesh, message):
    cell = cell_of(model, mesh)
    with pytest.raises(ValueError, match=message):
        DeviceParams(cell, joint_mesh(cell.mesh, jax.devices()))


def test_too_few_devices_are_refused():
    mesh = MeshConfig(6, 5).resolve(6)
    with pytest.raises(ValueError, match=r"expected at least 11 devices \(6 attention \+ 5 expert\), got 10"):
        joint_mesh(mesh, jax.devices())


def test_both_roles_are_placed_together():
    cell, source = cell_of(EVEN, MeshConfig(1, 1)), NumberedSource(EVEN)
    params = DeviceParams(cell, joint_mesh(cell.mesh, jax.devices()))
    placed = params.place_roles(HALVES["inline"], source, lambda _: None)
    assert {role: set(arrays) for role, arrays in placed.items()} == {r: set(a) for r, a in source.arrays.items()}
    for role, device in (("attention", 0), ("expert", 1)):
        for path, array in placed[role].items():
            np.testing.assert_array_equal(np.asarray(array)[device], source.arrays[role][path])


def test_after_a_read_that_fails_no_more_is_read():
    class Broken(NumberedSource):
        def read(self, role, path, index=None):
            self.reads.append((role, path))
            time.sleep(0.01)  # the one who asked has time to hear of it
            raise ValueError("expected another file")

    cell, source = cell_of(dataclasses.replace(EVEN, num_layers=20, dense_layers=()), MeshConfig(1, 1)), Broken(EVEN)
    params = DeviceParams(cell, joint_mesh(cell.mesh, jax.devices()))
    with pytest.raises(ValueError, match="expected another file"):
        params.place_roles(HALVES["colocated"], source, lambda _: None)
    assert len(source.reads) < sum(map(len, params.specs.values()))


def test_experts_that_are_quantised_on_load_are_placed_with_their_scales(monkeypatch):
    """A scale is there once its values are made, however many arrays are under way."""
    monkeypatch.setattr(device_params, "NUM_THREADS", 4)
    plain = dataclasses.replace(EVEN, hidden_size=256, expert_ffn_size=256, num_layers=2, dense_layers=())
    cell = CellConfig(dataclasses.replace(plain, expert_dtype="fp8"), MeshConfig.colocate(1).resolve(EVEN.num_experts))
    params = DeviceParams(cell, joint_mesh(cell.mesh, jax.devices()))
    source = NumberedSource(plain)
    placed = params.place_roles(HALVES["colocated"], QuantizedExperts(source), lambda _: None)
    assert list(placed["expert"]).count("layers.1.gate_scales") == 1
    for name in ("gate", "up", "down"):
        pair = (placed["expert"][f"layers.1.{name}_{kind}"][0] for kind in ("proj", "scales"))
        values, scales = (np.asarray(array, np.float32) for array in pair)
        whole = values.swapaxes(1, 2) * np.kron(scales, np.ones((128, 128))).swapaxes(1, 2)
        np.testing.assert_allclose(whole, source.arrays["expert"][f"layers.1.{name}_proj"], rtol=0.07)
