"""hf_config: a ModelConfig as the contents of a Hugging Face `config.json`."""

from typing import Any

from jmoe.config import ModelConfig

ARCHITECTURES = {"mixtral": "MixtralForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM", "dbrx": "DbrxForCausalLM"}


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """`config.json` of a model, such that `ModelConfig.from_hf` gives the same config back.

    The rotary base is written in both spellings (`rope_theta` and `rope_parameters`), so that transformers 4 and 5
    both read it.

    Raises:
      ValueError: an option that the family's Hugging Face form can't express (dense layers in Mixtral, say).
    """
    c = config
    eos = list(c.eos_token_ids) if len(c.eos_token_ids) > 1 else next(iter(c.eos_token_ids), None)
    rope = {"rope_theta": c.rope_theta, "rope_parameters": {"rope_theta": c.rope_theta, "rope_type": "default"}}
    shared = {
        "architectures": [ARCHITECTURES[c.family]],
        "model_type": c.family,
        "vocab_size": c.vocab_size,
        "tie_word_embeddings": c.tie_word_embeddings,
        "bos_token_id": c.bos_token_id,
        "eos_token_id": eos,
        "dtype": c.dtype,
        "torch_dtype": c.dtype,
    }
    if c.expert_dtype == "fp8":
        shared["quantization_config"] = {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": [128, 128],
            # We keep all but the experts in the model's dtype; a reader of ours looks at each tensor.
            "modules_to_not_convert": ["lm_head", "self_attn", "gate"],
        }
    result = shared | (_dbrx(c) if c.family == "dbrx" else _llama_like(c)) | rope
    if (back := ModelConfig.from_hf(result)) != c:
        lost = [name for name in c.__dataclass_fields__ if getattr(back, name) != getattr(c, name)]
        raise ValueError(
            f"hf_config: expected options that {c.family} can express, got "
            + ", ".join(f"{name}={getattr(c, name)!r}" for name in lost)
        )
    return result


def _llama_like(c: ModelConfig) -> dict[str, Any]:
    fields = {
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "num_experts_per_tok": c.num_experts_per_tok,
        "rms_norm_eps": c.norm_eps,
        "max_position_embeddings": c.max_position,
        "sliding_window": c.sliding_window,
    }
    if c.family == "mixtral":
        return fields | {"num_local_experts": c.num_experts, "intermediate_size": c.expert_ffn_size}
    return fields | {
        "num_experts": c.num_experts,
        "moe_intermediate_size": c.expert_ffn_size,
        "intermediate_size": c.dense_ffn_size or c.expert_ffn_size,
        "mlp_only_layers": list(c.dense_layers),
        "decoder_sparse_step": 1,
        "norm_topk_prob": c.renormalize_topk,
        "attention_bias": c.attention_bias,
        "use_sliding_window": c.sliding_window is not None,
    }


def _dbrx(c: ModelConfig) -> dict[str, Any]:
    return {
        "d_model": c.hidden_size,
        "n_layers": c.num_layers,
        "n_heads": c.num_heads,
        "max_seq_len": c.max_position,
        "attn_config": {
            "model_type": "",
            "kv_n_heads": c.num_kv_heads,
            "clip_qkv": c.clip_qkv,
            "rope_theta": c.rope_theta,
        },
        "ffn_config": {
            "model_type": "",
            "ffn_act_fn": {"name": "silu"},
            "ffn_hidden_size": c.expert_ffn_size,
            "moe_num_experts": c.num_experts,
            "moe_top_k": c.num_experts_per_tok,
            "moe_normalize_expert_weights": 1.0 if c.renormalize_topk else None,
        },
    }
