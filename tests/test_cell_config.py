"""CellConfig: derived sizes, what is refused, and the trip through a worker's command stream."""

import dataclasses
import json
import math

import msgpack
import pytest
from small_models import AWKWARD, EVEN

from jmoe.cell_config import CellConfig
from jmoe.sharding.mesh_config import MeshConfig
from jmoe.sharding.placement import ExpertPlacement

MESH = MeshConfig(2, 3, 4, placement=ExpertPlacement(((0, 1, 5), (2, 3, 0), (4, 5)))).resolve(6)


@pytest.mark.parametrize(("max_len", "page_len", "max_pages"), [(64, 16, 4), (65, 16, 5), (1, 16, 1), (17, 1, 17)])
def test_pages_of_the_longest_sequence(max_len, page_len, max_pages):
    assert CellConfig(AWKWARD, MESH, max_len=max_len, page_len=page_len).max_pages == max_pages


def test_slots_of_all_lanes():
    assert CellConfig(AWKWARD, MESH, rows=5).num_slots == 2 * 4 * 5


@pytest.mark.parametrize("role", ["attention", "expert", "colocated"])
def test_the_largest_array_is_the_largest_that_a_role_holds(role):
    """Against the arrays' own descriptions; both halves' where a role has both."""
    from jmoe.models.model import array_specs

    halves = dict(zip(("attention", "expert"), array_specs(EVEN), strict=True))
    cell = CellConfig(EVEN, MeshConfig(1, 2).resolve(EVEN.num_experts))
    found = [
        math.prod(spec.shape) * (4 if EVEN.dtype == "float32" else 2) // (1 if name == "attention" else 2)
        for name, specs in halves.items()
        if role in (name, "colocated")
        for spec in specs.values()
    ]
    assert cell.largest_array_bytes(role) == max(found)


@pytest.mark.parametrize("name", ["rows", "chunk_len", "num_steps", "page_len", "max_len"])
def test_sizes_below_one_are_refused_by_name(name):
    with pytest.raises(ValueError, match=rf"CellConfig\.{name}: expected at least 1, got 0"):
        CellConfig(AWKWARD, MESH, **{name: 0})


@pytest.mark.parametrize(
    "mesh", [MeshConfig(), dataclasses.replace(MESH, directions="auto"), dataclasses.replace(MESH, transport="auto")]
)
def test_a_mesh_that_is_not_resolved_is_refused(mesh):
    with pytest.raises(ValueError, match="expected a resolved MeshConfig"):
        CellConfig(AWKWARD, mesh)


def test_sequences_that_cannot_fit_are_refused():
    with pytest.raises(ValueError, match=r"max_len: expected at most 4096 \(the model's\), got 4097"):
        CellConfig(AWKWARD, MESH, max_len=4097, num_pages=1000)
    sizes = {"max_len": 64, "page_len": 4}
    assert CellConfig(AWKWARD, MESH, num_pages=17, **sizes).max_pages == 16
    with pytest.raises(ValueError, match=r"num_pages: expected at least 17, .* got 16"):
        CellConfig(AWKWARD, MESH, num_pages=16, **sizes)


TRIPS = {
    "plain": lambda data: data,
    "json": lambda data: json.loads(json.dumps(data)),
    "msgpack": lambda data: msgpack.unpackb(msgpack.packb(data)),
}


@pytest.mark.parametrize("trip", TRIPS)
@pytest.mark.parametrize("model", [AWKWARD, dataclasses.replace(EVEN, eos_token_ids=(3, 5), clip_qkv=8.0)])
def test_a_trip_through_the_command_stream_changes_nothing(trip, model):
    cell = CellConfig(model, MESH, rows=3, chunk_len=9, num_steps=2, page_len=4, num_pages=90, max_len=33)
    back = CellConfig.from_dict(TRIPS[trip](cell.to_dict()))
    assert back == cell and hash(back) == hash(cell)
