"""Engine over a numpy cell: the same tokens alone, in a crowd and after preemption, and what clients see of them."""

import hypothesis
import pytest
from engine_client import Client, Letters, finish, letters, prompt_of, run
from fake_executor import EOS, FakeExecutor, expected_tokens, make_cell
from hypothesis import strategies as st

from jmoe.serving.engine import Engine, EngineConfig
from jmoe.serving.requests import FinishReason, SamplingParams

CELLS = {
    "roomy": make_cell(attention=1, micro_batches=2, rows=4, num_pages=200),
    "replicas": make_cell(attention=3, micro_batches=3, rows=2, num_pages=40),
    "one slot": make_cell(micro_batches=1, rows=1, num_pages=17),
    "few pages": make_cell(micro_batches=2, rows=3, num_pages=20),
    "one step": make_cell(attention=2, num_steps=1, chunk_len=1, page_len=1, num_pages=90),
    "long steps": make_cell(num_steps=9, chunk_len=64, page_len=16, num_pages=9),
}


@pytest.mark.parametrize("cell", CELLS.values(), ids=list(CELLS))
def test_tokens_are_those_of_a_lone_request(cell):
    params = [SamplingParams(max_tokens=1 + 7 * i % 30, ignore_eos=i % 2 == 0) for i in range(25)]
    requests = [(prompt_of(1 + 5 * i % 44, i), params[i]) for i in range(25)]
    clients, engine = run(cell, requests)
    for client, (prompt, params) in zip(clients, requests, strict=True):
        assert client.tokens == expected_tokens(prompt, params, cell)
    short_of_pages = cell in (CELLS["few pages"], CELLS["replicas"], CELLS["one step"])
    assert (engine.stats()["preemptions"] > 0) == short_of_pages


SAMPLED = [
    SamplingParams(temperature=0.8, seed=5, max_tokens=24, ignore_eos=True),
    SamplingParams(temperature=1.5, seed=5, top_k=3, top_p=0.9, min_p=0.1, max_tokens=24, ignore_eos=True),
    SamplingParams(temperature=1.0, seed=6, repetition_penalty=1.2, max_tokens=24, ignore_eos=True),
    SamplingParams(repetition_penalty=1.2, presence_penalty=0.5, max_tokens=24, ignore_eos=True),
    SamplingParams(frequency_penalty=-0.5, max_tokens=24, ignore_eos=True),
    SamplingParams(max_tokens=24, ignore_eos=True),
]


@pytest.mark.parametrize("cell", CELLS.values(), ids=list(CELLS))
def test_seeds_and_penalty_counts_do_not_see_the_batch_or_a_preemption(cell):
    """The numpy cell checks the penalty counts of each slot against the sequence whenever it samples."""
    requests = [(prompt_of(3 + 2 * i, i), SAMPLED[i % len(SAMPLED)]) for i in range(18)]
    clients, _ = run(cell, requests)
    for client, (prompt, params) in zip(clients, requests, strict=True):
        assert client.tokens == expected_tokens(prompt, params, cell, seed=params.seed or 0)


def test_a_drawn_seed_differs_from_request_to_request():
    cell = make_cell(rows=4)
    params = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True)
    clients, _ = run(cell, [(prompt_of(5), params)] * 4)
    assert len({tuple(client.tokens) for client in clients}) == 4


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=40, deadline=None)
def test_any_cell_and_any_mix_of_requests(data):
    draw = data.draw
    cell = make_cell(
        attention=draw(st.integers(1, 2)), micro_batches=draw(st.integers(1, 3)), rows=draw(st.integers(1, 3)),
        page_len=draw(st.integers(1, 5)), chunk_len=draw(st.integers(1, 9)), num_steps=draw(st.integers(1, 6)),
        max_len=24, num_pages=draw(st.integers(25, 40)),
    )  # fmt: skip
    config = EngineConfig(max_calls_in_flight=draw(st.integers(1, 4)), max_prefill_tokens=draw(st.integers(1, 50)))
    sampled = st.builds(
        SamplingParams, max_tokens=st.integers(1, 30), temperature=st.sampled_from([0.0, 0.5]), seed=st.integers(0, 9),
        ignore_eos=st.booleans(), stop_token_ids=st.sets(st.integers(0, 100), max_size=5),
        repetition_penalty=st.sampled_from([1.0, 1.25]),
    )  # fmt: skip
    requests = draw(st.lists(st.tuples(st.lists(st.integers(0, 100), min_size=1, max_size=23), sampled), max_size=12))
    clients, engine = run(cell, requests, config=config)
    assert engine.executor.most_in_flight <= config.max_calls_in_flight
    for client, (prompt, params) in zip(clients, requests, strict=True):
        want = expected_tokens(prompt, params, cell, params.seed)
        assert client.tokens == want
        stopped = want[-1] in params.stop_token_ids or (want[-1] == EOS and not params.ignore_eos)
        assert client.last.finish_reason is (FinishReason.STOP if stopped else FinishReason.LENGTH)


