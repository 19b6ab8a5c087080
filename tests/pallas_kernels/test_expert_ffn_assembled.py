"""expert_ffn's Mosaic form put together on a CPU: permute's programs run on numpy, the products as the reference."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.pallas_kernels import expert_ffn as module
from jmoe.pallas_kernels.block_scaled import quantize_blocks, quantize_rows
from jmoe.pallas_kernels.expert_ffn import expert_ffn
from jmoe.pallas_kernels.grouped_matmul import ExpertBlocks

sys.path.insert(0, __file__.rsplit("/", 1)[0])
import simt_emulator

E, D, F, K = 8, 256, 256, 3


def product(rows, *weights_and_sizes, group_starts, rows_scales=None, **_options):
    """`grouped_matmul` and its gated form in numpy; what the Mosaic ones leave in rows of no group is anything: NaN."""
    *weights, sizes = weights_and_sizes
    x = np.asarray(rows, np.float32)
    if rows_scales is not None:
        x = x * np.repeat(rows_scales, 128, axis=1)
        weights = [np.swapaxes(jax.jit(lambda w: w.dequantize())(w), 1, 2) for w in weights]
    weights = [np.asarray(w, np.float32) for w in weights]
    out = np.full((len(x), weights[0].shape[2]), np.nan, np.float32)
    for e, (start, size) in enumerate(zip(np.asarray(group_starts), np.asarray(sizes), strict=True)):
        own = slice(start, start + size)
        gate, *up = [x[own] @ w[e] for w in weights]
        out[own] = gate / (1 + np.exp(-gate)) * up[0] if up else gate
    return np.asarray(jnp.asarray(out, jnp.bfloat16))


def both_products(permuted, gate_proj, up_proj, down_proj, blocks):
    """`expert_products`."""
    groups = {"group_starts": permuted.group_starts}
    hidden = product(permuted.rows, gate_proj, up_proj, permuted.group_sizes, rows_scales=permuted.scales, **groups)
    hidden, scales = (hidden, None) if permuted.scales is None else jax.jit(quantize_rows)(jnp.nan_to_num(hidden))
    assert blocks.block_rows % 8 == 0
    return product(hidden, down_proj, permuted.group_sizes, rows_scales=scales, **groups)


@pytest.fixture(params=["at once", "one by one"])
def pallas(monkeypatch, request):
    """The body of the Mosaic form, outside its custom_vjp, which would trace it."""
    simt_emulator.install(monkeypatch)
    for name in ("gated_grouped_matmul", "grouped_matmul"):
        monkeypatch.setattr(module, name, product)
    if request.param == "at once":
        monkeypatch.setattr(module, "expert_blocks", lambda *_: ExpertBlocks(8))
        monkeypatch.setattr(module, "_at_once", both_products)
        monkeypatch.setattr(module, "_one_by_one", None)
    else:
        monkeypatch.setattr(module, "expert_blocks", lambda *_: None)
        monkeypatch.setattr(module, "_at_once", None)
    return module._pallas.fun


reference = jax.jit(functools.partial(expert_ffn, implementation="reference"))


def case(num_rows, missing=0.0, experts=E):
    rng = np.random.default_rng(0)
    shapes = ((experts, D, F), (experts, D, F), (experts, F, D))
    weights = [jnp.asarray(rng.normal(size=s) / s[1] ** 0.5, jnp.bfloat16) for s in shapes]
    local_idx = np.argsort(rng.random((num_rows, experts)), axis=1)[:, :K].astype(np.int32)
    local_idx[rng.random(local_idx.shape) < missing] = -1
    rows = jnp.asarray(rng.normal(size=(num_rows, D)), jnp.bfloat16)
    return rows, local_idx, rng.uniform(0.1, 1, (num_rows, K)).astype(np.float32), *weights


@pytest.mark.parametrize(("num_rows", "missing"), [(1, 0), (37, 0.4), (700, 0.1), (5, 1)])
def test_bf16(pallas, num_rows, missing):
    arguments = case(num_rows, missing)
    got, want = pallas(*arguments), reference(*arguments)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=2e-2, atol=2e-2)
    assert not got[(arguments[1] < 0).all(1)].any(), "a row without a local expert"


def test_scaled_float8(pallas):
    rows, local_idx, shares, *weights = case(9, 0.2)
    scaled = [jax.jit(quantize_blocks)(np.swapaxes(w, 1, 2)) for w in weights]
    got = pallas(rows, local_idx, shares, *scaled)
    want = np.asarray(reference(rows, local_idx, shares, *scaled))
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < 2e-2  # what stands between is bf16 before float8


def test_a_muted_choice_of_a_broken_expert_is_not_heard(pallas):
    rows, local_idx, shares, *weights = case(16)
    broken = [w.at[2].set(jnp.nan) for w in weights]
    muted = np.where(local_idx == 2, 0, shares).astype(np.float32)
    np.testing.assert_array_equal(
        pallas(rows, local_idx, muted, *broken), pallas(rows, np.where(local_idx == 2, -1, local_idx), shares, *weights)
    )


def test_sums_are_rounded_once(pallas):
    arguments = case(9, 0.2)
    got = pallas(*arguments, jnp.dtype(jnp.bfloat16))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, jnp.asarray(pallas(*arguments)).astype(jnp.bfloat16))


@pytest.mark.parametrize("out_dtype", ["float32", "bfloat16"])
def test_gradients_are_the_xla_forms(monkeypatch, out_dtype):
    monkeypatch.setattr(module, "expert_blocks", lambda *_: None)
    for name in ("permute", "unpermute", "gated_grouped_matmul", "grouped_matmul"):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=function, **k: f(*a, **(k | {"implementation": "xla"})))
    rows, local_idx, shares, *weights = case(16, 0.3, experts=3)

    def loss(implementation, rows, shares, *weights):
        options = {"out_dtype": out_dtype, "implementation": implementation}
        return jnp.sum(expert_ffn(rows, jnp.asarray(local_idx), shares, *weights, **options).astype(jnp.float32) ** 2)

    found = {}
    for implementation in ("xla", "pallas"):
        gradient = jax.jit(jax.grad(functools.partial(loss, implementation), argnums=(0, 1, 2, 3, 4)))
        found[implementation] = gradient(rows, jnp.asarray(shares), *weights)
    for got, want in zip(found["pallas"], found["xla"], strict=True):
        assert got.dtype == want.dtype
        got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
        assert np.linalg.norm(got - want) <= 2e-2 * np.linalg.norm(want)
