"""name_maps: the Hugging Face name map of each family, in the classic form or in the fused one."""

from jmoe.checkpoints import hf_dbrx, hf_mixtral, hf_qwen3_moe
from jmoe.checkpoints.hf_llama_names import fused_expert_map, fused_name
from jmoe.checkpoints.layout import AttentionMap, ExpertMap
from jmoe.checkpoints.safetensors_reader import TensorFiles
from jmoe.config import ModelConfig


def name_maps(config: ModelConfig, files: TensorFiles | None = None) -> tuple[AttentionMap, ExpertMap]:
    """(attention, experts): where every parameter stands in a checkpoint.

    Args:
      config: the model's facts; its family chooses the names.
      files: a checkpoint to be read: where it holds fused experts (`mlp.experts.gate_up_proj`), the maps say so. None
        gives the classic names, which published checkpoints have and which transformers writes.

    Raises:
      ValueError: float8 experts in a form that has no place for a scale a block: DBRX's and the fused one.
    """
    fused = files is not None and fused_name(config.moe_layers[0], "gate_up_proj") in files
    if config.expert_dtype == "fp8" and (fused or config.family == "dbrx"):
        form = "fused experts" if fused else "dbrx"
        raise ValueError(f"float8 experts: expected one tensor an expert and projection, got {form}")
    if config.family == "dbrx":
        return hf_dbrx.attention_map(config), hf_dbrx.expert_map(config)
    if config.family == "mixtral":
        attention, experts = hf_mixtral.attention_map(config, fused), hf_mixtral.expert_map
    else:
        attention, experts = hf_qwen3_moe.attention_map(config), hf_qwen3_moe.expert_map
    return attention, fused_expert_map(config) if fused else experts(config)
