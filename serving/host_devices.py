"""What this host has to run a model on, without starting JAX."""

import importlib.util
import os
import pathlib
from typing import Literal

from jmoe.sharding.mesh_config import MeshConfig


def detect_platform() -> Literal["cpu", "gpu"]:
    """ "gpu" where JAX_PLATFORMS allows it, a CUDA plugin is installed and an NVIDIA device is there."""
    allowed = os.environ.get("JAX_PLATFORMS", "")
    if allowed and not any(name in allowed for name in ("cuda", "gpu")):
        return "cpu"
    plugins = ("jax_cuda13_plugin", "jax_cuda12_plugin")
    has_plugin = any(importlib.util.find_spec(name) is not None for name in plugins)
    return "gpu" if has_plugin and pathlib.Path("/dev/nvidiactl").exists() else "cpu"


def count_gpus() -> int:
    """NVIDIA devices of this host that CUDA_VISIBLE_DEVICES leaves visible; asks no driver and starts no JAX."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() and name.strip() != "-1"])
    return len([path for path in pathlib.Path("/dev").glob("nvidia*") if path.name.removeprefix("nvidia").isdigit()])


def default_mesh() -> MeshConfig:
    """Where a model runs if nobody says: both roles on the GPU of a host with one, else one device for each role."""
    return MeshConfig.colocate(1) if detect_platform() == "gpu" and count_gpus() == 1 else MeshConfig()
