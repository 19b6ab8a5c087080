"""place_heads: the XLA form against the model's own norm, rotary and page writes; the Mosaic program on numpy."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.models.norms import normalize, rotate
from jmoe.pallas_kernels import place_heads_mosaic
from jmoe.pallas_kernels.paged_attention import write_pages
from jmoe.pallas_kernels.place_heads import place_heads, place_partial_heads

sys.path.insert(0, __file__.rsplit("/", 1)[0])
import simt_emulator

THETA, EPS = 1e4, 1e-6


def problem(rows=3, chunk=1, heads=6, kv_heads=2, head_dim=64, norm=True, dtype=np.float32, seed=0):
    """Positions far apart, a row that holds no token, pages with something in them."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.standard_normal(shape).astype(dtype)

    q, k, v = (draw(rows, chunk, n, head_dim) for n in (heads, kv_heads, kv_heads))
    scales = (draw(head_dim), draw(head_dim)) if norm else (None, None)
    pages = draw(1 + 5 * rows, 4, kv_heads, head_dim), draw(1 + 5 * rows, 4, kv_heads, head_dim)
    table = 1 + rng.permutation(5 * rows).reshape(rows, 5).astype(np.int32)
    start_pos = np.array([0, 7, 15, 3, 11][:rows], np.int32)
    num_tokens = np.array([chunk, 0, chunk, chunk, 1][:rows], np.int32)
    return [q, k, v, *scales, *pages, table, start_pos, num_tokens]


def expected(q, k, v, q_scale, k_scale, k_pages, v_pages, table, start_pos, num_tokens):
    positions = start_pos[:, None] + np.arange(q.shape[1])
    if q_scale is not None:
        q, k = normalize(q, q_scale, "rms", EPS), normalize(k, k_scale, "rms", EPS)
    q, k = rotate(q, positions, THETA), rotate(k, positions, THETA)
    place = (table, start_pos, num_tokens)
    return q, write_pages(k_pages, k, *place), write_pages(v_pages, v, *place)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("chunk", "norm"), [(1, True), (1, False), (4, True)])
def test_the_xla_form_is_the_models_own(chunk, norm, dtype):
    arrays = [a if a is None else jnp.asarray(a) for a in problem(chunk=chunk, norm=norm, dtype=dtype)]
    got = place_heads(*arrays, theta=THETA, eps=EPS, implementation="xla")
    for mine, model in zip(got, expected(*arrays), strict=True):
        np.testing.assert_array_equal(np.asarray(mine, np.float32), np.asarray(model, np.float32))


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(jnp.bfloat16)])
@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "head_dim", "norm"), [(3, 6, 2, 64, True), (5, 4, 4, 128, True), (1, 3, 1, 64, False)]
)
def test_the_kernels_program(monkeypatch, rows, heads, kv_heads, head_dim, norm, dtype):
    """On numpy; the pages are written in place, every other cell of them untouched."""
    simt_emulator.install(monkeypatch)
    monkeypatch.setattr(jax, "new_ref", lambda array: array)
    monkeypatch.setattr(jax, "freeze", lambda ref: ref)
    arrays = problem(rows, 1, heads, kv_heads, head_dim, norm, dtype)
    want = expected(*(a if a is None else jnp.asarray(a) for a in arrays))
    got = place_heads_mosaic.place_heads_pallas(*arrays, theta=THETA, eps=EPS)
    loose = {"rtol": 0, "atol": 1e-5 if dtype == np.float32 else 0.04}  # bfloat16: a rounding of values up to 4
    for mine, model in zip(got, want, strict=True):
        np.testing.assert_allclose(np.asarray(mine, np.float32), np.asarray(model, np.float32), **loose)
    untouched = np.asarray(want[2] == arrays[6]) if dtype == np.float32 else slice(0)
    np.testing.assert_array_equal(np.asarray(got[2])[untouched], np.asarray(want[2])[untouched])


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@pytest.mark.parametrize("norm", [True, False])
def test_partial_sums_of_the_projections(monkeypatch, norm, implementation):
    """As the whole ones, rounded once they are added up."""
    dtype, (rows, heads, kv_heads, head_dim) = np.dtype(jnp.bfloat16), (3, 6, 2, 64)
    arrays = problem(rows, 1, heads, kv_heads, head_dim, norm, dtype)
    whole = np.concatenate([a.reshape(rows, -1) for a in arrays[:3]], axis=1).astype(np.float32)
    parts = np.random.default_rng(1).standard_normal((4, *whole.shape)).astype(np.float32)
    parts[3] = whole - parts[:3].sum(axis=0)
    want = expected(*(a if a is None else jnp.asarray(a) for a in arrays))
    if implementation == "pallas":
        simt_emulator.install(monkeypatch)
        monkeypatch.setattr(jax, "new_ref", lambda array: array)
        monkeypatch.setattr(jax, "freeze", lambda ref: ref)
    else:
        parts, *arrays = jax.tree.map(jnp.asarray, [parts, *arrays])
    got = place_partial_heads(parts, heads, *arrays[3:], theta=THETA, eps=EPS, implementation=implementation)
    assert got[0].shape == (rows, 1, heads, head_dim)
    for mine, model in zip(got, want, strict=True):
        np.testing.assert_allclose(np.asarray(mine, np.float32), np.asarray(model, np.float32), rtol=0, atol=0.04)
    with pytest.raises(ValueError, match=r"place_partial_heads: expected partials .* for 5 queries"):
        place_partial_heads(parts, 5, *arrays[3:], theta=THETA, eps=EPS)


def test_what_the_kernel_cannot_do_is_refused():
    several = problem(chunk=4)
    with pytest.raises(ValueError, match="'pallas' expected one new token a row, got 4"):
        place_heads(*several, theta=THETA, eps=EPS, implementation="pallas")
    narrow = problem(head_dim=16)
    with pytest.raises(ValueError, match="a multiple of 64, got 16"):
        place_heads(*narrow, theta=THETA, eps=EPS, implementation="pallas")
    with pytest.raises(ValueError, match="expected implementation 'xla', 'pallas' or None, got 'cuda'"):
        place_heads(*problem(), theta=THETA, eps=EPS, implementation="cuda")
    wrong = problem()
    wrong[1] = wrong[1][:2]
    with pytest.raises(ValueError, match="place_heads: expected q"):
        place_heads(*wrong, theta=THETA, eps=EPS)
