"""Devices that are slower than the others: always, or now and then. No JAX."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, slots=True)
class Stragglers:
    """What makes devices of one role differ in speed.

    Attributes:
      slow_fraction: share of GPUs that are slow for the whole run (a hot or throttled GPU).
      slow_factor: how much longer a stage takes on them.
      hiccup_probability: that a GPU is held up in a stage.
      hiccup_s: mean of that delay, exponential.
    """

    slow_fraction: float = 0.0
    slow_factor: float = 1.0
    hiccup_probability: float = 0.0
    hiccup_s: float = 0.0

    def __post_init__(self):
        for name in ("slow_fraction", "hiccup_probability"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"Stragglers.{name}: expected 0 to 1, got {value}")
        if self.slow_factor < 1 or self.hiccup_s < 0:
            raise ValueError(
                f"Stragglers: expected slow_factor of at least 1 and hiccup_s of at least 0, got "
                f"{self.slow_factor} and {self.hiccup_s}"
            )

    def factors(self, rng: np.random.Generator, num_cells: int, num_groups: int, tensor: int) -> np.ndarray:
        """`[C, groups]` time factors for the whole run; a tensor group is as slow as its slowest GPU."""
        slow = rng.random((num_cells, num_groups, tensor)) < self.slow_fraction
        return np.where(slow.any(axis=-1), self.slow_factor, 1.0)

    def add_hiccups(self, rng: np.random.Generator, stage_s: np.ndarray, tensor: int) -> None:
        """Adds hiccups to `[..., groups]` stage times in place; only stages that are hit are touched."""
        if self.hiccup_probability == 0 or self.hiccup_s == 0:
            return
        hit = 1 - (1 - self.hiccup_probability) ** tensor
        num_hits = rng.binomial(stage_s.size, hit)
        where = rng.integers(stage_s.size, size=num_hits)
        np.add.at(stage_s.reshape(-1), where, rng.exponential(self.hiccup_s, num_hits))
