"""What one stage takes and holds: attention, experts, exchange and memory, from a roofline. No JAX.

Every size may be a NumPy array; all functions broadcast. Times are seconds.
"""

import dataclasses
import functools
from typing import Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike

from jmoe.planner.collectives import collective_s
from jmoe.planner.hardware import GpuKind
from jmoe.planner.model_shape import ModelShape
from jmoe.planner.workload import expected_largest

Transport = Literal["exact", "ppermute"]


@dataclasses.dataclass(frozen=True, slots=True)
class Precision:
    """Bytes an element of weights, KV cache, and rows on the wire (out to the experts, and back)."""

    weight_bytes: float = 2.0
    kv_bytes: float = 2.0
    dispatch_bytes: float = 2.0
    combine_bytes: float = 2.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) not in (1.0, 2.0, 4.0):
                raise ValueError(f"Precision.{field.name}: expected 1, 2 or 4 bytes, got {getattr(self, field.name)}")


class StageTimes(Protocol):
    """Where stage times come from: the roofline below, or a profile that was measured."""

    def attention_s(self, rows: ArrayLike, context: ArrayLike, tensor: int) -> np.ndarray:
        """One attention stage of one micro-batch: rows requests of one replica, context KV tokens each."""
        ...

    def expert_s(
        self, rows: ArrayLike, num_local_experts: ArrayLike, tensor: int, tokens: ArrayLike | None = None
    ) -> np.ndarray:
        """One expert stage of one micro-batch on one node: rows (token, expert) pairs of so many different tokens."""
        ...

    def head_s(self, rows: ArrayLike, tensor: int) -> np.ndarray:
        """Final norm, logits and sampling of rows tokens."""
        ...

    def dense_s(self, rows: ArrayLike, context: ArrayLike, tensor: int) -> np.ndarray:
        """One layer without experts (attention and its FFN), on the attention mesh."""
        ...

    def exchange_s(
        self, exchange: "ExchangeModel", rows: ArrayLike, num_replicas: ArrayLike, num_nodes: ArrayLike,
        attention_tensor: int, expert_tensor: int, imbalance: ArrayLike, one_domain: ArrayLike,
    ) -> np.ndarray:  # fmt: skip
        """One exchange, one way; the arguments are `ExchangeModel.exchange_s`'s, which says what travels."""
        ...


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Stage times: bytes over bandwidth against operations over rate a kernel (`GpuKind.kernel_s`), plus an overhead.

    Args:
      model: sizes.
      attention_gpu, expert_gpu: the two kinds (the same one for a homogeneous cell).
      precision: bytes an element.
    """

    model: ModelShape
    attention_gpu: GpuKind
    expert_gpu: GpuKind
    precision: Precision = Precision()

    def attention_s(self, rows: ArrayLike, context: ArrayLike, tensor: int) -> np.ndarray:
        """Projections, attention over the cache, router and shared experts, tensor-parallel sum. See StageTimes."""
        model, rows = self.model, np.asarray(rows, np.float64)
        products = self._product(self.attention_gpu, model.attention_params, rows, tensor)
        shared = self._product(self.attention_gpu, model.shared_params, rows, tensor)
        return products + shared + self._scores(rows, context, tensor) + self._fixed(rows, tensor)

    def dense_s(self, rows: ArrayLike, context: ArrayLike, tensor: int) -> np.ndarray:
        """Attention and an ordinary FFN. See StageTimes."""
        rows = np.asarray(rows, np.float64)
        params = self.model.attention_params + self.model.dense_params
        products = self._product(self.attention_gpu, params, rows, tensor)
        return products + self._scores(rows, context, tensor) + self._fixed(rows, tensor)

    def expert_s(
        self, rows: ArrayLike, num_local_experts: ArrayLike, tensor: int, tokens: ArrayLike | None = None
    ) -> np.ndarray:
        """Grouped products, and the gather and sum of the tokens' hidden vectors inside the node. See StageTimes."""
        gathered = np.asarray(rows if tokens is None else tokens, np.float64) * self.model.hidden_size * 2
        products = self.expert_products_s(rows, num_local_experts, tensor)
        return products + self.expert_gpu.stage_overhead_s + collective_s(self.expert_gpu, gathered, tensor)

    def expert_products_s(self, rows: ArrayLike, num_local_experts: ArrayLike, tensor: int) -> np.ndarray:
        """The products alone: weights of the experts that got a row, rows in and out, or the operations."""
        model, gpu = self.model, self.expert_gpu
        rows, local = np.asarray(rows, np.float64), np.asarray(num_local_experts, np.float64)
        # Uniform routing: an expert of a node that gets `rows` rows stays empty with (1 - 1 / local) ** rows.
        active = local * (1 - np.power(1 - 1 / local, rows))
        weights = active * model.expert_params * self.precision.weight_bytes / tensor
        activations = rows * (2 * model.hidden_size + 3 * model.expert_ffn_size / tensor) * 2
        operations = 2 * model.expert_params * rows / tensor
        return gpu.kernel_s(weights + activations, operations, self.precision.weight_bytes)

    def head_s(self, rows: ArrayLike, tensor: int) -> np.ndarray:
        """The logits product in bf16 whatever the layers' precision. See StageTimes."""
        rows, gpu = np.asarray(rows, np.float64), self.attention_gpu
        weights = self.model.head_params * 2 / tensor
        logits = rows * self.model.vocab_size * 4 / tensor
        return gpu.kernel_s(weights + logits, 2 * self.model.head_params * rows / tensor, 2) + gpu.stage_overhead_s

    def exchange_s(
        self, exchange: "ExchangeModel", rows: ArrayLike, num_replicas: ArrayLike, num_nodes: ArrayLike,
        attention_tensor: int, expert_tensor: int, imbalance: ArrayLike, one_domain: ArrayLike,
    ) -> np.ndarray:  # fmt: skip
        """Bytes over bandwidth plus a latency. See StageTimes."""
        return exchange.exchange_s(
            rows, num_replicas, num_nodes, attention_tensor, expert_tensor, imbalance, one_domain
        )

    def _product(self, gpu: GpuKind, params: float, rows: np.ndarray, tensor: int) -> np.ndarray:
        weights = params * self.precision.weight_bytes / tensor
        operations = 2 * params * rows / tensor
        return gpu.kernel_s(weights, operations, self.precision.weight_bytes)

    def _scores(self, rows: np.ndarray, context: ArrayLike, tensor: int) -> np.ndarray:
        """Attention over the cache; a cache that outnumbers its heads is read by every rank that holds a copy."""
        model, gpu = self.model, self.attention_gpu
        tokens = rows * np.asarray(context, np.float64)
        cache = tokens * model.kv_elements * self.precision.kv_bytes * model.kv_copies(tensor) / tensor
        operations = tokens * model.score_flops / tensor
        return gpu.kernel_s(cache, operations, 2)

    def _fixed(self, rows: np.ndarray, tensor: int) -> np.ndarray:
        gpu = self.attention_gpu
        return gpu.stage_overhead_s + collective_s(gpu, rows * self.model.hidden_size * 2, tensor)


