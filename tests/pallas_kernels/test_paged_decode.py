"""The decode kernel of paged_attention: its plan thread by thread, the kernel interpreted, compiled, and on a GPU."""

import dataclasses
import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe.pallas_kernels import paged_attention as public
from jmoe.pallas_kernels import paged_decode_plan as planning
from jmoe.pallas_kernels import paged_decode_share as sharing
from jmoe.pallas_kernels import simt, simt_marks
from jmoe.pallas_kernels.paged_attention import paged_attention

sys.path.insert(0, __file__.rsplit("/", 1)[0])
import simt_emulator
from test_paged_attention import batch_of, oracle

TARGET = pathlib.Path(__file__).parents[1] / "data" / "h200_target_config.txtpb"
LENGTHS = (1, 16, 17, 64, 150)
SINKS = np.array([-1.0, 0.5, 2.0, 0.0, 3.0, -2.0], np.float32)


def units_of(start_pos, num_tokens, window):
    """Sixteens of positions from the first visible one's on, at least one."""
    for start, tokens in zip(start_pos, num_tokens, strict=True):
        low = 0 if window is None else max(0, start + 1 - window)
        yield max(1, -(-(start + tokens) // 16) - low // 16)


def shape_of(rows, num_kv_heads=1, streams_of_head=3, window=None, max_pages=256):
    heads = 2 * num_kv_heads, num_kv_heads
    kinds = jnp.bfloat16, jnp.bfloat16
    return planning.Decode(
        rows, *heads, 64, 16, max_pages, streams_of_head * num_kv_heads, 2, window, None, *kinds, interpret=True
    )  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "num_kv_heads", "streams_of_head", "window", "with_tokens"),
    [(1, 1, 1, None, False), (3, 2, 5, 1000, True), (130, 8, 4, None, True), (300, 1, 8, 100, False)],
)
def test_streams_claim_all_pieces_in_order(monkeypatch, rows, num_kv_heads, streams_of_head, window, with_tokens):
    """Thread by thread, against a list of all pieces; the XLA form of the plan too."""
    shape = shape_of(rows, num_kv_heads, streams_of_head, window)
    rng = np.random.default_rng(rows)
    start_pos = rng.integers(0, 4000, rows).astype(np.int32)
    num_tokens = rng.integers(0, 2, rows).astype(np.int32) if with_tokens else np.ones(rows, np.int32)
    units = np.array(list(units_of(start_pos, num_tokens, window)), np.int32)
    counts, lengths = (np.asarray(a) for a in shape.cuts.of(jnp.asarray(units)))
    assert (counts >= 1).all() and counts.max() <= shape.cuts.most and (lengths % planning.TILE_UNITS == 0).all()
    assert ((counts - 1) * lengths < units).all() and (counts * lengths >= units).all()
    pieces = [row * planning.PIECES + piece for row, count in enumerate(counts) for piece in range(count)]
    end = rows * planning.PIECES

    simt_emulator.install(monkeypatch)
    taken = []

    def take(counters, index):
        """The counter's place, without its marks."""
        taken.append(counters.load(index))
        counters.add(index, 1)
        return taken[-1]

    kept = []
    monkeypatch.setattr(sharing, "_add", take)
    monkeypatch.setattr(simt_marks, "put", lambda words, at, value: kept.append(simt_emulator.lanes(value)[simt.WARP]))
    plan, claim = sharing.plan_program(shape, with_tokens), sharing.claim_program(shape)

    def program(*pointers):
        plan(*pointers[:-2], pointers[-1])
        for _ in range(3):
            claim(pointers[-1], pointers[-2])

    counters = np.zeros((1, sharing.num_counters(rows)), np.int32)
    run = plgpu.kernel(
        lambda *refs: simt.program(program, *refs),
        out_type=jax.ShapeDtypeStruct((sharing.num_words(rows),), jnp.int32),
        grid=(shape.num_streams,),
    )
    run(start_pos, *([num_tokens] if with_tokens else []), counters)
    claims = np.array(kept).reshape(-1, 3)[::-1]  # blocks run last to first
    assert (claims % sharing.TAGS == np.arange(3)).all()
    found = claims // sharing.TAGS
    first = np.arange(shape.num_streams) // num_kv_heads
    want = np.array([*pieces, *[end] * (3 * shape.num_streams)])
    assert found[:, 0].tolist() == want[first].tolist()
    later = found[::-1, 1:].ravel()  # all heads share the one counter here
    assert later.tolist() == want[streams_of_head : streams_of_head + later.size].tolist()
    words = np.asarray(planning.decode_plan(start_pos, num_tokens, shape))
    assert words.T.ravel()[: len(pieces)].tolist() == pieces and (words.T.ravel()[len(pieces) :] == end).all()
    assert (words[:, -1] == end).all(), "a stream knows where it ends"


def test_a_row_is_cut_alike_whatever_its_neighbours():
    """And in more pieces the longer it is, never more than there is room for."""
    shape = shape_of(4, 2, 33, max_pages=8192)
    units = np.array([1, 16, 17, 70, 300, 8192], np.int32)
    together = [np.asarray(a) for a in shape.cuts.of(jnp.asarray(units))]
    alone = [[int(a) for a in shape.cuts.of(jnp.int32(n))] for n in units]
    assert np.stack(together, axis=1).tolist() == alone
    assert together[0].tolist() == [1, 1, 2, 5, 19, 33]


