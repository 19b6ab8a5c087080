"""Where a model runs if nobody says."""

import pytest

from jmoe.serving import host_devices
from jmoe.sharding.mesh_config import MeshConfig


@pytest.mark.parametrize(("visible", "count"), [("", 0), ("0", 1), ("2,3", 2), ("-1", 0), ("GPU-8f3a, GPU-9b1c", 2)])
def test_gpus_that_are_left_visible(monkeypatch, visible, count):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert host_devices.count_gpus() == count


@pytest.mark.parametrize(
    ("platform", "gpus", "mesh"),
    [("gpu", 1, MeshConfig.colocate(1)), ("gpu", 2, MeshConfig()), ("cpu", 1, MeshConfig())],
)
def test_one_gpu_is_colocated_by_default(monkeypatch, platform, gpus, mesh):
    monkeypatch.setattr(host_devices, "detect_platform", lambda: platform)
    monkeypatch.setattr(host_devices, "count_gpus", lambda: gpus)
    assert host_devices.default_mesh() == mesh
