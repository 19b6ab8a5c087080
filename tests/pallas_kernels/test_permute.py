"""permute and unpermute against numpy: the XLA form, and the Mosaic bodies' programs run thread by thread."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.pallas_kernels.block_scaled import quantize_rows
from jmoe.pallas_kernels.permute import num_padded_rows, permute, unpermute
from jmoe.pallas_kernels.quantize_rows_mosaic import quantize_rows_pallas

sys.path.insert(0, __file__.rsplit("/", 1)[0])
import simt_emulator

IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["xla", "pallas"])
NUM_EXPERTS = 8


@pytest.fixture(autouse=True)
def emulated(request, monkeypatch):
    """ "pallas" means the emulator here."""
    if "pallas" in str(getattr(request.node, "callspec", "")) or "pallas" in request.node.name:
        simt_emulator.install(monkeypatch)


@functools.cache
def compiled(op, implementation, **options):
    """Jitted, where it isn't the emulator, which computes at once."""
    function = functools.partial(op, implementation=implementation, **options)
    return function if implementation == "pallas" else jax.jit(function)


def choices(rng, num_rows, k, num_experts, missing=0.0):
    local_idx = np.argsort(rng.random((num_rows, num_experts)), axis=1)[:, :k].astype(np.int32)
    local_idx[rng.random(local_idx.shape) < missing] = -1
    return local_idx


def assert_permuted(rows, local_idx, num_experts, align, implementation, float8=False):
    """Everything that the contract fixes; rows of no group may hold anything."""
    want = permute(rows, local_idx, num_experts, align=align, float8=float8, implementation="reference")
    got = compiled(permute, implementation, num_experts=num_experts, align=align, float8=float8)(rows, local_idx)
    for name in ("group_sizes", "group_starts", "positions"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)
    place = np.asarray(want.positions)
    for a, b in ((got.rows, want.rows), (got.scales, want.scales)) if float8 else ((got.rows, want.rows),):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a)[place[place >= 0]], np.asarray(b)[place[place >= 0]])
    assert not (np.asarray(got.group_starts) % align).any()


@IMPLEMENTATIONS
@pytest.mark.parametrize("align", [1, 8])
def test_every_pattern_of_empty_groups(implementation, align):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(5, 4)).astype(np.float32)
    for pattern in range(2**NUM_EXPERTS) if implementation == "xla" else range(0, 2**NUM_EXPERTS, 11):
        allowed = [e for e in range(NUM_EXPERTS) if pattern >> e & 1]
        local_idx = np.full((5, 3), -1, np.int32)
        for row in local_idx:
            chosen = rng.permutation(allowed)[:3]
            row[rng.permutation(3)[: len(chosen)]] = chosen
        assert_permuted(rows, local_idx, NUM_EXPERTS, align, implementation)


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    ("num_rows", "k", "num_experts", "width", "align", "missing"),
    [
        (1, 1, 1, 4, 1, 0), (3, 2, 5, 8, 1, 0.5), (16, 8, 128, 1032, 8, 0.3), (33, 3, 37, 328, 64, 0.2),
        (700, 3, 130, 4, 16, 0.1), (2049, 1, 5, 4, 128, 0.5), (301, 8, 40, 1032, 1, 0),
    ],
)  # fmt: skip
def test_sizes_that_no_block_divides(implementation, num_rows, k, num_experts, width, align, missing):
    """Both sides of the fused kernel's limit, rows longer than a warp takes at once, more experts than threads."""
    rng = np.random.default_rng(num_rows)
    rows = jnp.asarray(rng.normal(size=(num_rows, width)), jnp.bfloat16 if width % 8 == 0 else jnp.float32)
    assert_permuted(rows, choices(rng, num_rows, k, num_experts, missing), num_experts, align, implementation)


@IMPLEMENTATIONS
@pytest.mark.parametrize("num_rows", [33, 1100])
def test_one_expert_takes_everything(implementation, num_rows):
    rows = np.random.default_rng(1).normal(size=(num_rows, 4)).astype(np.float32)
    local_idx = np.full((num_rows, 2), -1, np.int32)
    local_idx[:, 1] = NUM_EXPERTS - 1
    assert_permuted(rows, local_idx, NUM_EXPERTS, 8, implementation)


@IMPLEMENTATIONS
@pytest.mark.parametrize(("num_rows", "width"), [(9, 128), (9, 1152), (1200, 384)])
def test_rows_are_rounded_to_float8_on_the_way(implementation, num_rows, width):
    """Zeros, huge and tiny rows among them; the same bits as `quantize_rows`, one kernel or three."""
    rng = np.random.default_rng(width)
    rows = rng.normal(size=(num_rows, width)) * 10.0 ** rng.integers(-9, 9, (num_rows, 1))
    rows[1] = 0
    local_idx = choices(rng, num_rows, 2, NUM_EXPERTS, 0.2)
    assert_permuted(jnp.asarray(rows, jnp.bfloat16), local_idx, NUM_EXPERTS, 8, implementation, float8=True)


