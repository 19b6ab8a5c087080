"""QuantizedExperts: a source whose experts are in the model's dtype, read as float8 with a scale a block."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.pallas_kernels.block_scaled import BLOCK, quantize_blocks

if TYPE_CHECKING:
    from jmoe.device_params import ParamSource

_Key = tuple[str, tuple[int, ...], int, int]  # projection, experts, first block of rows, of columns


class QuantizedExperts:
    """Quantises experts on the default device as they are read, one at a time (`--quantization fp8`).

    A part that starts and ends at multiples of 128 has the blocks of the whole, so tensor ranks see the same numbers.

    Args:
      source: reads `[experts, in, out]` of any float type.
    """

    def __init__(self, source: "ParamSource"):
        self._source = source
        self._quantize = jax.jit(lambda weights: quantize_blocks(jnp.swapaxes(weights, 0, 1)))
        self._scales: dict[_Key, np.ndarray] = {}  # of values that were read: 1/4096 of their bytes

    def read(self, role, path: str, index: tuple[slice, ...] | None = None) -> np.ndarray | jax.Array:
        """As the source does; only of the attention half."""
        if role == "expert":
            raise ValueError(f"QuantizedExperts: expected experts to be read by read_experts, got read({path!r})")
        return self._source.read(role, path, index)

    def read_experts(self, path: str, expert_ids: Sequence[int], index: tuple[slice, ...] | None = None) -> np.ndarray:
        """Values of `gate_proj` `[experts, out, in]`, then the scales of `gate_scales`; so `up_` and `down_`.

        Raises:
          ValueError: scales whose values were not read before, or what the source raises.
        """
        name, _, what = path.rpartition("_")
        rows, columns = index or (slice(None), slice(None))
        if what == "scales":
            key = (name, tuple(expert_ids), rows.start or 0, columns.start or 0)
            if key not in self._scales:
                raise ValueError(f"QuantizedExperts: expected {name}_proj of these experts to be read before {path}")
            return self._scales[key]
        plain = self._source.read_experts(path, expert_ids, (columns, rows))
        quantized = [jax.device_get(self._quantize(expert)) for expert in plain]
        key = (name, tuple(expert_ids), (rows.start or 0) // BLOCK, (columns.start or 0) // BLOCK)
        self._scales[key] = np.stack([q.scales for q in quantized])
        return np.stack([q.values for q in quantized])
