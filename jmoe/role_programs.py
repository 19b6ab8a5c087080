"""The two role programs: what an attention device and an expert device compute in each stage of the schedule.

`jmoe.walk` takes them through the schedule, alone or under one conditional; the roles do not know which.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jmoe.cell_config import CellConfig
from jmoe.decoder_layer import Chosen, decoder_layer
from jmoe.layer_program import run_layer
from jmoe.models.attention import AttentionHalf
from jmoe.models.experts import ExpertHalf, ExpertLayer
from jmoe.rows import Rows
from jmoe.schedule import Stage
from jmoe.sharding.exchange import Box, Exchange
from jmoe.sharding.meshes import device_index
from jmoe.sharding.routing import Routes, route_rows, rows_at, sum_partials
from jmoe.sharding.tensor_group import TensorGroup

Pages = list[tuple[jax.Array, jax.Array]]  # keys and values of each decoder layer, [P, page_len, G, H]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lane:
    """One micro-batch under way on an attention device: residual `[tokens, D]` and the routes of its last dispatch.

    A colocated cell dispatches nothing to another mesh: its lanes have no routes.
    """

    x: jax.Array
    routes: Routes | None


def _partial_sums(cell: CellConfig, module: ExpertLayer, rows, local_idx, topk_weights):
    return module(rows, local_idx, topk_weights, cell.implementation)


def _rounded_sums(cell: CellConfig, module: ExpertLayer, rows, local_idx, topk_weights):
    """In the dtype of the rows, which they travel in."""
    return module(rows, local_idx, topk_weights, cell.implementation, rows.dtype)


class AttentionRole:
    """Attention stages over this device's share of the attention half's parameters."""

    def __init__(self, cell: CellConfig, half: AttentionHalf, exchange: Exchange | None):
        self.cell = cell
        self.half = half
        self._exchange = exchange
        self.tensor = TensorGroup.of(cell.mesh, "attention")

    @property
    def exchange(self) -> Exchange:
        """The exchange with the expert mesh; a colocated cell has none."""
        assert self._exchange is not None
        return self._exchange

    def empty_lane(self) -> Lane:
        """A lane with nothing in it: where every micro-batch starts."""
        f, num_nodes = self.exchange.format, self.cell.mesh.expert
        nodes = (num_nodes, f.capacity)
        choices = (*nodes, f.num_experts_per_tok)
        routes = Routes(
            order=jnp.zeros(nodes, jnp.int32),
            num_rows=jnp.zeros((num_nodes,), jnp.int32),
            position=jnp.full(nodes, -1, jnp.int32),
            local_idx=jnp.full(choices, -1, jnp.int32),
            topk_weights=jnp.zeros(choices, jnp.float32),
            num_dropped=jnp.int32(0),
        )
        return Lane(jnp.zeros((f.capacity, self.cell.model.hidden_size), f.dtype), routes)

    def layers_of(self, stage: Stage) -> range:
        """Decoder layers of a stage: those after the last MoE layer's experts, up to the next router or the end."""
        moe_layers = self.cell.model.moe_layers
        first = moe_layers[stage.layer - 1] + 1 if stage.layer > 0 else 0
        last = moe_layers[stage.layer] if stage.layer < len(moe_layers) else self.cell.model.num_layers - 1
        return range(first, last + 1)

    def stage(self, stage: Stage, lane: Lane, pages: Pages, rows: Rows, inbox: Box | None) -> tuple[Lane, Pages, Box]:
        """Combine of the layer before, attention, router; `pages` are those of `layers_of(stage)`."""
        routes = lane.routes
        assert routes is not None
        x, delta = (self.embed(rows), None) if inbox is None else (lane.x, self._combine(inbox, routes))
        x, pages, chosen = self.layers(stage, x, delta, pages, rows)
        if chosen is None:
            return Lane(x, routes), pages, self.exchange.empty_box()
        placement = self.exchange.mesh.placement
        assert placement is not None
        routes = route_rows(
            chosen.topk_idx, chosen.topk_weights, rows.valid.reshape(-1), rows.positions.reshape(-1),
            placement, self.exchange.format.capacity,
        )  # fmt: skip
        return Lane(x, routes), pages, self._dispatch(chosen.rows, routes)

    def embed(self, rows: Rows) -> jax.Array:
        """The residual that a pass starts with: `[tokens, D]`."""
        x = self.half.embed_tokens(rows.token_ids, self.tensor)
        return x.reshape(-1, x.shape[-1]).astype(self.cell.model.dtype)

    def layers(
        self, stage: Stage, x: jax.Array, delta: jax.Array | None, pages: Pages, rows: Rows
    ) -> tuple[jax.Array, Pages, Chosen | None]:
        """The decoder layers of a stage: the residual behind them, their pages, and what the router at the end chose.

        Nothing is chosen in the last stage, the head's. `delta` is what the last experts made, added first.
        """
        chosen, new_pages = None, []
        for layer, kv in zip(self.layers_of(stage), pages, strict=True):
            module = self.half.layers[layer]
            x, kv, chosen = run_layer(decoder_layer, self.cell, module, x, delta, kv, rows)
            new_pages.append(kv)
            delta = None
        return x if delta is None else x + delta.astype(x.dtype), new_pages, chosen

    def last_hidden(self, lane: Lane, rows: Rows) -> jax.Array:
        """Residual of each row's last valid token: `[rows, D]`."""
        x = lane.x.reshape(*rows.token_ids.shape, -1)
        return jnp.take_along_axis(x, rows.last[:, None, None], axis=1)[:, 0]

    def greedy_tokens(self, x: jax.Array) -> jax.Array:
        """The head of a greedy step: residual `[rows, D]` -> the likeliest tokens `[rows]` int32."""
        return self.half.greedy_tokens(x, self.tensor, "xla" if self.cell.kernels == "xla" else None)

    def _dispatch(self, h: jax.Array, routes: Routes) -> Box:
        """Rows `[tokens, D]` into the boxes of the rounds' nodes, each this rank's slice."""
        rounds = self.exchange.rounds
        device = device_index(self.cell.mesh, "attention")
        peer, slice_idx = rows_at(jnp.asarray(rounds.peer), device), rows_at(jnp.asarray(rounds.slice_idx), device)
        node = jnp.maximum(peer, 0)
        order = rows_at(routes.order, node)
        slices = h.reshape(h.shape[0] * rounds.num_slices, -1)
        box = Box(
            hidden=slices,
            topk_weights=rows_at(routes.topk_weights, node),
            local_idx=rows_at(routes.local_idx, node),
            slot=order,
            num_rows=jnp.where(peer >= 0, rows_at(routes.num_rows, node), 0),
            row_index=order * rounds.num_slices + slice_idx[:, None],
        )
        return box if self.cell.mesh.roles_apart else box.gathered()  # a push gathers as it sends

    def _combine(self, box: Box, routes: Routes) -> jax.Array:
        """Partial sums back to their tokens: `[tokens, D]` float32."""
        rounds = self.exchange.rounds
        mine = rounds.round_of[:, : self.cell.mesh.expert, : rounds.num_slices // self.tensor.size]
        round_of = rows_at(jnp.asarray(mine), device_index(self.cell.mesh, "attention"))  # [N, slices]
        partials = jnp.swapaxes(rows_at(box.hidden, round_of), 1, 2)  # [N, capacity, slices, width]
        total = sum_partials(partials.reshape(*partials.shape[:2], -1), routes.position)
        total = self.tensor.gather(total.reshape(total.shape[0], round_of.shape[1], -1))  # [ranks, tokens, slices, w]
        return jnp.moveaxis(total, 0, 2).reshape(total.shape[1], -1)


class ExpertRole:
    """Expert stages over this device's share of the expert half's parameters."""

    def __init__(self, cell: CellConfig, half: ExpertHalf, exchange: Exchange | None):
        self.cell = cell
        self.half = half
        self._exchange = exchange
        self.tensor = TensorGroup.of(cell.mesh, "expert")

    @property
    def exchange(self) -> Exchange:
        """The exchange with the attention mesh; a colocated cell has none."""
        assert self._exchange is not None
        return self._exchange

    def partial_sums(
        self, layer: int, rows: jax.Array, local_idx: jax.Array, topk_weights: jax.Array, *, rounded: bool = False
    ) -> jax.Array:
        """One weighted partial sum a row over this device's share of MoE layer `layer`: `[rows, D]`.

        In float32, or rounded to the rows' dtype where nothing is added to it.
        """
        function = _rounded_sums if rounded else _partial_sums
        return run_layer(function, self.cell, self.half.layers[layer], rows, local_idx, topk_weights)

    def stage(self, stage: Stage, inbox: Box) -> Box:
        """Every replica's rows through this node's experts; one weighted partial sum a row, in the order received."""
        rounds, f = self.exchange.rounds, self.exchange.format
        device = device_index(self.cell.mesh, "expert")
        mine = rounds.round_of[:, : self.cell.mesh.attention, : rounds.num_slices // self.tensor.size]
        round_of = rows_at(jnp.asarray(mine), device)  # [M, slices]
        hidden = self.tensor.gather(rows_at(inbox.hidden, round_of))  # [ranks, M, slices, capacity, width]
        rows = jnp.moveaxis(hidden, (1, 3, 2, 0), (0, 1, 2, 3)).reshape(-1, self.cell.model.hidden_size)
        first = round_of[:, 0]  # every slice brings the same rows' ids and weights
        num_rows = rows_at(inbox.num_rows, first)  # [M]
        valid = jnp.arange(f.capacity, dtype=jnp.int32) < num_rows[:, None]
        local_idx = jnp.where(valid[..., None], rows_at(inbox.local_idx, first), -1)
        topk_weights = rows_at(inbox.topk_weights, first)
        # Rows and weights that were not sent may be anything: a row's sum is of that row alone, and theirs is not sent.
        flat = (local_idx.reshape(len(rows), -1), topk_weights.reshape(len(rows), -1))
        sums = self.partial_sums(stage.layer, rows, *flat, rounded=self.tensor.size == 1)
        sums = self.tensor.sum(sums).astype(f.dtype)  # several ranks add up in float32
        slices = sums.reshape(self.cell.mesh.attention, f.capacity, rounds.num_slices, f.width)
        peer, slice_idx = rows_at(jnp.asarray(rounds.peer), device), rows_at(jnp.asarray(rounds.slice_idx), device)
        replica = jnp.maximum(peer, 0)
        slices = jnp.moveaxis(slices, 2, 1).reshape(-1, f.capacity, f.width)
        back = rows_at(slices, replica * rounds.num_slices + slice_idx)  # [rounds, capacity, width]
        counts = jnp.where(peer >= 0, rows_at(num_rows, replica), 0)
        return dataclasses.replace(self.exchange.empty_box(), hidden=back, num_rows=counts)
