"""What a thread needs to write into another device's memory: addresses from words, system-wide flags, bounded waits.

Beside `simt`; the same rules. PTX, as neither Pallas nor MLIR's LLVM dialect has words for it in both JAX versions.
"""

from typing import Any, NamedTuple

from jax.experimental.mosaic.gpu import utils as mosaic
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf

from jmoe.pallas_kernels import simt
from jmoe.pallas_kernels.simt import Pointer, Word


class Waited(NamedTuple):
    """How a wait ended: reached (a bit), and the two words last seen there."""

    reached: Word
    low: Word
    high: Word


def address(low: Word, high: Word) -> Pointer:
    """Global memory at an address that comes as two words; 0 where both are."""
    i64 = _i64()
    upper = arith.shli(arith.extui(i64, high.value), arith.constant(i64, 32))
    whole = arith.ori(upper, arith.extui(i64, low.value))
    return Pointer(llvm.inttoptr(llvm.PointerType.get(1), whole))


def beyond(pointer: Pointer, count: Word, units: Word, unit_bytes: int) -> Pointer:
    """`count` times `units` units further, in 64 bits."""
    offset = arith.muli(arith.extui(_i64(), count.value), arith.extui(_i64(), units.value))
    offset = arith.muli(offset, arith.constant(_i64(), unit_bytes))
    return Pointer(mosaic.getelementptr(pointer.value, [offset], ir.IntegerType.get_signless(8)))


def negated(bit: Word) -> Word:
    """The other value of a bit."""
    return Word(arith.xori(bit.value, arith.constant(ir.IntegerType.get_signless(1), 1)))


def load_vector_if(inside: Word, pointer: Pointer, index: Any) -> list[Word]:
    """Four words at vector number `index`, or zeros: no branch, so that many are in flight at once."""
    text = (
        "{ .reg .pred p; setp.ne.s32 p, $5, 0; mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;"
        " @p ld.global.v4.b32 {$0, $1, $2, $3}, [$4]; }"
    )
    kind = llvm.StructType.get_literal([simt.i32()] * 4)
    operands = [pointer.at(index, _vector()), inside.count().value]
    # A side effect, though it has none: what is read after a flag must not move above it.
    found: Any = llvm.inline_asm(kind, operands, text, "=&r,=&r,=&r,=&r,l,r", has_side_effects=True)
    return [Word(llvm.extractvalue(simt.i32(), found, [i])) for i in range(4)]


def store_vector_if(inside: Word, pointer: Pointer, index: Any, words: list[Word]) -> None:
    """Four words to vector number `index`, or nothing."""
    text = "{ .reg .pred p; setp.ne.s32 p, $5, 0; @p st.global.v4.b32 [$0], {$1, $2, $3, $4}; }"
    operands = [pointer.at(index, _vector()), *(w.value for w in words), inside.count().value]
    llvm.inline_asm(_void(), operands, text, "l,r,r,r,r,r", has_side_effects=True)


def store_tagged(pointer: Pointer, index: Any, words: list[Word], tag: Word) -> None:
    """One or two words, each in one 8-byte half with its tag, at number `index` of such groups.

    An aligned 8-byte half is written and read as one, so a reader that finds the tag has the word: no fence is needed.
    """
    kinds = {1: "v2.b32 [$0], {$1, $2}", 2: "v4.b32 [$0], {$1, $3, $2, $3}"}
    operands = [_group(pointer, index, len(words)), *(w.value for w in words), tag.value]
    text = f"st.volatile.global.{kinds[len(words)]};"
    llvm.inline_asm(_void(), operands, text, "l" + ",r" * (len(words) + 1), has_side_effects=True)


class Group(NamedTuple):
    """One or two tagged words: number `index` of such groups at a pointer; looked for by threads that need it."""

    pointer: Pointer
    index: Any
    length: int
    needed: Word


def wait_tagged(groups: list[Group], tag: Word, patience: Word) -> tuple[Word, list[list[Word]]]:
    """Until every group that this thread needs carries the tag: (whether they do, the words of each group).

    All groups are looked at together, so that a turn takes one way to the memory, not one for each.
    """
    word, bit = simt.i32(), ir.IntegerType.get_signless(1)
    kinds = [bit] + [word] * sum(group.length for group in groups)
    start = ticks()
    loop = scf.WhileOp(kinds, [])
    with ir.InsertionPoint(loop.before.blocks.append()):
        found, tagged = [], Word(arith.constant(bit, 1))
        for group in groups:
            parts = _load_group(group)
            found += parts[::2]
            for part in parts[1::2]:
                tagged = tagged & Word(arith.ori(part.equals(tag).value, negated(group.needed).value))
        late = (ticks() - start) >= patience
        more = arith.xori(arith.ori(tagged.value, late.value), arith.constant(bit, 1))
        scf.condition(more, [tagged.value, *(w.value for w in found)])
    with ir.InsertionPoint(loop.after.blocks.append(*kinds)):
        scf.yield_([])
    reached, *words = map(Word, loop.results)
    return reached, [[words.pop(0) for _ in range(group.length)] for group in groups]


