"""grouped_matmul and gated_grouped_matmul in every form, against numpy in float64."""

import dataclasses
import functools
import importlib.util
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.pallas_kernels.block_scaled import quantize_blocks, quantize_rows
from jmoe.pallas_kernels.grouped_matmul import GroupedBlocks, gated_grouped_matmul, grouped_matmul

NUM_EXPERTS, NUM_IN, NUM_OUT = 8, 64, 64
FORMS = ("xla", "reference")
SIZES = ([3, 0, 7, 1, 0, 9, 5, 11], [0, 0, 36, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 40], [1] * 8)
interpreted = pytest.mark.skipif(
    importlib.util.find_spec("jax._src.pallas.mosaic_gpu.interpret.params") is None or jax.__version_info__ < (0, 11),
    reason="jax 0.10.2's interpreter lacks layout_cast",
)


def arrays(sizes, *, parts=1, align=1, dtype=jnp.float32, num_in=NUM_IN, num_out=NUM_OUT, seed=0, least=8):
    """`least` rows or more (NaN where they are of no group), weights, row weights, sizes and starts."""
    rng = np.random.default_rng(seed)
    sizes = np.asarray(sizes, np.int32)
    spans = -(-sizes // align) * align
    starts = (np.cumsum(spans) - spans).astype(np.int32)
    num_rows = max(int(spans.sum()), least)
    rows = np.full((num_rows, num_in), np.nan)
    for start, size in zip(starts, sizes, strict=True):
        rows[start : start + size] = rng.normal(size=(size, num_in))
    weights = [jnp.asarray(rng.normal(size=(len(sizes), num_in, num_out)) * num_in**-0.5, dtype) for _ in range(parts)]
    row_weights = jnp.asarray(rng.normal(size=num_rows), jnp.float32)
    return jnp.asarray(rows, dtype), weights, row_weights, jnp.asarray(sizes), jnp.asarray(starts)


def truth(rows, weights, row_weights, sizes, starts):
    """float64, and which rows are of a group."""
    rows, row_weights = np.asarray(rows, np.float64), np.asarray(row_weights, np.float64)
    out = np.zeros((len(rows), weights[0].shape[2]))
    heard = np.zeros(len(rows), bool)
    for e, (size, start) in enumerate(zip(np.asarray(sizes), np.asarray(starts), strict=True)):
        own = slice(start, start + size)
        products = [rows[own] @ np.asarray(w[e], np.float64) for w in weights]
        gated = products[0] if len(products) == 1 else products[0] / (1 + np.exp(-products[0])) * products[1]
        out[own], heard[own] = gated * row_weights[own, None], True
    return out, heard


def op_of(weights):
    return grouped_matmul if len(weights) == 1 else gated_grouped_matmul


@functools.cache
def compiled(parts, implementation, started):
    """One program for every pattern of sizes."""

    def run(rows, weights, row_weights, sizes, starts):
        given = starts if started else None
        return op_of(weights)(
            rows, *weights, sizes, group_starts=given, row_weights=row_weights, implementation=implementation
        )

    return jax.jit(run)


@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_against_float64(sizes, align, parts, implementation):
    made = arrays(sizes, parts=parts, align=align, least=64)
    want, heard = truth(*made)
    got = compiled(parts, implementation, align != 1)(*made)
    np.testing.assert_allclose(np.asarray(got)[heard], want[heard], rtol=1e-4, atol=1e-5)
    if implementation == "xla":
        assert not np.asarray(got)[~heard].any()


def test_every_pattern_of_empty_groups():
    run = jax.jit(lambda *a: grouped_matmul(*a, implementation="xla"))
    rows, weights, row_weights, _, _ = arrays([5] * NUM_EXPERTS)
    for pattern in itertools.product((0, 1), repeat=NUM_EXPERTS):
        sizes = np.asarray(pattern, np.int32) * np.arange(1, NUM_EXPERTS + 1, dtype=np.int32)
        starts = np.cumsum(sizes) - sizes
        want, heard = truth(rows, weights, np.ones_like(row_weights), sizes, starts)
        got = np.asarray(run(rows, weights[0], jnp.asarray(sizes)))
        np.testing.assert_allclose(got[heard], want[heard], rtol=1e-4, atol=1e-5)
        assert not got[~heard].any()


@pytest.mark.aot
@interpreted
@pytest.mark.parametrize(
    ("sizes", "align", "parts", "blocks"),
    [
        ([3, 0, 9, 1], 1, 1, GroupedBlocks(8, 64, 64, 2, 1)),
        ([0, 5, 0, 17], 8, 2, GroupedBlocks(16, 128, 64, 2, 2)),
        ([0, 20, 0], 1, 1, GroupedBlocks(16, 128, 64, 3, 1)),
    ],
)
def test_mosaic_interpreted(sizes, align, parts, blocks):
    from jax._src.pallas.mosaic_gpu.interpret import params

    from jmoe.pallas_kernels import grouped_matmul_mosaic as mosaic

    made = arrays(sizes, parts=parts, align=align, dtype=jnp.bfloat16, num_in=128, num_out=128)
    rows, weights, row_weights, sizes, starts = made
    want, heard = truth(*made)
    with params.force_gpu_interpret_mode():
        got = mosaic.grouped(
            rows, weights, sizes, None if align == 1 else starts, row_weights, None, out_dtype=jnp.float32,
            blocks=blocks, num_sms=3, interpret=True,
        )  # fmt: skip
    np.testing.assert_allclose(np.asarray(got)[heard], want[heard], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("parts", [1, 2])
def test_block_scaled_weights(parts):
    rng = np.random.default_rng(3)
    sizes = jnp.asarray([3, 0, 9], jnp.int32)
    quantize = jax.jit(quantize_blocks)
    made = [quantize(jnp.asarray(rng.normal(size=(3, 192, 256)), jnp.float32)) for _ in range(parts)]
    values, scales = jax.jit(quantize_rows)(jnp.asarray(rng.normal(size=(12, 256)), jnp.float32))
    dense = [np.swapaxes(jax.jit(lambda w: w.dequantize())(w), 1, 2) for w in made]
    rows = np.asarray(values, np.float32) * np.repeat(scales, 128, axis=1)
    want, _ = truth(rows, dense, np.ones(12), sizes, np.asarray([0, 3, 3]))
    for implementation in FORMS:
        options = {"out_dtype": jnp.float32, "implementation": implementation}
        run = jax.jit(
            lambda values, made, scales, o=options: op_of(made)(values, *made, sizes, rows_scales=scales, **o)
        )
        got = run(values, made, scales)
        np.testing.assert_allclose(np.asarray(got), want, rtol=1e-4, atol=1e-3 * np.abs(want).max())


def scaled_arrays(sizes, parts: int, num_in: int, num_out: int):
    """Rows and weights whose scales differ from one 128 terms to the next: (operands of `grouped`, want, heard)."""
    rng = np.random.default_rng(3)
    num_rows, num_experts, blocks = -(-sum(sizes) // 8) * 8, len(sizes), num_in // 128

    def uneven(*shape):
        loudness = rng.uniform(0.1, 3, (*shape[:-1], blocks))
        return jnp.asarray(rng.normal(size=shape) * np.repeat(loudness, 128, axis=-1), jnp.float32)

    made = [jax.jit(quantize_blocks)(uneven(num_experts, num_out, num_in)) for _ in range(parts)]
    values, scales = jax.jit(quantize_rows)(uneven(num_rows, num_in))
    dense = [np.swapaxes(np.asarray(jax.jit(lambda w: w.dequantize())(w)), 1, 2) for w in made]
    row_weights = rng.uniform(0.5, 1, num_rows).astype(np.float32)
    starts = np.cumsum(sizes) - sizes
    rows = np.asarray(values, np.float32) * np.repeat(scales, 128, axis=1)
    want, heard = truth(rows, dense, row_weights, np.asarray(sizes), starts)
    return (values, made, jnp.asarray(sizes, jnp.int32), None, jnp.asarray(row_weights), scales), want, heard


SCALED_BLOCKS = [GroupedBlocks(16, 128, 128, 2, 2), GroupedBlocks(16, 128, 256, 2, 2), GroupedBlocks(8, 64, 256, 2, 1)]


@pytest.mark.aot
@interpreted
@pytest.mark.parametrize("blocks", SCALED_BLOCKS[1:], ids=str)
@pytest.mark.parametrize("parts", [1, 2])
def test_scaled_mosaic_interpreted(parts, blocks):
    from jax._src.pallas.mosaic_gpu.interpret import params

    from jmoe.pallas_kernels import grouped_matmul_mosaic as mosaic

    operands, want, heard = scaled_arrays([3, 0, 9], parts, 512, 128)
    with params.force_gpu_interpret_mode():
        got = mosaic.grouped(*operands, out_dtype=jnp.float32, blocks=blocks, num_sms=3, interpret=True)
    np.testing.assert_allclose(np.asarray(got)[heard], want[heard], rtol=1e-5, atol=1e-5 * np.abs(want).max())


@pytest.mark.gpu
@pytest.mark.parametrize("blocks", [None, *SCALED_BLOCKS], ids=str)
@pytest.mark.parametrize("parts", [1, 2])
def test_scaled_mosaic_on_the_device(parts, blocks):
    from jmoe.pallas_kernels import grouped_matmul_mosaic as mosaic

    operands, want, heard = scaled_arrays([70, 0, 33, 130, 1, 0, 64, 17], parts, 1024, 512)
    blocks = blocks and dataclasses.replace(blocks, num_stages=None)
    run = jax.jit(lambda *given: mosaic.grouped(*given, out_dtype=jnp.float32, blocks=blocks))
    got = [np.asarray(run(*operands), np.float64)[heard] for _ in range(2)]
    # float8's own sums of 128 terms keep some 14 bits.
    assert np.linalg.norm(got[0] - want[heard]) < 2e-3 * np.linalg.norm(want[heard])
    np.testing.assert_array_equal(got[0], got[1])


def test_gradient_hears_no_row_of_no_group():
    rows, weights, _, sizes, starts = arrays(SIZES[0], align=8)

    def loss(rows, weights):
        out = grouped_matmul(rows, weights, sizes, group_starts=starts, implementation="xla")
        return jnp.sum(out**2)

    by_row, by_weight = jax.jit(jax.grad(loss, (0, 1)))(rows, weights[0])
    out, heard = truth(rows, weights, np.ones(len(rows)), sizes, starts)
    assert np.isfinite(np.asarray(by_row)).all() and not np.asarray(by_row)[~heard].any()
    own = slice(int(starts[2]), int(starts[2] + sizes[2]))
    want = 2 * np.asarray(rows, np.float64)[own].T @ out[own]
    np.testing.assert_allclose(np.asarray(by_weight)[2], want, rtol=1e-4, atol=1e-4)
    assert not np.asarray(by_weight)[1].any()


def test_what_does_not_fit_is_said():
    rows, weights, _, sizes, _ = arrays(SIZES[0])
    with pytest.raises(ValueError, match="implementation 'pallas': expected rows and weights in bfloat16"):
        grouped_matmul(rows, weights[0], sizes, implementation="pallas")
    with pytest.raises(ValueError, match="expected implementation"):
        grouped_matmul(rows, weights[0], sizes, implementation="triton")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected rows"):
        grouped_matmul(rows[:, :32], weights[0], sizes)
    with pytest.raises(ValueError, match="rows_scales with float8 rows"):
        grouped_matmul(rows, weights[0], sizes, rows_scales=jnp.ones((len(rows), 1)))


@pytest.mark.gpu
@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("sizes", [*SIZES, [70, 0, 33, 130, 1, 0, 64, 17]], ids=str)
def test_mosaic_on_the_device(sizes, parts, align):
    if jax.default_backend() != "gpu":
        pytest.skip("needs a CUDA GPU")
    made = arrays(sizes, parts=parts, align=align, dtype=jnp.bfloat16, num_in=256, num_out=256)
    rows, weights, row_weights, sizes, starts = made
    want, heard = truth(*made)
    for blocks in (None, GroupedBlocks(8, 128, 64, None, 2), GroupedBlocks(8, 64, 128, None, 1)):
        run = jax.jit(
            lambda *a, blocks=blocks: op_of(weights)(
                a[0], *a[1], sizes, group_starts=starts, row_weights=row_weights, blocks=blocks, implementation="pallas"
            )
        )
        got = [np.asarray(run(rows, weights), np.float64)[heard] for _ in range(2)]
        assert np.linalg.norm(got[0] - want[heard]) < 4e-3 * np.linalg.norm(want[heard])
        np.testing.assert_array_equal(got[0], got[1])
