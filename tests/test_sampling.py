"""Sampling functions against numpy: penalties, truncation, distribution, noise, log-probabilities."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from sampling_oracle import Parameters, next_token, penalized, probabilities

from jmoe.sampling import MASKED, SamplingRows, TokenCounts, penalize, sample, token_logprobs, truncate

VOCAB = 23
SAID = {
    "nothing": ([], []),
    "a prompt": ([3, 5, 5, 7], []),
    "output": ([], [1, 1, 1, 2]),
    "both, some tokens in both": ([3, 5, 5, 0], [5, 1, 1, 22]),
}
PENALTIES = {
    "off": {},
    "repetition above 1": {"repetition_penalty": 1.7},
    "repetition below 1": {"repetition_penalty": 0.6},
    "presence": {"presence_penalty": 0.8},
    "negative presence": {"presence_penalty": -2.0},
    "frequency": {"frequency_penalty": 0.3},
    "all": {"repetition_penalty": 1.3, "presence_penalty": -0.4, "frequency_penalty": 0.9},
}


def rows_of(parameters) -> SamplingRows:
    return SamplingRows(**{
        f.name: jnp.asarray([getattr(p, f.name) for p in parameters], jnp.int32 if f.type is int else jnp.float32)
        for f in dataclasses.fields(Parameters)
    })  # fmt: skip


def counts_of(said, vocab=VOCAB) -> TokenCounts:
    prompt, output = np.zeros((len(said), vocab), bool), np.zeros((len(said), vocab), np.int32)
    for row, (prompt_ids, output_ids) in enumerate(said):
        prompt[row, list(prompt_ids)] = True
        np.add.at(output[row], list(output_ids), 1)
    return TokenCounts(jnp.asarray(prompt), jnp.asarray(output))


def logits_of(rows, vocab=VOCAB, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, vocab), scale=3).astype(np.float32)


def test_penalties_equal_the_oracles_whatever_was_said():
    """Every combination of what was said and what is penalised, a row each."""
    cases = [(Parameters(**p), said) for p in PENALTIES.values() for said in SAID.values()]
    logits = logits_of(len(cases))
    got = penalize(jnp.asarray(logits), counts_of([said for _, said in cases]), rows_of([p for p, _ in cases]))
    for row, (p, said) in enumerate(cases):
        np.testing.assert_allclose(got[row], penalized(logits[row], *said, p), rtol=1e-6, atol=1e-6)
    off = got[: len(SAID)]
    np.testing.assert_array_equal(off, logits[: len(SAID)])


TRUNCATIONS = [
    {}, {"top_k": 1}, {"top_k": 4}, {"top_k": VOCAB}, {"top_k": 10**6}, {"top_p": 0.0}, {"top_p": 0.3}, {"top_p": 0.95},
    {"top_p": 1.0}, {"min_p": 0.01}, {"min_p": 0.3}, {"min_p": 1.0}, {"top_k": 5, "top_p": 0.7},
    {"top_k": 9, "top_p": 0.9, "min_p": 0.02}, {"min_p": 0.1, "top_p": 0.5},
]  # fmt: skip


@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
def test_truncation_keeps_what_the_oracle_keeps(temperature):
    parameters = [Parameters(temperature, seed, **t) for t in TRUNCATIONS for seed in range(8)]
    logits = logits_of(len(parameters), seed=1)
    got = np.asarray(truncate(jnp.asarray(logits / np.float32(temperature)), rows_of(parameters)))
    for row, p in enumerate(parameters):
        kept = probabilities(logits[row].astype(np.float64), dataclasses.replace(p, top_p=max(p.top_p, 1e-9))) > 0
        np.testing.assert_array_equal(got[row] > MASKED, kept, err_msg=str(p))
        np.testing.assert_array_equal(got[row][kept], (logits[row] / np.float32(temperature))[kept])


def test_what_is_off_leaves_everything_in_a_large_vocabulary():
    """The running sum of 100 000 equal probabilities must not cut the last ones off."""
    logits = jnp.stack([jnp.zeros(100_000), jnp.linspace(0, -30, 100_000), jnp.linspace(0, -3000, 100_000)])
    got = np.asarray(truncate(logits, rows_of([Parameters(1.0)] * 3)))
    np.testing.assert_array_equal(got, logits)


def test_the_best_token_always_stays():
    """Whatever is asked for, even nothing: top-p 0, min-p 1, and logits far apart."""
    p = [Parameters(1.0, top_p=0.0), Parameters(1.0, min_p=1.0), Parameters(1.0, top_k=1, top_p=0.0, min_p=1.0)]
    logits = logits_of(3) * 1e3
    got = np.asarray(truncate(jnp.asarray(logits), rows_of(p)))
    assert ((got > MASKED).sum(axis=1) == 1).all()
    np.testing.assert_array_equal(got.argmax(axis=1), logits.argmax(axis=1))


@functools.cache
def drawn(rows: int, vocab: int):
    return jax.jit(sample)


DISTRIBUTIONS = [
    Parameters(1.0, 11), Parameters(0.5, 12), Parameters(2.5, 13), Parameters(1.0, 14, top_k=4),
    Parameters(3.0, 15, top_p=0.8), Parameters(1.5, 16, min_p=0.1),
    Parameters(1.0, 17, repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.5),
]  # fmt: skip


@pytest.mark.parametrize("p", DISTRIBUTIONS, ids=str)
def test_draws_follow_the_distribution(p):
    """20 000 draws of one request; the seed is fixed, so the chi-square bound (p > 1e-4) holds for good or fails."""
    draws, said = 20_000, ([2, 3], [4, 4, 5])
    logits = logits_of(1, vocab=12, seed=p.seed)
    counts = counts_of([said], vocab=12)
    wide = TokenCounts(*(jnp.broadcast_to(a, (draws, 12)) for a in (counts.prompt_seen, counts.output)))
    tokens = drawn(draws, 12)(
        jnp.broadcast_to(logits, (draws, 12)), wide, rows_of([p] * draws), jnp.arange(draws, dtype=jnp.int32)
    )
    want = probabilities(penalized(logits[0], *said, p), p) * draws
    got = np.bincount(np.asarray(tokens), minlength=12)
    assert not got[want == 0].any(), "a token that was left out"
    there = want > 0
    assert there.sum() >= 3
    assert scipy.stats.chisquare(got[there], want[there]).pvalue > 1e-4
    wrong = probabilities(logits[0].astype(np.float64), Parameters(p.temperature * 1.2)) * draws
    assert scipy.stats.chisquare(got, wrong).pvalue < 1e-6, "the bound would not see another temperature"


def test_draws_of_different_seeds_are_independent():
    """Seeds 0, 1, 2, ... at the same position: as good as one seed at many positions."""
    draws, logits = 20_000, logits_of(1, vocab=12)
    parameters = dataclasses.replace(rows_of([Parameters(1.0)] * draws), seed=jnp.arange(draws, dtype=jnp.int32))
    tokens = drawn(draws, 12)(
        jnp.broadcast_to(logits, (draws, 12)), TokenCounts.zeros(draws, 12), parameters, jnp.zeros(draws, jnp.int32)
    )
    want = probabilities(logits[0].astype(np.float64), Parameters(1.0)) * draws
    assert scipy.stats.chisquare(np.bincount(np.asarray(tokens), minlength=12), want).pvalue > 1e-4


def test_a_token_depends_on_its_own_row_alone():
    """Every row of a batch: in another order, alone, and beside others, it says what the oracle says."""
    rng = np.random.default_rng(2)
    cases = [(Parameters(1.0 + i % 3, 40 + i, top_k=(0, 7)[i % 2], top_p=(1.0, 0.9)[i % 2]), list(SAID.values())[i % 4])
             for i in range(12)]  # fmt: skip
    logits, num_output = logits_of(12, seed=3), np.array([len(said[1]) for _, said in cases], np.int32)

    def tokens_of(order):
        counts, rows = counts_of([cases[i][1] for i in order]), rows_of([cases[i][0] for i in order])
        return np.asarray(drawn(len(order), VOCAB)(logits[order], counts, rows, num_output[order]))

    together = tokens_of(np.arange(12))
    order = rng.permutation(12)
    np.testing.assert_array_equal(tokens_of(order), together[order])
    for i in range(12):
        assert tokens_of(np.array([i]))[0] == together[i] == next_token(logits[i], *cases[i][1], cases[i][0])


@pytest.mark.parametrize("seed", [0, 1, -1, 2**31 - 1, -(2**31)])
def test_noise_changes_with_the_seed_and_with_the_number_of_tokens_said(seed):
    logits = jnp.zeros((64, 1000))
    counts = TokenCounts.zeros(64, 1000)
    said = jnp.arange(64, dtype=jnp.int32)
    tokens = drawn(64, 1000)(logits, counts, rows_of([Parameters(1.0, seed)] * 64), said)
    other = drawn(64, 1000)(logits, counts, rows_of([Parameters(1.0, seed ^ 1)] * 64), said)
    assert len(set(tokens.tolist())) > 48 and np.mean(tokens == other) < 0.1
    again = drawn(64, 1000)(logits, counts, rows_of([Parameters(1.0, seed)] * 64), said)
    np.testing.assert_array_equal(tokens, again)


def test_temperature_zero_takes_the_best_penalised_token():
    p = Parameters(0.0, 5, top_k=3, top_p=0.1, presence_penalty=50.0)
    logits = logits_of(9)
    best = np.argsort(-logits, axis=1)
    said = [([], [int(b)]) for b in best[:, 0]]
    tokens = drawn(9, VOCAB)(jnp.asarray(logits), counts_of(said), rows_of([p] * 9), jnp.ones(9, jnp.int32))
    np.testing.assert_array_equal(tokens, best[:, 1])
    assert tokens.dtype == jnp.int32


def test_small_temperatures_are_greedy_too():
    logits = logits_of(9)
    tokens = drawn(9, VOCAB)(
        jnp.asarray(logits), TokenCounts.zeros(9, VOCAB), rows_of([Parameters(1e-7, i) for i in range(9)]),
        jnp.zeros(9, jnp.int32),
    )  # fmt: skip
    np.testing.assert_array_equal(tokens, logits.argmax(axis=1))


@pytest.mark.parametrize("num_top", [1, 5, VOCAB])
@pytest.mark.parametrize("scale", [1, 50])
def test_logprobs_equal_scipys(num_top, scale):
    logits = logits_of(6) * scale
    token_ids = np.array([0, 22, 3, 4, 5, 6])
    chosen, ids, top = token_logprobs(jnp.asarray(logits), jnp.asarray(token_ids), num_top)
    want = scipy.special.log_softmax(logits.astype(np.float64), axis=1)
    np.testing.assert_allclose(chosen, want[np.arange(6), token_ids], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(ids, np.argsort(-logits, axis=1)[:, :num_top])
    np.testing.assert_allclose(top, -np.sort(-want, axis=1)[:, :num_top], rtol=1e-5, atol=1e-5)
    assert ids.dtype == jnp.int32


# TokenCounts


def chunk(counts, tokens, start, num_tokens, num_prompt, slot=0, reset=0):
    """One row's chunk."""
    width = len(tokens)
    positions = jnp.asarray([np.arange(start, start + width)])
    valid = jnp.asarray([np.arange(width) < num_tokens])
    return counts.with_chunk(
        jnp.asarray([tokens]), positions, valid, *(jnp.asarray([n], jnp.int32) for n in (num_prompt, slot, reset))
    )


