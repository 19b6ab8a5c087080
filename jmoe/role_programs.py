"""The two role programs: what an attention device and an expert device compute in each stage of the schedule.

`walk` takes both through the same schedule with the same exchanges. Which stages a program holds is its `Cast`: one
role (executor `processes`, each process traces its own) or both under a conditional on the device's role (`inline`).
The roles do not know which.
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jmoe.cell_config import CellConfig
from jmoe.models.attention import AttentionHalf
from jmoe.models.experts import ExpertHalf
from jmoe.pallas_kernels.paged_attention import paged_attention, write_pages
from jmoe.rows import Rows
from jmoe.schedule import Exchange as ScheduledExchange
from jmoe.schedule import Schedule, Stage, Tick
from jmoe.sharding.exchange import Box, Chain, Exchange
from jmoe.sharding.mesh_config import AXIS
from jmoe.sharding.routing import Routes, route_rows, rows_at, sum_partials
from jmoe.sharding.tensor_group import TensorGroup

Pages = list[tuple[jax.Array, jax.Array]]  # keys and values of each decoder layer, [P, page_len, G, H]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lane:
    """One micro-batch under way on an attention device: residual `[tokens, D]` and the routes of its last dispatch."""

    x: jax.Array
    routes: Routes


class AttentionRole:
    """Attention stages over this device's share of the attention half's parameters."""

    def __init__(self, cell: CellConfig, half: AttentionHalf, exchange: Exchange):
        self.cell = cell
        self.half = half
        self.exchange = exchange
        self.tensor = TensorGroup.of(cell.mesh, "attention")

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
        if inbox is None:
            x = self.half.embed_tokens(rows.token_ids, self.tensor).reshape(lane.x.shape).astype(lane.x.dtype)
        else:
            x = lane.x + self._combine(inbox, lane.routes).astype(lane.x.dtype)
        routes, box, new_pages = lane.routes, self.exchange.empty_box(), []
        placement = self.exchange.mesh.placement
        assert placement is not None
        for layer, kv in zip(self.layers_of(stage), pages, strict=True):
            module = self.half.layers[layer]
            x, kv = self._attend(module, x, kv, rows)
            new_pages.append(kv)
            h = module.ffn_input(x)
            if module.is_dense:
                x = x + module.dense_ffn(h, self.tensor)
                continue
            topk_idx, topk_weights = module.route(h)
            routes = route_rows(
                topk_idx, topk_weights, rows.valid.reshape(-1), rows.positions.reshape(-1),
                placement, self.exchange.format.capacity,
            )  # fmt: skip
            box = self._dispatch(h, routes)
        return Lane(x, routes), new_pages, box

    def last_hidden(self, lane: Lane, rows: Rows) -> jax.Array:
        """Residual of each row's last valid token: `[rows, D]`."""
        x = lane.x.reshape(*rows.token_ids.shape, -1)
        return jnp.take_along_axis(x, rows.last[:, None, None], axis=1)[:, 0]

    def _attend(self, module, x: jax.Array, kv: tuple[jax.Array, jax.Array], rows: Rows):
        """One layer's attention with its residual; the new keys and values go to their pages first."""
        grid = x.reshape(*rows.token_ids.shape, -1)
        q, k, v = module.project(grid, rows.positions)
        place = (rows.page_table, rows.start_pos, rows.num_tokens)
        k_pages, v_pages = write_pages(kv[0], k, *place), write_pages(kv[1], v, *place)
        heads = paged_attention(
            q, k_pages, v_pages, rows.page_table, rows.start_pos, sliding_window=self.cell.model.sliding_window
        )
        return x + module.output(heads, self.tensor).reshape(x.shape), (k_pages, v_pages)

    def _dispatch(self, h: jax.Array, routes: Routes) -> Box:
        """Rows `[tokens, D]` into the boxes of the rounds' nodes, each this rank's slice."""
        rounds = self.exchange.rounds
        device = jax.lax.axis_index(AXIS)
        peer, slice_idx = rows_at(jnp.asarray(rounds.peer), device), rows_at(jnp.asarray(rounds.slice_idx), device)
        node = jnp.maximum(peer, 0)
        order = rows_at(routes.order, node)
        slices = h.reshape(h.shape[0] * rounds.num_slices, -1)
        return Box(
            hidden=rows_at(slices, order * rounds.num_slices + slice_idx[:, None]),
            topk_weights=rows_at(routes.topk_weights, node),
            local_idx=rows_at(routes.local_idx, node),
            slot=order,
            num_rows=jnp.where(peer >= 0, rows_at(routes.num_rows, node), 0),
        )

    def _combine(self, box: Box, routes: Routes) -> jax.Array:
        """Partial sums back to their tokens: `[tokens, D]` float32."""
        rounds = self.exchange.rounds
        mine = rounds.round_of[:, : self.cell.mesh.expert, : rounds.num_slices // self.tensor.size]
        round_of = rows_at(jnp.asarray(mine), jax.lax.axis_index(AXIS))  # [N, slices]
        partials = jnp.swapaxes(rows_at(box.hidden, round_of), 1, 2)  # [N, capacity, slices, width]
        total = sum_partials(partials.reshape(*partials.shape[:2], -1), routes.position)
        total = self.tensor.gather(total.reshape(total.shape[0], round_of.shape[1], -1))  # [ranks, tokens, slices, w]
        return jnp.moveaxis(total, 0, 2).reshape(total.shape[1], -1)


class ExpertRole:
    """Expert stages over this device's share of the expert half's parameters."""

    def __init__(self, cell: CellConfig, half: ExpertHalf, exchange: Exchange):
        self.cell = cell
        self.half = half
        self.exchange = exchange
        self.tensor = TensorGroup.of(cell.mesh, "expert")

    def stage(self, stage: Stage, inbox: Box) -> Box:
        """Every replica's rows through this node's experts; one weighted partial sum a row, in the order received."""
        rounds, f = self.exchange.rounds, self.exchange.format
        device = jax.lax.axis_index(AXIS)
        mine = rounds.round_of[:, : self.cell.mesh.attention, : rounds.num_slices // self.tensor.size]
        round_of = rows_at(jnp.asarray(mine), device)  # [M, slices]
        hidden = self.tensor.gather(rows_at(inbox.hidden, round_of))  # [ranks, M, slices, capacity, width]
        rows = jnp.moveaxis(hidden, (1, 3, 2, 0), (0, 1, 2, 3)).reshape(-1, self.cell.model.hidden_size)
        first = round_of[:, 0]  # every slice brings the same rows' ids and weights
        num_rows = rows_at(inbox.num_rows, first)  # [M]
        valid = jnp.arange(f.capacity, dtype=jnp.int32) < num_rows[:, None]
        local_idx = jnp.where(valid[..., None], rows_at(inbox.local_idx, first), -1)
        topk_weights = rows_at(inbox.topk_weights, first)
        rows = jnp.where(valid.reshape(-1, 1), rows, 0)
        flat = (local_idx.reshape(len(rows), -1), topk_weights.reshape(len(rows), -1))
        sums = self.tensor.sum(self.half.layers[stage.layer](rows, *flat)).astype(f.dtype)
        slices = sums.reshape(self.cell.mesh.attention, f.capacity, rounds.num_slices, f.width)
        peer, slice_idx = rows_at(jnp.asarray(rounds.peer), device), rows_at(jnp.asarray(rounds.slice_idx), device)
        replica = jnp.maximum(peer, 0)
        slices = jnp.moveaxis(slices, 2, 1).reshape(-1, f.capacity, f.width)
        back = rows_at(slices, replica * rounds.num_slices + slice_idx)  # [rounds, capacity, width]
        counts = jnp.where(peer >= 0, rows_at(num_rows, replica), 0)
        return dataclasses.replace(self.exchange.empty_box(), hidden=back, num_rows=counts)


@dataclasses.dataclass
class Work:
    """What a walk carries on an attention device (empty on an expert device)."""

    lanes: list[Lane]
    rows: list[Rows]
    pages: Pages


class Cast(Protocol):
    """The roles that this program plays."""

    def compute(
        self, attention: Stage | None, expert: Stage | None, work: Work, combined: Box | None, dispatched: Box | None
    ) -> Box | None:
        """Runs what this tick starts (updating `work`) and returns the box that it makes."""
        ...

    def merge(self, outward: Box | None, back: Box | None) -> Box:
        """The box that this device sends in an exchange: outward to experts, or back to attention."""
        ...

    def fences(self, tick: Tick) -> bool:
        """Whether what came before must be done before this tick starts: where a stage of this role starts."""
        ...


class OneRole:
    """A program of one role: the other role's stages are not traced."""

    def __init__(self, attention: AttentionRole | None, expert: ExpertRole | None):
        self.attention = attention
        self.expert = expert
        self.exchange = (attention or expert).exchange  # type: ignore[union-attr]

    def compute(self, attention, expert, work, combined, dispatched):
        if self.attention is not None and attention is not None:
            return _run_attention(self.attention, attention, work, combined)
        if self.expert is not None and expert is not None:
            return self.expert.stage(expert, dispatched)
        return None

    def merge(self, outward, back):
        return (outward if self.attention is not None else back) or self.exchange.empty_box()

    def fences(self, tick):
        return (tick.attention if self.attention is not None else tick.expert) is not None


class BothRoles:
    """A program that every device runs, its role picked by a conditional on the device index."""

    def __init__(self, attention: AttentionRole, expert: ExpertRole):
        self.attention = attention
        self.expert = expert
        self.exchange = attention.exchange

    def is_attention(self) -> jax.Array:
        return jax.lax.axis_index(AXIS) < self.exchange.mesh.num_attention_devices

    def compute(self, attention, expert, work, combined, dispatched):
        def attend(lane, pages, combined, dispatched):
            del dispatched
            if attention is None:
                return lane, pages, self.exchange.empty_box()
            return self.attention.stage(attention, lane, pages, work.rows[attention.micro_batch], combined)

        def serve_experts(lane, pages, combined, dispatched):
            del combined
            return lane, pages, self.exchange.empty_box() if expert is None else self.expert.stage(expert, dispatched)

        lane = work.lanes[attention.micro_batch] if attention else None
        layers = self.attention.layers_of(attention) if attention else range(0)
        pages = [work.pages[layer] for layer in layers]
        lane, pages, box = jax.lax.cond(
            self.is_attention(), attend, serve_experts, lane, pages, combined, dispatched
        )
        if attention:
            _put_back(work, attention, lane, layers, pages)
        return box

    def fences(self, tick):
        # One fence a period for both roles; with two ticks to a stage, the experts' stage starts within it.
        return tick.attention is not None

    def merge(self, outward, back):
        if outward is back or back is None or outward is None:
            return outward or back or self.exchange.empty_box()
        here = self.is_attention()
        return jax.tree.map(lambda a, b: jnp.where(here, a, b), outward, back)


def _run_attention(role: AttentionRole, stage: Stage, work: Work, combined: Box | None) -> Box:
    layers = role.layers_of(stage)
    lane, rows = work.lanes[stage.micro_batch], work.rows[stage.micro_batch]
    lane, pages, box = role.stage(stage, lane, [work.pages[layer] for layer in layers], rows, combined)
    _put_back(work, stage, lane, layers, pages)
    return box


def _put_back(work: Work, stage: Stage, lane: Lane, layers: range, pages: Pages) -> None:
    work.lanes[stage.micro_batch] = lane
    for layer, kv in zip(layers, pages, strict=True):
        work.pages[layer] = kv


def _fence(work: Work, chain: Chain, *waiting: dict[Stage, Any]) -> Chain:
    """Everything under way leaves one barrier together, so nothing after it starts before all of it is there."""
    parts = [list(boxes.values()) for boxes in waiting]
    work.lanes, work.rows, sequence, parts = jax.lax.optimization_barrier(
        (work.lanes, work.rows, chain.sequence, parts)
    )
    for boxes, values in zip(waiting, parts, strict=True):
        boxes.update(zip(list(boxes), values, strict=True))
    return dataclasses.replace(chain, sequence=sequence)


def walk(schedule: Schedule, cast: Cast, exchange: Exchange, work: Work, chain: Chain) -> Chain:
    """One pass over all layers and micro-batches: each tick's exchange first, then what the tick computes.

    Nothing in a tick reads what the same tick makes, so XLA may run its exchange beside its stages. Without a fence it
    also runs every micro-batch's stage before the first exchange, which fills no pipeline.

    Returns:
      The chain; `work` holds the lanes after the last stage and the pages with the new tokens.
    """
    outward: dict[Stage, Box | None] = {}
    back: dict[Stage, Box | None] = {}
    dispatched: dict[Stage, Box] = {}
    combined: dict[Stage, Box] = {}
    for tick in schedule.ticks:
        arrived = None
        if cast.fences(tick):
            chain = _fence(work, chain, outward, back, dispatched, combined)
        if tick.exchange is not None:
            sends: ScheduledExchange = tick.exchange
            box = cast.merge(outward.pop(sends.dispatch, None), back.pop(sends.combine, None))  # type: ignore[arg-type]
            arrived, chain = exchange(
                box, chain, dispatch=sends.dispatch is not None, combine=sends.combine is not None
            )
        if tick.attention is not None or tick.expert is not None:
            before = Stage(tick.attention.layer - 1, tick.attention.micro_batch) if tick.attention else None
            box = cast.compute(
                tick.attention, tick.expert, work,
                combined.pop(before, None) if before else None,
                dispatched.pop(tick.expert) if tick.expert else None,
            )  # fmt: skip
            if tick.attention is not None:
                outward[tick.attention] = box
            if tick.expert is not None:
                back[tick.expert] = box
        if tick.exchange is not None and arrived is not None:
            if tick.exchange.dispatch is not None:
                dispatched[tick.exchange.dispatch] = arrived
            if tick.exchange.combine is not None:
                combined[tick.exchange.combine] = arrived
    return chain
