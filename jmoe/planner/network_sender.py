"""The sending side of a simulated NIC: queue pairs, windows, the choice of a path, reactions to congestion. No JAX."""

import dataclasses
import random
from collections import deque
from collections.abc import Callable
from typing import Any

from jmoe.planner.network_fabric import Fabric
from jmoe.planner.network_options import NetworkOptions

Push = Callable[[float, Callable[[float, Any], None], Any], None]  # (when, what to call, with what)


@dataclasses.dataclass(slots=True, eq=False)
class Piece:
    """One queue pair's part of a message."""

    message: int
    num_bytes: int
    num_chunks: int
    num_sent: int = 0
    num_arrived: int = 0
    newest: int = -1  # highest chunk number that has arrived
    out_of_order: bool = False


@dataclasses.dataclass(slots=True, eq=False)
class QueuePair:
    """One connection's send state on one rail."""

    sender: int
    receiver: int
    rail: int
    index: int
    thread: int
    path: int
    next_path: int  # of the next message, as far as probes have told
    pieces: deque[Piece] = dataclasses.field(default_factory=deque)
    in_flight: int = 0
    rate: float = 1.0  # share of the NIC's rate
    next_send: float = 0.0
    pump_planned: bool = False
    last_reaction: float = float("-inf")
    last_probe: float = float("-inf")
    num_switches: int = 0


@dataclasses.dataclass(slots=True, eq=False)
class Chunk:
    """What links forward."""

    queue_pair: QueuePair
    piece: Piece
    number: int
    num_bytes: int
    route: tuple[int, ...]
    hop: int = 0
    marked: bool = False


