"""M2N under load: line rate for whole posts, and the tail of posts in batches predicted from one point."""

import dataclasses

import numpy as np
import pytest

from jmoe.planner.m2n_tail import fit_stall_period, line_rate_s, middle_stall_probability, transfer_quantile_s
from jmoe.planner.network import Network
from jmoe.planner.network_messages import many_to_many
from jmoe.planner.network_options import NetworkOptions, ProxyBatches

MESSAGE, GBPS = 128 * 1024, 200.0
MEASURED_P99 = {8: 1090e-6, 16: 1220e-6, 32: 1760e-6}  # arXiv 2504.02263: batches of 8 over NCCL


@pytest.mark.parametrize("num_receivers", MEASURED_P99)
def test_median_is_near_line_rate(num_receivers):
    """All senders at once, starting within a few microseconds of each other, under one leaf of 64 ports."""
    rng = np.random.default_rng(num_receivers)
    ends = np.arange(num_receivers)
    sizes = np.full((num_receivers, num_receivers), MESSAGE)
    took = []
    for _ in range(3):
        start = rng.exponential(1e-6, num_receivers)
        messages = many_to_many(sizes, ends, num_receivers + ends, start)
        arrived = Network(NetworkOptions(endpoints_per_leaf=64), 2 * num_receivers).run(messages).arrived_s
        took += [arrived[messages.sender == sender].max() - start[sender] for sender in ends]
    line_rate = line_rate_s(num_receivers, MESSAGE, GBPS)
    assert line_rate <= np.median(took) <= 1.10 * line_rate


@pytest.mark.parametrize("num_receivers", [16, 32])
def test_tail_fitted_at_8_receivers_predicts_more(num_receivers):
    batches = fit_stall_period(MEASURED_P99[8], 8, MESSAGE, GBPS)
    assert transfer_quantile_s(batches, 8, MESSAGE, GBPS, 0.99) == pytest.approx(MEASURED_P99[8])
    predicted = transfer_quantile_s(batches, num_receivers, MESSAGE, GBPS, 0.99)
    assert predicted == pytest.approx(MEASURED_P99[num_receivers], rel=0.25)


def test_median_of_batches_stays_near_line_rate():
    batches = fit_stall_period(MEASURED_P99[8], 8, MESSAGE, GBPS)
    for num_receivers in MEASURED_P99:
        median = transfer_quantile_s(batches, num_receivers, MESSAGE, GBPS, 0.5)
        assert median == pytest.approx(line_rate_s(num_receivers, MESSAGE, GBPS))


def test_closed_form_tail_is_that_of_the_simulated_network():
    """1,500 transfers of 32 messages in 4 batches: the empirical distribution against the closed form."""
    num, batches = 1500, ProxyBatches(stall_probability=0.2, stall_period_s=1e-3)
    options = NetworkOptions(endpoints_per_leaf=64, batches=batches, chunk_bytes=MESSAGE, nic_threads=1)
    network = Network(options, 33)
    messages = many_to_many(np.full((1, 32), MESSAGE), np.array([0]), np.arange(1, 33))
    took, start = [], 0.0
    for _ in range(num):
        later = dataclasses.replace(messages, ready_s=np.full(32, start))
        end = network.run(later).arrived_s.max()
        took.append(end - start)
        start = end
    for quantile in (0.5, 0.8, 0.95):
        expected = transfer_quantile_s(batches, 32, MESSAGE, GBPS, quantile)
        # a batch also drains through two links and an acknowledgement before the next: some 15 us each
        assert np.quantile(took, quantile) == pytest.approx(expected + 60e-6, rel=0.1)


def test_fit_refuses_what_it_cannot_explain():
    assert middle_stall_probability() == pytest.approx(0.0399, abs=1e-4)
    with pytest.raises(ValueError, match="at least line rate"):
        fit_stall_period(40e-6, 8, MESSAGE, GBPS)
    with pytest.raises(ValueError, match=r"expected more than 0\.01"):
        fit_stall_period(1090e-6, 8, MESSAGE, GBPS, stall_probability=0.005)
