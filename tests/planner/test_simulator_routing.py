"""Drawn routing: exact draws have the right odds, and totals drawn without tokens have the same distribution."""

import itertools

import numpy as np
import pytest

from jmoe.planner.routing import NodeTraffic, Routing, count_rows, draw_topk
from jmoe.sharding.placement import ExpertPlacement


def test_topk_is_sampling_without_replacement():
    weights = np.array([0.5, 0.3, 0.15, 0.05])
    drawn = draw_topk(np.random.default_rng(0), weights, 200_000, 2)
    pairs = np.sort(drawn, axis=1)
    for a, b in itertools.combinations(range(4), 2):
        expected = weights[a] * weights[b] / (1 - weights[a]) + weights[b] * weights[a] / (1 - weights[b])
        assert ((pairs == (a, b)).all(axis=1)).mean() == pytest.approx(expected, abs=0.005)


def test_experts_without_traffic_are_never_drawn():
    drawn = draw_topk(np.random.default_rng(0), np.array([0.5, 0.0, 0.5]), 100, 2)
    assert set(drawn.ravel()) == {0, 2}
    with pytest.raises(ValueError, match="at least 2 experts with traffic, got 1"):
        draw_topk(np.random.default_rng(0), np.array([1.0, 0.0]), 1, 2)


def test_a_token_is_sent_once_per_node():
    placement = ExpertPlacement.of([[0, 1], [2, 3], [0, 2]])
    topk_idx = np.array([[1, 3], [1, 3], [0, 2], [0, 2]])
    rows, pairs = count_rows(np.random.default_rng(0), topk_idx, np.array([0, 0, 1, 1]), placement, 2)
    assert rows[0].tolist() == [2, 2, 0]  # experts 1 and 3 stand once
    assert pairs.sum() == 8
    assert (rows[1] <= 2).all() and (rows.sum(axis=0) <= pairs).all()


@pytest.mark.parametrize("kind", ["uniform", "zipf"])
@pytest.mark.parametrize(
    ("num_experts", "k", "num_nodes"), [(8, 2, 8), (32, 4, 8), (32, 4, 32), (128, 8, 16)]
)
def test_totals_have_the_distribution_of_drawn_tokens(num_experts, k, num_nodes, kind):
    placement = ExpertPlacement.balanced(num_experts, num_nodes)
    popularity = Routing(kind, zipf_exponent=0.5).popularity(1, num_experts)
    rng, tokens, repeats = np.random.default_rng(0), 512, 150
    exact_rows, exact_pairs = np.empty((2, repeats, num_nodes))
    for i in range(repeats):
        topk_idx = draw_topk(rng, popularity[0], tokens, k)
        rows, exact_pairs[i] = count_rows(rng, topk_idx, np.zeros(tokens, int), placement, 1)
        exact_rows[i] = rows[0]
    rows, pairs = NodeTraffic.of(popularity, k, placement).draw(rng, 1, 4000, tokens)
    rows, pairs = rows[0, 0], pairs[0, 0]
    np.testing.assert_allclose(pairs.sum(axis=-1), k * tokens, rtol=1e-5)
    np.testing.assert_allclose(pairs.mean(axis=0), exact_pairs.mean(axis=0), rtol=0.05)
    np.testing.assert_allclose(rows.mean(axis=0), exact_rows.mean(axis=0), rtol=0.03)
    # the fullest node sets the pace: its load, in the mean
    assert pairs.max(axis=1).mean() == pytest.approx(exact_pairs.max(axis=1).mean(), rel=0.05)


def test_zipf_loads_one_node_more_than_uniform():
    placement = ExpertPlacement.balanced(32, 8)
    rng = np.random.default_rng(0)
    fullest = []
    for exponent in (0.0, 0.5, 1.0):
        popularity = Routing("zipf", zipf_exponent=exponent).popularity(4, 32)
        _, pairs = NodeTraffic.of(popularity, 4, placement).draw(rng, 1, 50, 1024)
        fullest.append(pairs.max(axis=-1).mean())
    assert fullest[0] < fullest[1] < fullest[2]


def test_histogram_is_used_layer_by_layer():
    routing = Routing("histogram", histogram=((3, 1, 0, 0), (0, 0, 1, 1)))
    np.testing.assert_allclose(routing.popularity(2, 4), [[0.75, 0.25, 0, 0], [0, 0, 0.5, 0.5]])
    np.testing.assert_allclose(Routing("histogram", histogram=((1, 1),)).popularity(3, 2), 0.5)
    with pytest.raises(ValueError, match=r"expected 3 \(or 1\) rows of 4 experts"):
        routing.popularity(3, 4)
    with pytest.raises(ValueError, match="some traffic in every layer"):
        Routing("histogram", histogram=((0, 0),))
    with pytest.raises(ValueError, match="rows of equal length"):
        Routing("histogram")
    with pytest.raises(ValueError, match="got 'random'"):
        Routing("random")
