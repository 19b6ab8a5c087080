"""The grouped products, alone and as one kernel of the FFN, as problems of the tuner: candidates and inputs."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from expert_ffn_cases import Case, Inputs, scaled_weights
from tune_blocks import Problem

from jmoe.pallas_kernels.block_scaled import quantize_rows
from jmoe.pallas_kernels.expert_ffn import ALIGN, pallas_ffn
from jmoe.pallas_kernels.grouped_blocks import choose_blocks, expert_blocks, fits_experts, grouped_shape
from jmoe.pallas_kernels.grouped_matmul import ExpertBlocks, GroupedBlocks, gated_grouped_matmul, grouped_matmul
from jmoe.pallas_kernels.permute import num_padded_rows


def candidates(case: Case, num_in: int, num_out: int, parts: int) -> list[dict[str, int]]:
    """The heuristic's rows and some beside them, every split of the columns that divides."""
    small, average = case.dtype == "fp8", case.tokens * case.model.k / case.model.experts
    chosen = choose_blocks(case.tokens * case.model.k, case.model.experts, num_in, num_out, parts, small)
    beside = (n for n in (96, 120, 128, 144, 152) if average > 64 and n <= 2 * average)
    splits = [(128, 64, 2), (256, 64, 2)] if not small else [(128, 128, 2), (256, 128, 2), (128, 256, 2)]
    if average <= 64:
        splits += [(64, 128, 1)] + [(64, 256, 1)] * small
    found = []
    for n, (out, depth, consumers) in itertools.product(sorted({chosen.block_rows, *beside}), splits):
        sums = parts * n * out // (64 * consumers)  # floats of a thread, times 2
        fits = sums <= (192 if small else 352)
        if num_out % out == 0 and num_in % depth == 0 and (parts == 1 or out < 256 or n <= 32) and fits:
            found.append({"block_rows": n, "block_out": out, "block_in": depth, "consumers": consumers})
    same = {"block_rows": chosen.block_rows, "block_out": chosen.block_out, "block_in": chosen.block_in}
    return [blocks for blocks in found if blocks != same | {"consumers": chosen.consumers}]


def grouped_problem(op: str, case: Case, inputs: list[Inputs], weights: tuple[jax.Array, ...]) -> Problem:
    """One of the two products at one case."""
    gated = op == "gated_grouped_matmul"
    scaled = case.dtype == "fp8"
    chosen: Any = weights[:2] if gated else weights[2:]
    if scaled:
        chosen = scaled_weights(chosen)
    num_in, num_out = (case.model.hidden, case.model.width) if gated else (case.model.width, case.model.hidden)
    arguments = [_arguments(case, i, num_in, scaled) for i in inputs]
    shape = grouped_shape(case.tokens * case.model.k, case.model.experts, num_in, num_out)
    make = functools.partial(_product, gated_grouped_matmul if gated else grouped_matmul)
    sizes, starts = np.asarray(arguments[0][1]), np.asarray(arguments[0][2])
    rows = np.concatenate([np.arange(a, a + n) for a, n in zip(starts, sizes, strict=True)])
    picked = rows[np.linspace(0, len(rows) - 1, 64).astype(int)]
    return Problem(
        op,
        jnp.float8_e4m3fn if scaled else jnp.bfloat16,
        shape,
        candidates(case, num_in, num_out, 2 if gated else 1),
        make,
        [(*a, *chosen) for a in arguments],
        jax.jit(lambda output: output[picked].astype(jnp.float32)),
    )


def _arguments(case: Case, inputs: Inputs, num_in: int, scaled: bool) -> tuple[Any, ...]:
    """(rows, sizes, starts, scales or None): normal rows in the place of what stands before the product."""
    model = case.model
    sizes = np.bincount(inputs.host_idx.reshape(-1), minlength=model.experts).astype(np.int32)
    spans = -(-sizes // ALIGN) * ALIGN
    num_rows = num_padded_rows(case.tokens, model.k, model.experts, ALIGN)
    values, scales = _rows(num_rows, num_in, scaled)
    return values, jnp.asarray(sizes), jnp.asarray((np.cumsum(spans) - spans).astype(np.int32)), scales


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _rows(num_rows: int, num_in: int, scaled: bool) -> tuple[jax.Array, jax.Array | None]:
    rows = jax.random.normal(jax.random.key(0, impl="rbg"), (num_rows, num_in), jnp.float32).astype(jnp.bfloat16)
    return quantize_rows(rows) if scaled else (rows, None)


def _product(op: Callable[..., Any], blocks: dict[str, int] | None) -> Callable[..., Any]:
    def run(rows, sizes, starts, scales, *weights):
        sized = None if blocks is None else GroupedBlocks(**blocks)
        options = {"group_starts": starts, "rows_scales": scales, "blocks": sized, "implementation": "pallas"}
        return op(rows, *weights, sizes, **options)

    return run


def expert_problem(case: Case, inputs: list[Inputs], weights: tuple[Any, ...]) -> Problem:
    """Both products in one kernel, timed as the whole FFN; the heuristic's choice may be two kernels."""
    m, small = case.model, case.dtype == "fp8"
    chosen = scaled_weights(weights) if small else weights
    dtype, pairs = jnp.float8_e4m3fn if small else jnp.bfloat16, case.tokens * m.k
    blocks = {"rows": pairs, "experts": m.experts, "hidden": m.hidden, "width": m.width}

    def make(blocks: dict[str, Any] | None) -> Callable[..., Any]:
        found = expert_blocks(jnp.dtype(dtype), pairs, m.experts, m.hidden, m.width)
        return functools.partial(_ffn, found if blocks is None else ExpertBlocks(**blocks))

    arguments = [(i.rows, i.local_idx, i.topk_weights, *chosen) for i in inputs]
    found = [dataclasses.asdict(b) for b in expert_candidates(case)]
    return Problem("expert_products", dtype, blocks, [_without_none(b) for b in found], make, arguments)


def expert_candidates(case: Case) -> list[ExpertBlocks]:
    """The estimate's rows with every split that divides; for many rows of float8 the one where rows stand first."""
    m, small = case.model, case.dtype == "fp8"
    pairs = case.tokens * m.k
    rows = choose_blocks(pairs, m.experts, m.hidden, m.width, 2, small).block_rows
    if small:
        splits = [(128, 128, 1), (128, 128, 2), (128, 256, 1), (128, 256, 2)]
    else:
        splits = [(64, 64, 1), (64, 128, 1), (128, 64, 1), (128, 64, 2)]
    found = [ExpertBlocks(rows, *split[:2], None, split[2], t) for split in splits for t in (True, False)]
    if small and rows > 64:
        found.append(ExpertBlocks(128, 128, 128, None, 2, False, True))
    sums = 400 if small else 352  # floats of a thread, times 2
    return [
        b for b in found
        if fits_experts(b, pairs, m.hidden, m.width)
        and (b.rows_first or 2 * b.block_rows * b.block_out // (64 * b.consumers) <= sums)
    ]  # fmt: skip


def _without_none(blocks: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in blocks.items() if value is not None}


def _ffn(blocks: ExpertBlocks | None, *arguments: Any) -> jax.Array:
    return pallas_ffn(*arguments, blocks)
