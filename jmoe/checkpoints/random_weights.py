"""RandomWeights: parameters out of nothing, for benchmarks and dry runs of models too large to have at hand."""

from collections.abc import Sequence

import ml_dtypes
import numpy as np

from jmoe.config import ModelConfig
from jmoe.models.model import array_specs

_TILE = 1 << 22  # distinct numbers; larger arrays repeat them, since drawing 45 billion would take an hour


class RandomWeights:
    """Normal weights of standard deviation fan_in^-1/2 (ones for norm scales), read as from a checkpoint.

    Args:
      config: the model.
      seed: of the numbers.
    """

    def __init__(self, config: ModelConfig, seed: int):
        attention, experts = array_specs(config)
        self._specs = {"attention": attention, "expert": experts}
        self._dtype = np.dtype(np.float32 if config.dtype == "float32" else ml_dtypes.bfloat16)
        self._tile = np.random.default_rng(seed).standard_normal(_TILE, np.float32)

    def read(self, role, path: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        spec = self._specs[role][path]
        index = index or (slice(None),) * len(spec.shape)
        shape = tuple(len(range(*part.indices(size))) for part, size in zip(index, spec.shape, strict=True))
        return self._fill(path, shape, spec.fan_in)

    def read_experts(self, path: str, expert_ids: Sequence[int], mlp: slice | None = None) -> np.ndarray:
        spec = self._specs["expert"][path]
        shape = list(spec.shape)
        shape[0] = len(expert_ids)
        axis = spec.axes.index("mlp")
        shape[axis] = len(range(*(mlp or slice(None)).indices(shape[axis])))
        return self._fill(path, tuple(shape), spec.fan_in)

    def _fill(self, path: str, shape: tuple[int, ...], fan_in: int) -> np.ndarray:
        if fan_in == 0:
            return np.ones(shape, self._dtype)
        # Each path starts elsewhere in the tile, so that layers differ.
        shift = sum(ord(c) * 7919**n % _TILE for n, c in enumerate(path)) % _TILE
        tile = (np.roll(self._tile, shift) * fan_in**-0.5).astype(self._dtype)
        return np.resize(tile, shape)
