"""`quantize_rows` as one Mosaic GPU kernel: a warp takes up to 4 KB of a row, 16 lanes hold a block of 128 columns."""

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe.pallas_kernels import simt
from jmoe.pallas_kernels.permute_many_mosaic import CHUNK, WARPS, load_chunk, num_chunks, row_types
from jmoe.pallas_kernels.permute_rows_mosaic import Row, store
from jmoe.pallas_kernels.simt import WARP, Pointer


def quantize_rows_pallas(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same bits as `quantize_rows`, of 16-bit rows `[rows, in]`, in a multiple of 128."""
    row = Row(rows.shape[1], rows.dtype, float8=True)
    row.check("quantize_rows")
    items = rows.shape[0] * num_chunks(row)

    def program(source: Pointer, out: Pointer, scales: Pointer):
        item = simt.block() * WARPS + simt.warp()
        with simt.when(item < items):
            number, first = item // num_chunks(row), item % num_chunks(row) * CHUNK + simt.thread() % WARP
            store(row, load_chunk(row, source.skip(number, row.row_bytes), first), out, scales, number)

    def quantize_rows(*refs):
        simt.follow()
        simt.program(program, *refs)

    values, scales = plgpu.kernel(
        quantize_rows,
        out_type=row_types(row, rows.shape[0]),
        grid=(-(-items // WARPS),),
        grid_names=("block",),
    )(rows)
    return values, scales
