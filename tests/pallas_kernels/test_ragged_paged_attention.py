"""ragged_paged_attention against a float64 loop: decode rows and chunks in one call, another's NaN behind them."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from imaginary_gpus import imaginary_gpus

from jmoe.pallas_kernels import ragged_paged_attention as module
from jmoe.pallas_kernels.ragged_paged_attention import ragged_paged_attention

IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["xla", "reference"])
# (positions before the call, new tokens): page boundaries of 16 and 64 and both sides of them, decode and prefill, idle
ROWS = (
    (0, 1),
    (14, 1),
    (15, 1),
    (16, 1),
    (0, 15),
    (0, 16),
    (3, 14),
    (0, 0),
    (62, 1),
    (63, 1),
    (64, 1),
    (5, 90),
    (100, 33),
)


@dataclasses.dataclass(frozen=True)
class Batch:
    """A call: `arrays` in the order of the arguments, and the keys and values of each row."""

    arrays: tuple[np.ndarray, ...]
    keys: list[np.ndarray]
    values: list[np.ndarray]

    def arguments(self, dtype: Any):
        return tuple(jnp.asarray(a, dtype if a.dtype == np.float32 else None) for a in self.arrays)


def batch_of(rows, num_heads=4, num_kv_heads=2, head_dim=16, page_len=16, gap=0, seed=0) -> Batch:
    """Sequences in scattered pages, `gap` tokens of nobody ahead of each row's queries; every other cell is NaN."""
    rng = np.random.default_rng(seed)
    lengths = [before + new for before, new in rows]
    most = max(-(-length // page_len) for length in lengths) + 1
    pool = rng.permutation(np.arange(1, 1 + len(rows) * most)).reshape(len(rows), most)
    pages = np.full((2, 1 + pool.size, page_len, num_kv_heads, head_dim), np.nan, np.float32)
    table = np.zeros((len(rows), most), np.int32)
    kept: list[list[np.ndarray]] = [[], []]
    for row, length in enumerate(lengths):
        used = -(-length // page_len)
        table[row, :used] = pool[row, :used]
        kv = rng.normal(size=(2, length, num_kv_heads, head_dim)).astype(jnp.bfloat16).astype(np.float32)
        for position in range(length):
            pages[:, table[row, position // page_len], position % page_len] = kv[:, position]
        for side in (0, 1):
            kept[side].append(kv[side])
    start, num = (np.array(column, np.int32) for column in zip(*rows, strict=True))
    offsets = (np.cumsum(num + gap) - num).astype(np.int32)
    q = rng.normal(size=(offsets[-1] + num[-1] + gap, num_heads, head_dim)).astype(jnp.bfloat16).astype(np.float32)
    return Batch((q, *pages, table, offsets, num, start), *kept)


def oracle(batch: Batch, sliding_window=None, logit_soft_cap=None, sinks=None) -> np.ndarray:
    """Float64, one token and one head at a time; zeros for tokens of no row."""
    q, _, _, _, offsets, num, start = batch.arrays
    out = np.zeros(q.shape)
    for row, (keys, values) in enumerate(zip(batch.keys, batch.values, strict=True)):
        for index, head in np.ndindex(num[row], q.shape[1]):
            position = start[row] + index
            first = 0 if sliding_window is None else max(0, position + 1 - sliding_window)
            kv_head = head // (q.shape[1] // keys.shape[1])
            k, v = (a[first : position + 1, kv_head].astype(np.float64) for a in (keys, values))
            scores = k @ q[offsets[row] + index, head].astype(np.float64) / math.sqrt(q.shape[2])
            if logit_soft_cap is not None:
                scores = logit_soft_cap * np.tanh(scores / logit_soft_cap)
            weights = np.exp(scores - scores.max())
            sink = 0.0 if sinks is None else np.exp(sinks[head] - scores.max())
            out[offsets[row] + index, head] = weights @ v / (weights.sum() + sink)
    return out


@functools.cache
def compiled(implementation, sliding_window=None, logit_soft_cap=None, with_sinks=False):
    def function(sinks, *arguments):
        return ragged_paged_attention(
            *arguments,
            sliding_window=sliding_window,
            logit_soft_cap=logit_soft_cap,
            sinks=sinks if with_sinks else None,
            implementation=implementation,
        )

    return jax.jit(function)


def run(implementation, arguments, sinks=None, **options) -> np.ndarray:
    given = jnp.zeros(arguments[0].shape[1]) if sinks is None else jnp.asarray(sinks, jnp.float32)
    out = compiled(implementation, with_sinks=sinks is not None, **options)(given, *arguments)
    return np.asarray(out, np.float32)


@IMPLEMENTATIONS
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "page_len"), [(4, 2, 16), (3, 3, 64), (16, 1, 16)])
def test_against_float64(implementation, num_heads, num_kv_heads, page_len):
    batch = batch_of(ROWS, num_heads, num_kv_heads, page_len=page_len)
    got = run(implementation, batch.arguments("float32"))
    np.testing.assert_allclose(got, oracle(batch), rtol=1e-5, atol=2e-6)


@IMPLEMENTATIONS
def test_bfloat16(implementation):
    batch = batch_of(ROWS)
    got = run(implementation, batch.arguments("bfloat16"))
    np.testing.assert_allclose(got, oracle(batch), rtol=2e-2, atol=2e-2)


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    ("sliding_window", "logit_soft_cap", "with_sinks"),
    [(1, None, False), (20, None, False), (None, 2.0, False), (None, None, True), (20, 2.0, True)],
)
def test_options(implementation, sliding_window, logit_soft_cap, with_sinks):
    batch = batch_of(ROWS[::2])
    sinks = np.array([-2.0, 0.0, 3.0, 1.0]) if with_sinks else None
    options = {"sliding_window": sliding_window, "logit_soft_cap": logit_soft_cap}
    got = run(implementation, batch.arguments("float32"), sinks, **options)
    np.testing.assert_allclose(got, oracle(batch, sinks=sinks, **options), rtol=1e-5, atol=2e-6)


@IMPLEMENTATIONS
def test_tokens_of_no_row_are_zeros(implementation):
    batch = batch_of(ROWS[-3:], gap=3)
    got = run(implementation, batch.arguments("float32"))
    np.testing.assert_allclose(got, oracle(batch), rtol=1e-5, atol=2e-6)
    assert not got[:3].any() and not got[-3:].any()


@IMPLEMENTATIONS
def test_float8_pages_stand_for_their_value_times_a_scale(implementation):
    batch = batch_of(ROWS[-4:])
    q, k, v, *rest = batch.arguments("float32")
    k, v = ((pages / scale).astype(jnp.float8_e4m3fn) for pages, scale in ((k, 0.5), (v, 4.0)))
    wide = (k.astype(jnp.float32) * 0.5, v.astype(jnp.float32) * 4.0)
    scales = {"k_scale": jnp.float32(0.5), "v_scale": jnp.float32(4.0)}
    got = ragged_paged_attention(q, k, v, *rest, **scales, implementation=implementation)
    want = ragged_paged_attention(q, *wide, *rest, implementation=implementation)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6)


def test_what_cannot_be_computed_is_refused():
    q, k, v, *rest = batch_of(ROWS[:2]).arguments("float32")
    with pytest.raises(ValueError, match="expected implementation 'xla', 'pallas', 'reference' or None, got 'triton'"):
        ragged_paged_attention(q, k, v, *rest, implementation="triton")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'pallas' expected bfloat16 queries and .* pages, got float32"):
        ragged_paged_attention(q, k, v, *rest, implementation="pallas")
    for wrong in ((q[:, :3], k, v), (q[..., :8], k, v), (q, k, v[:, :, :1])):
        with pytest.raises(ValueError, match=r"expected q \[tokens, Q, H\] and pages"):
            ragged_paged_attention(*wrong, *rest)
    with pytest.raises(ValueError, match=r"expected sinks \[Q\] = \(4,\), got \(2,\)"):
        ragged_paged_attention(q, k, v, *rest, sinks=jnp.zeros(2))


@pytest.fixture
def interpreted(monkeypatch):
    """The Mosaic kernel on the CPU, with few thread blocks: each costs seconds."""
    if jax.__version_info__ < (0, 11):
        pytest.skip(f"Mosaic GPU interpret mode with layout_cast needs jax 0.11 or newer, got {jax.__version__}")
    from jax._src.pallas.mosaic_gpu.interpret import params

    from jmoe.pallas_kernels import paged_prefill_mosaic

    monkeypatch.setattr(module, "num_sms", lambda: 2)
    plain = functools.partial(paged_prefill_mosaic.paged_prefill, interpret=True)
    monkeypatch.setattr(paged_prefill_mosaic, "paged_prefill", plain)
    with params.force_gpu_interpret_mode():
        yield


@pytest.mark.aot
@pytest.mark.parametrize(
    ("rows", "heads", "head_dim", "page_len", "options"),
    [
        (((15, 2), (0, 33), (100, 1)), (2, 1), 64, 16, {}),
        (((63, 1), (40, 60)), (3, 1), 64, 64, {"sliding_window": 50, "logit_soft_cap": 3.0, "sinks": (1.0, 0.0, 2.0)}),
    ],
)
def test_the_kernel_interpreted(interpreted, rows, heads, head_dim, page_len, options):
    batch = batch_of(rows, heads[0], heads[1], head_dim, page_len, gap=2)
    sinks = options.pop("sinks", None)
    given = None if sinks is None else jnp.asarray(sinks, jnp.float32)
    arguments = batch.arguments("bfloat16")
    got = np.asarray(ragged_paged_attention(*arguments, **options, sinks=given, implementation="pallas"), np.float32)
    np.testing.assert_allclose(got, oracle(batch, sinks=sinks, **options), rtol=2e-2, atol=2e-2)


@pytest.mark.aot
def test_the_kernel_compiled_for_hopper():
    """Two launches: attention and merge. Nothing of the pages' or queries' size is moved beside them."""
    sharding = jax.sharding.SingleDeviceSharding(imaginary_gpus(1)[0])
    pages, rows = ((256, 64, 8, 128), jnp.bfloat16), ((4,), jnp.int32)
    shapes = (((2048, 48, 128), jnp.bfloat16), pages, pages, ((4, 64), jnp.int32), rows, rows, rows)
    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in shapes]
    function = functools.partial(ragged_paged_attention, implementation="pallas")
    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).compile().as_text()
    assert text is not None
    entry = text[text.index("\nENTRY ") :]
    assert entry.count('custom_call_target="mosaic_gpu') == 2
    assert not [line for line in entry.splitlines() if " copy(" in line and "bf16[" in line]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "head_dim", "page_len", "options"),
    [
        ((48, 8), 128, 16, {}),
        ((48, 8), 128, 64, {"sliding_window": 128, "logit_soft_cap": 3.0, "sinks": np.linspace(-1, 2, 48)}),
        ((16, 1), 64, 64, {}),
        ((4, 4), 256, 16, {}),
    ],
)
def test_the_kernel_on_a_gpu(heads, head_dim, page_len, options):
    rows = (*ROWS, (2047, 1), (1000, 130), (0, 257), (31, 64))
    batch = batch_of(rows, heads[0], heads[1], head_dim, page_len, gap=1)
    sinks = options.get("sinks")
    options = {key: value for key, value in options.items() if key != "sinks"}
    got, again = (run("pallas", batch.arguments("bfloat16"), sinks, **options) for _ in range(2))
    np.testing.assert_allclose(got, oracle(batch, sinks=sinks, **options), rtol=2e-2, atol=2e-2)
    np.testing.assert_array_equal(got, again)
