"""How many attention workers one FFN instance should serve, in closed form, and the simulation that checks it. No JAX.

The rA-1F bundle of arXiv 2601.21351: r attention workers of B slots each, one FFN instance for all of them, every step
as long as the slowest of attention (linear in KV tokens), FFN (linear in rows) and communication.
"""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True, slots=True)
class BundleTimes:
    """Linear latencies of one step, in one unit of time.

    Attributes:
      attention_slope, attention_fixed: of a worker, per KV token.
      ffn_slope, ffn_fixed: of the FFN instance, per row.
      exchange: of a step, both ways.
    """

    attention_slope: float
    attention_fixed: float
    ffn_slope: float
    ffn_fixed: float
    exchange: float = 0.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if not getattr(self, field.name) >= 0 or (field.name.endswith("slope") and not getattr(self, field.name)):
                raise ValueError(f"BundleTimes.{field.name}: expected a positive time, got {getattr(self, field.name)}")


def optimal_ratio(times: BundleTimes, slots: int, mean_context: float) -> float:
    """The r that maximises tokens a second and instance, r B / ((r + 1) max(T_a, T_f(r), T_c)).

    r* = max(r_A, r_C, r_peak): r_A and r_C fill the FFN instance up to the attention's or the exchange's time,
    r_peak = sqrt(ffn_fixed / (ffn_slope B)) is the optimum of a step that the FFN alone decides.

    Args:
      times: latencies.
      slots: B, decode slots of a worker.
      mean_context: KV tokens of a slot, averaged over its life (`Workload.mean_context`).

    Source: arXiv 2601.21351, Theorem 4.4.
    """
    per_worker = times.ffn_slope * slots
    attention = times.attention_slope * slots * mean_context + times.attention_fixed
    thresholds = [(limit - times.ffn_fixed) / per_worker for limit in (attention, times.exchange)]
    return max(*thresholds, math.sqrt(times.ffn_fixed / per_worker))


def barrier_throughput(
    times: BundleTimes, slots: int, mean_context: float, variance: float, ratios: np.ndarray
) -> np.ndarray:
    """Expected tokens a second and instance when every step waits for the fullest of r workers.

    A worker's KV tokens are nearly normal with mean B c and variance B v, so a step takes E[max(T_a(fullest), T_f,
    T_c)], integrated over the largest of r normals. The best of it is the rule to use where r is large: the mean-field
    rule does not see that another worker also makes every step longer.

    Args:
      times: latencies.
      slots: B.
      mean_context, variance: of one slot's KV tokens (`Workload.mean_context`, `Workload.context_variance`).
      ratios: r to try, int array.

    Returns:
      Throughput for each of them.

    Source: the Gaussian refinement of arXiv 2601.21351 (version 3 on).
    """
    from scipy.special import ndtr  # here, so that the module loads without the planner extra

    z = np.linspace(-8.0, 10.0, 2001)
    below = ndtr(z) ** np.asarray(ratios, np.float64)[:, None]  # P(largest of r normals <= z)
    weights = np.diff(below, axis=1)
    middle = (z[1:] + z[:-1]) / 2
    spread = times.attention_slope * np.sqrt(slots * variance)
    attention = times.attention_slope * slots * mean_context + times.attention_fixed + spread * middle
    other = np.maximum(times.ffn_slope * slots * ratios + times.ffn_fixed, times.exchange)
    step = (weights * np.maximum(attention, other[:, None])).sum(1) / weights.sum(1)
    return ratios * slots / (ratios + 1) / step


def simulate_bundle(
    times: BundleTimes,
    slots: int,
    mean_prompt: float,
    mean_output: float,
    max_ratio: int,
    num_steps: int,
    seed: int = 0,
    far_apart: bool = False,
) -> np.ndarray:
    """Tokens a second and instance for r = 1..max_ratio, from drawn requests (geometric lengths, refilled at once).

    Args:
      times: latencies.
      slots: B.
      mean_prompt, mean_output: of the geometric lengths, tokens.
      max_ratio: workers drawn; a bundle of r is averaged over all r-subsets of them, the draws being few and slow to
        change (a slot's context is correlated over a whole answer).
      num_steps: steps averaged; the start is already steady.
      seed: of the draws.
      far_apart: average steps that are many answers apart instead of consecutive ones. Lives are memoryless, so the
        state is a fresh draw each time; consecutive steps share theirs for an answer's life, 1,500 may be two draws.

    Returns:
      `[max_ratio]`, throughput at r - 1.
    """
    rng = np.random.default_rng(seed)
    shape = (max_ratio, slots)
    prompt = rng.geometric(1 / mean_prompt, shape)
    made = rng.geometric(1 / mean_output, shape) - 1  # the age of a geometric life is geometric: already steady
    total = np.zeros(max_ratio)
    ratios = np.arange(1, max_ratio + 1)
    other = np.maximum(times.ffn_slope * slots * ratios + times.ffn_fixed, times.exchange)
    is_fullest = _fullest_of_subset(max_ratio)
    for _ in range(num_steps):
        tokens = np.sort((prompt + made).sum(1))
        attention = times.attention_slope * tokens + times.attention_fixed
        total += (is_fullest * np.maximum(attention[None, :], other[:, None])).sum(1)
        if far_apart:
            prompt = rng.geometric(1 / mean_prompt, shape)
            made = rng.geometric(1 / mean_output, shape) - 1
            continue
        ends = rng.random(shape) < 1 / mean_output
        made = np.where(ends, 0, made + 1)
        prompt = np.where(ends, rng.geometric(1 / mean_prompt, shape), prompt)
    return ratios * slots / (ratios + 1) / (total / num_steps)


def _fullest_of_subset(size: int) -> np.ndarray:
    """`[r - 1, j]`: chance that the j-th smallest of `size` values is the largest of a random r-subset."""
    chances = np.zeros((size, size))
    for r in range(1, size + 1):
        # C(j, r - 1) / C(size, r) by a running product: the largest is taken with r / size, and so on downwards.
        left = r / size
        for j in range(size - 1, r - 2, -1):
            chances[r - 1, j] = left
            left *= (j - r + 1) / j if j else 0.0
    return chances
