"""ExpertPlacement: which expert node holds which experts, replicas included. No JAX."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True, slots=True)
class ExpertPlacement:
    """The experts that each node holds, in local order: `nodes[n][local_idx]` is an expert id.

    An expert may stand on several nodes (a replica each); nodes may hold different numbers of experts.

    Raises:
      ValueError: an empty node, an expert twice on one node, or expert ids that are not 0..E-1.
    """

    nodes: tuple[tuple[int, ...], ...]

    def __post_init__(self):
        nodes = tuple(tuple(int(e) for e in node) for node in self.nodes)
        object.__setattr__(self, "nodes", nodes)
        if not nodes or any(not node for node in nodes):
            raise ValueError(f"ExpertPlacement: expected at least one expert on every node, got {nodes}")
        for n, node in enumerate(nodes):
            if len(set(node)) != len(node):
                raise ValueError(f"ExpertPlacement: expected each expert once on node {n}, got {node}")
        held = sorted({e for node in nodes for e in node})
        if held != list(range(len(held))):
            raise ValueError(f"ExpertPlacement: expected expert ids 0..E-1 with none missing, got {held}")

    @classmethod
    def balanced(cls, num_experts: int, num_nodes: int) -> "ExpertPlacement":
        """Contiguous runs of experts, the sizes differing by at most one."""
        if num_nodes > num_experts:
            raise ValueError(
                f"ExpertPlacement.balanced: expected at most one node an expert ({num_experts} experts), got "
                f"{num_nodes} nodes; replicate experts with an explicit placement"
            )
        cuts = [num_experts * n // num_nodes for n in range(num_nodes + 1)]
        return cls(tuple(tuple(range(a, b)) for a, b in itertools.pairwise(cuts)))

    @classmethod
    def of(cls, nodes: Iterable[Sequence[int]]) -> "ExpertPlacement":
        """From any nested sequence, a parsed JSON list for example."""
        return cls(tuple(tuple(node) for node in nodes))

    @property
    def num_nodes(self) -> int:
        return len(self.nodes)

    @property
    def num_experts(self) -> int:
        return 1 + max(e for node in self.nodes for e in node)

    @property
    def max_local_experts(self) -> int:
        """Experts on the fullest node: the leading size of every node's weight arrays."""
        return max(len(node) for node in self.nodes)

    @property
    def is_in_order(self) -> bool:
        """Whether one node holds every expert under its own id."""
        return self.nodes == (tuple(range(len(self.nodes[0]))),)

    @property
    def max_replicas(self) -> int:
        return max(len(self.replicas(e)) for e in range(self.num_experts))

    def replicas(self, expert: int) -> tuple[tuple[int, int], ...]:
        """Every (node, local_idx) that holds the expert, by node."""
        return tuple((n, node.index(expert)) for n, node in enumerate(self.nodes) if expert in node)

    def tables(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Lookup tables for routing on device.

        Returns:
          `node [E, max_replicas]` and `local_idx [E, max_replicas]`, int32, rows shorter than max_replicas padded
          with their first replica; `num_replicas [E]`, int32.
        """
        replicas = [self.replicas(e) for e in range(self.num_experts)]
        width = self.max_replicas
        padded = np.array([r + r[:1] * (width - len(r)) for r in replicas], np.int32)
        return padded[:, :, 0], padded[:, :, 1], np.array([len(r) for r in replicas], np.int32)
