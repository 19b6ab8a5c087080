"""The closed-form attention:FFN ratio against its definition and against drawn requests."""

import math

import numpy as np
import pytest

from jmoe.planner.optimal_ratio import (
    BundleTimes,
    _fullest_of_subset,
    barrier_throughput,
    optimal_ratio,
    simulate_bundle,
)

TIMES = BundleTimes(attention_slope=1e-9, attention_fixed=30e-6, ffn_slope=2e-8, ffn_fixed=40e-6, exchange=50e-6)


def throughput(times, slots, context, r):
    attention = times.attention_slope * slots * context + times.attention_fixed
    return r * slots / ((r + 1) * max(attention, times.ffn_slope * r * slots + times.ffn_fixed, times.exchange))


@pytest.mark.parametrize("slots", [4, 32, 256])
@pytest.mark.parametrize("context", [10, 500, 4000])
@pytest.mark.parametrize("fixed", [1e-6, 40e-6, 400e-6])
def test_closed_form_is_the_argmax(slots, context, fixed):
    times = BundleTimes(1e-9, 30e-6, 2e-8, fixed, 50e-6)
    rule = optimal_ratio(times, slots, context)
    every = np.geomspace(rule / 50, rule * 50, 20_001)
    best = every[np.argmax([throughput(times, slots, context, r) for r in every])]
    assert rule == pytest.approx(best, rel=2e-3)


def test_rules_against_the_simulation():
    """Barrier-aware within 10 %; the mean-field rule gives up less than 1 % of the throughput."""
    for prompt, output, slots in ((100, 500, 256), (300, 100, 128)):
        mean = prompt + output - 1
        variance = prompt * (prompt - 1) + output * (output - 1)
        rule = optimal_ratio(TIMES, slots, mean)
        found = simulate_bundle(TIMES, slots, prompt, output, int(2 * rule) + 4, 400)
        best = int(found.argmax()) + 1
        ratios = np.arange(1, len(found) + 1)
        expected = barrier_throughput(TIMES, slots, mean, variance, ratios)
        np.testing.assert_allclose(expected, found, rtol=0.03)
        assert abs(ratios[expected.argmax()] / best - 1) <= 0.10
        assert found[round(rule) - 1] >= 0.99 * found.max()


def test_slots_live_on():
    """One worker that attention alone holds up: its step is its mean load, prompt and age, over many lives."""
    times = BundleTimes(1.0, 0.0, 1e-9, 0.0)
    found = simulate_bundle(times, 2, 100, 50, 1, 20_000)
    assert found[0] == pytest.approx(2 / 2 / (2 * (100 + 49)), rel=0.05)


def test_the_barrier_counts_where_contexts_vary():
    """Long, very different prompts: the fullest worker decides, and the mean-field rule asks for too many of them."""
    times = BundleTimes(1e-8, 10e-6, 2e-8, 200e-6, 10e-6)
    prompt, output, slots = 4000, 1000, 32
    rule = optimal_ratio(times, slots, prompt + output - 1)
    ratios = np.arange(1, 129)
    variance = prompt * (prompt - 1) + output * (output - 1)
    expected = barrier_throughput(times, slots, prompt + output - 1, variance, ratios)
    assert ratios[expected.argmax()] < 0.7 * rule
    assert barrier_throughput(times, slots, 5000.0, 0.0, np.array([8]))[0] == pytest.approx(
        throughput(times, slots, 5000.0, 8), rel=1e-6
    )


def test_subset_chances_are_binomial():
    chances = _fullest_of_subset(9)
    for r in range(1, 10):
        for j in range(9):
            assert chances[r - 1, j] == pytest.approx(math.comb(j, r - 1) / math.comb(9, r))


@pytest.mark.parametrize("field", ["attention_slope", "ffn_fixed"])
def test_bad_times(field):
    values = {"attention_slope": 1.0, "attention_fixed": 1.0, "ffn_slope": 1.0, "ffn_fixed": 1.0}
    with pytest.raises(ValueError, match="expected a positive time"):
        BundleTimes(**(values | {field: -1.0}))
