"""Names of Mixtral checkpoints: `model.layers.N.block_sparse_moe.experts.E.w1/w3/w2` and `block_sparse_moe.gate`."""

from jmoe.checkpoints.hf_llama_names import separate_expert_map, shared_attention_map
from jmoe.checkpoints.layout import AttentionMap, ExpertMap
from jmoe.config import ModelConfig


def attention_map(config: ModelConfig, fused: bool = False) -> AttentionMap:
    """Where each parameter of the attention half stands; `fused` names the router as transformers 5 does in memory."""
    return shared_attention_map(config, "mlp.gate" if fused else "block_sparse_moe.gate")


def expert_map(config: ModelConfig) -> ExpertMap:
    """Where each expert's parameters stand."""
    return separate_expert_map(config, "block_sparse_moe.experts", ("w1", "w3", "w2"))