def distinct_nodes(num_experts: int, num_experts_per_tok: int, num_nodes: ArrayLike) -> np.ndarray:
    """Expected number of different expert nodes that a token's k different experts stand on, under even routing.

    A node with E / N of the experts has none of them with probability prod_i (E - E / N - i) / (E - i), i < k.
    """
    nodes = np.asarray(num_nodes, np.float64)
    local = np.maximum(num_experts / nodes, 1.0)  # beyond E nodes a token takes one copy of each expert
    none = np.ones_like(nodes)
    for i in range(num_experts_per_tok):
        none = none * np.maximum(num_experts - local - i, 0.0) / (num_experts - i)
    return np.minimum(nodes, num_experts) * (1 - none)


def drawn_excess(
    num_experts: int, num_experts_per_tok: int, local_experts: ArrayLike, num_nodes: ArrayLike, tokens: ArrayLike
) -> np.ndarray:
    """(token, expert) pairs of the busiest of N nodes over their mean, when every token draws its experts evenly.

    A node with l of E experts gets a hypergeometric number of a token's k pairs: mean k l / E, variance
    k l / E (1 - l / E) (E - k) / (E - 1). T tokens add up to nearly a normal, and a stage waits for the largest of N.

    Args:
      num_experts, num_experts_per_tok: E and k.
      local_experts: l; nodes that hold copies of an expert share its pairs evenly.
      num_nodes: N.
      tokens: T, of one micro-batch of all replicas.

    Returns:
      At least 1; 1 for one node.
    """
    share = np.minimum(np.asarray(local_experts, np.float64) / num_experts, 1.0)
    k, tokens = num_experts_per_tok, np.maximum(np.asarray(tokens, np.float64), 1.0)
    variance = k * share * (1 - share) * (num_experts - k) / max(1, num_experts - 1)
    return 1.0 + expected_largest(num_nodes) * np.sqrt(variance / tokens) / (k * share)


