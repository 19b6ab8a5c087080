"""Per-thread code inside a Mosaic GPU kernel: 32-bit words with operators, loads and stores at byte offsets, loops.

Pallas speaks of whole arrays; sorting rows by expert needs what it has no words for: a thread's own address, counters
that a block shares, sums over a warp. `program` puts a function of raw pointers into a kernel; everything else here may
only be called inside one. Works on jax 0.10.2 and 0.11.2.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jax.experimental.mosaic.gpu import utils as mosaic
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, scf, vector

WARP = 32
FULL_MASK = 0xFFFFFFFF
BLOCK_THREADS = 128  # a Mosaic GPU kernel of one warpgroup


def program(function: Callable[..., None], *refs: Any, words: Sequence[Any] = ()) -> None:
    """Runs `function(*pointers, *words)` in every thread of the block: a `Pointer` a ref (global or shared memory), a
    `Word` an int32 scalar that Pallas computed."""
    splat = plgpu.Layout.WG_SPLAT(())

    @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * len(refs), *[splat] * len(words)))
    def inlined(_ctx, *given):
        pointers = [Pointer.of(memref) for memref in given[: len(refs)]]
        function(*pointers, *(Word(value.registers.flat[0]) for value in given[len(refs) :]))

    inlined(*refs, *words)


def follow() -> None:
    """Programmatic dependent launch: wait for what the kernel before this one wrote, then let the next one start."""
    plgpu.griddepcontrol_wait()
    plgpu.griddepcontrol_launch_dependents()


def follow_inside() -> None:
    """The same in the midst of a program; the kernel calls `follow` behind it, which says that it does so at all."""
    for text in ("griddepcontrol.wait;", "griddepcontrol.launch_dependents;"):
        llvm.inline_asm(ir.Type.parse("!llvm.void"), [], text, "~{memory}", has_side_effects=True)


class Word:
    """A 32-bit integer (or, from a comparison, one bit) of one thread. Division and remainder take it as unsigned."""

    def __init__(self, value: Any):
        self.value = value

    def __add__(self, other):
        return Word(arith.addi(self.value, raw(other)))

    def __sub__(self, other):
        return Word(arith.subi(self.value, raw(other)))

    def __mul__(self, other):
        return Word(arith.muli(self.value, raw(other)))

    def __floordiv__(self, other):
        return Word(arith.divui(self.value, raw(other)))

    def __mod__(self, other):
        return Word(arith.remui(self.value, raw(other)))

    def __and__(self, other):
        return Word(arith.andi(self.value, raw(other)))

    def __or__(self, other):
        return Word(arith.ori(self.value, raw(other)))

    def differ(self, other):
        """The bits that differ."""
        return Word(arith.xori(self.value, raw(other)))

    def __lt__(self, other):
        return Word(arith.cmpi(arith.CmpIPredicate.slt, self.value, raw(other)))

    def __ge__(self, other):
        return Word(arith.cmpi(arith.CmpIPredicate.sge, self.value, raw(other)))

    def equals(self, other):
        return Word(arith.cmpi(arith.CmpIPredicate.eq, self.value, raw(other)))

    def select(self, yes, no):
        """`yes` where this bit is set, else `no`."""
        return Word(arith.select(self.value, raw(yes), raw(no)))

    def count(self):
        """This bit as a word."""
        return Word(arith.extui(i32(), self.value))


class Pointer:
    """The first byte of a ref. Offsets are in elements of what is loaded; `skip` moves by whole rows, in 64 bits."""

    def __init__(self, value: Any):
        self.value = value

    @classmethod
    def of(cls, memref: Any) -> "Pointer":
        pointer = mosaic.memref_ptr(memref)
        if pointer.type.address_space in (None, 0):  # global: said so, the loads need not look which memory it is
            pointer = llvm.addrspacecast(llvm.PointerType.get(1), pointer)
        return cls(pointer)

    def skip(self, count: Word, row_bytes: int) -> "Pointer":
        i64 = ir.IntegerType.get_signless(64)
        offset = arith.muli(arith.extui(i64, count.value), arith.constant(i64, row_bytes))
        return Pointer(mosaic.getelementptr(self.value, [offset], ir.IntegerType.get_signless(8)))

    def at(self, index: Any, element: Any) -> Any:
        return mosaic.getelementptr(self.value, [raw(index)], element)

    def load(self, index: Any) -> Word:
        return Word(llvm.load(i32(), self.at(index, i32()), alignment=4))

    def store(self, index: Any, word: Any) -> None:
        llvm.store(raw(word), self.at(index, i32()), alignment=4)

    def load_vector(self, index: Any, length: int, element: Any, num_bytes: int = 16) -> Any:
        """`length` elements, `num_bytes` in all, at vector number `index`; an MLIR vector."""
        kind = ir.VectorType.get((length,), element)
        return llvm.load(kind, self.at(index, kind), alignment=num_bytes)

    def store_vector(self, index: Any, value: Any, num_bytes: int = 16) -> None:
        """An MLIR vector of `num_bytes` at vector number `index`."""
        llvm.store(value, self.at(index, value.type), alignment=num_bytes)

    def prefetch(self, num_bytes: int) -> None:
        """Asks for the `num_bytes` from here on, a multiple of 16, to be brought into L2; waits for nothing."""
        text, void = "cp.async.bulk.prefetch.L2.global [$0], $1;", ir.Type.parse("!llvm.void")
        llvm.inline_asm(void, [self.value, raw(num_bytes)], text, "l,r", has_side_effects=True)

    def add(self, index: Any, word: Any) -> None:
        """Atomically; the sum doesn't depend on the order, as these are integers."""
        llvm.atomicrmw(llvm.AtomicBinOp.add, self.at(index, i32()), raw(word), llvm.AtomicOrdering.monotonic)


