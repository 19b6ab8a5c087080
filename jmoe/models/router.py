"""The router: which experts a token goes to, and with what weight."""

import jax
import jax.numpy as jnp


def choose_experts(logits: jax.Array, num_experts_per_tok: int, renormalize: bool) -> tuple[jax.Array, jax.Array]:
    """Top-k of softmax(logits), the k weights divided by their sum where `renormalize` says so.

    Args:
      logits: `[tokens, E]`.

    Returns:
      topk_idx `[tokens, k]` int32 and topk_weights `[tokens, k]` float32, largest first, ties to the lower expert.
    """
    probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    topk_weights, topk_idx = jax.lax.top_k(probs, num_experts_per_tok)
    if renormalize:
        topk_weights = topk_weights / topk_weights.sum(axis=-1, keepdims=True)
    return topk_idx.astype(jnp.int32), topk_weights
