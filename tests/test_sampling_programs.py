"""Sampling through the whole programs: the tokens are those of a host loop over the reference's logits, in any batch.

Two cells share all of it: attention on one device and on two, K = 4 decode steps a call and K = 1.
"""

import functools

import jax
import numpy as np
import pytest
import scipy.special
from cell_driver import generate, slot_of
from sampling_oracle import Parameters, next_token
from small_models import AWKWARD, random_model, random_prompts, reference_logits, reference_tokens, source_of

from jmoe.cell_config import CellConfig
from jmoe.cell_runtime import CellRuntime
from jmoe.sharding.mesh_config import MeshConfig

MAX_TOKENS = 14
PROMPTS = random_prompts(AWKWARD)
SAMPLED = (
    Parameters(0.9, seed=1),
    Parameters(1.3, seed=2, top_k=20, repetition_penalty=1.3),
    Parameters(0.0, repetition_penalty=1.5, presence_penalty=0.5),
    Parameters(0.8, seed=-3, top_p=0.9, frequency_penalty=1.0),
    Parameters(0.0),
    Parameters(2.0, seed=4, min_p=0.05, presence_penalty=1.0),
    Parameters(0.7, seed=1),
)
CELLS = {"one attention device, 4 steps a call": ((1, 2, 2), 4), "two attention devices, 1 step": ((2, 1, 2), 1)}


