"""paged_attention against a float64 loop over ragged sequences in scattered pages; write_pages."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.pallas_kernels.paged_attention import paged_attention, write_pages

IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["xla", "reference"])
TOLERANCE: dict[str, Any] = {"float32": {"rtol": 1e-5, "atol": 2e-6}, "bfloat16": {"rtol": 2e-2, "atol": 2e-2}}
GROUPS = ((3, 3), (4, 2), (9, 3), (4, 1), (5, 1), (12, 2), (7, 1), (8, 1))
LENGTHS = (1, 3, 4, 5, 8, 9, 13, 16)  # tokens before and with this call's: page boundaries of 4 and both sides of them


@dataclasses.dataclass(frozen=True)
class Batch:
    """A filled cache and a call on it; `keys` and `values` are the sequences that the pages hold, row by row."""

    q: np.ndarray
    k_pages: np.ndarray
    v_pages: np.ndarray
    page_table: np.ndarray
    start_pos: np.ndarray
    keys: list[np.ndarray]
    values: list[np.ndarray]

    def arguments(self, dtype="float32"):
        arrays = [jnp.asarray(a, dtype) for a in (self.q, self.k_pages, self.v_pages)]
        return (*arrays, jnp.asarray(self.page_table), jnp.asarray(self.start_pos))


def batch_of(lengths, chunk=1, num_heads=4, num_kv_heads=2, head_dim=16, page_len=4, max_pages=5, seed=0) -> Batch:
    """Rows whose last `chunk` tokens (fewer where the row is shorter) are new; every other cell holds loud garbage."""
    rng = np.random.default_rng(seed)
    num_pages = 1 + len(lengths) * max_pages
    pool = rng.permutation(np.arange(1, num_pages)).reshape(len(lengths), max_pages)
    pages = rng.normal(size=(2, num_pages, page_len, num_kv_heads, head_dim)).astype(np.float32) * 30
    page_table = np.zeros((len(lengths), max_pages), np.int32)
    keys, values = [], []
    for row, length in enumerate(lengths):
        used = -(-length // page_len)
        page_table[row, :used] = pool[row, :used]
        kv = rng.normal(size=(2, length, num_kv_heads, head_dim)).astype(np.float32)
        for position in range(length):
            pages[:, page_table[row, position // page_len], position % page_len] = kv[:, position]
        keys.append(kv[0])
        values.append(kv[1])
    q = rng.normal(size=(len(lengths), chunk, num_heads, head_dim)).astype(np.float32)
    start_pos = np.maximum(np.array(lengths) - chunk, 0).astype(np.int32)
    return Batch(q, *pages, page_table, start_pos, keys, values)


def oracle(batch: Batch, sliding_window=None, logit_soft_cap=None, sinks=None) -> np.ndarray:
    """Float64, one token and one head at a time; NaN where a row holds no such token."""
    rows, chunk, num_heads, head_dim = batch.q.shape
    out = np.full(batch.q.shape, np.nan)
    for r, c, h in np.ndindex(rows, chunk, num_heads):
        position = batch.start_pos[r] + c
        if position >= len(batch.keys[r]):
            continue
        first = 0 if sliding_window is None else max(0, position + 1 - sliding_window)
        kv_head = h // (num_heads // batch.keys[r].shape[1])
        k, v = (a[r][first : position + 1, kv_head].astype(np.float64) for a in (batch.keys, batch.values))
        scores = k @ batch.q[r, c, h].astype(np.float64) / np.sqrt(head_dim)
        if logit_soft_cap is not None:
            scores = logit_soft_cap * np.tanh(scores / logit_soft_cap)
        weights = np.exp(scores - scores.max())
        sink = 0.0 if sinks is None else np.exp(sinks[h] - scores.max())
        out[r, c, h] = weights @ v / (weights.sum() + sink)
    return out


@functools.cache
def compiled(implementation):
    """The window is traced, so that all windows share one program."""

    def function(q, k_pages, v_pages, page_table, start_pos, sliding_window):
        return paged_attention(
            q, k_pages, v_pages, page_table, start_pos, sliding_window=sliding_window, implementation=implementation
        )

    return jax.jit(function)


def run(implementation, sliding_window=None):
    return lambda *arguments: compiled(implementation)(*arguments, sliding_window)


def assert_right(batch: Batch, implementation, sliding_window=None, dtype="float32"):
    out = np.asarray(run(implementation, sliding_window)(*batch.arguments(dtype)), np.float32)
    want = oracle(batch, sliding_window)
    assert np.isfinite(out).all(), "rows and columns that hold no token come out finite"
    there = ~np.isnan(want)
    assert there.any()
    np.testing.assert_allclose(out[there], want[there], **TOLERANCE[dtype])


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("sliding_window", [None, 1, 3, 4, 6, 100])
def test_decode_over_ragged_lengths(implementation, dtype, sliding_window):
    assert_right(batch_of(LENGTHS), implementation, sliding_window, dtype)


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("sliding_window", [None, 2, 5])
def test_prefill_chunks_start_anywhere_and_end_anywhere(implementation, dtype, sliding_window):
    """Chunks of 6 over pages of 4: first chunks, later ones, short last ones, whole and part pages."""
    assert_right(batch_of((*LENGTHS, 6, 20), chunk=6), implementation, sliding_window, dtype)


@IMPLEMENTATIONS
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), GROUPS)
def test_groups_of_one_to_eight_query_heads(implementation, num_heads, num_kv_heads):
    assert_right(batch_of((2, 7, 12), chunk=2, num_heads=num_heads, num_kv_heads=num_kv_heads), implementation)


@IMPLEMENTATIONS
@pytest.mark.parametrize("head_dim", [16, 40, 64, 128])
def test_head_sizes(implementation, head_dim):
    assert_right(batch_of((3, 9, 17), head_dim=head_dim), implementation)


@IMPLEMENTATIONS
@pytest.mark.parametrize("page_len", [1, 3, 16])
def test_page_sizes(implementation, page_len):
    lengths = [n for n in (1, 2, 3, 4, 5, 16, 17) if n <= page_len * 6]
    assert_right(batch_of(lengths, page_len=page_len, max_pages=6), implementation, 4)


@IMPLEMENTATIONS
def test_idle_rows_stay_finite_and_disturb_nobody(implementation):
    """An idle row has an empty page table and stands at position 0: it reads page 0, whatever that holds."""
    batch = batch_of((5, 9, 14))
    alone = run(implementation)(*batch.arguments())
    grown = dataclasses.replace(
        batch,
        q=np.concatenate([batch.q, batch.q[:1] * 1e4]),
        page_table=np.concatenate([batch.page_table, np.zeros_like(batch.page_table[:1])]),
        start_pos=np.append(batch.start_pos, np.int32(0)),
    )
    out = np.asarray(run(implementation)(*grown.arguments()))
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out[:3], alone, rtol=1e-6, atol=1e-6)


@IMPLEMENTATIONS
def test_what_others_left_in_the_pages_is_not_heard_even_as_nan(implementation):
    """Cells behind a row's own tokens hold NaN, also those that an unfilled chunk would have written."""
    batch = batch_of(LENGTHS, chunk=4)
    num_tokens = np.array(
        [len(keys) - start for keys, start in zip(batch.keys, batch.start_pos, strict=True)], np.int32
    )
    q, k_pages, v_pages, page_table, start_pos = batch.arguments()
    poisoned = np.full(batch.v_pages.shape, np.nan, np.float32)
    for row, values in enumerate(batch.values):
        for position, value in enumerate(values):
            poisoned[batch.page_table[row, position // 4], position % 4] = value
    arguments = (page_table, start_pos, jnp.asarray(num_tokens))
    clean = paged_attention(q, k_pages, v_pages, *arguments, implementation=implementation)
    got = paged_attention(q, k_pages, jnp.asarray(poisoned), *arguments, implementation=implementation)
    for row, count in enumerate(num_tokens):
        np.testing.assert_array_equal(got[row, :count], clean[row, :count])


@IMPLEMENTATIONS
def test_a_row_does_not_hear_other_rows_pages(implementation):
    batch = batch_of((5, 9, 14))
    loud = dataclasses.replace(batch, k_pages=batch.k_pages.copy(), v_pages=batch.v_pages.copy())
    mine = set(batch.page_table[1, :3].tolist())
    for page in set(range(len(batch.k_pages))) - mine:
        loud.k_pages[page] = loud.v_pages[page] = 1e4
    a, b = (np.asarray(run(implementation)(*x.arguments())) for x in (batch, loud))
    np.testing.assert_array_equal(a[1], b[1])
    assert (a[0] != b[0]).any()


@IMPLEMENTATIONS
@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("sliding_window", [None, 3])
@pytest.mark.parametrize("logit_soft_cap", [None, 2.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_soft_cap_and_sinks(implementation, chunk, sliding_window, logit_soft_cap, with_sinks):
    """Scores here reach 4, so that a cap of 2 bends them; a sink of 3 outweighs short rows."""
    batch = batch_of(LENGTHS, chunk=chunk)
    sinks = np.array([-2.0, 0.0, 3.0, 1.0], np.float32) if with_sinks else None
    options = {"sliding_window": sliding_window, "logit_soft_cap": logit_soft_cap}
    got = paged_attention(
        *batch.arguments(),
        **options,
        sinks=None if sinks is None else jnp.asarray(sinks),
        implementation=implementation,
    )
    want = oracle(batch, **options, sinks=sinks)
    there = ~np.isnan(want)
    np.testing.assert_allclose(np.asarray(got)[there], want[there], **TOLERANCE["float32"])


@IMPLEMENTATIONS
@pytest.mark.parametrize(("k_scale", "v_scale"), [(1.0, 1.0), (0.25, 3.0)])
def test_float8_pages_stand_for_their_value_times_a_scale(implementation, k_scale, v_scale):
    batch = batch_of(LENGTHS, chunk=2)
    q, k_pages, v_pages, page_table, start_pos = batch.arguments()
    k_pages, v_pages = ((p / s).astype(jnp.float8_e4m3fn) for p, s in ((k_pages, k_scale), (v_pages, v_scale)))
    rounded = dataclasses.replace(
        batch,
        keys=[np.asarray(jnp.asarray(k / k_scale).astype(jnp.float8_e4m3fn), np.float32) * k_scale for k in batch.keys],
        values=[
            np.asarray(jnp.asarray(v / v_scale).astype(jnp.float8_e4m3fn), np.float32) * v_scale for v in batch.values
        ],
    )
    scales = {"k_scale": jnp.float32(k_scale), "v_scale": jnp.float32(v_scale)}
    got = paged_attention(q, k_pages, v_pages, page_table, start_pos, **scales, implementation=implementation)
    want = oracle(rounded)
    there = ~np.isnan(want)
    np.testing.assert_allclose(np.asarray(got)[there], want[there], **TOLERANCE["float32"])


def test_decode_and_prefill_agree():
    """Tokens one by one give what they give in one chunk."""
    whole = batch_of((11,), chunk=11)
    chunk = run("xla")(*whole.arguments())
    steps = [
        run("xla")(*dataclasses.replace(whole, q=whole.q[:, c : c + 1], start_pos=np.array([c], np.int32)).arguments())
        for c in range(11)
    ]
    np.testing.assert_allclose(np.concatenate(steps, axis=1), chunk, rtol=1e-5, atol=1e-6)


def test_no_name_takes_the_best_supported():
    arguments = batch_of((3, 6)).arguments()
    np.testing.assert_array_equal(paged_attention(*arguments), paged_attention(*arguments, implementation="xla"))


def test_what_cannot_be_computed_is_refused():
    q, k, v, table, start = batch_of((3,)).arguments()
    with pytest.raises(ValueError, match="expected implementation 'xla', 'pallas', 'reference' or None, got 'triton'"):
        paged_attention(q, k, v, table, start, implementation="triton")  # type: ignore[arg-type]
    for wrong in ((q[:, :, :3], k, v), (q[..., :8], k, v), (q, k, v[:, :, :1])):
        with pytest.raises(ValueError, match=r"paged_attention: expected q .* got \(1, 1, "):
            paged_attention(*wrong, table, start)
    with pytest.raises(ValueError, match=r"expected sinks \[Q\] = \(4,\), got \(2,\)"):
        paged_attention(q, k, v, table, start, sinks=jnp.zeros(2))


# write_pages


def write(pages, new, page_table, start_pos, num_tokens):
    arguments = (jnp.asarray(a, jnp.int32) for a in (page_table, start_pos, num_tokens))
    return np.asarray(jax.jit(write_pages)(jnp.asarray(pages), jnp.asarray(new), *arguments))


@pytest.mark.parametrize(("chunk", "page_len"), [(1, 4), (6, 4), (7, 3), (5, 1), (3, 16)])
def test_tokens_land_in_their_own_cells_and_nothing_else_changes(chunk, page_len):
    rng = np.random.default_rng(chunk)
    rows, max_pages = 5, 24 // page_len + 1
    pages = rng.normal(size=(1 + rows * max_pages, page_len, 2, 4)).astype(np.float32)
    table = rng.permutation(np.arange(1, len(pages))).reshape(rows, max_pages)
    new = rng.normal(size=(rows, chunk, 2, 4)).astype(np.float32)
    num_tokens = rng.integers(0, chunk + 1, rows)
    num_tokens[:2] = chunk, 0
    start_pos = rng.integers(0, 24 - chunk + 1, rows)
    want = pages.copy()
    for row in range(rows):
        for c in range(num_tokens[row]):
            position = start_pos[row] + c
            want[table[row, position // page_len], position % page_len] = new[row, c]
    got = write(pages, new, table, start_pos, num_tokens)
    np.testing.assert_array_equal(got[1:], want[1:])


def test_idle_rows_write_only_page_0():
    pages = np.arange(6 * 4, dtype=np.float32).reshape(6, 4, 1, 1)
    new = np.full((3, 2, 1, 1), -7, np.float32)
    got = write(pages, new, [[1, 2], [0, 0], [5, 3]], [2, 0, 5], [0, 0, 0])
    np.testing.assert_array_equal(got[1:], pages[1:])
    assert (got[0] == -7).any(), "an idle row's tokens go somewhere that nothing reads"


def test_positions_behind_the_page_table_touch_no_page_of_anyone():
    """A short last chunk of the longest sequence: its unused columns stand behind the table's end."""
    pages = np.zeros((4, 4, 1, 1), np.float32)
    got = write(pages, np.ones((1, 6, 1, 1), np.float32), [[2, 3]], [6], [2])
    assert np.argwhere(got[1:, :, 0, 0]).tolist() == [[2, 2], [2, 3]]


def test_what_is_written_has_the_pages_dtype():
    got = write(np.zeros((2, 4, 1, 1), jnp.bfloat16), np.full((1, 1, 1, 1), 1.001, np.float32), [[1]], [3], [1])
    assert got.dtype == jnp.bfloat16 and got[1, 3, 0, 0] == jnp.bfloat16(1.001)


def test_float8_pages_hold_the_value_over_the_scale_clipped_to_their_range():
    new = jnp.asarray([3.0, -1e6, 448.0, 1e6], jnp.bfloat16).reshape(1, 4, 1, 1)
    arguments = (jnp.asarray([[1]]), jnp.asarray([0]), jnp.asarray([4]), jnp.float32(2.0))
    got = write_pages(jnp.zeros((2, 4, 1, 1), jnp.float8_e4m3fn), new, *arguments)
    np.testing.assert_array_equal(np.asarray(got[1, :, 0, 0], np.float32), [1.5, -448, 224, 448])
