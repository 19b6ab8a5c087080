"""What the engine refuses, and with which words."""

import pytest
from engine_client import GREEDY, Client, finish
from fake_executor import EOS, FakeExecutor, make_cell

from jmoe.serving.engine import Engine, EngineConfig
from jmoe.serving.errors import QueueFullError
from jmoe.serving.requests import SamplingParams


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "prompt_ids: expected 1 to 63 tokens.*got 0"),
        ([1] * 64, {}, "prompt_ids: expected 1 to 63 tokens.*got 64"),
        ([1, 101], {}, "prompt_ids: expected 0 to 100 .*got 101"),
        ([-1], {}, "prompt_ids: expected 0 to 100 .*got -1"),
        ([1.5], {}, "prompt_ids: expected integers"),
        (["a"], {}, "prompt_ids: expected integers"),
        ([1], {"stop_token_ids": (101,)}, "stop_token_ids: expected 0 to 100"),
        ([1], {"stop_token_ids": tuple(range(10, 18))}, "at most 8 with the model's end-of-sequence ids, got 9"),
        ([1], {"logprobs": 21}, "logprobs: expected at most 20, got 21"),
        ([1], {"stop": "x"}, "expected an engine with a tokenizer"),
    ],
)
def test_bad_input_is_refused_with_a_sentence(prompt, params, message):
    engine = Engine(FakeExecutor(make_cell()))
    with pytest.raises(ValueError, match=message):
        engine.submit(prompt, SamplingParams(**params), Client())
    assert engine.stats()["waiting"] == 0


def test_as_many_stop_ids_as_the_program_takes_are_fine():
    engine = Engine(FakeExecutor(make_cell()))
    engine.submit([1], SamplingParams(stop_token_ids=tuple(range(10, 18)), ignore_eos=True), Client())
    engine.submit([1], SamplingParams(stop_token_ids=(EOS, *range(10, 17))), Client())


def test_an_id_is_taken_once_at_a_time():
    engine = Engine(FakeExecutor(make_cell()))
    assert engine.submit([1], GREEDY, Client(), "mine") == "mine"
    with pytest.raises(ValueError, match="'mine'"):
        engine.submit([1], GREEDY, Client(), "mine")
    finish(engine)
    engine.submit([1], GREEDY, Client(), "mine")
    for bad in ("", "x" * 257):
        with pytest.raises(ValueError, match="request_id: expected 1 to 256 characters"):
            engine.submit([1], GREEDY, Client(), bad)


def test_a_full_inbox_refuses_and_takes_again_when_there_is_room():
    engine = Engine(FakeExecutor(make_cell(micro_batches=1, rows=1)), EngineConfig(max_waiting=2))
    engine.submit([1], GREEDY, Client())
    engine.submit([2], GREEDY, Client())
    with pytest.raises(QueueFullError, match=r"2 requests are waiting \(max_waiting 2\)"):
        engine.submit([3], GREEDY, Client())
    engine.step()
    assert engine.stats()["waiting"] == 1
    engine.submit([3], GREEDY, Client())
    finish(engine)


@pytest.mark.parametrize(
    "field", ["max_waiting", "max_prefill_tokens", "max_calls_in_flight", "check_interval_s", "close_timeout_s"]
)
def test_engine_config_wants_positive_values(field):
    with pytest.raises(ValueError, match=rf"EngineConfig\.{field}: expected more than 0, got 0"):
        EngineConfig(**{field: 0})
