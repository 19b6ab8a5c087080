"""The attention half of a model: everything but the experts. Lives on the attention mesh."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jmoe.config import ModelConfig
from jmoe.models.arrays import ArraySpec, Make
from jmoe.models.norms import normalize, rotate
from jmoe.models.router import choose_experts
from jmoe.pallas_kernels.greedy_head import Implementation, greedy_head
from jmoe.pallas_kernels.thin_matmul import thin_matmul
from jmoe.sharding.tensor_group import TensorGroup


class AttentionLayer(nnx.Module):
    """One decoder layer without its experts: norms, projections, router, or the dense FFN where it has one.

    Methods read sizes from the arrays, so the same code runs on whole arrays and on one tensor rank's share.
    """

    def __init__(self, config: ModelConfig, layer: int, make: Make):
        c, path = config, f"layers.{layer}."
        heads, kv_heads = (c.num_heads, c.head_dim), (c.num_kv_heads, c.head_dim)
        self.config = config
        self.is_dense = layer in c.dense_layers
        self.input_norm = make(path + "input_norm", ArraySpec((c.hidden_size,), (None,)))
        self.q_proj = make(path + "q_proj", ArraySpec((c.hidden_size, *heads), (None, "heads", None), c.hidden_size))
        kv = ArraySpec((c.hidden_size, *kv_heads), (None, "kv_heads", None), c.hidden_size)
        self.k_proj = make(path + "k_proj", kv)
        self.v_proj = make(path + "v_proj", kv)
        out = ArraySpec((*heads, c.hidden_size), ("heads", None, None), c.num_heads * c.head_dim)
        self.o_proj = make(path + "o_proj", out)
        if c.attention_bias:
            self.q_bias = make(path + "q_bias", ArraySpec(heads, ("heads", None), c.hidden_size))
            self.k_bias = make(path + "k_bias", ArraySpec(kv_heads, ("kv_heads", None), c.hidden_size))
            self.v_bias = make(path + "v_bias", ArraySpec(kv_heads, ("kv_heads", None), c.hidden_size))
            self.o_bias = make(path + "o_bias", ArraySpec((c.hidden_size,), (None,), c.hidden_size))
        if c.qk_norm:
            self.q_norm = make(path + "q_norm", ArraySpec((c.head_dim,), (None,)))
            self.k_norm = make(path + "k_norm", ArraySpec((c.head_dim,), (None,)))
        self.ffn_norm = make(path + "ffn_norm", ArraySpec((c.hidden_size,), (None,)))
        if self.is_dense:
            wide = ArraySpec((c.hidden_size, c.dense_ffn_size), (None, "mlp"), c.hidden_size)
            self.gate_proj = make(path + "gate_proj", wide)
            self.up_proj = make(path + "up_proj", wide)
            back = ArraySpec((c.dense_ffn_size, c.hidden_size), ("mlp", None), c.dense_ffn_size)
            self.down_proj = make(path + "down_proj", back)
        else:
            self.router = make(path + "router", ArraySpec((c.hidden_size, c.num_experts), (None, None), c.hidden_size))

    def project(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Norm, projections, clamp, QK-norm and rotary: x `[..., D]` -> q `[..., Q, H]`, k and v `[..., G, H]`."""
        c = self.config
        q, k, v = self.heads(x)
        if c.qk_norm:
            q = normalize(q, self.q_norm[...], "rms", c.norm_eps)
            k = normalize(k, self.k_norm[...], "rms", c.norm_eps)
        return rotate(q, positions, c.rope_theta), rotate(k, positions, c.rope_theta), v

    def head_scales(self) -> tuple[jax.Array | None, jax.Array | None]:
        """Scales of the norms over each query and key head; None where there are none."""
        return (self.q_norm[...], self.k_norm[...]) if self.config.qk_norm else (None, None)

    def heads(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """`project` without QK-norm and rotary, which `place_heads` does beside the write to the pages."""
        c = self.config
        x = self.normed_input(x)
        weights = [w[...] for w in (self.q_proj, self.k_proj, self.v_proj)]
        flat = [w.reshape(w.shape[0], -1) for w in weights]
        product = thin_matmul(x.reshape(-1, x.shape[-1]), flat).reshape(*x.shape[:-1], -1, c.head_dim)
        q, k, v = jnp.split(product, np.cumsum([w.shape[1] for w in weights])[:2], axis=-2)
        if c.attention_bias:
            q, k, v = q + self.q_bias[...], k + self.k_bias[...], v + self.v_bias[...]
        if c.clip_qkv is not None:
            q, k, v = (jnp.clip(a, -c.clip_qkv, c.clip_qkv) for a in (q, k, v))
        return q, k, v

    def normed_input(self, x: jax.Array) -> jax.Array:
        """What the projections read: the normalised residual."""
        return normalize(x, self.input_norm[...], self.config.norm, self.config.norm_eps)

    def output(self, heads: jax.Array, tensor: TensorGroup) -> jax.Array:
        """Output projection `[..., Q, H]` -> `[..., D]`, summed over the tensor ranks."""
        o_proj = self.o_proj[...].reshape(-1, self.config.hidden_size)
        y = thin_matmul(heads.reshape(-1, o_proj.shape[0]), [o_proj]).reshape(*heads.shape[:-2], -1)
        y = tensor.sum(y)
        return y + self.o_bias[...] if self.config.attention_bias else y

    def ffn_input(self, x: jax.Array) -> jax.Array:
        """What the FFN or the experts read: the normalised residual."""
        return normalize(x, self.ffn_norm[...], self.config.norm, self.config.norm_eps)

    def dense_ffn(self, x: jax.Array, tensor: TensorGroup) -> jax.Array:
        """SwiGLU of a dense layer, summed over the tensor ranks."""
        hidden = jax.nn.silu(x @ self.gate_proj[...]) * (x @ self.up_proj[...])
        return tensor.sum(hidden @ self.down_proj[...])

    def route(self, x: jax.Array, num_tokens: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """topk_idx and topk_weights `[tokens, k]` of normalised tokens `[tokens, D]`; see `choose_experts`."""
        c = self.config
        return choose_experts(x @ self.router[...], c.num_experts_per_tok, c.renormalize_topk, num_tokens)


class AttentionHalf(nnx.Module):
    """Embedding, decoder layers without experts, final norm and output head."""

    def __init__(self, config: ModelConfig, make: Make):
        c = config
        self.config = config
        self.embed = make("embed", ArraySpec((c.vocab_size, c.hidden_size), ("vocab", None), c.hidden_size))
        self.layers = nnx.List([AttentionLayer(c, layer, make) for layer in range(c.num_layers)])
        self.final_norm = make("final_norm", ArraySpec((c.hidden_size,), (None,)))
        if not c.tie_word_embeddings:
            head = ArraySpec((c.hidden_size, c.vocab_size), (None, "vocab"), c.hidden_size)
            self.lm_head = make("lm_head", head)

    def embed_tokens(self, token_ids: jax.Array, tensor: TensorGroup) -> jax.Array:
        """`[...]` int32 -> `[..., D]`; each tensor rank looks up its share of the vocabulary."""
        table = self.embed[...]
        local = token_ids - tensor.rank() * table.shape[0]
        held = (local >= 0) & (local < table.shape[0])
        rows = table[jnp.clip(local, 0, table.shape[0] - 1)]
        return tensor.sum(jnp.where(held[..., None], rows, 0))

    def logits(self, x: jax.Array, tensor: TensorGroup) -> jax.Array:
        """Final norm and head: `[rows, D]` -> `[rows, vocab]` float32, the ranks' shares gathered, padding cut."""
        c = self.config
        x = self._normed_output(x)
        if c.tie_word_embeddings:
            share = jnp.einsum("rd,vd->rv", x, self.embed[...], preferred_element_type=jnp.float32)
        else:
            share = jnp.einsum("rd,dv->rv", x, self.lm_head[...], preferred_element_type=jnp.float32)
        whole = jnp.moveaxis(tensor.gather(share), 0, 1)  # [rows, ranks, share]
        return whole.reshape(x.shape[0], -1)[:, : c.vocab_size]

    def greedy_tokens(self, x: jax.Array, tensor: TensorGroup, implementation: Implementation | None) -> jax.Array:
        """The argmax of `logits`, `[rows]` int32; with the whole vocabulary on one rank by `greedy_head`."""
        if tensor.size > 1:
            return jnp.argmax(self.logits(x, tensor), axis=-1).astype(jnp.int32)
        x, tied = self._normed_output(x), self.config.tie_word_embeddings
        weights = self.embed[...] if tied else self.lm_head[...]
        return greedy_head(x, weights, by_token=tied, implementation=implementation)

    def _normed_output(self, x: jax.Array) -> jax.Array:
        """What the head reads: the normalised residual."""
        return normalize(x, self.final_norm[...], self.config.norm, self.config.norm_eps)
