"""Sampling on device: penalties, temperature, min-p, top-k, top-p, a seed per request, log-probabilities."""

import dataclasses

import jax
import jax.numpy as jnp

MASKED = -1e30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingRows:
    """Each row's sampling parameters, `[rows]` (see `StepInputs` for what they mean and what switches them off)."""

    seed: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    presence_penalty: jax.Array
    frequency_penalty: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenCounts:
    """What each slot's request has seen and said: prompt_seen `[slots, V]` bool, output `[slots, V]` int32."""

    prompt_seen: jax.Array
    output: jax.Array

    @classmethod
    def zeros(cls, slots: int, vocab_size: int) -> "TokenCounts":
        return cls(jnp.zeros((slots, vocab_size), bool), jnp.zeros((slots, vocab_size), jnp.int32))

    def at_slots(self, slot: jax.Array) -> "TokenCounts":
        """The rows' own counts: `[rows, V]`."""
        return TokenCounts(self.prompt_seen[slot], self.output[slot])

    def with_chunk(self, token_ids, positions, valid, num_prompt, slot, reset) -> "TokenCounts":
        """Counts a prefill chunk `[rows, chunk]`: tokens before num_prompt are prompt, later ones output.

        A request that is computed again after preemption brings its own output in such chunks.
        """
        keep = ~(reset > 0)
        seen = self.prompt_seen.at[slot].set(self.prompt_seen[slot] & keep[:, None])
        output = self.output.at[slot].set(self.output[slot] * keep[:, None])
        is_prompt = positions < num_prompt[:, None]
        where = jnp.broadcast_to(slot[:, None], token_ids.shape)
        seen = seen.at[where, token_ids].max(valid & is_prompt)
        output = output.at[where, token_ids].add((valid & ~is_prompt).astype(jnp.int32))
        return TokenCounts(seen, output)

    def with_token(self, token_ids: jax.Array, emitted: jax.Array, slot: jax.Array) -> "TokenCounts":
        """Counts one sampled token a row, where one was emitted."""
        return TokenCounts(self.prompt_seen, self.output.at[slot, token_ids].add(emitted.astype(jnp.int32)))


def penalize(logits: jax.Array, counts: TokenCounts, rows: SamplingRows) -> jax.Array:
    """Repetition (divide or multiply by r), presence and frequency (subtract) penalties on `[rows, V]` logits.

    Repetition covers prompt and output (CTRL, arXiv 1909.05858), the other two output alone, as OpenAI defines them.
    """
    said = counts.output > 0
    factor = rows.repetition_penalty[:, None]
    repeated = jnp.where(logits > 0, logits / factor, logits * factor)
    logits = jnp.where(said | counts.prompt_seen, repeated, logits)
    logits = logits - counts.output * rows.frequency_penalty[:, None]
    return logits - said * rows.presence_penalty[:, None]


def truncate(logits: jax.Array, rows: SamplingRows) -> jax.Array:
    """Masks what min-p, top-k and top-p leave out of `[rows, V]` tempered logits; the best token always stays.

    min-p keeps tokens of probability at least min_p times the best one's; top-p the smallest set of most likely tokens
    whose probabilities reach top_p, among those that top-k left.
    """
    vocab = logits.shape[1]
    best = jnp.max(logits, axis=-1, keepdims=True)
    logits = jnp.where(logits >= best + jnp.log(rows.min_p)[:, None], logits, MASKED)  # log 0 = -inf keeps all
    ordered = jnp.sort(logits, axis=-1, descending=True)
    top_k = jnp.where(rows.top_k > 0, jnp.minimum(rows.top_k, vocab), vocab)
    rank = jnp.arange(vocab, dtype=jnp.int32)
    ordered = jnp.where(rank < top_k[:, None], ordered, MASKED)
    probs = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs  # probability of everything more likely
    top_p = jnp.where(rows.top_p < 1, rows.top_p, jnp.inf)[:, None]  # the sum rounds up to 1 long before the last token
    kept = ((before < top_p) | (rank == 0)) & (ordered > MASKED)
    least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, MASKED)


def sample(logits: jax.Array, counts: TokenCounts, rows: SamplingRows, num_output: jax.Array) -> jax.Array:
    """One token a row: argmax of the penalised logits at temperature 0, else Gumbel-max over the truncated ones.

    The noise depends on (seed, num_output) alone, so a request draws the same tokens in any batch.

    Args:
      logits: `[rows, V]` float32; counts: `[rows, V]`; num_output: `[rows]` int32, tokens that the request has said.

    Returns:
      `[rows]` int32.
    """
    penalized = penalize(logits, counts, rows)
    greedy = jnp.argmax(penalized, axis=-1)
    tempered = penalized / jnp.maximum(rows.temperature, 1e-6)[:, None]
    keys = jax.vmap(lambda seed, n: jax.random.fold_in(jax.random.key(seed), n))(rows.seed, num_output)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], jnp.float32))(keys)
    drawn = jnp.argmax(truncate(tempered, rows) + noise, axis=-1)
    return jnp.where(rows.temperature > 0, drawn, greedy).astype(jnp.int32)


def token_logprobs(logits: jax.Array, token_ids: jax.Array, num_top: int):
    """Log-probabilities under the model's own logits: of the chosen tokens, and the `num_top` likeliest with their ids.

    Returns:
      `[rows]`, `[rows, num_top]` ids int32, `[rows, num_top]`.
    """
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(logprobs, token_ids[:, None], axis=-1)[:, 0]
    top, ids = jax.lax.top_k(logprobs, num_top)
    return chosen, ids.astype(jnp.int32), top
