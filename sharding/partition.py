"""Partition: which part of a parameter one device holds, by the logical names of its axes. No JAX."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def tensor_share(
    shape: Sequence[int], axes: Sequence[str | None], size: int, rank: int, block: int = 1
) -> tuple[tuple[slice, ...], tuple[int, ...]]:
    """The slices of one tensor rank, and the shape that its part is padded to.

    "heads" and "mlp" split evenly; "kv_heads" splits evenly or, with more ranks than heads, each head stands on
    size / heads ranks; "vocab" is padded with zeros to a multiple; "expert" is left whole (a placement cuts it). A
    share of "mlp" is a multiple of `block`, where it is not the whole.

    Returns:
      One slice an axis of the whole array, and the shape of the part (larger than the slices only along "vocab").

    Raises:
      ValueError: an axis that does not split that way.
    """
    slices, part = [], []
    for length, axis in zip(shape, axes, strict=True):
        if axis == "vocab":
            width = -(-length // size)
            slices.append(slice(min(rank * width, length), min((rank + 1) * width, length)))
            part.append(width)
            continue
        count, index = size, rank
        if axis == "kv_heads" and size > length and size % length == 0:
            count, index = length, rank * length // size
        elif axis not in ("heads", "kv_heads", "mlp"):
            count, index = 1, 0
        if length % count:
            rule = "a divisor or a multiple" if axis == "kv_heads" else "a divisor"
            raise ValueError(
                f"tensor parallelism over {axis}: expected {rule} of {length} as the tensor size, got {size}"
            )
        width = length // count
        if axis == "mlp" and count > 1 and width % block:
            raise ValueError(
                f"tensor parallelism over {axis}: expected shares of whole blocks of {block}, got {width} "
                f"({length} over {size})"
            )
        slices.append(slice(index * width, (index + 1) * width))
        part.append(width)
    return tuple(slices), tuple(part)


def pad_to(part: Any, shape: tuple[int, ...]) -> Any:
    """Zeros behind the end of each axis of an array, up to `shape`; one that has it is returned as it is."""
    if part.shape == shape:
        return part
    padded = np.zeros(shape, part.dtype)
    padded[tuple(slice(0, n) for n in part.shape)] = part
    return padded
