"""The expert FFN with float8 weights: the products of float8 numbers, summed in float32 with a scale each 128 terms."""

import jax
import jax.numpy as jnp

from jmoe.pallas_kernels.block_scaled import BLOCK, BlockScaled, dequantize_rows, num_blocks, quantize_rows


def block_scaled_ffn(
    rows: jax.Array,
    local_idx: jax.Array,
    topk_weights: jax.Array,
    gate_proj: BlockScaled,
    up_proj: BlockScaled,
    down_proj: BlockScaled,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """As `expert_ffn`, with Q(v) = `quantize_rows(v)`: down(Q(silu(Q(x) gate) * (Q(x) up))), weighted and summed.

    What enters each product is rounded to float8, per row and 128 columns; the second time straight from float32.

    Args:
      rows: `[rows, D]`; local_idx, topk_weights: `[rows, k]`, as `expert_ffn` takes them.
      gate_proj, up_proj: values `[E, F, D]`; down_proj: values `[E, D, F]`.
      implementation: "xla" (every expert over every row), "reference" (float32, a gathered expert a row), None for
        "xla".

    Returns:
      `[rows, D]` float32.

    Raises:
      ValueError: arrays that don't belong together, or an unknown implementation.
    """
    _check(rows, gate_proj, up_proj, down_proj)
    if implementation not in (None, "xla", "reference"):
        raise ValueError(
            f"expert_ffn: expected implementation 'xla', 'reference' or None for float8 weights, got {implementation!r}"
        )
    if implementation == "reference":
        return _reference(rows, local_idx, topk_weights, gate_proj, up_proj, down_proj)
    num_experts = gate_proj.shape[0]
    chosen = local_idx[:, :, None] == jnp.arange(num_experts, dtype=jnp.int32)
    share = jnp.sum(jnp.where(chosen, topk_weights[:, :, None], 0.0), axis=1)  # [rows, E], 0 where not chosen
    values, scales = (jnp.broadcast_to(a, (num_experts, *a.shape)) for a in quantize_rows(rows))
    gate, up = scaled_products(values, scales, gate_proj), scaled_products(values, scales, up_proj)
    down = scaled_products(*quantize_rows(jax.nn.silu(gate) * up), down_proj)  # [E, rows, D]
    # Unrolled, not an einsum: a fixed order of additions, and a zero share drops whatever a stray row computed.
    terms = [jnp.where(share[:, e, None] != 0, share[:, e, None] * down[e], 0.0) for e in range(num_experts)]
    return sum(terms[1:], terms[0])


def scaled_products(values: jax.Array, scales: jax.Array, weights: BlockScaled) -> jax.Array:
    """out[e, r, o] = sum_b scales[e, r, b] * weights.scales[e, o // 128, b] * sum_(i in b) values[e, r, i] w[e, o, i].

    Args:
      values: `[E, rows, in]` float8_e4m3fn; scales: `[E, rows, ceil(in / 128)]` float32 (`quantize_rows`).
      weights: values `[E, out, in]`.

    Returns:
      `[E, rows, out]` float32. The inner sums are products of bfloat16, which holds every float8 and (in float32)
      every product of two exactly.
    """
    blocks, num_out = num_blocks(values.shape[2]), weights.shape[1]
    padding = [(0, 0), (0, 0), (0, blocks * BLOCK - values.shape[2])]
    left, right = (jnp.pad(a, padding) for a in (values, weights.values))

    def add(b, total):
        x, w = (jax.lax.dynamic_slice_in_dim(a, b * BLOCK, BLOCK, axis=2).astype(jnp.bfloat16) for a in (left, right))
        part = jax.lax.dot_general(x, w, (((2,), (2,)), ((0,), (0,))), preferred_element_type=jnp.float32)
        out_scales = jnp.repeat(_column(weights.scales, b), BLOCK, axis=1)[:, :num_out]
        return total + part * (_column(scales, b)[:, :, None] * out_scales[:, None, :])

    nothing = jnp.zeros((*values.shape[:2], num_out), jnp.float32)
    return add(0, nothing) if blocks == 1 else jax.lax.fori_loop(0, blocks, add, nothing)


def _column(scales: jax.Array, b) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(scales, b, axis=2, keepdims=False)


def _reference(rows, local_idx, topk_weights, gate_proj, up_proj, down_proj):
    """Float32, the chosen experts' weights gathered for each row; the same two roundings to float8."""
    x = dequantize_rows(*quantize_rows(rows))
    gate, up, down = (w.dequantize() for w in (gate_proj, up_proj, down_proj))
    out = jnp.zeros(rows.shape, jnp.float32)
    for j in range(local_idx.shape[1]):
        e = jnp.maximum(local_idx[:, j], 0)
        hidden = jax.nn.silu(_apply(x, gate[e])) * _apply(x, up[e])
        term = topk_weights[:, j, None] * _apply(dequantize_rows(*quantize_rows(hidden)), down[e])
        out = out + jnp.where(local_idx[:, j, None] >= 0, term, 0.0)
    return out


def _apply(x: jax.Array, w: jax.Array) -> jax.Array:
    """[rows, in] x [rows, out, in] -> [rows, out]."""
    return jnp.einsum("ri,roi->ro", x, w, precision="highest")


def _check(rows: jax.Array, gate: BlockScaled, up: BlockScaled, down: BlockScaled) -> None:
    for name, weights in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
        if not isinstance(weights, BlockScaled):
            raise ValueError(f"expert_ffn: expected {name} BlockScaled as the others, got {type(weights).__name__}")
        weights.check(f"expert_ffn: {name}")
    num_experts, width, hidden = gate.shape
    if up.shape != gate.shape or down.shape != (num_experts, hidden, width) or rows.shape[1:] != (hidden,):
        raise ValueError(
            f"expert_ffn: expected rows [rows, D], BlockScaled gate and up [E, F, D] and down [E, D, F], got "
            f"{rows.shape}, {gate.shape}, {up.shape} and {down.shape}"
        )
