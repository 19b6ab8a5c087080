"""Peers of the prefill attention benchmark, on dense keys and values of the same lengths: cuDNN and torch."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from device_profile import calls_of, profile
from expert_ffn_peers import graph_seconds, torch_or_none
from prefill_attention_cases import G, H, Q


@dataclasses.dataclass(frozen=True)
class Measured:
    """A peer's time and its result `[Q, H]` for the last query."""

    name: str
    seconds: float
    last: np.ndarray


@dataclasses.dataclass(frozen=True)
class Dense:
    """Two inputs of a case, q `[1, new, Q, H]` and k and v `[1, before + new, G, H]`, and cuDNN compiled for them."""

    inputs: list[tuple[jax.Array, jax.Array, jax.Array]]
    cudnn: Any  # a program of four calls, or why there is none


def prepared(before: int, new: int) -> Dense:
    """JAX's cuDNN knows a causal mask that begins at position 0 only, so it is given none."""
    inputs = [dense(before, new, seed) for seed in range(2)]
    try:
        attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
        return Dense(inputs, calls_of(jax.jit(attend), inputs, 4))
    except Exception as error:
        return Dense(inputs, str(error).splitlines()[0][:100])


def dense(before: int, new: int, seed: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q [1, new, Q, H], k and v [1, before + new, G, H]."""
    keys = [jax.random.key(100 + 3 * seed + i, impl="rbg") for i in range(3)]
    q = jax.random.normal(keys[0], (1, new, Q, H), jnp.bfloat16)
    k, v = (jax.random.normal(key, (1, before + new, G, H), jnp.bfloat16) for key in keys[1:])
    return q, k, v


def last_truth(q: jax.Array, k: jax.Array, v: jax.Array) -> np.ndarray:
    """The last query sees everything, with a mask and without: [Q, H] in float64."""
    mine = np.asarray(q[0, -1].astype(jnp.float32), np.float64).reshape(G, Q // G, H)
    keys, values = (np.asarray(a[0].astype(jnp.float32), np.float64) for a in (k, v))
    scores = np.einsum("gqh,sgh->gqs", mine, keys) / np.sqrt(H)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("gqs,sgh->gqh", weights / weights.sum(-1, keepdims=True), values).reshape(Q, H)


def measure(dense: Dense, around: Any) -> Iterator[Measured | tuple[str, str]]:
    """Each peer's time, or (name, why there is none); and the truth of the last query first."""
    yield Measured("truth", 0.0, last_truth(*dense.inputs[0]))
    if isinstance(dense.cudnn, str):
        yield "jax cuDNN, no mask", dense.cudnn
    else:
        found = profile(dense.cudnn, 4, repeats=3, around=around)
        yield Measured("jax cuDNN, no mask", found.seconds, np.asarray(found.outputs[0][0, -1].astype(jnp.float32)))
    torch = torch_or_none()
    if torch is None:
        yield "torch SDPA", "no torch with CUDA"
        return
    tensors = [[torch.from_dlpack(a).transpose(1, 2) for a in one] for one in dense.inputs]  # [1, heads, tokens, H]
    yield from _torch(torch, tensors, around)


def _torch(torch: Any, tensors: list[Any], around: Any) -> Iterator[Measured | tuple[str, str]]:
    from torch.nn.attention import SDPBackend, sdpa_kernel  # pyright: ignore[reportMissingImports]
    from torch.nn.attention.bias import causal_lower_right  # pyright: ignore[reportMissingImports]

    attention = torch.nn.functional.scaled_dot_product_attention
    wide = [(q, *(a.repeat_interleave(Q // G, dim=1) for a in (k, v))) for q, k, v in tensors]
    mask = causal_lower_right(tensors[0][0].shape[2], tensors[0][1].shape[2])
    forms = (
        ("torch flash, causal", SDPBackend.FLASH_ATTENTION, wide, {"attn_mask": mask}),
        ("torch cuDNN, no mask", SDPBackend.CUDNN_ATTENTION, tensors, {"enable_gqa": True}),
    )
    for name, backend, operands, options in forms:
        try:
            with sdpa_kernel(backend):
                thunks = [lambda one=one, options=options: attention(*one, **options) for one in operands]
                seconds = graph_seconds(torch, thunks, around, repeats=3)
                yield Measured(name, seconds, thunks[0]()[0, :, -1].float().cpu().numpy())
        except Exception as error:
            yield name, str(error).splitlines()[0][:100]
