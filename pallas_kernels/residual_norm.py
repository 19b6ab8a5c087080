"""What stands between two halves of a layer: the residual takes a sum, and its RMSNorm feeds what comes next."""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from jmoe.pallas_kernels.choice import run_form

Implementation = Literal["xla", "pallas"]
VECTOR = 4  # elements that a thread of the Mosaic form takes


def residual_norm(
    x: jax.Array,
    terms: jax.Array,
    scale: jax.Array,
    eps: float,
    *,
    next_weights: Sequence[jax.Array] = (),
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """y = x + sum_p terms[p]; h = y / sqrt(mean(y^2) + eps) * scale, over the last axis.

    The sum is rounded to x's dtype before it is added, y after; what leaves the norm is rounded before it is
    scaled, and again after: as a product, an addition and `jmoe.models.norms` do one by one.

    Args:
      x: `[tokens, D]`.
      terms: `[parts, tokens, D]` float32, of `thin_partials` or one sum.
      scale: `[D]`. eps: of the norm.
      next_weights: what the following kernels read: the Mosaic form asks their first bytes into L2.
      implementation: "xla", "pallas" (Mosaic GPU: a block a token), None for "pallas" on Hopper and "xla" elsewhere.

    Returns:
      y and h, both `[tokens, D]` of x's dtype.

    Raises:
      ValueError: shapes that don't belong together, or an implementation that is unknown or can't run.
    """
    if terms.ndim != 3 or terms.shape[1:] != x.shape or scale.shape != x.shape[1:] or terms.dtype != jnp.float32:
        raise ValueError(
            f"residual_norm: expected x [tokens, D], float32 terms [parts, tokens, D] and scale [D], got {x.shape}, "
            f"{terms.dtype} {terms.shape} and {scale.shape}"
        )
    fits = x.dtype in (jnp.bfloat16, jnp.float32) and scale.dtype == x.dtype and x.shape[1] % VECTOR == 0 and len(x) > 0

    def xla(x, terms, scale, *_):
        return _xla(x, terms, scale, eps)

    def pallas(x, terms, scale, *next_weights):
        from jmoe.pallas_kernels.residual_norm_mosaic import residual_norm_pallas

        return residual_norm_pallas(x, terms, scale, next_weights, eps)

    arrays = (x, terms, scale, *next_weights)
    needs = (
        f"x and scale of bfloat16 or float32 alike and D a multiple of {VECTOR}, "
        f"got {x.dtype} {x.shape} and {scale.dtype}"
    )
    return run_form("residual_norm", implementation, "" if fits else needs, pallas, xla, *arrays)


def _xla(x: jax.Array, terms: jax.Array, scale: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    y = x + terms.sum(axis=0).astype(x.dtype)
    wide = y.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return y, wide.astype(x.dtype) * scale
