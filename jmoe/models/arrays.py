"""ArraySpec: the one description of a parameter, of which its initial value, sharding and abstract form are made."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import ml_dtypes
import numpy as np
from flax import nnx

Axis: TypeAlias = Literal["vocab", "heads", "kv_heads", "mlp", "expert"]


@dataclasses.dataclass(frozen=True, slots=True)
class ArraySpec:
    """Shape of the whole array, the logical name of each axis (None: never split), and how it starts.

    Attributes:
      fan_in: inputs summed into one output; random weights have standard deviation fan_in**-0.5. 0 means that all
        entries are `fill`.
      fill: 1 for norm scales.
      dtype: None for the model's.
      block: a share of a split axis is a multiple of this.
    """

    shape: tuple[int, ...]
    axes: tuple[Axis | None, ...]
    fan_in: float = 0
    fill: float = 1
    dtype: Literal["float8_e4m3fn", "float32"] | None = None
    block: int = 1

    def numpy_dtype(self, model_dtype: str) -> np.dtype:
        """As numpy knows it (ml_dtypes' for the short ones)."""
        name = self.dtype or model_dtype
        return np.dtype(getattr(ml_dtypes, name, None) or name)


# Gives the parameter of a path ("layers.3.q_proj") that the spec describes: random, loaded, a shard, or abstract.
Make: TypeAlias = Callable[[str, ArraySpec], nnx.Param[Any]]
