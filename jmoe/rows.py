"""Rows: a micro-batch's requests on device, unpacked from `StepInputs` and moved on step by step."""

import dataclasses

import jax
import jax.numpy as jnp

from jmoe.sampling import SamplingRows
from jmoe.step_inputs import FLOAT_COLUMNS, OWN_TOKEN, StepLayout


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """One micro-batch of one replica; every field `[rows]` int32 unless noted. `StepInputs` says what each means."""

    token_ids: jax.Array  # [rows, chunk]
    start_pos: jax.Array
    num_tokens: jax.Array
    slot: jax.Array
    sample: jax.Array
    remaining: jax.Array
    num_prompt: jax.Array
    reset: jax.Array
    stop_ids: jax.Array  # [rows, stops]
    page_table: jax.Array  # [rows, pages]
    sampling: SamplingRows

    @classmethod
    def unpack(cls, packed: jax.Array, layout: StepLayout) -> "Rows":
        """From one micro-batch's `[rows, width]` int32."""
        columns = {}
        for name, where in layout.columns.items():
            part = packed[:, where]
            if name in FLOAT_COLUMNS:
                part = jax.lax.bitcast_convert_type(part, jnp.float32)
            columns[name] = part if name in ("token_ids", "stop_ids", "page_table") else part[:, 0]
        sampling = SamplingRows(**{f.name: columns.pop(f.name) for f in dataclasses.fields(SamplingRows)})
        return cls(**columns, sampling=sampling)

    @property
    def positions(self) -> jax.Array:
        """[rows, chunk] int32."""
        return self.start_pos[:, None] + jnp.arange(self.token_ids.shape[1], dtype=jnp.int32)

    @property
    def valid(self) -> jax.Array:
        """[rows, chunk] bool: tokens that are there."""
        return jnp.arange(self.token_ids.shape[1], dtype=jnp.int32) < self.num_tokens[:, None]

    @property
    def last(self) -> jax.Array:
        """[rows] int32: column of the last valid token (0 in idle rows)."""
        return jnp.maximum(self.num_tokens - 1, 0)

    @property
    def emits(self) -> jax.Array:
        """[rows] bool: rows that sample a token in this step."""
        return (self.num_tokens > 0) & (self.sample > 0)

    @property
    def num_output(self) -> jax.Array:
        """[rows] int32: output tokens so far, which is also the index of the one sampled now."""
        return self.start_pos + self.num_tokens - self.num_prompt

    def following(self, token_ids: jax.Array) -> jax.Array:
        """[rows] int32: the sampled token, or -1 where it stops the row, uses up its budget or is none."""
        stopped = (token_ids[:, None] == self.stop_ids).any(axis=-1)
        return jnp.where(self.emits & ~stopped & (self.remaining > 1), token_ids, -1)

    def advance(self, token_ids: jax.Array) -> "Rows":
        """The next decode step: the sampled token becomes the input; a stop token or an empty budget idles the row."""
        following = self.following(token_ids)
        return dataclasses.replace(
            self,
            token_ids=jnp.maximum(following, 0)[:, None],
            start_pos=self.start_pos + self.num_tokens,
            num_tokens=(following >= 0).astype(jnp.int32),
            remaining=self.remaining - self.emits,
        )

    def resume(self, next_ids: jax.Array) -> "Rows":
        """Decode rows with what their slots fed next `[rows]` int32 in place of OWN_TOKEN; an ended slot idles."""
        own = self.token_ids[:, 0] == OWN_TOKEN
        token_ids = jnp.where(own, next_ids, self.token_ids[:, 0])
        return dataclasses.replace(
            self, token_ids=jnp.maximum(token_ids, 0)[:, None], num_tokens=jnp.where(token_ids < 0, 0, self.num_tokens)
        )

    def next_ids(self, before: jax.Array, started: jax.Array) -> jax.Array:
        """[rows] int32: what each slot feeds next after decode steps that began with rows `started` [rows] bool."""
        return jnp.where(started, jnp.where(self.num_tokens > 0, self.token_ids[:, 0], -1), before)

    def first_ids(self, before: jax.Array, token_ids: jax.Array) -> jax.Array:
        """[slots] int32: `before`, with the tokens `[rows]` that a prefill call sampled, in their slots."""
        following = jnp.where(self.emits, self.following(token_ids), before[self.slot])
        return before.at[self.slot].set(following)
