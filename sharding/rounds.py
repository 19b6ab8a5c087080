"""Rounds: who talks to whom in each permute of an exchange, for any M, N and tensor sizes. No JAX.

In a round every device has at most one partner on the other mesh. Replica a and node e meet once; where the tensor
sizes differ they meet once per slice of the hidden vector. Slice s travels between attention rank s % attention_tensor
and expert rank s % expert_tensor.
"""

import dataclasses

import numpy as np

from jmoe.sharding.mesh_config import MeshConfig


@dataclasses.dataclass(frozen=True)
class Rounds:
    """The permutes of one exchange as tables.

    Attributes:
      pairs: per round, the (attention device, expert device) pairs.
      peer: `[num_devices, num_rounds]` int32: the node (for an attention device) or replica (for an expert device)
        that the device meets in that round, -1 for none.
      slice_idx: `[num_devices, num_rounds]` int32: the slice of the hidden vector that they exchange.
      round_of: `[num_devices, max(M, N), slices a device]` int32: the round in which the device meets a peer for its
        j-th slice (slice j * tensor size + rank).
      num_slices: slices of a hidden vector.
    """

    pairs: tuple[tuple[tuple[int, int], ...], ...]
    peer: np.ndarray
    slice_idx: np.ndarray
    round_of: np.ndarray
    num_slices: int

    @property
    def num_rounds(self) -> int:
        return len(self.pairs)


def build_rounds(mesh: MeshConfig) -> Rounds:
    """Colours the (replica, node) meetings with max(M, N) colours, and the slices of a meeting with as few as possible.

    Replica a meets node e in colour (e - a) mod max(M, N); a window of min(tensor sizes) consecutive slices touches
    each rank at most once, so num_slices / min(tensor sizes) permutes carry a meeting.
    """
    attention_tensor, expert_tensor = mesh.attention_tensor, mesh.expert_tensor
    num_slices, window = mesh.num_slices, min(attention_tensor, expert_tensor)
    num_colours = max(mesh.attention, mesh.expert)
    num_rounds = num_colours * (num_slices // window)
    peer = np.full((mesh.num_devices, num_rounds), -1, np.int32)
    slice_idx = np.zeros((mesh.num_devices, num_rounds), np.int32)
    round_of = np.zeros((mesh.num_devices, num_colours, num_slices // window), np.int32)
    pairs: list[list[tuple[int, int]]] = [[] for _ in range(num_rounds)]
    for replica in range(mesh.attention):
        for node in range(mesh.expert):
            colour = (node - replica) % num_colours
            for s in range(num_slices):
                r = colour * (num_slices // window) + s // window
                a = mesh.attention_device(replica, s % attention_tensor)
                e = mesh.expert_device(node, s % expert_tensor)
                pairs[r].append((a, e))
                peer[a, r], peer[e, r] = node, replica
                slice_idx[a, r] = slice_idx[e, r] = s
                round_of[a, node, s // attention_tensor] = r
                round_of[e, replica, s // expert_tensor] = r
    return Rounds(tuple(tuple(p) for p in pairs), peer, slice_idx, round_of, num_slices)
