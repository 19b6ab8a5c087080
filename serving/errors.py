"""Typed errors: what a caller can catch, and which gRPC status each becomes. No JAX."""


class JmoeError(RuntimeError):
    """Root of the errors that serving raises (bad input is a plain ValueError)."""


class QueueFullError(JmoeError):
    """The inbox holds as many requests as it may; try again later (RESOURCE_EXHAUSTED)."""


class EngineClosedError(JmoeError):
    """The engine is draining or closed and takes no request (UNAVAILABLE)."""


class CellFailedError(JmoeError):
    """The cell can't go on; every running request ends with this (UNAVAILABLE)."""


class WorkerDiedError(CellFailedError):
    """A worker process ended by itself or was killed."""


class StepTimeoutError(CellFailedError):
    """A command was not answered within its deadline."""


class SequenceMismatchError(CellFailedError):
    """An exchange carried a sequence number other than the receiver's: the two role programs are out of step."""