def test_outputs_come_in_order_with_totals_and_one_last_one():
    engine, client = Engine(FakeExecutor(make_cell())), Client()
    name = engine.submit(prompt_of(20), SamplingParams(max_tokens=11, ignore_eos=True), client)
    finish(engine)
    assert [len(output.token_ids) for output in client.outputs] == [1, 4, 4, 2]
    assert [output.num_output_tokens for output in client.outputs] == [1, 5, 9, 11]
    assert {(o.request_id, o.num_prompt_tokens, o.text, o.error, o.logprobs) for o in client.outputs} == {
        (name, 20, "", None, None)
    }
    assert [output.finish_reason for output in client.outputs] == [None, None, None, FinishReason.LENGTH]


@pytest.mark.parametrize("num_prompt", [1, 8, 16, 63])
def test_max_tokens_one_ends_in_prefill(num_prompt):
    executor = FakeExecutor(make_cell())
    engine, client = Engine(executor), Client()
    prompt = prompt_of(num_prompt)
    engine.submit(prompt, SamplingParams(max_tokens=1, ignore_eos=True), client)
    finish(engine)
    assert client.tokens == expected_tokens(prompt, SamplingParams(max_tokens=1), engine.cell)
    assert client.last.finish_reason is FinishReason.LENGTH
    assert {key.kind for key, _ in executor.calls} == {"prefill"}


@pytest.mark.parametrize("num_prompt", [50, 58, 61, 62, 63])
def test_max_len_cuts_max_tokens_even_in_the_middle_of_a_call(num_prompt):
    cell = make_cell(max_len=64, num_pages=17)
    (client,), _ = run(cell, [(prompt_of(num_prompt), SamplingParams(max_tokens=1000, ignore_eos=True))])
    assert len(client.tokens) == 64 - num_prompt and client.last.finish_reason is FinishReason.LENGTH


