"""Typed errors of a running cell (bad input is a plain ValueError); `jmoe.serving.errors` has the front's. No JAX."""


class JmoeError(RuntimeError):
    """Root of the errors that jmoe raises."""


class CellFailedError(JmoeError):
    """The cell can't go on; every running request ends with this (UNAVAILABLE)."""


class SequenceMismatchError(CellFailedError):
    """An exchange carried a sequence number other than the receiver's: the two role programs are out of step."""


class ExchangeTimeoutError(CellFailedError):
    """A device waited for its peer's rows longer than it may: the peer's program has failed, or never started."""
