"""Floats of one thread, beside the words of `simt`: alone or in vectors, sums over a warp, and rounding to float8."""

import math
from collections.abc import Callable
from typing import Any

from jax.experimental.mosaic.gpu import utils as mosaic
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from jmoe.pallas_kernels.simt import Pointer, Word, i32


class Float:
    """A float32 of one thread."""

    def __init__(self, value: Any):
        self.value = value

    @classmethod
    def load(cls, pointer: Pointer, index: Any, element: Any = None) -> "Float":
        """A float32, or a shorter float as one."""
        f32 = ir.F32Type.get()
        kind = f32 if element is None else element
        found = llvm.load(kind, pointer.at(index, kind))
        return cls(found if kind == f32 else arith.extf(f32, found))

    def store(self, pointer: Pointer, index: Any, element: Any = None) -> None:
        """As a float32, or rounded to a shorter float."""
        kind = self.value.type if element is None else element
        value = self.value if kind == self.value.type else arith.truncf(kind, self.value)
        llvm.store(value, pointer.at(index, kind))

    def __add__(self, other):
        return Float(arith.addf(self.value, other.value))

    def __sub__(self, other):
        return Float(arith.subf(self.value, other.value))

    def __mul__(self, other):
        return Float(arith.mulf(self.value, other.value))

    def __truediv__(self, other):
        """Rounded to nearest: what the compiler makes of a division else is 2 units in the last place off."""
        return Float(_ptx("div.rn.f32 $0, $1, $2;", self, other))

    def reciprocal(self) -> "Float":
        """1 / this, rounded to nearest."""
        return Float(_constant(1.0)) / self

    def times(self, factor: float) -> "Float":
        return Float(arith.mulf(self.value, _constant(factor)))

    def plus(self, term: float) -> "Float":
        return Float(arith.addf(self.value, _constant(term)))

    def rsqrt(self) -> "Float":
        """1 / sqrt, both rounded to nearest."""
        return Float(_ptx("sqrt.rn.f32 $0, $1;", self)).reciprocal()

    def rounded(self, element: Any) -> "Float":
        """To what a shorter float holds."""
        f32 = ir.F32Type.get()
        return self if element == f32 else Float(arith.extf(f32, arith.truncf(element, self.value)))

    def maximum(self, other: "float | Float") -> "Float":
        return Float(arith.maximumf(self.value, other.value if isinstance(other, Float) else _constant(other)))

    def exp(self) -> "Float":
        """By the hardware's 2^x, within 2 units in the last place."""
        return Float(_ptx("ex2.approx.ftz.f32 $0, $1;", self.times(math.log2(math.e))))

    def bits(self) -> Word:
        """As a word; of floats that aren't negative, in their order."""
        return Word(arith.bitcast(i32(), self.value))

    @classmethod
    def of_bits(cls, word: Word) -> "Float":
        return cls(arith.bitcast(ir.F32Type.get(), word.value))

    def is_not_zero(self) -> Word:
        """Whether it isn't 0; NaN isn't."""
        return Word(arith.cmpf(arith.CmpFPredicate.UNE, self.value, _constant(0.0)))


class Floats:
    """A vector of float32 of one thread."""

    def __init__(self, value: Any):
        self.value = value

    @classmethod
    def of(cls, value: Any) -> "Floats":
        """From a vector of any float."""
        [length] = value.type.shape
        kind = ir.VectorType.get((length,), ir.F32Type.get())
        return cls(value if value.type == kind else arith.extf(kind, value))

    @classmethod
    def zeros(cls, length: int) -> "Floats":
        kind = ir.VectorType.get((length,), ir.F32Type.get())
        zero = ir.FloatAttr.get(ir.F32Type.get(), 0.0)
        return cls(arith.constant(kind, ir.DenseElementsAttr.get_splat(kind, zero)))

    def __add__(self, other: "Floats") -> "Floats":
        return Floats(arith.addf(self.value, other.value))

    def __mul__(self, other: "Floats") -> "Floats":
        return Floats(arith.mulf(self.value, other.value))

    def to(self, element: Any) -> Any:
        """An MLIR vector of this type, rounded."""
        if element == ir.F32Type.get():
            return self.value
        return arith.truncf(ir.VectorType.get((self.value.type.shape[0],), element), self.value)

    def rounded(self, element: Any) -> "Floats":
        """To what a shorter float holds."""
        return Floats.of(self.to(element))

    def times(self, factor: Float) -> "Floats":
        return Floats(arith.mulf(self.value, vector.broadcast(self.value.type, factor.value)))

    def where(self, condition: Word) -> "Floats":
        """Zeros where this bit isn't set."""
        return Floats(arith.select(condition.value, self.value, Floats.zeros(self.value.type.shape[0]).value))

    def each(self) -> list[Float]:
        [length] = self.value.type.shape
        return [Float(vector.extract(self.value, dynamic_position=[], static_position=[i])) for i in range(length)]

    def fours(self) -> list[Any]:
        """Vectors of four, which is what a store of 16 bytes takes."""
        length = self.value.type.shape[0]
        four = ir.VectorType.get((4,), ir.F32Type.get())
        return [vector.extract_strided_slice(four, self.value, [i], [4], [1]) for i in range(0, length, 4)]


def warp_reduce(value: Float, combine: Callable[[Float, Float], Float], lanes: int = 32) -> Float:
    """Over each `lanes` neighbours of the warp, in each of them, by halves: the same order of additions every time."""
    distance = lanes // 2
    while distance:
        value = combine(value, Float(mosaic.shfl_bfly(value.value, distance)))
        distance //= 2
    return value


def largest_magnitude(values: list[Float]) -> Float:
    """max |v|."""
    found = [Float(_ptx("abs.f32 $0, $1;", value)) for value in values]
    largest = found[0]
    for value in found[1:]:
        largest = largest.maximum(value)
    return largest


def float8_vector(values: list[Float]) -> Any:
    """Four float8_e4m3fn a word, rounded to nearest even, beyond 448 clipped to it; an MLIR vector of words."""
    words = []
    for i in range(0, len(values), 4):
        convert = "cvt.rn.satfinite.e4m3x2.f32"  # its first source becomes the upper byte
        text = f"{{.reg .b16 a, b; {convert} a, $2, $1; {convert} b, $4, $3; mov.b32 $0, {{a, b}};}}"
        words.append(llvm.inline_asm(i32(), [v.value for v in values[i : i + 4]], text, "=r,f,f,f,f"))
    return vector.from_elements(ir.VectorType.get((len(words),), i32()), words)


def _constant(number: float) -> Any:
    return arith.constant(ir.F32Type.get(), number)


def _ptx(text: str, *operands: Float) -> Any:
    return llvm.inline_asm(ir.F32Type.get(), [o.value for o in operands], text, "=f" + ",f" * len(operands))
