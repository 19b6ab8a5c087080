"""The Mosaic GPU body of residual_norm: a block a token, the row in its registers."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe.pallas_kernels import simt
from jmoe.pallas_kernels import simt_floats as floats
from jmoe.pallas_kernels.l2_prefetch import bytes_of, l2_prefetch
from jmoe.pallas_kernels.simt import BLOCK_THREADS, WARP, Pointer
from jmoe.pallas_kernels.simt_floats import Float, Floats

WARPS = BLOCK_THREADS // WARP


def residual_norm_pallas(
    x: jax.Array, terms: jax.Array, scale: jax.Array, next_weights: Sequence[jax.Array], eps: float
) -> tuple[jax.Array, jax.Array]:
    """`residual_norm` in one kernel; see there."""
    wanted = bytes_of(next_weights)

    def residual_norm(*refs):
        simt.program(_program(terms.shape, x.dtype, eps, wanted), *refs)

    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return plgpu.kernel(
        residual_norm,
        out_type=(out, out),
        scratch_types=[plgpu.SMEM((WARPS,), jnp.int32)],
        grid=(x.shape[0],),
        grid_names=("block",),
    )(terms, x, scale, *next_weights)


def _program(shape: tuple[int, ...], dtype: Any, eps: float, wanted: list[int]) -> Callable[..., None]:
    parts, tokens, width = shape
    row_bytes = width * jnp.dtype(dtype).itemsize

    def program(terms: Pointer, x: Pointer, scale: Pointer, *rest: Pointer):
        *targets, y_out, h_out, sums = rest
        l2_prefetch(targets, wanted, tokens)
        element, token = simt.element_type(dtype), simt.block()
        source, real = x.skip(token, row_bytes), simt.element_type(jnp.float32)
        held: list[tuple[Any, Any, Floats, Floats]] = []
        four = row_bytes // width * 4
        for start in range(0, width // 4, BLOCK_THREADS):  # fours of the row
            index = simt.thread() + start
            inside = index < width // 4
            at = index if start + BLOCK_THREADS <= width // 4 else inside.select(index, 0)
            total = floats.Floats.of(terms.skip(token, width * 4).load_vector(at, 4, real))
            for part in range(1, parts):
                total = total + floats.Floats.of(terms.skip(token + part * tokens, width * 4).load_vector(at, 4, real))
            old, scales = (floats.Floats.of(a.load_vector(at, 4, element, four)) for a in (source, scale))
            held.append((at, inside, (old + total.rounded(element)).rounded(element), scales))
        factor = _sum([y.where(inside) for _, inside, y, _ in held], sums).times(1 / width).plus(eps).rsqrt()
        for at, inside, y, scales in held:
            h = (y.times(factor).rounded(element) * scales).rounded(element)
            with simt.when(inside):
                for out, value in ((y_out, y), (h_out, h)):
                    out.skip(token, row_bytes).store_vector(at, value.to(element), four)

    return program


def _sum(values: list[Floats], sums: Pointer) -> Float:
    """Of all squares of the block, in each of its threads; always in the same order."""
    squares = [one * one for value in values for one in value.each()]
    own = floats.warp_reduce(sum(squares[1:], squares[0]), lambda a, b: a + b)
    warp = simt.warp()  # the whole warp takes part in this: not inside the condition
    with simt.when((simt.thread() % WARP).equals(0)):
        sums.store(warp, own.bits())
    simt.barrier()
    found = [floats.Float.of_bits(sums.load(w)) for w in range(WARPS)]
    return sum(found[1:], found[0])
