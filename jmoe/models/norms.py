"""Normalisation and rotary position embedding: plain functions of arrays."""

import jax
import jax.numpy as jnp


def normalize(x: jax.Array, scale: jax.Array, kind: str, eps: float) -> jax.Array:
    """RMSNorm x / sqrt(mean(x^2) + eps) * scale, or LayerNorm (x - mean) / sqrt(var + eps) * scale, over the last axis.

    Statistics are float32; the result has x's dtype.
    """
    wide = x.astype(jnp.float32)
    if kind == "layer":
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    if kind == "layer":  # torch scales LayerNorm before rounding, Hugging Face's RMSNorm after
        return (wide * scale.astype(jnp.float32)).astype(x.dtype)
    return wide.astype(x.dtype) * scale


def rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotary embedding in the two-halves form: (a, b) -> (a cos - b sin, b cos + a sin), angle = pos * theta^(-2i/H).

    Args:
      x: `[..., heads, H]`; positions: `[...]` int32.

    Source: RoFormer (arXiv 2104.09864), in Hugging Face's layout.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
