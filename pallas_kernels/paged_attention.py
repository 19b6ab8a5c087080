"""Attention over a paged KV cache: write a call's keys and values, then attend, for decode and prefill chunks alike.

One shape serves both phases: `rows` sequences with up to `chunk` new tokens each (decode: chunk = 1; prefill: one row).
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from jmoe.pallas_kernels.choice import by_platform, num_sms

Implementation = Literal["xla", "pallas", "reference"]
MASKED = -1e30  # finite, so that a row with nothing to attend to yields numbers, not NaN


def cells_of(
    pages_shape: tuple[int, ...], page_table: jax.Array, start_pos: jax.Array, num_tokens: jax.Array, chunk: int
) -> jax.Array:
    """Where new tokens stand in a pool seen as `[P * page_len, G, H]`: `[rows, chunk]` int32, in page 0 beyond
    `num_tokens`. Arguments as in `write_pages`."""
    page_len = pages_shape[1]
    offset = jnp.arange(chunk, dtype=jnp.int32)
    position = start_pos[:, None] + offset
    column = jnp.minimum(position // page_len, page_table.shape[1] - 1)
    page = jnp.take_along_axis(page_table, column, axis=1, mode="promise_in_bounds")
    page = jnp.where(offset < num_tokens[:, None], page, 0)
    return page * page_len + position % page_len


def write_pages(
    pages: jax.Array,
    new: jax.Array,
    page_table: jax.Array,
    start_pos: jax.Array,
    num_tokens: jax.Array,
    scale: jax.Array | float = 1.0,
) -> jax.Array:
    """Writes new keys (or values) into their pages; tokens beyond `num_tokens` go to page 0, which nothing reads.

    Args:
      pages: `[P, page_len, G, H]`; float8_e4m3fn pages hold new / scale, clipped to what the type holds.
      new: `[rows, chunk, G, H]`, the tokens at positions start_pos .. start_pos + num_tokens - 1.
      page_table: `[rows, max_pages]` int32, page of each page_len positions.
      start_pos, num_tokens: `[rows]` int32.
      scale: float32 scalar, what one unit of a float8_e4m3fn page stands for; other pages hold `new` itself.

    Returns:
      The pages, updated.
    """
    num_pages, page_len = pages.shape[:2]
    flat = cells_of(pages.shape, page_table, start_pos, num_tokens, new.shape[1]).reshape(-1)
    cells = pages.reshape(num_pages * page_len, *pages.shape[2:])
    new = new.reshape(-1, *new.shape[2:])
    if pages.dtype == jnp.float8_e4m3fn:  # beyond its 448 the conversion gives NaN
        largest = float(jnp.finfo(pages.dtype).max)
        new = jnp.clip(new.astype(jnp.float32) / scale, -largest, largest)
    new = new.astype(pages.dtype)
    cells = cells.at[flat].set(new, mode="promise_in_bounds", wrap_negative_indices=False)
    return cells.reshape(pages.shape)


def paged_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    start_pos: jax.Array,
    num_tokens: jax.Array | None = None,
    *,
    sliding_window: int | None = None,
    logit_soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    k_scale: jax.Array | float = 1.0,
    v_scale: jax.Array | float = 1.0,
    implementation: Implementation | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v over the pages of each row's sequence, causal, grouped-query.

    The token at position p sees positions 0..p (the last `sliding_window` of them, itself included). The pages must
    already hold the new tokens (`write_pages`). Scores and the softmax are float32. With a soft cap c a score s counts
    as c tanh(s / c); with sinks a head's weights are exp(s) / (exp(sink) + sum exp(s)).

    Args:
      q: `[rows, chunk, Q, H]`; row r's token c stands at position start_pos[r] + c.
      k_pages, v_pages: `[P, page_len, G, H]`, Q a multiple of G; q's dtype or float8_e4m3fn.
      page_table: `[rows, max_pages]` int32.
      start_pos: `[rows]` int32.
      num_tokens: `[rows]` int32, valid new tokens; None for all of the chunk. What stands behind them in the pages is
        another request's and is not even multiplied by zero: its NaN would come through.
      sliding_window: positions a token may see, or None for all.
      logit_soft_cap: bound of a score, or None.
      sinks: `[Q]` float32, one more logit a head in the softmax's denominator, or None. Not capped.
      k_scale, v_scale: float32 scalars, what one unit of a page stands for.
      implementation: "pallas" (Mosaic GPU, Hopper: `paged_decode_mosaic` where chunk is 1, `paged_prefill_mosaic` above
        that), "xla" (gathers each row's pages), "reference" (float32, one softmax a head), None for the best.

    Returns:
      `[rows, chunk, Q, H]` in q's dtype; rows that hold no token come out finite and meaningless.

    Raises:
      ValueError: shapes that don't belong together, an unknown implementation, or what "pallas" can't compute.
    """
    _check(q, k_pages, v_pages, sinks)
    if implementation not in (None, "xla", "pallas", "reference"):
        raise ValueError(
            f"paged_attention: expected implementation 'xla', 'pallas', 'reference' or None, got {implementation!r}"
        )
    arrays = (q, k_pages, v_pages, page_table, start_pos, num_tokens, sinks, k_scale, v_scale)
    options = {"sliding_window": sliding_window, "soft_cap": logit_soft_cap}
    xla, pallas, reference = (functools.partial(form, **options) for form in (_xla, _pallas, _reference))
    if implementation == "reference":
        return reference(*arrays)
    reason = _pallas_refuses(q, k_pages, sliding_window)
    if implementation == "pallas":
        if reason:
            raise ValueError(f"paged_attention: 'pallas' {reason}")
        return pallas(*arrays)
    if implementation == "xla" or reason:
        return xla(*arrays)
    return by_platform("paged_attention", pallas, xla, *arrays)


