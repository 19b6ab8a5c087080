"""Stage timing: T_a, T_e and T_c of a cell, each measured alone on the devices at hand.

In one program for both roles ("ppermute") every device runs a stage, those of the other role on idle buffers. With
roles apart ("push") only the stage's own devices do.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.cell_config import CellConfig
from jmoe.cell_runtime import CellRuntime
from jmoe.decode_batch import decode_batch
from jmoe.decode_loop import DeviceState
from jmoe.models.attention import AttentionHalf
from jmoe.models.experts import ExpertHalf
from jmoe.models.model import take_from
from jmoe.role_pair import RolePair
from jmoe.role_programs import AttentionRole, ExpertRole
from jmoe.rows import Rows
from jmoe.schedule import Stage
from jmoe.sharding.exchange import Box, Chain, Exchange
from jmoe.sharding.transports import exchange_of
from jmoe.step_inputs import StepLayout

SPAN_S, MOST_CALLS = 0.1, 32  # timed in a row: on an H200 an expert stage of 663 us took 718 in a call by itself


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


def time_stages(runtime: CellRuntime | RolePair, context: int, repeats: int = 5) -> StageTimes:
    """Every stage of a cell's decode step, all programs compiled side by side; see `StageTimer`."""
    timer = StageTimer(runtime, context, repeats)
    timer.compile("attention", "expert", "exchange", "exchange_both", "head")
    return StageTimes(
        timer.attention_s(), timer.expert_s(), timer.exchange_s(), timer.exchange_s(combine=True), timer.head_s()
    )


