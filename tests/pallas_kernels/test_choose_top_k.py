"""choose_top_k against numpy: the XLA form, and the Mosaic body's program run thread by thread."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.pallas_kernels.choose_top_k import choose_top_k
from jmoe.pallas_kernels.choose_top_k_mosaic import choose_rows

sys.path.insert(0, __file__.rsplit("/", 1)[0])
import simt_emulator

IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["xla", "pallas"])


@pytest.fixture(autouse=True)
def emulated(monkeypatch, request):
    if "pallas" in request.node.name:
        simt_emulator.install(monkeypatch)
        # the emulator computes at once, with numpy: no tracing around it
        monkeypatch.setattr("jmoe.pallas_kernels.choose_top_k._pallas", choose_rows)


def oracle(logits, k, renormalize):
    logits = np.asarray(logits, np.float64)
    probs = np.exp(logits - logits.max(1, keepdims=True))
    probs /= probs.sum(1, keepdims=True)
    idx = np.argsort(-probs, axis=1, kind="stable")[:, :k]
    weights = np.take_along_axis(probs, idx, 1)
    return idx, weights / weights.sum(1, keepdims=True) if renormalize else weights


@IMPLEMENTATIONS
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(
    ("tokens", "num_experts", "k"), [(1, 1, 1), (5, 8, 2), (16, 128, 8), (3, 33, 8), (6, 200, 17), (2, 40, 32)]
)
def test_against_float64(implementation, renormalize, tokens, num_experts, k):
    rng = np.random.default_rng(tokens)
    # distinct by more than rounding
    logits = rng.permuted(np.linspace(-9, 9, tokens * num_experts).reshape(tokens, -1), axis=1).astype(np.float32)
    idx, weights = choose_top_k(logits, k, renormalize, implementation=implementation)
    want_idx, want = oracle(logits, k, renormalize)
    np.testing.assert_array_equal(idx, want_idx)
    np.testing.assert_allclose(weights, want, rtol=1e-5)
    assert np.asarray(idx).dtype == np.int32 and np.asarray(weights).dtype == np.float32


@IMPLEMENTATIONS
def test_ties_go_to_the_lower_expert_and_no_expert_comes_twice(implementation):
    logits = np.zeros((3, 70), np.float32)
    logits[1, ::2] = 1
    logits[2, 1:] = -300  # all but one vanish
    idx = np.asarray(choose_top_k(logits, 6, True, implementation=implementation)[0])
    assert idx.tolist() == [[0, 1, 2, 3, 4, 5], [0, 2, 4, 6, 8, 10], [0, 1, 2, 3, 4, 5]]


@IMPLEMENTATIONS
def test_bf16_logits(implementation):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(9, 64)), jnp.bfloat16)
    idx, weights = choose_top_k(logits, 4, True, implementation=implementation)
    np.testing.assert_array_equal(idx, oracle(logits, 4, True)[0])
    np.testing.assert_allclose(weights, oracle(logits, 4, True)[1], rtol=1e-5)


@IMPLEMENTATIONS
def test_partial_sums_and_rows_without_a_token(implementation):
    rng = np.random.default_rng(0)
    whole = rng.permuted(np.linspace(-9, 9, 5 * 40).reshape(5, -1), axis=1)
    parts = rng.normal(size=(3, 5, 40)).astype(np.float32)
    parts[2] = whole - parts[0] - parts[1]
    num_tokens = np.array([1, 0, 1, 1, 0], np.int32)
    idx, weights = choose_top_k(parts, 4, True, num_tokens=num_tokens, dtype=np.float32, implementation=implementation)
    want_idx, want = oracle(whole, 4, True)
    np.testing.assert_array_equal(idx, np.where(num_tokens[:, None] > 0, want_idx, -1))
    np.testing.assert_allclose(weights, want, rtol=1e-4)
    coarse = choose_top_k(parts, 4, True, dtype=jnp.bfloat16, implementation=implementation)[1]
    rounded = oracle(jnp.asarray(parts.sum(axis=0), jnp.bfloat16), 4, True)[1]
    np.testing.assert_allclose(coarse, rounded, rtol=1e-5, err_msg="rounded once they are added up")
    with pytest.raises(ValueError, match=r"expected num_tokens \[5\], got \(4,\)"):
        choose_top_k(parts, 4, True, num_tokens=num_tokens[:4])


def test_what_cannot_be_computed_is_refused():
    logits = jnp.zeros((4, 2000))
    with pytest.raises(ValueError, match="expected implementation 'xla', 'pallas' or None, got 'cuda'"):
        choose_top_k(logits, 2, True, implementation="cuda")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected 1\.\.1024 experts"):
        choose_top_k(logits, 2, True, implementation="pallas")
    with pytest.raises(ValueError, match=r"k in 1\.\.E, got \(4, 2000\) and 2001"):
        choose_top_k(logits, 2001, True)
    assert jax.eval_shape(lambda x: choose_top_k(x, 40, True), logits)[0].shape == (4, 40), "None takes what can"
