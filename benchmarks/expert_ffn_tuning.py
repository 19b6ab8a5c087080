"""The grouped products as problems of the tuner: their candidates, and inputs as the expert FFN gives them."""

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
from jmoe.pallas_kernels.expert_ffn import ALIGN
from jmoe.pallas_kernels.grouped_blocks import grouped_shape
from jmoe.pallas_kernels.grouped_matmul import GroupedBlocks, gated_grouped_matmul, grouped_matmul
from jmoe.pallas_kernels.permute import permute


def candidates(case: Case, num_in: int, num_out: int, parts: int) -> list[dict[str, int]]:
    """Rows about the average group and above, every split of the columns that divides, one or two warpgroups."""
    average = case.tokens * case.model.k / case.model.experts
    rows = [n for n in (8, 16, 32, 48, 64, 96, 128, 192, 256) if average / 4 <= n <= max(16, 3 * average)] or [256]
    depths = (64, 128) if case.dtype == "bf16" else (128,)
    found = []
    for n, (out, consumers), depth in itertools.product(rows, ((64, 1), (128, 2), (128, 1), (256, 2)), depths):
        if num_out % out == 0 and num_in % depth == 0 and out * parts <= 256 and out % (64 * consumers) == 0:
            found.append({"block_rows": n, "block_out": out, "block_in": depth, "consumers": consumers})
    return found


def grouped_problem(op: str, case: Case, inputs: list[Inputs], weights: tuple[jax.Array, ...]) -> Problem:
    """One of the two products at one case."""
    gated = op == "gated_grouped_matmul"
    scaled = case.dtype == "fp8"
    chosen: Any = (scaled_weights(weights) if scaled else weights)[:2] if gated else (weights[2],)
    if scaled and not gated:
        chosen = scaled_weights(weights)[2:]
    num_in, num_out = (case.model.hidden, case.model.width) if gated else (case.model.width, case.model.hidden)
    arguments = [_arguments(case, i, num_in, scaled) for i in inputs]
    shape = grouped_shape(case.tokens * case.model.k, case.model.experts, num_in, num_out)
    make = functools.partial(_product, gated_grouped_matmul if gated else grouped_matmul)
    meant = np.zeros(shape["rows"], bool)
    for size, start in zip(np.asarray(arguments[0][1]), np.asarray(arguments[0][2]), strict=True):
        meant[start : start + size] = True
    return Problem(
        op,
        jnp.float8_e4m3fn if scaled else jnp.bfloat16,
        shape,
        candidates(case, num_in, num_out, 2 if gated else 1),
        make,
        [(*a, *chosen) for a in arguments],
        lambda output: output[meant],
    )


def _arguments(case: Case, inputs: Inputs, num_in: int, scaled: bool) -> tuple[Any, ...]:
    """(rows, sizes, starts, scales or None): normal rows in the place of what stands between the products."""
    permuted = permute(inputs.rows, inputs.local_idx, case.model.experts, align=ALIGN, implementation="pallas")
    rows = jax.random.normal(jax.random.key(0, impl="rbg"), (permuted.rows.shape[0], num_in), jnp.bfloat16)
    values, scales = quantize_rows(rows) if scaled else (rows, None)
    return values, permuted.group_sizes, permuted.group_starts, scales


def _product(op: Callable[..., Any], blocks: dict[str, int] | None) -> Callable[..., Any]:
    def run(rows, sizes, starts, scales, *weights):
        sized = None if blocks is None else GroupedBlocks(**blocks)
        options = {"group_starts": starts, "rows_scales": scales, "blocks": sized, "implementation": "pallas"}
        return op(rows, *weights, sizes, **options)

    return run