def i32() -> Any:
    return ir.IntegerType.get_signless(32)


def raw(value: Any) -> Any:
    """The MLIR value of a Word, or of a Python int."""
    if isinstance(value, Word):
        return value.value
    return arith.constant(i32(), value) if isinstance(value, int) else value


def word(value: int) -> Word:
    """A constant."""
    return Word(raw(value))


def thread() -> Word:
    """This thread's number in its block."""
    return Word(mosaic.thread_idx())


def thread_of_warpgroup() -> Word:
    """This thread's number in its warpgroup."""
    return thread() % BLOCK_THREADS


def block() -> Word:
    """This block's number in a grid of one axis."""
    return Word(mosaic.block_idx())


def warp() -> Word:
    """This warp's number in its block, known to be the same for the whole warp."""
    return Word(mosaic.warp_idx())


def barrier() -> None:
    """All threads of the block arrive; what they wrote to shared memory is visible."""
    mosaic.warpgroup_barrier()


@contextlib.contextmanager
def when(condition: Word) -> Iterator[None]:
    with mosaic.when(condition.value):
        yield


def loop(start: Any, stop: Any, step: Any, carries: Sequence[Word], body: Callable[..., Sequence[Word]]) -> list[Word]:
    """for i in range(start, stop, step): carries = body(i, *carries)."""
    operation = scf.ForOp(raw(start), raw(stop), raw(step), [raw(carry) for carry in carries])
    with ir.InsertionPoint(operation.body):
        found = body(Word(operation.induction_variable), *map(Word, operation.inner_iter_args))
        scf.yield_([raw(word) for word in found])
    return [Word(result) for result in operation.results]


def warp_sum(word: Word) -> Word:
    """The sum over the warp's 32 lanes, in each of them."""
    return Word(nvvm.redux_sync(word.value, nvvm.ReductionKind.ADD, mosaic.c(FULL_MASK, i32())))


def warp_largest(word: Word) -> Word:
    """The largest over the warp, signed."""
    return Word(nvvm.redux_sync(word.value, nvvm.ReductionKind.MAX, mosaic.c(FULL_MASK, i32())))


def warp_smallest(word: Word) -> Word:
    """The smallest over the warp, signed."""
    return Word(nvvm.redux_sync(word.value, nvvm.ReductionKind.MIN, mosaic.c(FULL_MASK, i32())))


def warp_sum_before(word: Word, lane: Word) -> Word:
    """The sum over the lanes before this one."""
    total = word
    for distance in (1, 2, 4, 8, 16):
        below = Word(nvvm.shfl_sync(mosaic.c(FULL_MASK, i32()), total.value, raw(distance), raw(0), nvvm.ShflKind.up))
        total = total + (lane >= distance).select(below, 0)
    return total - word


def warp_same(word: Word, lane: Word) -> tuple[Word, Word]:
    """How many lanes before this one hold the same word, and how many in all."""
    # PTX, as nvvm.match_sync loses its kind on the way to the compiler. 0.10.2's inline_asm can't say `convergent`;
    # there the side effect alone keeps it in place.
    convergent: dict[str, Any] = {"convergent": True} if hasattr(llvm.InlineAsmOp, "convergent") else {}
    text, operands = "match.any.sync.b32 $0, $1, 0xffffffff;", [word.value]
    mask = Word(llvm.inline_asm(i32(), operands, text, "=r,r", has_side_effects=True, **convergent))
    before = mask & (Word(arith.shli(raw(1), lane.value)) - 1)
    return Word(llvm.intr_ctpop(before.value)), Word(llvm.intr_ctpop(mask.value))


def swap(word: Word, distance: int) -> Word:
    """The word of the lane whose number differs in this bit, a power of two."""
    return Word(mosaic.shfl_bfly(word.value, distance))


def warp_barrier() -> None:
    mosaic.warp_barrier()


def elements_of(value: Any) -> list[Any]:
    """The elements of an MLIR vector."""
    [length] = value.type.shape
    return [vector.extract(value, dynamic_position=[], static_position=[i]) for i in range(length)]


def words_of(value: Any) -> list[Word]:
    """The words of an MLIR vector."""
    return [Word(element) for element in elements_of(value)]


def element_type(dtype: Any) -> Any:
    """The MLIR type of a dtype's elements."""
    return mosaic.dtype_to_ir_type(dtype)
