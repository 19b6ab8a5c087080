"""greedy_head against numpy: both forms, what a thread keeps on numpy, the kernel interpreted, compiled, on a GPU."""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from imaginary_gpus import imaginary_gpus

from jmoe.pallas_kernels import greedy_head_largest as largest
from jmoe.pallas_kernels import greedy_head_mosaic as mosaic
from jmoe.pallas_kernels.greedy_head import greedy_head

sys.path.insert(0, __file__.rsplit("/", 1)[0])
import simt_emulator
from simt_emulator import Float, Pointer, Word

QWEN3 = 2048, 151936
BOTH_FORMS = pytest.mark.parametrize("implementation", ["xla", pytest.param("pallas", marks=pytest.mark.aot)])
BOTH_WAYS = pytest.mark.parametrize("by_token", [False, True])


@pytest.fixture(autouse=True)
def interpreted(monkeypatch, request):
    """The kernel on the CPU, as three blocks."""
    if "pallas" not in request.node.name:
        yield
        return
    if jax.__version_info__ < (0, 11):
        pytest.skip(f"the interpreter needs jax 0.11 or newer, got {jax.__version__}")
    from jax._src.pallas.mosaic_gpu.interpret import params

    def choose(*sizes):
        return dataclasses.replace(chosen(*sizes, num_sms=3), interpret=True)

    chosen = mosaic.choose_head
    monkeypatch.setattr(mosaic, "choose_head", choose)
    with params.force_gpu_interpret_mode():
        yield


def problem(rows, num_in, vocab):
    """Whole numbers and halves: sums are exact in any order, and many are equal."""
    rng = np.random.default_rng(rows)
    values = rng.integers(-4, 5, (rows, num_in)) / 2, rng.integers(-4, 5, (num_in, vocab)) / 2
    return tuple(jnp.asarray(v, jnp.bfloat16) for v in values)


def logits_of(rows, weights):
    return np.asarray(rows, np.float64) @ np.asarray(weights, np.float64)


def found(rows, weights, by_token, implementation):
    given = weights.T if by_token else weights
    got = greedy_head(rows, given, by_token=by_token, implementation=implementation)
    assert got.shape == (len(rows),) and got.dtype == jnp.int32
    return np.asarray(got)


@BOTH_FORMS
@BOTH_WAYS
@pytest.mark.parametrize(("rows", "num_in", "vocab"), [(1, 64, 128), (16, 192, 448), (100, 64, 1984), (128, 128, 832)])
def test_against_float64(implementation, rows, num_in, vocab, by_token):
    """Vocabularies of whole tiles and of others, blocks of one tile and of several."""
    x, weights = problem(rows, num_in, vocab)
    np.testing.assert_array_equal(found(x, weights, by_token, implementation), logits_of(x, weights).argmax(1))


def of_logits(logits):
    """Rows and weights whose product is exactly that table of bfloat16: each row has 64 terms of its own."""
    x = np.kron(np.eye(len(logits)), np.full(64, 1 / 64))
    return jnp.asarray(x, jnp.bfloat16), jnp.asarray(np.repeat(logits, 64, axis=0), jnp.bfloat16)


@BOTH_FORMS
def test_negative_logits_and_ties(implementation):
    """Nothing starts from zero; the first of equal ones, in one thread, warp or block as in several."""
    logits = -1 - np.random.default_rng(0).integers(0, 100, (7, 1984)) / 4
    logits[1, 1983] = -0.5
    logits[2, [7, 15, 400, 1983]] = 7
    logits[3, [1983, 100, 1000]] = 7
    logits[4] = 0
    logits[5, ::2] = 3
    logits[6, [70, 66]] = 7
    got = found(*of_logits(logits), False, implementation)
    assert got.tolist() == logits.argmax(1).tolist()


@BOTH_FORMS
@pytest.mark.filterwarnings("ignore:invalid value")
def test_infinities_and_nan_as_argmax_has_them(implementation):
    logits = np.full((3, 448), -np.inf)
    logits[1, [3, 300]] = np.inf
    logits[2, [5, 300, 301]] = np.inf, np.nan, np.nan
    for row, want in zip(logits, (0, 3, 300), strict=True):  # an infinity times another row's zeros would be NaN
        assert found(*of_logits(row[None]), False, implementation).tolist() == [want]
        assert want == int(jnp.argmax(row))


