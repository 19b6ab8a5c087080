"""The message: header and rows in one buffer of 32-bit words, by bitcast and never through a float cast."""

import dataclasses
import math

import jax
import jax.numpy as jnp

HEADER_WORDS = 2  # sequence number, row count


@dataclasses.dataclass(frozen=True)
class MessageFormat:
    """Sizes of one message between a replica and a node, for one slice of the hidden vector.

    A row is its hidden slice and, outward, its token slot, k local expert ids and k weights. Columns stand together
    (all hidden slices, all slots, ...): each part then unpacks with one bitcast.
    """

    capacity: int
    width: int  # hidden elements of one slice
    num_experts_per_tok: int
    dtype: jnp.dtype

    @property
    def hidden_words(self) -> int:
        return math.ceil(self.capacity * self.width * self.dtype.itemsize / 4)

    @property
    def metadata_words(self) -> int:
        return self.capacity * (1 + 2 * self.num_experts_per_tok)

    @property
    def dispatch_words(self) -> int:
        return HEADER_WORDS + self.hidden_words + self.metadata_words

    @property
    def combine_words(self) -> int:
        return HEADER_WORDS + self.hidden_words

    @property
    def row_bytes(self) -> int:
        """Bytes that one row outward needs, without padding or header."""
        return self.width * self.dtype.itemsize + 4 * (1 + 2 * self.num_experts_per_tok)

    def pack_hidden(self, hidden: jax.Array) -> jax.Array:
        """`[..., capacity, width]` -> `[..., hidden_words]` uint32."""
        flat = hidden.reshape(*hidden.shape[:-2], -1)
        per_word = 4 // self.dtype.itemsize
        if per_word == 1:
            return jax.lax.bitcast_convert_type(flat, jnp.uint32)
        if padding := self.hidden_words * per_word - flat.shape[-1]:
            flat = jnp.concatenate([flat, jnp.zeros((*flat.shape[:-1], padding), flat.dtype)], axis=-1)
        return jax.lax.bitcast_convert_type(flat.reshape(*flat.shape[:-1], -1, per_word), jnp.uint32)

    def unpack_hidden(self, words: jax.Array) -> jax.Array:
        """The inverse of `pack_hidden`."""
        flat = jax.lax.bitcast_convert_type(words, self.dtype)
        flat = flat.reshape(*words.shape[:-1], -1)[..., : self.capacity * self.width]
        return flat.reshape(*words.shape[:-1], self.capacity, self.width)

    def pack_metadata(self, slot: jax.Array, local_idx: jax.Array, topk_weights: jax.Array) -> jax.Array:
        """`[..., capacity]`, `[..., capacity, k]` twice -> `[..., metadata_words]` uint32."""
        lead = slot.shape[:-1]
        parts = (slot.astype(jnp.int32), local_idx.astype(jnp.int32), topk_weights.astype(jnp.float32))
        return jnp.concatenate(
            [jax.lax.bitcast_convert_type(p, jnp.uint32).reshape(*lead, -1) for p in parts], axis=-1
        )

    def unpack_metadata(self, words: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The inverse of `pack_metadata`: (slot, local_idx, topk_weights)."""
        lead, k, c = words.shape[:-1], self.num_experts_per_tok, self.capacity
        slot, ids, weights = jnp.split(words, [c, c + c * k], axis=-1)
        as_int = jax.lax.bitcast_convert_type(ids, jnp.int32).reshape(*lead, c, k)
        as_float = jax.lax.bitcast_convert_type(weights, jnp.float32).reshape(*lead, c, k)
        return jax.lax.bitcast_convert_type(slot, jnp.int32), as_int, as_float