@pytest.mark.parametrize(("num_rows", "width"), [(5, 128), (3, 768), (2, 2176)])
def test_quantize_rows_pallas(num_rows, width):
    rows = jnp.asarray(np.random.default_rng(width).normal(size=(num_rows, width)), jnp.bfloat16)
    for got, want in zip(quantize_rows_pallas(rows), quantize_rows(rows), strict=True):
        np.testing.assert_array_equal(got, want)


def test_the_worst_case_is_reached_and_no_more_than_it():
    """Over all sizes of three groups of seven pairs."""
    for align in (1, 4, 8):
        worst = max(sum(-(-n // align) * align for n in (a, b, 7 - a - b)) for a in range(8) for b in range(8 - a))
        assert worst <= num_padded_rows(7, 1, 3, align) < worst + 2 * align
    assert num_padded_rows(2, 1, 128, 8) == 16, "two pairs fill two groups"


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("weighted", "out_dtype"), [(True, "float32"), (False, "float32"), (True, "bfloat16")])
def test_unpermute_adds_a_rows_choices(implementation, dtype, weighted, out_dtype):
    rng = np.random.default_rng(2)
    local_idx = choices(rng, 21, 3, NUM_EXPERTS, 0.3)
    local_idx[4] = -1
    positions = np.asarray(
        permute(np.zeros((21, 4), np.float32), local_idx, NUM_EXPERTS, implementation="reference")[3]
    )
    y = np.array(jnp.asarray(rng.normal(size=(63, 1032)), dtype))
    y[np.setdiff1d(np.arange(63), positions)] = np.nan  # rows of no group say nothing
    shares = rng.uniform(0.1, 1, local_idx.shape).astype(np.float32)
    shares[7, 1] = 0
    y[positions[7, 1]] = np.nan if weighted and positions[7, 1] >= 0 else y[positions[7, 1]]
    arguments = (y, positions, shares) if weighted else (y, positions)
    got = np.asarray(compiled(unpermute, implementation, out_dtype=jnp.dtype(out_dtype))(*arguments))
    assert got.dtype == jnp.dtype(out_dtype) and not got[4].any()
    want = np.zeros(got.shape)
    for (r, j), place in np.ndenumerate(positions):
        if place >= 0 and (shares[r, j] or not weighted):
            want[r] += (shares[r, j] if weighted else 1) * y[place].astype(np.float64)
    np.testing.assert_allclose(got.astype(np.float64), want, rtol=1e-5 if out_dtype == "float32" else 2**-8, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_there_and_back(seed):
    """Identity experts with weights that sum to one give the rows back."""
    rng = np.random.default_rng(seed)
    rows, local_idx = rng.normal(size=(17, 6)).astype(np.float32), choices(rng, 17, 4, NUM_EXPERTS)
    shares = rng.dirichlet(np.ones(4), 17).astype(np.float32)
    permuted = jax.jit(functools.partial(permute, num_experts=NUM_EXPERTS, align=8))(rows, local_idx)
    np.testing.assert_allclose(unpermute(permuted.rows, permuted.positions, shares), rows, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_computed_is_refused():
    rows, ids = np.zeros((4, 12), np.float32), np.zeros((4, 2), np.int32)
    with pytest.raises(ValueError, match="expected implementation 'xla', 'pallas', 'reference' or None, got 'cuda'"):
        permute(rows, ids, 8, implementation="cuda")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected implementation 'xla', 'pallas', 'reference' or None, got 'cuda'"):
        unpermute(rows, ids, implementation="cuda")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"permute: expected rows .* got \(4, 12\), \(3, 2\) and 1"):
        permute(rows, ids[:3], 8)
    with pytest.raises(ValueError, match="multiple of 16 bytes, got 40"):
        permute(rows[:, :10], ids, 8, implementation="pallas")
    with pytest.raises(ValueError, match="16-bit rows of a multiple of 128 columns for float8, got float32 and 12"):
        permute(rows, ids, 8, float8=True, implementation="pallas")
    with pytest.raises(ValueError, match=r"unpermute: expected rows .* got \(4, 12\), \(4, 2\) and \(4, 1\)"):
        unpermute(rows, ids, np.ones((4, 1), np.float32))
    with pytest.raises(ValueError, match="unpermute: expected out_dtype float32 or bfloat16, got float16"):
        unpermute(rows, ids, out_dtype=jnp.float16)
