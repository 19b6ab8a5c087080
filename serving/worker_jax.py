"""Starts JAX inside a worker: its environment, its place in jax.distributed, and the cell's runtime on its devices."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from jmoe.cell_config import CellConfig

if TYPE_CHECKING:  # running as __main__, the worker must not be imported a second time
    from jmoe.serving.worker import Runtime

# JAX's own heartbeat (default 100 s) only backs up the parent's supervision, which is far quicker.
_JAX_HEARTBEAT_S = 100


def start_jax_runtime(init: Mapping[str, Any]) -> "Runtime":
    """Joins this worker to its cell's jax.distributed and returns the runtime of its role.

    Args:
      init: the `init` command: `cell` (CellConfig.to_dict), `role`, `process_id`, `num_processes`, `platform` ("cpu"
        or "gpu"), `num_devices` (of this worker), `local_device_ids` (GPUs to use, None for CPU), `coordinator`
        (HOST:PORT of worker 0, which binds that address alone) and `timeout_s`.

    Raises:
      ValueError: other devices came up than the cell needs.
    """
    _set_environment(init["platform"])
    import jax

    if init["platform"] == "cpu":
        jax.config.update("jax_num_cpu_devices", init["num_devices"])
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
    cell = CellConfig.from_dict(init["cell"])
    devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
    if len(devices) != cell.mesh.num_devices or jax.local_device_count() != init["num_devices"]:
        raise ValueError(
            f"worker {init['process_id']}: expected {init['num_devices']} devices here and {cell.mesh.num_devices} in "
            f"the cell, got {jax.local_device_count()} and {len(devices)} ({devices[0].platform})"
        )
    return _CheckpointRuntime(cell, devices, init["role"])


class _CheckpointRuntime:
    """CellRuntime, fed from a checkpoint folder."""

    def __init__(self, cell: CellConfig, devices: Sequence[Any], role: Literal["attention", "expert"]):
        from jmoe.cell_runtime import CellRuntime

        self._cell = cell
        self._runtime = CellRuntime(cell, devices, role)
        self.compile, self.run = self._runtime.compile, self._runtime.run

    def load(self, path: str, progress: Callable[[str], None]) -> None:
        from jmoe.checkpoints.load import CheckpointReader

        reader = CheckpointReader(path, self._cell.model)
        try:
            self._runtime.load(reader, progress)
        finally:
            reader.files.close()  # unmapped: a handover in shared memory is freed when its folder goes


def _set_environment(platform: str) -> None:
    """What must be set before JAX is loaded; here, so that it also holds in workers that the parent did not start."""
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    if platform == "gpu":
        flags += " --xla_gpu_shard_autotuning=false"  # programs differ by process: sharing out the tuning never ends
        os.environ["JAX_PLATFORMS"] = "cuda,cpu"
    else:
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["NPROC"] = "16"  # XLA's thread pool: with fewer, several virtual devices starve each other
    os.environ["XLA_FLAGS"] = flags.strip()
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        del os.environ[name]  # gRPC would look for the coordinator behind the proxy; a worker fetches nothing else
