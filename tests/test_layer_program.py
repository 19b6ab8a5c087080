"""run_layer: layers of one structure are lowered once; what differs between layers is not shared."""

import dataclasses

import jax
import pytest
from small_models import EVEN

from jmoe.cell_config import CellConfig
from jmoe.lowering import lower_program
from jmoe.sharding.mesh_config import MeshConfig
from jmoe.sharding.meshes import joint_mesh

MESHES = {"colocated": MeshConfig.colocate(1), "inline": MeshConfig(1, 1, 2)}


def num_products(role: str, num_layers: int, dense_layers: tuple[int, ...]) -> int:
    """In the lowered decode program."""
    model = dataclasses.replace(EVEN, num_layers=num_layers, dense_layers=dense_layers)
    cell = CellConfig(model, MESHES[role].resolve(model.num_experts), rows=2, max_len=16, num_pages=20)
    mesh = joint_mesh(cell.mesh, jax.devices())
    return lower_program(cell, mesh, role, ("decode", False)).as_text().count("dot_general")


@pytest.mark.parametrize("role", MESHES)
def test_more_layers_are_no_more_to_lower(role):
    few, more = (num_products(role, n, dense_layers=()) for n in (2, 5))
    assert few == more
    assert num_products(role, 5, dense_layers=(3,)) > more  # a dense layer is another function