@functools.cache
def runtime_of(name: str) -> CellRuntime:
    sizes, num_steps = CELLS[name]
    mesh = MeshConfig(*sizes).resolve(AWKWARD.num_experts)
    rows = -(-len(PROMPTS) // (mesh.attention * mesh.num_micro_batches))
    cell = CellConfig(
        AWKWARD, mesh, rows=rows, chunk_len=8, num_steps=num_steps, page_len=4, num_pages=120, max_len=64
    )
    runtime = CellRuntime(cell, jax.devices(), "inline")
    runtime.compile(("prefill", True), ("decode", True))
    runtime.load(source_of(random_model(AWKWARD)), lambda _: None)
    return runtime


@pytest.fixture(params=CELLS)
def runtime(request):
    return runtime_of(request.param)


def run(runtime: CellRuntime, prompts, parameters, max_tokens=MAX_TOKENS, **columns):
    """Tokens of every prompt, and every call's results; `columns` overrules what the driver fills in."""
    params = [p.columns() | columns for p in parameters]
    return generate(runtime.run, runtime.cell, prompts, max_tokens, params, sampling=True)


@functools.cache
def host_loop(n: int, p: Parameters, max_tokens: int = MAX_TOKENS) -> list[int]:
    """Prompt n's tokens, one at a time from the reference's logits of prompt and output."""
    output: list[int] = []
    while len(output) < max_tokens:
        logits = reference_logits(AWKWARD, PROMPTS[n] + output)[-1]
        output.append(next_token(logits, PROMPTS[n], output, p))
    return output


def test_sampled_tokens_are_those_of_a_host_loop(runtime):
    """Seven requests, each with parameters of its own, together: penalties, truncation, seeds, greedy ones between."""
    tokens, _ = run(runtime, PROMPTS, SAMPLED)
    assert tokens == [host_loop(n, p) for n, p in enumerate(SAMPLED)]
    greedy = reference_tokens(AWKWARD, PROMPTS, MAX_TOKENS)
    same = [a == b for a, b in zip(tokens, greedy, strict=True)]
    assert same[4] and sum(same) <= 2, "parameters that change nothing prove nothing"


@pytest.mark.parametrize("n", [0, 3, 5])
def test_a_request_alone_samples_what_it_samples_among_others(runtime, n):
    """In the first slot, whose counts another request left behind."""
    tokens, _ = run(runtime, [PROMPTS[n]], [SAMPLED[n]])
    assert tokens == [host_loop(n, SAMPLED[n])]


def test_the_seed_is_heard_and_nothing_but_the_seed(runtime):
    """One prompt seven times: equal seeds give equal tokens in different slots, other seeds others."""
    seeds = (7, 8, 7, 9, 8, 7, 9)
    tokens, _ = run(runtime, [PROMPTS[4]] * 7, [Parameters(1.0, seed) for seed in seeds])
    by_seed = dict(zip(seeds, tokens, strict=True))
    assert tokens == [by_seed[seed] for seed in seeds]
    assert len(set(map(tuple, by_seed.values()))) == 3


PENALTIES = (
    Parameters(repetition_penalty=1.8), Parameters(repetition_penalty=0.6), Parameters(presence_penalty=1.5),
    Parameters(presence_penalty=-1.5), Parameters(frequency_penalty=0.9), Parameters(frequency_penalty=-0.5),
    Parameters(repetition_penalty=1.2, presence_penalty=0.4, frequency_penalty=0.3),
)  # fmt: skip


def test_each_penalty_counts_prompt_and_output_as_a_host_loop_does(runtime):
    """Prompts longer than a chunk are counted over several prefill calls."""
    assert max(map(len, PROMPTS)) > 2 * runtime.cell.chunk_len
    tokens, _ = run(runtime, PROMPTS, PENALTIES)
    assert tokens == [host_loop(n, p) for n, p in enumerate(PENALTIES)]
    greedy = reference_tokens(AWKWARD, PROMPTS, MAX_TOKENS)
    assert sum(a != b for a, b in zip(tokens, greedy, strict=True)) >= 5, "penalties that change nothing prove nothing"


@pytest.mark.parametrize("already", [1, 5, 9])
def test_a_request_computed_again_goes_on_with_the_same_tokens(runtime, already):
    """After preemption: prompt and output are prefilled, the output counted as output, in other slots than before."""
    said = [host_loop(n, p) for n, p in enumerate(SAMPLED)]
    for n in (1, 2, 3, 5):
        tokens, _ = run(
            runtime, [PROMPTS[n] + said[n][:already]], [SAMPLED[n]], MAX_TOKENS - already, num_prompt=len(PROMPTS[n])
        )
        assert tokens == [said[n][already:]]
    wrong, _ = run(runtime, [PROMPTS[3] + said[3][:already]], [SAMPLED[3]], MAX_TOKENS - already)
    assert wrong != [said[3][already:]], "sabotage: without num_prompt the output counts as prompt"


def entries_of(runtime: CellRuntime, results, n: int):
    """(token, logprob, top ids, top logprobs) of every token that request n emitted, in order."""
    replica, micro_batch, row = slot_of(runtime.cell, n)
    prefilled = False
    for result in results:
        at = (replica, micro_batch, row if prefilled else 0)
        if result["tokens"].shape[3] > 1:
            prefilled, at = True, (replica, micro_batch, row)
        for step in range(len(result["tokens"])):
            if result["tokens"][(step, *at)] >= 0:
                yield tuple(result[k][(step, *at)] for k in ("tokens", "logprobs", "top_ids", "top_logprobs"))


@pytest.mark.parametrize("n", [1, 4])
def test_logprobs_are_the_references_log_softmax(runtime, n):
    """Of the model's own logits, before penalties and temperature; of the chosen token and of the likeliest."""
    tokens, results = run(runtime, [PROMPTS[n]], [SAMPLED[n]])
    logits = reference_logits(AWKWARD, PROMPTS[n] + tokens[0])[len(PROMPTS[n]) - 1 : -1]
    want = scipy.special.log_softmax(logits.astype(np.float64), axis=-1)
    entries = list(entries_of(runtime, results, 0))
    assert [int(token) for token, *_ in entries] == tokens[0]
    for position, (token, logprob, top_ids, top_logprobs) in enumerate(entries):
        assert abs(logprob - want[position, token]) < 1e-4
        np.testing.assert_allclose(top_logprobs, want[position, top_ids], atol=1e-4)
        np.testing.assert_allclose(top_logprobs, -np.sort(-want[position])[: runtime.cell.num_top_logprobs], atol=1e-4)
