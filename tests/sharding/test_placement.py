"""ExpertPlacement: balanced cuts, replicas, lookup tables, and what is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jmoe.sharding.placement import ExpertPlacement


@st.composite
def placements(draw, max_nodes=5):
    """Any placement of up to 8 experts over up to max_nodes, every expert on at least one, in any order."""
    num_experts, num_nodes = draw(st.integers(1, 8)), draw(st.integers(1, max_nodes))
    nodes = [set() for _ in range(num_nodes)]
    for expert in range(num_experts):
        for node in draw(st.sets(st.integers(0, num_nodes - 1), min_size=1)):
            nodes[node].add(expert)
    for node in nodes:
        if not node:
            node.add(draw(st.integers(0, num_experts - 1)))
    return ExpertPlacement.of([draw(st.permutations(sorted(node))) for node in nodes])


@given(placements())
def test_tables_name_every_replica_and_nothing_else(placement):
    node, local_idx, num_replicas = placement.tables()
    assert node.shape == local_idx.shape == (placement.num_experts, placement.max_replicas)
    assert node.dtype == local_idx.dtype == num_replicas.dtype == np.int32
    for expert in range(placement.num_experts):
        held = {(n, experts.index(expert)) for n, experts in enumerate(placement.nodes) if expert in experts}
        row = list(zip(node[expert].tolist(), local_idx[expert].tolist(), strict=True))
        count = num_replicas[expert]
        assert set(row[:count]) == held and len(row[:count]) == len(held)
        assert tuple(row[:count]) == placement.replicas(expert) == tuple(sorted(held))
        assert all(entry == row[0] for entry in row[count:])


@given(placements())
def test_sizes(placement):
    assert placement.num_nodes == len(placement.nodes)
    assert {e for node in placement.nodes for e in node} == set(range(placement.num_experts))
    assert placement.max_local_experts == max(map(len, placement.nodes))
    assert placement.max_replicas == max(len(placement.replicas(e)) for e in range(placement.num_experts))


@pytest.mark.parametrize("num_experts", range(1, 10))
def test_balanced_cuts_differ_by_at_most_one(num_experts):
    for num_nodes in range(1, num_experts + 1):
        nodes = ExpertPlacement.balanced(num_experts, num_nodes).nodes
        assert [e for node in nodes for e in node] == list(range(num_experts))
        sizes = [len(node) for node in nodes]
        assert len(sizes) == num_nodes and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([], "at least one expert on every node"),
        ([[0], []], "at least one expert on every node"),
        ([[0, 1, 0]], "each expert once on node 0"),
        ([[0], [1, 1]], "each expert once on node 1"),
        ([[0], [2]], r"none missing, got \[0, 2\]"),
        ([[1]], r"none missing, got \[1\]"),
        ([[-1, 0]], r"none missing, got \[-1, 0\]"),
    ],
)
def test_refused(nodes, message):
    with pytest.raises(ValueError, match=message):
        ExpertPlacement.of(nodes)


def test_more_nodes_than_experts_need_an_explicit_placement():
    with pytest.raises(ValueError, match=r"2 experts\), got 3 nodes; replicate"):
        ExpertPlacement.balanced(2, 3)
    assert ExpertPlacement.of([[0], [1], [0]]).replicas(0) == ((0, 0), (2, 0))


def test_equal_and_hashable_whatever_it_was_made_of():
    a = ExpertPlacement.of([np.array([1, 0]), [2]])  # type: ignore[list-item]
    assert a == ExpertPlacement(((1, 0), (2,))) and len({a, ExpertPlacement(((1, 0), (2,)))}) == 1
    assert all(type(e) is int for node in a.nodes for e in node)
