"""What the simulated network is made of and how it behaves. No JAX."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, slots=True)
class ProxyBatches:
    """Messages sent in batches through a host thread, as group operations of a collective library do it.

    A batch is posted when the one before has arrived. With probability stall_probability the host thread is elsewhere
    and picks the batch up at its next turn: a turn comes every stall_period_s and the batch is ready at any moment of
    it, so that the wait is uniform over the period. `jmoe.planner.m2n_tail` fits the period.

    Attributes:
      batch: messages of one batch (NCCL: 8 peer-to-peer operations).
      stall_probability: of each batch.
      stall_period_s: longest wait.
    """

    batch: int = 8
    stall_probability: float = 0.0
    stall_period_s: float = 0.0

    def __post_init__(self):
        if self.batch < 1:
            raise ValueError(f"ProxyBatches.batch: expected at least 1, got {self.batch}")
        if not 0 <= self.stall_probability <= 1:
            raise ValueError(f"ProxyBatches.stall_probability: expected 0 to 1, got {self.stall_probability}")
        if self.stall_period_s < 0:
            raise ValueError(f"ProxyBatches.stall_period_s: expected at least 0, got {self.stall_period_s}")


@dataclasses.dataclass(frozen=True, slots=True)
class NetworkOptions:
    """A leaf-spine network of endpoints (devices) with one or more NICs each, one network plane a rail.

    Links: endpoint -> leaf, leaf -> spine (one a path), spine -> leaf, leaf -> endpoint; endpoints of one leaf skip the
    spine. Every link is a first-in-first-out queue of chunks without loss.

    Attributes:
      nic_gbps: rate of one NIC, in 10^9 bits/s.
      rails: NICs of an endpoint; a message is striped over them.
      message_s: time of a NIC thread to start a message (post, doorbell, first fetch).
      nic_threads: processing threads of a NIC; a queue pair belongs to one of them.
      thread_gbps: what one NIC thread can push; None for the NIC's rate.
      queue_pairs: per connection and rail; a message is split over them, and each part pays message_s.
      queue_pair_cache: connections' state that a NIC holds; above it every message pays cache_miss_s more.
      hop_latency_s: of a link and the switch behind it.
      chunk_bytes: the unit that links forward.
      endpoints_per_leaf, uplink_gbps, oversubscription: a leaf has endpoints_per_leaf * nic_gbps / (oversubscription *
        uplink_gbps) uplinks (uplink_gbps None: nic_gbps).
      routing: "ecmp" hashes each queue pair to a path for ever; "adaptive" sends each chunk by the shortest local
        queue; "probed" gives each queue pair probe_paths hashed paths, probes them when it starts a message (at most
        every probe_interval_s), and sends its next message by the one with the shortest round trip.
      probe_paths, probe_interval_s: of "probed".
      reorder_s: added at the receiver to a message of which chunks came out of order.
      congestion: on an acknowledgement that carries a mark "back_off" halves the queue pair's rate, "switch_path" draws
        another path, "none" does nothing.
      mark_s: a chunk that waits longer than this at a switch is marked.
      react_interval_s: least time between two reactions of a queue pair.
      recover: share of the NIC's rate that an unmarked acknowledgement gives back after a back-off.
      acks: "behind_data" wait in the queues of the way back, "prioritised" overtake all but the chunk on the wire.
        Their own bytes are neglected.
      window_bytes: unacknowledged bytes of a queue pair; None for no limit.
      posting: order of a sender's messages: "rotated" starts sender i of M at receiver i * N // M, "same" starts all at
        receiver 0.
      batches: messages posted in batches through a host thread, or None for all at once.
    """

    nic_gbps: float = 200.0
    rails: int = 1
    message_s: float = 0.3e-6
    nic_threads: int = 4
    thread_gbps: float | None = None
    queue_pairs: int = 1
    queue_pair_cache: int = 1024
    cache_miss_s: float = 1.0e-6
    hop_latency_s: float = 0.6e-6
    chunk_bytes: int = 8192
    endpoints_per_leaf: int = 8
    uplink_gbps: float | None = None
    oversubscription: float = 1.0
    routing: Literal["ecmp", "adaptive", "probed"] = "ecmp"
    probe_paths: int = 4
    probe_interval_s: float = 5e-6
    reorder_s: float = 1e-6
    congestion: Literal["none", "back_off", "switch_path"] = "none"
    mark_s: float = 5e-6
    react_interval_s: float = 5e-6
    recover: float = 0.01
    acks: Literal["behind_data", "prioritised"] = "prioritised"
    window_bytes: int | None = None
    posting: Literal["rotated", "same"] = "rotated"
    batches: ProxyBatches | None = None

    def __post_init__(self):
        if not 1 <= self.rails <= 8:
            raise ValueError(f"NetworkOptions.rails: expected 1 to 8, got {self.rails}")
        for name in ("nic_threads", "queue_pairs", "endpoints_per_leaf", "probe_paths"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"NetworkOptions.{name}: expected at least 1, got {value}")
        for name in ("nic_gbps", "probe_interval_s", "react_interval_s"):
            if not (value := getattr(self, name)) > 0:
                raise ValueError(f"NetworkOptions.{name}: expected more than 0, got {value}")
        for name in ("message_s", "cache_miss_s", "hop_latency_s", "reorder_s", "mark_s", "recover"):
            if not (value := getattr(self, name)) >= 0:
                raise ValueError(f"NetworkOptions.{name}: expected at least 0, got {value}")
        for name in ("thread_gbps", "uplink_gbps"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"NetworkOptions.{name}: expected more than 0 or None, got {value}")
        if self.chunk_bytes < 256:
            raise ValueError(f"NetworkOptions.chunk_bytes: expected at least 256, got {self.chunk_bytes}")
        if self.window_bytes is not None and self.window_bytes < self.chunk_bytes:
            raise ValueError(
                f"NetworkOptions.window_bytes: expected at least chunk_bytes ({self.chunk_bytes}), "
                f"got {self.window_bytes}"
            )
        _check_choice("routing", self.routing, ("ecmp", "adaptive", "probed"))
        _check_choice("congestion", self.congestion, ("none", "back_off", "switch_path"))
        _check_choice("acks", self.acks, ("behind_data", "prioritised"))
        _check_choice("posting", self.posting, ("rotated", "same"))
        if self.num_paths < 1 or abs(self.num_paths - self._exact_paths) > 1e-9:
            raise ValueError(
                f"NetworkOptions: expected a whole number of uplinks a leaf, got endpoints_per_leaf "
                f"{self.endpoints_per_leaf} * nic_gbps {self.nic_gbps} / (oversubscription {self.oversubscription} * "
                f"uplink_gbps {self.uplink_gbps or self.nic_gbps}) = {self._exact_paths}"
            )

    @property
    def _exact_paths(self) -> float:
        uplink = self.uplink_gbps or self.nic_gbps
        return self.endpoints_per_leaf * self.nic_gbps / (self.oversubscription * uplink)

    @property
    def num_paths(self) -> int:
        """Uplinks of a leaf, one to each spine."""
        return round(self._exact_paths)

    @property
    def bytes_per_s(self) -> float:
        """Of one NIC."""
        return self.nic_gbps * 1e9 / 8

    @property
    def needs_acks(self) -> bool:
        """Whether anything that a sender does depends on acknowledgements."""
        return self.window_bytes is not None or self.congestion != "none"


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"NetworkOptions.{name}: expected one of {', '.join(choices)}, got {value!r}")
