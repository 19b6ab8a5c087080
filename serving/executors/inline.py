"""InlineExecutor: both roles on devices of this process. For tests, laptops, notebooks, and one-process GPUs."""

import contextlib
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from jmoe.cell_config import CellConfig
from jmoe.serving.executors.protocol import WAITING_FOR_PROGRAMS, ProgramKey, compiling_line, run
from jmoe.step_inputs import StepInputs, StepOutputs

if TYPE_CHECKING:
    from jmoe.models.model import Model


class InlineExecutor:
    """Runs the cell in this process (starts JAX here). See `Executor` for the methods.

    Args:
      cell: sizes and meshes.
      model: a checkpoint folder, or a live model.
      platform: "cpu" makes as many virtual devices as the meshes need, if JAX has not started yet.
      programs: found or compiled while the weights load.
      compile_cache: where compiled programs are kept: a folder, "auto" or "off" (see `open_program_files`).
      progress: gets a line for each stage of loading and each program.

    Raises:
      ValueError: fewer devices than the meshes need.
    """

    def __init__(
        self,
        cell: CellConfig,
        model: "str | os.PathLike[str] | Model",
        *,
        platform: str = "cpu",
        programs: Sequence[ProgramKey] = (),
        compile_cache: str = "off",
        progress: Callable[[str], None] = lambda _: None,
    ):
        self.cell = cell
        devices = start_jax(platform, cell.mesh.num_devices)
        from jmoe.cell_runtime import CellRuntime
        from jmoe.program_files import open_program_files
        from jmoe.role_pair import RolePair

        files = open_program_files(compile_cache)
        if cell.mesh.roles_apart:
            runtime = RolePair(cell, devices, files)
        else:
            runtime = CellRuntime(cell, devices, "colocated" if cell.mesh.colocated else "inline", files)
        self._runtime: Any = runtime
        self._in_flight: deque[Any] = deque()
        with ThreadPoolExecutor(1, "jmoe-compile") as pool:  # also after a bad checkpoint: a compiler can't be stopped
            compiling = pool.submit(runtime.compile, *programs)
            runtime.load(model, progress)
            if not compiling.done():
                progress(WAITING_FOR_PROGRAMS)
            progress(compiling.result())

    def compile(self, keys: Sequence[ProgramKey], progress: Callable[[str], None]) -> None:
        for key in keys:
            progress(compiling_line(key))
        progress(self._open().compile(*keys))

    def submit(self, key: ProgramKey, inputs: StepInputs) -> None:
        self._in_flight.append(self._open().submit((key.kind, key.sampling), inputs.array))

    def collect(self) -> StepOutputs:
        if not self._in_flight:
            raise ValueError("InlineExecutor.collect: expected a call in flight, got none")
        result = self._open().collect(self._in_flight.popleft())
        del result["replicas"]  # all of them, in order
        return StepOutputs(**result)

    def run(self, key: ProgramKey, inputs: StepInputs) -> StepOutputs:
        """One call alone."""
        return run(self, key, inputs)

    def check(self) -> None:
        """Nothing can fail between calls: there is no other process."""

    def close(self) -> None:
        self._in_flight.clear()
        if self._runtime is not None:
            self._runtime.close()
        self._runtime = None  # frees the weights and pages

    def _open(self):
        if self._runtime is None:
            raise ValueError("InlineExecutor: expected an open executor, got a closed one")
        return self._runtime


def start_jax(platform: str, num_devices: int):
    """This process's devices; on CPU as many virtual ones as asked for, where JAX has not started yet."""
    # XLA's CPU thread pool has one thread a core, and each virtual device blocks one in a collective: with fewer
    # threads than devices a program waits for itself. XLA reads NPROC when its backend starts.
    os.environ.setdefault("NPROC", str(max(16, 2 * num_devices)))
    import jax

    if platform == "cpu":
        jax.config.update("jax_platforms", "cpu")
        with contextlib.suppress(RuntimeError):  # JAX has started before: the devices that it has must do
            known = jax.config.jax_num_cpu_devices  # pyright: ignore[reportAttributeAccessIssue]  # made at run time
            jax.config.update("jax_num_cpu_devices", max(num_devices, known))
    devices = jax.devices()
    if len(devices) < num_devices:
        hint = "; JAX had started before, so no virtual devices could be added" if platform == "cpu" else ""
        raise ValueError(f"MeshConfig: expected at least {num_devices} {platform} devices, got {len(devices)}{hint}")
    return devices
