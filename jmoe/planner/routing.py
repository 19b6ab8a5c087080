"""Drawn routing: which experts tokens choose, token by token or as totals per expert node. No JAX."""

import dataclasses
from typing import Literal

import numpy as np

from jmoe.sharding.placement import ExpertPlacement

MAX_DRAWS = 50_000_000  # tokens * experts of one exact draw: 400 MB


@dataclasses.dataclass(frozen=True, slots=True)
class Routing:
    """How popular each expert of each layer is.

    Attributes:
      kind: "uniform"; "zipf" (the r-th most popular expert has weight r ** -zipf_exponent, in another order in every
        layer); "histogram" (weights recorded from traffic).
      zipf_exponent: of "zipf".
      histogram: of "histogram": a row a layer of row counts per expert, or one row for all layers.

    Raises:
      ValueError: an unknown kind, a histogram that is missing, ragged, negative or empty in a layer.
    """

    kind: Literal["uniform", "zipf", "histogram"] = "uniform"
    zipf_exponent: float = 0.0
    histogram: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self):
        if self.kind not in ("uniform", "zipf", "histogram"):
            raise ValueError(f"Routing.kind: expected 'uniform', 'zipf' or 'histogram', got {self.kind!r}")
        if self.zipf_exponent < 0:
            raise ValueError(f"Routing.zipf_exponent: expected at least 0, got {self.zipf_exponent}")
        if self.kind != "histogram":
            return
        if not self.histogram or len({len(row) for row in self.histogram}) != 1:
            raise ValueError(
                f"Routing.histogram: expected rows of equal length, got lengths {[len(row) for row in self.histogram]}"
            )
        if any(min(row) < 0 or not sum(row) > 0 for row in self.histogram):
            raise ValueError("Routing.histogram: expected counts of at least 0 with some traffic in every layer")

    def popularity(self, num_layers: int, num_experts: int, seed: int = 0) -> np.ndarray:
        """`[L, E]` weights, each layer's summing to 1.

        Raises:
          ValueError: a histogram for other numbers of layers or experts.
        """
        if self.kind == "histogram":
            table = np.array(self.histogram, np.float64)
            if table.shape[1] != num_experts or len(table) not in (1, num_layers):
                raise ValueError(
                    f"Routing.histogram: expected {num_layers} (or 1) rows of {num_experts} experts, got {table.shape}"
                )
            table = np.broadcast_to(table, (num_layers, num_experts))
        else:
            exponent = self.zipf_exponent if self.kind == "zipf" else 0.0
            weights = np.arange(1, num_experts + 1) ** -exponent
            rng = np.random.default_rng(seed)
            table = np.stack([rng.permutation(weights) for _ in range(num_layers)])
        return table / table.sum(axis=1, keepdims=True)


def draw_topk(rng: np.random.Generator, popularity: np.ndarray, num_tokens: int, k: int) -> np.ndarray:
    """Draws k different experts for each token: exponential clocks of rate popularity, the first k to ring.

    That is sampling without replacement in proportion to the weights (Plackett-Luce), exactly.

    Args:
      rng: random numbers.
      popularity: `[E]`; an expert of weight 0 is never drawn.
      num_tokens, k: the shape of the answer.

    Returns:
      `[num_tokens, k]` expert ids.

    Raises:
      ValueError: fewer than k experts with traffic, or a draw too large.
    """
    alive = np.flatnonzero(popularity > 0)
    if len(alive) < k:
        raise ValueError(f"draw_topk: expected at least {k} experts with traffic, got {len(alive)}")
    if num_tokens * len(alive) > MAX_DRAWS:
        raise ValueError(f"draw_topk: expected at most {MAX_DRAWS} tokens * experts, got {num_tokens * len(alive)}")
    clocks = rng.exponential(size=(num_tokens, len(alive))) / popularity[alive]
    return alive[np.argpartition(clocks, k - 1, axis=1)[:, :k]]


def count_rows(
    rng: np.random.Generator, topk_idx: np.ndarray, replica: np.ndarray, placement: ExpertPlacement, num_replicas: int
) -> tuple[np.ndarray, np.ndarray]:
    """Counts what a drawn routing sends where; an expert's replicas share its tokens by chance.

    Args:
      topk_idx: `[T, k]`.
      replica: `[T]` attention replica of each token.

    Returns:
      `[M, N]` rows sent (a token once per node that holds one of its experts) and `[N]` (token, expert) pairs.
    """
    node, _, num_nodes_of = placement.tables()
    chosen = node[topk_idx, (rng.random(topk_idx.shape) * num_nodes_of[topk_idx]).astype(int)]
    pairs = np.bincount(chosen.ravel(), minlength=placement.num_nodes)
    reached = np.zeros((len(topk_idx), placement.num_nodes), bool)
    reached[np.arange(len(topk_idx))[:, None], chosen] = True
    rows = np.zeros((num_replicas, placement.num_nodes), np.int64)
    np.add.at(rows, replica, reached)
    return rows, pairs


