"""Each option of the simulated network changes the answer, and in the direction that it should."""

import dataclasses

import numpy as np
import pytest

from jmoe.planner.network import Network
from jmoe.planner.network_fabric import Fabric
from jmoe.planner.network_messages import Deliveries, Messages, many_to_many
from jmoe.planner.network_options import NetworkOptions, ProxyBatches

KIB = 1024
ONE_LEAF = NetworkOptions(endpoints_per_leaf=64)
LINE_RATE_128K = 128 * KIB / ONE_LEAF.bytes_per_s  # 5.2 us


def _run(options: NetworkOptions, messages: Messages, num_endpoints: int = 64, seed: int = 0) -> Deliveries:
    return Network(options, num_endpoints, seed).run(messages)


def _last(options: NetworkOptions, messages: Messages, num_endpoints: int = 64, seed: int = 0) -> float:
    return float(_run(options, messages, num_endpoints, seed).arrived_s.max())


def _flows(pairs, num_bytes, ready_s=0.0) -> Messages:
    sender, receiver = (np.array(ids) for ids in zip(*pairs, strict=True))
    num = len(pairs)
    return Messages(sender, receiver, np.full(num, num_bytes), np.full(num, float(ready_s)))


def _all_to_all(num, num_bytes, posting="rotated") -> Messages:
    return many_to_many(np.full((num, num), num_bytes), np.arange(num), num + np.arange(num), posting=posting)


def _across(num, num_bytes) -> Messages:
    """Each endpoint of the first leaf to its opposite in the second."""
    return _flows([(i, num + i) for i in range(num)], num_bytes)


def test_one_message_takes_its_links_and_nothing_else():
    """8 KiB chunks in a pipeline over two links: bytes / rate, one chunk more for each stage, two hops, the post."""
    chunk = ONE_LEAF.chunk_bytes / ONE_LEAF.bytes_per_s
    took = _last(ONE_LEAF, _flows([(0, 1)], 128 * KIB))
    assert took == pytest.approx(LINE_RATE_128K + 2 * chunk + 2 * ONE_LEAF.hop_latency_s + ONE_LEAF.message_s)


def test_message_cost_counts_for_many_small_messages():
    messages = many_to_many(np.full((1, 60), 256), np.array([0]), np.arange(1, 61))
    dear = dataclasses.replace(ONE_LEAF, message_s=2e-6, nic_threads=1)
    cheap = dataclasses.replace(dear, message_s=0.2e-6)
    assert _last(dear, messages) - _last(cheap, messages) == pytest.approx(60 * 1.8e-6, rel=0.01)


def test_incast_is_slower_than_turns():
    rotated, same = _all_to_all(16, 128 * KIB), _all_to_all(16, 128 * KIB, "same")
    assert _last(ONE_LEAF, same) > 1.4 * _last(ONE_LEAF, rotated)
    assert _run(ONE_LEAF, same).longest_wait_s > 10 * _run(ONE_LEAF, rotated).longest_wait_s


def test_incast_queue_grows_with_the_number_of_senders():
    waits = [
        _run(ONE_LEAF, _flows([(i, 63) for i in range(num)], 64 * KIB)).longest_wait_s for num in (1, 4, 16)
    ]
    assert waits[0] < 1e-12
    assert waits[2] > 3 * waits[1] > 0


def test_rails_divide_the_time():
    took = [_last(dataclasses.replace(ONE_LEAF, rails=r), _all_to_all(8, 512 * KIB)) for r in (1, 2, 4, 8)]
    assert took[1] == pytest.approx(took[0] / 2, rel=0.1)
    assert took[2] == pytest.approx(took[0] / 4, rel=0.1)
    assert took[3] == pytest.approx(took[0] / 8, rel=0.15)