def said_by(counts, slot=0):
    output = np.asarray(counts.output[slot])
    return set(np.flatnonzero(counts.prompt_seen[slot])), {int(t): int(output[t]) for t in np.flatnonzero(output)}


def test_chunks_count_prompt_and_output_apart():
    """Prompt 1 2 2 | 3, then output 2 7 7, as a request computed again brings it: in chunks of 4."""
    counts = chunk(TokenCounts.zeros(2, 9), [1, 2, 2, 3], 0, 4, 4, reset=1)
    assert said_by(counts) == ({1, 2, 3}, {})
    counts = chunk(counts, [2, 7, 7, 8], 4, 3, 4)
    assert said_by(counts) == ({1, 2, 3}, {2: 1, 7: 2}), "8 is padding"
    assert said_by(counts, slot=1) == (set(), {})


def test_a_short_chunk_within_the_prompt_counts_its_own_tokens_alone():
    counts = chunk(TokenCounts.zeros(1, 9), [1, 2, 3], 0, 2, 8, reset=1)
    assert said_by(counts) == ({1, 2}, {})


def test_a_chunk_across_the_end_of_the_prompt():
    counts = chunk(TokenCounts.zeros(1, 9), [1, 2, 3, 1], 2, 4, 4, reset=1)
    assert said_by(counts) == ({1, 2}, {3: 1, 1: 1})