class NicSender:
    """Turns posted messages into chunks at the first link, as fast as threads, windows and rates let them.

    Args:
      options: the network.
      fabric: its links.
      num_endpoints: devices.
      push: plans an event.
      enter: called with (now, chunk) when a chunk reaches its first link.
      seed: of path switches.
    """

    def __init__(self, options: NetworkOptions, fabric: Fabric, num_endpoints: int, push: Push, enter, seed: int):
        self._options, self._fabric, self._push, self._enter = options, fabric, push, enter
        self._random = random.Random(f"{seed}/sender")
        nics = num_endpoints * options.rails
        self._thread_free = [0.0] * (nics * options.nic_threads)
        self._second_per_byte = 8 / ((options.thread_gbps or options.nic_gbps) * 1e9)
        self._num_connected = [0] * nics
        self._queue_pairs: dict[tuple[int, int, int, int], QueuePair] = {}
        self._window = float("inf") if options.window_bytes is None else options.window_bytes // options.chunk_bytes

    def post(self, now: float, message: int, sender: int, receiver: int, num_bytes: int) -> int:
        """Cuts a message into one piece a rail and queue pair and starts them; how many pieces it became."""
        options = self._options
        parts = min(options.rails * options.queue_pairs, -(-num_bytes // options.chunk_bytes))
        for part in range(parts):
            size = num_bytes * (part + 1) // parts - num_bytes * part // parts
            queue_pair = self._queue_pair((sender, receiver, part % options.rails, part // options.rails))
            queue_pair.pieces.append(Piece(message, size, -(-size // options.chunk_bytes)))
            self._pump(now, queue_pair)
        return parts

    def acknowledged(self, now: float, chunk: Chunk) -> None:
        """Takes an acknowledgement in: opens the window, reacts to a mark, goes on sending."""
        queue_pair = chunk.queue_pair
        queue_pair.in_flight -= 1
        if chunk.marked:
            self._react(now, queue_pair)
        elif queue_pair.rate < 1.0:
            queue_pair.rate = min(1.0, queue_pair.rate + self._options.recover)
        self._pump(now, queue_pair)

    def _queue_pair(self, key: tuple[int, int, int, int]) -> QueuePair:
        if key not in self._queue_pairs:
            nic = key[0] * self._options.rails + key[2]
            thread = nic * self._options.nic_threads + self._num_connected[nic] % self._options.nic_threads
            self._num_connected[nic] += 1
            path = self._fabric.hashed_path(*key)
            self._queue_pairs[key] = QueuePair(*key, thread=thread, path=path, next_path=path)
        return self._queue_pairs[key]

    def _pump(self, now: float, queue_pair: QueuePair) -> None:
        """Sends while the window and the rate allow it."""
        while queue_pair.pieces and queue_pair.in_flight < self._window:
            if now < queue_pair.next_send:
                if not queue_pair.pump_planned:
                    queue_pair.pump_planned = True
                    self._push(queue_pair.next_send, self._pump_again, queue_pair)
                return
            piece = queue_pair.pieces[0]
            self._send_chunk(now, queue_pair, piece)
            if piece.num_sent == piece.num_chunks:
                queue_pair.pieces.popleft()

    def _pump_again(self, now: float, queue_pair: QueuePair) -> None:
        queue_pair.pump_planned = False
        self._pump(now, queue_pair)

    def _send_chunk(self, now: float, queue_pair: QueuePair, piece: Piece) -> None:
        """Passes the next chunk of a piece through its NIC thread."""
        options = self._options
        if piece.num_sent == 0 and options.routing == "probed":
            queue_pair.path = queue_pair.next_path
            self._probe(now, queue_pair)
        number = piece.num_sent
        num_bytes = min(options.chunk_bytes, piece.num_bytes - number * options.chunk_bytes)
        through = max(now, self._thread_free[queue_pair.thread]) + num_bytes * self._second_per_byte
        if number == 0:
            through += self._message_cost(queue_pair)
        self._thread_free[queue_pair.thread] = through
        piece.num_sent += 1
        queue_pair.in_flight += 1
        if queue_pair.rate < 1.0:
            queue_pair.next_send = now + num_bytes / (queue_pair.rate * options.bytes_per_s)
        route = self._fabric.route(queue_pair.sender, queue_pair.receiver, queue_pair.rail, queue_pair.path)
        self._push(through, self._enter, Chunk(queue_pair, piece, number, num_bytes, route))

    def _message_cost(self, queue_pair: QueuePair) -> float:
        nic = queue_pair.sender * self._options.rails + queue_pair.rail
        missed = self._num_connected[nic] > self._options.queue_pair_cache
        return self._options.message_s + (self._options.cache_miss_s if missed else 0.0)

    def _react(self, now: float, queue_pair: QueuePair) -> None:
        if now - queue_pair.last_reaction < self._options.react_interval_s:
            return
        queue_pair.last_reaction = now
        if self._options.congestion == "back_off":
            queue_pair.rate = max(queue_pair.rate / 2, 1 / 64)
        elif self._options.congestion == "switch_path":
            queue_pair.num_switches += 1
            queue_pair.path = self._random.randrange(self._options.num_paths)

    def _probe(self, now: float, queue_pair: QueuePair) -> None:
        """Sends a probe down each candidate path; the first answer to come back is the shortest round trip."""
        options = self._options
        if now - queue_pair.last_probe < options.probe_interval_s:
            return
        queue_pair.last_probe = now
        ends = queue_pair.sender, queue_pair.receiver, queue_pair.rail
        hashed = (self._fabric.hashed_path(*ends, queue_pair.index, i) for i in range(1, options.probe_paths))
        candidates = dict.fromkeys((queue_pair.path, *hashed))  # the present path first: it stays unless one is better
        round_trip = {path: self._round_trip(now, *ends, path) for path in candidates}
        best = min(round_trip, key=round_trip.__getitem__)
        self._push(now + round_trip[best], self._learn, (queue_pair, best))

    def _round_trip(self, now: float, sender: int, receiver: int, rail: int, path: int) -> float:
        route = self._fabric.route(sender, receiver, rail, path)
        return 2 * len(route) * self._options.hop_latency_s + self._fabric.backlog(route[1:], now)

    def _learn(self, now: float, found: tuple[QueuePair, int]) -> None:
        queue_pair, path = found
        queue_pair.next_path = path
