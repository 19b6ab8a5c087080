"""StepInputs: every column has its own place, floats travel as their bits, and the device reads what the host wrote."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import AWKWARD

from jmoe.cell_config import CellConfig
from jmoe.rows import Rows
from jmoe.sharding.mesh_config import MeshConfig
from jmoe.step_inputs import FLOAT_COLUMNS, INT_COLUMNS, StepInputs, StepLayout

BLOCKS = ("token_ids", "stop_ids", "page_table")
CELL = CellConfig(
    AWKWARD, MeshConfig(3, 2, 2).resolve(AWKWARD.num_experts), rows=4, chunk_len=7, page_len=4, num_pages=40,
    max_len=30, max_stop_ids=5,
)  # fmt: skip
KINDS = pytest.mark.parametrize("kind", ["prefill", "decode"])


@KINDS
def test_columns_cover_the_row_without_overlap(kind):
    layout = StepLayout.of(CELL, kind)
    taken = np.concatenate([np.arange(s.start, s.stop) for s in layout.columns.values()])
    assert sorted(taken) == list(range(layout.width))
    assert set(layout.columns) == {*INT_COLUMNS, *FLOAT_COLUMNS, *BLOCKS}


@pytest.mark.parametrize(("kind", "rows", "tokens"), [("prefill", 1, 7), ("decode", 4, 1)])
def test_shapes(kind, rows, tokens):
    inputs = StepInputs(CELL, kind)
    assert inputs.array.dtype == np.int32 and inputs.array.shape == (3, 2, rows, inputs.layout.width)
    widths = {"token_ids": tokens, "stop_ids": 5, "page_table": 8}
    for name, width in widths.items():
        assert inputs[name].shape == (3, 2, rows, width)
    for name in INT_COLUMNS + FLOAT_COLUMNS:
        assert inputs[name].shape == (3, 2, rows)
        assert inputs[name].dtype == (np.float32 if name in FLOAT_COLUMNS else np.int32)


@KINDS
def test_a_fresh_batch_is_idle_greedy_and_stops_on_nothing(kind):
    inputs = StepInputs(CELL, kind)
    values = {"top_p": 1.0, "repetition_penalty": 1.0, "stop_ids": -1}
    for name in (*INT_COLUMNS, *FLOAT_COLUMNS, *BLOCKS):
        np.testing.assert_array_equal(inputs[name], values.get(name, 0))


@KINDS
def test_what_the_host_writes_the_device_reads(kind):
    """Every field random: ints over the whole range, floats as any bits, NaNs with payloads and subnormals included."""
    rng = np.random.default_rng(0)
    inputs = StepInputs(CELL, kind)
    wrote = {}
    for name in (*INT_COLUMNS, *FLOAT_COLUMNS, *BLOCKS):
        bits = rng.integers(-(2**31), 2**31, inputs[name].shape).astype(np.int32)
        wrote[name] = bits
        inputs[name].view(np.int32)[...] = bits
    rows = jax.jit(lambda packed: Rows.unpack(packed, inputs.layout))(jnp.asarray(inputs.array[2, 1]))
    for name, bits in wrote.items():
        got = np.asarray(getattr(rows.sampling if hasattr(rows.sampling, name) else rows, name))
        assert got.dtype == (np.float32 if name in FLOAT_COLUMNS else np.int32)
        np.testing.assert_array_equal(got.view(np.int32), bits[2, 1], err_msg=name)


def test_one_assignment_touches_one_cell():
    inputs = StepInputs(CELL, "decode")
    before = inputs.array.copy()
    inputs["seed"][2, 1, 3] = 7
    inputs["temperature"][0, 0, 1] = 0.75
    changed = np.argwhere(inputs.array != before)
    columns = inputs.layout.columns
    assert changed.tolist() == [[0, 0, 1, columns["temperature"].start], [2, 1, 3, columns["seed"].start]]
    assert inputs["seed"][2, 1, 3] == 7 and inputs["temperature"][0, 0, 1] == 0.75


def test_unknown_names_are_refused():
    with pytest.raises(KeyError, match="temprature"):
        StepInputs(CELL, "decode")["temprature"]
