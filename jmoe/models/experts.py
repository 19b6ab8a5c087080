"""The expert half of a model: the FFNs of every MoE layer. Lives on the expert mesh."""

import jax
from flax import nnx

from jmoe.config import ModelConfig
from jmoe.models.arrays import ArraySpec, Make
from jmoe.pallas_kernels.expert_ffn import Implementation, expert_ffn


class ExpertLayer(nnx.Module):
    """The experts of one MoE layer (on a node: those that its placement names, in local order)."""

    def __init__(self, config: ModelConfig, moe_layer: int, make: Make):
        c, path = config, f"layers.{moe_layer}."
        wide = ArraySpec((c.num_experts, c.hidden_size, c.expert_ffn_size), ("expert", None, "mlp"), c.hidden_size)
        back = ArraySpec((c.num_experts, c.expert_ffn_size, c.hidden_size), ("expert", "mlp", None), c.expert_ffn_size)
        self.gate_proj = make(path + "gate_proj", wide)
        self.up_proj = make(path + "up_proj", wide)
        self.down_proj = make(path + "down_proj", back)

    def __call__(
        self,
        rows: jax.Array,
        local_idx: jax.Array,
        topk_weights: jax.Array,
        implementation: Implementation | None = None,
    ) -> jax.Array:
        """One weighted partial sum a row, float32: see `expert_ffn`."""
        weights = (self.gate_proj[...], self.up_proj[...], self.down_proj[...])
        return expert_ffn(rows, local_idx, topk_weights, *weights, implementation=implementation)


class ExpertHalf(nnx.Module):
    """The experts of every MoE layer; `layers[j]` belongs to decoder layer config.moe_layers[j]."""

    def __init__(self, config: ModelConfig, make: Make):
        self.config = config
        self.layers = nnx.List([ExpertLayer(config, j, make) for j in range(len(config.moe_layers))])
