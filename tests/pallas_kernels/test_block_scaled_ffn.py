"""expert_ffn with float8 weights against float64, and what a mesh relies on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.pallas_kernels.block_scaled import BlockScaled, quantize_blocks, quantize_rows
from jmoe.pallas_kernels.block_scaled_ffn import block_scaled_ffn
from jmoe.pallas_kernels.expert_ffn import expert_ffn

NUM_EXPERTS = 8
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["xla", "reference"])
# A sum in another order may move a hidden number across the middle between two float8: one of 256, by 2^-3 at most.
TOLERANCE = {"rtol": 2e-3, "atol": 2e-3}


@functools.cache
def run(implementation):
    return jax.jit(functools.partial(block_scaled_ffn, implementation=implementation))


@functools.cache
def weights(hidden=256, width=384, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(NUM_EXPERTS, width, hidden)] * 2 + [(NUM_EXPERTS, hidden, width)]
    return [jax.jit(quantize_blocks)(jnp.asarray(rng.normal(size=s) / s[2] ** 0.5, jnp.float32)) for s in shapes]


def oracle(rows, local_idx, topk_weights, *params):
    """Float64, one row and one choice at a time; rounded to float8 where the definition says so."""

    def rounded(x):
        values, scales = jax.jit(quantize_rows)(np.float32(x))
        return np.asarray(values, np.float64) * np.repeat(np.asarray(scales, np.float64), 128)[: len(x)]

    gate, up, down = (np.asarray(jax.jit(BlockScaled.dequantize)(w), np.float64) for w in params)
    out = np.zeros(rows.shape)
    for r, experts in enumerate(local_idx):
        x = rounded(rows[r])
        for e, share in zip(experts, topk_weights[r], strict=True):
            if e >= 0:
                g = gate[e] @ x
                out[r] += np.float64(share) * (down[e] @ rounded(g / (1 + np.exp(-g)) * (up[e] @ x)))
    return out


def batch(num_rows, k, allowed=range(NUM_EXPERTS), hidden=256, seed=1):
    """rows, local_idx of distinct experts out of `allowed` (-1 where there are fewer) and topk_weights."""
    rng = np.random.default_rng(seed)
    local_idx = np.full((num_rows, k), -1, np.int32)
    for row in local_idx:
        chosen = rng.permutation(list(allowed))[:k]
        row[rng.permutation(k)[: len(chosen)]] = chosen
    rows = rng.normal(size=(num_rows, hidden)) * np.exp(rng.normal(size=(num_rows, 1)) * 2)
    return rows.astype(np.float32), local_idx, rng.uniform(0.1, 1, (num_rows, k)).astype(np.float32)


@IMPLEMENTATIONS
@pytest.mark.parametrize("allowed", [range(8), [0], [7], [1, 2, 5], []], ids=str)
def test_equals_float64(implementation, allowed):
    rows, local_idx, topk_weights = batch(9, 3, allowed)
    out = run(implementation)(rows, local_idx, topk_weights, *weights())
    want = oracle(rows, local_idx, topk_weights, *weights())
    assert out.dtype == jnp.float32
    size = np.abs(want).max(axis=1, keepdims=True) + 1e-9
    np.testing.assert_allclose(np.asarray(out) / size, want / size, **TOLERANCE)


@IMPLEMENTATIONS
def test_sizes_that_128_does_not_divide(implementation):
    params = weights(hidden=100, width=130)
    rows, local_idx, topk_weights = batch(5, 2, hidden=100)
    want = oracle(rows, local_idx, topk_weights, *params)
    size = np.abs(want).max(axis=1, keepdims=True)
    out = run(implementation)(rows, local_idx, topk_weights, *params)
    np.testing.assert_allclose(out / size, want / size, **TOLERANCE)


def test_both_implementations_are_nearly_one():
    """No number lies near the middle between two float8 here: what is left is the order of float32 additions."""
    arguments = (*batch(6, 3, seed=5), *weights())
    xla, reference = (np.asarray(run(i)(*arguments)) for i in ("xla", "reference"))
    np.testing.assert_allclose(xla, reference, rtol=1e-4, atol=1e-5 * np.abs(reference).max())


@IMPLEMENTATIONS
def test_shares_of_the_columns_add_up(implementation):
    """Three tensor ranks of 128 columns compute what one of 384 does: their blocks and rounding are the same."""
    arguments = batch(6, 3, seed=5)
    gate, up, down = weights()
    total = np.zeros((6, 256), np.float32)
    for rank in range(3):
        columns, block = slice(rank * 128, rank * 128 + 128), slice(rank, rank + 1)
        share = [BlockScaled(w.values[:, columns], w.scales[:, block]) for w in (gate, up)]
        share.append(BlockScaled(down.values[:, :, columns], down.scales[:, :, block]))
        total += np.asarray(run(implementation)(*arguments, *share))
    whole = np.asarray(run(implementation)(*arguments, gate, up, down))
    np.testing.assert_allclose(total, whole, rtol=1e-4, atol=1e-5 * np.abs(whole).max())


@IMPLEMENTATIONS
def test_rows_and_experts_that_nobody_chose_do_not_leak(implementation):
    rows, local_idx, topk_weights = batch(8, 2, range(5))
    local_idx[::2] = -1
    poisoned = rows.copy()
    poisoned[::2] = np.nan
    broken = [BlockScaled(w.values, w.scales.at[5:].set(jnp.nan)) for w in weights()]
    out = np.asarray(run(implementation)(poisoned, local_idx, topk_weights, *broken))
    assert not out[::2].any()
    np.testing.assert_array_equal(
        out, run(implementation)(np.nan_to_num(poisoned), local_idx, topk_weights, *weights())
    )


def test_expert_ffn_takes_them():
    arguments = (*batch(3, 2), *weights())
    np.testing.assert_array_equal(
        jax.jit(functools.partial(expert_ffn, implementation="xla"))(*arguments), run("xla")(*arguments)
    )


def test_what_does_not_belong_together_is_refused():
    rows, ids, shares = batch(4, 2)
    gate, up, down = weights()
    with pytest.raises(ValueError, match=r"expected rows \[rows, D\], gate and up .* got \(4, 5\) and "):
        expert_ffn(rows[:, :5], ids, shares, gate, up, down)
    with pytest.raises(ValueError, match=r"all BlockScaled or none, got \(4, 256\) and "):
        expert_ffn(rows, ids, shares, gate, jnp.zeros((8, 256, 384)), down)
    with pytest.raises(ValueError, match=r"down_proj: expected float8_e4m3fn values .* \(8, 2, 3\), got"):
        expert_ffn(rows, ids, shares, gate, up, BlockScaled(down.values, down.scales[:, :1]))
