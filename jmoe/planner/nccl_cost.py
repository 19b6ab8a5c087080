"""What NCCL itself expects an all-reduce to take: its tuner's model with its constants. No JAX.

NCCL chooses an algorithm and a protocol by latency + bytes / bandwidth, with constants that its authors measured; the
least of them is the time that it expects. Source: NVIDIA/nccl, src/graph/tuning.cc (commit 01afd20a).
"""

import numpy as np
from numpy.typing import ArrayLike

from jmoe.planner.hardware import GpuKind

# Microseconds, by protocol: LL (8-byte flags, a quarter of the bandwidth), LL128 (NVLink only), Simple.
RING_BASE_US = {"ll": 3.6, "ll128": 10.0, "simple": 8.4}
RING_HOP_US = {
    "nvlink": {"ll": 0.47, "ll128": 1.9, "simple": 3.4},
    "pcie": {"ll": 1.0, "ll128": 2.5, "simple": 5.7},
    "net": {"ll": 2.7, "ll128": 4.0, "simple": 9.6},
}
RING_BANDWIDTH = {"ll": 0.25, "ll128": 0.92, "simple": 1.0}
TREE_BASE_US = {"ll": 4.4, "ll128": 4.4, "simple": 0.0}
TREE_HOP_US = {
    "nvlink": {"ll": 0.52, "ll128": 1.2, "simple": 28.0},
    "pcie": {"ll": 1.0, "ll128": 1.9, "simple": 28.0},
    "net": {"ll": 5.0, "ll128": 8.5, "simple": 50.0},
}
# Largest bandwidth of a tree, GB/s, over at most two hosts and over more.
TREE_MOST_GB_S = {"ll": (110.0, 80.0), "ll128": (130.0, 105.0), "simple": (110.0, 80.0)}
# A tree's bandwidth at medium sizes, 64 B times powers of two.
TREE_CORRECTION = {
    "ll": (1, 1, 1, 1, 0.9, 0.8, 0.7, 0.7, 0.7, 0.7, 0.6, 0.5, 0.4, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1, 1),
    "ll128": (1, 1, 1, 1, 1, 0.9, 0.8, 0.8, 0.8, 0.7, 0.6, 0.6, 0.6, 0.5, 0.6, 0.6, 0.7, 0.7, 0.8, 0.9, 0.9, 1),
    "simple": (0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.8, 0.7, 0.6, 0.6) + (0.5,) * 6 + (0.6, 0.6, 0.7, 0.8, 0.9),
}  # fmt: skip
NVLINK_LEAST_GB_S = 100.0  # of one direction; below it the scale-up link is PCIe


def nccl_all_reduce_s(gpu: GpuKind, num_bytes: ArrayLike, ranks: int) -> np.ndarray:
    """Time that NCCL expects of an all-reduce, by its best algorithm and protocol.

    Args:
      gpu: the kind, with its links; hosts beyond the first are reached through its NICs.
      num_bytes: of the buffer.
      ranks: GPUs, whole hosts if more than one.

    Returns:
      Seconds, in num_bytes' shape.
    """
    num_bytes = np.asarray(num_bytes, np.float64)
    hosts = -(-ranks // gpu.gpus_per_host)
    link = "nvlink" if gpu.scale_up_gb_s >= NVLINK_LEAST_GB_S else "pcie"
    bandwidth = gpu.scale_up_bytes_s
    if hosts > 1:
        bandwidth = min(bandwidth, gpu.nic_bytes_s * gpu.gpus_per_host)
    protocols = ("ll", "ll128", "simple") if link == "nvlink" else ("ll", "simple")
    times = [ring_s(num_bytes, ranks, hosts, link, bandwidth, protocol) for protocol in protocols]
    times += [tree_s(num_bytes, ranks, hosts, link, bandwidth, protocol) for protocol in protocols]
    return np.min(times, axis=0)


def ring_s(num_bytes: np.ndarray, ranks: int, hosts: int, link: str, bandwidth: float, protocol: str) -> np.ndarray:
    """A ring: 2 (n - 1) hops, of which 2 (hosts - 1) are over the network, and n / (2 (n - 1)) of the bandwidth."""
    hop = RING_HOP_US[link][protocol] * (1.8 if hosts > 1 and protocol == "ll" else 1.0)
    between = 2 * (hosts - 1)
    latency = RING_BASE_US[protocol] + (2 * (ranks - 1) - between) * hop + between * RING_HOP_US["net"][protocol]
    plateau = (hosts > 1) & (protocol == "simple") & (num_bytes >= ranks / 16 * 65536)
    rate = bandwidth * RING_BANDWIDTH[protocol] * ranks / (2 * (ranks - 1))
    return latency * np.where(plateau, 1.9, 1.0) * 1e-6 + num_bytes / rate


def tree_s(num_bytes: np.ndarray, ranks: int, hosts: int, link: str, bandwidth: float, protocol: str) -> np.ndarray:
    """A double tree: up and down a chain in each host and log2(hosts) levels between them, half the bandwidth."""
    hop = TREE_HOP_US[link][protocol] * (1.8 if hosts > 1 and protocol == "ll" else 1.0)
    levels = hosts.bit_length() - 1
    latency = TREE_BASE_US[protocol] + 2 * ((ranks / hosts - 1) * hop + levels * TREE_HOP_US["net"][protocol])
    rate = min(bandwidth * 0.9, TREE_MOST_GB_S[protocol][hosts > 2] * 1e9)
    rate *= {"ll": 1 / 3.8, "ll128": 7 / 9 if hosts == 1 else 0.915, "simple": 1.0}[protocol]
    table = np.asarray(TREE_CORRECTION[protocol], np.float64)
    size = np.clip(np.log2(np.maximum(num_bytes, 64.0) / 64), 0, None).astype(int)
    correction = np.where(size < len(table), table[np.minimum(size, len(table) - 1)], 1.0)
    return latency * 1e-6 + num_bytes / (0.5 * rate * correction)
