"""expert_ffn's Mosaic form put together on a CPU: permute's programs run on numpy, the products as the reference."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.pallas_kernels import expert_ffn as module
from jmoe.pallas_kernels.block_scaled import quantize_blocks
from jmoe.pallas_kernels.expert_ffn import expert_ffn

sys.path.insert(0, __file__.rsplit("/", 1)[0])
import simt_emulator

E, D, F, K = 8, 128, 256, 3


def rows_of_no_group_are_nan(function):
    """What the Mosaic products leave there is anything."""

    def run(rows, *weights_and_sizes, group_starts, implementation, **options):
        out = function(rows, *weights_and_sizes, group_starts=group_starts, implementation="reference", **options)
        sizes = weights_and_sizes[-1]
        index = jnp.arange(len(out))[:, None]
        meant = jnp.any((index >= group_starts) & (index < group_starts + sizes), axis=1)
        return np.asarray(jnp.where(meant[:, None], out, jnp.nan))

    return run


@pytest.fixture
def pallas(monkeypatch):
    """The body of the Mosaic form, outside its custom_vjp, which would trace it."""
    simt_emulator.install(monkeypatch)
    for name in ("gated_grouped_matmul", "grouped_matmul"):
        monkeypatch.setattr(module, name, rows_of_no_group_are_nan(getattr(module, name)))
    return module._pallas.fun


def case(num_rows, missing=0.0, seed=0):
    rng = np.random.default_rng(seed)
    weights = [jnp.asarray(rng.normal(size=s) / s[1] ** 0.5, jnp.bfloat16) for s in ((E, D, F), (E, D, F), (E, F, D))]
    local_idx = np.argsort(rng.random((num_rows, E)), axis=1)[:, :K].astype(np.int32)
    local_idx[rng.random(local_idx.shape) < missing] = -1
    rows = jnp.asarray(rng.normal(size=(num_rows, D)), jnp.bfloat16)
    return rows, local_idx, rng.uniform(0.1, 1, (num_rows, K)).astype(np.float32), *weights


@pytest.mark.parametrize(("num_rows", "missing"), [(1, 0), (37, 0.4), (700, 0.1), (5, 1)])
def test_bf16(pallas, num_rows, missing):
    arguments = case(num_rows, missing)
    got, want = pallas(*arguments), expert_ffn(*map(jnp.asarray, arguments), implementation="reference")
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=2e-2, atol=2e-2)
    assert not got[(arguments[1] < 0).all(1)].any(), "a row without a local expert"


def test_scaled_float8(pallas):
    rows, local_idx, shares, *weights = case(9, 0.2)
    scaled = [quantize_blocks(jnp.swapaxes(w, 1, 2)) for w in weights]
    got = pallas(rows, local_idx, shares, *scaled)
    want = np.asarray(expert_ffn(rows, jnp.asarray(local_idx), shares, *scaled, implementation="reference"))
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < 2e-2  # what stands between is bf16 before float8


def test_a_muted_choice_of_a_broken_expert_is_not_heard(pallas):
    rows, local_idx, shares, *weights = case(16)
    broken = [w.at[2].set(jnp.nan) for w in weights]
    muted = np.where(local_idx == 2, 0, shares).astype(np.float32)
    np.testing.assert_array_equal(
        pallas(rows, local_idx, muted, *broken), pallas(rows, np.where(local_idx == 2, -1, local_idx), shares, *weights)
    )


def test_gradients_are_the_xla_forms(monkeypatch):
    for name in ("permute", "unpermute", "gated_grouped_matmul", "grouped_matmul"):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=function, **k: f(*a, **(k | {"implementation": "xla"})))
    rows, local_idx, shares, *weights = case(16, 0.3)

    def loss(implementation, rows, shares, *weights):
        return jnp.sum(expert_ffn(rows, jnp.asarray(local_idx), shares, *weights, implementation=implementation) ** 2)

    found = {}
    for implementation in ("xla", "pallas"):
        gradient = jax.jit(jax.grad(functools.partial(loss, implementation), argnums=(0, 1, 2, 3, 4)))
        found[implementation] = gradient(rows, jnp.asarray(shares), *weights)
    for got, want in zip(found["pallas"], found["xla"], strict=True):
        assert got.dtype == want.dtype
        got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
        assert np.linalg.norm(got - want) <= 2e-2 * np.linalg.norm(want)
