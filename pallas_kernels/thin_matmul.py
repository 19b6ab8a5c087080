"""A product of few rows with large weights: what decode's projections are, bound by reading the weights once."""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

Implementation = Literal["xla", "pallas"]
MAX_ROWS = 128  # beyond, operations count as well
COLUMNS = 128  # of one tile of the Mosaic form
TERMS = 64  # of one of its steps


def thin_matmul(
    rows: jax.Array, weights: Sequence[jax.Array], *, implementation: Implementation | None = None
) -> jax.Array:
    """rows @ [w_0 | w_1 | ...], summed in float32 and rounded to the rows' dtype.

    Args:
      rows: `[rows, in]`.
      weights: one or more of `[in, out_i]`.
      implementation: "xla", "pallas" (Mosaic GPU: the terms of all columns are shared out among SMs; bfloat16, up to
        MAX_ROWS rows, out_i multiples of COLUMNS, in of TERMS), None for "xla": on a crowded GPU the other form has
        proved right but not faster, and on one of its own it has not been timed.

    Returns:
      `[rows, sum of out_i]`.

    Raises:
      ValueError: shapes that don't belong together, or an implementation that is unknown or can't run.
    """
    weights = tuple(weights)
    if rows.ndim != 2 or not weights or any(w.ndim != 2 or w.shape[0] != rows.shape[1] for w in weights):
        raise ValueError(
            f"thin_matmul: expected rows [rows, in] and weights [in, out_i], got {rows.shape} and "
            f"{[w.shape for w in weights]}"
        )
    return (_pallas if _is_pallas("thin_matmul", implementation, rows, weights) else _xla)(rows, *weights)


def thin_partials(
    rows: jax.Array, weights: Sequence[jax.Array], parts: int, *, implementation: Implementation | None = None
) -> jax.Array:
    """Partial sums of rows @ [w_0 | w_1 | ...]: the terms cut into stretches, for a kernel that adds them up.

    A product of few rows has too few tiles for all SMs unless its terms are cut; left to XLA, that is a second kernel
    that adds up (1.5 us at 16 rows of Qwen3, 3.5 at 128). XLA makes one product of all weights and copies none.

    Args:
      rows: `[rows, in]`. weights: of `[in, out_i]`.
      parts: of the XLA form, a divisor of `in`; the Mosaic form cuts as suits the SMs.
      implementation: "xla", "pallas" (what `thin_matmul` says of it), None for "xla".

    Returns:
      `[parts, rows, sum of out_i]` float32.

    Raises:
      ValueError: an implementation that is unknown or can't run.
    """
    if _is_pallas("thin_partials", implementation, rows, weights):
        from jmoe.pallas_kernels.thin_matmul_mosaic import thin_partials_pallas

        return thin_partials_pallas(rows, weights)
    cut = rows.reshape(len(rows), parts, -1)
    products = [
        jax.lax.dot_general(
            cut, w.reshape(parts, -1, w.shape[1]), (((2,), (1,)), ((1,), (0,))), preferred_element_type=jnp.float32
        )
        for w in weights
    ]
    return jnp.concatenate(products, axis=2) if len(products) > 1 else products[0]


def _is_pallas(op: str, implementation: str | None, rows: jax.Array, weights: Sequence[jax.Array]) -> bool:
    if implementation not in (None, "xla", "pallas"):
        raise ValueError(f"{op}: expected implementation 'xla', 'pallas' or None, got {implementation!r}")
    why = why_not(rows, weights)
    if implementation == "pallas" and why:
        raise ValueError(f"{op}: 'pallas' expected {why}")
    return implementation == "pallas"


def why_not(rows: jax.Array, weights: Sequence[jax.Array]) -> str:
    """What the Mosaic form can't do; empty if it can."""
    if any(a.dtype != jnp.bfloat16 for a in (rows, *weights)):
        return f"bfloat16, got {[str(a.dtype) for a in (rows, *weights)]}"
    if not 1 <= len(rows) <= MAX_ROWS:
        return f"1 to {MAX_ROWS} rows, got {len(rows)}"
    if rows.shape[1] % TERMS or any(w.shape[1] % COLUMNS for w in weights):
        return f"multiples of {TERMS} terms and {COLUMNS} columns, got {[w.shape for w in weights]}"
    return ""


def _xla(rows: jax.Array, *weights: jax.Array) -> jax.Array:
    products = [rows @ w for w in weights]
    return jnp.concatenate(products, axis=1) if len(products) > 1 else products[0]


def _pallas(rows: jax.Array, *weights: jax.Array) -> jax.Array:
    """The kernel; gradients are the XLA form's."""
    from jmoe.pallas_kernels.thin_matmul_mosaic import thin_matmul_pallas

    @jax.custom_vjp
    def run(rows, *weights):
        return thin_matmul_pallas(rows, weights)

    def forward(*arrays):
        return run(*arrays), arrays

    def backward(arrays, cotangent):
        return jax.vjp(_xla, *arrays)[1](cotangent)

    run.defvjp(forward, backward)
    return run(rows, *weights)
