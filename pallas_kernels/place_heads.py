"""From a decode step's projections to what attention reads: QK-norm, rotary, the new key and value in their pages."""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from jmoe.pallas_kernels.choice import run_form
from jmoe.pallas_kernels.paged_attention import write_pages

Implementation = Literal["xla", "pallas"]


def place_heads(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_scale: jax.Array | None,
    k_scale: jax.Array | None,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    start_pos: jax.Array,
    num_tokens: jax.Array,
    *,
    theta: float,
    eps: float,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q, k <- rotary(rms(q) q_scale), rotary(rms(k) k_scale); then k and v into their pages.

    Statistics and rotation are float32; what leaves the norm is rounded to the input's dtype before it is scaled, and
    again after, as `jmoe.models.norms` does. The rotation is that of two halves: (a, b) -> (a cos - b sin,
    b cos + a sin), angle = position * theta^(-2i/H).

    Args:
      q: `[rows, chunk, Q, H]`; k, v: `[rows, chunk, G, H]`; row r's token c stands at start_pos[r] + c.
      q_scale, k_scale: `[H]` of the norms over each head, or None for no norm.
      k_pages, v_pages: `[P, page_len, G, H]`.
      page_table, start_pos, num_tokens: as in `write_pages`.
      theta: base of the rotary angles. eps: of the norms.
      implementation: "xla", "pallas" (Mosaic GPU: one kernel that writes the pages in place; chunk 1, pages of q's
        dtype), None for "pallas" on Hopper where it can run and "xla" elsewhere.

    Returns:
      q as attention takes it, k_pages, v_pages.

    Raises:
      ValueError: shapes that don't belong together, or an implementation that is unknown or can't run.
    """
    if k.shape != v.shape or q.shape[:2] != k.shape[:2] or k_pages.shape[2:] != k.shape[2:]:
        raise ValueError(
            f"place_heads: expected q [rows, chunk, Q, H], k and v [rows, chunk, G, H] and pages [P, page_len, G, H], "
            f"got {q.shape}, {k.shape}, {v.shape} and {k_pages.shape}"
        )
    arrays = (q, k, v, q_scale, k_scale, k_pages, v_pages, page_table, start_pos, num_tokens)

    def xla(*arrays):
        return _xla(*arrays, theta=theta, eps=eps)

    def pallas(*arrays):
        from jmoe.pallas_kernels.place_heads_mosaic import place_heads_pallas

        return place_heads_pallas(*arrays, theta=theta, eps=eps)

    return run_form("place_heads", implementation, _why_not(q, k, k_pages), pallas, xla, *arrays)


def place_partial_heads(
    partials: jax.Array,
    num_heads: int,
    q_scale: jax.Array | None,
    k_scale: jax.Array | None,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    start_pos: jax.Array,
    num_tokens: jax.Array,
    *,
    theta: float,
    eps: float,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`place_heads` of one new token a row, from partial sums of its projections; they are rounded once added up.

    Args:
      partials: `[parts, rows, (Q + 2 G) H]` float32, queries, then keys, then values: of `thin_partials`.
      num_heads: Q.
      the others: as in `place_heads`.

    Returns:
      q `[rows, 1, Q, H]`, k_pages, v_pages.
    """
    kv_heads, head_dim = k_pages.shape[2:]
    if partials.ndim != 3 or partials.shape[2] != (num_heads + 2 * kv_heads) * head_dim:
        raise ValueError(
            f"place_partial_heads: expected partials [parts, rows, (Q + 2 G) H] for {num_heads} queries, {kv_heads} "
            f"keys and head size {head_dim}, got {partials.shape}"
        )
    shape = (partials.shape[1], 1, num_heads, head_dim)
    arrays = (partials, q_scale, k_scale, k_pages, v_pages, page_table, start_pos, num_tokens)

    def xla(partials, *rest):
        heads = partials.sum(axis=0).astype(k_pages.dtype).reshape(shape[0], 1, -1, head_dim)
        q, k, v = jnp.split(heads, (num_heads, num_heads + kv_heads), axis=2)
        return _xla(q, k, v, *rest, theta=theta, eps=eps)

    def pallas(*arrays):
        from jmoe.pallas_kernels.place_heads_mosaic import place_partials_pallas

        return place_partials_pallas(*arrays, q_shape=shape, theta=theta, eps=eps)

    q = jax.ShapeDtypeStruct(shape, k_pages.dtype)
    return run_form("place_partial_heads", implementation, _why_not(q, q, k_pages), pallas, xla, *arrays)


def _why_not(q: Any, k: Any, k_pages: jax.Array) -> str:
    """What the kernel can't do; empty if it can."""
    if q.shape[1] != 1:
        return f"one new token a row, got {q.shape[1]}"
    if not q.dtype == k.dtype == k_pages.dtype or q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"heads and pages of bfloat16 or float32 alike, got {q.dtype}, {k.dtype} and {k_pages.dtype}"
    return "" if q.shape[3] % 64 == 0 else f"a head size that is a multiple of 64, got {q.shape[3]}"


def angles(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """cos and sin of the rotary angles: `[...]` int32 -> `[..., H/2]` float32 each."""
    half = head_dim // 2
    angle = positions[..., None].astype(jnp.float32) * theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    return jnp.cos(angle), jnp.sin(angle)


def _xla(q, k, v, q_scale, k_scale, k_pages, v_pages, page_table, start_pos, num_tokens, *, theta, eps):
    positions = start_pos[:, None] + jnp.arange(q.shape[1], dtype=jnp.int32)
    cos, sin = (a[:, :, None] for a in angles(positions, q.shape[3], theta))
    q, k = (_rotate(_scaled(x, scale, eps), cos, sin) for x, scale in ((q, q_scale), (k, k_scale)))
    place = (page_table, start_pos, num_tokens)
    return q, write_pages(k_pages, k, *place), write_pages(v_pages, v, *place)


def _scaled(x: jax.Array, scale: jax.Array | None, eps: float) -> jax.Array:
    if scale is None:
        return x
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return wide.astype(x.dtype) * scale


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