@dataclasses.dataclass(frozen=True, slots=True)
class NodeTraffic:
    """How a token's experts fall on nodes, layer by layer, for drawing totals without drawing tokens.

    Attributes:
      pairs_mean, pairs_var: `[L, N]` of the (token, expert) pairs that one token brings to a node.
      row_mean: `[L, N]` probability that a token is sent to a node at all.
    """

    pairs_mean: np.ndarray
    pairs_var: np.ndarray
    row_mean: np.ndarray

    @classmethod
    def of(cls, popularity: np.ndarray, k: int, placement: ExpertPlacement) -> "NodeTraffic":
        """Means and variances from stopped clocks (see `draw_topk`).

        Stop all clocks at the time tau at which k have rung in the mean: an expert is chosen with 1 - exp(-tau *
        weight), its replicas in equal parts. A node is missed if each of k picks falls outside it; a pick does so with
        the share of the weight that is still outside after the picks before. Exact for even weights.
        """
        node, _, num_copies = placement.tables()
        held = np.zeros((placement.num_nodes, placement.num_experts))  # a node's share of an expert's tokens
        for expert, copies in enumerate(num_copies):
            held[node[expert, :copies], expert] = 1 / copies
        kinds, layer_kind = np.unique(popularity, axis=0, return_inverse=True)  # often all layers are alike
        chosen = -np.expm1(-_stopping_time(kinds, k)[:, None] * kinds)
        part = chosen[:, None, :] * held
        mean, var, row_mean = part.sum(axis=-1), (part * (1 - part)).sum(axis=-1), 1 - _missed(kinds, k, held)
        return cls(mean[layer_kind], var[layer_kind], row_mean[layer_kind])

    def draw(
        self, rng: np.random.Generator, num_micro_batches: int, num_cells: int, num_tokens: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draws totals of num_tokens tokens: normal, conditioned on the pairs summing to k * num_tokens.

        Returns:
          rows `[L, m, C, N]` that arrive at each node and pairs `[L, m, C, N]` that it computes, float64.
        """
        layers, nodes = self.pairs_mean.shape
        sigma = np.sqrt(num_tokens * self.pairs_var)[:, None, None, :]
        z = rng.standard_normal((layers, num_micro_batches, num_cells, nodes), np.float32) * sigma
        share = sigma**2 / np.maximum((sigma**2).sum(axis=-1, keepdims=True), 1e-30)
        z -= z.sum(axis=-1, keepdims=True) * share
        mean = num_tokens * self.pairs_mean[:, None, None, :]
        pairs = np.maximum(mean + z, 0.0)
        per_pair = (self.row_mean / np.maximum(self.pairs_mean, 1e-30))[:, None, None, :]
        return np.minimum(pairs * per_pair, num_tokens), pairs


def _missed(popularity: np.ndarray, k: int, held: np.ndarray) -> np.ndarray:
    """`[L, N]` probability that none of a token's k picks falls on a node."""
    result = np.empty((len(popularity), len(held)))
    for n, share in enumerate(held):
        outside = popularity * (1 - share)
        inside = (popularity * share).sum(axis=1)
        none = np.ones(len(popularity))
        for picks in range(k):
            left = outside
            if picks:
                left = outside * np.exp(-_stopping_time(outside, picks)[:, None] * outside)
            left = left.sum(axis=1)
            none *= left / np.maximum(left + inside, 1e-300)
        result[:, n] = none
    return result


def _stopping_time(weights: np.ndarray, k: int) -> np.ndarray:
    """`[L]` tau with sum over experts of 1 - exp(-tau * weight) = k, by bisection in log space.

    Where no more than k experts have weight it is infinite, in effect: all of them are always chosen.
    """
    low, high = np.full(len(weights), -20.0), np.full(len(weights), 60.0)
    for _ in range(60):
        middle = (low + high) / 2
        rung = -np.expm1(-np.exp(middle)[:, None] * weights).sum(axis=1)
        enough = rung >= k
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return np.exp(high)
