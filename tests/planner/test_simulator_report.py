"""What a simulation reports: percentiles, utilisation, events, the critical path, and its refusals."""

import numpy as np
import pytest

from jmoe.planner.lanes import LANES
from jmoe.planner.simulator import ConstantTimes, simulate
from jmoe.schedule import build_schedule

BALANCED = ConstantTimes(1.0, 0.9, 0.25, head_s=0.1, rows=10, num_gpus=4)


def test_every_iteration_takes_the_same_with_constant_times():
    report = simulate(build_schedule(6, 3, "one"), BALANCED, 5)
    np.testing.assert_allclose(report.iteration_s, report.total_s / 5)
    np.testing.assert_allclose(report.tpot_s, report.total_s / 5)
    assert report.tpot_percentiles((1.0, 99.0)) == pytest.approx({1.0: report.total_s / 5, 99.0: report.total_s / 5})
    assert report.tokens_per_s == pytest.approx(3 * 10 * 5 / report.total_s)
    assert report.tokens_per_s_per_gpu == pytest.approx(report.tokens_per_s / 4)


@pytest.mark.parametrize("directions", ["one", "both"])
def test_utilisation_is_work_over_time(directions):
    report = simulate(build_schedule(6, 4, directions), BALANCED, 2)
    stages = 6 * 4
    work = {
        "attention": stages * 1.0 + 4 * 0.1,
        "dispatch": stages * 0.25,
        "expert": stages * 0.9,
        "combine": stages * 0.25,
    }
    assert report.lane_utilisation == pytest.approx({k: 2 * v / report.total_s for k, v in work.items()})


@pytest.mark.parametrize("directions", ["one", "both"])
def test_events_are_the_schedule_with_times(directions):
    schedule = build_schedule(4, 3, directions)
    report = simulate(schedule, BALANCED, 3, record_iterations=3)
    events = report.events
    assert events is not None
    stages = [(0, t.attention) for t in schedule.ticks if t.attention]
    stages += [(1, t.exchange.dispatch) for t in schedule.ticks if t.exchange and t.exchange.dispatch]
    stages += [(2, t.expert) for t in schedule.ticks if t.expert]
    stages += [(3, t.exchange.combine) for t in schedule.ticks if t.exchange and t.exchange.combine]
    want = sorted((i, lane, s.layer, s.micro_batch) for i in range(3) for lane, s in stages)
    columns = events.iteration, events.lane, events.layer, events.micro_batch
    assert sorted(zip(*(c.tolist() for c in columns), strict=True)) == want
    for lane in LANES:  # a lane does one thing at a time, in the order of the schedule
        rows = events.of_lane(lane)
        assert (rows.start_s[1:] >= rows.end_s[:-1] - 1e-9).all()
    assert events.end_s.max() == report.total_s


@pytest.mark.parametrize(
    ("times", "kind", "least"),
    [
        (ConstantTimes(1.0, 0.2, 0.05), "attention", 0.9),
        (ConstantTimes(0.2, 1.0, 0.05), "expert", 0.9),
        (ConstantTimes(0.2, 0.2, 1.0), "dispatch", 0.4),
        (ConstantTimes(0.1, 0.1, 0.01, head_s=20.0), "head", 0.9),
    ],
)
def test_critical_path_names_what_is_slow(times, kind, least):
    report = simulate(build_schedule(12, 3, "one"), times, 2, record_iterations=2)
    assert sum(report.time_share.values()) == pytest.approx(1.0)
    assert report.time_share["before"] == 0.0
    assert report.time_share[kind] > least


def test_one_micro_batch_spends_its_time_on_every_part_in_turn():
    report = simulate(build_schedule(5, 1, "one"), ConstantTimes(1.0, 0.5, 0.25), record_iterations=1)
    assert report.time_share == pytest.approx(
        {"attention": 0.5, "expert": 0.25, "dispatch": 0.125, "combine": 0.125}
        | dict.fromkeys(("attention_excess", "expert_excess", "head", "before"), 0.0)
    )


def test_nothing_recorded_unless_asked_for():
    report = simulate(build_schedule(2, 3, "one"), BALANCED)
    assert report.events is None and report.time_share == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_iterations": 0}, "expected 1 to"),
        ({"record_iterations": 2}, "expected 0 to 1, got 2"),
        ({"exchange_lanes": "two"}, "got 'two'"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        simulate(build_schedule(2, 3, "one"), BALANCED, **arguments)


def test_a_report_too_large_to_keep_is_refused():
    with pytest.raises(ValueError, match="at most 200000000 iterations"):
        simulate(build_schedule(1, 300, "one"), BALANCED, 1_000_000)


def test_lockstep_has_no_separate_lanes():
    with pytest.raises(ValueError, match="expected 'chain'"):
        simulate(build_schedule(2, 4, "both"), BALANCED, exchange_lanes="separate")
    with pytest.raises(ValueError, match=r"ConstantTimes\.expert_s: expected at least 0"):
        ConstantTimes(1.0, -1.0, 0.0)