@dataclasses.dataclass(frozen=True)
class ExchangeModel:
    """T_c: the slower of what an attention GPU sends and what an expert GPU receives, each over its own link.

    Args:
      model, precision: row sizes.
      attention_gpu, expert_gpu: whose links are used.
      transport: "exact" moves exactly the rows needed (the paper's M2N, a push kernel); "ppermute" is the padded
        portable form: every pair carries the worst case.

    Source: arXiv 2504.02263, Eq. 6, with a token sent once per node instead of once per expert (DESIGN section 4).
    """

    model: ModelShape
    attention_gpu: GpuKind
    expert_gpu: GpuKind
    precision: Precision = Precision()
    transport: Transport = "exact"

    def exchange_s(
        self,
        rows: ArrayLike,
        num_replicas: ArrayLike,
        num_nodes: ArrayLike,
        attention_tensor: int,
        expert_tensor: int,
        imbalance: ArrayLike = 1.0,
        one_domain: ArrayLike = False,
    ) -> np.ndarray:
        """One way; the costlier direction.

        Args:
          rows: of one micro-batch of one replica.
          num_replicas, num_nodes: M and N.
          attention_tensor, expert_tensor: ranks of a replica and of a node; each carries its slice.
          imbalance: rows of the busiest node over the mean.
          one_domain: whether both roles stand in one scale-up domain (else the NICs carry the exchange).
        """
        sent, received = self.bytes_a_gpu(rows, num_replicas, num_nodes, attention_tensor, expert_tensor, imbalance)
        a, e = self.attention_gpu, self.expert_gpu
        scale_up = np.maximum(sent / a.scale_up_bytes_s, received / e.scale_up_bytes_s)
        network = np.maximum(sent / a.nic_bytes_s, received / e.nic_bytes_s)
        kernels = a.kernels
        return np.where(
            one_domain, scale_up + kernels.scale_up_latency_us * 1e-6, network + kernels.nic_latency_us * 1e-6
        )

    def bytes_a_gpu(
        self,
        rows: ArrayLike,
        num_replicas: ArrayLike,
        num_nodes: ArrayLike,
        attention_tensor: int,
        expert_tensor: int,
        imbalance: ArrayLike = 1.0,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Bytes that one attention GPU sends and one expert GPU (of the busiest node) receives."""
        rows, replicas, nodes, imbalance = (
            np.asarray(x, np.float64) for x in (rows, num_replicas, num_nodes, imbalance)
        )
        row_bytes = self.model.hidden_size * max(self.precision.dispatch_bytes, self.precision.combine_bytes)
        if self.transport == "ppermute":
            return rows * nodes * row_bytes / attention_tensor, rows * replicas * row_bytes / expert_tensor
        copies = distinct_nodes(self.model.num_experts, self.model.num_experts_per_tok, nodes)
        sent = rows * copies * row_bytes / attention_tensor
        received = rows * replicas * np.minimum(copies / nodes * imbalance, 1.0) * row_bytes / expert_tensor
        return sent, received


@dataclasses.dataclass(frozen=True)
class Memory:
    """Who holds how many bytes."""

    model: ModelShape
    precision: Precision = Precision()

    @functools.cached_property
    def attention_weight_bytes(self) -> float:
        """Weights of one attention replica, all its ranks together; embedding and head stay in bf16."""
        model = self.model
        head = model.head_params * (1 if model.tie_word_embeddings else 2)
        return (model.attention_role_params - head) * self.precision.weight_bytes + head * 2

    @property
    def expert_bytes(self) -> float:
        """One expert, all layers."""
        return self.model.num_moe_layers * self.model.expert_params * self.precision.weight_bytes

    def kv_token_bytes(self, tensor: int) -> float:
        """One token's cache in all layers, over all ranks of a replica (copies included)."""
        model = self.model
        return model.num_layers * model.kv_elements * self.precision.kv_bytes * model.kv_copies(tensor)

    def max_kv_tokens(self, gpu: GpuKind, tensor: int, weight_bytes: ArrayLike | None = None) -> np.ndarray:
        """KV tokens that fit beside the weights on `tensor` GPUs; negative when the weights alone do not fit."""
        weights = self.attention_weight_bytes if weight_bytes is None else np.asarray(weight_bytes, np.float64)
        return np.asarray((tensor * gpu.usable_bytes - weights) / self.kv_token_bytes(tensor))


def linear_constants(times: StageTimes, context: float, tensor: tuple[int, int]) -> tuple[float, float, float, float]:
    """k1, k2, k3, k4 of T_a = k1 b_a + k2 and T_e = k3 b_e + k4, the slopes taken where both are compute-bound.

    b_a is requests of a replica, b_e rows of one expert. They serve the balanced ratio and its explanation only; the
    search prices every configuration with the times themselves.
    """
    low, high = 2048.0, 4096.0
    a_low, a_high = (float(times.attention_s(b, context, tensor[0])) for b in (low, high))
    e_low, e_high = (float(times.expert_s(b, 1, tensor[1])) for b in (low, high))
    k1, k3 = (a_high - a_low) / (high - low), (e_high - e_low) / (high - low)
    return k1, a_low - k1 * low, k3, e_low - k3 * low


def balanced_replicas(k1: float, k3: float, model: ModelShape, nodes: int | None = None) -> float:
    """M at which T_a = T_e: k1 E / (k3 k) for one expert a node (the paper), scaled to `nodes` nodes."""
    per_expert = k1 * model.num_experts / (k3 * model.num_experts_per_tok)
    return per_expert if nodes is None else per_expert * nodes / model.num_experts
