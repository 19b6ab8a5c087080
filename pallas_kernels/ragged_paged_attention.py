"""Attention over a paged KV cache for a ragged batch: decode rows and prefill chunks of any length in one call."""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp

from jmoe.pallas_kernels.choice import by_platform, num_sms
from jmoe.pallas_kernels.paged_attention import MASKED

Implementation = Literal["xla", "pallas", "reference"]
XLA_BLOCK = 64  # queries of one step of the XLA form


def ragged_paged_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    query_offsets: jax.Array,
    num_tokens: jax.Array,
    start_pos: jax.Array,
    *,
    sliding_window: int | None = None,
    logit_soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    k_scale: jax.Array | float = 1.0,
    v_scale: jax.Array | float = 1.0,
    implementation: Implementation | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v over the pages of each token's sequence, causal, grouped-query.

    Row r's queries are q[query_offsets[r] : query_offsets[r] + num_tokens[r]], at positions from start_pos[r] on; that
    at position p sees positions 0..p (the last `sliding_window` of them, itself included). The pages must already hold
    the new tokens. Scores and the softmax are float32. With a soft cap c a score s counts as c tanh(s / c); with sinks
    a head's weights are exp(s) / (exp(sink) + sum exp(s)).

    Args:
      q: `[tokens, Q, H]`.
      k_pages, v_pages: `[P, page_len, G, H]`, Q a multiple of G; q's dtype or float8_e4m3fn.
      page_table: `[rows, max_pages]` int32, page of each page_len positions.
      query_offsets, num_tokens, start_pos: `[rows]` int32; the rows' queries ascend and don't overlap.
      sliding_window: positions a token may see, or None for all.
      logit_soft_cap: bound of a score, or None.
      sinks: `[Q]` float32, one more logit a head in the softmax's denominator, or None. Not capped.
      k_scale, v_scale: float32 scalars, what one unit of a page stands for.
      implementation: "pallas" (Mosaic GPU, Hopper), "xla" (64 queries of a row at a time), "reference" (float32, token
        by token), None for the best.

    Returns:
      `[tokens, Q, H]` in q's dtype; tokens of no row come out as zeros.

    Raises:
      ValueError: shapes that don't belong together, an unknown implementation, or what "pallas" can't compute.
    """
    _check(q, k_pages, v_pages, sinks)
    if implementation not in (None, "xla", "pallas", "reference"):
        raise ValueError(
            "ragged_paged_attention: expected implementation 'xla', 'pallas', 'reference' or None, "
            f"got {implementation!r}"
        )
    options = {"sliding_window": sliding_window, "soft_cap": logit_soft_cap, "sinks": sinks}
    rows = (page_table, query_offsets, num_tokens, start_pos)
    arrays = (q, k_pages, v_pages, *rows, q.shape[2] ** -0.5 * k_scale, jnp.float32(v_scale))
    if implementation == "reference":
        return _reference(*arrays, **options)
    xla, pallas = (functools.partial(form, **options) for form in (_xla, _pallas))
    reason = pallas_refuses(q, k_pages)
    if implementation == "pallas":
        if reason:
            raise ValueError(f"ragged_paged_attention: 'pallas' {reason}")
        return pallas(*arrays)
    if implementation == "xla" or reason:
        return xla(*arrays)
    return by_platform("ragged_paged_attention", pallas, xla, *arrays)


def pallas_refuses(q: jax.Array, k_pages: jax.Array) -> str:
    """Why the Mosaic kernel can't compute this, or nothing."""
    page_len, num_kv_heads, head_dim = k_pages.shape[1:]
    group = q.shape[1] // num_kv_heads
    if q.dtype != jnp.bfloat16 or k_pages.dtype not in (jnp.bfloat16, jnp.float8_e4m3fn):
        return f"expected bfloat16 queries and bfloat16 or float8_e4m3fn pages, got {q.dtype} and {k_pages.dtype}"
    if head_dim not in (64, 128, 256):
        return f"expected head_dim 64, 128 or 256, got {head_dim}"
    if page_len % 16 or (64 % page_len and page_len % 64):
        return f"expected page_len 16, 32 or a multiple of 64, got {page_len}"
    if group > 16:
        return f"expected at most 16 query heads a KV head, got {group}"
    return ""


def _check(q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, sinks: jax.Array | None) -> None:
    if q.ndim != 3 or q.shape[1] % k_pages.shape[2] or q.shape[2] != k_pages.shape[3] or k_pages.shape != v_pages.shape:
        raise ValueError(
            "ragged_paged_attention: expected q [tokens, Q, H] and pages [P, page_len, G, H] with G dividing Q, "
            f"got {q.shape}, {k_pages.shape} and {v_pages.shape}"
        )
    if sinks is not None and sinks.shape != q.shape[1:2]:
        raise ValueError(f"ragged_paged_attention: expected sinks [Q] = {q.shape[1:2]}, got {sinks.shape}")


