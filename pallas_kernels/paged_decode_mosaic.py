"""Decode attention over pages on Hopper: shapes, buffers and launch of the kernel of `paged_decode_body`."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe.pallas_kernels import paged_decode_plan as planning
from jmoe.pallas_kernels.paged_decode_body import LOG2E, body_of
from jmoe.pallas_kernels.paged_decode_plan import MASKED, TILE, TILE_UNITS, Cut, Decode
from jmoe.pallas_kernels.paged_decode_queue import WORDS, num_counters

# Of pages under way in an SM: 17 MB in all. Half as many are 3 to 5 % slower, 160 KB no faster. Float8 leaves room for
# what it becomes.
RING_BYTES, RING_BYTES_FLOAT8, MOST_STAGES = 128 * 1024, 96 * 1024, 8
MANY_ROWS = 128
CUT = Cut()
REDUCED = 2 * 128  # words of a sum or maximum over a tile's tokens: two columns a thread


def paged_decode(
    q, k_pages, v_pages, page_table, start_pos, num_tokens, sinks, k_scale, v_scale, *,
    sliding_window=None, logit_soft_cap=None, num_sms=132, stages=None, consumers=None, tokens=CUT,
    interpret=False,
):  # fmt: skip
    """See `paged_attention`.

    Args:
      q: `[rows, Q, H]` bfloat16, one token a row.
      k_pages, v_pages: `[P, page_len, G, H]` bfloat16 or float8_e4m3fn.
      page_table: `[rows, max_pages]` int32.
      start_pos: `[rows]` int32.
      num_tokens: `[rows]` int32 of 0 and 1, or None for ones.
      sinks: `[Q]` float32 or None.
      k_scale, v_scale: float32 scalars.
      num_sms: of the GPU.
      consumers: warpgroups that compute, a stream; None for what is faster.
      stages: tiles of keys and of values on their way in a stream, multiples of the consumers; None for what fits.
      tokens: of pieces.
      interpret: run by the interpreter, which has no atomics: what streams share is merged in XLA.

    Returns:
      `[rows, Q, H]` bfloat16.
    """
    rows, num_heads, head_dim = q.shape
    page_len, num_kv_heads = k_pages.shape[1:3]
    small = k_pages.dtype.itemsize == 1
    fit = (RING_BYTES_FLOAT8 if small else RING_BYTES) // (2 * TILE * head_dim * k_pages.dtype.itemsize)
    # Two streams an SM go on while one begins with a row: 0.8 to 1.2 % faster where rows are many. One of two consumers
    # brings a row in half the time, which evens out few rows. They differ in registers too (`partials_at_once`).
    many = rows >= MANY_ROWS and not small and num_heads <= 8 * num_kv_heads
    consumers = consumers or (1 if many or head_dim > 128 else 2)
    per_sm = 2 if consumers == 1 and head_dim <= 128 else 1
    key_stages, value_stages = stages or (min(fit // per_sm // consumers * consumers, MOST_STAGES),) * 2
    of_head = max(1, per_sm * num_sms // num_kv_heads)
    shape = Decode(
        rows, num_heads, num_kv_heads, head_dim, page_len, page_table.shape[1], of_head * num_kv_heads, consumers,
        key_stages, value_stages, sliding_window, logit_soft_cap, k_pages.dtype, q.dtype, interpret, tokens,
    )  # fmt: skip
    flat = q.reshape(rows * num_heads, head_dim)
    flat = jnp.pad(flat, ((0, shape.flat_rows - rows * num_heads), (0, 0)))
    scales = [jnp.asarray(scale, jnp.float32).reshape(1) for scale in (k_scale, v_scale)]
    log2_sinks = None if sinks is None else jnp.pad(sinks * LOG2E, shape.columns)
    tokens = 1 if num_tokens is None else num_tokens
    plan = planning.decode_plan(start_pos, tokens, shape) if interpret else None
    planned = (plan.whole, plan.codes) if plan else (None, None)
    operands = (flat, k_pages, v_pages, page_table, start_pos, num_tokens, *scales, log2_sinks, *planned)
    out, acc, maxima_sums, _ = _kernel(shape)(*operands)
    if not interpret:
        return out
    by_head = (
        jnp.full((num_kv_heads, shape.group), MASKED) if sinks is None else (sinks * LOG2E).reshape(num_kv_heads, -1)
    )
    return planning.merge_partials(out, acc, maxima_sums, start_pos, tokens, by_head, v_scale, shape)


def _kernel(shape: Decode):
    streams, head_dim, n = shape.num_streams, shape.head_dim, shape.columns

    def tiles(*sizes, dtype):
        swizzle = 64 * jnp.dtype(dtype).itemsize  # 64 elements, so that those of a float8 tile can be read alone
        tiling = plgpu.TilingTransform((8, 64))
        return plgpu.SMEM(sizes, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))

    pieces = shape.rows, shape.num_kv_heads, shape.most
    wide = (shape.consumers, TILE, head_dim) if shape.small_pages else (1, 8, 64)  # where float8 becomes float16
    return plgpu.kernel(
        body_of(shape),
        out_type=(
            jax.ShapeDtypeStruct((shape.rows, shape.num_heads, head_dim), shape.out_dtype),
            jax.ShapeDtypeStruct((*pieces, head_dim, n), jnp.float32),
            jax.ShapeDtypeStruct((*pieces, 2, n), jnp.float32),
            jax.ShapeDtypeStruct((shape.num_kv_heads, 2 * num_counters(shape.rows)), jnp.int32),
        ),
        grid=(streams,),
        grid_names=("stream",),
        num_threads=shape.consumers + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        scratch_types=[
            tiles(shape.stages, TILE, head_dim, dtype=shape.pages_dtype),
            tiles(shape.value_stages, TILE, head_dim, dtype=shape.pages_dtype),
            tiles(*wide, dtype=shape.dtype),
            plgpu.SMEM((shape.messages, n, head_dim), shape.out_dtype),
            tiles(shape.consumers, n, head_dim, dtype=shape.dtype),
            tiles(shape.consumers, n, TILE, dtype=shape.dtype),
            plgpu.SMEM((n, head_dim), shape.out_dtype),
            plgpu.SMEM((shape.consumers, head_dim, n), jnp.float32),
            plgpu.SMEM((shape.consumers, 2, n), jnp.float32),
            plgpu.SMEM((shape.consumers, REDUCED), jnp.float32),
            plgpu.SMEM((WORDS + shape.messages,), jnp.int32),
            plgpu.SMEM((shape.rows,), jnp.int32),
            *[plgpu.Barrier(num_arrivals=TILE_UNITS, num_barriers=n) for n in (shape.stages, shape.value_stages)],
            *[plgpu.Barrier(num_barriers=n) for n in (shape.stages, shape.value_stages)],
            plgpu.Barrier(num_barriers=shape.messages),
            *[plgpu.Barrier()] * 3,
        ],
    )
