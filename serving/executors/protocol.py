"""The executor: what the engine asks of whatever runs the two role programs. No JAX."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

from jmoe.cell_config import CellConfig
from jmoe.step_inputs import StepInputs, StepOutputs


class ProgramKey(NamedTuple):
    """One compiled program. `sampling` False is the greedy form: no penalties, no log-probabilities, argmax only."""

    kind: Literal["prefill", "decode"]
    sampling: bool


def compiling_line(key: ProgramKey) -> str:
    """What is said when a program begins to compile."""
    return f"compiling {key.kind}, {'sampling' if key.sampling else 'greedy'}"


class Executor(Protocol):
    """Runs calls one at a time; every method may raise a `CellFailedError`, after which only `close` is allowed."""

    cell: CellConfig

    def compile(self, keys: Sequence[ProgramKey], progress: Callable[[str], None]) -> None:
        """Compiles programs ahead of their first use; `progress` gets a line for each."""
        ...

    def run(self, key: ProgramKey, inputs: StepInputs) -> StepOutputs:
        """Runs one prefill chunk or num_steps decode steps, compiling the program first if need be."""
        ...

    def check(self) -> None:
        """Raises if the cell is known to have failed; called while the engine is idle."""
        ...

    def close(self) -> None:
        """Frees devices and processes; safe to call twice and after a failure."""
        ...
