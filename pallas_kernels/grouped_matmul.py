"""Products of rows sorted by expert with each expert's own weights; group sizes are known on device only."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jmoe.pallas_kernels.block_scaled import dequantize_rows
from jmoe.pallas_kernels.choice import by_platform

Implementation = Literal["xla", "pallas", "reference"]
SCALED = 128  # columns (and rows) of one scale of float8 values


@dataclasses.dataclass(frozen=True)
class GroupedBlocks:
    """How the Mosaic GPU form cuts the work.

    Attributes:
      block_rows: rows of one group at a time (wgmma's N): a multiple of 8 up to 256.
      block_out: columns of the result at a time: a multiple of 64 * consumers.
      block_in: the sum's terms per stage of the pipeline, a multiple of 64 (of 128 for float8).
      num_stages: blocks of weights and rows under way; None for what fits.
      consumers: warpgroups that multiply, each its share of block_out.
    """

    block_rows: int
    block_out: int = 128
    block_in: int = 64
    num_stages: int | None = None
    consumers: int = 2


@dataclasses.dataclass(frozen=True)
class ExpertBlocks(GroupedBlocks):
    """How the Mosaic GPU form of both products of the expert FFN in one kernel cuts the work.

    Attributes:
      terms: a stage of the down product holds block_out columns of 2 * block_in terms, not 2 * block_out of block_in:
        items half as large, which end more evenly, and rows that take twice the shared memory.
      rows_first: of float8, consumers share the rows, 64 each, not the columns (`grouped_multiply_rows`).
    """

    terms: bool = True
    rows_first: bool = False


def grouped_matmul(
    rows: jax.Array,
    weights: Any,
    group_sizes: jax.Array,
    *,
    group_starts: jax.Array | None = None,
    row_weights: jax.Array | None = None,
    rows_scales: jax.Array | None = None,
    out_dtype: Any = None,
    blocks: GroupedBlocks | None = None,
    older_groups: bool = False,
    implementation: Implementation | None = None,
) -> jax.Array:
    """out[r] = row_weights[r] * (rows[r] weights[e]), r a row of group e: group_starts[e] <= r < starts + sizes[e].

    Args:
      rows: `[rows, in]` bfloat16, float32 or, with `rows_scales`, float8_e4m3fn.
      weights: `[E, in, out]`, or a `BlockScaled` of float8 values `[E, out, in]`.
      group_sizes: `[E]` int32.
      group_starts: `[E]` int32, ascending from group to group; None where the groups stand one behind the other.
      row_weights: `[rows]` float32 or None for ones; multiplied in float32.
      rows_scales: `[rows, ceil(in / 128)]` float32, of float8 rows.
      out_dtype: None for the dtype of rows, of float8 rows bfloat16.
      blocks: of the Mosaic form; None for its choice.
      older_groups: what makes the rows had the groups and weights as inputs: the Mosaic form may read both before that
        has ended.
      implementation: "xla" (`jax.lax.ragged_dot`), "pallas" (Mosaic GPU on Hopper; bfloat16, or float8 rows and
        weights), "reference" (float32, an expert at a time), None for the best.

    Returns:
      `[rows, out]`. Rows of no group: zeros, in the Mosaic form anything.

    Raises:
      ValueError: arrays that don't belong together, or an implementation that can't run.
    """
    operands = _Operands(rows, (weights,), group_sizes, group_starts, row_weights, rows_scales)
    return _run("grouped_matmul", operands, out_dtype, blocks, implementation, older_groups)


def gated_grouped_matmul(
    rows: jax.Array,
    gate_proj: Any,
    up_proj: Any,
    group_sizes: jax.Array,
    *,
    group_starts: jax.Array | None = None,
    row_weights: jax.Array | None = None,
    rows_scales: jax.Array | None = None,
    out_dtype: Any = None,
    blocks: GroupedBlocks | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """out[r] = row_weights[r] * silu(rows[r] gate_proj[e]) * (rows[r] up_proj[e]), r a row of group e; in one pass.

    Args:
      rows: `[rows, D]`.
      gate_proj, up_proj: `[E, D, F]`, or `BlockScaled` of values `[E, F, D]`.
      group_sizes: `[E]` int32.
      group_starts, row_weights, rows_scales, out_dtype, blocks, implementation: as in `grouped_matmul`.

    Returns:
      `[rows, F]`; rows of no group as in `grouped_matmul`.

    Raises:
      ValueError: arrays that don't belong together, or an implementation that can't run.
    """
    operands = _Operands(rows, (gate_proj, up_proj), group_sizes, group_starts, row_weights, rows_scales)
    return _run("gated_grouped_matmul", operands, out_dtype, blocks, implementation)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Operands:
    """The arrays of a product; `weights` holds one (`grouped_matmul`) or gate and up."""

    rows: jax.Array
    weights: tuple[Any, ...]
    group_sizes: jax.Array
    group_starts: jax.Array | None
    row_weights: jax.Array | None
    rows_scales: jax.Array | None


def _run(
    op: str, operands: _Operands, out_dtype: Any, blocks: GroupedBlocks | None, implementation: str | None,
    older_groups: bool = False,
):  # fmt: skip
    _check(op, operands)
    rows = operands.rows
    dtype = jnp.dtype(out_dtype or (jnp.bfloat16 if rows.dtype.itemsize == 1 else rows.dtype))
    if implementation == "reference":
        return _reference(operands, dtype)
    if implementation == "xla":
        return _xla(operands, dtype)
    if implementation not in (None, "pallas"):
        raise ValueError(f"{op}: expected implementation 'xla', 'pallas', 'reference' or None, got {implementation!r}")
    obstacle = _why_not(operands)
    if implementation == "pallas":
        if obstacle is not None:
            raise ValueError(f"{op}: implementation 'pallas': {obstacle}")
        return _pallas(operands, dtype, blocks, older_groups)
    if obstacle is not None:
        return _xla(operands, dtype)
    return by_platform(op, lambda o: _pallas(o, dtype, blocks, older_groups), lambda o: _xla(o, dtype), operands)


def _why_not(operands: _Operands) -> str | None:
    """What keeps the Mosaic form from these arrays, or None."""
    values = [_values(weights) for weights in operands.weights]
    num_in, num_out = operands.rows.shape[1], _num_out(operands.weights[0])
    dtypes = {jnp.dtype(x.dtype).name for x in (operands.rows, *values)}
    if dtypes not in ({"bfloat16"}, {"float8_e4m3fn"}):
        return f"expected rows and weights in bfloat16, or both in float8_e4m3fn, got {sorted(dtypes)}"
    unit = SCALED if dtypes == {"float8_e4m3fn"} else 64
    if num_in % unit or num_out % 64:
        return f"expected in a multiple of {unit} and out of 64, got {num_in} and {num_out}"
    if operands.rows.shape[0] < 8:
        return f"expected 8 rows or more, got {operands.rows.shape[0]}"
    return None


def _check(op: str, operands: _Operands) -> None:
    rows, sizes = operands.rows, operands.group_sizes
    for weights in operands.weights:
        scales = getattr(weights, "scales", None)
        values = weights if scales is None else weights.values
        num_in = values.shape[1 if scales is None else 2] if values.ndim == 3 else None
        if rows.ndim != 2 or num_in != rows.shape[1] or sizes.shape != values.shape[:1]:
            raise ValueError(
                f"{op}: expected rows [rows, in], weights [E, in, out] (BlockScaled: values [E, out, in]) and "
                f"group_sizes [E], got {rows.shape}, {values.shape} and {sizes.shape}"
            )
    if len({_values(weights).shape for weights in operands.weights}) > 1:
        raise ValueError(f"{op}: expected gate and up of one shape, got {[_values(w).shape for w in operands.weights]}")
    expected = {
        "group_starts": sizes.shape,
        "row_weights": rows.shape[:1],
        "rows_scales": (rows.shape[0], -(-rows.shape[1] // SCALED)),
    }
    for name, shape in expected.items():
        found = getattr(operands, name)
        if found is not None and found.shape != shape:
            raise ValueError(f"{op}: expected {name} {shape}, got {found.shape}")
    if (rows.dtype.itemsize == 1) != (operands.rows_scales is not None):
        raise ValueError(f"{op}: expected rows_scales with float8 rows and only then, got rows in {rows.dtype}")


def _values(weights: Any) -> jax.Array:
    return weights if getattr(weights, "scales", None) is None else weights.values


def _num_out(weights: Any) -> int:
    return weights.shape[2] if getattr(weights, "scales", None) is None else weights.values.shape[1]


def _dense(weights: Any) -> jax.Array:
    """`[E, in, out]`, float32 where they were scaled."""
    if getattr(weights, "scales", None) is None:
        return weights
    return jnp.swapaxes(weights.dequantize(), 1, 2)


def _dense_rows(operands: _Operands) -> jax.Array:
    rows, scales = operands.rows, operands.rows_scales
    if scales is None:
        return rows
    return dequantize_rows(rows, scales)


def _combine(products: list[jax.Array], row_weights: jax.Array | None) -> jax.Array:
    """SwiGLU of gate and up, and the row's weight, in float32."""
    out = products[0] if len(products) == 1 else jax.nn.silu(products[0]) * products[1]
    return out if row_weights is None else out * row_weights[:, None]


def _starts(operands: _Operands) -> jax.Array:
    if operands.group_starts is not None:
        return operands.group_starts
    return jnp.cumsum(operands.group_sizes) - operands.group_sizes


def _xla(operands: _Operands, dtype: Any) -> jax.Array:
    """ragged_dot over groups that reach up to the next one's start, rows of no group zero."""
    rows, starts = _dense_rows(operands), _starts(operands)
    index = jnp.arange(rows.shape[0], dtype=jnp.int32)
    ends = starts + operands.group_sizes
    heard = jnp.any((index[:, None] >= starts) & (index[:, None] < ends), axis=1)
    rows = jnp.where(heard[:, None], rows, jnp.zeros_like(rows))  # before and after: no NaN of theirs in a gradient
    spans = jnp.diff(starts, append=jnp.asarray(rows.shape[0], starts.dtype)).at[0].add(starts[0])
    products = []
    for weights in operands.weights:
        dense = _dense(weights)
        both = jnp.promote_types(rows.dtype, dense.dtype)
        products.append(
            jax.lax.ragged_dot(rows.astype(both), dense.astype(both), spans, preferred_element_type=jnp.float32)
        )
    out = _combine(products, operands.row_weights)
    return jnp.where(heard[:, None], out, 0.0).astype(dtype)


def _reference(operands: _Operands, dtype: Any) -> jax.Array:
    """Float32, an expert at a time over all rows."""
    rows, starts = _dense_rows(operands).astype(jnp.float32), _starts(operands)
    index = jnp.arange(rows.shape[0], dtype=jnp.int32)
    dense = [_dense(weights).astype(jnp.float32) for weights in operands.weights]
    out = jnp.zeros((rows.shape[0], dense[0].shape[2]), jnp.float32)
    for e in range(dense[0].shape[0]):
        products = [jnp.matmul(rows, w[e], precision="highest") for w in dense]
        inside = (index >= starts[e]) & (index < starts[e] + operands.group_sizes[e])
        out = jnp.where(inside[:, None], _combine(products, operands.row_weights), out)
    return out.astype(dtype)


def _pallas(operands: _Operands, dtype: Any, blocks: GroupedBlocks | None, older_groups: bool) -> jax.Array:
    """The Mosaic form; its gradient is the XLA form's."""
    from jmoe.pallas_kernels import grouped_matmul_mosaic as mosaic

    @jax.custom_vjp
    def product(operands):
        return mosaic.grouped(
            operands.rows,
            operands.weights,
            operands.group_sizes,
            operands.group_starts,
            operands.row_weights,
            operands.rows_scales,
            out_dtype=dtype,
            blocks=blocks,
            older_groups=older_groups,
        )

    def backward(operands, cotangent):
        return jax.vjp(lambda o: _xla(o, dtype), operands)[1](cotangent)

    product.defvjp(lambda operands: (product(operands), operands), backward)
    return product(operands)
