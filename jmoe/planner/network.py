"""Event simulation of messages between endpoints: chunks through NIC threads, NICs, leaves and spines. No JAX.

Exact for what `NetworkOptions` describes: every chunk of every message is an event at every link. For thousands of
devices over many iterations see `jmoe.planner.exchange_times`, which takes its numbers from here.
"""

import heapq
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from jmoe.planner.network_fabric import Fabric
from jmoe.planner.network_messages import Deliveries, Messages
from jmoe.planner.network_options import NetworkOptions
from jmoe.planner.network_sender import Chunk, NicSender

MAX_CHUNKS = 5_000_000  # about 2 GiB of Python objects


class Network:
    """Runs messages through the network; queues keep their state from one `run` to the next.

    Args:
      options: the network.
      num_endpoints: devices.
      seed: of path hashes, path switches and stalls.

    Raises:
      ValueError: no endpoint.
    """

    def __init__(self, options: NetworkOptions, num_endpoints: int, seed: int = 0):
        if num_endpoints < 1:
            raise ValueError(f"Network.num_endpoints: expected at least 1, got {num_endpoints}")
        self._options, self._num_endpoints = options, num_endpoints
        self._fabric = Fabric(options, num_endpoints, seed)
        self._sender = NicSender(options, self._fabric, num_endpoints, self._push, self._enter, seed)
        self._random = random.Random(f"{seed}/stalls")
        self._heap: list[tuple[float, int, Callable[[float, Any], None], Any]] = []
        self._count = 0
        self._adaptive_turn = 0

    def run(self, messages: Messages) -> Deliveries:
        """Posts messages and runs until all have arrived.

        Raises:
          ValueError: an endpoint out of range, or more than 5,000,000 chunks.
        """
        self._check(messages)
        self._senders, self._receivers = messages.sender.tolist(), messages.receiver.tolist()
        self._sizes, ready = messages.num_bytes.tolist(), messages.ready_s.tolist()
        self._pieces_left = [0] * len(ready)
        self._arrived = [0.0] * len(ready)
        self._num_out_of_order = self._num_marks = 0
        if self._options.batches is None:
            for message, when in enumerate(ready):
                self._push(when, self._post, message)
        else:
            self._plan_batches(ready)
        heap = self._heap
        while heap:
            now, _, call, subject = heapq.heappop(heap)
            call(now, subject)
        return Deliveries(
            np.array(self._arrived), self._num_out_of_order, self._num_marks, self._fabric.longest_switch_wait()
        )

    def _check(self, messages: Messages) -> None:
        for name in ("sender", "receiver"):
            ids = getattr(messages, name)
            if len(ids) and not (ids.min() >= 0 and ids.max() < self._num_endpoints):
                raise ValueError(
                    f"Messages.{name}: expected ids 0 to {self._num_endpoints - 1}, got {ids.min()} to {ids.max()}"
                )
        chunks = int(np.ceil(messages.num_bytes / self._options.chunk_bytes).sum())
        if chunks > MAX_CHUNKS:
            raise ValueError(f"Network.run: expected at most {MAX_CHUNKS} chunks, got {chunks}; raise chunk_bytes")

    def _push(self, when: float, call: Callable[[float, Any], None], subject: Any) -> None:
        self._count += 1  # equal times run in the order in which they were planned
        heapq.heappush(self._heap, (when, self._count, call, subject))

    def _post(self, now: float, message: int) -> None:
        ends = self._senders[message], self._receivers[message]
        self._pieces_left[message] = self._sender.post(now, message, *ends, self._sizes[message])

    def _enter(self, now: float, chunk: Chunk) -> None:
        """A chunk arrives at its next link and is forwarded when the link is free."""
        options = self._options
        if chunk.hop == 1 and len(chunk.route) == 4 and options.routing == "adaptive":
            self._adapt(chunk)
        link = chunk.route[chunk.hop]
        wait, through = self._fabric.forward(link, now, chunk.num_bytes)
        if chunk.hop > 0 and wait > options.mark_s:
            chunk.marked = True
        chunk.hop += 1
        done = chunk.hop == len(chunk.route)
        self._push(through + options.hop_latency_s, self._arrive if done else self._enter, chunk)

    def _adapt(self, chunk: Chunk) -> None:
        """The leaf sends the chunk by its shortest queue."""
        pair = chunk.queue_pair
        self._adaptive_turn += 1
        path = self._fabric.shortest_uplink(pair.sender, pair.rail, self._adaptive_turn)
        chunk.route = self._fabric.route(pair.sender, pair.receiver, pair.rail, path)

    def _arrive(self, now: float, chunk: Chunk) -> None:
        piece = chunk.piece
        piece.num_arrived += 1
        if chunk.number < piece.newest:
            piece.out_of_order = True
        piece.newest = max(piece.newest, chunk.number)
        if self._options.needs_acks:
            self._push(now + self._way_back(now, chunk), self._acknowledge, chunk)
        if piece.num_arrived == piece.num_chunks:
            usable = now
            if piece.out_of_order:
                self._num_out_of_order += 1
                usable += self._options.reorder_s
            self._arrived[piece.message] = max(self._arrived[piece.message], usable)
            self._pieces_left[piece.message] -= 1
            if self._pieces_left[piece.message] == 0 and self._options.batches is not None:
                sender = self._senders[piece.message]
                self._push(usable + self._way_back(now, chunk), self._batch_progress, sender)

    def _way_back(self, now: float, chunk: Chunk) -> float:
        """How long an acknowledgement takes: behind the data that waits there now, or past it."""
        pair, options = chunk.queue_pair, self._options
        route = self._fabric.route(pair.receiver, pair.sender, pair.rail, pair.path)
        one_chunk = options.chunk_bytes / options.bytes_per_s
        most = float("inf") if options.acks == "behind_data" else one_chunk
        return len(route) * options.hop_latency_s + self._fabric.backlog(route, now, most)

    def _acknowledge(self, now: float, chunk: Chunk) -> None:
        self._num_marks += chunk.marked
        self._sender.acknowledged(now, chunk)

    def _plan_batches(self, ready: list[float]) -> None:
        """Cuts every sender's messages into batches and posts the first of each."""
        assert self._options.batches is not None
        size = self._options.batches.batch
        by_sender: dict[int, list[int]] = {}
        for message, sender in enumerate(self._senders):
            by_sender.setdefault(sender, []).append(message)
        self._batches = {s: deque(own[i : i + size] for i in range(0, len(own), size)) for s, own in by_sender.items()}
        self._batch_left = dict.fromkeys(by_sender, 0)
        for sender, own in by_sender.items():
            self._push(max(ready[message] for message in own), self._post_batch, sender)

    def _batch_progress(self, now: float, sender: int) -> None:
        self._batch_left[sender] -= 1
        if self._batch_left[sender] == 0 and self._batches[sender]:
            self._post_batch(now, sender)

    def _post_batch(self, now: float, sender: int) -> None:
        """Posts a sender's next batch, later when the host thread that does it is elsewhere."""
        batches = self._options.batches
        assert batches is not None
        if self._random.random() < batches.stall_probability:
            now += self._random.random() * batches.stall_period_s
        batch = self._batches[sender].popleft()
        self._batch_left[sender] = len(batch)
        for message in batch:
            self._push(now, self._post, message)
