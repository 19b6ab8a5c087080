"""One process of virtual CPU devices for all tests; GPU tests skip with a reason where there is none."""

import os
import sys

# Before JAX starts: XLA's CPU thread pool must have more threads than devices that meet in a collective.
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, os.path.dirname(__file__))

import pytest

NUM_CPU_DEVICES = 10


def pytest_configure(config):
    import jax

    if os.environ["JAX_PLATFORMS"] == "cpu":
        jax.config.update("jax_num_cpu_devices", NUM_CPU_DEVICES)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """What `-n auto` means: a worker takes some 2 GB, and compiles on more than one core."""
    return max(1, min(os.cpu_count() or 1, 8))


def pytest_collection_modifyitems(config, items):
    if os.environ["JAX_PLATFORMS"] != "cpu":
        return
    no_gpu = pytest.mark.skip(reason="needs a CUDA GPU (JAX_PLATFORMS=cpu here)")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(no_gpu)
