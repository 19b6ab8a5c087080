"""How KV tokens are distributed over a decoding pool's slots and workers, exactly, and what its barrier costs. No JAX.

The Gaussian refinement of arXiv 2601.21351 knows a worker's load by mean and variance. The sum of few slots with
long-tailed prompts is not Gaussian; its distribution is the slot's, convolved with itself once a slot.
"""

import numpy as np
from numpy.typing import ArrayLike

from jmoe.planner.optimal_ratio import BundleTimes

MAX_TOKENS = 1 << 24
POINTS = 16_384  # of a load's distribution, when the largest of several is looked for


def slot_load(prompt_lens: ArrayLike, output_lens: ArrayLike) -> np.ndarray:
    """Chances of 0, 1, 2, ... KV tokens in a slot at a random step; a slot is refilled at once.

    A request of prompt p and answer d holds p, p + 1, ..., p + d - 1 tokens, a step each.

    Args:
      prompt_lens, output_lens: one entry a request.
    """
    prompts, outputs = np.asarray(prompt_lens, np.int64), np.asarray(output_lens, np.int64)
    steps = np.zeros(int((prompts + outputs).max()) + 1)
    np.add.at(steps, prompts, 1.0)
    np.add.at(steps, prompts + outputs, -1.0)
    held = np.cumsum(steps)[:-1]
    return held / held.sum()


def geometric_slot_load(mean_prompt: float, mean_output: float) -> np.ndarray:
    """As `slot_load`, for geometric prompts and answers: the prompt plus an age that is geometric as well."""
    length = 36  # of e-foldings: what is cut off weighs 1e-15
    p = _geometric(1 / mean_prompt, int(length * mean_prompt) + 2, 1)
    age = _geometric(1 / mean_output, int(length * mean_output) + 2, 0)
    return _convolve(p, age)


def worker_load(slot: np.ndarray, slots: int) -> np.ndarray:
    """Chances of 0, 1, 2, ... KV tokens on a worker with so many independent slots.

    Raises:
      ValueError: more tokens than can be kept.
    """
    mean = float(slot @ np.arange(len(slot)))
    spread = float(np.sqrt(slot @ (np.arange(len(slot)) - mean) ** 2))
    # Far tails are cut: what lies beyond 12 standard deviations of the sum, or beyond one slot's own tail.
    size = int(slots * mean + 12 * spread * slots**0.5 + len(slot)) + 1
    if size > MAX_TOKENS:
        raise ValueError(f"worker_load: expected at most {MAX_TOKENS} tokens a worker, got about {size}")
    padded = 1 << (size - 1).bit_length()
    load = np.fft.irfft(np.fft.rfft(slot, padded) ** slots, padded)[:size]
    load = np.maximum(load, 0.0)
    return load / load.sum()


def barrier_throughput_exact(times: BundleTimes, load: np.ndarray, slots: int, ratios: np.ndarray) -> np.ndarray:
    """Expected tokens a second and instance when every step waits for the fullest of r workers.

    As `optimal_ratio.barrier_throughput`, with the load's own distribution F instead of a normal: the fullest of r has
    F^r, and a step takes E[max(T_a(fullest), T_f, T_c)].

    Args:
      times: latencies.
      load: of one worker (`worker_load`).
      slots: B.
      ratios: r to try, int array.

    Returns:
      Throughput for each of them.
    """
    below = np.clip(np.cumsum(load), 0.0, 1.0)
    first, last = np.searchsorted(below, 1e-14), np.searchsorted(below, 1 - 1e-13)
    width = max(1, -(-(last - first) // POINTS))
    edges = np.minimum(np.arange(first, last + width, width), len(load) - 1)
    below = below[edges]
    # Tokens of a bin count as its middle.
    attention = times.attention_slope * (edges - (width - 1) / 2) + times.attention_fixed
    steps = []
    for ratio in np.asarray(ratios):
        chances = np.diff(below**ratio, prepend=0.0)
        other = max(times.ffn_slope * slots * ratio + times.ffn_fixed, times.exchange)
        steps.append(float(chances @ np.maximum(attention, other) / chances.sum()))
    return np.asarray(ratios) * slots / (np.asarray(ratios) + 1) / np.asarray(steps)


def _geometric(chance: float, size: int, first: int) -> np.ndarray:
    values = np.zeros(size)
    values[first:] = chance * (1 - chance) ** np.arange(size - first)
    return values / values.sum()


def _convolve(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    size = len(a) + len(b) - 1
    padded = 1 << (size - 1).bit_length()
    result = np.fft.irfft(np.fft.rfft(a, padded) * np.fft.rfft(b, padded), padded)[:size]
    return np.maximum(result, 0.0) / np.maximum(result, 0.0).sum()
