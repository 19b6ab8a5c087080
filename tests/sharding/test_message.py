"""The message: whatever bits go in come out, for any width and capacity, in exactly the words promised."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.sharding.message import HEADER_WORDS, MessageFormat

SIZES = pytest.mark.parametrize(("capacity", "width", "k"), [(1, 1, 1), (3, 5, 2), (4, 7, 3), (7, 24, 8)])
DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
LEADING = pytest.mark.parametrize("leading", [(), (2, 3)])


def bits_of(array) -> np.ndarray:
    array = np.asarray(array)
    return array.view({2: np.uint16, 4: np.uint32}[array.dtype.itemsize])


def random_bits(rng, shape, dtype):
    """Any bits at all: NaNs with payloads, signalling ones, infinities, subnormals, negative zeros."""
    size = jnp.dtype(dtype).itemsize
    return rng.integers(0, 2 ** (8 * size), shape, dtype=np.uint64).astype(f"u{size}").view(jnp.dtype(dtype))


@LEADING
@DTYPES
@SIZES
def test_hidden_comes_back_bit_by_bit(capacity, width, k, dtype, leading):
    form = MessageFormat(capacity, width, k, jnp.dtype(dtype))
    hidden = random_bits(np.random.default_rng(0), (*leading, capacity, width), dtype)
    words = jax.jit(form.pack_hidden)(hidden)
    assert words.shape == (*leading, form.hidden_words) and words.dtype == jnp.uint32
    back = jax.jit(form.unpack_hidden)(words)
    assert back.shape == hidden.shape and back.dtype == hidden.dtype
    np.testing.assert_array_equal(bits_of(back), bits_of(hidden))


@pytest.mark.parametrize("width", [256, 255])
def test_every_bfloat16_survives(width):
    patterns = np.resize(np.arange(2**16, dtype=np.uint16), (257, width))
    form = MessageFormat(257, width, 1, jnp.dtype("bfloat16"))
    back = jax.jit(lambda h: form.unpack_hidden(form.pack_hidden(h)))(patterns.view(jnp.bfloat16))
    np.testing.assert_array_equal(bits_of(back), patterns)


def test_nan_payloads_of_float32_survive():
    patterns = [0x7F800001, 0x7FC00001, 0xFFBFFFFF, 0x7FFFFFFF, 0xFF800000, 0x00000001, 0x80000000, 0]
    patterns = np.array(patterns, np.uint32)
    form = MessageFormat(4, 2, 2, jnp.dtype("float32"))
    floats = patterns.view(np.float32).reshape(4, 2)
    for pack, unpack in ((form.pack_hidden, form.unpack_hidden), (form.pack_weights, form.unpack_weights)):
        np.testing.assert_array_equal(np.asarray(jax.jit(pack)(floats)), patterns)
        np.testing.assert_array_equal(bits_of(jax.jit(unpack)(patterns)).reshape(-1), patterns)


@LEADING
@SIZES
def test_weights_come_back_bit_by_bit(capacity, width, k, leading):
    form = MessageFormat(capacity, width, k, jnp.dtype("bfloat16"))
    weights = random_bits(np.random.default_rng(1), (*leading, capacity, k), "float32")
    words = jax.jit(form.pack_weights)(weights)
    assert words.shape == (*leading, form.weight_words) and words.dtype == jnp.uint32
    np.testing.assert_array_equal(bits_of(jax.jit(form.unpack_weights)(words)), bits_of(weights))


@LEADING
@SIZES
def test_ids_come_back_over_the_whole_range_of_int32(capacity, width, k, leading):
    """A float32 holds no integer above 2^24 for sure, a bfloat16 not even 257."""
    form = MessageFormat(capacity, width, k, jnp.dtype("bfloat16"))
    rng = np.random.default_rng(2)
    slot = rng.integers(2**24, 2**31, (*leading, capacity)).astype(np.int32) | 1
    local_idx = rng.integers(-(2**31), 2**31, (*leading, capacity, k)).astype(np.int32)
    local_idx[..., 0] = 2**24 + 1
    words = jax.jit(form.pack_ids)(slot, local_idx)
    assert words.shape == (*leading, capacity * (1 + k)) and words.dtype == jnp.uint32
    back = jax.jit(form.unpack_ids)(words)
    np.testing.assert_array_equal(back[0], slot)
    np.testing.assert_array_equal(back[1], local_idx)


@DTYPES
@SIZES
def test_word_counts_are_what_the_parts_add_up_to(capacity, width, k, dtype):
    form = MessageFormat(capacity, width, k, jnp.dtype(dtype))
    parts = (
        form.pack_hidden(jnp.zeros((capacity, width), dtype)),
        form.pack_weights(jnp.zeros((capacity, k))),
        form.pack_ids(jnp.zeros(capacity, jnp.int32), jnp.zeros((capacity, k), jnp.int32)),
    )
    words = [part.shape[0] for part in parts]
    assert form.dispatch_words == HEADER_WORDS + sum(words)
    assert form.combine_words == HEADER_WORDS + words[0]
    needed = capacity * form.row_bytes + 4 * HEADER_WORDS
    assert needed <= 4 * form.dispatch_words < needed + 4, "padding of one word at most"
