"""ArraySpec: the one description of a parameter, of which its initial value, sharding and abstract form are made."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

from flax import nnx

Axis: TypeAlias = Literal["vocab", "heads", "kv_heads", "mlp", "expert"]


@dataclasses.dataclass(frozen=True, slots=True)
class ArraySpec:
    """Shape of the whole array, the logical name of each axis (None: never split), and how it starts.

    `fan_in` is the number of inputs summed into one output; random weights have standard deviation fan_in**-0.5.
    0 means ones (norm scales).
    """

    shape: tuple[int, ...]
    axes: tuple[Axis | None, ...]
    fan_in: int = 0


# Gives the parameter of a path ("layers.3.q_proj") that the spec describes: random, loaded, a shard, or abstract.
Make: TypeAlias = Callable[[str, ArraySpec], nnx.Param[Any]]
