"""What the host packs for a call, column by column."""

from array import array

import numpy as np
from fake_executor import EOS, make_cell

from jmoe.serving.requests import Request, SamplingParams
from jmoe.serving.scheduler import Scheduler
from jmoe.serving.step_batch import StepBatch
from jmoe.step_inputs import OWN_TOKEN

PARAMS = SamplingParams(
    temperature=0.5, top_k=7, top_p=0.25, min_p=0.125, repetition_penalty=1.5, presence_penalty=-0.5,
    frequency_penalty=0.75,
)  # fmt: skip


def add(scheduler, name, prompt, params=PARAMS, **fields):
    request = Request(name, array("i", prompt), params, fields.pop("max_tokens", 9), **fields)
    scheduler.add(request)
    return request


def answer(scheduler, call, token=5):
    num_steps, rows = (1, 1) if call.kind == "prefill" else (scheduler.cell.num_steps, scheduler.cell.rows)
    mesh = scheduler.cell.mesh
    tokens = np.full((num_steps, mesh.attention, mesh.num_micro_batches, rows), -1, np.int32)
    for work, place in zip(call.work, zip(*call.index(), strict=True), strict=True):
        tokens[(slice(0, work.num_samples), *place)] = token
    scheduler.update(call, tokens)


def row(inputs, place):
    """A packed row as plain values."""
    return {name: inputs[name][place].tolist() for name in inputs.layout.columns}


def test_a_prefill_chunk_and_a_decode_row_hold_what_the_programs_read():
    cell = make_cell(micro_batches=2, rows=2, chunk_len=4, page_len=4, max_len=32, num_pages=17, max_stop_ids=3)
    scheduler, batch = Scheduler(cell), StepBatch(cell)
    request = add(scheduler, "a", [10, 11, 12, 13, 14, 15], stop_ids=(EOS, 9), seed=123)
    call = scheduler.schedule()
    first = batch.fill(call)
    pages = [*request.page_ids, 0, 0, 0, 0, 0, 0]
    assert len(request.page_ids) == 2
    fixed = {
        "num_prompt": 6, "seed": 123, "top_k": 7, "temperature": 0.5, "top_p": 0.25, "min_p": 0.125,
        "repetition_penalty": 1.5, "presence_penalty": -0.5, "frequency_penalty": 0.75, "stop_ids": [EOS, 9, -1],
        "slot": request.slot.row,
    }  # fmt: skip
    assert first.array.shape[2] == 1 and row(first, (0, 0, 0)) == fixed | {
        "num_tokens": 4, "start_pos": 0, "sample": 0, "remaining": 9, "reset": 1, "token_ids": [10, 11, 12, 13],
        "page_table": pages,
    }  # fmt: skip
    assert first["num_tokens"].sum() == 4
    answer(scheduler, call)
    call = scheduler.schedule()
    second = batch.fill(call)
    assert row(second, (0, 0, 0)) == fixed | {
        "num_tokens": 2, "start_pos": 4, "sample": 1, "remaining": 9, "reset": 0, "token_ids": [14, 15, 0, 0],
        "page_table": pages,
    }  # fmt: skip
    answer(scheduler, call, token=42)
    call = scheduler.schedule()
    third = batch.fill(call)
    assert row(third, request.slot) == fixed | {
        "num_tokens": 1, "start_pos": 6, "sample": 1, "remaining": 8, "reset": 0, "token_ids": [OWN_TOKEN],
        "page_table": [*request.page_ids, 0, 0, 0, 0, 0],
    }  # fmt: skip
    assert len(request.page_ids) == 3


def test_idle_rows_hold_no_tokens_and_no_pages_even_where_a_request_is_half_prefilled():
    cell = make_cell(micro_batches=1, rows=3, chunk_len=4)
    scheduler, batch = Scheduler(cell), StepBatch(cell)
    add(scheduler, "first", [1, 2, 3])
    half = add(scheduler, "half", list(range(1, 11)))
    calls = []
    for _ in range(4):
        calls.append(scheduler.schedule())
        inputs = batch.fill(calls[-1])
        answer(scheduler, calls[-1])
    assert [call.kind for call in calls] == ["prefill", "decode", "prefill", "decode"] and half.is_prefilling
    assert half.slot.row == 1
    assert inputs["num_tokens"].tolist() == [[[1, 0, 0]]]
    assert not inputs["page_table"][0, 0, 1:].any() and (inputs["stop_ids"][0, 0, 1:] == -1).all()
    assert inputs["slot"].tolist() == [[[0, 1, 2]]]


def test_a_new_tenant_inherits_nothing():
    cell = make_cell(micro_batches=1, rows=1)
    scheduler, batch = Scheduler(cell), StepBatch(cell)
    old = add(scheduler, "old", list(range(1, 9)), max_tokens=1, stop_ids=(1, 2, 3), seed=9)
    call = scheduler.schedule()
    batch.fill(call)
    answer(scheduler, call)
    assert old.finish_reason
    new = add(scheduler, "new", [4], SamplingParams(), stop_ids=(EOS,), seed=0)
    call = scheduler.schedule()
    got = row(batch.fill(call), (0, 0, 0))
    assert got["stop_ids"] == [EOS] + [-1] * 7 and got["page_table"] == new.page_ids + [0] * 15
    assert (got["temperature"], got["top_p"], got["top_k"], got["repetition_penalty"]) == (0, 1, 0, 1)
    assert got["token_ids"] == [4] + [0] * 7 and got["reset"] == 1


def test_a_preempted_request_keeps_its_prompt_length_and_starts_anew():
    cell = make_cell(micro_batches=1, rows=2, num_pages=17, page_len=4, max_len=64, chunk_len=16)
    scheduler, batch = Scheduler(cell), StepBatch(cell)
    add(scheduler, "old", list(range(1, 21)), max_tokens=30)
    young = add(scheduler, "young", list(range(1, 21)), max_tokens=30, seed=77)
    rows = []
    while call := scheduler.schedule():
        inputs = batch.fill(call)
        for work, place in zip(call.work, zip(*call.index(), strict=True), strict=True):
            if work.request is young and call.kind == "prefill":
                rows.append(row(inputs, place))
                assert rows[-1]["page_table"][: len(young.page_ids)] == young.page_ids
        answer(scheduler, call)
    again = [r for r in rows if r["num_prompt"] + r["remaining"] < 50]
    assert scheduler.num_preemptions and again
    assert all(r["num_prompt"] == 20 and r["seed"] == 77 for r in rows)
    assert [r["reset"] for r in rows] == [int(r["start_pos"] == 0) for r in rows]
    assert [token for r in again[:2] for token in r["token_ids"]][:21] == [*range(1, 21), 5]


def test_each_call_has_an_array_of_its_own():
    cell = make_cell()
    scheduler, batch = Scheduler(cell), StepBatch(cell)
    add(scheduler, "a", [1, 2])
    call = scheduler.schedule()
    first = batch.fill(call)
    kept = first.array.copy()
    answer(scheduler, call)
    batch.fill(scheduler.schedule())
    assert np.array_equal(first.array, kept)
