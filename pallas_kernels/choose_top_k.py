"""The router's choice: softmax over the experts and the k largest, in one kernel on Hopper."""

from typing import Literal

import jax
import jax.numpy as jnp

from jmoe.pallas_kernels.choice import by_platform

Implementation = Literal["xla", "pallas"]
MAX_EXPERTS = 1024  # the Mosaic form holds a row in the registers of a warp
MAX_K = 32


def choose_top_k(
    logits: jax.Array, k: int, renormalize: bool, *, implementation: Implementation | None = None
) -> tuple[jax.Array, jax.Array]:
    """The k largest of softmax(logits), divided by their sum where `renormalize` says so.

    Args:
      logits: `[tokens, E]`, of any float.
      k: choices a token.
      renormalize: whether the k weights add up to one.
      implementation: "xla", "pallas" (Mosaic GPU: a warp a token), None for "pallas" on Hopper and "xla" elsewhere.

    Returns:
      topk_idx `[tokens, k]` int32 and topk_weights `[tokens, k]` float32, largest first, ties to the lower expert.

    Raises:
      ValueError: k that is no number of experts, or an implementation that is unknown or can't run.
    """
    if logits.ndim != 2 or not 1 <= k <= logits.shape[1]:
        raise ValueError(f"choose_top_k: expected logits [tokens, E] and k in 1..E, got {logits.shape} and {k}")
    fits = logits.shape[1] <= MAX_EXPERTS and k <= MAX_K and len(logits) > 0
    forms = {
        "xla": lambda logits: _xla(logits, k, renormalize),
        "pallas": lambda logits: _pallas(logits, k, renormalize),
    }
    if implementation is None:
        return by_platform("choose_top_k", forms["pallas"], forms["xla"], logits) if fits else forms["xla"](logits)
    if implementation not in forms:
        raise ValueError(f"choose_top_k: expected implementation 'xla', 'pallas' or None, got {implementation!r}")
    if implementation == "pallas" and not fits:
        raise ValueError(
            f"choose_top_k: 'pallas' expected 1..{MAX_EXPERTS} experts, k <= {MAX_K} and a token, got {logits.shape} "
            f"and {k}"
        )
    return forms[implementation](logits)


def _xla(logits: jax.Array, k: int, renormalize: bool) -> tuple[jax.Array, jax.Array]:
    probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    topk_weights, topk_idx = jax.lax.top_k(probs, k)
    if renormalize:
        topk_weights = topk_weights / topk_weights.sum(axis=-1, keepdims=True)
    return topk_idx.astype(jnp.int32), topk_weights


def _pallas(logits: jax.Array, k: int, renormalize: bool) -> tuple[jax.Array, jax.Array]:
    """The kernel; gradients are the XLA form's."""

    from jmoe.pallas_kernels.choose_top_k_mosaic import choose_rows

    @jax.custom_vjp
    def run(logits):
        return choose_rows(logits, k, renormalize)

    def forward(logits):
        return run(logits), logits

    def backward(logits, cotangents):
        _, pull = jax.vjp(lambda logits: _xla(logits, k, renormalize)[1], logits)
        return pull(cotangents[1])

    run.defvjp(forward, backward)
    return run(logits)
