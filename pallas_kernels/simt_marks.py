"""How warpgroups of different thread blocks wait for each other by words in memory that nobody cleared.

Two 32-bit marks in a row say "ready"; who sets them, who waits and who wipes them, kernels say. That memory holds both
by chance has odds of 2^-64. Only inside a kernel, like `simt`.
"""

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from jmoe.pallas_kernels import simt
from jmoe.pallas_kernels.simt import Pointer, Word

MARKS = 0x6A6D6F65, 0x9E3779B9
MAX_POLLS = 1 << 22  # seconds; then the kernel fails


def run(text: str, operands: list, kinds: str) -> None:
    """PTX without a result."""
    kinds = ",".join(filter(None, (kinds, "~{memory}")))
    llvm.inline_asm(ir.Type.parse("!llvm.void"), operands, text, kinds, has_side_effects=True)


def mark(pointer: Pointer) -> None:
    """One thread, behind a barrier: what its warpgroup stored before can be read by who sees the marks."""
    pointer.store(1, MARKS[1])
    run(f"fence.acq_rel.gpu; st.release.gpu.global.b32 [$0], {MARKS[0]};", [pointer.value], "l")


def wipe(pointer: Pointer) -> None:
    pointer.store(0, 0)
    pointer.store(1, 0)


def wait(pointer: Pointer) -> None:
    """Until the marks are there; fails after seconds."""
    text = (
        f"{{ .reg .pred p, q, late; .reg .b32 a, b, left; mov.b32 left, {MAX_POLLS};\n"
        "WAIT: ld.acquire.gpu.global.b32 a, [$0]; ld.relaxed.gpu.global.b32 b, [$0+4];\n"
        "sub.u32 left, left, 1; setp.eq.u32 late, left, 0; @late trap;\n"
        f"setp.ne.b32 p, a, {MARKS[0]}; @p bra WAIT; setp.ne.b32 q, b, {MARKS[1]}; @q bra WAIT; }}"
    )
    run(text, [pointer.value], "l")


def add(pointer: Pointer, index: Word | int, count: Word | int) -> Word:
    """Adds to a word, after all that its warpgroup did before a barrier; what was there before."""
    text = "atom.acq_rel.gpu.global.add.u32 $0, [$1], $2;"
    operands = [pointer.at(index, simt.i32()), simt.raw(count)]
    return Word(llvm.inline_asm(simt.i32(), operands, text, "=r,l,r,~{memory}", has_side_effects=True))


def wait_for(pointer: Pointer, index: Word, least: Word) -> None:
    """Until a word, which others add to, is at least `least`, both unsigned; fails after seconds. One thread."""
    text = (
        f"{{ .reg .pred p, late; .reg .b32 a, left; mov.b32 left, {MAX_POLLS};\n"
        "WAIT: ld.acquire.gpu.global.b32 a, [$0]; sub.u32 left, left, 1; setp.eq.u32 late, left, 0; @late trap;\n"
        "setp.lt.u32 p, a, $1; @p bra WAIT; }"
    )
    run(text, [pointer.at(index, simt.i32()), simt.raw(least)], "l,r")


def take(pointer: Pointer, index: Word | int) -> Word:
    """The next number of a counter that says nothing of other memory."""
    text, operands = "atom.relaxed.gpu.global.add.u32 $0, [$1], 1;", [pointer.at(index, simt.i32())]
    return Word(llvm.inline_asm(simt.i32(), operands, text, "=r,l", has_side_effects=True))


def add_if(condition: Word, pointer: Pointer, index: Word | int, count: Word | int) -> None:
    """As `add`, of the threads whose bit is set, without a branch: wgmma behind one would wait for each product."""
    text = (
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p fence.acq_rel.gpu; @p red.release.gpu.global.add.u32 [$0], $1; }"
    )
    run(text, [pointer.at(index, simt.i32()), simt.raw(count), condition.count().value], "l,r,r")


def publish() -> None:
    """Between a thread's own loads and stores and those of TMA, either way: every thread, beside a barrier."""
    run("fence.proxy.async;", [], "")


COUNTS = 0x6A6D6F659E37 << 16  # the upper 48 bits of a word that counts; those below are the count


def count_from_zero(pointer: Pointer, index: Word | int) -> None:
    """Makes a counter of a 64-bit word that nobody cleared, without a fence: that takes 10 us beside others' loads."""
    run(f"{{ .reg .b64 a; mov.b64 a, {COUNTS}; st.relaxed.gpu.global.b64 [$0], a; }}", [_word(pointer, index)], "l")


def stop_counting(pointer: Pointer, index: Word | int) -> None:
    """For the next kernel that finds this memory: who counts last."""
    run("st.relaxed.gpu.global.b64 [$0], 0;", [_word(pointer, index)], "l")


def wait_for_counter(pointer: Pointer, index: Word | int) -> None:
    """Until a word counts; fails after seconds. One thread."""
    text = (
        f"{{ .reg .pred p, late; .reg .b32 left; .reg .b64 a, b; mov.b32 left, {MAX_POLLS};\n"
        "WAIT: ld.relaxed.gpu.global.b64 a, [$0]; sub.u32 left, left, 1; setp.eq.u32 late, left, 0; @late trap;\n"
        f"and.b64 b, a, -65536; setp.ne.b64 p, b, {COUNTS}; @p bra WAIT; }}"
    )
    run(text, [_word(pointer, index)], "l")


def count(pointer: Pointer, index: Word | int, order: str = "relaxed") -> Word:
    """Counts one; how many were before. With `order` "acq_rel" what the warpgroup did before a barrier is done."""
    text = f"{{ .reg .b64 a; atom.{order}.gpu.global.add.u64 a, [$1], 1; cvt.u32.u64 $0, a; and.b32 $0, $0, 65535; }}"
    found = llvm.inline_asm(simt.i32(), [_word(pointer, index)], text, "=r,l,~{memory}", has_side_effects=True)
    return Word(found)


def _word(pointer: Pointer, index: Word | int):
    return pointer.at(index, ir.IntegerType.get_signless(64))
