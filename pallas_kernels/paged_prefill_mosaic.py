"""Prefill attention over pages on Hopper (Mosaic GPU): one producer warpgroup, two or three that compute.

A row of wgmma's M is one head of one query (head outer, query inner), so that short chunks still fill it and a KV tile
is read once for all heads of the group. The producer walks the block's pieces of the plan and brings queries and pages
by TMA. A consumer issues the last tile's weights times values and this tile's scores back to back; while it computes
its softmax, the others' products keep the tensor cores busy. (Taking turns by barriers was 1 to 12 % slower.)
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe.pallas_kernels.paged_prefill_block import LOG2E, PrefillRefs, PrefillShape
from jmoe.pallas_kernels.paged_prefill_consume import consume
from jmoe.pallas_kernels.paged_prefill_merge import merge_parts
from jmoe.pallas_kernels.paged_prefill_pass import FLAG_WORDS
from jmoe.pallas_kernels.paged_prefill_plan import ROW_TILE, PrefillPlan, PrefillTiles
from jmoe.pallas_kernels.paged_prefill_produce import produce

SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
SWIZZLED_FLOAT8 = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(64))
# Registers a thread of a consumer and of the producer. The launch gives each warpgroup an equal part of 64 K; asking
# for more than the producer gives back waits for ever. One consumer has all that a thread can have.
REGISTERS = {2: (232, 40), 3: (160, 32)}


def paged_prefill(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    plan: PrefillPlan,
    gaps: jax.Array,
    scales: jax.Array,
    sinks: jax.Array | None,
    tiles: PrefillTiles,
    *,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """The kernel and its merge.

    Args:
      q: `[tokens, Q, H]` bfloat16, tokens a multiple of 8.
      k_pages, v_pages: `[P, page_len, G, H]` bfloat16 or float8_e4m3fn.
      page_table: `[rows, max_pages]` int32.
      plan: of these lengths, `tiles` and the GPU.
      gaps: `[n, 2]` int32, begins and ends of the tokens of no row.
      scales: `[2]` float32, of a score (times log2 e, unless capped) and of a value.
      sinks: `[Q]` float32 or None.
      tiles: block sizes.
      sliding_window, soft_cap: as of the public function.
      interpret: whether the CPU interpreter runs it.

    Returns:
      `[tokens, Q, H]` in q's dtype; zeros for the tokens of no row.
    """
    page_len, num_kv_heads = k_pages.shape[1:3]
    float8 = k_pages.dtype == jnp.float8_e4m3fn
    shape = PrefillShape(
        num_heads=q.shape[1],
        num_kv_heads=num_kv_heads,
        head_dim=q.shape[2],
        page_len=page_len,
        tiles=tiles,
        num_blocks=plan.shares.shape[0],
        dtype=jnp.dtype(jnp.float16 if float8 else q.dtype),
        out_dtype=q.dtype,
        float8=float8,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        with_sinks=sinks is not None,
        interpret=interpret,
    )
    of_rows = scales if sinks is None else _sinks_of_rows(sinks, shape)
    operands = (q.astype(shape.dtype), k_pages, v_pages, page_table, plan.items, plan.shares, scales, of_rows)
    out, acc, ml = _attend(shape, operands)
    return merge_parts(shape, out, acc, ml, plan, gaps, scales, of_rows)


def _sinks_of_rows(sinks: jax.Array, shape: PrefillShape) -> jax.Array:
    """[Q] -> [head blocks, rows] float32, as log2, the sink of each row's head."""
    tiles, missing = shape.tiles, shape.blocks_of_group * shape.tiles.heads - shape.group
    grouped = jnp.pad(sinks.reshape(shape.num_kv_heads, shape.group), ((0, 0), (0, missing)))
    of_rows = jnp.repeat(grouped.reshape(-1, tiles.heads) * LOG2E, tiles.queries, axis=1)
    return jnp.pad(of_rows, ((0, 0), (0, tiles.rows - of_rows.shape[1]))).astype(jnp.float32)


def _scratch(shape: PrefillShape):
    """In the order of `PrefillRefs`."""
    tiles, head_dim = shape.tiles, shape.head_dim
    kv = (tiles.stages, tiles.kv_tile, head_dim)
    full = plgpu.Barrier(num_arrivals=1 if shape.float8 else shape.copies, num_barriers=tiles.stages)
    free = plgpu.Barrier(num_arrivals=tiles.consumers, num_barriers=tiles.stages)
    scratch = [
        plgpu.SMEM((tiles.rows, head_dim), shape.dtype, transforms=SWIZZLED),
        plgpu.SMEM(kv, shape.dtype, transforms=SWIZZLED),
        plgpu.SMEM(kv, shape.dtype, transforms=SWIZZLED),
        plgpu.SMEM((tiles.consumers, ROW_TILE, shape.out_columns), shape.out_dtype),
        plgpu.Barrier(num_arrivals=tiles.heads),
        plgpu.Barrier(num_arrivals=tiles.consumers),
        *(full, free, full, free),
        plgpu.Barrier(num_arrivals=shape.copies, num_barriers=2),
    ]
    if shape.float8:
        scratch += [plgpu.SMEM(kv[1:], jnp.float8_e4m3fn, transforms=SWIZZLED_FLOAT8) for _ in range(2)]
    if shape.interpret:
        weights = (tiles.consumers, ROW_TILE, tiles.kv_tile)
        scratch += [] if shape.float8 else [plgpu.SMEM((8, 128), jnp.float32) for _ in range(2)]
        scratch.append(plgpu.SMEM(weights, shape.dtype, transforms=SWIZZLED))
    return scratch


def _attend(shape: PrefillShape, operands):
    """out, and the float32 partial results: acc `[parts, rows, H]`, m and the sum `[parts, 2, rows]`."""
    tiles = shape.tiles

    def prefill_attention(*arrays):
        refs = PrefillRefs(*arrays)
        role = lax.axis_index("wg")
        of_consumer, of_producer = REGISTERS.get(tiles.consumers, (None, None))

        @pl.when(role == tiles.consumers)
        def _():
            if of_producer is not None:
                plgpu.set_max_registers(of_producer, action="decrease")
            produce(shape, refs)

        @pl.when(role < tiles.consumers)
        def _():
            if of_consumer is not None:
                plgpu.set_max_registers(of_consumer, action="increase")
            consume(shape, refs, role)

    blocks, sizes = shape.num_blocks, (tiles.rows, shape.head_dim)
    return plgpu.kernel(
        prefill_attention,
        out_type=(
            jax.ShapeDtypeStruct(operands[0].shape, shape.out_dtype),
            jax.ShapeDtypeStruct((4 * blocks, *sizes), jnp.float32),
            jax.ShapeDtypeStruct((4 * blocks, 2, tiles.rows), jnp.float32),
            jax.ShapeDtypeStruct((blocks, *sizes), jnp.float32),
            jax.ShapeDtypeStruct((blocks, 2, tiles.rows), jnp.float32),
            jax.ShapeDtypeStruct((blocks, tiles.consumers, FLAG_WORDS), jnp.int32),
        ),
        grid=(shape.num_blocks,),
        grid_names=("block",),
        num_threads=tiles.consumers + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        scratch_types=_scratch(shape),
    )(*operands)[:3]