def test_two_to_one_uplinks_double_the_time_across_leaves():
    full = NetworkOptions(endpoints_per_leaf=8, routing="adaptive")
    half = dataclasses.replace(full, oversubscription=2.0)
    assert (full.num_paths, half.num_paths) == (8, 4)
    messages = _across(8, 4096 * KIB)
    assert _last(half, messages, 16) == pytest.approx(2 * _last(full, messages, 16), rel=0.1)
    inside = _flows([(i, (i + 1) % 8) for i in range(8)], 1024 * KIB)  # one leaf: the uplinks don't matter
    assert _last(half, inside, 16) == _last(full, inside, 16)


def test_hash_conflicts_on_uplinks_follow_from_the_hash():
    """Under ECMP the time is set by the fullest uplink: the largest number of queue pairs that hash to one path."""
    options, messages = NetworkOptions(endpoints_per_leaf=8), _across(8, 4096 * KIB)
    slowdowns = []
    for seed in range(6):
        fabric = Fabric(options, 16, seed)
        fullest = np.bincount([fabric.hashed_path(i, 8 + i, 0, 0) for i in range(8)]).max()
        alone = _last(options, _flows([(0, 8)], 4096 * KIB), 16)
        slowdowns.append(_last(options, messages, 16, seed) / alone)
        assert slowdowns[-1] == pytest.approx(fullest, rel=0.02)
    assert max(slowdowns) >= 2


def test_more_queue_pairs_spread_over_more_paths():
    one = NetworkOptions(endpoints_per_leaf=8)
    eight = dataclasses.replace(one, queue_pairs=8)
    messages = _across(8, 4096 * KIB)
    mean = [np.mean([_last(options, messages, 16, seed) for seed in range(5)]) for options in (one, eight)]
    assert mean[1] < 0.8 * mean[0]


def test_adaptive_routing_avoids_conflicts_and_pays_for_reordering():
    ecmp = NetworkOptions(endpoints_per_leaf=8)
    adaptive = dataclasses.replace(ecmp, routing="adaptive")
    messages = _across(8, 1024 * KIB)
    assert _last(adaptive, messages, 16) < 0.7 * _last(ecmp, messages, 16)
    # a third leaf sends into the second as well: downlinks, which the first leaf can't see, differ; chunks overtake
    rng = np.random.default_rng(0)
    crossing = messages + Messages(
        rng.integers(16, 24, 40), rng.integers(8, 16, 40), rng.integers(1, 64, 40) * KIB, rng.uniform(0, 40e-6, 40)
    )
    assert _run(ecmp, crossing, 24).num_out_of_order == 0
    assert _run(adaptive, crossing, 24).num_out_of_order > 0
    patient = dataclasses.replace(adaptive, reorder_s=50e-6)
    assert _last(patient, crossing, 24) == pytest.approx(_last(adaptive, crossing, 24) + 49e-6)


def test_probed_paths_avoid_a_path_that_is_busy():
    """Long flows hold the path that the hash gives to a short message; a probe sees that and takes another."""
    ecmp = NetworkOptions(endpoints_per_leaf=8)
    probed = dataclasses.replace(ecmp, routing="probed", probe_paths=8)
    fabric = Fabric(ecmp, 16, 0)
    path = fabric.hashed_path(7, 15, 0, 0)
    pairs = [(a, b) for a in range(7) for b in range(8, 15) if fabric.hashed_path(a, b, 0, 0) == path]
    hold = _flows(list({a: (a, b) for a, b in pairs}.values()), 4096 * KIB)
    assert len(hold) >= 3
    late = np.array([60e-6, 70e-6, 80e-6, 90e-6])
    short = Messages(np.full(4, 7), np.full(4, 15), np.full(4, 64 * KIB), late)
    took = {o.routing: _run(o, hold + short, 16).arrived_s[len(hold) :] - late for o in (ecmp, probed)}
    assert took["probed"][0] == took["ecmp"][0]  # sent before the first answer came
    assert took["probed"][1:].max() < 0.1 * took["ecmp"][1:].min()


