"""Piece: where one of our parameters stands inside a stored tensor. One description serves reading and writing."""

import dataclasses
import math
import pathlib
from typing import Literal, Protocol, TypeAlias

import ml_dtypes
import numpy as np

BLOCK = 128  # rows and columns of one scale
SCALES = "_scale_inv"  # behind a weight's name: what its float8 values are multiplied by


class Files(Protocol):
    """What a piece is read from: `TensorFiles`, or their dequantised view."""

    folder: pathlib.Path

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """A region of a stored tensor, seen as one of our arrays.

    Stored axis i covers `prod(groups[i])` entries from `offsets[i]` on; it splits into the axes `groups[i]` (none: one
    entry, and the axis vanishes). All those axes in a row are the view; our axis a is view axis `order[a]`.

    Attributes:
      name: of the stored tensor.
      stored: its whole shape.
      groups, offsets: as above, one of each a stored axis; at most two axes a group.
      order: the transposition from view to ours.
      dtype: of our array; None is the model's.
    """

    name: str
    stored: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    order: tuple[int, ...]
    offsets: tuple[int, ...] = ()
    dtype: Literal["float8_e4m3fn", "float32"] | None = None

    def numpy_dtype(self, model_dtype: str) -> np.dtype:
        """Of our array, as numpy knows it (ml_dtypes' for the short ones)."""
        name = self.dtype or model_dtype
        return np.dtype(getattr(ml_dtypes, name, None) or name)

    @property
    def view(self) -> tuple[int, ...]:
        return tuple(size for group in self.groups for size in group)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of our array."""
        return tuple(self.view[axis] for axis in self.order)

    def region(self) -> tuple[slice, ...]:
        """The whole region in the stored tensor."""
        offsets = self.offsets or (0,) * len(self.stored)
        return tuple(slice(o, o + math.prod(g)) for o, g in zip(offsets, self.groups, strict=True))

    def read(self, files: Files, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a slice of our array; only the stored rows and columns under it are touched."""
        if files.shape(self.name) != self.stored:
            raise ValueError(f"{files.folder}: {self.name}: expected shape {self.stored}, got {files.shape(self.name)}")
        wanted = [slice(0, 0)] * len(self.order)
        for axis, part in zip(self.order, index, strict=True):
            wanted[axis] = part
        stored_index, sizes, inner, axis = [], [], [], 0
        for group, whole in zip(self.groups, self.region(), strict=True):
            parts = wanted[axis : axis + len(group)]
            axis += len(group)
            if not parts:
                stored_index.append(whole)
                continue
            # The first axis of a group is cut in the file, a second one (inside a head) after reading.
            step = math.prod(group[1:])
            first, rest = parts[0], parts[1:]
            stored_index.append(slice(whole.start + first.start * step, whole.start + first.stop * step))
            sizes += [first.stop - first.start, *group[1:]]
            inner += [slice(None), *rest]
        read = files.read(self.name, tuple(stored_index))
        if self.dtype == "float8_e4m3fn" and read.dtype.name != self.dtype:
            raise ValueError(f"{files.folder}: {self.name}: expected {self.dtype}, got {read.dtype.name}")
        return read.reshape(sizes)[tuple(inner)].transpose(self.order)

    def write(self, ours: np.ndarray, stored: np.ndarray) -> None:
        """Puts our whole array into its region of the stored tensor."""
        region = stored[self.region()]
        region[...] = ours.transpose(np.argsort(self.order)).reshape(region.shape)


# Path -> its piece (attention half), and path -> one piece an expert (expert half).
AttentionMap: TypeAlias = dict[str, Piece]
ExpertMap: TypeAlias = dict[str, tuple[Piece, ...]]


def whole(name: str, *shape: int) -> Piece:
    """Stored as ours."""
    return Piece(name, shape, tuple((size,) for size in shape), tuple(range(len(shape))))


def transposed(name: str, rows: int, columns: int) -> Piece:
    """Stored `[columns, rows]`, as torch's Linear keeps its weight; ours is `[rows, columns]`."""
    return Piece(name, (columns, rows), ((columns,), (rows,)), (1, 0))


def heads_out(name: str, hidden: int, heads: int, head_dim: int) -> Piece:
    """Stored `[heads * H, D]`; ours is `[D, heads, H]`."""
    return Piece(name, (heads * head_dim, hidden), ((heads, head_dim), (hidden,)), (2, 0, 1))


def heads_in(name: str, hidden: int, heads: int, head_dim: int) -> Piece:
    """Stored `[D, heads * H]`; ours is `[heads, H, D]`."""
    return Piece(name, (hidden, heads * head_dim), ((hidden,), (heads, head_dim)), (1, 2, 0))


def head_bias(name: str, heads: int, head_dim: int) -> Piece:
    """Stored `[heads * H]`; ours is `[heads, H]`."""
    return Piece(name, (heads * head_dim,), ((heads, head_dim),), (0, 1))


def scaled(name: str, num_in: int, num_out: int) -> tuple[Piece, Piece]:
    """Float8 values stored and kept `[out, in]`, and their scales `[ceil(out / 128), ceil(in / 128)]` beside them."""
    blocks = (-(-num_out // BLOCK), -(-num_in // BLOCK))
    return (
        dataclasses.replace(whole(name, num_out, num_in), dtype="float8_e4m3fn"),
        dataclasses.replace(whole(name + SCALES, *blocks), dtype="float32"),
    )
