"""Exact loads of slots and workers against counting and against drawn requests."""

import numpy as np
import pytest

from jmoe.planner.optimal_ratio import BundleTimes, barrier_throughput, simulate_bundle
from jmoe.planner.worker_load import barrier_throughput_exact, geometric_slot_load, slot_load, worker_load
from jmoe.planner.workload import Workload


def test_a_slot_by_counting():
    """Prompts of 2 and 4 with answers of 3 and 1: contexts 2, 3, 4 and 4, a step each."""
    np.testing.assert_allclose(slot_load([2, 4], [3, 1]), np.array([0, 0, 1, 1, 2]) / 4)


def test_moments_are_the_workloads():
    work = Workload.lognormal(300, 60, 0.7, size=257)
    slot = slot_load(work.prompt_lens, work.output_lens)
    tokens = np.arange(len(slot))
    assert slot @ tokens == pytest.approx(work.mean_context)
    load = worker_load(slot, 16)
    tokens = np.arange(len(load))
    mean = load @ tokens
    assert mean == pytest.approx(16 * work.mean_context, rel=1e-6)
    assert load @ (tokens - mean) ** 2 == pytest.approx(16 * work.context_variance, rel=1e-4)


def test_the_barrier_against_drawn_requests_that_are_not_gaussian():
    """Four slots with geometric prompts: exact within 0.5 %, where the Gaussian form is off by several per cent."""
    times = BundleTimes(1e-8, 1e-6, 2e-8, 2e-6, 1e-6)
    prompt, output, slots = 400, 100, 4
    ratios = np.arange(1, 33)
    found = simulate_bundle(times, slots, prompt, output, 32, 3000, far_apart=True)
    exact = barrier_throughput_exact(times, worker_load(geometric_slot_load(prompt, output), slots), slots, ratios)
    np.testing.assert_allclose(exact, found, rtol=5e-3)
    variance = prompt * (prompt - 1) + output * (output - 1)
    gauss = barrier_throughput(times, slots, prompt + output - 1, variance, ratios)
    assert np.abs(gauss / found - 1).max() > 0.03
    assert abs(ratios[exact.argmax()] - (found.argmax() + 1)) <= 1


def test_one_worker_waits_for_nobody():
    times = BundleTimes(1.0, 0.5, 1e-9, 0.0)
    load = worker_load(slot_load([10], [1]), 3)
    assert barrier_throughput_exact(times, load, 3, np.array([1]))[0] == pytest.approx(3 / 2 / 30.5)


def test_far_too_many_tokens_are_refused():
    with pytest.raises(ValueError, match="at most"):
        worker_load(slot_load([100_000], [1]), 1000)
