"""Exchanges in closed form, for many cells and iterations; what contention adds is measured on `Network`. No JAX."""

import dataclasses

import numpy as np

from jmoe.planner.lanes import Transfer
from jmoe.planner.network import Network
from jmoe.planner.network_messages import many_to_many
from jmoe.planner.network_options import NetworkOptions


@dataclasses.dataclass(frozen=True, slots=True)
class ExchangeTimes:
    """Port times of an exchange from its row counts.

    An attention device sends one message to each expert device (and the reverse in a combine); with tensor parallelism
    every rank moves its slice of the hidden vector, so a port carries rows * row_bytes / tensor.

    Attributes:
      row_bytes: of one row on the wire, all slices together.
      attention_bytes_s, expert_bytes_s: what one device's NICs (or its scale-up link) move, each way.
      message_s: a sender's time to start a message.
      latency_s: of an empty exchange.
      slowdown: quantiles, at equal steps from 0 to 1, of what an exchange takes over what its ports alone would take
        (`measure_slowdown`); drawn once an exchange and cell.
    """

    row_bytes: float
    attention_bytes_s: float
    expert_bytes_s: float
    message_s: float = 0.3e-6
    latency_s: float = 5e-6
    slowdown: tuple[float, ...] = (1.0,)

    def __post_init__(self):
        for name in ("row_bytes", "attention_bytes_s", "expert_bytes_s"):
            if not (value := getattr(self, name)) > 0:
                raise ValueError(f"ExchangeTimes.{name}: expected more than 0, got {value}")
        for name in ("message_s", "latency_s"):
            if not (value := getattr(self, name)) >= 0:
                raise ValueError(f"ExchangeTimes.{name}: expected at least 0, got {value}")
        if not self.slowdown or min(self.slowdown) < 1 or list(self.slowdown) != sorted(self.slowdown):
            raise ValueError(
                f"ExchangeTimes.slowdown: expected increasing factors of at least 1, got {self.slowdown[:3]}..."
            )

    @classmethod
    def measured(
        cls, options: NetworkOptions, row_bytes: float, num_bytes: np.ndarray, repeats: int = 50, seed: int = 0
    ) -> "ExchangeTimes":
        """For a network and message sizes `[draws, senders, receivers]`: its ports, and the slowdown that it adds."""
        rate = options.bytes_per_s * options.rails
        slowdown = measure_slowdown(options, num_bytes, repeats, seed=seed)
        return cls(row_bytes, rate, rate, options.message_s / options.nic_threads, _latency_s(options), slowdown)

    def transfers(
        self,
        rng: np.random.Generator,
        sent_rows: np.ndarray,
        received_rows: np.ndarray,
        attention_tensor: int,
        expert_tensor: int,
    ) -> tuple[Transfer, Transfer]:
        """Dispatch and combine of one pass.

        Args:
          sent_rows: `[L, m, C, M]` rows that each attention replica dispatches, counted once per node.
          received_rows: `[L, m, C, N]` rows that each expert node receives; as many partial sums come back.
          attention_tensor, expert_tensor: ranks of a replica and of a node.
        """
        attention_s = sent_rows * (self.row_bytes / attention_tensor / self.attention_bytes_s)
        expert_s = received_rows * (self.row_bytes / expert_tensor / self.expert_bytes_s)
        latency = np.asarray(self.latency_s)
        posts_a, posts_e = expert_s.shape[-1] * self.message_s, attention_s.shape[-1] * self.message_s
        factor = self._draw_slowdown(rng, (2, *attention_s.shape[:3], 1))
        dispatch = Transfer((attention_s + posts_a) * factor[0], expert_s * factor[0], latency)
        combine = Transfer((expert_s + posts_e) * factor[1], attention_s * factor[1], latency)
        return dispatch, combine

    def _draw_slowdown(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        if len(self.slowdown) == 1:
            return np.full(shape, self.slowdown[0])
        return np.interp(rng.random(shape), np.linspace(0, 1, len(self.slowdown)), self.slowdown)


def measure_slowdown(
    options: NetworkOptions,
    num_bytes: np.ndarray,
    repeats: int = 50,
    start_jitter_s: float = 1e-6,
    num_quantiles: int = 33,
    seed: int = 0,
) -> tuple[float, ...]:
    """Runs one direction of an exchange through `Network` many times, each with other paths, sizes and starts.

    Args:
      options: the network.
      num_bytes: `[draws, senders, receivers]` message sizes to choose from at random.
      repeats: exchanges to run.
      start_jitter_s: senders start within this (exponential mean) of each other.
      num_quantiles: how finely to keep the distribution.
      seed: of everything drawn.

    Returns:
      Quantiles of (time from the last start to the last arrival) / (the busier port's time and an empty exchange's
      latency), at least 1.
    """
    rng = np.random.default_rng(seed)
    _, senders, receivers = num_bytes.shape
    ratios = []
    for repeat in range(repeats):
        sizes = num_bytes[rng.integers(len(num_bytes))]
        start = rng.exponential(start_jitter_s, senders)
        messages = many_to_many(sizes, np.arange(senders), senders + np.arange(receivers), start, options.posting)
        network = Network(options, senders + receivers, seed + repeat)
        took = network.run(messages).arrived_s.max() - start.max()
        ratios.append(max(1.0, took / uncontended_s(options, sizes)))
    return tuple(np.quantile(ratios, np.linspace(0, 1, num_quantiles)).tolist())


def uncontended_s(options: NetworkOptions, num_bytes: np.ndarray) -> float:
    """The busier port's time for a `[senders, receivers]` exchange, with posts and the latency of the longest route."""
    rate = options.bytes_per_s * options.rails
    sends = num_bytes.sum(axis=1) / rate + (num_bytes > 0).sum(axis=1) * options.message_s / options.nic_threads
    return float(max(sends.max(), num_bytes.sum(axis=0).max() / rate)) + _latency_s(options)


def _latency_s(options: NetworkOptions) -> float:
    """Four links of the longest route and one chunk in each."""
    return 4 * options.hop_latency_s + 4 * options.chunk_bytes / options.bytes_per_s
