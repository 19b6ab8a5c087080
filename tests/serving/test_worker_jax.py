"""How a worker starts JAX: joined to others where there are any, and with nothing that a start does not need."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from jmoe.serving import worker_jax

INIT = {"coordinator": "127.0.0.1:1", "process_id": 0, "timeout_s": 5.0, "num_devices": 2}


@pytest.fixture
def started():
    """A stand-in for JAX, and what was asked of it."""
    asked = {}
    jax = SimpleNamespace(
        config=SimpleNamespace(update=lambda name, value: asked.update({name: value})),
        distributed=SimpleNamespace(initialize=lambda address, **kwargs: asked.update(kwargs, coordinator=address)),
    )
    return jax, asked


@pytest.mark.parametrize(
    ("platform", "ids", "found"),
    [("cpu", None, {"jax_num_cpu_devices": 2}), ("gpu", [0, 3], {"jax_cuda_visible_devices": "0,3"})],
)
def test_a_worker_alone_starts_no_service_and_sees_its_own_devices(started, platform, ids, found):
    jax, asked = started
    worker_jax._join(jax, {**INIT, "platform": platform, "local_device_ids": ids, "num_processes": 1})
    assert asked == found


def test_workers_of_one_cell_join(started):
    jax, asked = started
    worker_jax._join(jax, {**INIT, "platform": "gpu", "local_device_ids": [1], "num_processes": 2})
    assert (asked["coordinator"], asked["num_processes"], asked["local_device_ids"]) == ("127.0.0.1:1", 2, [1])


def test_a_host_without_cuda_has_no_gpus_to_wake(monkeypatch):
    def no_library(name):
        raise OSError(name)

    monkeypatch.setattr(worker_jax.ctypes, "CDLL", no_library)
    worker_jax._wake_gpus([0])


def test_a_runtime_imports_no_mosaic():
    """A third of a second or more, which a start that finds its programs on disk spends while weights are read."""
    code = "import jmoe.cell_runtime, sys; print([m for m in sys.modules if m.startswith('jax.experimental.mosaic')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
