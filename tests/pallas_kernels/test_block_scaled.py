"""BlockScaled against numpy: blocks, rows, sizes that 128 doesn't divide, zeros, and what never leaks."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jmoe.pallas_kernels.block_scaled import (
    BlockScaled,
    dequantize_rows,
    quantize_blocks,
    quantize_rows,
)


def numpy_blocks(weights):
    """values and scales of `[out, in]`, block by block."""
    out, width = weights.shape
    values = np.zeros(weights.shape, ml_dtypes.float8_e4m3fn)
    scales = np.zeros((-(-out // 128), -(-width // 128)), np.float32)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = np.s_[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
            block = weights[at].astype(np.float32)
            scales[i, j] = np.maximum(np.abs(block).max(), np.float32(1e-12)) * np.float32(1 / 448)
            values[at] = (block * (1 / scales[i, j])).astype(ml_dtypes.float8_e4m3fn)
    return values, scales


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (130, 5), (1, 300)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_equal_numpys(shape, dtype):
    rng = np.random.default_rng(0)
    weights = jnp.asarray(rng.normal(size=shape) * np.exp(rng.normal(size=shape) * 4), dtype)
    values, scales = numpy_blocks(np.asarray(weights))
    forms = [jax.jit(quantize_blocks)] + [quantize_blocks] * (shape == (130, 5))  # compiled or not: the same bits
    for got in (form(weights) for form in forms):
        got.check("weights")
        np.testing.assert_array_equal(np.asarray(got.values, np.float32), values.astype(np.float32))
        np.testing.assert_array_equal(got.scales, scales)
        wide = np.repeat(np.repeat(scales, 128, 0)[: shape[0]], 128, 1)[:, : shape[1]]
        np.testing.assert_array_equal(jax.jit(BlockScaled.dequantize)(got), values.astype(np.float32) * wide)


def test_the_largest_of_a_block_is_kept_and_the_rest_is_within_a_sixteenth():
    weights = np.random.default_rng(1).normal(size=(2, 3, 256, 256)).astype(np.float32)
    back = np.asarray(jax.jit(lambda w: quantize_blocks(w).dequantize())(weights))
    blocks, backs = (a.reshape(2, 3, 2, 128, 2, 128) for a in (weights, back))
    largest = np.abs(blocks).max(axis=(3, 5), keepdims=True)
    np.testing.assert_allclose(np.abs(backs).max(axis=(3, 5), keepdims=True), largest, rtol=1e-6)
    # Three bits of mantissa: half a unit is 2^-4; below 2^-6 of the scale's unit numbers are subnormal.
    assert (np.abs(backs - blocks) <= np.abs(blocks) * 2**-4 + largest / 448 * 2**-10).all()


@pytest.mark.parametrize("shape", [(5, 128), (3, 320), (2, 4, 100)])
def test_rows_equal_numpys(shape):
    rows = np.random.default_rng(2).normal(size=shape).astype(np.float32)
    values, scales = jax.jit(quantize_rows)(rows)
    dequantized = jax.jit(dequantize_rows)(values, scales)
    for index in np.ndindex(*shape[:-1]):
        for j in range(-(-shape[-1] // 128)):
            part = rows[index][j * 128 : (j + 1) * 128]
            scale = np.abs(part).max() * np.float32(1 / 448)
            assert scales[(*index, j)] == scale
            want = (part * (1 / scale)).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
            np.testing.assert_array_equal(np.asarray(values[index][j * 128 : (j + 1) * 128], np.float32), want)
            back = dequantized[index][j * 128 : (j + 1) * 128]
            np.testing.assert_array_equal(back, want * scale)


def test_a_cut_at_a_multiple_of_128_changes_nothing():
    """Tensor ranks quantise their own columns: the same numbers as those of whole rows, and of whole weights."""
    rows = np.random.default_rng(3).normal(size=(4, 512)).astype(np.float32)
    by_row, by_block = jax.jit(quantize_rows), jax.jit(quantize_blocks)
    whole, parts = by_row(rows), [by_row(rows[:, i : i + 256]) for i in (0, 256)]
    np.testing.assert_array_equal(np.concatenate([p[0] for p in parts], 1), whole[0])
    np.testing.assert_array_equal(np.concatenate([p[1] for p in parts], 1), whole[1])
    weights = np.random.default_rng(4).normal(size=(256, 512)).astype(np.float32)
    halves = [by_block(weights[:128]), by_block(weights[128:])]
    np.testing.assert_array_equal(np.concatenate([h.values for h in halves]), by_block(weights).values)


def test_zeros_stay_zeros_and_a_bad_row_stays_alone():
    rows = np.ones((3, 256), np.float32)
    rows[0], rows[1, 7] = 0, np.nan
    values, scales = (np.asarray(a, np.float32) for a in quantize_rows(rows))
    assert not values[0].any() and (scales[0] > 0).all()
    assert np.isnan(values[1, :128]).any() and np.isfinite(values[1, 128:]).all() and (values[2] == 448).all()
    zeros = quantize_blocks(jnp.zeros((128, 128)))
    assert not np.asarray(zeros.dequantize()).any()


def test_parts_that_do_not_belong_together_are_refused():
    values, scales = jnp.zeros((2, 130, 256), jnp.float8_e4m3fn), jnp.zeros((2, 2, 2))
    BlockScaled(values, scales).check("w")
    for wrong in (
        (values, scales[:, :1]),
        (values.astype(jnp.bfloat16), scales),
        (values, scales.astype(jnp.bfloat16)),
    ):
        with pytest.raises(ValueError, match=r"w: expected float8_e4m3fn values .* scales \(2, 2, 2\), got "):
            BlockScaled(*wrong).check("w")