@pytest.mark.parametrize(("rows", "halves"), [(8, 1), (104, 2), (128, 3)])
def test_what_threads_keep(monkeypatch, rows, halves):
    """Thread by thread: two tiles, the second with ties to the first and larger ones."""
    simt_emulator.install(monkeypatch)
    rng = np.random.default_rng(rows)
    tiles = [rng.integers(-40, 1, (64 * halves, rows)).astype(np.float32) / 4 for _ in range(2)]
    tiles[1][9, 2], tiles[0][50:60, 3], tiles[1][:, 4] = np.inf, np.nan, tiles[0].max() + 1
    firsts = 1000, 192  # the tile that comes later stands in front
    kept = Pointer(np.full(largest.WORDS * rows * 4, 0x7B, np.uint8))
    lane, warp = np.arange(128) % 32, np.arange(128) // 32
    for n, (tile, first) in enumerate(zip(tiles, firsts, strict=True)):

        def logit(half, eight, row, pair, tile=tile):
            return Float(tile[64 * half + 16 * warp + 8 * row + lane // 4, 8 * eight + 2 * (lane % 4) + pair])

        largest.keep_program(rows, halves)(logit, kept, Word(np.int32(first)), Word(np.int32(n)))
    keys, columns = (np.full((rows, 5), -1, np.int32) for _ in range(2))
    out = [Pointer(a.reshape(-1).view(np.uint8)) for a in (keys, columns)]
    largest.give_program(rows, 5)(kept, *out, Word(np.int32(3)))
    order = np.concatenate([tiles[1], tiles[0]])
    numbers = np.concatenate([np.arange(64 * halves) + first for first in firsts[::-1]])
    np.testing.assert_array_equal(columns[:, 3], numbers[order.argmax(0)])
    best = order.max(0)
    assert (np.diff(keys[np.argsort(best, kind="stable"), 3]) >= 0).all(), "keys are in the logits' order, NaN last"
    assert (columns[:, [0, 1, 2, 4]] == -1).all()


@pytest.mark.parametrize(("num_in", "vocab"), [QWEN3, (4096, 32000), (6144, 100352), (64, 192)])
@pytest.mark.parametrize("rows", [8, 16, 64, 128])
def test_every_column_is_some_blocks_and_all_read_alike(rows, num_in, vocab):
    head = mosaic.choose_head(rows, num_in, vocab, False)
    counts = [(head.tiles - block + head.blocks - 1) // head.blocks for block in range(head.blocks)]
    assert sum(counts) == head.tiles
    firsts = [int(mosaic._first(head, b, n)) for b, count in enumerate(counts) for n in range(count)]
    assert set().union(*(range(first, first + head.tile) for first in firsts)) == set(range(vocab))
    assert head.stages >= 3 and head.stages * head.tile * 128 >= min(96, head.tile * 3 / 8) * 1024
    assert max(counts) * head.tile <= max(1.06 * vocab / head.num_sms, 128), "the busiest SM has hardly more"


def test_what_cannot_be_computed_is_refused():
    rows, weights = problem(5, 64, 128)
    for x, w, what in [
        (rows.astype(jnp.float32), weights, "'pallas' expected bfloat16"),
        (jnp.zeros((129, 64), jnp.bfloat16), weights, "1 to 128 rows, got 129"),
        (rows, weights[:, :100], "multiples of 64, V of two at least, got 64 and 100"),
        (rows[:, :32], weights[:32], "got 32 and 128"),
        (rows, weights.T, r"expected rows \[tokens, D\] and weights \[D, V\]"),
    ]:
        with pytest.raises(ValueError, match=what):
            greedy_head(x, w, implementation="pallas")
    with pytest.raises(ValueError, match="expected implementation"):
        greedy_head(rows, weights, implementation="cuda")  # type: ignore[arg-type]
    assert greedy_head(rows, weights[:, :100]).shape == (5,), "None takes what can"


@pytest.mark.aot
@BOTH_WAYS
@pytest.mark.parametrize("rows", [16, 128])
def test_the_kernel_compiled_for_hopper(rows, by_token):
    """Two launches: the kernel, and what compares the blocks' results. No logits, no copy of the weights."""
    sharding = jax.sharding.SingleDeviceSharding(imaginary_gpus(1)[0])
    num_in, vocab = QWEN3
    shapes = (rows, num_in), (vocab, num_in) if by_token else (num_in, vocab)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding) for shape in shapes]
    function = functools.partial(greedy_head, by_token=by_token, implementation="pallas")
    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).compile().as_text() or ""
    entry = text[text.index("\nENTRY ") :]
    assert entry.count('custom_call_target="mosaic_gpu') == 1
    assert entry.count(" fusion(") == 1 and " copy(" not in entry


@pytest.mark.gpu
@BOTH_WAYS
@pytest.mark.parametrize("rows", [1, 16, 100, 128])
def test_the_kernel_on_a_gpu(rows, by_token):
    """The same bits twice; another token than XLA's only where two logits are as good as equal."""
    num_in, vocab = QWEN3
    keys = jax.random.split(jax.random.key(rows, impl="rbg"))
    x = jax.random.normal(keys[0], (rows, num_in), jnp.bfloat16)
    weights = jax.random.normal(keys[1], (vocab, num_in) if by_token else (num_in, vocab), jnp.bfloat16)
    function = jax.jit(functools.partial(greedy_head, by_token=by_token, implementation="pallas"))
    got, again = (np.asarray(function(x, weights)) for _ in range(2))
    np.testing.assert_array_equal(got, again)
    terms = "rd,vd->rv" if by_token else "rd,dv->rv"
    logits = np.asarray(jnp.einsum(terms, x, weights, preferred_element_type=jnp.float32))
    best, own = logits.max(1), logits[np.arange(rows), got]
    assert (own >= best - 1e-3 * np.abs(best)).all()
    assert (got == logits.argmax(1)).mean() > 0.9


@pytest.mark.gpu
def test_exact_logits_on_a_gpu():
    """Ties, infinities and NaN, and sums that are exact in any order: argmax itself."""
    x, weights = problem(128, 256, 3968)
    for by_token in (False, True):
        np.testing.assert_array_equal(found(x, weights, by_token, "pallas"), logits_of(x, weights).argmax(1))
    logits = np.full((1, 3968), -np.inf)
    for columns, value, want in [([], 0, 0), ([77, 3000], np.inf, 77), ([900, 3967], np.nan, 900)]:
        logits[0, columns] = value
        assert found(*of_logits(logits), False, "pallas").tolist() == [want]
