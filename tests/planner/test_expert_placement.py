"""The greedy placement against an exact answer on small cases."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from jmoe.planner.expert_placement import expert_costs, place_experts


def exact_load(costs, num_nodes, slots):
    """min over placements of max_n sum_e x[n, e] cost[e], any split of an expert over the nodes that hold it.

    Variables: x [N, E], held [N, E] binary, and the load. At least as good as any even split over replicas.
    """
    n, e = num_nodes, len(costs)
    size = 2 * n * e + 1
    rows, low, high = [], [], []

    def add(entries, lo, hi):
        row = np.zeros(size)
        for index, value in entries:
            row[index] += value
        rows.append(row), low.append(lo), high.append(hi)

    for j in range(e):
        add([(i * e + j, 1.0) for i in range(n)], 1.0, 1.0)
    for i in range(n):
        add([(i * e + j, costs[j]) for j in range(e)] + [(size - 1, -1.0)], -np.inf, 0.0)
        add([(n * e + i * e + j, 1.0) for j in range(e)], 0.0, slots)
        for j in range(e):
            add([(i * e + j, 1.0), (n * e + i * e + j, -1.0)], -np.inf, 0.0)
    cost = np.zeros(size)
    cost[-1] = 1.0
    integrality = np.r_[np.zeros(n * e), np.ones(n * e), 0]
    bounds = Bounds(np.zeros(size), np.r_[np.ones(2 * n * e), np.inf])
    answer = milp(cost, constraints=LinearConstraint(np.array(rows), low, high), integrality=integrality, bounds=bounds)
    assert answer.success, answer.message
    return answer.fun


@pytest.mark.parametrize("seed", range(8))
def test_near_the_exact_answer(seed):
    rng = np.random.default_rng(seed)
    num_experts, num_nodes, slots = [(6, 3, 2), (6, 3, 3), (8, 4, 2), (5, 2, 4)][seed % 4]
    histogram = rng.zipf(1.6, num_experts).clip(max=60).astype(float)
    placed = place_experts(histogram, num_nodes, slots, floor=1.0)
    best = exact_load(expert_costs(histogram, 1.0), num_nodes, slots)
    assert placed.loads.max() >= best - 1e-6
    # An even split over replicas can't reach what any split can; a quarter is what it costs in these cases at most.
    assert placed.loads.max() <= 1.25 * best


def test_reaches_the_optimum_where_an_even_split_can():
    """Two hot experts, two nodes, three slots: each hot one on both nodes and the cold ones apart."""
    placed = place_experts([10.0, 10.0, 4.0, 4.0], 2, 3)
    assert placed.loads.tolist() == [14.0, 14.0]
    assert placed.imbalance == 1.0


def test_floor_counts_idle_experts():
    """Without the floor the idle experts are free; with it the busy one should stand alone."""
    placed = place_experts([9.0, 0.0, 0.0, 0.0], 2, 3, floor=3.0)
    busy = next(node for node in placed.placement.nodes if 0 in node)
    assert busy == (0,)
    assert sorted(placed.loads.tolist()) == [9.0, 9.0]


def test_replicates_only_while_it_helps():
    placed = place_experts([1.0, 1.0, 1.0, 1.0], 2, 4)
    assert placed.loads.max() == 2.0


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_histogram_gives_a_valid_placement(data):
    num_experts = data.draw(st.integers(1, 24))
    num_nodes = data.draw(st.integers(1, 8))
    slots = data.draw(st.integers(-(-num_experts // num_nodes), num_experts + 2))
    histogram = data.draw(st.lists(st.integers(0, 1000), min_size=num_experts, max_size=num_experts))
    placed = place_experts(histogram, num_nodes, slots, floor=1.0)
    assert placed.placement.num_nodes == num_nodes
    assert placed.placement.num_experts == num_experts
    assert placed.placement.max_local_experts <= max(slots, 1)
    np.testing.assert_allclose(placed.shares.sum(0), 1.0)
    np.testing.assert_allclose(placed.loads.sum(), expert_costs(histogram, 1.0).sum())
    # Never worse than contiguous and balanced, the default.
    cuts = [num_experts * n // num_nodes for n in range(num_nodes + 1)]
    costs = expert_costs(histogram, 1.0)
    default = max(costs[a:b].sum() for a, b in itertools.pairwise(cuts))
    if num_nodes <= num_experts:
        assert placed.loads.max() <= default * (1 + 1e-9)


@pytest.mark.parametrize(
    ("histogram", "nodes", "slots"), [([1, 2, 3], 1, 2), ([], 2, 2), ([1, -1], 2, 2), ([0, 0], 2, 2), ([1], 0, 1)]
)
def test_bad_input(histogram, nodes, slots):
    with pytest.raises(ValueError, match="expected"):
        place_experts(histogram, nodes, slots)
