"""ModelConfig.from_hf on what Hugging Face files say, old spellings and new, and hf_config back."""

import dataclasses
import json
import pathlib

import pytest

from jmoe.checkpoints.hf_config import hf_config
from jmoe.config import ModelConfig

GOLDENS = pathlib.Path(__file__).parent.parent / "goldens"

# Abridged config.json of published checkpoints, in the spelling of transformers 4.
MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mixtral",
    "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "num_local_experts": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 32000,
}  # fmt: skip
QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "bos_token_id": 151643,
    "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
    "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [],
    "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32,
    "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
DBRX = {
    "architectures": ["DbrxForCausalLM"], "d_model": 6144, "max_seq_len": 32768, "model_type": "dbrx", "n_heads": 48,
    "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "model_type": "", "rope_theta": 500000},
    "ffn_config": {"ffn_hidden_size": 10752, "model_type": "", "moe_jitter_eps": 0.01, "moe_loss_weight": 0.05,
                   "moe_num_experts": 16, "moe_top_k": 4},
    "n_layers": 40, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 100352,
}  # fmt: skip
PUBLISHED = {"mixtral": MIXTRAL_8X7B, "qwen3_moe": QWEN3_30B_A3B, "dbrx": DBRX}


def test_published_mixtral():
    c = ModelConfig.from_hf(MIXTRAL_8X7B)
    assert (c.hidden_size, c.head_dim, c.num_kv_heads, c.num_experts, c.expert_ffn_size) == (4096, 128, 8, 8, 14336)
    assert (c.rope_theta, c.sliding_window, c.renormalize_topk, c.dtype) == (1e6, None, True, "bfloat16")
    assert c.eos_token_ids == (2,)


def test_published_qwen3_moe():
    c = ModelConfig.from_hf(QWEN3_30B_A3B)
    assert (c.head_dim, c.num_experts, c.num_experts_per_tok, c.expert_ffn_size) == (128, 128, 8, 768)
    assert (c.qk_norm, c.sliding_window, c.dense_layers, c.rope_theta) == (True, None, (), 1e6)


def test_published_dbrx():
    c = ModelConfig.from_hf(DBRX)
    assert (c.head_dim, c.num_kv_heads, c.num_experts, c.num_experts_per_tok) == (128, 8, 16, 4)
    assert (c.norm, c.clip_qkv, c.rope_theta, c.renormalize_topk, c.max_position) == ("layer", 8, 5e5, True, 32768)


def test_dbrx_own_rope_base_wins_over_the_default_that_transformers_adds():
    added = DBRX | {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}
    assert ModelConfig.from_hf(added).rope_theta == 5e5
    without = added | {"attn_config": {"kv_n_heads": 8}}
    assert ModelConfig.from_hf(without).rope_theta == 1e4


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_new_spellings_mean_the_same(family):
    old = PUBLISHED[family]
    new = {k: v for k, v in old.items() if k not in ("rope_theta", "torch_dtype", "rope_scaling", "num_experts")}
    new |= {"rope_parameters": {"rope_theta": old["rope_theta"], "rope_type": "default"}, "dtype": "bfloat16"}
    if family == "qwen3_moe":
        new["num_local_experts"] = old["num_experts"]
    assert ModelConfig.from_hf(new) == ModelConfig.from_hf(old)


def test_dense_layers():
    sparse = QWEN3_30B_A3B | {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    assert ModelConfig.from_hf(sparse).dense_layers == (0, 2, 3, 4)


def test_sliding_window_of_qwen3_needs_its_switch():
    window = QWEN3_30B_A3B | {"sliding_window": 512, "max_window_layers": 0}
    assert ModelConfig.from_hf(window).sliding_window is None
    assert ModelConfig.from_hf(window | {"use_sliding_window": True}).sliding_window == 512
    with pytest.raises(ValueError, match="max_window_layers"):
        ModelConfig.from_hf(window | {"use_sliding_window": True, "max_window_layers": 24})


def test_generation_config_names_the_end_tokens(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B_A3B))
    assert ModelConfig.from_hf(tmp_path).eos_token_ids == (151645,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [151645, 151643], "top_k": 20}))
    assert ModelConfig.from_hf(tmp_path).eos_token_ids == (151645, 151643)


