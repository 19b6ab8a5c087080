"""tensor_share: ranks' parts put together give the whole array, KV heads are replicated, the vocabulary is padded."""

import numpy as np
import pytest

from jmoe.sharding.partition import pad_to, tensor_share


def parts_of(array, axes, size):
    """Each rank's part, padded."""
    parts = []
    for rank in range(size):
        slices, shape = tensor_share(array.shape, axes, size, rank)
        parts.append(pad_to(array[slices], shape))
        assert parts[-1].shape == shape and parts[-1].dtype == array.dtype
    return parts


def numbered(*shape):
    return np.arange(1, 1 + np.prod(shape), dtype=np.float32).reshape(shape)


@pytest.mark.parametrize("axis", ["heads", "kv_heads", "mlp"])
@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_even_axes_split_into_equal_runs_in_rank_order(axis, size):
    whole = numbered(4, 6, 5)
    np.testing.assert_array_equal(np.concatenate(parts_of(whole, (None, axis, None), size), axis=1), whole)


@pytest.mark.parametrize(("heads", "size"), [(1, 4), (2, 4), (2, 8), (3, 6), (3, 12)])
def test_kv_heads_are_replicated_where_there_are_more_ranks(heads, size):
    """Rank r holds the KV head of its query heads: query heads are split in rank order, so heads stay in order too."""
    whole = numbered(heads, 3)
    parts = parts_of(whole, ("kv_heads", None), size)
    for rank, part in enumerate(parts):
        np.testing.assert_array_equal(part, whole[rank // (size // heads)][None])


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_each_query_head_stands_with_its_kv_head(num_kv_heads, size):
    num_heads = 8
    q_parts = parts_of(np.arange(num_heads), ("heads",), size)
    kv_parts = parts_of(np.arange(num_kv_heads), ("kv_heads",), size)
    for q, kv in zip(q_parts, kv_parts, strict=True):
        group = len(q) // len(kv)
        assert [kv[i // group] for i in range(len(q))] == [head // (num_heads // num_kv_heads) for head in q]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("length", [131, 9, 8, 5])
def test_the_vocabulary_is_padded_behind_its_end_with_zeros(length, size):
    whole = numbered(length, 2)
    joined = np.concatenate(parts_of(whole, ("vocab", None), size))
    assert len(joined) % size == 0 and len(joined) >= length
    np.testing.assert_array_equal(joined[:length], whole)
    assert not joined[length:].any()


def test_experts_and_unnamed_axes_stay_whole():
    whole = numbered(5, 7, 4)
    for part in parts_of(whole, ("expert", None, "mlp"), 2):
        assert part.shape == (5, 7, 2)


@pytest.mark.parametrize(
    ("axis", "length", "size", "rule"),
    [
        ("heads", 9, 2, "a divisor of 9"),
        ("heads", 2, 4, "a divisor of 2"),
        ("mlp", 66, 4, "a divisor of 66"),
        ("kv_heads", 3, 2, "a divisor or a multiple of 3"),
        ("kv_heads", 3, 4, "a divisor or a multiple of 3"),
        ("kv_heads", 6, 4, "a divisor or a multiple of 6"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(axis, length, size, rule):
    with pytest.raises(ValueError, match=f"parallelism over {axis}: expected {rule} as the tensor size, got {size}"):
        tensor_share((length, 4), (axis, None), size, 0)


def test_padding_never_cuts():
    with pytest.raises(ValueError):
        pad_to(numbered(3, 2), (2, 2))
    assert pad_to(whole := numbered(2, 2), (2, 2)) is whole