def _pallas(
    q, k_pages, v_pages, table, offsets, num_tokens, start_pos, scale, v_scale, *, sliding_window, soft_cap, sinks
):
    from jmoe.pallas_kernels.paged_prefill_mosaic import paged_prefill  # needs jax 0.11's plgpu
    from jmoe.pallas_kernels.paged_prefill_plan import prefill_plan, prefill_tiles

    tokens, num_heads, head_dim = q.shape
    num_kv_heads = k_pages.shape[2]
    q = jnp.pad(q, ((0, -tokens % 8), (0, 0), (0, 0)))  # TMA brings 8 tokens at once
    float8 = k_pages.dtype == jnp.float8_e4m3fn
    tiles = prefill_tiles(num_heads // num_kv_heads, head_dim, tokens / table.shape[0], float8)
    plan = prefill_plan(
        offsets,
        num_tokens,
        start_pos,
        max_tokens=tokens,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        tiles=tiles,
        num_blocks=num_sms(),
        sliding_window=sliding_window,
    )
    scales = jnp.stack([scale * (1 if soft_cap is not None else math.log2(math.e)), v_scale]).astype(jnp.float32)
    gaps = _gaps(offsets, num_tokens, tokens)
    out = paged_prefill(
        q, k_pages, v_pages, table, plan, gaps, scales, sinks, tiles, sliding_window=sliding_window, soft_cap=soft_cap
    )
    return out[:tokens]


def _gaps(offsets: jax.Array, num_tokens: jax.Array, tokens: int) -> jax.Array:
    """[1 + rows, 2] int32, begin and end of the tokens of no row: ahead of the first, behind each."""
    begin = jnp.concatenate([jnp.zeros(1, jnp.int32), offsets + num_tokens])
    end = jnp.concatenate([offsets, jnp.full(1, tokens, jnp.int32)])
    return jnp.stack([begin, end], axis=1).astype(jnp.int32)


def _rows_of_tokens(offsets: jax.Array, num_tokens: jax.Array, start_pos: jax.Array, tokens: int):
    """Row and position of each token, and whether it has any."""
    token = jnp.arange(tokens, dtype=jnp.int32)
    row = jnp.clip(jnp.sum(offsets[None, :] <= token[:, None], axis=1) - 1, 0)
    index = token - offsets[row]
    return row, start_pos[row] + index, (index >= 0) & (index < num_tokens[row])


def _attend(q, k, v, position, length, sliding_window, soft_cap, sinks, scale):
    """Queries [n, Q, H] of one sequence at `position` [n] over its k and v [S, G, H], of which `length` are its own."""
    n, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    key = jnp.arange(k.shape[0], dtype=jnp.int32)
    v = jnp.where((key < length)[:, None, None], v, 0)  # what stands behind is another's and may be NaN
    grouped = q.reshape(n, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = jnp.einsum("ngqh,sgh->gqns", grouped, k, preferred_element_type=jnp.float32) * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    seen = key <= position[:, None]
    if sliding_window is not None:
        seen &= key > position[:, None] - sliding_window
    scores = jnp.where(seen, scores, MASKED)
    largest = scores.max(-1, keepdims=True)
    if sinks is not None:
        sinks = sinks.reshape(num_kv_heads, -1, 1, 1)
        largest = jnp.maximum(largest, sinks)
    weights = jnp.exp(scores - largest)
    total = weights.sum(-1, keepdims=True)
    total = total if sinks is None else total + jnp.exp(sinks - largest)
    out = jnp.einsum("gqns,sgh->ngqh", (weights / total).astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.reshape(q.shape)


def _pages_of(pages: jax.Array, numbers: jax.Array, dtype) -> jax.Array:
    """[P, page_len, G, H] at [n] -> [n * page_len, G, H]."""
    gathered = pages.at[numbers].get(mode="promise_in_bounds", wrap_negative_indices=False)
    return gathered.reshape(-1, *pages.shape[2:]).astype(dtype)


def _xla(
    q, k_pages, v_pages, table, offsets, num_tokens, start_pos, scale, v_scale, *, sliding_window, soft_cap, sinks
):
    """Blocks of at most 64 queries of one row, one after the other, over all of that row's pages."""
    tokens = q.shape[0]
    size = min(XLA_BLOCK, tokens)
    blocks = -(-num_tokens // size)
    ends = jnp.cumsum(blocks)
    num_blocks = tokens // size + table.shape[0]  # as many as there can be
    padded = jnp.pad(q, ((0, size), (0, 0), (0, 0)))

    def block(index):
        row = jnp.minimum(jnp.sum(ends <= index), table.shape[0] - 1)
        first = (index - ends[row] + blocks[row]) * size
        k, v = (_pages_of(pages, table[row], q.dtype) for pages in (k_pages, v_pages))
        token = offsets[row] + first
        position = start_pos[row] + first + jnp.arange(size, dtype=jnp.int32)
        mine = jax.lax.dynamic_slice_in_dim(padded, token, size)
        length = start_pos[row] + num_tokens[row]
        out = _attend(mine, k, v, position, length, sliding_window, soft_cap, sinks, scale) * v_scale
        used = (index < ends[-1]) & (position < length)
        return out.astype(q.dtype), jnp.where(used, token + jnp.arange(size, dtype=jnp.int32), tokens)

    out, where = jax.lax.map(block, jnp.arange(num_blocks, dtype=jnp.int32))
    return jnp.zeros_like(q).at[where.reshape(-1)].set(out.reshape(-1, *q.shape[1:]), mode="drop")


def _reference(
    q, k_pages, v_pages, table, offsets, num_tokens, start_pos, scale, v_scale, *, sliding_window, soft_cap, sinks
):
    """Float32 throughout, one token at a time."""
    row, position, there = _rows_of_tokens(offsets, num_tokens, start_pos, q.shape[0])

    def token(arguments):
        mine, row, position, there = arguments
        k, v = (_pages_of(pages, table[row], jnp.float32) for pages in (k_pages, v_pages))
        out = _attend(
            mine[None].astype(jnp.float32), k, v, position[None], position + 1, sliding_window, soft_cap, sinks, scale
        )
        return jnp.where(there, out[0] * v_scale, 0).astype(q.dtype)

    return jax.lax.map(token, (q, row, position, there))
