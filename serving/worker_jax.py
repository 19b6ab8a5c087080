"""Starts JAX inside a worker: its environment, its place in jax.distributed, and the cell's runtime on its devices."""

import contextlib
import ctypes
import os
import re
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from jmoe.cell_config import CellConfig
from jmoe.checkpoints.host_buffers import HostBuffers

if TYPE_CHECKING:  # running as __main__, the worker must not be imported a second time
    from jmoe.serving.worker import Runtime

# JAX's own heartbeat (default 100 s) only backs up the parent's supervision, which is far quicker.
_JAX_HEARTBEAT_S = 100


def start_jax_runtime(init: Mapping[str, Any]) -> "Runtime":
    """Joins this worker to its cell's jax.distributed and returns the runtime of its role.

    Args:
      init: the `init` command: `cell` (CellConfig.to_dict), `role`, `process_id`, `num_processes`, `platform` ("cpu"
        or "gpu"), `num_devices` (of this worker), `local_device_ids` (GPUs to use, None for CPU), `coordinator`
        (HOST:PORT of worker 0, which binds that address alone), `timeout_s` and `compile_cache` (a folder, "auto" or
        "off"), and `reads_files` (weights will come from a checkpoint folder).

    Raises:
      ValueError: other devices came up than the cell needs.
    """
    _set_environment(init["platform"], init["num_devices"])
    cell, buffers = CellConfig.from_dict(init["cell"]), HostBuffers()
    if init["platform"] == "gpu" and init["reads_files"]:
        buffers.prepare(cell.largest_array_bytes(init["role"]))
    if init["platform"] == "gpu":
        threading.Thread(target=_wake_gpus, args=(init["local_device_ids"],), name="wake GPUs", daemon=True).start()
    import jax

    _join(jax, init)
    with ThreadPoolExecutor(1, "devices") as pool:  # a GPU's backend takes a second, most of it without Python's lock
        starting = pool.submit(_first_devices, jax)
        from jmoe.cell_runtime import CellRuntime
        from jmoe.program_files import open_program_files

        devices = sorted(starting.result(), key=lambda d: (d.process_index, d.id))
    if len(devices) != cell.mesh.num_devices or jax.local_device_count() != init["num_devices"]:
        raise ValueError(
            f"worker {init['process_id']}: expected {init['num_devices']} devices here and {cell.mesh.num_devices} in "
            f"the cell, got {jax.local_device_count()} and {len(devices)} ({devices[0].platform})"
        )
    runtime = CellRuntime(cell, devices, init["role"], open_program_files(init["compile_cache"]))
    runtime.buffers = buffers
    return runtime


def _join(jax: Any, init: Mapping[str, Any]) -> None:
    """Says which devices JAX may see, and joins this worker to the others where there are any."""
    if init["platform"] == "cpu":
        jax.config.update("jax_num_cpu_devices", init["num_devices"])
    if init["num_processes"] == 1:  # a service of one, and asking it, would only take time
        if init["local_device_ids"] is not None:
            jax.config.update("jax_cuda_visible_devices", ",".join(map(str, init["local_device_ids"])))
        return
    if init["platform"] == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM
    jax.distributed.initialize(
        init["coordinator"],
        num_processes=init["num_processes"],
        process_id=init["process_id"],
        local_device_ids=init["local_device_ids"],
        coordinator_bind_address=init["coordinator"] if init["process_id"] == 0 else None,
        initialization_timeout=int(init["timeout_s"]),
        heartbeat_timeout_seconds=_JAX_HEARTBEAT_S,
        cluster_detection_method="deactivate",
    )


def _first_devices(jax: Any) -> list[Any]:
    """`jax.devices()`. A GPU's first copy and JAX's first trace take two seconds together: they begin here."""
    devices = jax.devices()
    if devices[0].platform == "gpu":
        threading.Thread(target=_warm, args=(jax,), name="first copy", daemon=True).start()
    return devices


def _warm(jax: Any) -> None:
    """What is wrong with a device shows again where its first weight is placed, and is told there."""
    import numpy as np

    host = np.zeros((8, 8), np.float32)
    with contextlib.suppress(Exception):
        jax.block_until_ready([jax.device_put(host, device) for device in jax.local_devices()])
        jax.eval_shape(lambda array: array.transpose()[None], host)


def _wake_gpus(device_ids: Sequence[int] | None) -> None:
    """Makes this process's CUDA contexts, which XLA takes up, while JAX is imported: half a second for one GPU.

    Where that fails JAX will say what is wrong: it takes the same steps.
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    cuda.cuInit(0)
    for device_id in device_ids or ():
        device, context = ctypes.c_int(), ctypes.c_void_p()
        if cuda.cuDeviceGet(ctypes.byref(device), device_id) == 0:
            cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)


def _set_environment(platform: str, num_devices: int) -> None:
    """What must be set before JAX is loaded; here, so that it also holds in workers that the parent did not start."""
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    if platform == "gpu":
        flags += " --xla_gpu_shard_autotuning=false"  # programs differ by process: sharing out the tuning never ends
        os.environ["JAX_PLATFORMS"] = "cuda,cpu"
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # JAX's 0.75 leaves a quarter to nobody
    else:
        os.environ["JAX_PLATFORMS"] = "cpu"
        # XLA's thread pool: each virtual device blocks a thread in a collective, and with too few all wait for ever.
        os.environ["NPROC"] = str(max(16, 2 * num_devices))
    os.environ["XLA_FLAGS"] = flags.strip()
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        del os.environ[name]  # gRPC would look for the coordinator behind the proxy; a worker fetches nothing else
