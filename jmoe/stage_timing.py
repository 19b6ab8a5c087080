"""Stage timing: T_a, T_e and T_c of a cell, each measured alone on the devices at hand.

Every device runs the stage of the role that it plays in the cell; the other role's devices run it too, on idle buffers.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.cell_runtime import CellRuntime
from jmoe.decode_batch import decode_batch
from jmoe.decode_loop import DeviceState
from jmoe.models.attention import AttentionHalf
from jmoe.models.experts import ExpertHalf
from jmoe.models.model import take_from
from jmoe.role_programs import AttentionRole, ExpertRole
from jmoe.rows import Rows
from jmoe.schedule import Stage
from jmoe.sharding.exchange import Box, Chain, Exchange
from jmoe.step_inputs import StepLayout


@dataclasses.dataclass(frozen=True, slots=True)
class StageTimes:
    """Seconds of one stage of one micro-batch.

    Attributes:
      attention_s: attention of one MoE layer, from combine to router.
      expert_s: the experts of one layer.
      exchange_s: one exchange in one direction. exchange_both_s: one in both.
      head_s: final norm, logits and argmax.
    """

    attention_s: float
    expert_s: float
    exchange_s: float
    exchange_both_s: float
    head_s: float


def time_stages(runtime: CellRuntime, context: int, repeats: int = 5) -> StageTimes:
    """Every stage of a cell's decode step; see `StageTimer`."""
    timer = StageTimer(runtime, context, repeats)
    return StageTimes(
        timer.attention_s(), timer.expert_s(), timer.exchange_s(), timer.exchange_s(combine=True), timer.head_s()
    )


class StageTimer:
    """Measures the stages of a cell's decode step on loaded weights, one at a time.

    A stage is run for every layer in a chain of data inside one call, so that weights come from memory and not from a
    cache; a call of one stage is taken off, which leaves the launch out.

    Args:
      runtime: with role "inline" and weights loaded.
      context: tokens that each row's pages hold.
      repeats: timed calls; the median counts.
    """

    def __init__(self, runtime: CellRuntime, context: int, repeats: int = 5):
        self.runtime = runtime
        self.cell = runtime.cell
        self.repeats = repeats
        model = self.cell.model
        self._batch = decode_batch(self.cell, context).array
        self._layout = StepLayout.of(self.cell, "decode")
        self._exchange = Exchange.of(
            self.cell.mesh, model.hidden_size, self.cell.rows, model.num_experts_per_tok, model.dtype
        )

    def attention_s(self) -> float:
        """One layer's attention stage of one micro-batch."""
        return self._slope(self._attention, len(self.cell.model.moe_layers))

    def expert_s(self) -> float:
        """One layer's expert stage of one micro-batch."""
        return self._slope(self._experts, len(self.cell.model.moe_layers))

    def exchange_s(self, combine: bool = False) -> float:
        """One exchange: a dispatch, or with `combine` both directions at once."""
        return self._slope(functools.partial(self._exchanges, combine), 33)

    def head_s(self) -> float:
        """Final norm, logits and argmax of one micro-batch."""
        return self._slope(self._head, 5)

    @property
    def num_bytes(self) -> int:
        """Bytes that one attention device sends in a dispatch."""
        meetings = int((self._exchange.rounds.peer[0] >= 0).sum())
        return 4 * self._exchange.format.dispatch_words * meetings

    def _slope(self, function: Callable, count: int) -> float:
        """Seconds of one more repetition."""
        few, many = (
            _median_s(self.runtime.measure(functools.partial(function, n), self._batch), self.repeats)
            for n in (1, count)
        )
        return max(many - few, 1e-9) / (count - 1)  # positive: on a noisy host a short stage drowns

    def _attention(self, count: int, params, experts, state: DeviceState, inputs):
        role, rows = _attention_role(self.runtime, params, self._exchange), Rows.unpack(inputs[0], self._layout)
        lane, box, all_pages = role.empty_lane(), None, list(state.pages or [])
        for j in range(count):
            stage = Stage(j, 0)
            layers = role.layers_of(stage)
            lane, pages, box = role.stage(stage, lane, [all_pages[layer] for layer in layers], rows, box)
            lane, box = jax.lax.optimization_barrier((lane, box))
            for layer, kv in zip(layers, pages, strict=True):
                all_pages[layer] = kv
        return dataclasses.replace(state, pages=all_pages), (lane.x, box)

    def _experts(self, count: int, params, experts, state: DeviceState, inputs):
        role = ExpertRole(self.cell, ExpertHalf(self.cell.model, take_from(experts)), self._exchange)
        box = _received(self._exchange, self.runtime, inputs)
        for j in range(count):
            out = jax.lax.optimization_barrier(role.stage(Stage(j, 0), box))
            box = dataclasses.replace(box, hidden=out.hidden)
        return state, box

    def _exchanges(self, combine: bool, count: int, params, experts, state: DeviceState, inputs):
        box, chain = _received(self._exchange, self.runtime, inputs), Chain.start(state.sequence)
        for _ in range(count):
            got, chain = self._exchange(box, chain, dispatch=True, combine=combine)
            hidden, sequence = jax.lax.optimization_barrier((got.hidden, chain.sequence))
            box, chain = dataclasses.replace(box, hidden=hidden), dataclasses.replace(chain, sequence=sequence)
        return state, (box.hidden, chain.sequence)

    def _head(self, count: int, params, experts, state: DeviceState, inputs):
        role, rows = _attention_role(self.runtime, params, self._exchange), Rows.unpack(inputs[0], self._layout)
        x = role.half.embed_tokens(rows.token_ids, role.tensor)[:, 0]
        for _ in range(count):
            logits = role.half.logits(x, role.tensor)
            x = jax.lax.optimization_barrier(x + jnp.argmax(logits, axis=-1, keepdims=True).astype(x.dtype) * 0)
        return state, x


def _attention_role(runtime: CellRuntime, params, exchange: Exchange) -> AttentionRole:
    return AttentionRole(runtime.cell, AttentionHalf(runtime.cell.model, take_from(params)), exchange)


def _received(exchange: Exchange, runtime: CellRuntime, inputs: jax.Array) -> Box:
    """A box as an expert node gets it: full rows, experts drawn uniformly, its contents unknown to the compiler."""
    model, mesh = runtime.cell.model, runtime.cell.mesh
    assert mesh.placement is not None
    rng = np.random.default_rng(1)
    shape = exchange.empty_box().local_idx.shape
    drawn = np.stack([
        rng.permutation(model.num_experts)[: shape[-1]] for _ in range(int(np.prod(shape[:-1])))
    ]).reshape(shape)  # fmt: skip
    here = drawn < mesh.placement.max_local_experts
    unknown = (inputs.max() < -1).astype(jnp.int32)  # 0, but only at run time
    return dataclasses.replace(
        exchange.empty_box(),
        hidden=jnp.full_like(exchange.empty_box().hidden, 0.01) + unknown.astype(exchange.format.dtype),
        topk_weights=jnp.full(shape, 1 / shape[-1]) + unknown,
        local_idx=jnp.asarray(np.where(here, drawn, -1), jnp.int32) + unknown,
        num_rows=jnp.full(shape[:1], shape[1], jnp.int32) + unknown,
    )


def _median_s(call: Callable[[], object], repeats: int) -> float:
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return statistics.median(times)