def test_mixtral_defaults_of_its_class():
    bare = {k: v for k, v in MIXTRAL_8X7B.items() if not k.endswith("token_id")}
    assert ModelConfig.from_hf(bare).eos_token_ids == (2,)
    assert ModelConfig.from_hf(bare | {"eos_token_id": None}).eos_token_ids == ()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama"}, "model_type: expected one of"),
        (MIXTRAL_8X7B | {"quantization_config": {"bits": 4}}, "quantization_config"),
        (MIXTRAL_8X7B | {"hidden_act": "gelu"}, "expected 'silu'"),
        (MIXTRAL_8X7B | {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'default', got 'yarn'"),
        (QWEN3_30B_A3B | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "got 'linear'"),
        (DBRX | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "got 'linear'"),
        (MIXTRAL_8X7B | {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (MIXTRAL_8X7B | {"num_attention_heads": 30}, "num_heads"),
        ({k: v for k, v in MIXTRAL_8X7B.items() if k != "vocab_size"}, "expected the key 'vocab_size'"),
        (DBRX | {"tie_word_embeddings": True}, "tie_word_embeddings"),
        (DBRX | {"ffn_config": DBRX["ffn_config"] | {"moe_normalize_expert_weights": 2.0}}, "moe_normalize"),
    ],
)
def test_what_is_not_supported_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(config)


@pytest.mark.parametrize("family", PUBLISHED)
def test_hf_config_is_the_inverse(family):
    c = ModelConfig.from_hf(PUBLISHED[family])
    for change in ({}, {"eos_token_ids": (3, 4)}, {"eos_token_ids": ()}, {"dtype": "float32"}, {"rope_theta": 77.0}):
        changed = dataclasses.replace(c, **change)
        assert ModelConfig.from_hf(json.loads(json.dumps(hf_config(changed)))) == changed


@pytest.mark.parametrize("path", sorted(p for p in GOLDENS.iterdir() if p.is_dir()), ids=lambda p: p.name)
def test_hf_config_is_the_inverse_on_goldens(path):
    c = ModelConfig.from_hf(path)
    assert ModelConfig.from_hf(hf_config(c)) == c


def test_hf_config_refuses_what_the_family_can_not_say():
    c = ModelConfig.from_hf(MIXTRAL_8X7B)
    with pytest.raises(ValueError, match="qk_norm=True"):
        hf_config(dataclasses.replace(c, qk_norm=True))
    with pytest.raises(ValueError, match="renormalize_topk=False"):
        hf_config(dataclasses.replace(c, renormalize_topk=False))
    with pytest.raises(ValueError, match=r"dense_layers=\(1,\)"):
        hf_config(dataclasses.replace(c, dense_layers=(1,), dense_ffn_size=8))


@pytest.mark.oracle
@pytest.mark.parametrize("family", PUBLISHED)
def test_transformers_agrees_with_every_fact(family):
    transformers = pytest.importorskip("transformers", reason="the `oracle` extra is not installed")
    theirs = transformers.AutoConfig.for_model(**PUBLISHED[family])
    # Through transformers and back: what it parsed from the old spelling, in its own new spelling.
    ours, again = ModelConfig.from_hf(PUBLISHED[family]), ModelConfig.from_hf(theirs.to_dict())
    assert again == ours
    back = transformers.AutoConfig.for_model(**hf_config(ours))
    names = {"hidden_size": ours.hidden_size, "num_hidden_layers": ours.num_layers}
    names |= {"num_attention_heads": ours.num_heads, "vocab_size": ours.vocab_size}
    for name, value in names.items():
        assert getattr(back, name) == value
    rope = {"rope_theta": ours.rope_theta, "rope_type": "default"}
    assert back.rope_parameters == rope