@pytest.fixture
def interpreted(monkeypatch):
    """The kernel on the CPU, as three streams or six: each costs a second."""
    if jax.__version_info__ < (0, 11):
        pytest.skip(f"Mosaic GPU interpret mode with layout_cast needs jax 0.11 or newer, got {jax.__version__}")
    from jax._src.pallas.mosaic_gpu.interpret import params

    monkeypatch.setattr(public, "_num_sms", lambda: 3)
    monkeypatch.setattr(public, "_pallas_decode", functools.partial(public._pallas_decode, interpret=True))
    with params.force_gpu_interpret_mode():
        yield


def rounded(batch, dtype):
    """The sequences as pages of that dtype hold them."""
    keys, values = ([np.asarray(jnp.asarray(a, dtype), np.float32) for a in b] for b in (batch.keys, batch.values))
    return dataclasses.replace(batch, keys=keys, values=values)


def poisoned(batch, dtype):
    """The arguments, with NaN in every cell of v that holds no token of the rows."""
    v_pages = np.full(batch.v_pages.shape, np.nan, np.float32)
    page_len = v_pages.shape[1]
    for row, values in enumerate(batch.values):
        for position, value in enumerate(values):
            v_pages[batch.page_table[row, position // page_len], position % page_len] = value
    q, k_pages, _, page_table, start_pos = batch.arguments("bfloat16")
    return q, k_pages.astype(dtype), jnp.asarray(v_pages, dtype), page_table, start_pos


@pytest.mark.aot
@pytest.mark.parametrize(
    ("heads", "head_dim", "page_len", "dtype", "options"),
    [
        ((12, 2), 64, 16, "bfloat16", {"sliding_window": 40, "logit_soft_cap": 3.0, "sinks": np.tile(SINKS, 2)}),
        ((9, 1), 64, 64, "float8_e4m3fn", {}),
        ((4, 2), 256, 32, "bfloat16", {"sinks": SINKS[:4]}),
    ],
)
def test_the_kernel_interpreted(interpreted, heads, head_dim, page_len, dtype, options):
    """Rows cut into several streams and rows whole; what stands behind a row's tokens is NaN."""
    num_heads, num_kv_heads = heads
    max_pages = -(-max(LENGTHS) // page_len)
    batch = batch_of(LENGTHS, 1, num_heads, num_kv_heads, head_dim, page_len, max_pages)
    arguments = poisoned(batch, dtype)
    sinks = options.get("sinks")
    given = {**options, "sinks": None if sinks is None else jnp.asarray(sinks)}
    got = np.asarray(paged_attention(*arguments, **given, implementation="pallas"), np.float32)
    np.testing.assert_allclose(got, oracle(rounded(batch, dtype), **options), rtol=2e-2, atol=3e-2)


@pytest.mark.aot
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e4m3fn])
@pytest.mark.parametrize(("heads", "head_dim"), [((48, 8), 128), ((16, 1), 64), ((8, 8), 256), ((4, 4), 128)])
def test_the_kernel_compiled_for_hopper(heads, head_dim, dtype):
    """One launch, with nothing beside it."""
    pytest.importorskip("jax_cuda13_plugin", reason="ahead-of-time compilation needs the `aot` extra")
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        topology_name="h200", platform="cuda", target_config=TARGET.read_text(), topology="1x1x1"
    )
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    num_heads, num_kv_heads = heads
    pages, rows = ((256, 64, num_kv_heads, head_dim), dtype), ((4,), jnp.int32)
    shapes = (((4, 1, num_heads, head_dim), jnp.bfloat16), pages, pages, ((4, 64), jnp.int32), rows, rows)
    arguments = [jax.ShapeDtypeStruct(shape, kind, sharding=sharding) for shape, kind in shapes]
    function = functools.partial(paged_attention, implementation="pallas", sliding_window=4096)
    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).compile().as_text()
    entry = text[text.index("\nENTRY ") :]
    assert entry.count('custom_call_target="mosaic_gpu') == 1
    assert not [line for line in entry.splitlines() if " copy(" in line or " fusion(" in line]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize(
    ("heads", "head_dim", "page_len", "options"),
    [
        ((48, 8), 128, 16, {}),
        ((48, 8), 128, 64, {"sliding_window": 128, "logit_soft_cap": 3.0, "sinks": np.linspace(-1, 2, 48)}),
        ((16, 1), 64, 64, {}),
        ((8, 4), 256, 16, {"sinks": np.linspace(-1, 2, 8)}),
        ((32, 2), 128, 16, {"sliding_window": 1000}),
    ],
)
def test_the_kernel_on_a_gpu(heads, head_dim, page_len, options, dtype):
    """Short rows beside one of 5000 tokens, twice: the same bits."""
    lengths = (*LENGTHS, 5000, 1, 2, 777)
    batch = batch_of(lengths, 1, *heads, head_dim, page_len, -(-max(lengths) // page_len))
    arguments = poisoned(batch, dtype)
    sinks = options.get("sinks")
    given = {**options, "sinks": None if sinks is None else jnp.asarray(sinks, jnp.float32)}
    function = jax.jit(functools.partial(paged_attention, **given, implementation="pallas"))
    got, again = (np.asarray(function(*arguments), np.float32) for _ in range(2))
    np.testing.assert_array_equal(got, again)
    np.testing.assert_allclose(got, oracle(rounded(batch, dtype), **options), rtol=2e-2, atol=3e-2)
