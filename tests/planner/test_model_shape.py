"""Sizes against published parameter counts, and the two ways in: presets and config.json."""

import dataclasses
import json

import pytest

from jmoe.config import ModelConfig
from jmoe.planner.model_shape import ModelShape, load_model_shape, presets

MIXTRAL = {
    "model_type": "mixtral", "vocab_size": 32768, "hidden_size": 6144, "num_hidden_layers": 56,
    "num_attention_heads": 48, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
    "intermediate_size": 16384, "torch_dtype": "bfloat16",
}  # fmt: skip
DEEPSEEK = {
    "model_type": "deepseek_v3", "num_hidden_layers": 61, "hidden_size": 7168, "vocab_size": 129280,
    "num_attention_heads": 128, "n_routed_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 2048,
    "first_k_dense_replace": 3, "intermediate_size": 18432, "n_shared_experts": 1, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "quantization_config": {"quant_method": "fp8"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("mixtral-8x7b", 46.7), ("mixtral-8x22b", 140.6), ("dbrx", 131.6), ("scaled-moe-317b", 317),
        ("qwen3-30b-a3b", 30.5), ("qwen3-235b-a22b", 235), ("minimax-m2.5", 229), ("deepseek-v3", 671),
    ],
)  # fmt: skip
def test_parameter_counts_are_the_published_ones(name, billions):
    assert presets()[name].total_params / 1e9 == pytest.approx(billions, rel=0.003)


def test_cache_of_a_token():
    """MLA's compressed cache: 576 elements a layer against 2 G H for grouped queries."""
    assert presets()["deepseek-v3"].kv_elements == 576
    assert presets()["mixtral-8x22b"].kv_elements == 2 * 8 * 128
    assert presets()["deepseek-v3"].kv_copies(4) == 4.0
    assert presets()["mixtral-8x22b"].kv_copies(8) == 1.0
    assert presets()["mixtral-8x22b"].kv_copies(16) == 2.0


def test_tensor_sizes_that_divide_or_replicate_kv_heads():
    shape = presets()["qwen3-30b-a3b"]  # 32 query heads, 4 KV heads
    assert [t for t in (1, 2, 3, 4, 8, 16, 64) if shape.splits_attention(t)] == [1, 2, 4, 8, 16]


def test_config_json_equals_preset(tmp_path):
    for name, config in (("mixtral-8x22b", MIXTRAL), ("deepseek-v3", DEEPSEEK)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        assert load_model_shape(str(folder)) == presets()[name]
        assert load_model_shape(str(folder / "config.json")) == presets()[name]


def test_dense_layers_come_from_the_config():
    config = ModelConfig(
        "qwen3_moe", 1000, 64, 4, 4, 2, 16, 8, 2, 32, dense_layers=(0, 2), dense_ffn_size=128
    )
    shape = ModelShape.from_config(config)
    assert (shape.num_moe_layers, shape.num_dense_layers, shape.dense_params) == (2, 2, 3 * 64 * 128)


def test_unknown_model_names_the_known_ones():
    with pytest.raises(ValueError, match=r"expected one of mixtral-8x7b.*did you mean deepseek-v3"):
        load_model_shape("deepseek-v4")


def test_sizes_are_checked():
    good = dataclasses.asdict(presets()["dbrx"]) | {"mla": None}
    for bad in ({"num_experts_per_tok": 17}, {"num_dense_layers": 40}, {"hidden_size": -1}):
        with pytest.raises(ValueError, match="expected"):
            ModelShape(**(good | bad))
