"""Growing sequences, imbalance, stragglers and real messages: each changes the simulated deployment as it should."""

import dataclasses

import numpy as np
import pytest

from jmoe.planner.decode_batch import DecodeBatch
from jmoe.planner.decode_model import DecodeModel
from jmoe.planner.exchange_times import ExchangeTimes, measure_slowdown
from jmoe.planner.formulas import total_time
from jmoe.planner.network_options import NetworkOptions, ProxyBatches
from jmoe.planner.performance import drawn_excess
from jmoe.planner.routing import Routing
from jmoe.planner.simulator import simulate
from jmoe.planner.stragglers import Stragglers
from jmoe.planner.workload import Workload
from jmoe.schedule import build_schedule
from jmoe.sharding.placement import ExpertPlacement

US = 1e-6


class LinearTimes:
    """T_a = 50 us + 0.1 us a row + 2 ns a cached token; T_e = 30 us + 1 us a (token, expert) pair."""

    def attention_s(self, rows, context, tensor):
        return (50 * US + 0.1 * US * rows + 2e-9 * rows * np.asarray(context)) / tensor

    def expert_s(self, rows, num_local_experts, tensor):
        return (30 * US + 1.0 * US * np.asarray(rows)) / tensor

    def head_s(self, rows, tensor):
        return np.asarray(30 * US)

    def dense_s(self, rows, context, tensor):
        return 2 * self.attention_s(rows, context, tensor)


NETWORK = NetworkOptions(endpoints_per_leaf=16)
CELL = DecodeModel(
    stage_times=LinearTimes(),
    workload=Workload((500, 700), (100, 200)),
    attention=4,
    expert=8,
    rows=64,
    num_experts_per_tok=2,
    placement=ExpertPlacement.balanced(8, 8),
    exchange=ExchangeTimes(8192, NETWORK.bytes_per_s, NETWORK.bytes_per_s, NETWORK.message_s, 5 * US),
)
SCHEDULE = build_schedule(4, 3, "one")


def _iteration_s(model: DecodeModel, num_iterations: int = 40, schedule=SCHEDULE, seed: int = 0) -> float:
    return float(simulate(schedule, model, num_iterations, seed=seed).iteration_s.mean())


def test_without_chance_it_is_the_closed_form():
    """Every expert on one node and one request length: all that is drawn is constant."""
    model = dataclasses.replace(
        CELL,
        workload=Workload((400,), (1,)),
        placement=ExpertPlacement.balanced(8, 1),
        expert=1,
        exchange=dataclasses.replace(CELL.exchange, expert_bytes_s=4 * NETWORK.bytes_per_s, message_s=0.0),
    )
    attention_s = float(LinearTimes().attention_s(64, 400, 1))
    expert_s = float(LinearTimes().expert_s(4 * 64 * 2, 8, 1))
    exchange_s = 64 * 8192 / NETWORK.bytes_per_s + 5 * US
    for m, directions in ((1, "one"), (3, "one"), (4, "both")):
        formula = float(total_time(directions, 4, m, attention_s, expert_s, exchange_s))
        took = _iteration_s(model, 2, build_schedule(4, m, directions))
        assert (formula + 30 * US) * (1 - 1e-9) <= took <= 1.005 * (formula + m * 30 * US)


def test_sequences_grow_and_requests_are_replaced():
    workload = Workload((10, 20), (5, 8))
    batch = DecodeBatch(workload, (2, 3, 50), np.random.default_rng(0), "fresh")
    first = batch.mean_context()
    assert first.shape == (2, 3)
    for _ in range(4):
        assert batch.advance() == 0
    np.testing.assert_allclose(batch.mean_context(), first + 4)
    assert batch.advance() > 0  # the short answers end
    steady = DecodeBatch(workload, (200_000,), np.random.default_rng(0))
    assert steady.mean_context() == pytest.approx(workload.mean_context, rel=0.01)
    for _ in range(20):
        steady.advance()
    assert steady.mean_context() == pytest.approx(workload.mean_context, rel=0.01)


def test_iterations_get_longer_while_sequences_grow():
    fresh = dataclasses.replace(CELL, workload=Workload((100,), (1000,)), start="fresh")
    report = simulate(build_schedule(4, 1, "one"), fresh, 300)
    grown = 4 * 200 * 64 * 2e-9  # 200 tokens more in each of 64 rows, 4 layers
    difference = report.iteration_s[250:, 0].mean() - report.iteration_s[50:100, 0].mean()
    assert difference == pytest.approx(grown, rel=0.1)