def test_a_stop_token_is_returned_and_its_text_is_not():
    cell, prompt = make_cell(), prompt_of(5)
    full = expected_tokens(prompt, SamplingParams(max_tokens=20, ignore_eos=True), cell)
    params = SamplingParams(max_tokens=20, ignore_eos=True, stop_token_ids=(full[6],))
    (client,), _ = run(cell, [(prompt, params)], Letters())
    assert client.tokens == full[:7] and client.last.finish_reason is FinishReason.STOP
    assert client.text == letters(full[:6])


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 7, 20])
def test_a_stop_string_ends_text_and_tokens_at_the_same_place_whatever_the_call_length(num_steps):
    cell, prompt = make_cell(num_steps=num_steps), prompt_of(9)
    full = expected_tokens(prompt, SamplingParams(max_tokens=30, ignore_eos=True), cell)
    text = letters(full)
    for start, size in [(0, 1), (3, 2), (7, 5), (10, 12), (28, 2)]:
        stop = text[start : start + size]
        end = text.index(stop) + size
        end += text[end - 1] == "?"  # the detokenizer shows that letter one token later
        params = SamplingParams(max_tokens=30, ignore_eos=True, stop=(stop,))
        (client,), engine = run(cell, [(prompt, params)], Letters())
        assert client.text == text[: text.index(stop)]
        assert client.tokens == full[:end] and client.last.finish_reason is FinishReason.STOP
        assert client.last.num_output_tokens == len(client.tokens) == engine.stats()["output_tokens"]
        calls = -(-(end - 1) // num_steps) + 1  # one more was in flight, unless max_tokens left none
        assert engine.stats()["decode_calls"] == min(calls, -(-29 // num_steps))


def test_text_held_back_for_a_stop_string_comes_when_the_request_ends():
    cell, prompt = make_cell(), prompt_of(9)
    full = expected_tokens(prompt, SamplingParams(max_tokens=10, ignore_eos=True), cell)
    stop = letters(full)[-2:] + "zzz"
    (client,), _ = run(cell, [(prompt, SamplingParams(max_tokens=10, ignore_eos=True, stop=stop))], Letters())
    assert client.text == letters(full) and client.last.finish_reason is FinishReason.LENGTH
    assert client.last.text.endswith(stop[:2])


def test_a_stop_string_in_the_last_piece_of_a_finished_request_is_found():
    cell, prompt = make_cell(), prompt_of(9)
    full = expected_tokens(prompt, SamplingParams(max_tokens=30, ignore_eos=True), cell)
    num = letters(full).index("?") + 1
    params = SamplingParams(max_tokens=num, ignore_eos=True, stop="?")
    (client,), _ = run(cell, [(prompt, params)], Letters())
    assert client.text == letters(full[: num - 1]) and client.last.finish_reason is FinishReason.STOP


def test_logprobs_come_for_every_token_with_as_many_neighbours_as_asked_for():
    cell = make_cell(micro_batches=1, rows=3, num_top_logprobs=5)
    params = [SamplingParams(max_tokens=9, ignore_eos=True, logprobs=num) for num in (0, 3, None)]
    clients, _ = run(cell, [(prompt_of(7, i), p) for i, p in enumerate(params)])
    for client, num in zip(clients[:2], (0, 3), strict=True):
        entries = [entry for output in client.outputs for entry in output.logprobs]
        assert [entry.token_id for entry in entries] == client.tokens and len(entries) == 9
        assert [entry.logprob for entry in entries] == [-float(token) for token in client.tokens]
        assert [entry.top_ids for entry in entries] == [tuple(range(t, t + num)) for t in client.tokens]
        assert all(len(entry.top_logprobs) == num for entry in entries)
    assert all(output.logprobs is None for output in clients[2].outputs)


def test_stats_tell_where_requests_and_pages_are():
    engine = Engine(FakeExecutor(make_cell(micro_batches=1, rows=2, num_pages=33)))
    for i in range(3):
        engine.submit(prompt_of(8), SamplingParams(max_tokens=5, ignore_eos=True), Client(), str(i))
    assert engine.stats()["waiting"] == 3
    engine.step()
    engine.step()
    stats = engine.stats()
    assert (stats["waiting"], stats["running"], stats["free_slots"]) == (1, 2, 0)
    assert (stats["used_pages"], stats["free_pages"]) == (5, 27)
    assert (stats["prefill_calls"], stats["prefill_tokens"], stats["output_tokens"]) == (1, 8, 1)
    finish(engine)
    stats = engine.stats()
    assert (stats["output_tokens"], stats["prefill_tokens"], stats["decode_calls"]) == (15, 24, 3)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_next_call_starts_before_the_tokens_of_the_one_before_are_read(depth):
    executor, events = FakeExecutor(make_cell()), []
    submit, collect = executor.submit, executor.collect
    executor.submit = lambda *args: (events.append("s"), submit(*args))[1]
    executor.collect = lambda: (events.append("c"), collect())[1]
    engine, client = Engine(executor, EngineConfig(max_calls_in_flight=depth)), Client()
    engine.submit(prompt_of(5), SamplingParams(max_tokens=25, ignore_eos=True), client)
    finish(engine)
    assert "".join(events) == "s" * depth + "cs" * (7 - depth) + "c" * depth
    assert client.tokens == expected_tokens(prompt_of(5), SamplingParams(max_tokens=25, ignore_eos=True), engine.cell)


def test_a_chunk_budget_lets_more_prefill_calls_come_between_two_decode_calls():
    kinds = {}
    for budget in (None, 8, 24):  # a call of one lane is 8 tokens
        executor = FakeExecutor(make_cell(micro_batches=1, rows=2, chunk_len=8, num_pages=99, max_len=99))
        engine = Engine(executor, EngineConfig(max_prefill_tokens=budget, max_calls_in_flight=1))
        engine.submit(prompt_of(1), SamplingParams(max_tokens=40, ignore_eos=True), Client())
        engine.step()
        engine.submit(prompt_of(48), SamplingParams(max_tokens=1, ignore_eos=True), Client())
        finish(engine)
        kinds[budget] = "".join(key.kind[0] for key, _ in executor.calls)[1:]
    assert kinds[None] == kinds[8] == "dp" * 6 + "d" * 4  # the prefill of the first one counts
    assert kinds[24] == "ppdpppdp" + "d" * 8
