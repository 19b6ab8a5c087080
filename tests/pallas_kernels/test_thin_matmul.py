"""thin_matmul: the XLA form, how the Mosaic form shares the work out, and the kernel under the interpreter."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.pallas_kernels.thin_matmul import thin_matmul
from jmoe.pallas_kernels.thin_matmul_mosaic import (
    Shares,
    choose_parts,
    choose_shares,
    thin_matmul_pallas,
    thin_partials_pallas,
)


def problem(rows, num_in, columns, seed=0):
    rng = np.random.default_rng(seed)
    weights = [jnp.asarray(rng.standard_normal((num_in, n)), jnp.bfloat16) for n in columns]
    return jnp.asarray(rng.standard_normal((rows, num_in)), jnp.bfloat16), weights


def test_the_xla_form_is_the_products_side_by_side():
    rows, weights = problem(5, 64, (16, 32))
    got = thin_matmul(rows, weights)
    np.testing.assert_array_equal(got, np.concatenate([np.asarray(rows @ w) for w in weights], axis=1))
    assert got.dtype == jnp.bfloat16


@pytest.mark.parametrize("rows", [16, 128])
@pytest.mark.parametrize(("num_in", "columns"), [(2048, (4096, 512, 512)), (4096, (2048,)), (4096, (4096, 1024, 1024))])
def test_every_step_is_some_blocks_and_every_sm_reads_equally_much(rows, num_in, columns):
    shares = choose_shares(rows, num_in, columns)
    blocks = -(-shares.total // shares.stretch)
    assert 0.9 * shares.num_sms <= blocks <= shares.num_sms and shares.stages >= 4
    owner = np.arange(shares.total) // shares.stretch
    by_tile = owner.reshape(-1, shares.steps)
    np.testing.assert_array_equal(shares.sharers, [len(set(tile)) for tile in by_tile])


def test_what_the_kernel_cannot_do_is_refused():
    rows, weights = problem(5, 64, (128,))
    with pytest.raises(ValueError, match="'pallas' expected bfloat16"):
        thin_matmul(rows.astype(jnp.float32), weights, implementation="pallas")
    with pytest.raises(ValueError, match="1 to 128 rows, got 129"):
        thin_matmul(jnp.zeros((129, 64), jnp.bfloat16), weights, implementation="pallas")
    with pytest.raises(ValueError, match="multiples of 64 terms and 128 columns"):
        thin_matmul(rows, [w[:, :100] for w in weights], implementation="pallas")
    with pytest.raises(ValueError, match="expected rows"):
        thin_matmul(rows[:, :5], weights)


@pytest.mark.aot
@pytest.mark.parametrize(
    ("rows", "num_in", "columns", "block_out", "num_sms"),
    [(8, 256, (128, 256), 128, 3), (16, 320, (128,), 64, 4), (5, 128, (256,), 128, 2), (24, 192, (128, 128), 64, 1)],
)
def test_the_kernel_interpreted(rows, num_in, columns, block_out, num_sms):
    """Tiles that one block computes, that two share, and a block with several tiles."""
    if jax.__version_info__ < (0, 11):
        pytest.skip(f"the interpreter needs jax 0.11 or newer, got {jax.__version__}")
    from jax._src.pallas.mosaic_gpu.interpret import params

    x, weights = problem(rows, num_in, columns)
    shares = Shares(-(-rows // 8) * 8, num_in, columns, block_out, num_sms=num_sms, interpret=True)
    with params.force_gpu_interpret_mode():
        got = thin_matmul_pallas(x, weights, shares)
    want = np.concatenate([np.asarray(x, np.float64) @ np.asarray(w, np.float64) for w in weights], axis=1)
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2**-8, atol=1e-2)


@pytest.mark.parametrize(
    ("num_in", "columns", "parts"), [(2048, (4096, 512, 512), 3), (4096, (2048,), 8), (64, (128,), 1)]
)
def test_parts_cover_every_step_once(num_in, columns, parts):
    shares = choose_parts(16, num_in, columns)
    assert shares.parts == parts and shares.blocks <= shares.num_sms
    found = [
        range(int(begin), int(begin + count))
        for begin, count in (shares.place(jnp.int32(block)) for block in range(shares.blocks))
    ]
    assert [step for part in found for step in part] == list(range(shares.total)) and all(len(p) for p in found)


@pytest.mark.aot
def test_partial_sums_interpreted():
    """Five steps a tile in parts of two, two and one."""
    if jax.__version_info__ < (0, 11):
        pytest.skip(f"the interpreter needs jax 0.11 or newer, got {jax.__version__}")
    from jax._src.pallas.mosaic_gpu.interpret import params

    x, weights = problem(5, 320, (128, 256))
    shares = dataclasses.replace(choose_parts(8, 320, (128, 256), num_sms=10), interpret=True)
    assert shares.parts == 3
    with params.force_gpu_interpret_mode():
        got = np.asarray(thin_partials_pallas(x, weights, shares), np.float64)
    want = np.concatenate([np.asarray(x, np.float64) @ np.asarray(w, np.float64) for w in weights], axis=1)
    assert got.shape == (3, 5, 384)
    np.testing.assert_allclose(got.sum(0), want, rtol=1e-5, atol=1e-4)
    first = np.asarray(x, np.float64)[:, :128] @ np.asarray(weights[0], np.float64)[:128]
    np.testing.assert_allclose(got[0, :, :128], first, rtol=1e-5, atol=1e-4)
