"""Small random models of awkward sizes, and what they should say."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jmoe.config import ModelConfig
from jmoe.device_params import ArraySource
from jmoe.models.model import Model, reference_forward

# 6 experts (no multiple of 4 nodes), top-3, 9 query heads over 3 KV heads, head_dim not hidden / heads, odd vocabulary.
AWKWARD = ModelConfig(
    family="qwen3_moe", vocab_size=131, hidden_size=48, num_layers=3, num_heads=9, num_kv_heads=3, head_dim=16,
    num_experts=6, num_experts_per_tok=3, expert_ffn_size=40, dense_layers=(1,), dense_ffn_size=66, qk_norm=True,
    dtype="float32",
)  # fmt: skip
# Sizes that tensor parallelism 2 divides on either side; KV heads are replicated at 4.
EVEN = dataclasses.replace(AWKWARD, num_heads=8, num_kv_heads=2, dense_ffn_size=64, sliding_window=7)


@functools.cache
def random_model(config: ModelConfig = AWKWARD, seed: int = 0) -> Model:
    """Random weights, with experts loud enough that a wrong route changes the tokens."""
    model = Model(config, nnx.Rngs(seed))
    for layer in model.experts.layers:
        loud = layer.down_scales if config.expert_dtype == "fp8" else layer.down_proj
        loud[...] = loud[...] * 4
    return model


def source_of(model: Model) -> ArraySource:
    return ArraySource(*model.arrays_by_path())


def random_prompts(config: ModelConfig, lengths=(5, 19, 11, 8, 3, 26, 14), seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, config.vocab_size, size=n).tolist() for n in lengths]


@functools.cache
def _padded_forward(config: ModelConfig, seed: int):
    model = random_model(config, seed)
    return jax.jit(lambda tokens: reference_forward(model, tokens)[0])


def reference_logits(config: ModelConfig, tokens: list[int], seed: int = 0, width: int = 64) -> np.ndarray:
    """`[len(tokens), vocab]` float32; padding behind the tokens changes nothing, attention being causal."""
    padded = np.zeros((1, width), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(_padded_forward(config, seed)(jnp.asarray(padded)))[0, : len(tokens)]


@functools.cache
def _greedy(config: ModelConfig, prompt: tuple[int, ...], max_tokens: int, seed: int) -> tuple[int, ...]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        tokens.append(int(reference_logits(config, tokens, seed)[-1].argmax()))
    return tuple(tokens[len(prompt) :])


def reference_tokens(config: ModelConfig, prompts, max_tokens: int, seed: int = 0) -> list[list[int]]:
    """Greedy tokens of the single-device reference."""
    return [list(_greedy(config, tuple(p), max_tokens, seed)) for p in prompts]