class StageTimer:
    """Measures the stages of a cell's decode step on loaded weights, one at a time.

    A stage is run for every layer in a chain of data inside one call, so that weights come from memory and not from a
    cache; a call of one stage is taken off, which leaves the launch out. With roles apart each stage runs on its own
    role's devices alone, and one exchange is half a round trip: rows out, rows back.

    Args:
      runtime: with role "inline", or a pair; with weights loaded.
      context: tokens that each row's pages hold.
      repeats: timed calls; the median counts.
    """

    def __init__(self, runtime: CellRuntime | RolePair, context: int, repeats: int = 5):
        self._pair = runtime if isinstance(runtime, RolePair) else None
        attention, expert = (runtime.attention, runtime.expert) if isinstance(runtime, RolePair) else (runtime,) * 2
        self._runtimes: dict[str, CellRuntime] = {"attention": attention, "expert": expert}
        self.cell = runtime.cell
        self.repeats = repeats
        self._batch = decode_batch(self.cell, context).array
        self._layout = StepLayout.of(self.cell, "decode")
        model, layers = self.cell.model, len(self.cell.model.moe_layers)
        self._exchanges = {
            role: exchange_of(
                self.cell.mesh, role, model.hidden_size, self.cell.rows, model.num_experts_per_tok, model.dtype
            )
            for role in ("attention", "expert")
        }
        swap = {both: functools.partial(self._swap, both) for both in (False, True)}
        self._stages: dict[str, tuple[int, dict[str, Callable]]] = {  # (repetitions, function of a role by role)
            "attention": (layers, {"attention": self._attention}),
            "expert": (layers, {"expert": self._experts}),
            "head": (5, {"attention": self._head}),
            "exchange": (33, {role: functools.partial(swap[False], role) for role in self._exchanges}),
            "exchange_both": (33, {role: functools.partial(swap[True], role) for role in self._exchanges}),
        }
        self._compiled: dict[tuple[str, int], Callable[[], object]] = {}

    def attention_s(self) -> float:
        """One layer's attention stage of one micro-batch."""
        return self._slope("attention")

    def expert_s(self) -> float:
        """One layer's expert stage of one micro-batch."""
        return self._slope("expert")

    def exchange_s(self, combine: bool = False) -> float:
        """One exchange: a dispatch, or with `combine` both directions at once."""
        return self._slope("exchange_both" if combine else "exchange")

    def head_s(self) -> float:
        """Final norm, logits and argmax of one micro-batch."""
        return self._slope("head")

    @property
    def num_bytes(self) -> int:
        """Bytes that one attention device sends in a dispatch, every row going to every node."""
        exchange = self._exchanges["attention"]
        meetings = int((exchange.rounds.peer[0] >= 0).sum())
        return 4 * exchange.format.dispatch_words * meetings

    def compile(self, *names: str) -> None:
        """Compiles stages side by side (XLA leaves the interpreter's lock)."""
        wanted = [(name, n) for name in names for n in (1, self._stages[name][0]) if (name, n) not in self._compiled]
        with ThreadPoolExecutor(max(len(wanted), 1)) as pool:
            self._compiled |= dict(zip(wanted, pool.map(lambda key: self._compile(*key), wanted), strict=True))

    def _compile(self, name: str, count: int) -> Callable[[], object]:
        """A call of a stage `count` times over, on the devices of the roles that have a part in it."""
        calls = {
            role: self._runtimes[role].measure(functools.partial(function, count), self._batch)
            for role, function in self._stages[name][1].items()
            if self._pair is not None or role == "attention" or name == "expert"  # one program has both roles
        }
        if self._pair is not None and len(calls) == 2:
            return functools.partial(self._pair.together, calls["attention"], calls["expert"])
        (call,) = calls.values()
        return call

    def _slope(self, name: str) -> float:
        """Seconds of one more repetition."""
        self.compile(name)
        count = self._stages[name][0]
        few, many = (_median_s(self._compiled[name, n], self.repeats) for n in (1, count))
        return max(many - few, 1e-9) / (count - 1)  # positive: on a noisy host a short stage drowns

    def _attention_role(self, params) -> AttentionRole:
        return AttentionRole(self.cell, AttentionHalf(self.cell.model, take_from(params)), self._exchanges["attention"])

    def _attention(self, count: int, params, experts, state: DeviceState, inputs):
        role, rows = self._attention_role(params), Rows.unpack(inputs[0], self._layout)
        lane, box, all_pages = role.empty_lane(), None, list(state.pages or [])
        back = _received(role.exchange, self.cell, state)
        for j in range(count):
            stage = Stage(j, 0)
            layers = role.layers_of(stage)
            inbox = back if j else None
            lane, pages, box = role.stage(stage, lane, [all_pages[layer] for layer in layers], rows, inbox)
            lane, box, back = jax.lax.optimization_barrier((lane, box, back))
            for layer, kv in zip(layers, pages, strict=True):
                all_pages[layer] = kv
        return dataclasses.replace(state, pages=all_pages), (lane.x, box)

    def _experts(self, count: int, params, experts, state: DeviceState, inputs):
        role = ExpertRole(self.cell, ExpertHalf(self.cell.model, take_from(experts)), self._exchanges["expert"])
        box = _received(role.exchange, self.cell, state)
        for j in range(count):
            out = jax.lax.optimization_barrier(role.stage(Stage(j, 0), box))
            box = dataclasses.replace(box, hidden=out.hidden)
        return state, box

    def _swap(self, both: bool, role: str, count: int, params, experts, state: DeviceState, inputs):
        """`count` exchanges; with roles apart and not `both`, `count` round trips of which half counts."""
        exchange, chain = self._exchanges[role], Chain.start(state.sequence, mailbox=state.mailbox)
        box = _received(exchange, self.cell, state)
        calls = [{"dispatch": True, "combine": both}] * count
        if self._pair is not None and not both:
            calls = [{"dispatch": True, "combine": True}] * (count // 2)
            if role == "expert":  # it answers: its first call brings rows, its last sends them back
                calls = [{"dispatch": True, "combine": False}, *calls[1:], {"dispatch": False, "combine": True}]
        for call in calls or [{"dispatch": True, "combine": True}]:
            got, chain = exchange(box, chain, **call)
            hidden, sequence = jax.lax.optimization_barrier((got.hidden, chain.sequence))
            box, chain = dataclasses.replace(box, hidden=hidden), dataclasses.replace(chain, sequence=sequence)
        return state, (box.hidden, chain.sequence)

    def _head(self, count: int, params, experts, state: DeviceState, inputs):
        role, rows = self._attention_role(params), Rows.unpack(inputs[0], self._layout)
        x = role.half.embed_tokens(rows.token_ids, role.tensor)[:, 0]
        for _ in range(count):
            x = jax.lax.optimization_barrier(x + role.greedy_tokens(x)[:, None].astype(x.dtype) * 0)
        return state, x


def _received(exchange: Exchange, cell: CellConfig, state: DeviceState) -> Box:
    """A box as an expert node gets it: full rows, experts drawn uniformly, its contents unknown to the compiler."""
    model, placement = cell.model, cell.mesh.placement
    assert placement is not None
    rng = np.random.default_rng(1)
    shape = exchange.empty_box().local_idx.shape
    drawn = np.stack([
        rng.permutation(model.num_experts)[: shape[-1]] for _ in range(int(np.prod(shape[:-1])))
    ]).reshape(shape)  # fmt: skip
    here = drawn < placement.max_local_experts
    unknown = (state.sequence < 0).astype(jnp.int32)  # 0, but only at run time
    return dataclasses.replace(
        exchange.empty_box(),
        hidden=jnp.full_like(exchange.empty_box().hidden, 0.01) + unknown.astype(exchange.format.dtype),
        topk_weights=jnp.full(shape, 1 / shape[-1]) + unknown,
        local_idx=jnp.asarray(np.where(here, drawn, -1), jnp.int32) + unknown,
        num_rows=jnp.full(shape[:1], shape[1], jnp.int32) + unknown,
    )


def _median_s(call: Callable[[], object], repeats: int) -> float:
    """Of one call among several that follow each other at once: the device neither idles nor waits for launches."""
    jax.block_until_ready(call())
    count = max(1, min(MOST_CALLS, int(SPAN_S / _seconds(call, 1))))
    return statistics.median([_seconds(call, count) for _ in range(repeats + 1)][1:]) / count


def _seconds(call: Callable[[], object], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count - 1):
        call()
    jax.block_until_ready(call())
    return time.perf_counter() - start
