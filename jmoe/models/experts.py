"""The expert half of a model: the FFNs of every MoE layer. Lives on the expert mesh."""

import jax
import jax.numpy as jnp
from flax import nnx

from jmoe.config import ModelConfig
from jmoe.models.arrays import ArraySpec, Make
from jmoe.pallas_kernels.block_scaled import BLOCK, BlockScaled, num_blocks
from jmoe.pallas_kernels.expert_ffn import Implementation, expert_ffn


class ExpertLayer(nnx.Module):
    """The experts of one MoE layer (on a node: those that its placement names, in local order).

    Float8 weights stand in two arrays, values and scales: `BlockScaled`, which see.
    """

    def __init__(self, config: ModelConfig, moe_layer: int, make: Make):
        c, path = config, f"layers.{moe_layer}."
        self.is_scaled = c.expert_dtype == "fp8"
        wide = ArraySpec((c.num_experts, c.hidden_size, c.expert_ffn_size), ("expert", None, "mlp"), c.hidden_size)
        back = ArraySpec((c.num_experts, c.expert_ffn_size, c.hidden_size), ("expert", "mlp", None), c.expert_ffn_size)
        wide, wide_scales = scaled_specs(wide) if self.is_scaled else (wide, None)
        back, back_scales = scaled_specs(back) if self.is_scaled else (back, None)
        self.gate_proj = make(path + "gate_proj", wide)
        self.up_proj = make(path + "up_proj", wide)
        self.down_proj = make(path + "down_proj", back)
        if wide_scales is not None and back_scales is not None:
            self.gate_scales = make(path + "gate_scales", wide_scales)
            self.up_scales = make(path + "up_scales", wide_scales)
            self.down_scales = make(path + "down_scales", back_scales)

    def __call__(
        self,
        rows: jax.Array,
        local_idx: jax.Array,
        topk_weights: jax.Array,
        implementation: Implementation | None = None,
        out_dtype: jax.typing.DTypeLike = jnp.float32,
    ) -> jax.Array:
        """One weighted partial sum a row: see `expert_ffn`."""
        weights = (self.gate_proj[...], self.up_proj[...], self.down_proj[...])
        if self.is_scaled:
            scales = (self.gate_scales[...], self.up_scales[...], self.down_scales[...])
            weights = (BlockScaled(w, s) for w, s in zip(weights, scales, strict=True))
        return expert_ffn(
            rows, local_idx, topk_weights, *weights, out_dtype=out_dtype, implementation=implementation
        )


def scaled_specs(plain: ArraySpec) -> tuple[ArraySpec, ArraySpec]:
    """Values `[E, out, in]` and scales `[E, ceil(out / 128), ceil(in / 128)]` of a projection `[E, in, out]`."""
    experts, num_in, num_out = plain.shape
    axes = (plain.axes[0], plain.axes[2], plain.axes[1])
    # Random values of standard deviation 64 stay within float8's 448; the scales make fan_in^-1/2 of it.
    values = ArraySpec((experts, num_out, num_in), axes, 64.0**-2, dtype="float8_e4m3fn", block=BLOCK)
    scales = (experts, num_blocks(num_out), num_blocks(num_in))
    return values, ArraySpec(scales, axes, fill=plain.fan_in**-0.5 / 64, dtype="float32")


class ExpertHalf(nnx.Module):
    """The experts of every MoE layer; `layers[j]` belongs to decoder layer config.moe_layers[j]."""

    def __init__(self, config: ModelConfig, make: Make):
        self.config = config
        self.layers = nnx.List([ExpertLayer(config, j, make) for j in range(len(config.moe_layers))])
