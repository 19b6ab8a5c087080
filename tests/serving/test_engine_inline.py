"""The engine over the real programs: greedy tokens are the reference's, sampled ones those of a lone request."""

import pytest
from engine_client import Client, finish
from small_models import AWKWARD, random_model, random_prompts, reference_tokens

from jmoe.cell_config import CellConfig
from jmoe.serving.engine import Engine
from jmoe.serving.executors.inline import InlineExecutor
from jmoe.serving.requests import FinishReason, SamplingParams
from jmoe.sharding.mesh_config import MeshConfig

MAX_TOKENS = 18
SAMPLED = (
    SamplingParams(MAX_TOKENS, temperature=0.9, seed=1),
    SamplingParams(MAX_TOKENS, temperature=1.3, seed=2, top_k=20, repetition_penalty=1.3),
    SamplingParams(MAX_TOKENS, repetition_penalty=1.5, presence_penalty=0.5),
    SamplingParams(MAX_TOKENS, temperature=0.8, seed=3, top_p=0.9, frequency_penalty=1.0),
    SamplingParams(MAX_TOKENS),
    SamplingParams(MAX_TOKENS, temperature=2.0, seed=4, min_p=0.05, presence_penalty=1.0),
    SamplingParams(MAX_TOKENS, frequency_penalty=0.7),
)


@pytest.fixture(scope="module")
def few_pages():
    """Two slots a lane, and pages for about a third of what seven requests want."""
    mesh = MeshConfig(1, 2, 2).resolve(AWKWARD.num_experts)
    cell = CellConfig(AWKWARD, mesh, rows=2, chunk_len=8, num_steps=4, page_len=4, num_pages=18, max_len=64)
    executor = InlineExecutor(cell, random_model(AWKWARD))
    yield executor
    executor.close()


def run(executor, prompts, params):
    """Tokens of every request, and the engine; it checks itself after every call."""
    engine, clients = Engine(executor), [Client() for _ in prompts]
    for prompt, param, client in zip(prompts, params, clients, strict=True):
        engine.submit(prompt, param, client)
    finish(engine)
    assert {client.last.finish_reason for client in clients} == {FinishReason.LENGTH}
    return [client.tokens for client in clients], engine


def test_greedy_tokens_are_those_of_the_reference_whatever_was_preempted(few_pages):
    prompts = random_prompts(AWKWARD)
    tokens, engine = run(few_pages, prompts, [SamplingParams(MAX_TOKENS)] * len(prompts))
    assert tokens == reference_tokens(AWKWARD, prompts, MAX_TOKENS)
    assert engine.stats()["preemptions"] > 0


def test_sampled_tokens_do_not_depend_on_the_batch_or_on_preemption(few_pages):
    prompts = random_prompts(AWKWARD)
    together, engine = run(few_pages, prompts, SAMPLED)
    assert engine.stats()["preemptions"] > 0
    alone = [run(few_pages, [prompt], [params])[0][0] for prompt, params in zip(prompts, SAMPLED, strict=True)]
    assert together == alone
    greedy = reference_tokens(AWKWARD, prompts, MAX_TOKENS)
    same = [tokens == want for tokens, want in zip(together, greedy, strict=True)]
    assert same[4] and sum(same) < 4, "parameters that change nothing prove nothing"


def test_a_seed_and_a_penalty_are_heard(few_pages):
    """Sabotage of the test above: another seed, or other output before a penalty, gives other tokens."""
    prompt = random_prompts(AWKWARD)[0]
    first, again, other = (
        run(few_pages, [prompt], [SamplingParams(MAX_TOKENS, temperature=1.0, seed=seed)])[0][0] for seed in (7, 7, 8)
    )
    assert first == again != other


def test_logprobs_of_greedy_tokens_are_the_best_ones(few_pages):
    prompt = random_prompts(AWKWARD)[0]
    engine, client = Engine(few_pages), Client()
    engine.submit(prompt, SamplingParams(MAX_TOKENS, logprobs=3), client)
    finish(engine)
    entries = [entry for output in client.outputs for entry in output.logprobs]
    assert [entry.token_id for entry in entries] == reference_tokens(AWKWARD, [prompt], MAX_TOKENS)[0]
    for entry in entries:
        assert entry.top_ids[0] == entry.token_id and entry.top_logprobs[0] == entry.logprob <= 0
        assert list(entry.top_logprobs) == sorted(entry.top_logprobs, reverse=True)
