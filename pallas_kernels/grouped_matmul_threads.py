"""What the grouped products' kernel does by single threads: loads at any address, some rows of a tile out of it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from jmoe.pallas_kernels import simt

VECTOR = 16  # bytes of one load or store
ATOM = 8  # rows and vectors of one tile of 1 KB, which is how far the swizzle of 128 bytes goes


def copy_words(num_words: int, *refs: Any) -> None:
    """target[:num_words] = source[:num_words] for pairs of int32 refs, by one warpgroup, which then sees them."""

    def copy(*pointers):
        for source, target in zip(pointers[::2], pointers[1::2], strict=True):

            def word(i, source=source, target=target):
                target.store(i, source.load(i))
                return []

            simt.loop(_thread(), num_words, simt.BLOCK_THREADS, [], word)
        simt.barrier()

    simt.program(copy, *refs)


def load_by_row(source: Any, num_rows: int, first: jax.Array, column: jax.Array) -> jax.Array:
    """source[first : first + num_rows, column] as a factor of a product's columns: `[num_rows]` in WGMMA.reduce(0).

    A word at a time: Mosaic's own load takes two, and `first` may be odd and the words apart.

    Args:
      source: `[rows]` or `[rows, columns]` float32 in global memory.
      num_rows: a multiple of 8.
      first, column: int32.
    """
    splat = plgpu.Layout.WG_SPLAT(())
    layout = plgpu.Layout.WGMMA.reduce(0)
    result = plgpu.ShapeDtypeStruct((num_rows,), jnp.float32, layout=layout)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), splat, splat), return_type=result)
    def inlined(_ctx, source_g, *values):
        first, column = (simt.Word(value.registers.flat[0]) for value in values)
        pointer = simt.Pointer.of(source_g)
        stride = 1 if len(source_g.type.shape) == 1 else source_g.type.shape[1]
        f32 = ir.F32Type.get()
        pair = ir.VectorType.get((2,), f32)
        to = layout.to_mgpu()
        registers = np.empty(to.registers_shape((num_rows,)), dtype=object)
        for i in range(num_rows // 8):
            row = first + (simt.thread() % 4) * 2 + 8 * i
            at = [pointer.at((row + j) * stride + column, f32) for j in range(2)]
            found = [llvm.load(f32, address, alignment=4) for address in at]
            registers.flat[i] = vector.from_elements(pair, found)
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
        lane = _thread() % vectors
        i32 = simt.i32()

        def store(i):
            n = skipped + i
            atom = (n // ATOM) * (vectors // ATOM) + lane // ATOM
            turned = simt.Word(arith.xori((lane % ATOM).value, (n % ATOM).value))
            found = source.load_vector(atom * (ATOM * ATOM) + (n % ATOM) * ATOM + turned, 4, i32)
            where = out.skip(first + n, row_bytes)
            where.store_vector((column * item) // VECTOR + lane, found)
            return []

        simt.loop(_thread() // vectors, meant, simt.BLOCK_THREADS // vectors, [], store)
        simt.barrier()

    inlined(tile, target, *scalars)


def _thread() -> simt.Word:
    """This thread's number in its warpgroup."""
    return simt.thread() % simt.BLOCK_THREADS
