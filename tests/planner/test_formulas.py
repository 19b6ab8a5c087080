"""The closed forms against a walk of the schedule's precedence graph, one stage at a time."""

import itertools

import numpy as np
import pytest

from jmoe.planner.formulas import SCHEDULE_KINDS, head_time, layer_period, total_time
from jmoe.schedule import build_schedule

GRID = [(1.0, e, c) for e in (0.3, 0.8, 1.0, 1.7) for c in (0.0, 0.1, 0.3, 0.45, 0.55, 0.8, 1.0, 1.3, 2.0)]


def walk_chain(directions, num_layers, m, a, e, c):
    """Start every stage when its lane is free and its input has come; exchanges share one lane."""
    free = {"attention": 0.0, "expert": 0.0, "exchange": 0.0}
    made, arrived = {}, {}
    for tick in build_schedule(num_layers, m, directions).ticks:
        started = {}
        if (s := tick.attention) is not None and s.layer < num_layers:
            ready = arrived["combine", s.layer - 1, s.micro_batch] if s.layer else 0.0
            free["attention"] = max(free["attention"], ready) + a
            started["attention", s.layer, s.micro_batch] = free["attention"]
        if (s := tick.expert) is not None:
            free["expert"] = max(free["expert"], arrived["dispatch", s.layer, s.micro_batch]) + e
            started["expert", s.layer, s.micro_batch] = free["expert"]
        if (x := tick.exchange) is not None:
            ready = free["exchange"]
            if x.dispatch is not None:
                ready = max(ready, made["attention", x.dispatch.layer, x.dispatch.micro_batch])
            if x.combine is not None:
                ready = max(ready, made["expert", x.combine.layer, x.combine.micro_batch])
            free["exchange"] = ready + c
            for way, stage in (("dispatch", x.dispatch), ("combine", x.combine)):
                if stage is not None:
                    arrived[way, stage.layer, stage.micro_batch] = ready + c
        made |= started
    return arrived["combine", num_layers - 1, m - 1]


def walk_separate(num_layers, m, a, e, c):
    """Four lanes, each in the order layer by layer, micro-batch by micro-batch."""
    lanes = np.zeros(4)
    back = np.zeros(m)
    for _, i in itertools.product(range(num_layers), range(m)):
        t = back[i]
        for lane, length in enumerate((a, c, e, c)):
            lanes[lane] = t = max(lanes[lane], t) + length
        back[i] = t
    return back[-1]


@pytest.mark.parametrize("m", range(1, 8))
@pytest.mark.parametrize("num_layers", [1, 2, 5, 12])
@pytest.mark.parametrize("directions", ["one", "both"])
def test_chain_formula_is_exact(directions, num_layers, m):
    for a, e, c in GRID:
        expected = walk_chain(directions, num_layers, m, a, e, c)
        np.testing.assert_allclose(total_time(directions, num_layers, m, a, e, c), expected, rtol=1e-12)


@pytest.mark.parametrize("m", range(1, 7))
@pytest.mark.parametrize("num_layers", [1, 2, 9])
def test_design_formula_is_exact_with_separate_lanes(num_layers, m):
    for a, e, c in GRID:
        expected = walk_separate(num_layers, m, a, e, c)
        np.testing.assert_allclose(total_time("separate", num_layers, m, a, e, c), expected, rtol=1e-12)


@pytest.mark.parametrize("directions", ["one", "both"])
def test_random_times(directions):
    rng = np.random.default_rng(3)
    for _ in range(300):
        a, e, c = rng.exponential(1.0, 3)
        num_layers, m = int(rng.integers(1, 8)), int(rng.integers(1, 9))
        expected = walk_chain(directions, num_layers, m, a, e, c)
        np.testing.assert_allclose(total_time(directions, num_layers, m, a, e, c), expected, rtol=1e-12)


def test_when_each_schedule_is_full():
    """Lockstep fills at m = 4 and one direction an exchange at m = 3 while T_c <= T_f / 2 (DESIGN section 4)."""
    assert layer_period("both", 4, 1.0, 1.0, 0.9) == pytest.approx(4.0)
    assert layer_period("both", 3, 1.0, 1.0, 0.4) == pytest.approx(3.4)
    assert layer_period("one", 3, 1.0, 1.0, 0.5) == pytest.approx(3.0)
    assert layer_period("one", 3, 1.0, 1.0, 0.6) == pytest.approx(3.6)
    assert layer_period("separate", 3, 1.0, 1.0, 0.5) == pytest.approx(3.0)


@pytest.mark.parametrize("kind", SCHEDULE_KINDS)
@pytest.mark.parametrize("m", range(1, 7))
def test_layer_period_is_what_one_more_layer_adds(kind, m):
    for a, e, c in GRID:
        added = total_time(kind, 1001, m, a, e, c) - total_time(kind, 1000, m, a, e, c)
        np.testing.assert_allclose(layer_period(kind, m, a, e, c), added, rtol=1e-9)


def test_broadcasts_over_arrays():
    c = np.linspace(0.0, 2.0, 7)
    for kind in SCHEDULE_KINDS:
        whole = total_time(kind, 4, 3, 1.0, 0.9, c)
        assert whole.tolist() == [float(total_time(kind, 4, 3, 1.0, 0.9, x)) for x in c]


def test_head_is_hidden_but_for_the_last():
    assert head_time(4, 0.5, 1.0) == 0.5
    assert head_time(4, 1.5, 1.0) == 1.5 + 3 * 0.5


@pytest.mark.parametrize("bad", [("both", 0, 1), ("both", 1, 0), ("four", 2, 2)])
def test_bad_arguments(bad):
    with pytest.raises(ValueError, match="expected"):
        total_time(*bad, 1.0, 1.0, 1.0)
