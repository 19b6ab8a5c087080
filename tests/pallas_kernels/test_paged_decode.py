"""The decode kernel of paged_attention: its plan thread by thread, the kernel interpreted, compiled, and on a GPU."""

import dataclasses
import functools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from imaginary_gpus import imaginary_gpus
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe.pallas_kernels import paged_attention as public
from jmoe.pallas_kernels import paged_decode_plan as planning
from jmoe.pallas_kernels import paged_decode_queue as queue
from jmoe.pallas_kernels import simt, simt_marks
from jmoe.pallas_kernels.paged_attention import paged_attention

sys.path.insert(0, __file__.rsplit("/", 1)[0])
import simt_emulator
from test_paged_attention import batch_of, oracle

LENGTHS = (1, 16, 17, 64, 150, 600)
SINKS = np.array([-1.0, 0.5, 2.0, 0.0, 3.0, -2.0], np.float32)


def units_of(start_pos, num_tokens, window):
    """Sixteens of positions from the first visible one's on, at least one."""
    for start, tokens in zip(start_pos, num_tokens, strict=True):
        low = 0 if window is None else max(0, start + 1 - window)
        yield max(1, -(-(start + tokens) // 16) - low // 16)


SHORT = planning.Cut(least=128, few=64, whole=256)


def shape_of(rows, num_kv_heads=1, streams=3, window=None, max_pages=256, tokens=SHORT):
    heads, kinds = (2 * num_kv_heads, num_kv_heads), (jnp.bfloat16, jnp.bfloat16)
    return planning.Decode(
        rows, *heads, 64, 16, max_pages, streams * num_kv_heads, 2, 2, 2, window, None, *kinds, True, tokens
    )


def items_of(shape, units):
    """Which rows are one item, and (row, piece) of all items in their order, from the rows' units alone."""
    counts, lengths = (np.asarray(a) for a in jax.jit(shape.cut)(units))
    assert (counts >= 1).all() and counts.max() <= shape.most and (lengths % planning.TILE_UNITS == 0).all()
    assert ((counts - 1) * lengths < units).all() and (counts * lengths >= units).all()
    tiles = -(-units // planning.TILE_UNITS)
    share = tiles.sum() // shape.streams_of_head
    whole = (counts == 1) | (tiles <= share // 2) | (tiles <= min(share + share // 2, shape.tokens.whole // 64))
    lengths = np.where(whole, tiles * planning.TILE_UNITS, lengths)
    wave = min(shape.rows, shape.streams_of_head)
    pieces = np.where(whole, 1, counts)
    others = [(row, piece) for row in range(shape.rows) for piece in range(int(row < wave), pieces[row])]
    others.sort(key=lambda item: -((8 * lengths[item[0]] - 1) // lengths.max()))  # eighths of the longest; stable
    return whole, [(row, 0) for row in range(wave)] + others


@pytest.mark.parametrize(
    ("rows", "num_kv_heads", "streams", "window", "with_tokens"),
    [
        (1, 1, 7, 1000, True), (3, 2, 5, 1, True), (130, 8, 4, None, True), (300, 1, 8, 100, False),
        (128, 2, 66, 20, True), (40, 1, 65, 700, False), (24, 1, 9, None, False), (60, 2, 50, None, True),
    ],
)  # fmt: skip
def test_every_item_is_taken_once_the_longest_first(monkeypatch, rows, num_kv_heads, streams, window, with_tokens):
    """Thread by thread, against a list of all pieces; the XLA form of the order too."""
    shape = shape_of(rows, num_kv_heads, streams, window)
    rng = np.random.default_rng(rows)
    start_pos = (4000 * rng.random(rows) ** 3).astype(np.int32)
    num_tokens = rng.integers(0, 2, rows).astype(np.int32) if with_tokens else np.ones(rows, np.int32)
    whole, items = items_of(shape, np.array(list(units_of(start_pos, num_tokens, window)), np.int32))
    want = [row * planning.PIECES + piece for row, piece in items]
    plain = planning.decode_plan(start_pos, num_tokens, shape)
    codes = plain.codes.tolist()
    assert plain.whole.tolist() == whole.tolist()
    assert codes == want + [shape.end] * (len(codes) - len(want)) and len(codes) >= len(want) + 2 * streams

    wave = min(rows, streams)
    tickets = [*range(wave - streams, 0), *range(max(len(want), streams))]  # streams behind the first wave: below 0
    found = taken(monkeypatch, shape, start_pos, num_tokens if with_tokens else None, tickets)
    assert found.codes == [want[i] if i < len(want) else shape.end for i in (ticket + streams for ticket in tickets)]
    assert found.whole == whole.tolist()
    assert found.counting == [False, *(~whole).tolist()]  # the last ticket ended the first


@dataclasses.dataclass
class Taken:
    codes: list[int]
    whole: list[bool]
    counting: list[bool]


def taken(monkeypatch, shape, start_pos, num_tokens, tickets):
    """The items that the first stream finds for these tickets, which rows are whole, and which counters count then."""
    simt_emulator.install(monkeypatch)
    monkeypatch.setattr(simt_marks, "count_from_zero", lambda counters, index: counters.store(index * 2, 7))
    monkeypatch.setattr(simt_marks, "stop_counting", lambda counters, index: counters.store(index * 2, 0))
    plan, find = queue.plan_program(shape, num_tokens is not None), queue.find_program(shape)

    def program(*pointers):
        *given, words, rows, counters, codes = pointers
        plan(*given, counters, words, rows)
        for i, ticket in enumerate(tickets):
            words.store(queue.TICKET, ticket)
            find(counters, words, rows)
            codes.store(i, words.load(queue.CODE))

    counters = queue.num_counters(shape.rows)
    sizes = queue.WORDS, shape.rows, 2 * counters, len(tickets)
    run = plgpu.kernel(
        lambda *refs: simt.program(program, *refs),
        out_type=tuple(jax.ShapeDtypeStruct((size,), jnp.int32) for size in sizes),
        grid=(1,),
    )
    _, rows, counters, codes = run(start_pos, *([] if num_tokens is None else [num_tokens]))
    return Taken(codes.tolist(), (rows % queue.HALF >= queue.WHOLE).tolist(), (counters[::2] == 7).tolist())


def test_who_draws_the_last_ticket_ends_the_counter(monkeypatch):
    """Of 5 streams for 3 rows of one piece each five draw, of 2 for them three."""
    start_pos = np.full(3, 20, np.int32)
    for streams, last in ((5, 4), (2, 2)):
        shape = shape_of(3, streams=streams)
        for drawn in range(last + 2):
            assert taken(monkeypatch, shape, start_pos, None, [drawn]).counting[0] == (drawn != last)


@pytest.mark.parametrize(("rows", "pieces"), [(4, [1, 1, 1, 4, 8, 8, 32]), (40, [1, 1, 1, 1, 3, 8, 32])])
def test_a_row_is_cut_alike_whatever_its_neighbours(rows, pieces):
    """And into more pieces the longer it is, never more than there is room for; a few rows into more."""
    shape = shape_of(rows, 2, 33, max_pages=8192, tokens=planning.Cut())
    units = np.array([1, 15, 16, 70, 300, 2048, 8192], np.int32)
    together = [np.asarray(a) for a in shape.cut(jnp.asarray(units))]
    alone = [[int(a) for a in shape.cut(jnp.int32(n))] for n in units]
    assert np.stack(together, axis=1).tolist() == alone
    assert together[0].tolist() == pieces


@pytest.fixture
def interpreted(monkeypatch):
    """`interpreted(num_sms, **options)`: the kernel on the CPU from then on; each stream costs a second.

    In the end it must not have seen a race: two warpgroups at one place, one of them writing, and no barrier between.
    """
    if jax.__version_info__ < (0, 11):
        pytest.skip(f"Mosaic GPU interpret mode with layout_cast needs jax 0.11 or newer, got {jax.__version__}")
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, params

    form = public._pallas_decode

    def begin(num_sms, **options):
        monkeypatch.setattr(public, "num_sms", lambda: num_sms)
        monkeypatch.setattr(public, "_pallas_decode", functools.partial(form, interpret=True, tokens=SHORT, **options))

    with params.force_gpu_interpret_mode(params.InterpretGPUParams(detect_races=True)):
        yield begin
        assert not gpu_callbacks.get_races().races_found


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
    q, _, _, page_table, start_pos = batch.arguments("bfloat16")
    k_pages, v_pages = (jnp.asarray(pages, dtype) for pages in (batch.k_pages, v_pages))  # rounded once, as `rounded`
    return q, k_pages, v_pages, page_table, start_pos


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
    interpreted(num_sms=3)
    num_heads, num_kv_heads = heads
    max_pages = -(-max(LENGTHS) // page_len)
    batch = batch_of(LENGTHS, 1, num_heads, num_kv_heads, head_dim, page_len, max_pages)
    arguments = poisoned(batch, dtype)
    sinks = options.get("sinks")
    given = {**options, "sinks": None if sinks is None else jnp.asarray(sinks)}
    got = np.asarray(paged_attention(*arguments, **given, implementation="pallas"), np.float32)
    np.testing.assert_allclose(got, oracle(rounded(batch, dtype), **options), rtol=2e-2, atol=3e-2)


@pytest.mark.aot
@pytest.mark.parametrize("consumers", [1, 2])
def test_many_pieces_of_one_tile_in_one_stream(interpreted, consumers):
    """Which is as far ahead of its consumers as it can be: neither messages nor sums overtake who reads them."""
    interpreted(num_sms=1, consumers=consumers, stages=(2, 2))
    lengths = (*range(1, 65, 5), 70, 20, 130, 300)
    batch = batch_of(lengths, 1, 4, 1, 64, 16, 19)
    got = np.asarray(paged_attention(*poisoned(batch, "bfloat16"), implementation="pallas"), np.float32)
    np.testing.assert_allclose(got, oracle(rounded(batch, "bfloat16")), rtol=2e-2, atol=3e-2)


@pytest.mark.aot
@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype"),
    [
        ((48, 8), 128, jnp.bfloat16),
        ((16, 1), 64, jnp.bfloat16),
        ((8, 8), 256, jnp.bfloat16),
        ((4, 4), 128, jnp.float8_e4m3fn),
        ((32, 2), 128, jnp.float8_e4m3fn),
    ],
)
def test_the_kernel_compiled_for_hopper(heads, head_dim, dtype):
    """One launch, with nothing beside it."""
    sharding = jax.sharding.SingleDeviceSharding(imaginary_gpus(1)[0])
    num_heads, num_kv_heads = heads
    pages, rows = ((256, 64, num_kv_heads, head_dim), dtype), ((4,), jnp.int32)
    shapes = (((4, 1, num_heads, head_dim), jnp.bfloat16), pages, pages, ((4, 64), jnp.int32), rows, rows)
    arguments = [jax.ShapeDtypeStruct(shape, kind, sharding=sharding) for shape, kind in shapes]
    function = functools.partial(paged_attention, implementation="pallas", sliding_window=4096)
    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).compile().as_text()
    entry = text[text.index("\nENTRY ") :]
    assert entry.count('custom_call_target="mosaic_gpu') == 1
    assert not [line for line in entry.splitlines() if " copy(" in line or " fusion(" in line]


@pytest.mark.aot
@pytest.mark.parametrize(("rows", "most"), [(128, 128), (32, 168)])
def test_streams_share_an_sm_and_nothing_spills(monkeypatch, tmp_path, rows, most):
    """Many rows are for two streams an SM of 256 threads: 65,536 registers. Few: one of 384."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    sharding = jax.sharding.SingleDeviceSharding(imaginary_gpus(1)[0])
    pages, of_row = ((256, 16, 8, 128), jnp.bfloat16), ((rows,), jnp.int32)
    shapes = (((rows, 1, 48, 128), jnp.bfloat16), pages, pages, ((rows, 64), jnp.int32), of_row, of_row)
    arguments = [jax.ShapeDtypeStruct(shape, kind, sharding=sharding) for shape, kind in shapes]
    function = functools.partial(paged_attention, implementation="pallas")
    jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).compile()
    [report] = tmp_path.glob("*.ptxas")
    [registers] = re.findall(r"Used (\d+) registers", report.read_text())
    [spilled] = re.findall(r"frame, (\d+) bytes spill stores", report.read_text())
    assert int(registers) <= most and not int(spilled)


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
        ((18, 6), 64, 16, {"sinks": np.linspace(-1, 2, 18)}),
    ],
)
def test_the_kernel_on_a_gpu(heads, head_dim, page_len, options, dtype):
    """Short rows beside one of 5000 tokens, twice: the same bits, and also beside shorter neighbours."""
    lengths = (*LENGTHS, 5000, 1, 2, 777)
    batch = batch_of(lengths, 1, *heads, head_dim, page_len, -(-max(lengths) // page_len))
    arguments = poisoned(batch, dtype)
    sinks = options.get("sinks")
    given = {**options, "sinks": None if sinks is None else jnp.asarray(sinks, jnp.float32)}
    function = jax.jit(functools.partial(paged_attention, **given, implementation="pallas"))
    got, again = (np.asarray(function(*arguments), np.float32) for _ in range(2))
    np.testing.assert_array_equal(got, again)
    np.testing.assert_allclose(got, oracle(rounded(batch, dtype), **options), rtol=2e-2, atol=3e-2)
    q, k_pages, v_pages, page_table, start_pos = arguments
    beside = jnp.where(jnp.arange(len(lengths)) % 2, start_pos, start_pos // 3)
    moved = np.asarray(function(q, k_pages, v_pages, page_table, beside), np.float32)
    np.testing.assert_array_equal(got[1::2], moved[1::2])


@pytest.mark.gpu
@pytest.mark.parametrize(
    "lengths", [(1050,) * 128, (1050,) * 100, (*[60] * 127, 9000, 1, 2000), (*[60] * 30, 9000)], ids=len
)
def test_many_rows_on_a_gpu(lengths):
    """Two streams an SM and one, rows that are one item and rows that are cut. Several calls, the same bits."""
    batch = batch_of(lengths, 1, 12, 2, 64, 16, -(-max(lengths) // 16))
    arguments = poisoned(batch, "bfloat16")
    function = jax.jit(functools.partial(paged_attention, implementation="pallas"))
    first, *others = (np.asarray(function(*arguments), np.float32) for _ in range(4))
    for other in others:
        np.testing.assert_array_equal(first, other)
    np.testing.assert_allclose(first, oracle(rounded(batch, "bfloat16")), rtol=2e-2, atol=3e-2)
