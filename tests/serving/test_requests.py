"""SamplingParams refuse what the programs can't do; a request reads as one sequence."""

import dataclasses
from array import array

import pytest

from jmoe.serving.requests import FinishReason, Request, SamplingParams


def test_the_default_is_greedy_and_needs_no_sampling_program():
    params = SamplingParams()
    assert params.temperature == 0 and params.max_tokens == 128 and not params.needs_sampling
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.temperature = 1.0  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 2.5),
        ("max_tokens", True),
        ("max_tokens", 2**31),
        ("temperature", -0.1),
        ("temperature", 1e-4),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", float("nan")),
        ("min_p", -0.01),
        ("min_p", 1.5),
        ("seed", -1),
        ("seed", 2**31),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("stop_token_ids", (-1,)),
        ("stop_token_ids", ("a",)),
        ("stop", ("",)),
        ("stop", ("x" * 257,)),
        ("stop", (3,)),
        ("stop", tuple("abcdefghijklmnopq")),
        ("logprobs", -1),
    ],
)
def test_a_value_out_of_range_is_named_with_what_was_expected(name, value):
    with pytest.raises(ValueError, match=rf"SamplingParams\.{name}: expected .*, got "):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.7},
        {"logprobs": 0},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
    ],
)
def test_whatever_argmax_cannot_do_needs_the_sampling_program(params):
    assert SamplingParams(**params).needs_sampling


def test_filters_alone_leave_greedy_as_it_is():
    assert not SamplingParams(top_k=5, top_p=0.5, min_p=0.1, seed=3, ignore_eos=True).needs_sampling


def test_one_stop_string_is_not_taken_for_its_letters():
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=["a", "b"], stop_token_ids=[1]).stop == ("a", "b")


@pytest.mark.parametrize("start", range(7))
@pytest.mark.parametrize("stop", range(8))
def test_tokens_reads_prompt_and_output_as_one_sequence(start, stop):
    request = Request("r", array("i", [1, 2, 3]), SamplingParams(), 9, output_ids=array("i", [4, 5, 6, 7]))
    if start <= stop:
        assert request.tokens(start, stop).tolist() == [1, 2, 3, 4, 5, 6, 7][start:stop]


def test_finish_reasons_are_plain_words():
    assert [str(reason) for reason in FinishReason] == ["stop", "length", "abort", "error"]
