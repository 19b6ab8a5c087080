"""The executor: what the engine asks of whatever runs the two role programs. No JAX."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

from jmoe.cell_config import CellConfig
from jmoe.step_inputs import StepInputs, StepOutputs


class ProgramKey(NamedTuple):
    """One compiled program. `sampling` False is the greedy form: no penalties, no log-probabilities, argmax only."""

    kind: Literal["prefill", "decode"]
    sampling: bool


WAITING_FOR_PROGRAMS = "programs: compiling, or reading them from the cache"  # once the weights are there


def compiling_line(key: ProgramKey) -> str:
    """What is said when a program begins to compile."""
    return f"compiling {key.kind}, {'sampling' if key.sampling else 'greedy'}"


class Executor(Protocol):
    """Runs calls in the order in which they are submitted; the results come back in that order.

    Every method may raise a `CellFailedError`, after which only `close` is allowed.
    """

    cell: CellConfig

    def compile(self, keys: Sequence[ProgramKey], progress: Callable[[str], None]) -> None:
        """Compiles programs ahead of their first use; `progress` gets a line for each."""
        ...

    def submit(self, key: ProgramKey, inputs: StepInputs) -> None:
        """Starts one prefill chunk or num_steps decode steps behind the calls in flight, and waits for none of them.

        A program that is not there yet is compiled first.
        """
        ...

    def collect(self) -> StepOutputs:
        """Waits for the oldest call in flight; ValueError where there is none."""
        ...

    def check(self) -> None:
        """Raises if the cell is known to have failed; called while the engine is idle."""
        ...

    def close(self) -> None:
        """Frees devices and processes; safe to call twice and after a failure."""
        ...


def run(executor: Executor, key: ProgramKey, inputs: StepInputs) -> StepOutputs:
    """One call alone, from start to end."""
    executor.submit(key, inputs)
    return executor.collect()
