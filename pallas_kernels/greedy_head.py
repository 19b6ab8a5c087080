"""The head of a greedy decode step: the product with the vocabulary and its argmax, without the logits in memory."""

from typing import Literal

import jax
import jax.numpy as jnp

from jmoe.pallas_kernels.choice import run_form

Implementation = Literal["xla", "pallas"]
MAX_ROWS = 128  # accumulators of 384 columns fill the registers
UNIT = 64  # of terms and of columns: what one wgmma and one swizzled row of TMA take


def greedy_head(
    rows: jax.Array, weights: jax.Array, *, by_token: bool = False, implementation: Implementation | None = None
) -> jax.Array:
    """argmax_v sum_d rows[t, d] weights[d, v], the logits in float32.

    Ties go to the lowest v, and a NaN counts as larger than everything: the first one is found, as by `jnp.argmax`.

    Args:
      rows: `[tokens, D]`.
      weights: `[D, V]`, or `[V, D]` where `by_token` says so, as a table of embeddings stands.
      by_token: see weights.
      implementation: "xla", "pallas" (Mosaic GPU: each SM keeps the largest of its columns; bfloat16, up to MAX_ROWS
        tokens, D and V multiples of UNIT), None for "pallas" on Hopper and "xla" elsewhere.

    Returns:
      token_ids `[tokens]` int32.

    Raises:
      ValueError: shapes that don't belong together, or an implementation that is unknown or can't run.
    """
    if rows.ndim != 2 or weights.ndim != 2 or weights.shape[by_token] != rows.shape[1]:
        kind = "[V, D]" if by_token else "[D, V]"
        raise ValueError(
            f"greedy_head: expected rows [tokens, D] and weights {kind}, got {rows.shape} and {weights.shape}"
        )

    def xla(rows, weights):
        return _xla(rows, weights, by_token)

    def pallas(rows, weights):
        from jmoe.pallas_kernels.greedy_head_mosaic import greedy_head_pallas

        return greedy_head_pallas(rows, weights, by_token)

    return run_form("greedy_head", implementation, _why_not(rows, weights, by_token), pallas, xla, rows, weights)


def _why_not(rows: jax.Array, weights: jax.Array, by_token: bool) -> str:
    """What the Mosaic form can't do; empty if it can."""
    if rows.dtype != jnp.bfloat16 or weights.dtype != jnp.bfloat16:
        return f"bfloat16, got {rows.dtype} and {weights.dtype}"
    if not 1 <= len(rows) <= MAX_ROWS:
        return f"1 to {MAX_ROWS} rows, got {len(rows)}"
    vocab, num_in = weights.shape if by_token else weights.shape[::-1]
    if num_in % UNIT or vocab % UNIT or vocab < 2 * UNIT or not num_in:
        return f"D and V multiples of {UNIT}, V of two at least, got {num_in} and {vocab}"
    return ""


def _xla(rows: jax.Array, weights: jax.Array, by_token: bool) -> jax.Array:
    terms = "rd,vd->rv" if by_token else "rd,dv->rv"
    logits = jnp.einsum(terms, rows, weights, preferred_element_type=jnp.float32)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