def test_back_off_shortens_queues_and_costs_time():
    incast = _flows([(i, 63) for i in range(16)], 2048 * KIB)
    options = dataclasses.replace(ONE_LEAF, window_bytes=128 * KIB)
    late = Messages(np.array([40]), np.array([63]), np.array([8 * KIB]), np.array([800e-6]))
    took, victim, marks = {}, {}, {}
    for congestion in ("none", "back_off"):
        result = _run(dataclasses.replace(options, congestion=congestion), incast + late)
        took[congestion], marks[congestion] = result.arrived_s[:-1].max(), result.num_marks
        victim[congestion] = result.arrived_s[-1] - 800e-6
    assert marks["none"] > marks["back_off"] > 0
    assert victim["back_off"] < 0.5 * victim["none"]
    assert took["back_off"] > took["none"]


def test_switching_paths_beats_backing_off_where_paths_are_free():
    """Two long flows that hash to the same uplink, six uplinks idle."""
    options = NetworkOptions(endpoints_per_leaf=8, window_bytes=256 * KIB)
    fabric = Fabric(options, 16, 0)
    pairs = [(a, 8 + a) for a in range(8)]
    path = fabric.hashed_path(*pairs[0], 0, 0)
    others = ((a, b) for a in range(1, 8) for b in range(9, 16))
    other = next(pair for pair in others if fabric.hashed_path(*pair, 0, 0) == path)
    messages = _flows([pairs[0], other], 8192 * KIB)
    took = {
        congestion: _last(dataclasses.replace(options, congestion=congestion), messages, 16)
        for congestion in ("none", "back_off", "switch_path")
    }
    assert took["switch_path"] < 0.7 * took["none"]
    assert took["none"] <= took["back_off"]


def test_prioritised_acks_help_where_data_flows_both_ways():
    """Endpoint 1 takes one flow in and sends eight: acknowledgements behind those hold the sender's window shut."""
    flow = _flows([(0, 1)], 512 * KIB)
    both = flow + _flows([(1, 2 + i) for i in range(8)], 512 * KIB)
    behind = dataclasses.replace(ONE_LEAF, window_bytes=64 * KIB, acks="behind_data")
    prioritised = dataclasses.replace(behind, acks="prioritised")
    took = {options.acks: _run(options, both).arrived_s[0] for options in (behind, prioritised)}
    assert took["prioritised"] < 0.5 * took["behind_data"]
    assert _last(prioritised, flow) == pytest.approx(_last(behind, flow))  # nothing goes the other way: no matter


def test_a_small_window_waits_for_acks():
    messages = _flows([(0, 1)], 1024 * KIB)
    small, large = (dataclasses.replace(ONE_LEAF, window_bytes=w * KIB) for w in (16, 512))
    assert _last(small, messages) > 1.5 * _last(large, messages)
    assert _last(large, messages) == pytest.approx(_last(ONE_LEAF, messages))


def test_queue_pairs_feed_nic_threads_until_they_cost_more_than_they_give():
    """A thread pushes 50 of 200 Gb/s: 4 queue pairs fill 4 threads, 1 fills one, 64 only add message costs."""
    options = dataclasses.replace(ONE_LEAF, nic_threads=4, thread_gbps=50.0, message_s=2e-6, queue_pair_cache=32)
    messages = _flows([(0, 1)], 1024 * KIB)
    took = {pairs: _last(dataclasses.replace(options, queue_pairs=pairs), messages) for pairs in (1, 2, 4, 64)}
    assert took[1] == pytest.approx(4 * 1024 * KIB / options.bytes_per_s, rel=0.05)
    assert took[2] == pytest.approx(took[1] / 2, rel=0.05)
    assert took[4] == pytest.approx(took[1] / 4, rel=0.15)
    assert took[64] > 1.3 * took[4]
    roomy = dataclasses.replace(options, queue_pairs=64, queue_pair_cache=64)
    assert _last(roomy, messages) < took[64]  # without misses in the cache of connections


