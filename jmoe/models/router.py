"""The router: which experts a token goes to, and with what weight."""

import jax

from jmoe.pallas_kernels.choose_top_k import choose_top_k


def choose_experts(
    logits: jax.Array, num_experts_per_tok: int, renormalize: bool, num_tokens: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Top-k of softmax(logits), the k weights divided by their sum where `renormalize` says so.

    Args:
      logits: `[tokens, E]`.
      num_tokens: `[tokens]` int32; where it is 0 no token stands, and its topk_idx are -1.

    Returns:
      topk_idx `[tokens, k]` int32 and topk_weights `[tokens, k]` float32, largest first, ties to the lower expert.
    """
    return choose_top_k(logits, num_experts_per_tok, renormalize, num_tokens=num_tokens)
