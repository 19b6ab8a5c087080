"""The router's choice: softmax over the experts and the k largest, in one kernel on Hopper."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.pallas_kernels.choice import run_form

Implementation = Literal["xla", "pallas"]
MAX_EXPERTS = 1024  # the Mosaic form holds a row in the registers of a warp
MAX_K = 32


def choose_top_k(
    logits: jax.Array,
    k: int,
    renormalize: bool,
    *,
    num_tokens: jax.Array | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The k largest of softmax(logits), divided by their sum where `renormalize` says so.

    Args:
      logits: `[tokens, E]`, of any float; or `[parts, tokens, E]` float32, partial sums (`thin_partials`).
      k: choices a token.
      renormalize: whether the k weights add up to one.
      num_tokens: `[tokens]` int32; where it is 0 nothing stands in the row, and its topk_idx are -1.
      dtype: what partial sums are rounded to once added up.
      implementation: "xla", "pallas" (Mosaic GPU: a warp a token), None for "pallas" on Hopper and "xla" elsewhere.

    Returns:
      topk_idx `[tokens, k]` int32 and topk_weights `[tokens, k]` float32, largest first, ties to the lower expert.

    Raises:
      ValueError: k that is no number of experts, or an implementation that is unknown or can't run.
    """
    if logits.ndim not in (2, 3) or not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"choose_top_k: expected logits [tokens, E] and k in 1..E, got {logits.shape} and {k}")
    tokens, num_experts = logits.shape[-2:]
    if num_tokens is not None and num_tokens.shape != (tokens,):
        raise ValueError(f"choose_top_k: expected num_tokens [{tokens}], got {num_tokens.shape}")
    fits = num_experts <= MAX_EXPERTS and k <= MAX_K and tokens > 0
    arrays = (logits,) if num_tokens is None else (logits, num_tokens)
    needs = f"1..{MAX_EXPERTS} experts, k <= {MAX_K} and a token, got {logits.shape} and {k}"

    def xla(*arrays):
        return _xla(*arrays, k=k, renormalize=renormalize, dtype=dtype)

    def pallas(*arrays):
        return _pallas(*arrays, k=k, renormalize=renormalize, dtype=dtype)

    return run_form("choose_top_k", implementation, "" if fits else needs, pallas, xla, *arrays)


def _xla(logits, num_tokens=None, *, k: int, renormalize: bool, dtype) -> tuple[jax.Array, jax.Array]:
    if logits.ndim == 3:
        logits = logits.sum(axis=0).astype(dtype)
    probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    topk_weights, topk_idx = jax.lax.top_k(probs, k)
    if renormalize:
        topk_weights = topk_weights / topk_weights.sum(axis=-1, keepdims=True)
    topk_idx = topk_idx.astype(jnp.int32)
    return topk_idx if num_tokens is None else jnp.where(num_tokens[:, None] > 0, topk_idx, -1), topk_weights


def _pallas(*arrays, k: int, renormalize: bool, dtype) -> tuple[jax.Array, jax.Array]:
    """The kernel; gradients are the XLA form's."""

    from jmoe.pallas_kernels.choose_top_k_mosaic import choose_rows

    @jax.custom_vjp
    def run(*arrays):
        return choose_rows(*arrays, k=k, renormalize=renormalize, dtype=dtype)

    def forward(*arrays):
        return run(*arrays), arrays

    def backward(arrays, cotangents):
        logits, *rest = arrays
        _, pull = jax.vjp(lambda x: _xla(x, *rest, k=k, renormalize=renormalize, dtype=dtype)[1], logits)
        return (*pull(cotangents[1]), *(np.zeros(a.shape, jax.dtypes.float0) for a in rest))

    run.defvjp(forward, backward)
    return run(*arrays)
