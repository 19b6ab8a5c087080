"""Typed errors: what a caller can catch, and which gRPC status each becomes. No JAX."""

from jmoe.errors import CellFailedError, JmoeError, SequenceMismatchError

__all__ = [
    "CellFailedError",
    "EngineClosedError",
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
