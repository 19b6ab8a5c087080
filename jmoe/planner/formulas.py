"""Closed forms of how long one pass over all layers takes, for every schedule that the planner prices. No JAX.

All times are in one unit (seconds elsewhere in the planner); every argument may be a NumPy array and broadcasts.
"""

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

ScheduleKind = Literal["separate", "one", "both"]
SCHEDULE_KINDS: tuple[ScheduleKind, ...] = ("separate", "one", "both")


def total_time(
    kind: ScheduleKind,
    num_layers: int,
    num_micro_batches: int,
    attention_s: ArrayLike,
    expert_s: ArrayLike,
    exchange_s: ArrayLike,
) -> np.ndarray:
    """Time from the first attention stage to the arrival of the last combine, for constant stage times.

    The model behind it: a lane (attention, expert, exchange) takes its work in the order of the schedule's ticks, one
    thing at a time; a thing starts when its lane is free and what it reads has arrived. The head is not in it.
    "separate" has two exchange lanes, one a direction (DESIGN section 1); "one" and "both" have a single chain of
    exchanges (`build_schedule(..., directions=kind)`), each taking exchange_s whatever it carries.

    Args:
      kind: "separate", or the `directions` of the schedule that is built: "one" or "both".
      num_layers: MoE layers, L.
      num_micro_batches: m.
      attention_s, expert_s, exchange_s: T_a, T_e and T_c of one micro-batch of one layer; T_c is one way.

    Returns:
      The time, in the unit of the arguments, broadcast over them.

    Raises:
      ValueError: an unknown kind or a count below 1.

    Source: "separate" is DESIGN section 1 (its full-pipeline case is Eq. 5 of arXiv 2504.02263). The chains are the
    longest paths of the schedule's precedence graph; each term below is one path that can be the longest.
    """
    if num_layers < 1 or num_micro_batches < 1:
        raise ValueError(
            f"total_time: expected num_layers and num_micro_batches of at least 1, got {num_layers} and "
            f"{num_micro_batches}"
        )
    a, e, c = (np.asarray(x, np.float64) for x in (attention_s, expert_s, exchange_s))
    if kind == "separate":
        return _separate(num_layers, num_micro_batches, a, e, c)
    if kind not in ("one", "both"):
        raise ValueError(f"total_time: expected kind 'separate', 'one' or 'both', got {kind!r}")
    if num_micro_batches == 1:
        return num_layers * (a + e + 2 * c)
    if kind == "both":
        return _chain_both(num_layers, num_micro_batches, a, e, c)
    return _chain_one(num_layers, num_micro_batches, a, e, c)


def _separate(num_layers: int, m: int, a: np.ndarray, e: np.ndarray, c: np.ndarray) -> np.ndarray:
    slowest = np.maximum(np.maximum(a, e), c)
    round_trip = a + e + 2 * c
    first_layer = round_trip + (m - 1) * slowest
    return first_layer + (num_layers - 1) * np.maximum(m * slowest, round_trip) if num_layers > 1 else first_layer


def _chain_both(num_layers: int, m: int, a: np.ndarray, e: np.ndarray, c: np.ndarray) -> np.ndarray:
    """A layer is max(m, 4) exchanges long; below m = 4 a compute lane waits for 4 - m of them in every layer."""
    waits = (max(m, 4) - m) * (num_layers - 1)
    stages = m * num_layers
    return _longest(
        a + (stages + waits + 2) * c,
        a + stages * e + (waits + 2) * c,
        stages * a + e + (waits + 2) * c,
        stages * a + (waits + 3) * c,
    )


def _chain_one(num_layers: int, m: int, a: np.ndarray, e: np.ndarray, c: np.ndarray) -> np.ndarray:
    """A layer is 2 m exchanges long; at m = 2 the chain is D0 D1 C0 C1, the same as in lockstep."""
    if m == 2:
        return _chain_both(num_layers, m, a, e, c)
    stages = m * num_layers
    return _longest(
        a + 2 * stages * c,
        2 * a + (2 * stages - 1) * c,
        2 * a + e + (2 * stages - 2) * c,
        a + 2 * e + (2 * stages - 2) * c,
        a + stages * e + 2 * c,
        stages * a + e + 2 * c,
        stages * a + 3 * c,
    )


def _longest(*paths: np.ndarray) -> np.ndarray:
    result = paths[0]
    for path in paths[1:]:
        result = np.maximum(result, path)
    return result


def layer_period(
    kind: ScheduleKind, num_micro_batches: int, attention_s: ArrayLike, expert_s: ArrayLike, exchange_s: ArrayLike
) -> np.ndarray:
    """Steady-state time between two layers of the same micro-batch: what one more layer adds to `total_time`.

    Args, Raises: as in `total_time`.
    """
    m = num_micro_batches
    total_time(kind, 1, m, 0.0, 0.0, 0.0)  # checks kind and m
    a, e, c = (np.asarray(x, np.float64) for x in (attention_s, expert_s, exchange_s))
    if kind == "separate":
        return _longest(m * a, m * e, m * c, a + e + 2 * c)
    if m == 1:
        return a + e + 2 * c
    if kind == "both" or m == 2:
        waits = max(m, 4) - m
        return _longest((m + waits) * c, m * e + waits * c, m * a + waits * c)
    return _longest(2 * m * c, m * a, m * e)


def head_time(num_micro_batches: int, head_s: ArrayLike, slowest_s: ArrayLike) -> np.ndarray:
    """What the heads (final norm, logits, sampling) add behind the last combine.

    Micro-batches come back slowest_s apart, so all but the last head are hidden unless a head takes longer than that.
    """
    head, slowest = np.broadcast_arrays(np.asarray(head_s, np.float64), np.asarray(slowest_s, np.float64))
    beyond = np.subtract(head, slowest, out=np.zeros(head.shape), where=head > slowest)
    return head + (num_micro_batches - 1) * beyond
