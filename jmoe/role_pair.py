"""RolePair: both roles of a cell in one process, each a program of its own on its own devices (transport "push").

Nothing of XLA's joins the two programs, so neither holds a conditional on the role. Each is started from a thread of
its own: a start can take as long as the program itself, once the device's queue is full, and waits for the other role.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import jax
import numpy as np

from jmoe.cell_config import CellConfig
from jmoe.cell_runtime import CellRuntime, Submitted
from jmoe.device_params import ParamSource
from jmoe.errors import ExchangeTimeoutError
from jmoe.lowering import Key
from jmoe.models.model import Model
from jmoe.program_files import ProgramFiles

ROLES: tuple[Literal["attention", "expert"], ...] = ("attention", "expert")


@dataclasses.dataclass(frozen=True, slots=True)
class SubmittedPair:
    """A call of both roles, each on its way to its devices."""

    attention: Future[Submitted]
    expert: Future[Submitted]


class RolePair:
    """A cell whose devices are all in this process, with roles apart; the same methods as `CellRuntime`.

    Args:
      cell: sizes; the transport is "push".
      devices: every device of the joint axis, in order.
      files: where compiled programs are found and kept; None compiles each one.

    Raises:
      ValueError: too few devices, or tensor sizes that the model can't be cut by.
    """

    def __init__(self, cell: CellConfig, devices: Sequence[jax.Device], files: ProgramFiles | None = None):
        self.cell = cell
        self.attention, self.expert = (CellRuntime(cell, devices, role, files) for role in ROLES)
        handles = self.attention.open_mailboxes() | self.expert.open_mailboxes()
        for runtime in (self.attention, self.expert):
            runtime.connect(handles)
        self._threads = {role: ThreadPoolExecutor(1, f"jmoe-{role}") for role in ROLES}

    def load(self, source: ParamSource | str | os.PathLike[str] | Model, progress: Callable[[str], None]) -> None:
        """Places each role's weights on its own devices, and an empty KV cache."""
        for runtime in (self.attention, self.expert):
            runtime.load(source, progress)

    def compile(self, *keys: Key) -> str:
        """Finds or compiles both roles' programs side by side; returns what was done, in words."""
        with ThreadPoolExecutor(2) as pool:
            done = pool.map(lambda runtime: runtime.compile(*keys), (self.attention, self.expert))
            return "; ".join(f"{role}: {text}" for role, text in zip(ROLES, done, strict=True))

    def run(self, key: Key, inputs: np.ndarray | None) -> dict[str, Any]:
        """Runs one call and waits for it."""
        return self.collect(self.submit(key, inputs))

    def submit(self, key: Key, inputs: np.ndarray | None) -> SubmittedPair:
        """Starts one call of both roles behind those that run, and waits for neither."""
        self.compile(key)
        return SubmittedPair(
            self._threads["attention"].submit(self.attention.submit, key, inputs),
            self._threads["expert"].submit(self.expert.submit, key, None),
        )

    def collect(self, submitted: SubmittedPair) -> dict[str, Any]:
        """Waits for a call; returns what attention brings (`CellRuntime.collect`).

        Raises:
          SequenceMismatchError, ExchangeTimeoutError: what a role found; of the two the one that explains the other.
        """
        results: list[dict[str, Any]] = []
        errors: list[Exception] = []
        for runtime, future in ((self.attention, submitted.attention), (self.expert, submitted.expert)):
            try:
                results.append(runtime.collect(future.result()))
            except Exception as error:
                errors.append(error)
        errors.sort(key=lambda error: isinstance(error, ExchangeTimeoutError))  # a role that failed lets its peer wait
        if errors:
            raise errors[0]
        return results[0]

    def together(self, attention: Callable[[], Any], expert: Callable[[], Any]) -> tuple[Any, Any]:
        """Calls both at once, each in its role's thread; returns what both return."""
        futures = [self._threads[role].submit(call) for role, call in zip(ROLES, (attention, expert), strict=True)]
        return futures[0].result(), futures[1].result()

    def adopt(self, attention: dict[str, jax.Array], experts: dict[str, jax.Array]) -> None:
        """Takes arrays over each role's devices as the weights, with empty pages."""
        self.attention.adopt(attention, {})
        self.expert.adopt({}, experts)

    def set_sequence(self, device_index: int, value: int) -> None:
        """See `CellRuntime.set_sequence`."""
        role = self.cell.mesh.role(device_index)
        (self.attention if role == "attention" else self.expert).set_sequence(device_index, value)

    def close(self) -> None:
        """Waits for calls in flight, then lets go of weights, pages, programs and mailboxes."""
        for thread in self._threads.values():
            thread.shutdown()
        for runtime in (self.attention, self.expert):
            runtime.close()
