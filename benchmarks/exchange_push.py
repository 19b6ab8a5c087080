"""The push transport between devices of this process or of several: hops of a ping-pong, one way and two ways.

Each device runs one program of many exchanges; a thread a device starts it. Used by exchange.py, which says what the
figures mean.
"""

import dataclasses
import math
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.sharding.exchange import Box, Chain
from jmoe.sharding.mailboxes import Mailboxes, table_shape
from jmoe.sharding.mesh_config import MeshConfig
from jmoe.sharding.placement import ExpertPlacement
from jmoe.sharding.push_exchange import PushExchange
from jmoe.sharding.routing import route_rows

Pattern = Literal["half_rtt", "one_way", "two_way"]
UNROLL = 8  # exchanges in one turn of the loop: one CUDA graph


@dataclasses.dataclass(frozen=True)
class Case:
    """What is exchanged.

    Args:
      pattern: "half_rtt" is half of a ping-pong; "one_way" and "two_way" let messages follow each other.
      size: bytes of hidden vectors that a pair needs, about.
      routing: "rows" for plain rows, "uniform" or "zipf" for rows chosen by a top-k drawn on the device.
      hidden_size, num_experts, num_experts_per_tok: of the model that is imitated.
      num_nodes: how many nodes its experts stand on, of which the mesh may hold fewer.
      dtype: of the rows, "bfloat16", or "float8_e4m3fn" with a scale a row.
    """

    pattern: Pattern
    size: int
    routing: Literal["rows", "uniform", "zipf"] = "rows"
    hidden_size: int = 2048
    num_experts: int = 128
    num_experts_per_tok: int = 8
    num_nodes: int = 8
    dtype: str = "bfloat16"

    @property
    def row_bytes(self) -> int:
        """Of a hidden vector."""
        return self.hidden_size * jnp.dtype(self.dtype).itemsize

    @property
    def scaled(self) -> bool:
        return jnp.dtype(self.dtype).itemsize == 1

    @property
    def column_bytes(self) -> int:
        """Of what goes with a dispatched row."""
        return 4 * (self.scaled + (self.routing != "rows") * (1 + 2 * self.num_experts_per_tok))

    @property
    def tokens(self) -> int:
        rows = max(1, self.size // self.row_bytes)
        if self.routing == "rows":
            return rows
        reached = 1 - (1 - 1 / self.num_nodes) ** self.num_experts_per_tok  # of tokens, by one node, if uniform
        return math.ceil(rows / reached)

    @property
    def hops(self) -> int:
        """Exchanges of one run: some 3 ms of them, in whole turns of the loop."""
        guess_s = 8e-6 + self.size / 300e9
        return max(3, min(50, int(3e-3 / guess_s) // UNROLL)) * UNROLL


def drawn(case: Case, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """topk_idx and topk_weights `[tokens, k]`, drawn on the device."""
    shape = (case.tokens, case.num_experts)
    logits = jax.random.gumbel(key, shape)
    if case.routing == "zipf":
        rank = jax.random.permutation(jax.random.key(3), case.num_experts) + 1
        logits = logits - jnp.log(rank)
    values, idx = jax.lax.top_k(logits, case.num_experts_per_tok)
    return idx.astype(jnp.int32), jax.nn.softmax(values)


def first_box(case: Case, exchange: PushExchange, device: int) -> Box:
    """What a device sends: rows in order, or an index of the rows that each present node needs."""
    key, rounds = jax.random.key(device), exchange.rounds.num_rounds
    x = jax.random.normal(key, (case.tokens, case.hidden_size), jnp.bfloat16).astype(case.dtype)
    scales = jax.random.normal(key, (rounds, case.tokens)) if case.scaled else None
    box = dataclasses.replace(exchange.empty_box(), row_scales=scales)
    if case.routing == "rows" or exchange.mesh.role(device) != "attention":
        hidden = jnp.broadcast_to(x, (rounds, *x.shape))
        return dataclasses.replace(box, hidden=hidden, num_rows=jnp.full((rounds,), case.tokens, jnp.int32))
    placement = ExpertPlacement.balanced(case.num_experts, case.num_nodes)
    idx, weights = drawn(case, key)
    tokens = jnp.arange(case.tokens, dtype=jnp.int32)
    routes = route_rows(idx, weights, tokens >= 0, tokens, placement, case.tokens)
    node = jnp.asarray(exchange.rounds.peer[device])
    return Box(
        hidden=x, topk_weights=routes.topk_weights[node], local_idx=routes.local_idx[node], slot=routes.order[node],
        num_rows=routes.num_rows[node], row_index=routes.order[node], row_scales=scales,
    )  # fmt: skip


def _with_scales(box: Box, case: Case) -> Box:
    return dataclasses.replace(box, row_scales=jnp.zeros_like(box.topk_weights[..., 0])) if case.scaled else box


def program(case: Case, exchange: PushExchange, hops: int) -> Any:
    """(table, sequence, box) -> (last box that arrived, faults, sequence) after `hops` exchanges each way or one."""
    attention = exchange.role == "attention"
    pattern = case.pattern

    ahead = int(pattern == "half_rtt" and not attention)  # experts take one dispatch before they send a combine

    def start(number, table):
        chain = Chain.start(number, mailbox=table)
        return dataclasses.replace(chain, count=ahead, dispatches=ahead)

    def exchanges(count, number, got, table, box):
        """`count` of them: the next number, what came last, and the last faults (a device out of step stays so)."""
        chain = start(number, table)
        for _ in range(count):
            if pattern == "one_way":
                got, chain = exchange(box, chain, dispatch=True, combine=False)
            else:
                got, chain = exchange(got if ahead else box, chain, dispatch=True, combine=True)
        return chain.sequence, got, chain.faults[-1]

    def run(table, sequence, box):
        got, number = _with_scales(exchange.empty_box(), case), sequence
        first = jnp.full((1, 2), -1, jnp.int32)
        if ahead:
            got, chain = exchange(box, Chain.start(number, mailbox=table), dispatch=True, combine=False)
            number, first = chain.sequence, chain.faults[-1]
        number, got, fault = exchanges(UNROLL, number, got, table, box)

        def turn(_, carry):
            number, got, _ = carry
            return exchanges(UNROLL, number, got, table, box)

        number, got, fault = jax.lax.fori_loop(0, hops // UNROLL - 1 - ahead, turn, (number, got, fault))
        faults = [first, fault]
        if ahead:
            number, got, fault = exchanges(UNROLL - 1, number, got, table, box)
            _, chain = exchange(got, start(number, table), dispatch=False, combine=True)
            number, faults = chain.sequence, [*faults, fault, chain.faults[-1]]
        return got, jnp.max(jnp.concatenate(faults), axis=0), number

    return run


@dataclasses.dataclass
class Device:
    """One device's share of a case."""

    index: int
    device: jax.Device
    exchange: PushExchange
    run: Any = None
    check: Any = None
    box: Any = None
    sequence: Any = None


class PushCase:
    """A case, compiled for the devices that this process holds.

    Args:
      case: what to exchange.
      mesh: the devices of all processes.
      devices: (index, device) of this process's.
    """

    def __init__(self, case: Case, mesh: MeshConfig, devices: list[tuple[int, jax.Device]]):
        self.case, self.mesh = case, mesh
        exchange = PushExchange.of(mesh, case.hidden_size, case.tokens, case.num_experts_per_tok, case.dtype)
        exchange = dataclasses.replace(exchange, scaled=case.scaled)
        self.devices = [Device(i, d, exchange.playing(mesh.role(i))) for i, d in devices]
        self.slot_bytes = exchange.slot_bytes

    def compile(self) -> None:
        """Draws the boxes and compiles every device's program; releases the GIL: cases may compile side by side."""
        for d in self.devices:
            with jax.default_device(d.device):
                box = jax.jit(lambda d=d: first_box(self.case, d.exchange, d.index))()
            d.box, d.sequence = jax.device_put((box, jnp.int32(0)), d.device)
            table = jax.device_put(jnp.zeros(table_shape(self.mesh), jnp.int32), d.device)
            d.run = jax.jit(program(self.case, d.exchange, self.case.hops)).lower(table, d.sequence, d.box).compile()
            place = jax.sharding.SingleDeviceSharding(d.device)
            got = jax.tree.map(
                lambda a, place=place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place),
                jax.eval_shape(lambda d=d: self._empty(d.exchange)),
            )
            d.check = jax.jit(lambda got, d=d: self._mistakes(d, got)).lower(got).compile()

    def measure(self, mailboxes: Mailboxes, meet: Callable[[], Any], repeats: int = 5) -> dict[str, Any]:
        """Runs it some times; the median time of a hop, and what was wrong.

        Args:
          mailboxes: connected.
          meet: called before each run; returns when all processes are there.
        """
        tables = {d.index: jax.device_put(mailboxes.table(d.index), d.device) for d in self.devices}
        times: list[float] = []
        outputs: dict[int, Any] = {}
        for _ in range(repeats + 1):
            meet()
            begin = time.perf_counter()
            outputs = self._run_all(tables)
            times.append((time.perf_counter() - begin) / self._hops())
        wrong = [what for d in self.devices if (what := self._wrong(d, *outputs[d.index][:2]))]
        return {"us": statistics.median(times[1:]) * 1e6, "least_us": min(times[1:]) * 1e6, "wrong": wrong}

    def _empty(self, exchange: PushExchange) -> Box:
        return _with_scales(exchange.empty_box(), self.case)

    def rows_sent(self) -> list[int]:
        """Rows of each dispatch of this process's attention devices."""
        return [int(n) for d in self.devices if d.exchange.role == "attention" for n in d.box.num_rows]

    def _hops(self) -> int:
        return self.case.hops * (2 if self.case.pattern == "half_rtt" else 1)

    def _run_all(self, tables: dict[int, jax.Array]) -> dict[int, Any]:
        outputs: dict[int, Any] = {}

        def one(d: Device) -> None:
            outputs[d.index] = jax.block_until_ready(d.run(tables[d.index], d.sequence, d.box))

        threads = [threading.Thread(target=one, args=(d,)) for d in self.devices]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for d in self.devices:
            d.sequence = outputs[d.index][2]
        return outputs

    def _wrong(self, d: Device, got: Box, fault: jax.Array) -> str:
        if (pair := np.asarray(fault)).max() >= 0:
            return f"device {d.index}: fault (expected, got) {pair.tolist()}"
        mistakes = np.asarray(d.check(got)).tolist()
        return f"device {d.index}: wrong counts, elements by round: {mistakes}" if np.any(mistakes) else ""

    def _mistakes(self, d: Device, got: Box) -> jax.Array:
        """`[meetings, 2]`: is the row count wrong, and how many elements differ from what the peer drew."""
        back, found = self.case.pattern == "half_rtt", []
        attention = d.exchange.role == "attention"
        for r, pairs in enumerate(d.exchange.rounds.pairs):
            for a, e in pairs:
                if d.index not in (a, e) or (attention and self.case.pattern == "one_way"):
                    continue
                sent = first_box(self.case, d.exchange, e if attention and not back else a).gathered()
                rows = jnp.arange(self.case.tokens)[:, None] < sent.num_rows[r]
                names = ("hidden",) if attention else ("hidden", "topk_weights", "local_idx", "slot")
                names += ("row_scales",) if self.case.scaled else ()
                differ = [
                    jnp.sum((getattr(got, n)[r] != getattr(sent, n)[r]).reshape(self.case.tokens, -1) & rows)
                    for n in names
                ]
                found.append(jnp.stack([(got.num_rows[r] != sent.num_rows[r]).astype(jnp.int32), sum(differ)]))
        return jnp.stack(found) if found else jnp.zeros((1, 2), jnp.int32)
