"""The closed forms of one pass and the simulator agree, for every schedule that is built."""

import itertools

import pytest

from jmoe.planner.formulas import total_time
from jmoe.planner.simulator import ConstantTimes, simulate
from jmoe.schedule import build_schedule

LAYERS = (1, 2, 5, 12)
EXPERT = (0.3, 0.9, 1.0, 1.6)  # of T_a = 1
EXCHANGE = (0.0, 0.1, 0.3, 0.5, 0.75, 1.0, 1.4, 2.0)
KINDS = {"separate": ("one", "separate"), "one": ("one", "chain"), "both": ("both", "chain")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", range(1, 7))
def test_formula_agrees_with_the_simulator(kind, m):
    directions, exchange_lanes = KINDS[kind]
    for layers in LAYERS:
        schedule = build_schedule(layers, m, directions)
        for expert_s, exchange_s in itertools.product(EXPERT, EXCHANGE):
            report = simulate(schedule, ConstantTimes(1.0, expert_s, exchange_s), exchange_lanes=exchange_lanes)
            formula = float(total_time(kind, layers, m, 1.0, expert_s, exchange_s))
            assert report.total_s == pytest.approx(formula, rel=0.005), (layers, expert_s, exchange_s)
