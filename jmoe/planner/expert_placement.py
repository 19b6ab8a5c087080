"""Replicas and placement of experts from a traffic histogram, so that the busiest node has least to do. No JAX."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jmoe.sharding.placement import ExpertPlacement

MAX_CANDIDATES = 24
CLOSE_ENOUGH = 1.005  # of the mean load, where the search for a better placement stops


@dataclasses.dataclass(frozen=True)
class PlacedExperts:
    """A placement and what it does to the traffic.

    Attributes:
      placement: which node holds which experts.
      shares: `[N, E]`, x[n, e] = part of expert e's cost on node n under even use of its replicas; columns sum to 1.
      loads: `[N]`, cost of every node.
    """

    placement: ExpertPlacement
    shares: np.ndarray
    loads: np.ndarray

    @property
    def imbalance(self) -> float:
        """Busiest node over the mean: `Workload.expert_imbalance`."""
        return float(self.loads.max() / self.loads.mean())


def expert_costs(histogram: Sequence[float] | np.ndarray, floor: float) -> np.ndarray:
    """max(a_i, floor): an expert with little traffic still costs the time of streaming its weights.

    Args:
      histogram: `[E]`, rows of each expert in some period.
      floor: rows whose products take as long as reading the weights, in the same unit as the histogram.

    Raises:
      ValueError: a negative count, no counts, or only zeros with a floor of 0.
    """
    costs = np.maximum(np.asarray(histogram, np.float64), floor)
    if costs.ndim != 1 or not costs.size or np.min(histogram) < 0 or not np.all(np.isfinite(costs)):
        raise ValueError(f"expert_costs: expected a list of counts of at least 0, got {histogram}")
    if not costs.max() > 0:
        raise ValueError("expert_costs: expected traffic or a floor above 0, got neither")
    return costs


def place_experts(
    histogram: Sequence[float] | np.ndarray, num_nodes: int, slots: int, floor: float = 0.0
) -> PlacedExperts:
    """Greedy replicas and placement: min over placements of max_n sum_e x[n, e] * max(a_e, floor).

    Replicas: every expert has one; each further slot goes to the expert whose replicas carry most each. Placement:
    replicas in falling order of cost, each to the node with the least load that has a free slot and not this expert;
    then pairs of replicas are swapped, and single ones moved, while that lowers the busiest node's load.

    Args:
      histogram: `[E]`, rows of each expert.
      num_nodes: N.
      slots: experts that a node can hold (its memory over an expert's).
      floor: see `expert_costs`.

    Returns:
      The placement, with shares and loads.

    Raises:
      ValueError: fewer slots than experts, or a count below 1.

    Source: MegaScale-Infer (arXiv 2504.02263), section 6.
    """
    costs = expert_costs(histogram, floor)
    num_experts = costs.size
    if num_nodes < 1 or slots < 1:
        raise ValueError(f"place_experts: expected num_nodes and slots of at least 1, got {num_nodes} and {slots}")
    if num_nodes * slots < num_experts:
        raise ValueError(
            f"place_experts: expected room for {num_experts} experts, got {num_nodes} nodes x {slots} slots; "
            f"needed: {-(-num_experts // num_nodes)} slots a node or {-(-num_experts // slots)} nodes"
        )
    best: PlacedExperts | None = None
    if num_nodes <= num_experts and -(-num_experts // num_nodes) <= slots:  # the default is the one to beat
        default = ExpertPlacement.balanced(num_experts, num_nodes)
        best = _result(costs, _improve(costs, [set(node) for node in default.nodes]))
    for copies in _replica_counts(costs, num_nodes, slots):
        if best is not None and best.loads.max() <= CLOSE_ENOUGH * best.loads.mean():
            break  # no placement is below the mean, and each replica costs memory
        nodes = _spread(costs / copies, copies, num_nodes, slots)
        placed = _improve(costs / copies, nodes)
        candidate = _result(costs, placed)
        if best is None or candidate.loads.max() < best.loads.max() * (1 - 1e-12):
            best = candidate
    assert best is not None
    return best


def _replica_counts(costs: np.ndarray, num_nodes: int, slots: int) -> list[np.ndarray]:
    """Candidates: after each slot that is given away, how many replicas every expert has."""
    copies = np.ones(costs.size, np.int64)
    counts = [copies.copy()]
    for _ in range(num_nodes * slots - costs.size):
        each = np.where(copies < num_nodes, costs / copies, -1.0)
        busiest = int(each.argmax())
        if each[busiest] < 0:
            break
        copies[busiest] += 1
        counts.append(copies.copy())
    if len(counts) > MAX_CANDIDATES:  # every candidate costs a placement; evenly spaced ones are enough
        picks = np.unique(np.linspace(0, len(counts) - 1, MAX_CANDIDATES).astype(int))
        counts = [counts[i] for i in picks]
    return counts


def _spread(each: np.ndarray, copies: np.ndarray, num_nodes: int, slots: int) -> list[set[int]]:
    nodes: list[set[int]] = [set() for _ in range(num_nodes)]
    loads = np.zeros(num_nodes)
    # Experts with most replicas first among equals: they need that many different nodes.
    for expert in sorted(range(each.size), key=lambda e: (-each[e], -copies[e])):
        for _ in range(copies[expert]):
            free = [n for n in range(num_nodes) if len(nodes[n]) < slots and expert not in nodes[n]]
            if not free:
                break  # one replica fewer; the shares are worked out from what was placed
            node = min(free, key=lambda n: (loads[n], len(nodes[n])))
            nodes[node].add(expert)
            loads[node] += each[expert]
    return _no_empty_node(nodes)


def _no_empty_node(nodes: list[set[int]]) -> list[set[int]]:
    """ExpertPlacement has no empty node: an idle one takes another replica of some expert of the fullest."""
    for node in nodes:
        if not node:
            node.add(min(max(nodes, key=len)))
    return nodes


def _improve(each: np.ndarray, nodes: list[set[int]]) -> list[set[int]]:
    """Swaps between the busiest node and another while that lowers the larger of the two loads."""
    loads = np.array([sum(each[e] for e in node) for node in nodes])
    for _ in range(4 * each.size * len(nodes)):  # each round lowers a load; the bound is never met in practice
        busiest = int(loads.argmax())
        swap = _best_swap(each, nodes, loads, busiest)
        if swap is None:
            return nodes
        other, out, back = swap
        change = each[out] - each[back]
        nodes[busiest].remove(out)
        nodes[other].remove(back)
        nodes[busiest].add(back)
        nodes[other].add(out)
        loads[busiest] -= change
        loads[other] += change
    return nodes


def _best_swap(
    each: np.ndarray, nodes: list[set[int]], loads: np.ndarray, busiest: int
) -> tuple[int, int, int] | None:
    best, swap = loads[busiest] * (1 - 1e-12), None
    for other in range(len(nodes)):
        if other == busiest:
            continue
        for out in nodes[busiest] - nodes[other]:
            for back in nodes[other] - nodes[busiest]:
                change = each[out] - each[back]
                after = max(loads[busiest] - change, loads[other] + change)
                if change > 0 and after < best:
                    best, swap = after, (other, out, back)
    return swap


def _result(costs: np.ndarray, nodes: list[set[int]]) -> PlacedExperts:
    held = np.array([[e in node for e in range(costs.size)] for node in nodes], np.float64)
    shares = held / held.sum(0)
    return PlacedExperts(ExpertPlacement.of([sorted(node) for node in nodes]), shares, shares @ costs)
