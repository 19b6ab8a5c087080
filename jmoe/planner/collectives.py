"""What an all-reduce over the ranks of one tensor group takes. No JAX."""

import numpy as np
from numpy.typing import ArrayLike

from jmoe.planner.hardware import GpuKind
from jmoe.planner.nccl_cost import nccl_all_reduce_s

# vLLM's and TensorRT-LLM's own all-reduce kernels serve messages up to this size inside one host; NCCL the rest.
PEER_KERNEL_BYTES = 8 << 20


def collective_s(gpu: GpuKind, num_bytes: ArrayLike, ranks: int) -> np.ndarray:
    """An all-reduce of num_bytes over `ranks` GPUs: 2 (n - 1) / n of the bytes over each GPU's link, one latency.

    An all-gather in front of a stage and a reduce-scatter behind it move the same bytes. Past one scale-up domain it
    is hierarchical: reduce-scatter inside, all-reduce of each GPU's share over its NIC, all-gather inside. With
    `nccl_costs` it is what NCCL's own model says instead, or this where peer kernels serve (up to 8 MiB in one domain).
    """
    num_bytes = np.asarray(num_bytes, np.float64)
    if ranks == 1:
        return np.zeros_like(num_bytes)
    if gpu.kernels.nccl_costs:
        peer = _peer_all_reduce_s(gpu, num_bytes, ranks)
        nccl = nccl_all_reduce_s(gpu, num_bytes, ranks)
        return np.where((ranks <= gpu.scale_up_domain) & (num_bytes <= PEER_KERNEL_BYTES), np.minimum(peer, nccl), nccl)
    return _peer_all_reduce_s(gpu, num_bytes, ranks)


def _peer_all_reduce_s(gpu: GpuKind, num_bytes: np.ndarray, ranks: int) -> np.ndarray:
    inside = min(ranks, gpu.scale_up_domain)
    latency = gpu.kernels.collective_latency_us * 1e-6
    time = latency + 2 * (inside - 1) / inside * num_bytes / gpu.scale_up_bytes_s
    domains = -(-ranks // inside)
    if domains > 1:
        share = num_bytes / inside
        time = time + latency + 2 * (domains - 1) / domains * share / gpu.nic_bytes_s
        time = time + gpu.kernels.nic_latency_us * 1e-6
    return time
