"""What the grouped products' kernel does by single threads: loads at any address, some rows of a tile out of it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

from jmoe.pallas_kernels import simt

VECTOR = 16  # bytes of one load or store
ATOM = 8  # rows and vectors of one tile of 1 KB, which is how far the swizzle of 128 bytes goes


def line_up_items(num_experts: int, block_rows: int, words: Any, *groups: Any) -> None:
    """words[:, e] = (blocks of rows of the experts before e, size, start); words[0, num_experts] = those of all.

    An expert has ceil((size + start % 8) / block_rows) blocks, if it has a row. By one warpgroup, which then sees
    them.

    Args:
      num_experts, block_rows: static.
      words: `[3, num_experts + 1]` int32 in shared memory.
      groups: sizes `[num_experts]` int32 in global memory, and starts; without them a group starts where one ends.
    """
    each, length = -(-num_experts // simt.WARP), num_experts + 1

    def line_up(words, sizes, *starts):
        lane = simt.thread() % simt.WARP
        experts = [lane * each + i for i in range(each)]
        inside = [expert < num_experts for expert in experts]
        safe = [there.select(expert, 0) for expert, there in zip(experts, inside, strict=True)]
        held = [there.select(sizes.load(expert), 0) for expert, there in zip(safe, inside, strict=True)]
        begins = [starts[0].load(expert) for expert in safe] if starts else _sums_before(held, lane)
        counts = []
        for size, begin in zip(held, begins, strict=True):
            blocks = (size + begin % ATOM + (block_rows - 1)) // block_rows
            counts.append((size >= 1).select(blocks, 0))
        firsts = _sums_before(counts, lane)
        with simt.when((simt.warp() % (simt.BLOCK_THREADS // simt.WARP)).equals(0)):
            for expert, there, *found in zip(experts, inside, firsts, held, begins, strict=True):
                with simt.when(there):
                    for row, word in enumerate(found):
                        words.store(expert + row * length, word)
            with simt.when(lane.equals(simt.WARP - 1)):
                words.store(num_experts, firsts[-1] + counts[-1])
        simt.barrier()

    simt.program(line_up, words, *groups)


def _sums_before(words: list[simt.Word], lane: simt.Word) -> list[simt.Word]:
    """Of consecutive words, some a lane: the sum of all before each."""
    before = simt.warp_sum_before(sum(words[1:], words[0]), lane)
    found = []
    for word in words:
        found.append(before)
        before = before + word
    return found


def find_expert(num_experts: int, tiles: int, words: Any, item: jax.Array) -> Any:
    """The expert that `item` is of, by `words` of `line_up_items`, of `tiles` items a block of rows; int32.

    num_experts behind the last item.
    """
    splat = plgpu.Layout.WG_SPLAT(())
    result = plgpu.ShapeDtypeStruct((), jnp.int32, layout=splat)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), splat), return_type=result)
    def inlined(_ctx, words_s, *values):
        item, lane = simt.Word(values[0].registers.flat[0]), simt.thread() % simt.WARP
        pointer, passed = simt.Pointer.of(words_s), simt.word(0)
        for start in range(1, num_experts + 1, simt.WARP):
            expert = lane + start
            there = expert < num_experts + 1
            behind = pointer.load(there.select(expert, 0)) * tiles
            passed = passed + (there & (item >= behind)).count()
        registers = np.empty((), dtype=object)
        registers[()] = simt.warp_sum(passed).value
        return fragmented_array.FragmentedArray(_registers=registers, _layout=splat.to_mgpu(), _is_signed=True)

    return inlined(words, item)


def load_by_row(source: Any, num_rows: int, first: jax.Array, column: jax.Array, reduced: int) -> Any:
    """source[first : first + num_rows, column] as a factor of each row: `[num_rows]` in WGMMA.reduce(reduced).

    A word at a time: Mosaic's own load takes two, and `first` may be odd and the words apart.

    Args:
      source: `[rows]` or `[rows, columns]` float32 in global memory.
      num_rows: a multiple of 8; 64 where `reduced` is 1.
      first, column: int32.
      reduced: 0 where rows are a product's columns (a thread holds two of each eight), 1 where they are its rows (a
        thread holds two, eight apart).
    """
    splat = plgpu.Layout.WG_SPLAT(())
    layout = plgpu.Layout.WGMMA.reduce(reduced)
    length, count = (1, 2) if reduced else (2, num_rows // ATOM)  # of a register, and registers
    result = plgpu.ShapeDtypeStruct((num_rows,), jnp.float32, layout=layout)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), splat, splat), return_type=result)
    def inlined(_ctx, source_g, *values):
        first, column = (simt.Word(value.registers.flat[0]) for value in values)
        pointer = simt.Pointer.of(source_g)
        stride = 1 if len(source_g.type.shape) == 1 else source_g.type.shape[1]
        f32 = ir.F32Type.get()
        kind = ir.VectorType.get((length,), f32)
        to = layout.to_mgpu()
        registers = np.empty(to.registers_shape((num_rows,)), dtype=object)
        thread = simt.thread_of_warpgroup()
        row = thread // simt.WARP * 16 + thread % simt.WARP // 4 if reduced else thread % 4 * 2
        base = pointer.skip(first + row, stride * 4).at(column, f32)
        for i in range(count):
            at = [simt.mosaic.getelementptr(base, [(ATOM * i + j) * stride], f32) for j in range(length)]
            found = [llvm.load(f32, address, alignment=4) for address in at]
            registers.flat[i] = vector.from_elements(kind, found)
        return fragmented_array.FragmentedArray(_registers=registers, _layout=to, _is_signed=None)

    return inlined(source, first, column)


def store_rows(tile: Any, target: Any, transforms: Any, num_columns: int, *scalars: jax.Array) -> None:
    """target[first + n, column : column + num_columns] = tile[n] for n in skipped .. skipped + meant - 1.

    TMA writes whole tiles, and the rows behind a group's end are another group's.

    Args:
      tile: `[rows, num_columns]` in shared memory, in tiles of 8 rows of 128 bytes, swizzled.
      target: `[rows, out]` in global memory.
      transforms: of the tile.
      num_columns: of the tile.
      scalars: first, skipped, meant, column; int32.
    """
    splat = plgpu.Layout.WG_SPLAT(())

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(transforms), plgpu.RefType(), *[splat] * len(scalars)))
    def inlined(_ctx, tile_s, target_g, *values):
        first, skipped, meant, column = (simt.Word(value.registers.flat[0]) for value in values)
        item = simt.mosaic.bytewidth(target_g.type.element_type)
        row_bytes = target_g.type.shape[1] * item
        vectors = num_columns * item // VECTOR
        source, out = simt.Pointer.of(tile_s), simt.Pointer.of(target_g)
        lane = simt.thread_of_warpgroup() % vectors
        i32 = simt.i32()

        def store(i):
            n = skipped + i
            atom = (n // ATOM) * (vectors // ATOM) + lane // ATOM
            found = source.load_vector(swizzled(atom, n, lane), 4, i32)
            where = out.skip(first + n, row_bytes)
            where.store_vector((column * item) // VECTOR + lane, found)
            return []

        simt.loop(simt.thread_of_warpgroup() // vectors, meant, simt.BLOCK_THREADS // vectors, [], store)
        simt.barrier()

    inlined(tile, target, *scalars)


def swizzled(atom: simt.Word, row: simt.Word, lane: simt.Word) -> simt.Word:
    """Number of the vector that stands at row % 8 and lane % 8 of the tile of 1 KB with this number."""
    return atom * (ATOM * ATOM) + (row % ATOM) * ATOM + (lane % ATOM).differ(row % ATOM)
