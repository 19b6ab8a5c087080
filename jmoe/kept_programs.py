"""KeptPrograms: small functions of one device's arrays, compiled once and then found on disk like the cell's programs.

Placing weights and making empty pages takes some ten programs of one operation. On a GPU each of them compiles in 0.25
to 1 s, in every process, and a start waits for most of them.
"""

import functools
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from jmoe.compiled_programs import Program, common_facts, key_of, load_program, save_program
from jmoe.program_files import ProgramFiles


class KeptPrograms:
    """Calls functions of one device's arrays; each compiles once a shape and a device, or comes from disk.

    Args:
      devices: on which functions are called.
      files: where compiled programs are found and kept; None compiles each one.
    """

    def __init__(self, devices: Sequence[jax.Device], files: ProgramFiles | None = None):
        self._files = files
        # Once, before anything is traced: what tracing does to options must not hide a program from a second start.
        self._facts = {} if files is None else {device: common_facts([device]) for device in devices}
        self._programs: dict[Hashable, Future[Program]] = {}
        self._lock = threading.Lock()

    def call(self, function: Callable[..., jax.Array], static: tuple, device: jax.Device, *arrays: jax.Array) -> Any:
        """function(*static, *arrays) on the device that holds the arrays; from any thread.

        Args:
          function: a module's own, so that its name and the sources say what it is.
          static: hashable and JSON's, no part of the traced arguments.
          device: where arrays are and the result will be.
          arrays: on that device.
        """
        shapes = tuple((array.shape, array.dtype.name) for array in arrays)
        key = (function, static, device, shapes)
        with self._lock:
            is_first = key not in self._programs
            program = self._programs.setdefault(key, Future())
        if is_first:  # others that want the same one wait for it
            try:
                program.set_result(self._find(function, static, device, arrays))
            except BaseException as error:
                program.set_exception(error)
        return program.result()(*arrays)

    def _find(self, function: Callable[..., jax.Array], static: tuple, device: jax.Device, arrays: Any) -> Program:
        sharding = SingleDeviceSharding(device)
        shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding) for array in arrays]
        bound = functools.partial(function, *static)
        name = ""
        if self._files is not None:
            own = {"function": (function.__module__, function.__qualname__), "static": static}
            own["arguments"] = [(shape.shape, shape.dtype.name) for shape in shapes]
            name = key_of(own, self._facts[device])
            found = load_program(self._files, name, jax.eval_shape(bound, *shapes), sharding, has_kernels=False)
            if found is not None:
                return found
        # keep_unused and out_shardings: a program from disk knows its arguments and its device by these alone.
        compiled = jax.jit(bound, keep_unused=True, out_shardings=sharding).lower(*shapes).compile()
        if self._files is not None:
            save_program(self._files, name, compiled)
        return compiled
