"""The sequences of a decode batch: every slot's context grows, and a finished request is replaced. No JAX."""

from typing import Literal

import numpy as np

from jmoe.planner.workload import Workload

MAX_SLOTS = 50_000_000  # 12 bytes each


class DecodeBatch:
    """Context lengths of all slots, advanced one token an iteration.

    Args:
      workload: the lengths that requests are drawn from.
      shape: of the slots; the last axis is the rows of one micro-batch.
      rng: random numbers.
      start: "steady" draws requests as they are met in a long run (long answers more often, at any point of them),
        "fresh" starts all slots at the end of their prompt.

    Raises:
      ValueError: too many slots or an unknown start.
    """

    def __init__(
        self,
        workload: Workload,
        shape: tuple[int, ...],
        rng: np.random.Generator,
        start: Literal["steady", "fresh"] = "steady",
    ):
        size = int(np.prod(shape))
        if not 1 <= size <= MAX_SLOTS:
            raise ValueError(f"DecodeBatch.shape: expected 1 to {MAX_SLOTS} slots, got {size}")
        if start not in ("steady", "fresh"):
            raise ValueError(f"DecodeBatch.start: expected 'steady' or 'fresh', got {start!r}")
        self._prompts = np.array(workload.prompt_lens, np.int32)
        self._outputs = np.array(workload.output_lens, np.int32)
        self._rng, self._shape = rng, shape
        if start == "fresh":
            chosen = rng.integers(len(self._prompts), size=size)
            done = np.zeros(size, np.int32)
        else:
            weights = self._outputs / self._outputs.sum()
            chosen = rng.choice(len(self._prompts), size=size, p=weights)
            done = rng.integers(self._outputs[chosen])
        self._context = (self._prompts[chosen] + done).astype(np.int32)
        self._remaining = (self._outputs[chosen] - done).astype(np.int32)

    def mean_context(self) -> np.ndarray:
        """Mean tokens in the cache per group of rows: `shape[:-1]`."""
        return self._context.reshape(self._shape).mean(axis=-1)

    def advance(self) -> int:
        """One token for every slot; how many requests finished and were replaced by new ones."""
        self._context += 1
        self._remaining -= 1
        finished = np.flatnonzero(self._remaining == 0)
        chosen = self._rng.integers(len(self._prompts), size=len(finished))
        self._context[finished] = self._prompts[chosen]
        self._remaining[finished] = self._outputs[chosen]
        return len(finished)
