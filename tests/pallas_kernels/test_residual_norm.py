"""residual_norm: the XLA form against the model's own steps, the Mosaic program on numpy; what is prefetched."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.models.norms import normalize
from jmoe.pallas_kernels import l2_prefetch
from jmoe.pallas_kernels.residual_norm import residual_norm
from jmoe.pallas_kernels.thin_matmul import thin_partials

sys.path.insert(0, __file__.rsplit("/", 1)[0])
import simt_emulator

EPS = 1e-6


def problem(tokens, width, parts, dtype):
    rng = np.random.default_rng(0)
    x, scale = rng.standard_normal((tokens, width)).astype(dtype), rng.standard_normal(width).astype(dtype)
    return x, rng.standard_normal((parts, tokens, width)).astype(np.float32), scale


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(jnp.bfloat16)])
@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@pytest.mark.parametrize(("tokens", "width", "parts"), [(3, 48, 1), (2, 1024, 4), (5, 584, 3)])
def test_is_the_models_own_steps(monkeypatch, tokens, width, parts, implementation, dtype):
    if implementation == "pallas":
        simt_emulator.install(monkeypatch)
    x, terms, scale = problem(tokens, width, parts, dtype)
    weights = [np.zeros((5, 24), dtype), np.zeros((7, 4096), np.float32)]
    got = residual_norm(x, terms, scale, EPS, next_weights=weights, implementation=implementation)
    want = x + terms.sum(axis=0).astype(dtype)
    both = want, normalize(jnp.asarray(want), jnp.asarray(scale), "rms", EPS)
    loose = {"rtol": 1e-5, "atol": 1e-6} if dtype == np.float32 else {"rtol": 2**-7, "atol": 2**-6}
    for mine, own in zip(got, both, strict=True):
        assert mine.dtype == dtype
        np.testing.assert_allclose(np.asarray(mine, np.float32), np.asarray(own, np.float32), **loose)


def test_partial_sums_add_up_to_the_product():
    rng = np.random.default_rng(0)
    rows, weights = rng.standard_normal((5, 24)), [rng.standard_normal((24, n)) for n in (6, 4)]
    parts = thin_partials(jnp.asarray(rows, jnp.float32), [jnp.asarray(w, jnp.float32) for w in weights], 3)
    assert parts.shape == (3, 5, 10) and parts.dtype == jnp.float32
    np.testing.assert_allclose(parts.sum(axis=0), rows @ np.concatenate(weights, axis=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("blocks", [1, 3, 200])
def test_every_wanted_byte_is_asked_for_once(monkeypatch, blocks):
    simt_emulator.install(monkeypatch)
    monkeypatch.setattr(l2_prefetch, "MAX_BYTES", 300_000)
    arrays = [np.zeros(100, np.float32), np.zeros(50_000, np.float32), np.zeros(90_000, np.float32)]
    wanted = l2_prefetch.bytes_of(arrays)
    assert wanted == [400, 149_792, 149_808], "the small one whole, the others alike, whole 16 bytes"
    asked = []
    monkeypatch.setattr(
        simt_emulator.Pointer,
        "prefetch",
        lambda self, n: asked.extend((id(self.memory), o, n) for o in self.offset[simt_emulator.MACHINE.mask].tolist()),
    )
    pointers = [simt_emulator.Pointer(a.view(np.uint8)) for a in arrays]
    for block in range(blocks):
        simt_emulator.MACHINE.block = block
        l2_prefetch.l2_prefetch(pointers, wanted, blocks)
    for pointer, total in zip(pointers, wanted, strict=True):
        mine = sorted((o, n) for memory, o, n in asked if memory == id(pointer.memory))
        assert [o for o, _ in mine] == list(np.cumsum([0, *(n for _, n in mine)])[:-1]), "no gap, nothing twice"
        assert sum(n for _, n in mine) == total


def test_what_does_not_fit_is_refused():
    x, terms, scale = problem(2, 10, 1, np.float32)
    with pytest.raises(ValueError, match="D a multiple of 4"):
        residual_norm(x, terms, scale, EPS, implementation="pallas")
    with pytest.raises(ValueError, match="expected implementation"):
        residual_norm(x, terms, scale, EPS, implementation="cuda")
    with pytest.raises(ValueError, match=r"float32 terms \[parts, tokens, D\]"):
        residual_norm(x, terms[:, :1], scale, EPS)
