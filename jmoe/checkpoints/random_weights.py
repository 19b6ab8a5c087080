"""RandomWeights: parameters out of nothing, for benchmarks and dry runs of models too large to have at hand."""

import functools
import hashlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.config import ModelConfig
from jmoe.models.arrays import ArraySpec
from jmoe.models.model import array_specs


class RandomWeights:
    """Normal weights of standard deviation fan_in^-1/2 (ones for norm scales), drawn on JAX's default device.

    A number depends on the seed, the parameter's path and its place in the whole array alone (for experts: on the
    expert and the place in its matrix), so a device's share is the same cut of the same array on every mesh. Experts
    of `expert_dtype` "fp8" are random float8 values under one scale.

    Args:
      config: the model.
      seed: of the numbers.
    """

    def __init__(self, config: ModelConfig, seed: int):
        attention, experts = array_specs(config)
        self._specs = {"attention": attention, "expert": experts}
        self._dtype = config.dtype
        self._seed = seed

    def read(self, role, path: str, index: tuple[slice, ...] | None = None) -> jax.Array:
        spec = self._specs[role][path]
        if role == "expert":
            return self.read_experts(path, range(spec.shape[0]), index and index[1:])
        return self._draw(path, spec, (0,), (1, *spec.shape), index)[0]

    def read_experts(self, path: str, expert_ids: Sequence[int], index: tuple[slice, ...] | None = None) -> jax.Array:
        spec = self._specs["expert"][path]
        return self._draw(path, spec, expert_ids, spec.shape, index)

    def _draw(self, path: str, spec: ArraySpec, ids: Sequence[int], shape: tuple[int, ...], index) -> jax.Array:
        """`[ids, *part]` of an array `[rows, ...]` of `shape`."""
        index = index or (slice(None),) * len(shape[1:])
        starts, stops, _ = zip(*(part.indices(size) for part, size in zip(index, shape[1:], strict=True)), strict=True)
        part = tuple(stop - start for start, stop in zip(starts, stops, strict=True))
        dtype = spec.numpy_dtype(self._dtype)
        if spec.fan_in == 0:
            return jnp.full((len(ids), *part), spec.fill, dtype)
        word = hashlib.sha256(f"{self._seed} {path}".encode()).digest()[:4]  # hash() differs from process to process
        key = np.uint32(int.from_bytes(word, "little"))
        where = (np.array(ids, np.uint32), np.array(starts, np.int32))
        return _normal(key, *where, shape=shape[1:], part=part, scale=spec.fan_in**-0.5, dtype=dtype)


@functools.partial(jax.jit, static_argnames=("shape", "part", "scale", "dtype"))
def _normal(key, ids, starts, *, shape: tuple[int, ...], part: tuple[int, ...], scale: float, dtype) -> jax.Array:
    """`[ids, *part]`: sqrt(2) erf^-1(u) of a uniform u in (-1, 1) hashed out of key, row and place in the whole.

    A hash and not `jax.random`: a part costs no draw of the whole, and there is a program for each shape of a part,
    which must compile quickly (CPU: 0.2 s, with threefry 1 to 4).
    """
    strides = np.cumprod([1, *shape[:0:-1]])[::-1].astype(np.uint32)
    size = (len(ids), *part)
    places = [jax.lax.broadcasted_iota(jnp.uint32, size, axis + 1) for axis in range(len(part))]
    starts = starts.astype(jnp.uint32)
    place = sum((place + start) * stride for place, start, stride in zip(places, starts, strides, strict=True))
    row = _mix(ids * np.uint32(0x9E3779B9) + key)
    bits = _mix(_mix(place ^ jnp.expand_dims(row, range(1, len(size)))) + key)
    uniform = (bits >> 9).astype(jnp.float32) * 2**-22 - (1 - 2**-23)
    return (jax.lax.erf_inv(uniform) * (scale * 2**0.5)).astype(dtype)


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of words, every bit on every bit dependent: "lowbias32" of the hash prospector (C. Wellons)."""
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)
