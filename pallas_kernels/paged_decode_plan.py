"""Which pages each stream of decode attention reads, worked out on the device, and how streams meet at a shared row.

A unit is 16 tokens of one row. All units of a call, ordered by row and position, are cut into ranges of equal length;
a stream is one range and one KV head, so that streams that run side by side read neighbouring bytes of the same pages
(a head's part of a token is 128 or 256 bytes, little for DRAM to open a row for). Where a cut falls inside a row, the
streams of the ranges on both sides keep partial results, and the one that comes last merges them, in order of position.

The thread blocks count each other in scratch memory that nobody cleared: the stream in which a row begins
writes two 32-bit marks and a zero before it starts; the others wait for the marks (its block has a lower number, so it
was started before theirs), and the last one wipes them. A fill by XLA would be a kernel of its own, 1.5 us.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from jmoe.pallas_kernels import simt
from jmoe.pallas_kernels.simt import WARP, Pointer, Word

UNIT = 16  # tokens
THREADS = 128
# What a stream's words mean: its first row and unit, units, units of every stream; the row that its end cuts, if that
# begins in it (or -1), with its first unit's position and its units; what `arrive` found.
ROW, FIRST_UNIT, COUNT, SHARE, CUT_ROW, CUT_START, CUT_UNITS, EARLIER, WORDS = 0, 1, 2, 3, 4, 5, 6, 7, 16
SUMS = 12  # four words, of the warps
MASKED = -1e30
MARKS = 0x6A6D6F65, 0x9E3779B9  # in a counter of four words, before the count
COUNTER_WORDS = 4
MAX_POLLS = 1 << 22  # seconds; then the kernel fails


@dataclasses.dataclass(frozen=True)
class Decode:
    """What is fixed when the kernel is compiled."""

    rows: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_len: int
    num_streams: int
    stages: int
    sliding_window: int | None
    logit_soft_cap: float | None
    pages_dtype: Any
    out_dtype: Any
    interpret: bool

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def columns(self) -> int:
        """wgmma's N: a multiple of 8."""
        return -(-self.group // 8) * 8

    @property
    def flat_rows(self) -> int:
        """Rows of q with all heads in one axis; at least `columns`."""
        return max(self.rows * self.num_heads, self.columns)

    @property
    def small_pages(self) -> bool:
        return jnp.dtype(self.pages_dtype).itemsize == 1

    @property
    def dtype(self) -> Any:
        """Of the products' operands: float16 holds every float8_e4m3fn, and the hardware converts to nothing else."""
        return jnp.float16 if self.small_pages else self.pages_dtype


def bounds(start_pos, num_tokens, sliding_window: int | None):
    """First visible position of rows, end of the visible ones, number of units (at least one); arrays or scalars."""
    high = start_pos + num_tokens
    low = jnp.zeros_like(high) if sliding_window is None else jnp.maximum(start_pos + 1 - sliding_window, 0)
    return low, high, jnp.maximum((high + UNIT - 1) // UNIT - low // UNIT, 1)


def num_ranges(num_streams: int, num_kv_heads: int) -> int:
    return max(1, num_streams // num_kv_heads)


def decode_plan(start_pos, num_tokens, num_kv_heads: int, num_streams: int, sliding_window: int | None) -> jax.Array:
    """The words of every stream, `[streams, WORDS]` int32, in XLA: for the interpreter, and to test `plan_program`."""
    units = bounds(start_pos, num_tokens, sliding_window)[2]
    ends = jnp.cumsum(units)
    share = pl.cdiv(ends[-1], num_ranges(num_streams, num_kv_heads))
    stream = jnp.arange(num_streams, dtype=jnp.int32)
    position = stream // num_kv_heads * share
    row = jnp.minimum(jnp.sum(ends[None, :] <= position[:, None], axis=1), units.shape[0] - 1)
    count = jnp.clip(ends[-1] - position, 0, share)
    words = [row, position - (ends - units)[row], count, jnp.full_like(position, share)]
    words += [jnp.zeros_like(position)] * (WORDS - len(words))
    return jnp.stack(words, axis=1).astype(jnp.int32)


def plan_program(rows: int, num_streams: int, num_kv_heads: int, sliding_window: int | None, with_tokens: bool):
    """One warpgroup works out its stream's words: `program(start_pos, num_tokens if with_tokens, words in SMEM)`."""
    per_thread = -(-rows // THREADS)

    def units_of(row: Word, start_pos: Pointer, num_tokens: Pointer | None) -> Word:
        there = row < rows
        safe = there.select(row, rows - 1)
        start = start_pos.load(safe)
        high = start + (num_tokens.load(safe) if num_tokens is not None else 1)
        units = (high + (UNIT - 1)) // UNIT
        if sliding_window is not None:
            low = start + (1 - sliding_window)
            units = units - (low < 0).select(0, low) // UNIT
        units = (units < 1).select(1, units)
        return there.select(units, 0)

    def program(*pointers: Pointer) -> None:
        start_pos, num_tokens, words = pointers if with_tokens else (pointers[0], None, pointers[1])
        thread = simt.thread() % THREADS
        lane, warp = thread % WARP, thread // WARP
        mine = [units_of(thread * per_thread + i, start_pos, num_tokens) for i in range(per_thread)]
        total = sum(mine[1:], start=mine[0])
        before = simt.warp_sum_before(total, lane)
        with simt.when(lane.equals(WARP - 1)):
            words.store(warp + SUMS, before + total)
        with simt.when(thread.equals(0)):
            words.store(ROW, 0)
            words.store(FIRST_UNIT, 0)
            words.store(CUT_ROW, -1)
        simt.barrier()
        sums = [words.load(SUMS + w) for w in range(THREADS // WARP)]
        for w, units in enumerate(sums):
            before = before + (warp < w + 1).select(0, units)
        total = sums[0] + sums[1] + sums[2] + sums[3]
        ranges = num_ranges(num_streams, num_kv_heads)
        share = (total + (ranges - 1)) // ranges
        first = simt.block() // num_kv_heads * share
        with simt.when(thread.equals(0)):
            left = (first < total).select(total - first, 0)
            words.store(COUNT, (left < share).select(left, share))
            words.store(SHARE, share)
        for i, units in enumerate(mine):
            _begin(words, thread * per_thread + i, before, units, first, share)
            before = before + units
        simt.barrier()

    return program


def _begin(words: Pointer, row: Word, passed: Word, units: Word, first: Word, share: Word) -> None:
    """Says where the stream begins if that is in this row, and whether what its end cuts begins in it."""
    with simt.when((first >= passed) & (first < passed + units)):
        words.store(ROW, row)
        words.store(FIRST_UNIT, first - passed)
    end = first + share
    with simt.when((end >= passed + 1) & (end < passed + units) & (passed >= first)):
        words.store(CUT_ROW, row)
        words.store(CUT_START, passed)
        words.store(CUT_UNITS, units)


def open_counter(words: Pointer, counter: Pointer) -> None:
    """Marks and clears this stream's counter, if a row begins in it that others continue."""
    with simt.when((simt.thread() % THREADS).equals(0) & (words.load(CUT_ROW) >= 0)):
        counter.store(2, 0)
        counter.store(1, MARKS[1])
        text = f"st.release.gpu.global.b32 [$0], {MARKS[0]};"
        llvm.inline_asm(ir.Type.parse("!llvm.void"), [counter.value], text, "l,~{memory}", has_side_effects=True)


def arrive(words: Pointer, first: Pointer, cut: Pointer) -> None:
    """After all partial results were stored: how many pieces of the stream's two shared rows were there before its own.

    words[EARLIER] is of the row that began before it, in whose stream the counter `first` is, words[EARLIER + 1] of the
    one that its end cuts, whose counter is its own. Two warps, so that one doesn't wait for the other.
    """
    wait_and_add = (
        f"{{ .reg .pred p, q, late; .reg .b32 a, b, left; mov.b32 left, {MAX_POLLS};\n"
        "WAIT: ld.acquire.gpu.global.b32 a, [$1]; ld.relaxed.gpu.global.b32 b, [$1+4];\n"
        "sub.u32 left, left, 1; setp.eq.u32 late, left, 0; @late trap;\n"
        f"setp.ne.b32 p, a, {MARKS[0]}; @p bra WAIT; setp.ne.b32 q, b, {MARKS[1]}; @q bra WAIT;\n"
        "atom.acq_rel.gpu.global.add.u32 $0, [$1+8], 1; }"
    )
    simt.barrier()
    thread = simt.thread() % THREADS
    shared = (words.load(FIRST_UNIT) >= 1) & (words.load(COUNT) >= 1), words.load(CUT_ROW) >= 0
    for i, counter in enumerate((first, cut)):
        with simt.when(thread.equals(i * WARP) & shared[i]):
            found = llvm.inline_asm(simt.i32(), [counter.value], wait_and_add, "=r,l,~{memory}", has_side_effects=True)
            words.store(EARLIER + i, Word(found))
    simt.barrier()


def merge_partials(out, acc, maxima_sums, start_pos, num_tokens, sinks, v_scale, sliding_window):
    """What the last stream of each row and head does, in XLA: for the interpreter, which has no atomics.

    Args:
      out: `[rows, Q, H]`, right where one stream did all of a row.
      acc: `[streams, 2, H, columns]` float32: a stream's part of a row that began before it, and of one that it began
        and didn't end.
      maxima_sums: `[streams, 2, 2, columns]` float32, their maxima (log2) and sums.
      sinks: `[G, Q / G]` float32, in log2; MASKED for none.

    Returns:
      `[rows, Q, H]`.
    """
    rows, num_heads, _ = out.shape
    num_streams, _, _, columns = acc.shape
    num_kv_heads, group = sinks.shape
    ranges = num_ranges(num_streams, num_kv_heads)
    units = bounds(start_pos, num_tokens, sliding_window)[2]
    ends = jnp.cumsum(units)
    share = pl.cdiv(ends[-1], ranges)
    first, last = (ends - units) // share, (ends - 1) // share
    index = jnp.arange(ranges)
    merged = []
    for row in range(rows):
        for head in range(num_kv_heads):
            skipped = max(0, (row * num_kv_heads + head) * group - (rows * num_heads - columns))  # see `place`
            own = slice(skipped, skipped + group)
            mine = ((index >= first[row]) & (index <= last[row]))[:, None]
            at = index * num_kv_heads + head, jnp.where(index == first[row], 1, 0)
            m, sums = (maxima_sums[*at, i, own] for i in (0, 1))
            m = jnp.where(mine, m, MASKED)
            top = m.max(0)
            weight = jnp.where(mine, jnp.exp2(m - top), 0)
            total = jnp.where(mine, sums * weight, 0).sum(0) + jnp.exp2(sinks[head] - top)
            parts = jnp.where(mine[:, None], acc[at][..., own] * weight[:, None], 0).sum(0)
            merged.append(parts * v_scale / total)
    result = jnp.stack(merged).swapaxes(1, 2).reshape(out.shape).astype(out.dtype)
    return jnp.where((first != last)[:, None, None], result, out)