def test_a_reset_forgets_its_own_slot_alone():
    counts = TokenCounts(jnp.ones((3, 9), bool), jnp.full((3, 9), 4, jnp.int32))
    counts = chunk(counts, [5, 6], 0, 2, 2, slot=1, reset=1)
    assert said_by(counts, slot=1) == ({5, 6}, {})
    assert all(said_by(counts, slot) == (set(range(9)), dict.fromkeys(range(9), 4)) for slot in (0, 2))


def test_an_idle_prefill_row_counts_nothing():
    """Idle rows name slot 0 and token 0, which belong to someone else."""
    before = chunk(TokenCounts.zeros(2, 9), [4], 0, 1, 1, reset=1)
    after = chunk(before, [0, 0], 0, 0, 0)
    assert said_by(after) == said_by(before)


def test_sampled_tokens_are_counted_where_one_was_emitted():
    counts = TokenCounts.zeros(3, 9)
    tokens, slot = jnp.asarray([4, 4, 4]), jnp.asarray([2, 0, 1])
    for emitted in ([1, 1, 0], [1, 0, 0]):
        counts = counts.with_token(tokens, jnp.asarray(emitted, bool), slot)
    assert [said_by(counts, s)[1] for s in range(3)] == [{4: 1}, {}, {4: 2}]


def test_idle_decode_rows_beside_their_slots_owner_count_nothing():
    """Two rows that name one slot, one of them idle."""
    emitted, slot = jnp.asarray([True, False]), jnp.zeros(2, jnp.int32)
    counts = TokenCounts.zeros(1, 9).with_token(jnp.asarray([4, 4]), emitted, slot)
    assert said_by(counts)[1] == {4: 1}


def test_at_slots_gives_each_row_its_own():
    counts = TokenCounts(jnp.eye(3, 9, dtype=bool), jnp.arange(27).reshape(3, 9))
    rows = counts.at_slots(jnp.asarray([2, 0]))
    np.testing.assert_array_equal(rows.output, counts.output[np.array([2, 0])])
    np.testing.assert_array_equal(rows.prompt_seen, counts.prompt_seen[np.array([2, 0])])