def _check(q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, sinks: jax.Array | None) -> None:
    if q.shape[2] % k_pages.shape[2] or q.shape[3] != k_pages.shape[3] or k_pages.shape != v_pages.shape:
        raise ValueError(
            f"paged_attention: expected q [rows, chunk, Q, H] and pages [P, page_len, G, H] with G dividing Q, "
            f"got {q.shape}, {k_pages.shape} and {v_pages.shape}"
        )
    if sinks is not None and sinks.shape != q.shape[2:3]:
        raise ValueError(f"paged_attention: expected sinks [Q] = {q.shape[2:3]}, got {sinks.shape}")


def _pallas_refuses(q: jax.Array, k_pages: jax.Array, sliding_window: int | None) -> str:
    """Why the Mosaic kernels can't compute this, or nothing."""
    if isinstance(sliding_window, jax.Array):
        return "expected sliding_window to be known when it is traced"
    if q.shape[1] > 1:
        from jmoe.pallas_kernels.ragged_paged_attention import pallas_refuses

        return pallas_refuses(q.reshape(-1, *q.shape[2:]), k_pages)
    page_len, num_kv_heads, head_dim = k_pages.shape[1:]
    if q.dtype != jnp.bfloat16 or k_pages.dtype not in (jnp.bfloat16, jnp.float8_e4m3fn):
        return f"expected bfloat16 queries, pages of that or float8_e4m3fn, got {q.dtype} and {k_pages.dtype}"
    if head_dim not in (64, 128, 256) or page_len % 16:
        return f"expected head_dim 64, 128 or 256, page_len a multiple of 16, got {head_dim} and {page_len}"
    group = q.shape[2] // num_kv_heads
    if group > 16:
        return f"expected at most 16 query heads a KV head, got {group}"
    return ""


def _pallas(q, *arrays, sliding_window, soft_cap):
    form = _pallas_decode if q.shape[1] == 1 else _pallas_prefill
    return form(q, *arrays, sliding_window=sliding_window, logit_soft_cap=soft_cap)


def _pallas_decode(q, *arrays, interpret=False, **options):
    from jmoe.pallas_kernels.paged_decode_mosaic import paged_decode

    return paged_decode(q[:, 0], *arrays, num_sms=num_sms(), interpret=interpret, **options)[:, None]


def _pallas_prefill(q, k_pages, v_pages, page_table, start_pos, num_tokens, sinks, k_scale, v_scale, **options):
    """Rows of the ragged form that are all as long as the chunk, some of it unused."""
    from jmoe.pallas_kernels.ragged_paged_attention import ragged_paged_attention

    rows, chunk = q.shape[:2]
    offsets = jnp.arange(rows, dtype=jnp.int32) * chunk
    num_tokens = jnp.full((rows,), chunk, jnp.int32) if num_tokens is None else num_tokens
    place = (page_table, offsets, num_tokens, start_pos)
    options = {**options, "sinks": sinks, "k_scale": k_scale, "v_scale": v_scale}
    flat = q.reshape(rows * chunk, *q.shape[2:])
    out = ragged_paged_attention(flat, k_pages, v_pages, *place, **options, implementation="pallas")
    return out.reshape(q.shape)


