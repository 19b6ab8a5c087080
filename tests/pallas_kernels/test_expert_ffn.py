"""expert_ffn, every implementation against a float64 loop: any pattern of empty groups, stray ids, stray NaNs."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.pallas_kernels.expert_ffn import expert_ffn

NUM_EXPERTS = 8
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["xla", "reference"])
TOLERANCE: dict[str, Any] = {"float32": {"rtol": 2e-5, "atol": 2e-6}, "bfloat16": {"rtol": 2e-2, "atol": 2e-2}}


@functools.cache
def run(implementation):
    return jax.jit(functools.partial(expert_ffn, implementation=implementation))


def weights(hidden=12, width=20, dtype="float32", seed=0):
    """gate_proj, up_proj, down_proj of eight experts."""
    rng = np.random.default_rng(seed)
    shapes = [(NUM_EXPERTS, hidden, width)] * 2 + [(NUM_EXPERTS, width, hidden)]
    return [jnp.asarray(rng.normal(size=s) / s[1] ** 0.5, dtype) for s in shapes]


def oracle(rows, local_idx, topk_weights, gate_proj, up_proj, down_proj):
    """Float64, one row and one choice at a time."""
    x, shares, gate, up, down = (np.asarray(a, np.float64) for a in (rows, topk_weights, gate_proj, up_proj, down_proj))
    out = np.zeros_like(x)
    for r, experts in enumerate(np.asarray(local_idx)):
        for e, share in zip(experts, shares[r], strict=True):
            if e >= 0:
                g = x[r] @ gate[e]
                out[r] += share * ((g / (1 + np.exp(-g)) * (x[r] @ up[e])) @ down[e])
    return out


def choices(rng, num_rows, k, allowed):
    """`[rows, k]` distinct experts out of `allowed`, -1 where there are fewer, in random columns; and their weights."""
    local_idx = np.full((num_rows, k), -1, np.int32)
    for row in local_idx:
        chosen = rng.permutation(allowed)[:k]
        row[rng.permutation(k)[: len(chosen)]] = chosen
    return local_idx, rng.uniform(0.1, 1, (num_rows, k)).astype(np.float32)


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("k", [1, 3])
def test_every_pattern_of_empty_groups(implementation, dtype, k):
    """Every subset of the eight experts is once the set that four rows choose from; the empty one leaves them zero."""
    rng = np.random.default_rng(1)
    parts = []
    for pattern in range(2**NUM_EXPERTS):
        parts.append(choices(rng, 4, k, [e for e in range(NUM_EXPERTS) if pattern >> e & 1]))
    local_idx, topk_weights = (np.stack(a) for a in zip(*parts, strict=True))
    rows = jnp.asarray(rng.normal(size=(2**NUM_EXPERTS, 4, 12)), dtype)
    params = weights(dtype=dtype)
    out = jax.vmap(lambda *row: run(implementation)(*row, *params))(rows, local_idx, topk_weights)
    assert out.dtype == jnp.float32
    want = oracle(rows.reshape(-1, 12), local_idx.reshape(-1, k), topk_weights.reshape(-1, k), *params)
    np.testing.assert_allclose(out.reshape(-1, 12), want, **TOLERANCE[dtype])
    assert not np.asarray(out[0]).any(), "no expert chosen, nothing said"


@IMPLEMENTATIONS
@pytest.mark.parametrize("pattern", [0b00000001, 0b10000000, 0b10101010, 0b01111110])
def test_a_batch_whose_groups_are_empty(implementation, pattern):
    """The same outside vmap, where one call has one pattern."""
    rng = np.random.default_rng(pattern)
    local_idx, topk_weights = choices(rng, 9, 4, [e for e in range(NUM_EXPERTS) if pattern >> e & 1])
    rows, params = rng.normal(size=(9, 12)).astype(np.float32), weights()
    out = run(implementation)(rows, local_idx, topk_weights, *params)
    np.testing.assert_allclose(out, oracle(rows, local_idx, topk_weights, *params), **TOLERANCE["float32"])


@IMPLEMENTATIONS
@pytest.mark.parametrize("expert", range(NUM_EXPERTS))
def test_one_expert_takes_everything(implementation, expert):
    rng = np.random.default_rng(expert)
    rows, params = rng.normal(size=(33, 12)).astype(np.float32), weights()
    local_idx = np.full((33, 2), -1, np.int32)
    local_idx[:, expert % 2] = expert
    topk_weights = rng.uniform(size=(33, 2)).astype(np.float32)
    out = run(implementation)(rows, local_idx, topk_weights, *params)
    np.testing.assert_allclose(out, oracle(rows, local_idx, topk_weights, *params), **TOLERANCE["float32"])


@IMPLEMENTATIONS
@pytest.mark.parametrize(("hidden", "width", "num_rows", "k"), [(1, 1, 1, 1), (7, 3, 5, 8), (64, 33, 17, 2)])
def test_odd_sizes(implementation, hidden, width, num_rows, k):
    rng = np.random.default_rng(hidden)
    rows, params = rng.normal(size=(num_rows, hidden)).astype(np.float32), weights(hidden, width)
    local_idx, topk_weights = choices(rng, num_rows, k, range(NUM_EXPERTS))
    out = run(implementation)(rows, local_idx, topk_weights, *params)
    np.testing.assert_allclose(out, oracle(rows, local_idx, topk_weights, *params), **TOLERANCE["float32"])


@IMPLEMENTATIONS
def test_a_zero_weight_says_nothing_and_a_weight_at_minus_one_is_ignored(implementation):
    rng = np.random.default_rng(2)
    rows, params = rng.normal(size=(6, 12)).astype(np.float32), weights()
    local_idx, topk_weights = choices(rng, 6, 3, range(NUM_EXPERTS))
    muted = topk_weights.copy()
    muted[:, 1] = 0
    elsewhere = local_idx.copy()
    elsewhere[:, 1] = -1
    loud = topk_weights.copy()
    loud[:, 1] = np.nan
    a = run(implementation)(rows, local_idx, muted, *params)
    b = run(implementation)(rows, elsewhere, loud, *params)
    np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(a, oracle(rows, local_idx, muted, *params), **TOLERANCE["float32"])


@IMPLEMENTATIONS
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_rows_that_nobody_chose_do_not_leak(implementation, poison):
    """Poisoned rows without an expert give zeros and change no bit of their neighbours."""
    rng = np.random.default_rng(3)
    rows, params = rng.normal(size=(8, 12)).astype(np.float32), weights()
    local_idx, topk_weights = choices(rng, 8, 2, range(NUM_EXPERTS))
    local_idx[::2] = -1
    poisoned = rows.copy()
    poisoned[::2] = poison
    out = np.asarray(run(implementation)(poisoned, local_idx, topk_weights, *params))
    assert not out[::2].any()
    np.testing.assert_array_equal(out[1::2], run(implementation)(rows, local_idx, topk_weights, *params)[1::2])


@IMPLEMENTATIONS
def test_experts_that_nobody_chose_do_not_leak(implementation):
    """A padded node holds zeros there, a broken one anything: a row hears only those that it chose."""
    rng = np.random.default_rng(4)
    rows, params = rng.normal(size=(8, 12)).astype(np.float32), weights()
    local_idx, topk_weights = choices(rng, 8, 3, range(5))
    broken = [w.at[5:].set(jnp.nan) for w in params]
    out = run(implementation)(rows, local_idx, topk_weights, *broken)
    np.testing.assert_array_equal(out, run(implementation)(rows, local_idx, topk_weights, *params))


@IMPLEMENTATIONS
def test_a_row_does_not_hear_its_neighbours(implementation):
    rng = np.random.default_rng(5)
    rows, params = rng.normal(size=(16, 12)).astype(np.float32), weights()
    local_idx, topk_weights = choices(rng, 16, 3, range(NUM_EXPERTS))
    others = rows.copy()
    others[1:] = rng.normal(size=(15, 12)) * 100
    a = run(implementation)(rows, local_idx, topk_weights, *params)
    b = run(implementation)(others, local_idx, topk_weights, *params)
    np.testing.assert_array_equal(a[0], b[0])


def test_no_name_takes_the_best_supported():
    rng = np.random.default_rng(6)
    local_idx, topk_weights = choices(rng, 4, 2, range(NUM_EXPERTS))
    rows, params = rng.normal(size=(4, 12)).astype(np.float32), weights()
    want = expert_ffn(rows, local_idx, topk_weights, *params, implementation="xla")
    np.testing.assert_array_equal(expert_ffn(rows, local_idx, topk_weights, *params), want)


def test_what_cannot_be_computed_is_refused():
    rows, ids, shares = np.zeros((4, 12), np.float32), np.zeros((4, 2), np.int32), np.ones((4, 2), np.float32)
    gate, up, down = weights()
    with pytest.raises(ValueError, match="expected implementation 'xla', 'pallas', 'reference' or None, got 'cuda'"):
        expert_ffn(rows, ids, shares, gate, up, down, implementation="cuda")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expert_ffn: expected out_dtype float32 or bfloat16, got int8"):
        expert_ffn(rows, ids, shares, gate, up, down, out_dtype="int8")
    for wrong in ((rows[:, :5], gate, up, down), (rows, gate, up[:, :, :5], down), (rows, gate, up, up)):
        with pytest.raises(ValueError, match=r"expert_ffn: expected rows .* got \(4, "):
            expert_ffn(wrong[0], ids, shares, *wrong[1:])
