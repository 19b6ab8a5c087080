"""Names of Qwen3-MoE checkpoints: `model.layers.N.mlp.experts.E.gate_proj/up_proj/down_proj` and `mlp.gate`."""

from jmoe.checkpoints.hf_llama_names import separate_expert_map, shared_attention_map
from jmoe.checkpoints.layout import AttentionMap, ExpertMap
from jmoe.config import ModelConfig


def attention_map(config: ModelConfig) -> AttentionMap:
    """Where each parameter of the attention half stands."""
    return shared_attention_map(config, "mlp.gate")


def expert_map(config: ModelConfig) -> ExpertMap:
    """Where each expert's parameters stand."""
    return separate_expert_map(config, "mlp.experts", ("gate_proj", "up_proj", "down_proj"))
