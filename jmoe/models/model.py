"""Model: the two halves side by side, and the plain forward composed of them, which is the reference."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jmoe.config import ModelConfig
from jmoe.models.arrays import ArraySpec, Make
from jmoe.models.attention import AttentionHalf
from jmoe.models.experts import ExpertHalf
from jmoe.sharding.tensor_group import TensorGroup


class Model(nnx.Module):
    """A MoE model as two modules, `model.attention` and `model.experts`: where a parameter stands says on which mesh.

    Args:
      config: the model's facts.
      rngs: random weights from here; None for `abstract` or loaded ones.
      make_attention, make_experts: other sources of parameters (a checkpoint, a shard, shapes only).
    """

    def __init__(
        self,
        config: ModelConfig,
        rngs: nnx.Rngs | None = None,
        *,
        make_attention: Make | None = None,
        make_experts: Make | None = None,
    ):
        if rngs is None and (make_attention is None or make_experts is None):
            raise ValueError("Model: expected rngs, or make_attention and make_experts, got neither")
        self.config = config
        self.attention = AttentionHalf(config, make_attention or random_params(config, rngs))
        self.experts = ExpertHalf(config, make_experts or random_params(config, rngs))

    @classmethod
    def from_arrays(cls, config: ModelConfig, attention: dict[str, Any], experts: dict[str, Any]) -> "Model":
        """A model over arrays by path, as `arrays_by_path` gives them."""
        return cls(config, make_attention=take_from(attention), make_experts=take_from(experts))

    def arrays_by_path(self) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """(attention, experts): every parameter by its path, "layers.3.q_proj"."""
        return _by_path(self.attention), _by_path(self.experts)


def random_params(config: ModelConfig, rngs: nnx.Rngs | None) -> Make:
    """Normal weights of standard deviation fan_in^-1/2; norm scales are ones."""

    def make(path: str, spec: ArraySpec) -> nnx.Param:
        del path
        dtype = spec.numpy_dtype(config.dtype)
        if spec.fan_in == 0:
            return nnx.Param(jnp.full(spec.shape, spec.fill, dtype))
        assert rngs is not None
        drawn = jnp.dtype(config.dtype)  # float8 numbers are drawn in the model's type and rounded
        normal = jax.random.normal(rngs.params(), spec.shape, drawn) * jnp.asarray(spec.fan_in**-0.5, drawn)
        return nnx.Param(normal.astype(dtype))

    return make


def take_from(arrays: dict[str, Any]) -> Make:
    """Parameters out of a dict by path; used to run a module's code over shards inside a program."""
    return lambda path, spec: nnx.Param(arrays[path])


def array_specs(config: ModelConfig) -> tuple[dict[str, ArraySpec], dict[str, ArraySpec]]:
    """(attention, experts): the description of every parameter by path, without making any array."""

    def collect(into: dict[str, ArraySpec]) -> Make:
        def make(path: str, spec: ArraySpec) -> nnx.Param:
            into[path] = spec
            return nnx.Param(jax.ShapeDtypeStruct(spec.shape, spec.numpy_dtype(config.dtype)))

        return make

    attention: dict[str, ArraySpec] = {}
    experts: dict[str, ArraySpec] = {}
    AttentionHalf(config, collect(attention))
    ExpertHalf(config, collect(experts))
    return attention, experts


def _by_path(module: nnx.Module) -> dict[str, jax.Array]:
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {".".join(str(part) for part in path): param[...] for path, param in flat}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer so far, dense: the reference's cache, a `[batch, length, G, H]` a layer."""

    keys: list[jax.Array]
    values: list[jax.Array]

    @property
    def length(self) -> int:
        return self.keys[0].shape[1] if self.keys else 0


def reference_forward(model: Model, token_ids: jax.Array, cache: KVCache | None = None) -> tuple[jax.Array, KVCache]:
    """The plain single-device forward: the same two halves, float32 attention, a gathered expert a row.

    Args:
      model: the whole model on one device.
      token_ids: `[batch, length]` int32, the tokens that follow those in the cache.
      cache: of earlier calls; None at the start.

    Returns:
      Logits `[batch, length, vocab]` float32, and the cache with these tokens in it.
    """
    config, alone = model.config, TensorGroup()
    batch, length = token_ids.shape
    start = cache.length if cache is not None else 0
    positions = jnp.broadcast_to(jnp.arange(start, start + length, dtype=jnp.int32), (batch, length))
    x = model.attention.embed_tokens(token_ids, alone)
    keys, values, moe_layer = [], [], 0
    for index, layer in enumerate(model.attention.layers):
        q, k, v = layer.project(x, positions)
        if cache is not None:
            k = jnp.concatenate([cache.keys[index], k], axis=1)
            v = jnp.concatenate([cache.values[index], v], axis=1)
        keys.append(k)
        values.append(v)
        x = x + layer.output(_dense_attention(q, k, v, config.sliding_window), alone)
        h = layer.ffn_input(x)
        if layer.is_dense:
            x = x + layer.dense_ffn(h, alone)
            continue
        flat = h.reshape(batch * length, -1)
        topk_idx, topk_weights = layer.route(flat)
        y = model.experts.layers[moe_layer](flat, topk_idx, topk_weights, implementation="reference")
        x = x + y.astype(x.dtype).reshape(x.shape)
        moe_layer += 1
    logits = model.attention.logits(x.reshape(batch * length, -1), alone)
    return logits.reshape(batch, length, -1), KVCache(keys, values)


def _dense_attention(q: jax.Array, k: jax.Array, v: jax.Array, sliding_window: int | None) -> jax.Array:
    """Causal attention of the last tokens over all of them, float32: q [B, T, Q, H], k and v [B, S, G, H]."""
    group, length = q.shape[2] // k.shape[2], k.shape[1]
    k, v = (jnp.repeat(a.astype(jnp.float32), group, axis=2) for a in (k, v))
    scores = jnp.einsum("btqh,bsqh->bqts", q.astype(jnp.float32), k) / q.shape[3] ** 0.5
    query = jnp.arange(length - q.shape[1], length)[:, None]
    key = jnp.arange(length)
    visible = key <= query
    if sliding_window is not None:
        visible &= key > query - sliding_window
    probs = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bqts,bsqh->btqh", probs, v).astype(q.dtype)
