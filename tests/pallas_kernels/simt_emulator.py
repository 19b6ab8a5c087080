"""Runs the per-thread programs of `jmoe.pallas_kernels.simt` on numpy: the threads of a block in step, block by block.

Words are int32 arrays `[threads]`, a stack of masks says which threads are inside the current `when` or loop step, and
memory is numpy. One legal order of execution, with out-of-range accesses caught; what only a GPU has (races between
warps, alignment faults of 16-byte accesses apart) it can't see.
"""

import contextlib
import dataclasses
from typing import Any

import ml_dtypes
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe.pallas_kernels import simt, simt_floats

THREADS = simt.BLOCK_THREADS


class Machine:
    """The block that is running."""

    def __init__(self):
        self.block = 0
        self.masks = [np.ones(THREADS, bool)]

    @property
    def mask(self) -> np.ndarray:
        return self.masks[-1]


MACHINE = Machine()


def lanes(value: Any) -> np.ndarray:
    """A Word, a number or an array, as one value a thread."""
    value = value.value if isinstance(value, Word) else value
    value = np.int32(value) if isinstance(value, int) else np.asarray(value)
    return np.broadcast_to(value, (THREADS,))


class Word:
    def __init__(self, value: Any):
        self.value = value

    def __add__(self, other):
        return Word(lanes(self) + lanes(other))

    def __sub__(self, other):
        return Word(lanes(self) - lanes(other))

    def __mul__(self, other):
        return Word(lanes(self) * lanes(other))

    def __floordiv__(self, other):
        return Word((lanes(self).astype(np.uint32) // lanes(other).astype(np.uint32)).astype(np.int32))

    def __mod__(self, other):
        return Word((lanes(self).astype(np.uint32) % lanes(other).astype(np.uint32)).astype(np.int32))

    def __and__(self, other):
        return Word(lanes(self) & lanes(other))

    def __or__(self, other):
        return Word(lanes(self) | lanes(other))

    def __lt__(self, other):
        return Word(lanes(self) < lanes(other))

    def __ge__(self, other):
        return Word(lanes(self) >= lanes(other))

    def equals(self, other):
        return Word(lanes(self) == lanes(other))

    def select(self, yes, no):
        return Word(np.where(lanes(self), lanes(yes), lanes(no)))

    def count(self):
        return Word(lanes(self).astype(np.int32))


@dataclasses.dataclass(frozen=True)
class Pointer:
    """Bytes of one array, with an offset a thread."""

    memory: np.ndarray  # uint8
    offset: Any = 0

    def skip(self, count, row_bytes):
        return Pointer(self.memory, lanes(self.offset) + lanes(count).astype(np.int64) * row_bytes)

    def places(self, index, size, mask):
        at = (lanes(self.offset) + lanes(index).astype(np.int64) * size)[mask]
        assert not len(at) or (at.min() >= 0 and at.max() + size <= len(self.memory)), "outside its array"
        assert not (at % min(size, 16)).any(), "not aligned"
        return at[:, None] + np.arange(size)

    def read(self, index, dtype, length=1):
        size = np.dtype(dtype).itemsize * length
        out = np.zeros((THREADS, size), np.uint8)
        out[MACHINE.mask] = self.memory[self.places(index, size, MACHINE.mask)]
        return out.view(dtype)

    def write(self, index, values):
        values = np.ascontiguousarray(values)
        packed = values.reshape(THREADS, -1).view(np.uint8)[MACHINE.mask]
        self.memory[self.places(index, packed.shape[1], MACHINE.mask)] = packed

    def load(self, index):
        return Word(self.read(index, np.int32)[:, 0])

    def store(self, index, word):
        self.write(index, lanes(word).astype(np.int32))

    def load_vector(self, index, length, element, num_bytes=16):
        assert np.dtype(element).itemsize * length == num_bytes
        return self.read(index, element, length)

    def prefetch(self, num_bytes):
        first = lanes(self.offset)[MACHINE.mask]
        assert not len(first) or (first.max() + num_bytes <= len(self.memory) and not (first % 16).any())

    def store_vector(self, index, value, num_bytes=16):
        assert value.nbytes == THREADS * num_bytes
        self.write(index, value)

    def add(self, index, word):
        words = self.memory.view(np.int32)
        at = self.places(index, 4, MACHINE.mask)[:, 0] // 4
        np.add.at(words, at, lanes(word)[MACHINE.mask].astype(np.int32))


@dataclasses.dataclass(frozen=True)
class Float:
    value: np.ndarray  # [threads] float32

    @classmethod
    def load(cls, pointer, index, element=None):
        return cls(pointer.read(index, np.float32 if element is None else element)[:, 0].astype(np.float32))

    def store(self, pointer, index, element=None):
        pointer.write(index, self.value.astype(np.float32 if element is None else element))

    def plus(self, term):
        return Float(self.value + np.float32(term))

    def rsqrt(self):
        return Float(np.float32(1) / np.sqrt(self.value))

    def reciprocal(self):
        return Float(np.float32(1) / self.value)

    def rounded(self, element):
        return Float(self.value.astype(element).astype(np.float32))

    def times(self, factor):
        return Float(self.value * np.float32(factor))

    def is_not_zero(self):
        return Word(self.value != 0)

    def __add__(self, other):
        return Float(self.value + other.value)

    def __sub__(self, other):
        return Float(self.value - other.value)

    def __mul__(self, other):
        return Float(self.value * other.value)

    def __truediv__(self, other):
        return Float(self.value / other.value)

    def maximum(self, other):
        return Float(np.maximum(self.value, np.float32(other) if isinstance(other, float) else other.value))

    def exp(self):
        return Float(np.exp(self.value))

    def bits(self):
        return Word(self.value.view(np.int32))

    @classmethod
    def of_bits(cls, word):
        return cls(np.ascontiguousarray(lanes(word)).view(np.float32))


@dataclasses.dataclass(frozen=True)
class Floats:
    value: np.ndarray  # [threads, length] float32

    @classmethod
    def of(cls, value):
        return cls(value.astype(np.float32))

    @classmethod
    def zeros(cls, length):
        return cls(np.zeros((THREADS, length), np.float32))

    def __add__(self, other):
        return Floats(self.value + other.value)

    def __mul__(self, other):
        return Floats(self.value * other.value)

    def to(self, element):
        return self.value.astype(element)

    def rounded(self, element):
        return Floats(self.value.astype(element).astype(np.float32))

    def times(self, factor):
        return Floats(self.value * factor.value[:, None])

    def where(self, condition):
        return Floats(np.where(lanes(condition)[:, None], self.value, np.float32(0)))

    def each(self):
        return [Float(column) for column in self.value.T]

    def fours(self):
        return [self.value[:, i : i + 4] for i in range(0, self.value.shape[1], 4)]


@contextlib.contextmanager
def when(condition):
    MACHINE.masks.append(MACHINE.mask & lanes(condition))
    yield
    MACHINE.masks.pop()


def loop(start, stop, step, carries, body):
    index, carries = lanes(start), list(carries)
    while True:
        with when(Word(index < lanes(stop))):
            inside = MACHINE.mask
            if not inside.any():
                return carries
            found = body(Word(index), *carries)
        carries = [Word(np.where(inside, lanes(new), lanes(old))) for new, old in zip(found, carries, strict=True)]
        index = index + lanes(step)


def by_warp(word):
    """`[warps, 32]`, zeros where a thread isn't taking part; whole warps must."""
    mask = MACHINE.mask.reshape(-1, simt.WARP)
    assert (mask.all(1) | ~mask.any(1)).all(), "a warp-wide operation with part of a warp"
    return np.where(mask, lanes(word).reshape(-1, simt.WARP), 0)


def warp_sum(word):
    return Word(np.repeat(by_warp(word).sum(1), simt.WARP).astype(np.int32))


def warp_largest(word):
    return Word(np.repeat(by_warp(word).max(1), simt.WARP).astype(np.int32))


def warp_smallest(word):
    return Word(np.repeat(by_warp(word).min(1), simt.WARP).astype(np.int32))


def warp_reduce(value, combine, lanes=32):
    distance = lanes // 2
    while distance:
        value = combine(value, Float(value.value[np.arange(THREADS) ^ distance]))
        distance //= 2
    return value


def largest_magnitude(values):
    return Float(np.max([np.abs(v.value) for v in values], axis=0))


def float8_vector(values):
    clipped = np.clip(np.stack([v.value for v in values], axis=1), -448, 448)
    return clipped.astype(ml_dtypes.float8_e4m3fn).view(np.int32)


def warp_sum_before(word, lane):
    values = by_warp(word)
    return Word((values.cumsum(1) - values).ravel().astype(np.int32))


def warp_same(word, lane):
    alike = by_warp(word)[:, :, None] == by_warp(word)[:, None, :]
    before = (alike & np.tri(simt.WARP, k=-1, dtype=bool)).sum(2)
    return Word(before.ravel().astype(np.int32)), Word(alike.sum(2).ravel().astype(np.int32))


def swap(word, distance):
    by_warp(word)
    return Word(lanes(word)[np.arange(THREADS) ^ distance])


def warp():
    by_warp(0)  # the hardware's is a shuffle: a warp of which only a part asks hangs
    return Word(np.arange(THREADS, dtype=np.int32) // simt.WARP)


def barrier():
    assert MACHINE.mask.all(), "a barrier that not every thread reaches"


def kernel(body, *, out_type, scratch_types=(), grid, **_names):
    """In the place of plgpu.kernel: `body` only hands its refs on to `simt.program`. Blocks run last to first."""
    [blocks] = grid

    def call(*operands):
        types = out_type if isinstance(out_type, tuple) else (out_type,)
        outs = [np.full(t.shape, 0x55, np.uint8).repeat(t.dtype.itemsize).view(t.dtype).reshape(t.shape) for t in types]
        arrays = [*(np.ascontiguousarray(o) for o in operands), *outs]

        def launch(program, *_refs):
            for block in reversed(range(blocks)):
                MACHINE.block = block
                shared = [Pointer(np.full(int(np.prod(s.shape)) * 4, 0x7B, np.uint8)) for s in scratch_types]
                program(*(Pointer(a.reshape(-1).view(np.uint8)) for a in arrays), *shared)

        body(launch)
        return tuple(outs) if isinstance(out_type, tuple) else outs[0]

    return call


def install(monkeypatch) -> None:
    """Puts this in the place of `simt`'s own."""
    for name in (
        "Word", "Pointer", "when", "loop", "barrier",
        "warp_sum", "warp_sum_before", "warp_same", "warp_largest", "warp_smallest", "swap",
    ):  # fmt: skip
        monkeypatch.setattr(simt, name, globals()[name])
    for name in ("Float", "Floats", "warp_reduce", "largest_magnitude", "float8_vector"):
        monkeypatch.setattr(simt_floats, name, globals()[name])
    monkeypatch.setattr(plgpu, "kernel", kernel)
    monkeypatch.setattr(simt, "program", lambda program, launch: launch(program))
    monkeypatch.setattr(simt, "word", lambda value: Word(lanes(value)))
    monkeypatch.setattr(simt, "i32", lambda: np.dtype(np.int32))
    monkeypatch.setattr(simt, "element_type", np.dtype)
    monkeypatch.setattr(simt, "thread", lambda: Word(np.arange(THREADS, dtype=np.int32)))
    monkeypatch.setattr(simt, "warp", warp)
    monkeypatch.setattr(simt, "block", lambda: Word(np.full(THREADS, MACHINE.block, np.int32)))
    monkeypatch.setattr(simt, "follow", lambda: None)
    monkeypatch.setattr(simt, "follow_inside", lambda: None)
    monkeypatch.setattr(simt, "warp_barrier", lambda: None)
    monkeypatch.setattr(simt, "words_of", lambda value: [Word(column) for column in value.T])
