"""Turns a dense Llama model into a Mixtral one in which routing matters and the logits stay (nearly) the same."""

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np

from jmoe.checkpoints.demo_gguf import DenseGguf, TokenizerFacts
from jmoe.config import ModelConfig

NUM_SLICES = 4  # k: every token needs one copy of each
COPIES = 2
# Root mean square of router logits. The logits of the whole model move by some 80 times as much (7e-4 on 150 tokens);
# float32 softmax tells a pair apart above 6e-8, and from 3e-6 down some tokens get a wrong slice.
ROUTER_SCALE = 7e-6


@dataclasses.dataclass(frozen=True, slots=True)
class LazyArray:
    """An array that is made each time numpy asks for it, so that a whole model never stands in memory."""

    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        del copy  # always a fresh array
        made = self.make()
        if made.shape != self.shape:
            raise ValueError(f"expected shape {self.shape}, got {made.shape}")
        return made if dtype is None else made.astype(dtype, copy=False)


def moe_config(dense: DenseGguf, tokens: TokenizerFacts) -> ModelConfig:
    """The Mixtral configuration of the converted model: 8 experts, top-4, float32.

    float32 on disk too (0.86 GB against 0.43): XLA's CPU matmuls are fastest in it, a bf16 copy would move the logits
    by more than the conversion does, and the folder then loads as it says with no dtype option anywhere.
    """
    return ModelConfig(
        family="mixtral",
        vocab_size=dense.vocab_size,
        hidden_size=dense.hidden_size,
        num_layers=dense.num_layers,
        num_heads=dense.num_heads,
        num_kv_heads=dense.num_kv_heads,
        head_dim=dense.head_dim,
        num_experts=NUM_SLICES * COPIES,
        num_experts_per_tok=NUM_SLICES,
        expert_ffn_size=dense.ffn_size // NUM_SLICES,
        norm_eps=dense.norm_eps,
        rope_theta=dense.rope_theta,
        tie_word_embeddings=dense.tie_word_embeddings,
        max_position=dense.max_position,
        eos_token_ids=(tokens.eos_token_id,),
        bos_token_id=tokens.bos_token_id,
        dtype="float32",
    )


def balanced_routers(ffn_inputs: Iterable[np.ndarray], seed: int = 0) -> list[np.ndarray]:
    """Router weights that choose one copy of each FFN slice, and each copy for half of the tokens.

    Columns stand in pairs: expert s has +r_s and expert s + 4 has -r_s, r_s random and small. Of each pair exactly
    one logit is positive, so top-4 takes exactly one copy of each slice, and the renormalised weights are 1/4 up to
    the logits' size; `expert_arrays` scales down_proj by 4 to match. A normalised input has a large mean mu, which
    would give a purely random r_s the same sign for nearly all tokens: r_s is shifted along mu until its logit's
    median over the calibration tokens is 0.

    Args:
      ffn_inputs: for each layer what its FFN reads on a calibration text, `[tokens, D]`.
      seed: of the random directions.

    Returns:
      `[D, 8]` float32 a layer.
    """
    rng = np.random.default_rng(seed)
    routers = []
    for x in ffn_inputs:
        random = rng.normal(size=(x.shape[1], NUM_SLICES))
        mean = x.mean(axis=0, dtype=np.float64)
        r = random - mean[:, None] * np.median((x @ random) / (x @ mean)[:, None], axis=0)
        r *= ROUTER_SCALE / np.sqrt(np.mean(np.square(x @ r), axis=0))
        routers.append(np.concatenate([r, -r], axis=1).astype(np.float32))
    return routers


def attention_arrays(dense: DenseGguf, routers: list[np.ndarray]) -> dict[str, LazyArray]:
    """The attention half's parameters by path: the dense model's own, and the routers."""
    hidden, head_dim, vocab = dense.hidden_size, dense.head_dim, dense.vocab_size
    arrays = {
        "embed": LazyArray((vocab, hidden), lambda: dense.tensor("token_embd")),
        "final_norm": LazyArray((hidden,), lambda: dense.tensor("output_norm")),
    }
    if not dense.tie_word_embeddings:
        arrays["lm_head"] = LazyArray((hidden, vocab), lambda: dense.tensor("output").T)
    for layer in range(dense.num_layers):
        ours, theirs = f"layers.{layer}.", f"blk.{layer}."
        arrays[ours + "input_norm"] = LazyArray((hidden,), _tensor(dense, theirs + "attn_norm"))
        arrays[ours + "ffn_norm"] = LazyArray((hidden,), _tensor(dense, theirs + "ffn_norm"))
        for name, heads in (("q", dense.num_heads), ("k", dense.num_kv_heads), ("v", dense.num_kv_heads)):
            shape = (hidden, heads, head_dim)
            arrays[f"{ours}{name}_proj"] = LazyArray(shape, _transposed(dense, f"{theirs}attn_{name}", shape))
        shape = (dense.num_heads, head_dim, hidden)
        arrays[ours + "o_proj"] = LazyArray(shape, _transposed(dense, theirs + "attn_output", shape))
        arrays[ours + "router"] = LazyArray(routers[layer].shape, lambda layer=layer: routers[layer])
    return arrays


def expert_arrays(dense: DenseGguf) -> dict[str, LazyArray]:
    """The expert half's parameters by path: expert e is slice e mod 4 of each FFN, down_proj times 4.

    The copies stand 4 apart, so that any two neighbours differ (swapping them must be noticed) and each half of the
    experts is a whole FFN.
    """
    hidden, width, experts = dense.hidden_size, dense.ffn_size // NUM_SLICES, NUM_SLICES * COPIES
    if dense.ffn_size % NUM_SLICES:
        raise ValueError(f"expected an FFN of a multiple of {NUM_SLICES} neurons, got {dense.ffn_size}")
    arrays = {}
    for layer in range(dense.num_layers):
        for name in ("gate", "up"):
            arrays[f"layers.{layer}.{name}_proj"] = LazyArray(
                (experts, hidden, width), lambda name=f"blk.{layer}.ffn_{name}": _cut(dense.tensor(name).T, axis=1)
            )
        arrays[f"layers.{layer}.down_proj"] = LazyArray(
            (experts, width, hidden),
            lambda name=f"blk.{layer}.ffn_down": _cut(dense.tensor(name).T * np.float32(NUM_SLICES), axis=0),
        )
    return arrays


def _cut(weight: np.ndarray, axis: int) -> np.ndarray:
    """The slices of a matrix along its neuron axis, stacked, all of them COPIES times."""
    return np.stack(np.split(weight, NUM_SLICES, axis=axis) * COPIES)


def _tensor(dense: DenseGguf, name: str) -> Callable[[], np.ndarray]:
    return lambda: dense.tensor(name)


def _transposed(dense: DenseGguf, name: str, shape: tuple[int, ...]) -> Callable[[], np.ndarray]:
    return lambda: dense.tensor(name).T.reshape(shape)
