"""Two MoE layers between the meshes as functions to differentiate: each role alone, both in one, and without meshes."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.cell_config import CellConfig
from jmoe.config import ModelConfig
from jmoe.models.experts import ExpertHalf
from jmoe.models.model import array_specs, take_from
from jmoe.role_programs import AttentionRole, ExpertRole
from jmoe.schedule import Stage
from jmoe.sharding.exchange import Box, Chain, Exchange
from jmoe.sharding.mesh_config import AXIS, MeshConfig
from jmoe.sharding.routing import Routes, route_rows

CONFIG = ModelConfig("mixtral", 17, 24, 2, 2, 1, 8, 6, 3, 10, dtype="float32")
TOKENS, LAYERS, CHOICES = 5, CONFIG.num_layers, CONFIG.num_experts_per_tok


@dataclasses.dataclass(frozen=True)
class Problem:
    """Sizes and numbers: x and the result's cotangent `[M, T, D]`, topk_* `[M, L, T, k]`, expert weights by path."""

    cell: CellConfig
    exchange: Exchange
    x: np.ndarray
    topk_idx: np.ndarray
    topk_weights: np.ndarray
    valid: np.ndarray
    cotangent: np.ndarray
    experts: dict[str, np.ndarray]

    @classmethod
    def of(cls, mesh: MeshConfig) -> "Problem":
        mesh = mesh.resolve(CONFIG.num_experts)
        cell = CellConfig(CONFIG, mesh, max_len=16, num_pages=20, num_top_logprobs=4)
        exchange = Exchange.of(cell.mesh, CONFIG.hidden_size, TOKENS, CHOICES, "float32")
        rng = np.random.default_rng(0)
        replicas = cell.mesh.attention

        def normal(*shape, scale=1.0):
            return rng.normal(size=shape, scale=scale).astype(np.float32)

        chosen = np.argsort(rng.random((replicas, LAYERS, TOKENS, CONFIG.num_experts)), axis=-1)[..., :CHOICES]
        return cls(
            cell,
            exchange,
            x=normal(replicas, TOKENS, CONFIG.hidden_size),
            topk_idx=chosen.astype(np.int32),
            topk_weights=rng.uniform(0.2, 1, chosen.shape).astype(np.float32),
            valid=rng.random((replicas, TOKENS)) < 0.8,
            cotangent=normal(replicas, TOKENS, CONFIG.hidden_size),
            experts={p: normal(*s.shape, scale=s.fan_in**-0.5) for p, s in array_specs(CONFIG)[1].items()},
        )

    def held_by(self, node: int) -> dict[str, np.ndarray]:
        """A node's share of the expert weights, padded to the fullest node's."""
        placement = self.cell.mesh.placement
        assert placement is not None
        held = list(placement.nodes[node])
        padding = [(0, placement.max_local_experts - len(held)), (0, 0), (0, 0)]
        return {path: np.pad(w[held], padding) for path, w in self.experts.items()}

    def whole(self, by_node: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        """Gradients of the nodes' shares as gradients of the weights: replicas add up."""
        placement = self.cell.mesh.placement
        assert placement is not None
        total = {path: np.zeros_like(w) for path, w in self.experts.items()}
        for experts, part in zip(placement.nodes, by_node, strict=True):
            for path in total:
                np.add.at(total[path], list(experts), np.asarray(part[path])[: len(experts)])
        return total


def _roles(problem: Problem) -> tuple[AttentionRole, Any]:
    attention = AttentionRole(problem.cell, None, problem.exchange)  # type: ignore[arg-type]

    def stage(layer: int, params: dict[str, jax.Array], arrived: Box) -> Box:
        return ExpertRole(problem.cell, ExpertHalf(CONFIG, take_from(params)), problem.exchange).stage(
            Stage(layer, 0), arrived
        )

    return attention, stage


def _routes(problem: Problem, topk_idx, topk_weights, valid) -> Routes:
    placement = problem.cell.mesh.placement
    assert placement is not None
    return route_rows(topk_idx, topk_weights, valid, jnp.arange(TOKENS, dtype=jnp.int32), placement, TOKENS)


def attention_alone(problem: Problem, topk_idx, valid, x, topk_weights, order):
    """One attention device: x `[T, D]` and the chain's order -> x after both layers, and the order."""
    role, _ = _roles(problem)
    chain = Chain.start(jnp.int32(3), order)
    for layer in range(LAYERS):
        routes = _routes(problem, topk_idx[layer], topk_weights[layer], valid)
        _, chain = problem.exchange(role._dispatch(x, routes), chain, dispatch=True, combine=False)
        arrived, chain = problem.exchange(problem.exchange.empty_box(), chain, dispatch=False, combine=True)
        x = x + jnp.tanh(role._combine(arrived, routes))
    return x, chain.order


def experts_alone(problem: Problem, params, order):
    """One expert device: its weights and the chain's order -> the order; its rows come and go by the exchange."""
    _, stage = _roles(problem)
    chain = Chain.start(jnp.int32(3), order)
    for layer in range(LAYERS):
        arrived, chain = problem.exchange(problem.exchange.empty_box(), chain, dispatch=True, combine=False)
        _, chain = problem.exchange(stage(layer, params, arrived), chain, dispatch=False, combine=True)
    return chain.order


def attention_step(problem, topk_idx, valid, cotangent, x, topk_weights, order):
    """What the attention device differentiates, by name; the order comes out with a zero cotangent."""
    function = functools.partial(attention_alone, problem, topk_idx, valid)
    (_, order_out), pullback = jax.vjp(function, x, topk_weights, order)
    dx, dweights, dorder = pullback((cotangent, jnp.zeros_like(order_out)))
    return {"x": dx, "topk_weights": dweights, "order": dorder}


def expert_step(problem, params, order):
    """What the expert device differentiates, by path; its result is the order alone, with a zero cotangent."""
    order_out, pullback = jax.vjp(functools.partial(experts_alone, problem), params, order)
    dparams, dorder = pullback(jnp.zeros_like(order_out))
    return {**dparams, "order": dorder}


def both_roles(problem: Problem, topk_idx, valid, x, topk_weights, params, order):
    """Any device, its role picked by a conditional around what is computed and never around an exchange."""
    role, stage = _roles(problem)
    exchange = problem.exchange
    here = jax.lax.axis_index(AXIS) < problem.cell.mesh.num_attention_devices
    chain = Chain.start(jnp.int32(3), order)
    for layer in range(LAYERS):
        routes = _routes(problem, topk_idx[layer], topk_weights[layer], valid)
        outward = jax.lax.cond(here, role._dispatch, lambda *_: exchange.empty_box(), x, routes)
        dispatched, chain = exchange(outward, chain, dispatch=True, combine=False)
        serve = functools.partial(stage, layer)
        back = jax.lax.cond(here, lambda *_: exchange.empty_box(), serve, params, dispatched)
        combined, chain = exchange(back, chain, dispatch=False, combine=True)
        x = jax.lax.cond(here, lambda x, *a: x + jnp.tanh(role._combine(*a)), lambda x, *_: x, x, combined, routes)
    return x, chain.order


def dense(problem: Problem, x, topk_weights, experts):
    """The same without meshes: every expert over every token, weighted by who chose it; -> sum(y * cotangent)."""
    for layer in range(LAYERS):
        gate, up, down = (experts[f"layers.{layer}.{name}_proj"] for name in ("gate", "up", "down"))
        hidden = jax.nn.silu(jnp.einsum("mtd,edf->mtef", x, gate)) * jnp.einsum("mtd,edf->mtef", x, up)
        said = jnp.einsum("mtef,efd->mted", hidden, down)
        chosen = jax.nn.one_hot(problem.topk_idx[:, layer], CONFIG.num_experts)  # [M, T, k, E]
        share = jnp.einsum("mtk,mtke->mte", topk_weights[:, layer], chosen) * problem.valid[..., None]
        x = x + jnp.tanh(jnp.einsum("mte,mted->mtd", share, said))
    return jnp.sum(x * problem.cotangent)


def dense_gradients(problem: Problem):
    """Of the loss in x `[M, T, D]`, topk_weights `[M, L, T, k]` and the expert weights by path."""
    gradient = jax.grad(functools.partial(dense, problem), argnums=(0, 1, 2))
    return jax.jit(gradient)(problem.x, problem.topk_weights, problem.experts)
