"""Which executor runs a cell, and on what kind of device. Starts no JAX backend unless the answer is `inline`."""

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from jmoe.cell_config import CellConfig
from jmoe.serving.executors.protocol import Executor, ProgramKey
from jmoe.serving.host_devices import detect_platform
from jmoe.serving.process_options import ProcessOptions
from jmoe.serving.transport import choose_transport

if TYPE_CHECKING:
    from jmoe.models.model import Model


def create_executor(
    model: "str | os.PathLike[str] | Model",
    cell: CellConfig,
    kind: Literal["auto", "inline", "processes"] = "auto",
    progress: Callable[[str], None] = lambda _: None,
    programs: Sequence[ProgramKey] = (),
    processes: ProcessOptions | None = None,
    compile_cache: str = "off",
) -> Executor:
    """Starts an executor, loads the model into it and compiles programs meanwhile.

    Args:
      model: a Hugging Face checkpoint folder, or a live model.
      cell: sizes and meshes.
      kind: "processes" (a worker process a role: the default on GPUs), "inline" (this process: the default on CPU).
      progress: gets a line for each stage.
      programs: found or compiled while the weights load.
      processes: of "processes" alone: where the workers are, and how long each thing may take.
      compile_cache: where compiled programs are kept: a folder, "auto" (the user's cache folder) or "off".

    Raises:
      ValueError: too few devices, sizes that don't fit the model, a checkpoint that does not match, or `processes` for
        an executor that has none.
      CellFailedError: a worker did not come up.
    """
    platform = detect_platform()
    if kind == "auto":
        kind = "processes" if platform == "gpu" else "inline"
    if processes is not None and kind != "processes":
        raise ValueError(f"processes: expected the executor 'processes' for its options, got {kind!r} on {platform}")
    choose_transport(cell.mesh, platform, kind, processes)  # raises where the cell's can't run
    how = "both roles on each" if cell.mesh.colocated else f"transport {cell.mesh.transport}"
    progress(f"executor {kind} on {cell.mesh.num_devices} {platform} devices, {how}")
    if kind == "processes":
        from jmoe.serving.executors.processes import ProcessesExecutor

        return ProcessesExecutor(
            cell,
            model,
            processes,
            platform=platform,
            programs=programs,
            compile_cache=compile_cache,
            progress=progress,
        )
    from jmoe.serving.executors.inline import InlineExecutor

    return InlineExecutor(
        cell, model, platform=platform, programs=programs, compile_cache=compile_cache, progress=progress
    )
