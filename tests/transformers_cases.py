"""Small random models of the three families, in transformers: the sizes that goldens and live comparisons use."""

import dataclasses
from typing import Any

import torch
import transformers

PROMPT_LEN = 13
NUM_STEPS = 64

_SHARED = {"vocab_size": 131, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_HEADS = {"hidden_size": 48, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 16}
_ROPE = {"rope_theta": 10000.0, "rope_type": "default"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One model: 6 experts, top-3 (but one), 9 query heads over 3 KV heads (or 8 over 2 and 4), vocabulary of 131."""

    name: str
    model: type
    config: type
    fields: dict[str, Any]
    seed: int = 0
    max_shard_size: str = "1GB"


CASES = (
    Case(  # sliding window shorter than the prompt; sharded files
        "mixtral_window",
        transformers.MixtralForCausalLM,
        transformers.MixtralConfig,
        _SHARED
        | _HEADS
        | {"intermediate_size": 20, "num_hidden_layers": 3, "num_local_experts": 6, "num_experts_per_tok": 3}
        | {"sliding_window": 8, "rope_parameters": _ROPE},
        max_shard_size="100KB",
    ),
    Case(  # tied embeddings, 8 heads over 2 so that two tensor ranks divide them
        "mixtral_tied",
        transformers.MixtralForCausalLM,
        transformers.MixtralConfig,
        _SHARED
        | {"hidden_size": 48, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16}
        | {"intermediate_size": 20, "num_hidden_layers": 3, "num_local_experts": 6, "num_experts_per_tok": 2}
        | {"tie_word_embeddings": True, "rope_parameters": _ROPE},
    ),
    Case(  # a dense layer by name, renormalised weights
        "qwen3_moe_mlp_only",
        transformers.Qwen3MoeForCausalLM,
        transformers.Qwen3MoeConfig,
        _SHARED
        | _HEADS
        | {"intermediate_size": 36, "moe_intermediate_size": 20, "num_hidden_layers": 3, "num_experts": 6}
        | {"num_experts_per_tok": 3, "mlp_only_layers": [1], "norm_topk_prob": True, "rope_parameters": _ROPE},
    ),
    Case(  # every other layer dense, weights as they come, biases
        "qwen3_moe_sparse_step",
        transformers.Qwen3MoeForCausalLM,
        transformers.Qwen3MoeConfig,
        _SHARED
        | _HEADS
        | {"intermediate_size": 36, "moe_intermediate_size": 20, "num_hidden_layers": 4, "num_experts": 6}
        | {"num_experts_per_tok": 3, "decoder_sparse_step": 2, "norm_topk_prob": False, "attention_bias": True}
        | {"rope_parameters": _ROPE},
    ),
    Case(  # DBRX fixes head_dim to hidden / heads; the clip is low enough to bite
        "dbrx",
        transformers.DbrxForCausalLM,
        transformers.DbrxConfig,
        _SHARED
        | {"d_model": 64, "n_heads": 8, "n_layers": 3, "max_seq_len": 512, "rope_parameters": _ROPE}
        | {"attn_config": {"kv_n_heads": 4, "clip_qkv": 1.5, "rope_theta": 10000.0}}
        | {"ffn_config": {"ffn_hidden_size": 20, "moe_num_experts": 6, "moe_top_k": 3}},
    ),
)


def build(case: Case) -> torch.nn.Module:
    """The model in float32 with weights large enough that attention, routing and tokens vary; by the case's seed."""
    model = case.model(case.config(**case.fields)).eval().float()
    model.set_attn_implementation("eager")
    generator = torch.Generator().manual_seed(case.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and parameter.ndim == 1:
                parameter.copy_(1 + 0.1 * noise)
            elif "embed" in name or "wte" in name:
                parameter.copy_(0.5 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.2 * noise)
            else:
                parameter.copy_(noise * 1.5 * _fan_in(name, parameter) ** -0.5)
    return model


def _fan_in(name: str, parameter: torch.Tensor) -> int:
    """Inputs of one output: the last axis, but for DBRX's w2, which is stored as [E * F, D]."""
    return 20 if name.endswith("mlp.w2") else parameter.shape[-1]


def prompt_of(case: Case, length: int = PROMPT_LEN) -> torch.Tensor:
    """Random token ids `[1, length]`."""
    return torch.randint(0, 131, (1, length), generator=torch.Generator().manual_seed(case.seed + 1))


@torch.no_grad()
def greedy(model: torch.nn.Module, prompt: torch.Tensor, num_steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy decoding with the cache.

    Returns:
      Logits `[prompt + num_steps - 1, vocab]` of every position, and the tokens `[num_steps]` chosen after the prompt.
    """
    out = model(prompt, use_cache=True)
    logits, tokens = [out.logits[0]], [out.logits[0, -1].argmax()]
    for _ in range(num_steps - 1):
        out = model(tokens[-1].reshape(1, 1), past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits[0])
        tokens.append(out.logits[0, -1].argmax())
    return torch.cat(logits), torch.stack(tokens)
