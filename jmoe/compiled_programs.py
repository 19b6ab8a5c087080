"""Compiled programs that come back from disk: without tracing, lowering or compiling, and without pickle.

JAX's persistent cache would not do: only process 0 writes it, and it needs the program traced and lowered first, which
takes longer than reading the weights (30 layers: 5 to 20 s a program). Here the key says all that a program depends on,
and the executable is XLA's own serialization. What else a call needs is known from the cell: every argument and result
is an array over the joint mesh, in the order of the trees that `AbstractCell` describes.
"""

import functools
import hashlib
import importlib
import importlib.metadata
import json
import logging
import os
import pathlib
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

import jmoe
from jmoe.lowering import AbstractCell, Key
from jmoe.program_files import ProgramFiles

logger = logging.getLogger(__name__)
Program = Callable[..., Any]
_PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda13-pjrt", "jax-cuda12-plugin", "jax-cuda12-pjrt")
_UNTRACED = {"serving", "planner", "checkpoints", "training", "__pycache__"}  # folders that no program depends on


def program_key(abstract: AbstractCell, key: Key) -> str:
    """Hash of all that a compiled program depends on: sources, versions, flags, devices, cell, role."""
    own = {"cell": abstract.cell.to_dict(), "role": abstract.role, "program": key}
    return key_of(own, common_facts(tuple(abstract.mesh.devices.flat)))


def common_facts(devices: Sequence[jax.Device]) -> dict[str, Any]:
    """What any program for these devices depends on, whatever it computes."""
    client = devices[0].client
    return {
        "sources": _source_digest(),
        "versions": [(name, _version(name)) for name in _PACKAGES],
        "platform": (client.platform, client.platform_version, _host_features()),
        "devices": [(d.device_kind, d.process_index, d.id) for d in devices],
        "process": jax.process_index(),
        "flags": [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")],
        "config": _config(),
    }


def key_of(own: Mapping[str, Any], common: Mapping[str, Any]) -> str:
    """The name of a program on disk: the hash of what it computes and of `common_facts`."""
    text = json.dumps({**common, **own}, sort_keys=True, default=str)
    name = hashlib.sha256(text.encode()).hexdigest()
    logger.debug("%s: %s", name, text)  # two starts that should have shared a program: compare these
    return name


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _config() -> dict[str, Any]:
    """JAX's options, without the places where it keeps and writes things."""
    values = jax.config.values  # pyright: ignore[reportAttributeAccessIssue]  # made at run time
    plain = {name: value for name, value in values.items() if isinstance(value, bool | int | float | str | None)}
    return {name: value for name, value in plain.items() if not name.endswith(("_dir", "_path", "_to"))}


@functools.cache  # a start asks for every program's key
def _source_digest() -> str:
    """Of the code that programs are traced from, and its tables."""
    digest = hashlib.sha256()
    for folder, names, files in os.walk(pathlib.Path(jmoe.__file__).parent, followlinks=True):
        names[:] = sorted(set(names) - _UNTRACED)
        for file in sorted(file for file in files if file.endswith((".py", ".json"))):
            digest.update(file.encode() + b"\0" + pathlib.Path(folder, file).read_bytes() + b"\0")
    return digest.hexdigest()


def _host_features() -> str:
    """What XLA compiles CPU code for: code of another CPU may hold instructions that this one lacks."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    wanted = ("model name", "flags", "Features", "CPU part")
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(wanted)}))


def save_program(files: ProgramFiles, name: str, compiled: jax.stages.Compiled) -> None:
    """Keeps a compiled program under its key."""
    executable: Any = compiled.runtime_executable()
    files.write(name, executable.client.serialize_executable(executable))


def load_program(
    files: ProgramFiles, name: str, results: Any, sharding: Any, *, has_kernels: bool = True
) -> "LoadedProgram | None":
    """A program from disk; None, after a warning, where XLA can't load what is there.

    Args:
      files: the folder.
      name: `program_key`.
      results: what it returns, as abstract arrays.
      sharding: of every argument and result.
      has_kernels: Mosaic's may be in it.
    """
    data = files.read(name)
    if data is None:
        return None
    device_list = sharding._internal_device_list
    if has_kernels and device_list[0].platform == "gpu":
        # Sets the variable by which XLA's call of such a kernel finds its library. Here and not at the top of a module:
        # it is a third of what a start imports, and here the weights are read meanwhile.
        importlib.import_module("jax.experimental.mosaic.gpu")
    try:
        executable = device_list[0].client.deserialize_executable(data, executable_devices=device_list)
    except Exception as error:  # of another build, say: XLA has no type for it
        files.remove(name, f"{type(error).__name__}: {error}")
        return None
    return LoadedProgram(executable, results, sharding)


class LoadedProgram:
    """Calls an executable as the jitted function would be called that it was compiled from.

    Args:
      executable: XLA's, of the devices of this process.
      results: what it returns, as abstract arrays.
      sharding: of every argument and result.
    """

    def __init__(self, executable: Any, results: Any, sharding: jax.sharding.Sharding):
        self._executable = executable
        leaves, self._tree = jax.tree.flatten(results)
        self._shapes = [leaf.shape for leaf in leaves]
        self._sharding = sharding

    def __call__(self, *args: Any) -> Any:
        parts = self._executable.execute_sharded(jax.tree.leaves(args)).disassemble_into_single_device_arrays()
        arrays = [
            jax.make_array_from_single_device_arrays(shape, self._sharding, part)
            for shape, part in zip(self._shapes, parts, strict=True)
        ]
        return jax.tree.unflatten(self._tree, arrays)