def test_longer_contexts_cost_throughput():
    long = dataclasses.replace(CELL, workload=Workload((5000,), (200,)))
    assert _iteration_s(long) > 1.5 * _iteration_s(CELL)


def test_skewed_routing_costs_throughput_and_shows_on_the_critical_path():
    skewed = dataclasses.replace(CELL, routing=Routing("zipf", zipf_exponent=1.0))
    even, uneven = (simulate(SCHEDULE, model, 40, record_iterations=8) for model in (CELL, skewed))
    assert uneven.tokens_per_s < 0.9 * even.tokens_per_s
    assert uneven.time_share["expert_excess"] > 2 * even.time_share["expert_excess"]


def test_a_recorded_histogram_and_a_placement_that_fits_it():
    """Expert 0 gets half of the traffic: a second copy on the idlest node helps."""
    hot = dataclasses.replace(CELL, routing=Routing("histogram", histogram=((7, 1, 1, 1, 1, 1, 1, 1),)))
    replicated = ExpertPlacement.of([[0], [1], [2], [3], [4], [5], [6, 0], [7, 0]])
    assert _iteration_s(dataclasses.replace(hot, placement=replicated)) < 0.9 * _iteration_s(hot)


@pytest.mark.parametrize("role", ["attention_stragglers", "expert_stragglers"])
def test_one_slow_device_slows_its_cell(role):
    slow = dataclasses.replace(CELL, **{role: Stragglers(slow_fraction=0.2, slow_factor=2.0)})
    assert _iteration_s(slow) > 1.15 * _iteration_s(CELL)


def test_stragglers_hurt_more_the_larger_the_cell():
    """All wait for the slowest of M replicas, N nodes and their ranks."""
    slow = Stragglers(slow_fraction=0.01, slow_factor=1.5)
    for groups, tensor in ((1, 1), (8, 1), (8, 8)):
        slowest = slow.factors(np.random.default_rng(0), 4000, groups, tensor).max(axis=1)
        assert slowest.mean() == pytest.approx(1 + 0.5 * (1 - 0.99 ** (groups * tensor)), abs=0.02)


def test_hiccups_show_in_the_tail_not_in_the_median():
    quiet = simulate(SCHEDULE, CELL, 300).tpot_percentiles((50, 99.5))
    hiccups = dataclasses.replace(CELL, expert_stragglers=Stragglers(hiccup_probability=1e-4, hiccup_s=5e-3))
    loud = simulate(SCHEDULE, hiccups, 300).tpot_percentiles((50, 99.5))
    assert loud[50] == pytest.approx(quiet[50], rel=0.02)
    assert loud[99.5] > 1.5 * quiet[99.5]


def test_uneven_messages_make_the_exchange_as_long_as_its_fullest_receiver():
    exchange = dataclasses.replace(CELL.exchange, latency_s=0.0, message_s=0.0)
    sent = np.full((1, 1, 1, 4), 100.0)
    received = np.array([[[[40.0, 40.0, 40.0, 280.0]]]])
    dispatch, combine = exchange.transfers(np.random.default_rng(0), sent, received, 1, 1)
    _, arrived, _ = dispatch.carry(SCHEDULE.ticks[0].attention, np.zeros((1, 4)), np.zeros((1, 4)))
    row_s = 8192 / NETWORK.bytes_per_s
    np.testing.assert_allclose(arrived[0], [100 * row_s] * 3 + [280 * row_s])
    sent_s, _, _ = combine.carry(SCHEDULE.ticks[0].attention, np.zeros((1, 4)), np.zeros((1, 4)))
    np.testing.assert_allclose(sent_s, received[0, 0] * row_s)


def test_slowdown_stretches_both_ends():
    received = np.full((1, 1, 1, 8), 50.0)
    ends = []
    for slowdown in ((1.0,), (2.0,)):
        exchange = dataclasses.replace(CELL.exchange, latency_s=0.0, slowdown=slowdown)
        for transfer in exchange.transfers(np.random.default_rng(0), np.full((1, 1, 1, 4), 100.0), received, 1, 1):
            senders, receivers = transfer.send_s.shape[-1], transfer.receive_s.shape[-1]
            start, port_free = np.zeros((1, senders)), np.zeros((1, receivers))
            sent, arrived, _ = transfer.carry(SCHEDULE.ticks[0].attention, start, port_free)
            ends.append((sent.max(), arrived.max()))
    np.testing.assert_allclose(ends[2:], 2 * np.array(ends[:2]))


