"""What the thread blocks of `expert_products` tell each other, and how they leave rows for each other.

An expert's counter says how many of its gated items are done. The counters stand in memory that nobody cleared: the
first block clears and marks them, the others wait for the marks, the last to end wipes them (see `simt_marks`).
"""

from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe.pallas_kernels import simt, simt_marks
from jmoe.pallas_kernels.block_scaled import BLOCK
from jmoe.pallas_kernels.grouped_matmul_threads import ATOM, swizzled
from jmoe.pallas_kernels.permute_rows_mosaic import rounded_to_float8
from jmoe.pallas_kernels.simt import Pointer, Word

# Behind the marks: consumers that ended; items that were asked for; of each expert the items that are done.
DONE, ASKED, ARRIVED = 2, 3, 4


def num_counters(num_experts: int) -> int:
    return ARRIVED + num_experts


def open_program(num_experts: int):
    """One warpgroup of all clears the counters and marks them: `program(counters)`."""

    def program(counters: Pointer) -> None:
        for i in range(DONE, num_counters(num_experts), simt.BLOCK_THREADS):
            with simt.when(simt.thread_of_warpgroup() + i < num_counters(num_experts)):
                counters.store(simt.thread_of_warpgroup() + i, 0)
        simt.barrier()
        with simt.when(simt.thread_of_warpgroup().equals(0)):
            simt_marks.mark(counters)

    return program


def ask_program(num_sms: int):
    """Which item is next: `program(counters, queue, count, place)`, by one thread of the second warp.

    The loads behind it wait for the answer (a barrier of the warpgroup stands before each), those before it don't. The
    first num_sms items are the blocks' first ones.
    """

    def program(counters: Pointer, queue: Pointer, count: Word, place: Word) -> None:
        with simt.when(simt.thread_of_warpgroup().equals(simt.WARP)):
            with simt.when(count.equals(0)):
                simt_marks.wait(counters)
            queue.store(place, simt_marks.take(counters, ASKED) + num_sms)

    return program


def arrive_program(counters: Pointer, expert: Word) -> None:
    """All that this warpgroup stored for an item of the expert is there, for TMA too."""
    simt_marks.publish()
    simt.barrier()
    simt_marks.add_if(simt.thread_of_warpgroup().equals(0), counters, expert + ARRIVED, 1)


def wait_program(counters: Pointer, expert: Word, items: Word, count: Word) -> None:
    """Until `items` of the expert are done; then what they stored can be read, by TMA too.

    Behind the block's first item (count 0) the counters are known to be cleared.
    """
    with simt.when(simt.thread_of_warpgroup().equals(0)):
        with simt.when(count.equals(0)):
            simt_marks.wait(counters)
        simt_marks.wait_for(counters, expert + ARRIVED, items)
    simt.barrier()
    simt_marks.publish()


def meet_program(counters: Pointer) -> None:
    """Until the counters are cleared."""
    with simt.when(simt.thread_of_warpgroup().equals(0)):
        simt_marks.wait(counters)
    simt.barrier()


def leave_program(consumers: int):
    """The last consumer of all wipes the marks: `program(counters)`, once it counts nothing more."""

    def program(counters: Pointer) -> None:
        simt.barrier()
        with simt.when(simt.thread_of_warpgroup().equals(0)):
            before = simt_marks.add(counters, DONE, 1)
            with simt.when(before.equals(consumers - 1)):
                simt_marks.wipe(counters)

    return program


def store_float8(tiles: Any, target: Any, scales: Any, transforms: Any, consumers: int, *scalars: jax.Array) -> None:
    """target[first + n, column + c] = float8(tiles[c // 64, n, c % 64] / scale), and the scale to scales.

    For n in skipped .. skipped + meant - 1; the scale as `quantize_rows` has it. 16 lanes take a row, the consumers
    turns.

    Args:
      tiles: `[2, rows, 64]` or `[rows, 128]` bfloat16 in shared memory, in tiles of 8 rows of 128 bytes, swizzled.
      target: `[rows, out]` float8_e4m3fn; scales: `[rows, out / 128]` float32; in global memory.
      transforms: of the tiles.
      consumers: warpgroups that share the rows.
      scalars: first, skipped, meant, column, number of this consumer; int32.
    """
    splat = plgpu.Layout.WG_SPLAT(())
    refs = plgpu.RefType(transforms), plgpu.RefType(), plgpu.RefType()
    of_half, of_rows = (tiles.shape[1] // ATOM, 1) if len(tiles.shape) == 3 else (1, BLOCK // 64)

    @plgpu.inline_mgpu(arg_types=(*refs, *[splat] * len(scalars)))
    def inlined(_ctx, tiles_s, target_g, scales_g, *values):
        given: Any = [simt.Word(value.registers.flat[0]) for value in values]
        pointers: Any = [simt.Pointer.of(ref) for ref in (tiles_s, target_g, scales_g)]
        _store_float8(of_half, of_rows, target_g.type.shape[1], consumers, *pointers, *given)

    inlined(tiles, target, scales, *scalars)


def _store_float8(
    of_half: int, of_rows: int, width: int, consumers: int, tiles: Pointer, target: Pointer, scales: Pointer,
    first: Word, skipped: Word, meant: Word, column: Word, own: Word,
) -> None:  # fmt: skip
    """`store_float8`, thread by thread; a row of 128 columns is 16 vectors of 8. of_half and of_rows: tiles of 1 KB
    until the other 64 columns, and until the next 8 rows."""
    lanes, at_once = BLOCK // 8, simt.BLOCK_THREADS * 8 // BLOCK
    lane = simt.thread_of_warpgroup() % lanes

    def store(i):
        last = meant - 1
        n = i + simt.thread_of_warpgroup() // lanes
        n = skipped + (n < last).select(n, last)  # a warp stays together: the last row may be stored twice
        place = swizzled(lane // ATOM * of_half + n // ATOM * of_rows, n, lane)
        packed, scale = rounded_to_float8(tiles.load_vector(place, 8, simt.element_type("bfloat16")), lanes)
        target.skip(first + n, width).store_vector(column // 8 + lane, packed, 8)
        with simt.when(lane.equals(0)):
            scale.store(scales.skip(first + n, width // BLOCK * 4), column // BLOCK)
        return []

    simt.loop(own * at_once, meant, at_once * consumers, [], store)
