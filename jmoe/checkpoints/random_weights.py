"""RandomWeights: parameters out of nothing, for benchmarks and dry runs of models too large to have at hand."""

from collections.abc import Sequence

import numpy as np

from jmoe.config import ModelConfig
from jmoe.models.arrays import ArraySpec
from jmoe.models.model import array_specs

_TILE = 1 << 22  # distinct numbers; larger arrays repeat them, since drawing 45 billion would take an hour


class RandomWeights:
    """Normal weights of standard deviation fan_in^-1/2 (ones for norm scales), read as from a checkpoint.

    Experts of `expert_dtype` "fp8" are random float8 values under one scale.

    Args:
      config: the model.
      seed: of the numbers.
    """

    def __init__(self, config: ModelConfig, seed: int):
        attention, experts = array_specs(config)
        self._specs = {"attention": attention, "expert": experts}
        self._dtype = config.dtype
        self._tile = np.random.default_rng(seed).standard_normal(_TILE, np.float32)

    def read(self, role, path: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        spec = self._specs[role][path]
        index = index or (slice(None),) * len(spec.shape)
        shape = tuple(len(range(*part.indices(size))) for part, size in zip(index, spec.shape, strict=True))
        return self._fill(path, shape, spec)

    def read_experts(self, path: str, expert_ids: Sequence[int], index: tuple[slice, ...] | None = None) -> np.ndarray:
        spec = self._specs["expert"][path]
        index = index or (slice(None),) * (len(spec.shape) - 1)
        shape = (len(range(*part.indices(size))) for part, size in zip(index, spec.shape[1:], strict=True))
        return self._fill(path, (len(expert_ids), *shape), spec)

    def _fill(self, path: str, shape: tuple[int, ...], spec: ArraySpec) -> np.ndarray:
        dtype = spec.numpy_dtype(self._dtype)
        if spec.fan_in == 0:
            return np.full(shape, spec.fill, dtype)
        # Each path starts elsewhere in the tile, so that layers differ.
        shift = sum(ord(c) * 7919**n % _TILE for n, c in enumerate(path)) % _TILE
        tile = (np.roll(self._tile, shift) * np.float32(spec.fan_in**-0.5)).astype(dtype)
        return np.resize(tile, shape)