def _load_group(group: Group) -> list[Word]:
    """Words and tags in turn; zeros where they are not needed."""
    count = 2 * group.length
    outs = ", ".join(f"${i}" for i in range(count))
    zeros = " ".join(f"mov.b32 ${i}, 0;" for i in range(count))
    text = (
        f"{{ .reg .pred p; setp.ne.s32 p, ${count + 1}, 0; {zeros}"
        f" @p ld.volatile.global.v{count}.b32 {{{outs}}}, [${count}]; }}"
    )
    kind = llvm.StructType.get_literal([simt.i32()] * count)
    operands = [_group(group.pointer, group.index, group.length), group.needed.count().value]
    constraint = ",".join(["=&r"] * count + ["l", "r"])
    seen: Any = llvm.inline_asm(kind, operands, text, constraint, has_side_effects=True)
    return [Word(llvm.extractvalue(simt.i32(), seen, [i])) for i in range(count)]


def load_now(pointer: Pointer, index: Any) -> Word:
    """A word that is asked for here, though it may be needed behind a branch only."""
    text = "ld.global.b32 $0, [$1];"
    return Word(llvm.inline_asm(simt.i32(), [pointer.at(index, simt.i32())], text, "=r,l", has_side_effects=True))


def load_word(pointer: Pointer, index: Any) -> Word:
    """A word that another kernel may have written; never cached from before."""
    text = "ld.relaxed.sys.global.b32 $0, [$1];"
    return Word(llvm.inline_asm(simt.i32(), [pointer.at(index, simt.i32())], text, "=r,l", has_side_effects=True))


def store_word(pointer: Pointer, index: Any, word: Any) -> None:
    """A word that other devices may look at at any time."""
    operands = [pointer.at(index, simt.i32()), simt.raw(word)]
    llvm.inline_asm(_void(), operands, "st.relaxed.sys.global.b32 [$0], $1;", "l,r", has_side_effects=True)


def release(pointer: Pointer, low: Word, high: Word) -> None:
    """Two words as one: whoever sees them (`wait`) sees all that this block wrote before its last barrier."""
    text = "{ .reg .b64 d; mov.b64 d, {$1, $2}; st.release.sys.global.b64 [$0], d; }"
    llvm.inline_asm(_void(), [pointer.value, low.value, high.value], text, "l,r,r", has_side_effects=True)


def ticks() -> Word:
    """The device's clock in units of 1.024 us."""
    text = "{ .reg .u64 t; mov.u64 t, %globaltimer; shr.u64 t, t, 10; cvt.u32.u64 $0, t; }"
    return Word(llvm.inline_asm(simt.i32(), [], text, "=r", has_side_effects=True))


def wait(pointer: Pointer, least: Word, deadline: Word) -> Waited:
    """Until the low word there, taken as a distance that wraps, is at least `least`; at most `deadline` ticks.

    Looks once at least. One thread; a barrier makes what it has seen known to its block.
    """
    word, bit = simt.i32(), ir.IntegerType.get_signless(1)
    start = ticks()
    loop = scf.WhileOp([bit, word, word], [])
    with ir.InsertionPoint(loop.before.blocks.append()):
        text = "{ .reg .b64 d; ld.acquire.sys.global.b64 d, [$2]; mov.b64 {$0, $1}, d; }"
        kind = llvm.StructType.get_literal([word, word])
        seen: Any = llvm.inline_asm(kind, [pointer.value], text, "=r,=r,l", has_side_effects=True)
        low, high = (Word(llvm.extractvalue(word, seen, [i])) for i in range(2))
        reached = (low - least) >= 0
        late = (ticks() - start) >= deadline
        more = arith.xori(arith.ori(reached.value, late.value), arith.constant(bit, 1))
        scf.condition(more, [reached.value, low.value, high.value])
    with ir.InsertionPoint(loop.after.blocks.append(bit, word, word)):
        scf.yield_([])
    return Waited(*map(Word, loop.results))


def _i64() -> Any:
    return ir.IntegerType.get_signless(64)


def _group(pointer: Pointer, index: Any, length: int) -> Any:
    return pointer.at(index, ir.VectorType.get((2 * length,), simt.i32()))


def _vector() -> Any:
    return ir.VectorType.get((4,), simt.i32())


def _void() -> Any:
    return ir.Type.parse("!llvm.void")