def _xla(q, k_pages, v_pages, page_table, start_pos, num_tokens, sinks, k_scale, v_scale, *, sliding_window, soft_cap):
    """Gathers every row's pages; the products in q's dtype, which holds a float8 exactly."""
    rows, chunk, num_heads, head_dim = q.shape
    scale = head_dim**-0.5 * k_scale
    num_kv_heads = k_pages.shape[2]
    k, v = (_rows_of(pages, page_table).astype(q.dtype) for pages in (k_pages, v_pages))  # [rows, S, G, H]
    v = _written(v, start_pos + (chunk if num_tokens is None else num_tokens))
    grouped = q.reshape(rows, chunk, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = jnp.einsum("rcgqh,rsgh->rgqcs", grouped, k, preferred_element_type=jnp.float32) * scale
    visible = _visible(start_pos, chunk, k.shape[1], sliding_window)[:, None, None]
    scores = jnp.where(visible, _capped(scores, soft_cap), MASKED)
    largest = scores.max(-1, keepdims=True)
    if sinks is not None:
        sinks = sinks.reshape(1, num_kv_heads, -1, 1, 1)
        largest = jnp.maximum(largest, sinks)
    weights = jnp.exp(scores - largest)
    total = weights.sum(-1, keepdims=True)
    total = total if sinks is None else total + jnp.exp(sinks - largest)
    probs = (weights / total).astype(v.dtype)
    out = jnp.einsum("rgqcs,rsgh->rcgqh", probs, v, preferred_element_type=jnp.float32) * v_scale
    return out.reshape(q.shape).astype(q.dtype)


def _capped(scores: jax.Array, soft_cap: float | None) -> jax.Array:
    return scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)


def _rows_of(pages: jax.Array, page_table: jax.Array) -> jax.Array:
    """[P, page_len, G, H] -> [rows, max_pages * page_len, G, H]."""
    gathered = pages.at[page_table].get(mode="promise_in_bounds", wrap_negative_indices=False)
    return gathered.reshape(page_table.shape[0], -1, *pages.shape[2:])


def _written(values: jax.Array, length: jax.Array) -> jax.Array:
    """Zeros behind each row's own tokens."""
    own = jnp.arange(values.shape[1], dtype=jnp.int32) < length[:, None]
    return jnp.where(own[:, :, None, None], values, 0)


def _visible(start_pos: jax.Array, chunk: int, length: int, sliding_window: int | None) -> jax.Array:
    """[rows, chunk, length] bool: which cached positions each new token sees."""
    query = (start_pos[:, None] + jnp.arange(chunk, dtype=jnp.int32))[:, :, None]
    key = jnp.arange(length, dtype=jnp.int32)
    visible = key <= query
    return visible if sliding_window is None else visible & (key > query - sliding_window)


def _reference(
    q, k_pages, v_pages, page_table, start_pos, num_tokens, sinks, k_scale, v_scale, *, sliding_window, soft_cap
):
    """Float32 throughout, one query head at a time."""
    group = q.shape[2] // k_pages.shape[2]
    scale = q.shape[3] ** -0.5 * k_scale
    k, v = (_rows_of(p, page_table).astype(jnp.float32) for p in (k_pages, v_pages))
    v = _written(v, start_pos + (q.shape[1] if num_tokens is None else num_tokens)) * v_scale
    visible = _visible(start_pos, q.shape[1], k.shape[1], sliding_window)
    heads = []
    for head in range(q.shape[2]):
        keys, values = k[:, :, head // group], v[:, :, head // group]
        scores = _capped(q[:, :, head].astype(jnp.float32) @ keys.swapaxes(1, 2) * scale, soft_cap)
        sink = jnp.full((*scores.shape[:2], 1), MASKED if sinks is None else sinks[head])
        weights = jax.nn.softmax(jnp.concatenate([jnp.where(visible, scores, MASKED), sink], axis=-1), axis=-1)
        heads.append(weights[..., :-1] @ values)
    return jnp.stack(heads, axis=2).astype(q.dtype)
