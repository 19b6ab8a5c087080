"""Rows: what each row says of itself, and how it moves on from step to step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import AWKWARD

from jmoe.cell_config import CellConfig
from jmoe.rows import Rows
from jmoe.sharding.mesh_config import MeshConfig
from jmoe.step_inputs import StepInputs

CELL = CellConfig(
    AWKWARD, MeshConfig(1, 1, 1).resolve(AWKWARD.num_experts), rows=5, chunk_len=6, page_len=4, num_pages=40,
    max_len=30, max_stop_ids=3,
)  # fmt: skip


def rows_of(kind="decode", **columns) -> Rows:
    inputs = StepInputs(CELL, kind)
    for name, values in columns.items():
        inputs[name][0, 0] = values
    return Rows.unpack(jnp.asarray(inputs.array[0, 0]), inputs.layout)


def decode_rows(**columns) -> Rows:
    """Five rows in the middle of their outputs."""
    usual = {"num_tokens": 1, "sample": 1, "remaining": 10, "start_pos": [8, 9, 10, 11, 12], "num_prompt": 6}
    return rows_of(**(usual | columns))


def ints(array) -> list[int]:
    return np.asarray(array).astype(int).tolist()


@pytest.mark.parametrize("num_tokens", range(7))
def test_a_chunk_knows_its_tokens(num_tokens):
    rows = rows_of("prefill", num_tokens=num_tokens, start_pos=12, sample=1, num_prompt=14)
    assert ints(rows.positions) == [[12, 13, 14, 15, 16, 17]]
    assert ints(rows.valid) == [[1] * num_tokens + [0] * (6 - num_tokens)]
    assert ints(rows.last) == [max(num_tokens - 1, 0)]
    assert ints(rows.emits) == [num_tokens > 0]
    assert ints(rows.num_output) == [12 + num_tokens - 14]


def test_only_rows_that_hold_a_token_and_may_sample_emit():
    rows = decode_rows(num_tokens=[0, 1, 1, 0, 1], sample=[1, 0, 1, 0, 1])
    assert ints(rows.emits) == [0, 0, 1, 0, 1]


def test_the_index_of_the_token_sampled_now_counts_from_the_prompt():
    """The last prompt chunk samples output 0; the decode step that reads output 0 at position num_prompt samples 1."""
    assert ints(rows_of("prefill", num_tokens=4, start_pos=6, num_prompt=10).num_output) == [0]
    assert ints(decode_rows(num_prompt=[8, 8, 8, 8, 8]).num_output) == [1, 2, 3, 4, 5]


def test_advance_feeds_the_sampled_token_at_the_next_position():
    rows = decode_rows().advance(jnp.array([5, 6, 7, 8, 9]))
    assert ints(rows.token_ids) == [[5], [6], [7], [8], [9]]
    assert ints(rows.start_pos) == [9, 10, 11, 12, 13]
    assert ints(rows.num_tokens) == [1] * 5 and ints(rows.remaining) == [9] * 5
    assert ints(rows.num_output) == ints(decode_rows().num_output + 1)


def test_a_stop_token_idles_its_row_and_no_other():
    stops = [[7, -1, -1], [-1, -1, 7], [8, 9, 10], [-1, -1, -1], [9, 7, 1]]
    rows = decode_rows(stop_ids=stops).advance(jnp.array([7, 7, 7, 7, 7]))
    assert ints(rows.num_tokens) == [0, 0, 1, 1, 0]
    assert ints(rows.token_ids[:, 0]) == [0, 0, 7, 7, 0]
    assert ints(rows.emits) == [0, 0, 1, 1, 0]


def test_an_empty_budget_idles_the_row():
    rows = decode_rows(remaining=[1, 2, 3, 1, 2])
    emitted = []
    for _ in range(4):
        emitted.append(ints(rows.emits))
        rows = rows.advance(jnp.full(5, 3))
    assert np.sum(emitted, axis=0).tolist() == [1, 2, 3, 1, 2]


def test_idle_rows_stay_idle_and_where_they_are():
    rows = decode_rows(num_tokens=[0, 1, 0, 1, 0], sample=[1, 1, 0, 1, 1], token_ids=np.arange(5)[:, None])
    for step in range(1, 4):
        rows = rows.advance(jnp.full(5, 3))
        assert ints(rows.num_tokens) == [0, 1, 0, 1, 0]
        assert ints(rows.start_pos) == [8, 9 + step, 10, 11 + step, 12]
        assert ints(rows.remaining) == [10, 10 - step, 10, 10 - step, 10]
        assert ints(rows.token_ids[:, 0]) == [0, 3, 0, 3, 0]


def test_advance_keeps_everything_else():
    pages = np.arange(40).reshape(5, 8)
    rows = decode_rows(slot=np.arange(5), seed=np.arange(5) + 40, temperature=0.5, page_table=pages)
    moved = rows.advance(jnp.arange(5))
    for field in dataclasses.fields(Rows):
        if field.name not in ("token_ids", "start_pos", "num_tokens", "remaining"):
            same = jax.tree.map(np.array_equal, getattr(rows, field.name), getattr(moved, field.name))
            assert jax.tree.all(same), field.name
