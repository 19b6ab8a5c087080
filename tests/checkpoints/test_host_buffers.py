"""HostBuffers: memory is used again once nobody can see it, and not before."""

import threading

import jax
import ml_dtypes
import numpy as np
import pytest

from jmoe.checkpoints import host_buffers
from jmoe.checkpoints.host_buffers import HostBuffers

SHAPE, BF16 = (4, 64, 32), np.dtype(ml_dtypes.bfloat16)


@pytest.fixture
def buffers(monkeypatch):
    monkeypatch.setattr(host_buffers, "SMALLEST", 1024)
    return HostBuffers()


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_memory_returns_with_the_last_view(buffers):
    array = buffers.empty(SHAPE, BF16)
    assert array.shape == SHAPE and array.dtype == BF16 and array.flags.c_contiguous and array.flags.writeable
    array[...] = 3
    before, view = address(array), array.transpose(0, 2, 1)[1:]
    del array
    other = buffers.empty(SHAPE, BF16)
    other[...] = 5
    assert address(other) != before and (view == 3).all()
    del view
    assert address(buffers.empty(SHAPE, BF16)) == before


def test_what_a_jax_array_may_share_is_not_used_again(buffers):
    """On CPU a device array may be the host's memory itself."""
    host = buffers.empty(SHAPE, BF16)
    host[...] = 3
    there = jax.block_until_ready(jax.device_put(host))
    del host
    for _ in range(3):
        buffers.empty(SHAPE, BF16)[...] = 5
    assert (np.asarray(there) == 3).all()


def test_other_sizes_get_memory_of_their_own_and_few_are_kept(buffers, monkeypatch):
    made, real = [], host_buffers.mmap.mmap
    monkeypatch.setattr(host_buffers.mmap, "mmap", lambda fd, size: made.append(size) or real(fd, size))
    held = [buffers.empty((n, 1024), BF16) for n in range(1, 8)]
    assert len(made) == 7
    del held
    held = [buffers.empty((n, 1024), BF16) for n in range(7, 0, -1)]
    assert len(made) == 14 - host_buffers.MOST_IDLE - 1, "the first of them was taken before others were let go"
    assert len({address(a) for a in held}) == 7


def test_small_arrays_are_numpys_own():
    assert HostBuffers().empty((2, 3), BF16).base is None


class Pins:
    def __init__(self):
        self.pinned = {}

    def pin(self, memory):
        self.pinned[id(memory)] = memory

    def unpin(self, memory):
        del self.pinned[id(memory)]


def test_memory_is_pinned_while_it_is_kept(buffers):
    """However often it is used, and never given back pinned."""
    buffers.pins = Pins()
    for _ in range(3):
        buffers.empty(SHAPE, BF16)
    assert len(buffers.pins.pinned) == 1
    held = [buffers.empty((n, 1024), BF16) for n in range(9, 16)]
    assert len(buffers.pins.pinned) == 8
    del held
    buffers.empty((20, 1024), BF16)
    assert len(buffers.pins.pinned) == host_buffers.MOST_IDLE + 1
    buffers.forget()
    assert not buffers.pins.pinned


def test_prepared_memory_serves_smaller_arrays_too(buffers, monkeypatch):
    buffers.prepare(1 << 20, 2)
    for thread in threading.enumerate():
        if thread.name == "host pages":
            thread.join(10)
    monkeypatch.setattr(host_buffers, "_mapped", None)  # nothing else may be made
    buffers.pins = Pins()
    one, other = buffers.empty(SHAPE, BF16), buffers.empty((1 << 19,), BF16)
    one[...], other[...] = 1, 2
    assert (one == 1).all() and one.shape == SHAPE and address(one) != address(other)


def test_little_is_not_prepared():
    before = threading.active_count()
    HostBuffers().prepare(host_buffers.SMALLEST - 1)
    assert threading.active_count() == before
