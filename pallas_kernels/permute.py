"""Rows of one device in the order of their experts, and back: what stands before and behind the grouped products."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.pallas_kernels.block_scaled import quantize_rows

Implementation = Literal["xla", "pallas", "reference"]


class Permuted(NamedTuple):
    """Rows sorted by expert. Group e stands at rows group_starts[e] .. group_starts[e] + group_sizes[e] - 1."""

    rows: jax.Array  # [padded, D]; rows of no group hold anything
    group_sizes: jax.Array  # [E] int32
    group_starts: jax.Array  # [E] int32, multiples of `align`
    positions: jax.Array  # [rows, k] int32, where a row's j-th choice stands; -1 where it chose none
    scales: jax.Array | None = None  # [padded, D / 128] float32, of rows that were rounded to float8


def num_padded_rows(num_rows: int, k: int, num_experts: int, align: int) -> int:
    """The worst case of sum_e ceil(group_sizes[e] / align) * align, over all choices of `num_rows * k` pairs."""
    pairs = num_rows * k
    return -(-(pairs + min(pairs, num_experts) * (align - 1)) // align) * align


def permute(
    rows: jax.Array,
    local_idx: jax.Array,
    num_experts: int,
    *,
    align: int = 1,
    float8: bool = False,
    implementation: Implementation | None = None,
) -> Permuted:
    """A stable counting sort of (row, choice) pairs by expert, and the rows gathered in that order.

    Args:
      rows: `[rows, D]`.
      local_idx: `[rows, k]` int32, experts 0 .. num_experts - 1; -1 for none.
      num_experts: E.
      align: every group starts at a multiple of it.
      float8: round the rows to float8_e4m3fn with a scale a 128 columns, as `quantize_rows` does, on the way.
      implementation: "xla" (a sort), "pallas" (Mosaic GPU: one kernel up to MAX_FUSED_PAIRS pairs, else three),
        "reference" (numpy, outside jit), None for "xla".

    Returns:
      `Permuted`; its rows are as many as the worst case needs (`num_padded_rows`).

    Raises:
      ValueError: shapes that don't belong together, or an implementation that can't run.
    """
    if rows.ndim != 2 or local_idx.ndim != 2 or len(rows) != len(local_idx) or align < 1:
        raise ValueError(
            f"permute: expected rows [rows, D], local_idx [rows, k] and align >= 1, got {rows.shape}, "
            f"{local_idx.shape} and {align}"
        )
    if implementation == "pallas":
        from jmoe.pallas_kernels.permute_mosaic import permute_pallas

        padded = num_padded_rows(local_idx.shape[0], local_idx.shape[1], num_experts, align)
        return Permuted(*permute_pallas(rows, local_idx, num_experts, align, padded, float8))
    if implementation == "reference":
        return _reference(rows, local_idx, num_experts, align, float8)
    if implementation not in (None, "xla"):
        raise ValueError(
            f"permute: expected implementation 'xla', 'pallas', 'reference' or None, got {implementation!r}"
        )
    return _xla(rows, local_idx, num_experts, align, float8)


def unpermute(
    rows: jax.Array,
    positions: jax.Array,
    topk_weights: jax.Array | None = None,
    *,
    older_positions: bool = False,
    out_dtype: jax.typing.DTypeLike = jnp.float32,
    implementation: Implementation | None = None,
) -> jax.Array:
    """out[r] = sum_j w[r, j] * rows[positions[r, j]] over positions >= 0, in float32, j ascending.

    Args:
      rows: `[padded, D]`, in the order of `permute`.
      positions: `[rows, k]` int32 of `permute`.
      topk_weights: `[rows, k]` float32, or None where the rows are weighted already. Where it is 0 the row is not heard
        at all, so that what a muted row holds, NaN included, says nothing.
      older_positions: what makes the rows waits for what made the positions: "pallas" may read these before it has
        ended.
      out_dtype: float32 or bfloat16, to which the sum is rounded.
      implementation: as in `permute`.

    Returns:
      `[rows, D]`; zeros where a row has no position.

    Raises:
      ValueError: shapes that don't belong together, or an implementation that can't run.
    """
    if rows.ndim != 2 or positions.ndim != 2 or (topk_weights is not None and topk_weights.shape != positions.shape):
        raise ValueError(
            f"unpermute: expected rows [padded, D], positions [rows, k] and topk_weights [rows, k] or None, got "
            f"{rows.shape}, {positions.shape} and {None if topk_weights is None else topk_weights.shape}"
        )
    if jnp.dtype(out_dtype) not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"unpermute: expected out_dtype float32 or bfloat16, got {jnp.dtype(out_dtype)}")
    if implementation == "pallas":
        from jmoe.pallas_kernels.permute_mosaic import unpermute_pallas

        return unpermute_pallas(rows, positions, topk_weights, older_positions, jnp.dtype(out_dtype))
    if implementation not in (None, "xla", "reference"):
        raise ValueError(
            f"unpermute: expected implementation 'xla', 'pallas', 'reference' or None, got {implementation!r}"
        )
    out = jnp.zeros((len(positions), rows.shape[1]), jnp.float32)
    for j in range(positions.shape[1]):  # unrolled: a fixed order of additions
        position = positions[:, j]
        heard = position >= 0
        if topk_weights is not None:
            heard &= topk_weights[:, j] != 0
        gathered = rows.at[jnp.maximum(position, 0)].get(mode="promise_in_bounds").astype(jnp.float32)
        if topk_weights is not None:
            gathered = gathered * topk_weights[:, j, None]
        out = out + jnp.where(heard[:, None], gathered, 0.0)
    return out.astype(out_dtype)


def _starts(group_sizes: jax.Array, align: int) -> jax.Array:
    padded = -(-group_sizes // align) * align
    return jnp.cumsum(padded) - padded


def _xla(rows: jax.Array, local_idx: jax.Array, num_experts: int, align: int, float8: bool) -> Permuted:
    num_rows, k = local_idx.shape
    pairs = local_idx.reshape(-1)
    key = jnp.where(pairs < 0, num_experts, pairs)
    order = jnp.argsort(key, stable=True)  # the pair that stands n-th
    sizes = jnp.sum(key[:, None] == jnp.arange(num_experts, dtype=jnp.int32), axis=0, dtype=jnp.int32)
    starts = _starts(sizes, align)
    shift = jnp.append(starts - (jnp.cumsum(sizes) - sizes), 0).astype(jnp.int32)  # what the padding before it adds
    nth = jnp.zeros_like(order).at[order].set(jnp.arange(len(order), dtype=order.dtype), unique_indices=True)
    positions = jnp.where(pairs < 0, -1, nth.astype(jnp.int32) + shift[key])
    padded = num_padded_rows(num_rows, k, num_experts, align)
    source = jnp.zeros((padded,), jnp.int32)
    source = source.at[jnp.where(positions < 0, padded, positions)].set(
        jnp.arange(num_rows * k, dtype=jnp.int32) // k, mode="drop", unique_indices=False
    )
    payloads = quantize_rows(rows) if float8 else (rows,)
    gathered = [p.at[source].get(mode="promise_in_bounds") for p in payloads]
    return Permuted(gathered[0], sizes, starts.astype(jnp.int32), positions.reshape(num_rows, k), *gathered[1:])


def _reference(rows, local_idx, num_experts: int, align: int, float8: bool) -> Permuted:
    """numpy, one pair at a time; padding rows are zeros."""
    payloads = [np.asarray(p) for p in (jax.jit(quantize_rows)(jnp.asarray(rows)) if float8 else (rows,))]
    ids = np.asarray(local_idx)
    sizes = np.array([(ids == e).sum() for e in range(num_experts)], np.int32)
    padded = -(-sizes // align) * align
    starts = (np.cumsum(padded) - padded).astype(np.int32)
    length = num_padded_rows(ids.shape[0], ids.shape[1], num_experts, align)
    outs = [np.zeros((length, p.shape[1]), p.dtype) for p in payloads]
    positions, taken = np.full(ids.shape, -1, np.int32), starts.copy()
    for (r, j), expert in np.ndenumerate(ids):
        if expert >= 0:
            positions[r, j] = taken[expert]
            for out, payload in zip(outs, payloads, strict=True):
                out[taken[expert]] = payload[r]
            taken[expert] += 1
    values, *scales = (jnp.asarray(out) for out in outs)
    return Permuted(values, jnp.asarray(sizes), jnp.asarray(starts), jnp.asarray(positions), *scales)
