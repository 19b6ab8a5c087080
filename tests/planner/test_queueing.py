"""Kingman's formula against simulated queues."""

import numpy as np
import pytest

from jmoe.planner.network import Network
from jmoe.planner.network_messages import Messages
from jmoe.planner.network_options import NetworkOptions
from jmoe.planner.queueing import kingman_wait_s, waits_s

NUM = 400_000


def _between(rng, cv2, n):
    """Times of mean 1 and the given squared coefficient of variation."""
    return np.ones(n) if cv2 == 0 else rng.gamma(1 / cv2, cv2, n)


def test_waits_follow_the_definition():
    rng = np.random.default_rng(0)
    arrival, service = np.cumsum(rng.exponential(1, 300)), rng.exponential(0.9, 300)
    free, expected = 0.0, []
    for a, s in zip(arrival, service, strict=True):
        expected.append(max(free - a, 0.0))
        free = max(free, a) + s
    np.testing.assert_allclose(waits_s(arrival, service), expected, atol=1e-9)


@pytest.mark.parametrize("service_cv2", [0, 0.5, 1, 2])
@pytest.mark.parametrize("utilisation", [0.5, 0.8])
def test_kingman_is_exact_for_poisson_arrivals(utilisation, service_cv2):
    rng = np.random.default_rng(1)
    arrival = np.cumsum(_between(rng, 1, NUM)) / utilisation
    mean = waits_s(arrival, _between(rng, service_cv2, NUM)).mean()
    assert mean == pytest.approx(float(kingman_wait_s(utilisation, 1.0, 1, service_cv2)), rel=0.08)


@pytest.mark.parametrize(("arrival_cv2", "service_cv2"), [(0.5, 0), (0.5, 1), (2, 0.5), (3, 1)])
def test_kingman_is_close_in_heavy_traffic(arrival_cv2, service_cv2):
    rng = np.random.default_rng(2)
    arrival = np.cumsum(_between(rng, arrival_cv2, NUM)) / 0.9
    mean = waits_s(arrival, _between(rng, service_cv2, NUM)).mean()
    assert mean == pytest.approx(float(kingman_wait_s(0.9, 1.0, arrival_cv2, service_cv2)), rel=0.15)


@pytest.mark.parametrize("utilisation", [0.5, 0.8])
def test_kingman_predicts_the_queue_of_a_simulated_nic(utilisation):
    """Single chunks of two sizes from 200 senders to one receiver: the receiving NIC is an M/G/1 queue."""
    rng = np.random.default_rng(3)
    num, options = 20_000, NetworkOptions(endpoints_per_leaf=201, message_s=0.0, hop_latency_s=0.0)
    sizes = rng.choice([2048, 8192], num)
    service = sizes / options.bytes_per_s
    ready = np.cumsum(rng.exponential(service.mean() / utilisation, num))
    arrived = Network(options, 201).run(Messages(np.arange(num) % 200, np.full(num, 200), sizes, ready)).arrived_s
    waited = arrived - ready - 3 * service  # NIC thread, sending NIC and receiving NIC take one service each
    predicted = kingman_wait_s(utilisation, service.mean(), 1, service.var() / service.mean() ** 2)
    assert waited.mean() == pytest.approx(float(predicted), rel=0.1)


def test_kingman_refuses_a_full_queue():
    with pytest.raises(ValueError, match="rho < 1, got"):
        kingman_wait_s(1.0, 1.0, 1.0, 1.0)
