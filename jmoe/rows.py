"""Rows: a micro-batch's requests on device, unpacked from `StepInputs` and moved on step by step."""

import dataclasses

import jax
import jax.numpy as jnp

from jmoe.sampling import SamplingRows
from jmoe.step_inputs import FLOAT_COLUMNS, StepLayout


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

    def advance(self, token_ids: jax.Array) -> "Rows":
        """The next decode step: the sampled token becomes the input; a stop token or an empty budget idles the row."""
        stopped = (token_ids[:, None] == self.stop_ids).any(axis=-1)
        remaining = self.remaining - self.emits
        runs_on = self.emits & ~stopped & (remaining > 0)
        return dataclasses.replace(
            self,
            token_ids=jnp.where(runs_on, token_ids, 0)[:, None],
            start_pos=self.start_pos + self.num_tokens,
            num_tokens=runs_on.astype(jnp.int32),
            remaining=remaining,
        )
