"""RandomWeights: the same numbers on every mesh, whatever part of an array is asked for; normal and told apart."""

import dataclasses

import jax
import numpy as np
from small_models import EVEN

from jmoe.cell_config import CellConfig
from jmoe.checkpoints.random_weights import RandomWeights
from jmoe.device_params import DeviceParams
from jmoe.models.model import array_specs
from jmoe.sharding.mesh_config import MeshConfig
from jmoe.sharding.meshes import joint_mesh
from jmoe.sharding.partition import pad_to, tensor_share

MODEL = dataclasses.replace(EVEN, num_layers=2, dense_layers=(1,))


def test_a_devices_share_is_its_cut_of_the_whole():
    mesh = MeshConfig(1, 4, attention_tensor=2, expert_tensor=2)  # nodes of one and of two experts
    cell = CellConfig(MODEL, mesh.resolve(MODEL.num_experts), max_len=16, num_pages=20)
    params, source = DeviceParams(cell, joint_mesh(cell.mesh, jax.devices())), RandomWeights(MODEL, 5)
    mesh, placement = cell.mesh, cell.mesh.placement
    assert placement is not None
    for role, specs in zip(("attention", "expert"), array_specs(MODEL), strict=True):
        placed = params.place(role, source, lambda _: None)
        size = mesh.attention_tensor if role == "attention" else mesh.expert_tensor
        first = 0 if role == "attention" else mesh.first_expert_device
        for path, spec in specs.items():
            whole = np.asarray(source.read(role, path))
            for device in (i for i in range(mesh.num_devices) if mesh.plays(i, role)):
                node, rank = divmod(device - first, size)
                index, shape = tensor_share(spec.shape, spec.axes, size, rank)
                want = whole[index]
                if role == "expert":
                    want, shape = whole[list(placement.nodes[node])][index], (placement.max_local_experts, *shape[1:])
                np.testing.assert_array_equal(np.asarray(placed[path][device]), pad_to(want, shape), err_msg=path)


def test_numbers_are_normal_and_depend_on_seed_and_path():
    source = RandomWeights(MODEL, 0)
    q = [np.asarray(source.read("attention", f"layers.{layer}.q_proj")).ravel() for layer in range(2)]
    assert abs(q[0].std() * MODEL.hidden_size**0.5 - 1) < 0.05 and abs(q[0].mean()) < 0.01
    other = np.asarray(RandomWeights(MODEL, 1).read("attention", "layers.0.q_proj")).ravel()
    experts = np.asarray(source.read_experts("layers.0.up_proj", [0, 1])).reshape(2, -1)
    for a, b in ((q[0], q[1]), (q[0], other), experts):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.1
    np.testing.assert_array_equal(np.asarray(source.read("attention", "final_norm")), np.ones(MODEL.hidden_size))


def test_a_live_process_draws_what_another_has_drawn():
    """Not by Python's hash(), which every process salts: the numbers of this version are fixed."""
    found = np.asarray(RandomWeights(MODEL, 3).read("attention", "layers.0.k_proj"))[0, 0, :3]
    np.testing.assert_allclose(found, WANT, atol=1e-6)


WANT = [0.142318, -0.199106, 0.004171]  # found by the first version
