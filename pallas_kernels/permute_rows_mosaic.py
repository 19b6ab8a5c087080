"""How a warp moves a row: 16-byte vectors held in registers, as they are or rounded to float8 with a scale a block."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from jmoe.pallas_kernels import simt
from jmoe.pallas_kernels import simt_floats as floats
from jmoe.pallas_kernels.block_scaled import BLOCK, LARGEST, SMALLEST_AMAX
from jmoe.pallas_kernels.simt import WARP, Pointer, Word

VECTOR_BYTES = 16
IN_FLIGHT = 8  # vectors that a lane has asked for at a time: 4 KB a warp


@dataclasses.dataclass(frozen=True)
class Row:
    """A row's columns and dtype, and whether it is rounded to float8 (see `quantize_rows`) on the way."""

    width: int
    dtype: Any
    float8: bool = False

    @property
    def row_bytes(self) -> int:
        return self.width * jnp.dtype(self.dtype).itemsize

    @property
    def vectors(self) -> int:
        return self.row_bytes // VECTOR_BYTES

    @property
    def lanes(self) -> int:
        """Elements of a vector."""
        return VECTOR_BYTES // jnp.dtype(self.dtype).itemsize

    def check(self, op: str) -> None:
        """Raises ValueError for rows that can't be moved so."""
        if self.row_bytes % VECTOR_BYTES:
            raise ValueError(
                f"{op}: 'pallas' expected rows of a multiple of {VECTOR_BYTES} bytes, got {self.row_bytes}"
            )
        if self.float8 and (self.width % BLOCK or jnp.dtype(self.dtype).itemsize != 2):
            raise ValueError(
                f"{op}: 'pallas' expected 16-bit rows of a multiple of {BLOCK} columns for float8, got "
                f"{jnp.dtype(self.dtype).name} and {self.width}"
            )


@dataclasses.dataclass(frozen=True)
class Part:
    """One vector of a lane: its number in the row, whether it is inside (None: always), what it holds, its scale."""

    index: Word
    inside: Word | None
    value: Any
    scale: Any = None


def load(row: Row, source: Pointer, first: Word, steps: range, *, whole: bool = False) -> list[Part]:
    """Vectors first, first + 32, ... of a row. Beyond its end stands vector 0 again. `whole`: there is no beyond."""
    parts = []
    for step in steps:
        index = first + step * WARP
        inside = None if whole else index < row.vectors
        place = index if inside is None else inside.select(index, 0)
        if row.float8:
            value = source.load_vector(place, row.lanes, simt.element_type(row.dtype))
        else:
            value = source.load_vector(place, 4, simt.i32())
        parts.append(Part(index, inside, value))
    return parts


def rounded(row: Row, parts: list[Part]) -> list[Part]:
    """The parts as they are stored; 16 neighbouring lanes hold a block of 128 columns. The whole warp takes part."""
    if not row.float8:
        return parts
    found = []
    for part in parts:
        found.append(Part(part.index, part.inside, *rounded_to_float8(part.value, BLOCK // row.lanes)))
    return found


def rounded_to_float8(value: Any, lanes: int) -> tuple[Any, floats.Float]:
    """A vector of floats in float8 and the scale of the block of columns that `lanes` neighbouring lanes hold."""
    values = floats.Floats.of(value).each()
    amax = floats.warp_reduce(floats.largest_magnitude(values), lambda a, b: a.maximum(b), lanes)
    scale = amax.maximum(SMALLEST_AMAX).times(1 / LARGEST)
    inverse = scale.reciprocal()  # a division of each would take 200 clocks wherever a row holds zeros
    return floats.float8_vector([v * inverse for v in values]), scale


def store(row: Row, parts: list[Part], out: Pointer, scales: Pointer | None, place: Word) -> None:
    """Into row `place` of the result, and of the scales."""
    target = out.skip(place, row.width if row.float8 else row.row_bytes)

    def write(part: Part) -> None:
        target.store_vector(part.index, part.value, 8 if row.float8 else VECTOR_BYTES)
        if scales is not None:
            lanes = BLOCK // row.lanes
            with simt.when((part.index % lanes).equals(0)):
                part.scale.store(scales.skip(place, row.width // BLOCK * 4), part.index // lanes)

    for part in parts:
        if part.inside is None:
            write(part)
        else:
            with simt.when(part.inside):
                write(part)
