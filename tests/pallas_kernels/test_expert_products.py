"""Both products of the expert FFN in one kernel: interpreted as two, compiled ahead of time, and on a GPU."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from imaginary_gpus import imaginary_gpus

from jmoe.pallas_kernels.block_scaled import quantize_blocks, quantize_rows
from jmoe.pallas_kernels.grouped_matmul import ExpertBlocks

interpreted = pytest.mark.skipif(
    importlib.util.find_spec("jax._src.pallas.mosaic_gpu.interpret.params") is None or jax.__version_info__ < (0, 11),
    reason="jax 0.10.2's interpreter lacks layout_cast",
)
BF16 = [ExpertBlocks(8, 64, 64, None, 1, False), ExpertBlocks(16, 128, 64, None, 2), ExpertBlocks(8, 64, 64, 4, 1)]
ROWS_FIRST = ExpertBlocks(128, 128, 128, None, 2, False, True)
FLOAT8 = [
    ExpertBlocks(8, 128, 128, None, 1), ExpertBlocks(16, 256, 128, None, 2, False), ExpertBlocks(48, 128, 128, None, 2),
    ROWS_FIRST,
]  # fmt: skip


def arrays(sizes, hidden, width, *, small=False, seed=0):
    """(rows, gate, up, down, sizes, starts) and float8's scales; NaN in rows of no group."""
    rng = np.random.default_rng(seed)
    sizes = np.asarray(sizes, np.int32)
    spans = -(-sizes // 8) * 8
    starts = (np.cumsum(spans) - spans).astype(np.int32)
    rows = np.full((max(int(spans.sum()) + 16, 128), hidden), np.nan, np.float32)
    for start, size in zip(starts, sizes, strict=True):
        rows[start : start + size] = rng.normal(size=(size, hidden))
    shapes = ((len(sizes), hidden, width),) * 2 + ((len(sizes), width, hidden),)
    weights = [jnp.asarray(rng.normal(size=s) * s[1] ** -0.5 * uneven(rng, s), jnp.bfloat16) for s in shapes]
    groups = jnp.asarray(sizes), jnp.asarray(starts)
    if not small:
        return jnp.asarray(rows, jnp.bfloat16), *weights, *groups, None
    weights = [jax.jit(quantize_blocks)(jnp.swapaxes(w, 1, 2)) for w in weights]
    values, scales = jax.jit(quantize_rows)(jnp.asarray(np.nan_to_num(rows), jnp.bfloat16))
    return values, *weights, *groups, scales


def uneven(rng, shape):
    """Factors of 1/4 to 4 a block of 128 x 128, so that the scale of the block beside gives something else."""
    blocks = (shape[0], *(-(-n // 128) for n in shape[1:]))
    factors = np.exp2(rng.integers(-2, 3, blocks))
    return factors.repeat(128, axis=1).repeat(128, axis=2)[:, : shape[1], : shape[2]]


def truth(rows, gate, up, down, sizes, starts, scales):
    """float64 of the same numbers; with float8 what stands between the products is rounded as the kernel does."""
    x = np.asarray(rows, np.float64)
    if scales is not None:
        x *= np.repeat(np.asarray(scales, np.float64), 128, axis=1)
        gate, up, down = (np.swapaxes(jax.jit(lambda w: w.dequantize())(w), 1, 2) for w in (gate, up, down))
    gate, up, down = (np.asarray(w, np.float64) for w in (gate, up, down))
    out, heard = np.zeros((len(x), down.shape[2])), np.zeros(len(x), bool)
    for e, (size, start) in enumerate(zip(np.asarray(sizes), np.asarray(starts), strict=True)):
        own = slice(start, start + size)
        g = x[own] @ gate[e]
        hidden = g / (1 + np.exp(-g)) * (x[own] @ up[e])
        if scales is not None and size:
            values, by_block = jax.jit(quantize_rows)(jnp.asarray(hidden, jnp.bfloat16))
            hidden = np.asarray(values, np.float64) * np.repeat(np.asarray(by_block, np.float64), 128, axis=1)
        out[own], heard[own] = hidden @ down[e], True
    return out, heard


def error(got, want, heard):
    got = np.asarray(got, np.float64)[heard]
    return np.linalg.norm(got - want[heard]) / max(np.linalg.norm(want[heard]), 1e-9)


@pytest.mark.aot
@interpreted
@pytest.mark.parametrize(("small", "blocks"), [(False, b) for b in BF16] + [(True, FLOAT8[0]), (True, FLOAT8[3])])
def test_interpreted(small, blocks):
    from jax._src.pallas.mosaic_gpu.interpret import params

    from jmoe.pallas_kernels.expert_products_mosaic import expert_products

    # Where rows stand first: a block of 40 rows, which both consumers share and store half of, and one of 128.
    sizes = [40, 0, 140] if blocks.rows_first else [3, 0, 17]
    made = arrays(sizes, 256, 256 if small else 128, small=small)
    with params.force_gpu_interpret_mode():
        got = expert_products(*made, blocks=blocks, num_sms=3, interpret=True)
    assert error(got, *truth(*made)) < (1e-2 if small else 5e-3)


@pytest.mark.aot
@pytest.mark.parametrize(("small", "blocks"), [(False, b) for b in BF16] + [(True, b) for b in FLOAT8])
def test_compiles_for_a_gpu_that_is_not_there(monkeypatch, tmp_path, small, blocks):
    """And ptxas doesn't run wgmma one after the other (C7518, C7519: it says so, and that is all it does)."""
    from jmoe.pallas_kernels.expert_products_mosaic import expert_products

    device = jax.sharding.SingleDeviceSharding(imaginary_gpus(1)[0])
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    made = arrays([3, 0, 17, 1], 512, 256, small=small)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), made)
    lowered = jax.jit(lambda *a: expert_products(*a, blocks=blocks)).trace(*shapes).lower(lowering_platforms=("cuda",))
    assert lowered.compile().as_text().count('custom_call_target="mosaic_gpu') == 1
    [report] = tmp_path.glob("*.ptxas")
    assert "serialized" not in report.read_text()


@pytest.mark.aot
@pytest.mark.parametrize(
    ("experts", "hidden", "width", "rows"),
    [(16, 6144, 10752, 2160), (8, 6144, 16384, 8248), (32, 7168, 2048, 4320), (128, 2048, 768, 33664)],
)
def test_sums_of_many_float8_rows_stay_in_registers(monkeypatch, tmp_path, experts, hidden, width, rows):
    """A change of a few lines, in the loads even, can make ptxas put some into memory: with 176 bytes of them, not 16,
    DBRX's 4,096 tokens took 7.6 ms on an H200, not 6.2."""
    from jmoe.pallas_kernels.block_scaled import BlockScaled
    from jmoe.pallas_kernels.expert_products_mosaic import expert_products

    device = jax.sharding.SingleDeviceSharding(imaginary_gpus(1)[0])
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=device)

    def weights(num_out, num_in):
        values = array(jnp.float8_e4m3fn, experts, num_out, num_in)
        return BlockScaled(values, array(jnp.float32, experts, num_out // 128, num_in // 128))

    made = weights(width, hidden), weights(width, hidden), weights(hidden, width)
    groups = array(jnp.int32, experts), array(jnp.int32, experts), array(jnp.float32, rows, hidden // 128)
    function = jax.jit(lambda *a: expert_products(*a, blocks=ROWS_FIRST))
    shapes = array(jnp.float8_e4m3fn, rows, hidden), *made, *groups
    function.trace(*shapes).lower(lowering_platforms=("cuda",)).compile()
    [report] = tmp_path.glob("*.ptxas")
    [spilled] = re.findall(r"frame, (\d+) bytes spill stores", report.read_text())
    assert int(spilled) <= 48


@pytest.mark.parametrize(
    ("blocks", "small", "said"),
    [
        (ExpertBlocks(8, 192, 64, None, 1), False, "block_out"),
        (ExpertBlocks(8, 64, 96, None, 1), False, "block_in"),
        (ExpertBlocks(8, 64, 128, None, 1), True, "block_out a multiple of 128"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(blocks, small, said):
    from jmoe.pallas_kernels.expert_products_mosaic import expert_products

    with pytest.raises(ValueError, match=said):
        expert_products(*arrays([3, 0, 17, 1], 256, 128, small=small), blocks=blocks)


@pytest.mark.gpu
@pytest.mark.parametrize(("small", "blocks"), [(False, b) for b in BF16] + [(True, b) for b in FLOAT8])
@pytest.mark.parametrize(
    "sizes", [[3, 0, 17, 1, 8, 0, 40, 5], [0] * 7 + [300], [90] + [0] * 7, [0] * 8, [9] * 64], ids=str
)
def test_on_the_device(small, blocks, sizes):
    """Against float64; the same bits from run to run, with other rows before and memory full of NaN."""
    from jmoe.pallas_kernels.expert_products_mosaic import expert_products

    cases = [arrays(sizes, 1024, 768, small=small, seed=seed) for seed in (0, 1)]
    run = jax.jit(lambda *a: expert_products(*a, blocks=blocks))
    wanted = [truth(*made) for made in cases]
    first = [None, None]
    for number in range(20):
        which = number % 2
        out = np.asarray(run(*cases[which]), np.float32)
        want, heard = wanted[which]
        assert error(out, want, heard) < (2e-2 if small else 5e-3)  # the scale of another block: 0.05 and more
        first[which] = out if first[which] is None else first[which]
        np.testing.assert_array_equal(out[heard], first[which][heard])
        garbage = [jnp.full(n << 10, jnp.nan) for n in (1, 16, 256, 4096)]  # what the next call's memory held
        jax.block_until_ready(garbage)
        del garbage
