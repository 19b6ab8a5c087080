"""Routing: a token once a node that holds one of its experts, in token order, and partial sums back to their tokens."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_placement import placements

from jmoe.sharding.placement import ExpertPlacement
from jmoe.sharding.routing import Routes, route_rows, sum_partials

REPLICATED = ExpertPlacement(((0, 1, 5), (2, 3, 0), (4, 5)))


@functools.cache
def run(placement: ExpertPlacement, capacity: int):
    return jax.jit(functools.partial(route_rows, placement=placement, capacity=capacity))


def batch_of(rng, tokens: int, k: int, num_experts: int):
    """topk_idx (distinct in a row), topk_weights, valid, spread."""
    topk_idx = np.stack([rng.permutation(num_experts)[:k] for _ in range(tokens)]).astype(np.int32)
    topk_weights = rng.uniform(0.1, 1, (tokens, k)).astype(np.float32)
    return topk_idx, topk_weights, rng.random(tokens) < 0.8, rng.integers(0, 1000, tokens).astype(np.int32)


def oracle(topk_idx, topk_weights, valid, spread, placement, capacity):
    """Per node a list of (token, its k local ids, its k weights); and how many found no room."""
    nodes, dropped = [], 0
    for node in range(placement.num_nodes):
        rows = []
        for token in np.flatnonzero(valid):
            local_idx, weights = [], []
            for expert, weight in zip(topk_idx[token], topk_weights[token], strict=True):
                replicas = placement.replicas(int(expert))
                where, local = replicas[spread[token] % len(replicas)]
                local_idx.append(local if where == node else -1)
                weights.append(weight if where == node else 0)
            if max(local_idx) >= 0:
                rows.append((token, local_idx, weights))
        dropped += max(len(rows) - capacity, 0)
        nodes.append(rows[:capacity])
    return nodes, dropped


def assert_right(routes: Routes, want, dropped: int, tokens: int):
    assert int(routes.num_dropped) == dropped
    assert routes.num_rows.tolist() == [len(rows) for rows in want]
    position = np.full((len(want), tokens), -1)
    for node, rows in enumerate(want):
        for c, (token, local_idx, weights) in enumerate(rows):
            position[node, token] = c
            assert routes.order[node, c] == token
            assert routes.local_idx[node, c].tolist() == local_idx
            np.testing.assert_array_equal(routes.topk_weights[node, c], np.array(weights, np.float32))
    np.testing.assert_array_equal(routes.position, position)
    order = np.asarray(routes.order)
    assert order.min() >= 0 and order.max() < tokens, "garbage behind num_rows is still in bounds"


@settings(max_examples=40, deadline=None)
@given(placements(max_nodes=3), st.data())
def test_routes_equal_a_plain_loop(placement, data):
    """Any placement with replicas, any choices, any tokens missing, room for all or for fewer.

    Not jitted, and few different shapes: every placement would be a program of its own.
    """
    tokens = 5
    k = data.draw(st.sampled_from([1, min(3, placement.num_experts)]))
    capacity = data.draw(st.sampled_from([2, tokens]))
    batch = batch_of(np.random.default_rng(data.draw(st.integers(0, 999))), tokens, k, placement.num_experts)
    assert_right(route_rows(*batch, placement, capacity), *oracle(*batch, placement, capacity), tokens)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("capacity", [1, 5, 16, 19])
def test_routes_of_a_larger_batch(seed, capacity):
    batch = batch_of(np.random.default_rng(seed), 16, 3, 6)
    assert_right(run(REPLICATED, capacity)(*batch), *oracle(*batch, REPLICATED, capacity), 16)


@pytest.mark.parametrize("capacity", range(1, 17))
def test_rows_without_room_are_counted(capacity):
    """All 16 tokens go to one node, whichever expert they chose."""
    placement = ExpertPlacement(((0, 1, 2),))
    topk_idx, topk_weights, _, spread = batch_of(np.random.default_rng(0), 16, 2, 3)
    routes = run(placement, capacity)(topk_idx, topk_weights, np.ones(16, bool), spread)
    assert int(routes.num_dropped) == 16 - capacity
    assert routes.position[0].tolist() == [c if c < capacity else -1 for c in range(16)]


def test_no_valid_token_sends_nothing():
    topk_idx, topk_weights, valid, spread = batch_of(np.random.default_rng(0), 16, 3, 6)
    routes = run(REPLICATED, 16)(topk_idx, topk_weights, np.zeros_like(valid), spread)
    assert routes.num_rows.tolist() == [0, 0, 0] and int(routes.num_dropped) == 0
    assert (np.asarray(routes.position) == -1).all()


def test_a_tokens_route_depends_on_itself_alone():
    """Same choices and position: the same replicas, weights and nodes, wherever it stands, whoever is beside it."""
    rng = np.random.default_rng(1)
    one = batch_of(rng, 16, 3, 6)
    for trial in range(20):
        other = batch_of(np.random.default_rng(trial + 2), 16, 3, 6)
        at, was = int(rng.integers(16)), int(rng.integers(16))
        for a, b in zip(other, one, strict=True):
            a[at] = b[was]
        other[2][at] = one[2][was] = True
        a, b = run(REPLICATED, 16)(*one), run(REPLICATED, 16)(*other)
        for node in range(3):
            before, now = int(a.position[node, was]), int(b.position[node, at])
            assert (before < 0) == (now < 0)
            if before >= 0:
                np.testing.assert_array_equal(a.local_idx[node, before], b.local_idx[node, now])
                np.testing.assert_array_equal(a.topk_weights[node, before], b.topk_weights[node, now])


def test_replicas_take_turns_by_position():
    """Expert 0 stands on nodes 0 and 1: even positions go to one, odd ones to the other."""
    tokens, ones = 16, np.ones(16, bool)
    topk_idx, topk_weights = np.zeros((tokens, 1), np.int32), np.ones((tokens, 1), np.float32)
    position = np.arange(tokens, dtype=np.int32) + 100
    routes = run(REPLICATED, 16)(topk_idx, topk_weights, ones, position)
    assert routes.num_rows.tolist() == [8, 8, 0]
    assert routes.order[0, :8].tolist() == list(range(0, 16, 2))
    assert routes.local_idx[0, :8, 0].tolist() == [0] * 8 and routes.local_idx[1, :8, 0].tolist() == [2] * 8


def sums_of(partials, position):
    return np.asarray(jax.jit(sum_partials)(partials, position))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("placement", [REPLICATED, ExpertPlacement.balanced(6, 4), ExpertPlacement.balanced(6, 1)])
def test_partial_sums_find_their_tokens(placement, seed):
    """Every node answers its rows with sum_j w_j * (x * value of expert j); the dense formula knows no nodes."""
    rng = np.random.default_rng(seed)
    topk_idx, topk_weights, valid, spread = batch_of(rng, 16, 3, 6)
    x, value = rng.normal(size=(16, 4)).astype(np.float32), rng.normal(size=6).astype(np.float32)
    routes = run(placement, 16)(topk_idx, topk_weights, valid, spread)
    partials = np.full((placement.num_nodes, 16, 4), np.nan, np.float32)  # what nobody asked for is NaN
    for node, experts in enumerate(placement.nodes):
        for c in range(int(routes.num_rows[node])):
            local_idx = np.asarray(routes.local_idx[node, c])
            held = np.where(local_idx >= 0, value[np.array(experts)[np.maximum(local_idx, 0)]], 0)
            partials[node, c] = x[routes.order[node, c]] * (held @ np.asarray(routes.topk_weights[node, c]))
    want = np.where(valid[:, None], x * (value[topk_idx] * topk_weights).sum(-1, keepdims=True), 0)
    np.testing.assert_allclose(sums_of(partials, routes.position), want, rtol=1e-5, atol=1e-6)


def test_a_node_that_was_sent_nothing_says_nothing():
    partials = np.stack([np.ones((3, 2), np.float32), np.full((3, 2), np.nan, np.float32)])
    assert sums_of(partials, np.array([[0, 1, 2], [-1, -1, -1]], np.int32)).tolist() == [[1, 1]] * 3


def test_partial_sums_are_added_node_by_node_in_float32():
    """In another order, or in bfloat16, these come out as something else."""
    partials = np.array([[[1e8]], [[-1e8]], [[1.5]]], np.float32)
    position = np.zeros((3, 1), np.int32)
    assert sums_of(partials, position).tolist() == [[1.5]]
    assert sums_of(partials[[0, 2, 1]], position).tolist() == [[0.0]]
    small = sums_of(np.array([[[256]], [[1]]], jax.numpy.bfloat16), position[:2])
    assert small.dtype == np.float32 and small.tolist() == [[257.0]]
