"""The walk: both roles through the same schedule with the same exchanges.

Which stages a program holds is its `Cast`: one role (executor `processes`, each process traces its own) or both under
a conditional on the device's role (`inline`).
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jmoe.role_programs import AttentionRole, ExpertRole, Lane, Pages
from jmoe.rows import Rows
from jmoe.schedule import Exchange as ScheduledExchange
from jmoe.schedule import Schedule, Stage, Tick
from jmoe.sharding.exchange import Box, Chain, Exchange
from jmoe.sharding.mesh_config import AXIS


@dataclasses.dataclass
class Work:
    """What a walk carries on an attention device (empty on an expert device)."""

    lanes: list[Lane]
    rows: list[Rows]
    pages: Pages


class Cast(Protocol):
    """The roles that this program plays; None for one that it does not."""

    attention: AttentionRole | None
    expert: ExpertRole | None

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

    def ticks(self, schedule: Schedule) -> tuple[Tick, ...]:
        """What this program walks of a schedule."""
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

    def ticks(self, schedule):
        return schedule.ticks_of("attention" if self.attention is not None else "expert")


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
        lane, pages, box = jax.lax.cond(self.is_attention(), attend, serve_experts, lane, pages, combined, dispatched)
        if attention:
            _put_back(work, attention, lane, layers, pages)
        return box

    def fences(self, tick):
        # One fence a period for both roles; with two ticks to a stage, the experts' stage starts within it.
        return tick.attention is not None

    def ticks(self, schedule):
        return schedule.ticks

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

    Where the roles call exchanges together, nothing in a tick reads what the same tick makes, so XLA may run its
    exchange beside its stages. Without a fence it also runs every micro-batch's stage before the first exchange, which
    fills no pipeline. With "separate" directions a stage waits for the exchange before it, and the fence stands between
    them: what was made goes out before the next stage starts, on the one stream that the device has for both.

    Returns:
      The chain; `work` holds the lanes after the last stage and the pages with the new tokens.
    """
    outward: dict[Stage, Box | None] = {}
    back: dict[Stage, Box | None] = {}
    dispatched: dict[Stage, Box] = {}
    combined: dict[Stage, Box] = {}
    apart = schedule.directions == "separate"
    for tick in cast.ticks(schedule):
        if cast.fences(tick) and not apart:
            chain = _fence(work, chain, outward, back, dispatched, combined)
        if tick.exchange is not None:
            sends: ScheduledExchange = tick.exchange
            box = cast.merge(outward.pop(sends.dispatch, None), back.pop(sends.combine, None))  # type: ignore[arg-type]
            arrived, chain = exchange(
                box, chain, dispatch=sends.dispatch is not None, combine=sends.combine is not None
            )
            if sends.dispatch is not None and cast.expert is not None:
                dispatched[sends.dispatch] = arrived
            if sends.combine is not None and cast.attention is not None:
                combined[sends.combine] = arrived
        if cast.fences(tick) and apart:
            chain = _fence(work, chain, outward, back, dispatched, combined)
        if tick.attention is not None or tick.expert is not None:
            before = Stage(tick.attention.layer - 1, tick.attention.micro_batch) if tick.attention else None
            box = cast.compute(
                tick.attention, tick.expert, work,
                combined.pop(before, None) if before else None,
                dispatched.pop(tick.expert, None) if tick.expert else None,
            )  # fmt: skip
            if tick.attention is not None:
                outward[tick.attention] = box
            if tick.expert is not None:
                back[tick.expert] = box
    return chain
