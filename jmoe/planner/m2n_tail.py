"""The tail of one-to-many transfers in batches through a host thread: a closed form, fitted at one point. No JAX.

A transfer to n receivers is ceil(n / batch) batches one after the other. Each is stalled with probability p, and then
for a time uniform over a period P (`ProxyBatches`). So the transfer takes n * bytes / rate plus a sum of uniforms whose
number is binomial: the tail of many batches follows from the tail of one.
"""

import dataclasses
import math
from collections.abc import Callable

from jmoe.planner.network_options import ProxyBatches


def middle_stall_probability(quantile: float = 0.99, most_batches: int = 4) -> float:
    """The stall probability where one tail figure does not tell it: the geometric middle of what is possible.

    With one batch the tail quantile must be a stall: p > 1 - quantile. With most_batches the median must still be free
    of stalls, since medians were measured near line rate: (1 - p) ** most_batches > 1/2. Returns sqrt(low * high),
    0.040 for the 99th percentile and 4 batches.
    """
    return math.sqrt((1 - quantile) * (1 - 0.5 ** (1 / most_batches)))


def line_rate_s(num_receivers: int, num_bytes: int, gbps: float) -> float:
    """num_receivers messages of num_bytes through one NIC of gbps (10^9 bits/s), back to back, in seconds."""
    return num_receivers * num_bytes * 8 / (gbps * 1e9)


def transfer_quantile_s(
    batches: ProxyBatches, num_receivers: int, num_bytes: int, gbps: float, quantile: float
) -> float:
    """Quantile of the time to send num_bytes to each of num_receivers.

    P(stalls <= x) = sum_j C(n, j) p^j (1 - p)^(n - j) F_j(x / P), F_j the distribution of a sum of j uniforms
    (Irwin-Hall), n = ceil(num_receivers / batch); inverted by bisection.

    Args:
      batches: batch size, stall probability and period.
      num_receivers, num_bytes, gbps: the transfer.
      quantile: 0 to 1, exclusive.

    Returns:
      Seconds.

    Raises:
      ValueError: a quantile out of range.
    """
    if not 0 < quantile < 1:
        raise ValueError(f"transfer_quantile_s.quantile: expected between 0 and 1, got {quantile}")
    n, p = -(-num_receivers // batches.batch), batches.stall_probability
    weights = [math.comb(n, j) * p**j * (1 - p) ** (n - j) for j in range(n + 1)]

    def not_above(periods: float) -> float:
        return sum(w * _sum_of_uniforms(j, periods) for j, w in enumerate(weights))

    return line_rate_s(num_receivers, num_bytes, gbps) + batches.stall_period_s * _invert(not_above, quantile, n)


def fit_stall_period(
    measured_s: float,
    num_receivers: int,
    num_bytes: int,
    gbps: float,
    quantile: float = 0.99,
    batch: int = 8,
    stall_probability: float | None = None,
) -> ProxyBatches:
    """Fits the one free parameter, the stall period, to one measured tail.

    The quantile is linear in the period, so the fit is a division.

    Args:
      measured_s: the measured quantile, in seconds.
      num_receivers, num_bytes, gbps: of the measured transfer.
      quantile: which one was measured.
      batch: messages of a batch.
      stall_probability: None for `middle_stall_probability(quantile)`.

    Returns:
      The fitted batches.

    Raises:
      ValueError: a measurement below line rate, or a probability too small to reach the quantile.
    """
    p = middle_stall_probability(quantile) if stall_probability is None else stall_probability
    base = line_rate_s(num_receivers, num_bytes, gbps)
    if measured_s < base:
        raise ValueError(
            f"fit_stall_period.measured_s: expected at least line rate, {base:.3g} s, got {measured_s:.3g}"
        )
    unit = ProxyBatches(batch, p, 1.0)
    periods = transfer_quantile_s(unit, num_receivers, num_bytes, gbps, quantile) - base
    if periods <= 0:
        raise ValueError(
            f"fit_stall_period.stall_probability: expected more than {1 - quantile:.3g}, so that the quantile "
            f"{quantile} is a stall, got {p:.3g}"
        )
    return dataclasses.replace(unit, stall_period_s=(measured_s - base) / periods)


def _sum_of_uniforms(count: int, x: float) -> float:
    """P(sum of `count` uniforms on [0, 1] <= x), Irwin-Hall; exact to 1e-9 up to about 20."""
    if x >= count:
        return 1.0
    terms = ((-1) ** k * math.comb(count, k) * (x - k) ** count for k in range(math.floor(x) + 1))
    return sum(terms) / math.factorial(count)


def _invert(not_above: Callable[[float], float], quantile: float, most: float) -> float:
    low, high = 0.0, float(most)
    if not_above(low) >= quantile:
        return 0.0
    for _ in range(60):  # to 2^-60 of the range
        middle = (low + high) / 2
        low, high = (low, middle) if not_above(middle) >= quantile else (middle, high)
    return high
