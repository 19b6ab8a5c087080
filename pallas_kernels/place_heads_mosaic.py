"""The Mosaic GPU body of place_heads: a warp a head, its halves in the warp's registers, pages written in place."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe.pallas_kernels import simt, simt_floats
from jmoe.pallas_kernels.paged_attention import cells_of
from jmoe.pallas_kernels.place_heads import angles
from jmoe.pallas_kernels.simt import BLOCK_THREADS, WARP, Pointer
from jmoe.pallas_kernels.simt_floats import Float

WARPS = BLOCK_THREADS // WARP


def place_heads_pallas(
    q, k, v, q_scale, k_scale, k_pages, v_pages, page_table, start_pos, num_tokens, *, theta: float, eps: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`place_heads` in one kernel; see there."""
    rows, _, _, head_dim = q.shape
    # One array: XLA makes one product of the three projections, and this takes all of it as it is.
    projected = jnp.concatenate([a.reshape(rows, -1, head_dim) for a in (q, k, v)], axis=1)
    pages = (k_pages, v_pages, page_table, start_pos, num_tokens)
    return _place(projected, 0, q_scale, k_scale, *pages, q_shape=q.shape, theta=theta, eps=eps)


def place_partials_pallas(
    partials, q_scale, k_scale, k_pages, v_pages, page_table, start_pos, num_tokens, *, q_shape, theta, eps
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`place_partial_heads` in one kernel; see there."""
    pages = (k_pages, v_pages, page_table, start_pos, num_tokens)
    return _place(partials, len(partials), q_scale, k_scale, *pages, q_shape=q_shape, theta=theta, eps=eps)


def _place(
    projected, parts: int, q_scale, k_scale, k_pages, v_pages, page_table, start_pos, num_tokens,
    *, q_shape: tuple[int, ...], theta: float, eps: float,
):  # fmt: skip
    """Of heads in the pages' dtype (parts = 0), or of partial sums; angles and cells are the same in every layer."""
    cos, sin = angles(start_pos, q_shape[3], theta)
    cells = cells_of(k_pages.shape, page_table, start_pos, num_tokens, 1)
    # References, so that the kernel writes into the pages that it is given: as plain results they would be copied.
    k_ref, v_ref = jax.new_ref(k_pages), jax.new_ref(v_pages)
    norms = (q_scale is not None, k_scale is not None)
    placed = _kernel(q_shape, k_pages.shape[2], k_pages.dtype, *norms, eps, parts)(
        projected,
        *(scale for scale in (q_scale, k_scale) if scale is not None),
        cos, sin, cells.reshape(-1), k_ref, v_ref,
    )  # fmt: skip
    return placed.reshape(q_shape), jax.freeze(k_ref), jax.freeze(v_ref)


def _kernel(q_shape: tuple[int, ...], kv_heads: int, dtype: Any, q_norm: bool, k_norm: bool, eps: float, parts: int):
    rows, _, heads, head_dim = q_shape

    def place_heads(*refs):
        simt.program(_program(rows, heads, kv_heads, head_dim, dtype, q_norm, k_norm, eps, parts), *refs)

    return plgpu.kernel(
        place_heads,
        out_type=jax.ShapeDtypeStruct((rows, heads, head_dim), dtype),
        grid=(-(-rows * (heads + 2 * kv_heads) // WARPS),),
        grid_names=("block",),
    )


def _program(
    rows: int, heads: int, kv_heads: int, head_dim: int, dtype: Any, q_norm: bool, k_norm: bool, eps: float, parts: int
) -> Callable[..., None]:
    """Warp w takes head w % (Q + 2 G) of row w // (Q + 2 G): queries, then keys, then values."""
    all_heads, row_bytes = heads + 2 * kv_heads, head_dim * jnp.dtype(dtype).itemsize

    def program(projected: Pointer, *rest: Pointer):
        *norms, cos, sin, cells, k_pages, v_pages, out = rest
        q_scale = norms.pop(0) if q_norm else None
        k_scale = norms.pop(0) if k_norm else None
        lane, element = simt.thread() % WARP, simt.element_type(dtype)
        index = simt.block() * WARPS + simt.warp()
        row, head = index // all_heads, index % all_heads

        def load(column) -> Float:
            if not parts:
                return simt_floats.Float.load(projected.skip(index, row_bytes), column, element)
            found = [
                simt_floats.Float.load(projected.skip(index + p * rows * all_heads, head_dim * 4), column)
                for p in range(parts)
            ]
            return sum(found[1:], found[0]).rounded(element)

        def place(target: Pointer, scale: Pointer | None, turns: bool) -> None:
            columns = [lane + start for start in range(0, head_dim // 2, WARP)]
            columns += [column + head_dim // 2 for column in columns]
            values = [load(column) for column in columns]
            if scale is not None:
                scales = [simt_floats.Float.load(scale, column, element) for column in columns]
                values = _normed(values, scales, head_dim, eps, element)
            if turns:
                values = _turned(values, _at(cos, row, columns, head_dim), _at(sin, row, columns, head_dim))
            for column, value in zip(columns, values, strict=True):
                value.store(target, column, element)

        with simt.when(index < rows * all_heads):
            with simt.when(head < heads):
                place(out.skip(row * heads + head, row_bytes), q_scale, True)
            for first, pages, scale, turns in (
                (heads, k_pages, k_scale, True),
                (heads + kv_heads, v_pages, None, False),
            ):
                with simt.when((head >= first) & (head < first + kv_heads)):
                    place(pages.skip(cells.load(row) * kv_heads + (head - first), row_bytes), scale, turns)

    return program


def _normed(values: list[Float], scales: list[Float], head_dim: int, eps: float, element: Any) -> list[Float]:
    """x / sqrt(mean(x^2) + eps), rounded to the dtype, times the scale, rounded again."""
    squares = [value * value for value in values]
    total = simt_floats.warp_reduce(sum(squares[1:], squares[0]), lambda a, b: a + b)
    factor = total.times(1 / head_dim).plus(eps).rsqrt()
    return [
        ((value * factor).rounded(element) * scale).rounded(element)
        for value, scale in zip(values, scales, strict=True)
    ]


def _at(table: Pointer, row, columns: list, head_dim: int) -> list[Float]:
    """A lane's columns of the first half, of `[rows, H/2]` float32."""
    half = head_dim // 2
    return [simt_floats.Float.load(table, row * half + column) for column in columns[: len(columns) // 2]]


def _turned(values: list[Float], cos: list[Float], sin: list[Float]) -> list[Float]:
    """(a, b) -> (a cos - b sin, b cos + a sin)."""
    a, b = values[: len(cos)], values[len(cos) :]
    first = [x * c - y * s for x, y, c, s in zip(a, b, cos, sin, strict=True)]
    return first + [y * c + x * s for x, y, c, s in zip(a, b, cos, sin, strict=True)]
