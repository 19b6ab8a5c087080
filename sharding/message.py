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
    def weight_words(self) -> int:
        return self.capacity * self.num_experts_per_tok

    @property
    def dispatch_words(self) -> int:
        return HEADER_WORDS + self.hidden_words + 2 * self.weight_words + self.capacity

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

    def pack_weights(self, topk_weights: jax.Array) -> jax.Array:
        """`[..., capacity, k]` float32 -> `[..., capacity * k]` uint32."""
        words = jax.lax.bitcast_convert_type(topk_weights.astype(jnp.float32), jnp.uint32)
        return words.reshape(*words.shape[:-2], -1)

    def unpack_weights(self, words: jax.Array) -> jax.Array:
        """The inverse of `pack_weights`."""
        shape = (*words.shape[:-1], self.capacity, self.num_experts_per_tok)
        return jax.lax.bitcast_convert_type(words, jnp.float32).reshape(shape)

    def pack_ids(self, slot: jax.Array, local_idx: jax.Array) -> jax.Array:
        """`[..., capacity]` and `[..., capacity, k]` int32 -> `[..., capacity * (1 + k)]` uint32."""
        ids = jnp.concatenate([slot, local_idx.reshape(*slot.shape[:-1], -1)], axis=-1)
        return jax.lax.bitcast_convert_type(ids, jnp.uint32)

    def unpack_ids(self, words: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The inverse of `pack_ids`."""
        ids = jax.lax.bitcast_convert_type(words, jnp.int32)
        slot, local_idx = ids[..., : self.capacity], ids[..., self.capacity :]
        return slot, local_idx.reshape(*slot.shape, self.num_experts_per_tok)
