"""Links of the simulated network: which ones a chunk crosses, and until when each is busy. No JAX."""

import random

from jmoe.planner.network_options import NetworkOptions


class Fabric:
    """Busy-until times of all links, and the routes over them.

    Links are numbered: sending NICs, receiving NICs, uplinks, downlinks; each by (endpoint or leaf, rail[, path]).

    Args:
      options: the network.
      num_endpoints: devices.
      seed: of the hash that spreads queue pairs over paths.
    """

    def __init__(self, options: NetworkOptions, num_endpoints: int, seed: int):
        self.options = options
        self.num_leaves = -(-num_endpoints // options.endpoints_per_leaf)
        nics, trunks = num_endpoints * options.rails, self.num_leaves * options.rails * options.num_paths
        self.num_nics = nics
        self._first_up, self._first_down = 2 * nics, 2 * nics + trunks
        uplink = 8 / ((options.uplink_gbps or options.nic_gbps) * 1e9)
        self.second_per_byte = [1 / options.bytes_per_s] * (2 * nics) + [uplink] * (2 * trunks)
        self.busy_until = [0.0] * (2 * nics + 2 * trunks)
        self.longest_wait = [0.0] * (2 * nics + 2 * trunks)
        self._seed = seed

    def leaf(self, endpoint: int) -> int:
        return endpoint // self.options.endpoints_per_leaf

    def crosses_spine(self, sender: int, receiver: int) -> bool:
        return self.leaf(sender) != self.leaf(receiver)

    def route(self, sender: int, receiver: int, rail: int, path: int) -> tuple[int, ...]:
        """The links from one endpoint to another, in order."""
        rails, paths = self.options.rails, self.options.num_paths
        first, last = sender * rails + rail, self.num_nics + receiver * rails + rail
        if not self.crosses_spine(sender, receiver):
            return first, last
        up = self._first_up + (self.leaf(sender) * rails + rail) * paths + path
        down = self._first_down + (self.leaf(receiver) * rails + rail) * paths + path
        return first, up, down, last

    def hashed_path(self, *identity: int) -> int:
        """The path that a flow's header hashes to; the same identity always gets the same path."""
        return random.Random(f"{self._seed}/{identity}").randrange(self.options.num_paths)

    def shortest_uplink(self, sender: int, rail: int, start: int) -> int:
        """The path whose uplink at the sender's leaf is free first, ties in turn from `start` on."""
        paths = self.options.num_paths
        base = self._first_up + (self.leaf(sender) * self.options.rails + rail) * paths
        queues = self.busy_until[base : base + paths]
        shortest = min(queues)
        for i in range(paths):
            if queues[(start + i) % paths] == shortest:
                return (start + i) % paths
        raise AssertionError("unreachable: the minimum is in the list")

    def forward(self, link: int, now: float, num_bytes: int) -> tuple[float, float]:
        """Puts a chunk on a link: (how long it waited, when its last byte is through)."""
        start = max(now, self.busy_until[link])
        wait = start - now
        if wait > self.longest_wait[link]:
            self.longest_wait[link] = wait
        done = self.busy_until[link] = start + num_bytes * self.second_per_byte[link]
        return wait, done

    def backlog(self, links: tuple[int, ...], now: float, most: float = float("inf")) -> float:
        """Waiting time over links as they stand now, each counted up to `most`."""
        return sum(min(max(self.busy_until[link] - now, 0.0), most) for link in links)

    def longest_switch_wait(self) -> float:
        """The longest that any chunk waited at a switch port (an incast or a conflict), in seconds."""
        return max(self.longest_wait[self.num_nics :])
