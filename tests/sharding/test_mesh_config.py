"""MeshConfig: the order of devices on the joint axis, what "auto" becomes, and what is refused."""

import dataclasses

import pytest

from jmoe.sharding.mesh_config import MeshConfig
from jmoe.sharding.placement import ExpertPlacement

SIZES = [(1, 1, 1, 1), (2, 3, 1, 1), (3, 2, 2, 1), (2, 2, 1, 4), (4, 1, 3, 2), (1, 5, 4, 6)]


@pytest.mark.parametrize(("attention", "expert", "attention_tensor", "expert_tensor"), SIZES)
def test_devices_stand_in_order_attention_first(attention, expert, attention_tensor, expert_tensor):
    mesh = MeshConfig(attention, expert, attention_tensor=attention_tensor, expert_tensor=expert_tensor)
    order = [mesh.attention_device(a, r) for a in range(attention) for r in range(attention_tensor)]
    split = len(order)
    order += [mesh.expert_device(n, r) for n in range(expert) for r in range(expert_tensor)]
    assert order == list(range(mesh.num_devices))
    assert (mesh.num_attention_devices, mesh.num_expert_devices) == (split, len(order) - split)
    assert [mesh.role(d) for d in order] == ["attention"] * split + ["expert"] * (len(order) - split)


@pytest.mark.parametrize(("sizes", "num_slices"), [((1, 1), 1), ((2, 1), 2), ((2, 4), 4), ((3, 2), 6), ((4, 6), 12)])
def test_slices_are_the_least_common_multiple_of_the_tensor_sizes(sizes, num_slices):
    assert MeshConfig(attention_tensor=sizes[0], expert_tensor=sizes[1]).num_slices == num_slices


@pytest.mark.parametrize("name", ["attention", "expert", "num_micro_batches", "attention_tensor", "expert_tensor"])
@pytest.mark.parametrize("value", [0, -1])
def test_counts_below_one_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"MeshConfig\.{name}: expected at least 1, got {value}"):
        MeshConfig(**{name: value})


@pytest.mark.parametrize(("name", "value"), [("directions", "two"), ("transport", "pigeon")])
def test_unknown_words_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"MeshConfig\.{name}: expected .* got '{value}'"):
        MeshConfig(**{name: value})


def test_a_placement_for_other_nodes_or_another_model_is_refused():
    placement = ExpertPlacement.balanced(6, 3)
    with pytest.raises(ValueError, match=r"expected 2 nodes .* got a placement over 3"):
        MeshConfig(1, 2, placement=placement)
    with pytest.raises(ValueError, match=r"expected 8 experts .* got 6"):
        MeshConfig(1, 3, placement=placement).resolve(8)
    with pytest.raises(ValueError, match=r"4 experts\), got 5 nodes"):
        MeshConfig(1, 5).resolve(4)


@pytest.mark.parametrize(("num_micro_batches", "directions"), [(1, "one"), (3, "one"), (4, "both"), (7, "both")])
def test_resolve_leaves_nothing_open_and_keeps_what_was_said(num_micro_batches, directions):
    mesh = MeshConfig(2, 4, num_micro_batches)
    resolved = mesh.resolve(6)
    assert (resolved.directions, resolved.transport) == (directions, "ppermute")
    assert resolved.placement == ExpertPlacement.balanced(6, 4)
    placement = ExpertPlacement(((5,), (0, 1), (2, 3), (4,)))
    said = dataclasses.replace(mesh, directions={"one": "both", "both": "one"}[directions], placement=placement)
    assert said.resolve(6) == dataclasses.replace(said, transport="ppermute")
    assert resolved.resolve(6) == resolved
    pushed = mesh.resolve(6, "push")
    assert (pushed.directions, pushed.transport) == ("separate", "push")
    assert said.resolve(6, "push") == dataclasses.replace(said, transport="push")
    assert resolved.resolve(6, "push") == resolved


def test_a_program_runs_over_all_devices_or_over_its_roles_own():
    mesh = MeshConfig(2, 3, expert_tensor=2)
    whole, apart = mesh.resolve(6), mesh.resolve(6, "push")
    for role, own in (("attention", range(2)), ("expert", range(2, 8))):
        assert (whole.program_devices(role), apart.program_devices(role)) == (range(8), own)


def test_what_a_transport_has_no_use_for_is_refused():
    with pytest.raises(ValueError, match="directions: expected 'one' or 'both' with 'ppermute', got 'separate'"):
        MeshConfig(directions="separate", transport="ppermute")
    with pytest.raises(ValueError, match="transport: expected none for a colocated mesh"):
        dataclasses.replace(MeshConfig.colocate(2), transport="push")
    assert MeshConfig.colocate(2).resolve(6, "push").transport == "ppermute"
