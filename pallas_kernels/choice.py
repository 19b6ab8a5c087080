"""What `implementation=None` means: the Mosaic GPU form on Hopper, the XLA form elsewhere; and which GPU is at hand."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax

logger = logging.getLogger(__name__)
NUM_SMS = 132  # of an H100; for a GPU that isn't there


@functools.cache
def has_hopper() -> bool:
    """Whether this process computes on Hopper GPUs, which the Mosaic bodies are written for."""
    if jax.default_backend() != "gpu":
        return False
    return str(getattr(jax.devices()[0], "compute_capability", "")).startswith("9.")


def num_sms() -> int:
    """SMs of the GPU at hand; other Hopper GPUs have fewer, or less of them switched on."""
    if jax.default_backend() != "gpu":
        return NUM_SMS
    return int(getattr(jax.devices()[0], "core_count", NUM_SMS))


def by_platform(op: str, pallas: Callable[..., Any], xla: Callable[..., Any], *arguments: Any) -> Any:
    """`pallas(*arguments)` where the program is lowered for the Hopper GPUs of this process, else `xla(*arguments)`.

    A program that is compiled for a GPU that isn't there takes "xla"; name "pallas" for the other.
    """
    _say_once(op, "pallas" if has_hopper() else "xla")
    if not has_hopper():
        return xla(*arguments)
    return jax.lax.platform_dependent(*arguments, cuda=pallas, default=xla)


def run_form(
    op: str,
    implementation: str | None,
    obstacle: str,
    pallas: Callable[..., Any],
    xla: Callable[..., Any],
    *arguments: Any,
) -> Any:
    """What `implementation=` asks of an op of two forms: the named one, or for None the best that can run.

    Args:
      op: its name, for errors and the log.
      implementation: "xla", "pallas" or None.
      obstacle: what "pallas" expected of these arguments and what it got; empty if it can run.
      pallas, xla: the forms, of `arguments`.

    Raises:
      ValueError: an unknown implementation, or "pallas" where it can't run.
    """
    if implementation not in (None, "xla", "pallas"):
        raise ValueError(f"{op}: expected implementation 'xla', 'pallas' or None, got {implementation!r}")
    if implementation == "pallas" and obstacle:
        raise ValueError(f"{op}: 'pallas' expected {obstacle}")
    if implementation is None and not obstacle:
        return by_platform(op, pallas, xla, *arguments)
    return pallas(*arguments) if implementation == "pallas" else xla(*arguments)


@functools.cache
def _say_once(op: str, form: str) -> None:
    logger.info("%s: implementation %r", op, form)