def test_throughput_is_tokens_over_time_when_iterations_differ():
    report = simulate(SCHEDULE, dataclasses.replace(CELL, start="fresh"), 60)
    assert report.iteration_s.max() > 1.01 * report.iteration_s.min()
    assert report.tokens_per_s == pytest.approx(4 * 64 * 3 * 60 / report.total_s)


def test_contention_measured_on_the_network_costs_throughput():
    sizes = np.full((1, 8, 8), 128 * 1024)
    ecmp = NetworkOptions(endpoints_per_leaf=8)
    calm = measure_slowdown(dataclasses.replace(ecmp, endpoints_per_leaf=16), sizes, 10)
    conflicts = measure_slowdown(ecmp, sizes, 10)
    assert 1.0 <= calm[len(calm) // 2] < 1.15 < 1.3 < conflicts[len(conflicts) // 2]
    slowed = dataclasses.replace(CELL, exchange=dataclasses.replace(CELL.exchange, slowdown=conflicts))
    lockstep = build_schedule(4, 1, "one")  # nothing is hidden behind compute
    assert _iteration_s(slowed, schedule=lockstep) > 1.05 * _iteration_s(CELL, schedule=lockstep)


@pytest.mark.parametrize(("m", "directions"), [(1, "one"), (3, "one"), (4, "both")])
def test_totals_agree_with_every_token_and_message_simulated(m, directions):
    """The same cell twice: totals and port times, and tokens drawn one by one with their messages in the network."""
    sizes = np.full((1, 4, 8), 16 * 8192)
    totals = dataclasses.replace(CELL, exchange=ExchangeTimes.measured(NETWORK, 8192, sizes, repeats=10))
    messages = dataclasses.replace(CELL, exchange=NETWORK, row_bytes=8192)
    schedule = build_schedule(3, m, directions)
    assert _iteration_s(totals, 12, schedule) == pytest.approx(_iteration_s(messages, 4, schedule), rel=0.05)


@pytest.mark.parametrize(
    "options",
    [
        dataclasses.replace(NETWORK, endpoints_per_leaf=4),
        dataclasses.replace(NETWORK, batches=ProxyBatches(4, 0.3, 200 * US)),
    ],
    ids=["hash conflicts", "batches with stalls"],
)
def test_the_network_of_messages_sets_the_pace_of_decoding(options):
    """One micro-batch, so that nothing hides the exchange; every row to every node."""
    one = build_schedule(2, 1, "one")
    plain = dataclasses.replace(CELL, exchange=NETWORK, row_bytes=16 * 1024, num_experts_per_tok=8)
    assert _iteration_s(dataclasses.replace(plain, exchange=options), 3, one) > 1.05 * _iteration_s(plain, 3, one)


def test_same_seed_same_report():
    runs = [simulate(SCHEDULE, CELL, 5, seed=seed).tpot_s for seed in (3, 3, 4)]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert (runs[0] != runs[2]).any()


def test_dense_layers_run_in_front():
    dense = dataclasses.replace(CELL, num_dense_layers=3)
    extra = 3 * float(LinearTimes().dense_s(64, CELL.workload.mean_context, 1))
    one = build_schedule(4, 1, "one")
    assert _iteration_s(dense, schedule=one) - _iteration_s(CELL, schedule=one) == pytest.approx(extra, rel=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expert": 4}, "expected 4 nodes"),
        ({"rows": 0}, r"rows: expected at least 1, got 0"),
        ({"num_experts_per_tok": 9}, "expected 1 to 8, got 9"),
        ({"exchange": NETWORK, "attention_tensor": 2}, "equal tensor sizes"),
        ({"exchange": NETWORK}, "row_bytes"),
    ],
)
def test_impossible_cells_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CELL, **change)


def test_drawn_routing_is_what_the_search_should_price():
    """Where experts set the pace an even split is 6 % too fast and the chance excess at most 5 % too slow."""
    model = dataclasses.replace(CELL, workload=Workload((10,), (1,)))
    excess = float(drawn_excess(8, 2, 1, 8, 4 * 64))
    attention_s = float(LinearTimes().attention_s(64, 10, 1))
    took = _iteration_s(model, 60)
    formula = {}
    for name, factor in (("even", 1.0), ("drawn", excess)):
        expert_s = float(LinearTimes().expert_s(4 * 64 * 2 / 8 * factor, 1, 1))
        exchange_s = 64 * 2 * 8192 / 2 / NETWORK.bytes_per_s + 5 * US
        formula[name] = float(total_time("one", 4, 3, attention_s, expert_s, exchange_s)) + 30 * US
    assert formula["even"] < 0.96 * took
    assert took < formula["drawn"] < 1.05 * took
