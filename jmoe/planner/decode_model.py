"""Times of a decoding deployment, drawn iteration by iteration: growing sequences, routing, stragglers. No JAX."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import numpy as np

from jmoe.planner.decode_batch import DecodeBatch
from jmoe.planner.exchange_times import ExchangeTimes
from jmoe.planner.lanes import Carrier, PassTimes
from jmoe.planner.message_transfer import MessageTransfer
from jmoe.planner.network import Network
from jmoe.planner.network_options import NetworkOptions
from jmoe.planner.performance import StageTimes
from jmoe.planner.routing import NodeTraffic, Routing, count_rows, draw_topk
from jmoe.planner.stragglers import Stragglers
from jmoe.planner.workload import Workload
from jmoe.schedule import Schedule
from jmoe.sharding.placement import ExpertPlacement


@dataclasses.dataclass(frozen=True)
class DecodeModel:
    """C equal cells that decode: what `simulate` asks for times. A `TimeModel`.

    Attributes:
      stage_times: seconds of a stage from its rows and context (a roofline or a profile).
      workload: request lengths; slots are refilled at once.
      num_cells, attention, expert: C, M and N.
      attention_tensor, expert_tensor: ranks of a replica and of a node.
      rows: requests of one micro-batch of one replica, B.
      num_experts_per_tok: k.
      placement: which node holds which experts.
      exchange: `ExchangeTimes` draws totals per device (any size); `NetworkOptions` draws every token and moves every
        message (small cells; equal tensor sizes).
      row_bytes: of one row on the wire; used with `NetworkOptions`.
      routing: expert popularity.
      attention_stragglers, expert_stragglers: slow devices.
      num_dense_layers: layers without experts, run in front of the first attention stage.
      start: whether the batch starts in its steady state or with fresh prompts.

    Raises:
      ValueError: a count below 1, a placement for another number of nodes, or tensor sizes that differ where messages
        are simulated.
    """

    stage_times: StageTimes
    workload: Workload
    attention: int
    expert: int
    rows: int
    num_experts_per_tok: int
    placement: ExpertPlacement
    exchange: ExchangeTimes | NetworkOptions
    num_cells: int = 1
    attention_tensor: int = 1
    expert_tensor: int = 1
    row_bytes: int = 0
    routing: Routing = dataclasses.field(default_factory=Routing)
    attention_stragglers: Stragglers = dataclasses.field(default_factory=Stragglers)
    expert_stragglers: Stragglers = dataclasses.field(default_factory=Stragglers)
    num_dense_layers: int = 0
    start: Literal["steady", "fresh"] = "steady"

    def __post_init__(self):
        for name in ("attention", "expert", "rows", "num_cells", "attention_tensor", "expert_tensor"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"DecodeModel.{name}: expected at least 1, got {value}")
        if self.placement.num_nodes != self.expert:
            raise ValueError(
                f"DecodeModel.placement: expected {self.expert} nodes (expert), got {self.placement.num_nodes}"
            )
        if not 1 <= self.num_experts_per_tok <= self.placement.num_experts:
            raise ValueError(
                f"DecodeModel.num_experts_per_tok: expected 1 to {self.placement.num_experts}, "
                f"got {self.num_experts_per_tok}"
            )
        if isinstance(self.exchange, NetworkOptions):
            if self.attention_tensor != self.expert_tensor:
                raise ValueError(
                    f"DecodeModel.exchange: expected equal tensor sizes where messages are simulated, got "
                    f"{self.attention_tensor} and {self.expert_tensor}; use ExchangeTimes"
                )
            if self.row_bytes < 1:
                raise ValueError(f"DecodeModel.row_bytes: expected at least 1, got {self.row_bytes}")

    @property
    def num_gpus(self) -> int:
        """GPUs of all cells."""
        return self.num_cells * (self.attention * self.attention_tensor + self.expert * self.expert_tensor)

    def tokens_per_iteration(self, num_micro_batches: int) -> float:
        """Output tokens of one iteration over all cells."""
        return float(self.num_cells * self.attention * self.rows * num_micro_batches)

    def passes(self, schedule: Schedule, seed: int) -> Iterator[PassTimes]:
        """Draws pass after pass; each advances every sequence by one token."""
        rng = np.random.default_rng(seed)
        layers, m, cells = schedule.num_layers, schedule.num_micro_batches, self.num_cells
        batch = DecodeBatch(self.workload, (m, cells, self.attention, self.rows), rng, self.start)
        popularity = self.routing.popularity(layers, self.placement.num_experts, seed)
        traffic = NodeTraffic.of(popularity, self.num_experts_per_tok, self.placement)
        slow_a = self.attention_stragglers.factors(rng, cells, self.attention, self.attention_tensor)
        slow_e = self.expert_stragglers.factors(rng, cells, self.expert, self.expert_tensor)
        local = np.array([len(node) for node in self.placement.nodes])
        networks = self._networks(seed)
        while True:
            attention_s = self._attention_s(layers, batch.mean_context()) * slow_a
            self.attention_stragglers.add_hiccups(rng, attention_s, self.attention_tensor)
            pairs, dispatch, combine = self._exchange(rng, m, popularity, traffic, networks)
            expert_s = np.asarray(self.stage_times.expert_s(pairs, local, self.expert_tensor)) * slow_e
            self.expert_stragglers.add_hiccups(rng, expert_s, self.expert_tensor)
            yield PassTimes(attention_s, expert_s, dispatch, combine)
            batch.advance()

    def _attention_s(self, layers: int, context: np.ndarray) -> np.ndarray:
        """`[L + 1, m, C, M]`: every layer sees the same contexts; dense layers run in front, the head at the end."""
        times, tensor = self.stage_times, self.attention_tensor
        result = np.empty((layers + 1, *context.shape))
        result[:layers] = times.attention_s(self.rows, context, tensor)
        if self.num_dense_layers:
            result[0] += self.num_dense_layers * times.dense_s(self.rows, context, tensor)
        result[layers] = times.head_s(self.rows, tensor)
        return result

    def _networks(self, seed: int) -> tuple[list[Network], list[Network]]:
        """A network a cell and direction, where messages are simulated."""
        if not isinstance(self.exchange, NetworkOptions):
            return [], []
        devices, seeds = self.attention + self.expert, range(seed * self.num_cells, (seed + 1) * self.num_cells)
        dispatch, combine = ([Network(self.exchange, devices, s) for s in seeds] for _ in range(2))
        return dispatch, combine

    def _exchange(
        self,
        rng: np.random.Generator,
        m: int,
        popularity: np.ndarray,
        traffic: NodeTraffic,
        networks: tuple[list[Network], list[Network]],
    ) -> tuple[np.ndarray, Carrier, Carrier]:
        """(token, expert) pairs per node `[L, m, C, N]`, and how rows go out and come back."""
        if isinstance(self.exchange, NetworkOptions):
            return self._messages(rng, m, popularity, self.exchange, networks)
        received, pairs = traffic.draw(rng, m, self.num_cells, self.attention * self.rows)
        share = received.sum(axis=-1, keepdims=True) / self.attention  # a sender's part of all rows, in the mean
        sent = np.broadcast_to(share, (*share.shape[:3], self.attention))
        return pairs, *self.exchange.transfers(rng, sent, received, self.attention_tensor, self.expert_tensor)

    def _messages(
        self,
        rng: np.random.Generator,
        m: int,
        popularity: np.ndarray,
        options: NetworkOptions,
        networks: tuple[list[Network], list[Network]],
    ) -> tuple[np.ndarray, Carrier, Carrier]:
        shape = len(popularity), m, self.num_cells
        rows = np.empty((*shape, self.attention, self.expert), np.int64)
        pairs = np.empty((*shape, self.expert))
        replica = np.repeat(np.arange(self.attention), self.rows)
        for index in np.ndindex(*shape):
            topk_idx = draw_topk(rng, popularity[index[0]], len(replica), self.num_experts_per_tok)
            rows[index], pairs[index] = count_rows(rng, topk_idx, replica, self.placement, self.attention)
        num_bytes = -(-rows * self.row_bytes // self.attention_tensor)
        dispatch = MessageTransfer(options, networks[0], num_bytes, 0, self.attention)
        combine = MessageTransfer(options, networks[1], num_bytes.swapaxes(-1, -2), self.attention, 0)
        return pairs, dispatch, combine
