"""Typed errors: what a caller can catch, and which gRPC status each becomes. No JAX."""

from jmoe.errors import CellFailedError, ExchangeTimeoutError, JmoeError, SequenceMismatchError

__all__ = [
    "CellFailedError",
    "EngineClosedError",
    "ExchangeTimeoutError",
    "JmoeError",
    "QueueFullError",
    "SequenceMismatchError",
    "StepTimeoutError",
    "WorkerDiedError",
]


class QueueFullError(JmoeError):
    """The inbox holds as many requests as it may; try again later (RESOURCE_EXHAUSTED)."""


class EngineClosedError(JmoeError):
    """The engine is draining or closed and takes no request (UNAVAILABLE)."""


class WorkerDiedError(CellFailedError):
    """A worker process ended by itself or was killed."""


class StepTimeoutError(CellFailedError):
    """A command was not answered within its deadline."""


REPORTED: dict[str, type[Exception]] = {  # what a worker may report by its own name
    "SequenceMismatchError": SequenceMismatchError,
    "ExchangeTimeoutError": ExchangeTimeoutError,
    "ValueError": ValueError,  # a checkpoint or a configuration that does not fit, with a sentence
    "FileNotFoundError": FileNotFoundError,
}
