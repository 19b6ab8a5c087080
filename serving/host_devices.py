"""What this host has to run a model on, without starting JAX."""

import ctypes
import importlib.util
import itertools
import os
import pathlib
from typing import Any, Literal

from jmoe.sharding.mesh_config import MeshConfig

_P2P_WRITE, _P2P_OK = 1, 0  # nvmlGpuP2PCapsIndex_t, nvmlGpuP2PStatus_t


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


def no_peer_access(num_gpus: int) -> str | None:
    """Why the first `num_gpus` GPUs of this host can't push rows into each other's memory; None if they can.

    Asks the management library (NVML), which makes no context on a GPU: that is the workers' business.
    """
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError as error:
        return f"the driver's management library can't be loaded: {error}"
    if status := library.nvmlInit_v2():
        return f"the driver's management library does not start: NVML error {status}"
    try:
        gpus = _visible_gpus(library)
        if len(gpus) < num_gpus:
            return f"expected {num_gpus} GPUs on this host, got {len(gpus)}"
        for index, gpu in enumerate(gpus[:num_gpus]):
            major, minor = ctypes.c_int(), ctypes.c_int()
            library.nvmlDeviceGetCudaComputeCapability(gpu, ctypes.byref(major), ctypes.byref(minor))
            if major.value != 9:
                return f"GPU {index} is of compute capability {major.value}.{minor.value}, not of 9.x (Hopper)"
        for (i, a), (j, b) in itertools.permutations(enumerate(gpus[:num_gpus]), 2):
            status = ctypes.c_int(-1)
            if library.nvmlDeviceGetP2PStatus(a, b, _P2P_WRITE, ctypes.byref(status)) or status.value != _P2P_OK:
                return f"GPU {i} can't write into the memory of GPU {j} (NVML peer status {status.value})"
        return None
    finally:
        library.nvmlShutdown()


def _visible_gpus(library: Any) -> list[ctypes.c_void_p]:
    """NVML's handles of the GPUs that CUDA_VISIBLE_DEVICES leaves visible (numbers or UUIDs), in its order."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        count = ctypes.c_uint()
        library.nvmlDeviceGetCount_v2(ctypes.byref(count))
        names = [str(i) for i in range(count.value)]
    else:
        names = [name.strip() for name in visible.split(",") if name.strip()]
    gpus = []
    for name in names:
        gpu = ctypes.c_void_p()
        by_number = name.isdigit()
        wanted = ctypes.c_uint(int(name)) if by_number else name.encode()
        find = library.nvmlDeviceGetHandleByIndex_v2 if by_number else library.nvmlDeviceGetHandleByUUID
        if find(wanted, ctypes.byref(gpu)) == 0:
            gpus.append(gpu)
    return gpus


def default_mesh() -> MeshConfig:
    """Where a model runs if nobody says: both roles on the GPU of a host with one, else one device for each role."""
    return MeshConfig.colocate(1) if detect_platform() == "gpu" and count_gpus() == 1 else MeshConfig()
