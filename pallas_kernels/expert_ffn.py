"""The expert FFN of one node: rows in, one weighted partial sum a row out."""

from typing import Literal

import jax
import jax.numpy as jnp

Implementation = Literal["xla", "reference"]


def expert_ffn(
    rows: jax.Array,
    local_idx: jax.Array,
    topk_weights: jax.Array,
    gate_proj: jax.Array,
    up_proj: jax.Array,
    down_proj: jax.Array,
    *,
    implementation: Implementation | None = None,
) -> jax.Array:
    """y[r] = sum_j w[r, j] * down[e_j](silu(x[r] gate[e_j]) * (x[r] up[e_j])), e_j = local_idx[r, j], over e_j >= 0.

    Args:
      rows: `[rows, D]`.
      local_idx: `[rows, k]` int32, experts of this node that the row chose; -1 where its choice is elsewhere.
      topk_weights: `[rows, k]` float32, ignored where local_idx is -1.
      gate_proj, up_proj: `[E, D, F]`; down_proj: `[E, F, D]`; E experts of this node, F this tensor rank's columns.
      implementation: "xla" (every expert over every row, batched: reads each weight once and copies none; its waste
        is E/k in operations, none in bytes), "reference" (float32, a gathered expert a row), None for the best.

    Returns:
      `[rows, D]` float32 partial sums (over the node's experts and this rank's columns). A row with no local expert
      gives zeros.

    Raises:
      ValueError: shapes that don't belong together, or an unknown implementation.
    """
    num_experts, hidden, width = gate_proj.shape
    if up_proj.shape != gate_proj.shape or down_proj.shape != (num_experts, width, hidden) or rows.shape[1] != hidden:
        raise ValueError(
            f"expert_ffn: expected rows [rows, D], gate and up [E, D, F] and down [E, F, D], got {rows.shape}, "
            f"{gate_proj.shape}, {up_proj.shape} and {down_proj.shape}"
        )
    if implementation == "reference":
        return _reference(rows, local_idx, topk_weights, gate_proj, up_proj, down_proj)
    if implementation not in (None, "xla"):
        raise ValueError(f"expert_ffn: expected implementation 'xla', 'reference' or None, got {implementation!r}")
    chosen = local_idx[:, :, None] == jnp.arange(num_experts, dtype=jnp.int32)
    share = jnp.sum(jnp.where(chosen, topk_weights[:, :, None], 0.0), axis=1)  # [rows, E], 0 where not chosen
    batched = jnp.broadcast_to(rows, (num_experts, *rows.shape))
    gate = _batched_matmul(batched, gate_proj)
    up = _batched_matmul(batched, up_proj)
    down = _batched_matmul((jax.nn.silu(gate) * up).astype(rows.dtype), down_proj)  # [E, rows, D] float32
    # Unrolled, not an einsum: a fixed order of additions, and a zero share drops whatever a stray row computed.
    terms = [jnp.where(share[:, e, None] != 0, share[:, e, None] * down[e], 0.0) for e in range(num_experts)]
    return sum(terms[1:], terms[0])


def _batched_matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """[E, rows, in] x [E, in, out] -> [E, rows, out] in float32."""
    return jax.lax.dot_general(x, w, (((2,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32)


def _reference(rows, local_idx, topk_weights, gate_proj, up_proj, down_proj):
    """Float32, the chosen experts' weights gathered for each row."""
    x = rows.astype(jnp.float32)
    out = jnp.zeros_like(x)
    for j in range(local_idx.shape[1]):
        expert = jnp.maximum(local_idx[:, j], 0)
        gate, up, down = (w[expert].astype(jnp.float32) for w in (gate_proj, up_proj, down_proj))
        hidden = jax.nn.silu(jnp.einsum("rd,rdf->rf", x, gate)) * jnp.einsum("rd,rdf->rf", x, up)
        term = topk_weights[:, j, None] * jnp.einsum("rf,rfd->rd", hidden, down)
        out = out + jnp.where(local_idx[:, j, None] >= 0, term, 0.0)
    return out
