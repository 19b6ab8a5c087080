"""The expert FFN benchmark's cases: shapes, routings drawn from a seed, inputs on the device, floor, float64 truth."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from device_time import floor_s

from jmoe.pallas_kernels.block_scaled import BlockScaled, quantize_blocks


@dataclasses.dataclass(frozen=True)
class Model:
    """One layer's experts on one device: `experts` of them, `k` chosen by each row, `hidden` x `width` each."""

    experts: int
    k: int
    hidden: int
    width: int


MODELS = {
    "qwen3-30b-a3b": Model(128, 8, 2048, 768),
    "dsv3-ep8-slice": Model(32, 1, 7168, 2048),  # T counts rows that reach one of 8 nodes' experts
    "dbrx": Model(16, 4, 6144, 10752),
    "mixtral-8x22b": Model(8, 2, 6144, 16384),
    "tiny": Model(8, 2, 256, 128),
}
ROUTINGS = ("uniform", "zipf")
NUM_ROTATING = 4  # inputs that the calls take in turn


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table."""

    model_name: str
    tokens: int
    dtype: str
    routing: str

    @property
    def model(self) -> Model:
        return MODELS[self.model_name]

    @property
    def shape(self) -> tuple[str, int, str]:
        """What a compiled program depends on."""
        return self.model_name, self.tokens, self.dtype


@dataclasses.dataclass(frozen=True)
class Inputs:
    """One call's rows and choices; `local_idx` is also on the host."""

    rows: jax.Array
    local_idx: jax.Array
    topk_weights: jax.Array
    host_idx: np.ndarray


def draw_routing(case: Case, seed: int) -> np.ndarray:
    """`[tokens, k]` int32 distinct experts: uniform, or with odds 1/rank of experts shuffled by the seed (Zipf(1))."""
    rng = np.random.default_rng(seed)
    odds = np.ones(case.model.experts)
    if case.routing == "zipf":
        odds = 1 / (1 + rng.permutation(case.model.experts))
    noise = rng.gumbel(size=(case.tokens, case.model.experts)) + np.log(odds)
    return np.argsort(-noise, axis=1)[:, : case.model.k].astype(np.int32)  # Gumbel top-k: draws without replacement


def make_inputs(case: Case) -> list[Inputs]:
    """The rotating inputs of a case: other rows and another routing each."""
    found = []
    for seed in range(NUM_ROTATING):
        rng = np.random.default_rng(100 + seed)
        shares = rng.exponential(size=(case.tokens, case.model.k)).astype(np.float32)
        shares /= shares.sum(1, keepdims=True)
        rows = _normal((case.tokens, case.model.hidden), seed, 1.0)
        host_idx = draw_routing(case, seed)
        found.append(Inputs(rows, jnp.asarray(host_idx), jnp.asarray(shares), host_idx))
    return found


@functools.partial(jax.jit, static_argnums=0)
def _normal(shape: tuple[int, ...], seed: int, scale: float) -> jax.Array:
    return (jax.random.normal(jax.random.key(seed, impl="rbg"), shape, jnp.float32) * scale).astype(jnp.bfloat16)


def weight_shapes(model: Model) -> tuple[tuple[int, int, int], ...]:
    """Of gate_proj, up_proj and down_proj."""
    wide = (model.experts, model.hidden, model.width)
    return wide, wide, (model.experts, model.width, model.hidden)


def make_weights(model: Model) -> tuple[jax.Array, ...]:
    """bf16 gate_proj, up_proj `[E, D, F]` and down_proj `[E, F, D]`, normal with variance 1/in."""
    return tuple(_normal(shape, seed, shape[1] ** -0.5) for seed, shape in enumerate(weight_shapes(model), 1))


def call_shapes(case: Case) -> tuple[Any, ...]:
    """What one call takes, as shapes: its program is compiled before its arrays are made."""
    m, kind = case.model, jax.ShapeDtypeStruct
    weights: Any = tuple(kind(shape, jnp.bfloat16) for shape in weight_shapes(m))
    if case.dtype == "fp8":
        weights = jax.eval_shape(scaled_weights, weights)
    chosen = (case.tokens, m.k)
    return kind((case.tokens, m.hidden), jnp.bfloat16), kind(chosen, jnp.int32), kind(chosen, jnp.float32), *weights


def scaled_weights(weights: tuple[jax.Array, ...]) -> tuple[BlockScaled, ...]:
    """The same in float8, one expert at a time: all at once in float32 doesn't fit beside them."""
    return tuple(_one_by_one(w) for w in weights)


@jax.jit
def _one_by_one(weights: jax.Array) -> BlockScaled:
    return jax.lax.map(lambda e: quantize_blocks(e.T), weights)


def active_experts(inputs: list[Inputs]) -> float:
    """Experts that got a row, averaged over the rotating inputs."""
    return float(np.mean([len(np.unique(i.host_idx)) for i in inputs]))


def floor_of(case: Case, inputs: list[Inputs], ceilings: dict[str, float]) -> float:
    """Seconds that physics takes: active experts' weights (and scales), rows in and out (bf16); 6 * pairs * D * F."""
    m = case.model
    per_weight = 2 if case.dtype == "bf16" else 1 + 4 / 128**2
    num_bytes = active_experts(inputs) * 3 * m.hidden * m.width * per_weight + 2 * 2 * case.tokens * m.hidden
    num_flops = 6 * case.tokens * m.k * m.hidden * m.width
    return floor_s(num_bytes, num_flops, ceilings["read_bytes_per_s"], ceilings[f"{case.dtype}_flops"])


def truth(inputs: Inputs, weights: tuple[jax.Array, ...], num_sampled: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Sampled row numbers and their FFN in float64, from the bf16 rows and weights (so fp8 pays for its rounding)."""
    sampled = np.linspace(0, len(inputs.host_idx) - 1, num_sampled).astype(int)
    rows, shares = np.asarray(inputs.rows)[sampled].astype(np.float64), np.asarray(inputs.topk_weights)[sampled]
    k = inputs.host_idx.shape[1]
    with jax.enable_x64(True):
        pairs = (jnp.asarray(rows.repeat(k, axis=0)), jnp.asarray(inputs.host_idx[sampled].reshape(-1)))
        each = np.asarray(_ffn_float64(pairs, weights)).reshape(num_sampled, k, -1)
    return sampled, np.sum(each * shares[:, :, None].astype(np.float64), axis=1)


@jax.jit
def _ffn_float64(pairs, weights):
    """One (row, expert) after the other, sums instead of products: a float64 matmul would be tuned first."""

    def times(x, w, expert):
        return jnp.sum(x[:, None] * jax.lax.dynamic_index_in_dim(w, expert, keepdims=False).astype(jnp.float64), axis=0)

    def one(pair):
        x, expert = pair
        g = times(x, weights[0], expert)
        return times(g / (1 + jnp.exp(-g)) * times(x, weights[1], expert), weights[2], expert)

    return jax.lax.map(one, pairs)
