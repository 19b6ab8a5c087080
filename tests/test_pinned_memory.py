"""PinnedMemory: what it pins it lets go, and CPU devices need none."""

import mmap
import types

import jax
import numpy as np
import pytest

from jmoe.pinned_memory import PinnedMemory, address_of


class Client:
    def __init__(self):
        self.mapped = {}

    def dma_map(self, address, size):
        assert address not in self.mapped
        self.mapped[address] = size

    def dma_unmap(self, address):
        del self.mapped[address]


@pytest.fixture
def client():
    return Client()


@pytest.fixture
def gpus(client):
    return [types.SimpleNamespace(platform="gpu", client=client)] * 2


def test_nothing_stays_pinned(client, gpus):
    one, other = mmap.mmap(-1, 1 << 16), mmap.mmap(-1, 1 << 17)
    with PinnedMemory(gpus) as pins:
        pins.pin(one)
        pins.pin(other)
        assert client.mapped == {address_of(one): 1 << 16, address_of(other): 1 << 17}
        pins.unpin(one)
        assert list(client.mapped) == [address_of(other)]
    assert not client.mapped
    pins.unpin(other)  # what is idle may be given back later


def test_it_is_the_memorys_own_address():
    memory = mmap.mmap(-1, 1 << 16)
    array = np.frombuffer(memory, np.uint8)
    assert address_of(memory) == array.__array_interface__["data"][0]


def test_cpu_devices_need_none():
    with PinnedMemory(jax.devices("cpu")) as pins:
        pins.pin(memory := mmap.mmap(-1, 1 << 16))
        pins.unpin(memory)


def test_memory_that_cannot_be_pinned_serves_as_it_is(client, gpus, monkeypatch, caplog):
    def refuse(address, size):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no more can be pinned")

    one, other = mmap.mmap(-1, 1 << 16), mmap.mmap(-1, 1 << 16)
    with PinnedMemory(gpus) as pins:
        pins.pin(one)
        monkeypatch.setattr(client, "dma_map", refuse)
        pins.pin(other)
        pins.pin(other)
        pins.unpin(other)
        assert list(client.mapped) == [address_of(one)]
    assert not client.mapped and [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.mark.gpu
def test_a_gpu_takes_pinned_memory():
    gpus = [d for d in jax.devices() if d.platform == "gpu"]
    if not gpus:
        pytest.skip(f"needs a CUDA GPU (got {jax.default_backend()})")
    memory = mmap.mmap(-1, 64 << 20)
    host = np.frombuffer(memory, np.uint8)
    host[:] = np.arange(len(host)) % 251
    with PinnedMemory(gpus) as pins:
        pins.pin(memory)
        there = jax.block_until_ready(jax.device_put(host, gpus[0]))
    np.testing.assert_array_equal(there, host)
