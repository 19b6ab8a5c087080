"""The Mosaic GPU body of choose_top_k: a warp a token, the row in its registers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe.pallas_kernels import simt
from jmoe.pallas_kernels import simt_floats as floats
from jmoe.pallas_kernels.simt import BLOCK_THREADS, WARP, Pointer, Word
from jmoe.pallas_kernels.simt_floats import Float

NOBODY = 1 << 30  # above every expert


def choose_rows(
    logits: jax.Array, num_tokens: jax.Array | None = None, *, k: int, renormalize: bool, dtype: Any = jnp.float32
) -> tuple[jax.Array, jax.Array]:
    """`choose_top_k` in one kernel; see there."""
    *parts, tokens, num_experts = logits.shape
    warps = BLOCK_THREADS // WARP
    summed = (parts[0], dtype) if parts else None

    def choose_top_k(*refs):
        simt.follow()
        simt.program(_program(tokens, num_experts, k, renormalize, logits.dtype, summed, num_tokens is not None), *refs)

    idx, weights = plgpu.kernel(
        choose_top_k,
        out_type=(jax.ShapeDtypeStruct((tokens * k,), jnp.int32), jax.ShapeDtypeStruct((tokens * k,), jnp.float32)),
        grid=(-(-tokens // warps),),
        grid_names=("block",),
    )(logits, *(() if num_tokens is None else (num_tokens,)))
    return idx.reshape(tokens, k), weights.reshape(tokens, k)


def _program(
    tokens: int, num_experts: int, k: int, renormalize: bool, dtype: Any, summed: tuple[int, Any] | None, masked: bool
) -> Callable[..., None]:
    """A warp takes one token: each lane holds every 32nd expert; k times the warp finds the largest that is left.

    Args:
      summed: how many partial sums there are, and what they are rounded to; None for logits.
      masked: whether there is a num_tokens.
    """
    row_bytes = num_experts * jnp.dtype(dtype).itemsize

    def load(logits: Pointer, token: Word, expert: Word) -> Float:
        element = simt.element_type(dtype)
        if summed is None:
            return floats.Float.load(logits.skip(token, row_bytes), expert, element)
        found = [
            floats.Float.load(logits.skip(token + part * tokens, row_bytes), expert, element)
            for part in range(summed[0])
        ]
        return sum(found[1:], found[0]).rounded(simt.element_type(summed[1]))

    def program(logits: Pointer, *rest: Pointer):
        *counts, idx, weights = rest
        lane = simt.thread() % WARP
        token = simt.block() * (BLOCK_THREADS // WARP) + simt.warp()
        with simt.when(token < tokens):
            experts = [lane + start for start in range(0, num_experts, WARP)]
            inside = [expert < num_experts for expert in experts]
            values = [load(logits, token, there.select(e, 0)) for e, there in zip(experts, inside, strict=True)]
            here = counts[0].load(token) if masked else None
            largest = values[0]
            for value in values[1:]:
                largest = largest.maximum(value)  # beyond the row stands expert 0 again
            largest = floats.warp_reduce(largest, lambda a, b: a.maximum(b))
            # exp is positive: its bits are in its order. -1 is below them all: beyond the row, or taken.
            left = [there.select((v - largest).exp().bits(), -1) for v, there in zip(values, inside, strict=True)]
            total = _total(left)
            chosen, held = simt.word(0), simt.word(0)
            for j in range(k):
                best, winner = _best(left, experts)
                left = [expert.equals(winner).select(-1, bits) for expert, bits in zip(experts, left, strict=True)]
                chosen, held = lane.equals(j).select(winner, chosen), lane.equals(j).select(best, held)
            if renormalize:
                total = floats.warp_reduce(floats.Float.of_bits(held), lambda a, b: a + b)  # the other lanes hold 0
            with simt.when(lane < k):
                idx.store(token * k + lane, chosen if here is None else (here < 1).select(-1, chosen))
                (floats.Float.of_bits(held) / total).store(weights, token * k + lane)

    return program


def _total(left: list[Word]) -> Float:
    parts = [floats.Float.of_bits((bits >= 0).select(bits, 0)) for bits in left]
    return floats.warp_reduce(sum(parts[1:], parts[0]), lambda a, b: a + b)


def _best(left: list[Word], experts: list[Word]) -> tuple[Word, Word]:
    """The largest bits of the warp, and the lowest expert that has them."""
    own, owner = left[0], experts[0]
    for bits, expert in zip(left[1:], experts[1:], strict=True):
        better = own < bits
        own, owner = better.select(bits, own), better.select(expert, owner)
    best = simt.warp_largest(own)
    return best, simt.warp_smallest(own.equals(best).select(owner, NOBODY))