INCAST = _flows([(i, 15) for i in range(8)], 1024 * KIB)
BACKED_OFF = NetworkOptions(endpoints_per_leaf=16, window_bytes=128 * KIB, congestion="back_off")
PROBED = NetworkOptions(endpoints_per_leaf=8, routing="probed", probe_paths=8)
# Long flows that come and go on other endpoints while one sends a short message every 20 us.
CHANGING = Messages(
    np.append(np.repeat(np.arange(7), 7), np.full(20, 7)),
    np.append(np.tile(np.arange(8, 15), 7), np.full(20, 15)),
    np.append(np.full(49, 256 * KIB), np.full(20, 64 * KIB)),
    np.append(np.arange(49) * 8e-6, np.arange(20) * 20e-6),
)
MISSES = dataclasses.replace(ONE_LEAF, queue_pairs=64, queue_pair_cache=32, message_s=2e-6)


@pytest.mark.parametrize(
    ("options", "field", "value", "messages"),
    [
        (ONE_LEAF, "nic_gbps", 400.0, _flows([(0, 1)], 128 * KIB)),
        (ONE_LEAF, "hop_latency_s", 5e-6, _flows([(0, 1)], 128 * KIB)),
        (ONE_LEAF, "chunk_bytes", 64 * KIB, _flows([(0, 1)], 128 * KIB)),
        (NetworkOptions(endpoints_per_leaf=8), "endpoints_per_leaf", 16, _across(8, 128 * KIB)),
        (NetworkOptions(endpoints_per_leaf=8), "uplink_gbps", 400.0, _across(8, 128 * KIB)),
        (BACKED_OFF, "mark_s", 500e-6, INCAST),
        (BACKED_OFF, "react_interval_s", 50e-6, INCAST),
        (BACKED_OFF, "recover", 0.2, INCAST),
        (PROBED, "probe_paths", 1, CHANGING),
        (PROBED, "probe_interval_s", 1.0, CHANGING),
        (MISSES, "cache_miss_s", 9e-6, _flows([(0, 1)], 1024 * KIB)),
    ],
)
def test_every_number_counts(options, field, value, messages):
    """What the tests above leave at its default changes the answer as well."""
    assert getattr(options, field) != value
    before, after = (_run(o, messages, 16) for o in (options, dataclasses.replace(options, **{field: value})))
    assert not np.allclose(before.arrived_s, after.arrived_s, rtol=1e-9, atol=0)


def test_batches_wait_for_each_other():
    messages = many_to_many(np.full((1, 32), 8 * KIB), np.array([0]), np.arange(1, 33))
    batched = dataclasses.replace(ONE_LEAF, batches=ProxyBatches(8))
    stalled = dataclasses.replace(ONE_LEAF, batches=ProxyBatches(8, 1.0, 100e-6))
    assert _last(ONE_LEAF, messages) < _last(batched, messages) < _last(stalled, messages)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rails", 9, "expected 1 to 8, got 9"),
        ("oversubscription", 3.0, "whole number of uplinks"),
        ("routing", "random", "got 'random'"),
        ("window_bytes", 1024, "at least chunk_bytes"),
        ("nic_gbps", 0.0, "more than 0"),
        ("hop_latency_s", -1.0, "at least 0"),
    ],
)
def test_impossible_options_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        NetworkOptions(**{field: value})


def test_messages_are_checked():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        _flows([(0, 1)], 0)
    with pytest.raises(ValueError, match="ids 0 to 3"):
        Network(ONE_LEAF, 4).run(_flows([(0, 4)], 10))
    with pytest.raises(ValueError, match="raise chunk_bytes"):
        Network(ONE_LEAF, 4).run(_flows([(0, 1)], 10**12))


def test_same_seed_same_answer():
    options = NetworkOptions(endpoints_per_leaf=8, congestion="switch_path", mark_s=1e-6)
    runs = [_run(options, _across(8, 256 * KIB), 16, seed).arrived_s for seed in (1, 1, 2)]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert (runs[0] != runs[2]).any()
