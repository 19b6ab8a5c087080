"""push: rows gathered by index and written into the mailboxes of peer devices; what the peers wrote, taken out."""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from jmoe.pallas_kernels.push_host import push_on_host
from jmoe.pallas_kernels.push_plan import Message, PushPlan


class Pushed(NamedTuple):
    """What arrived, by round; rows and columns beyond a round's count are undefined.

    Attributes:
      rows: `[rounds, capacity, width]`; None where the call receives nothing, like `columns` and `counts`.
      columns: `[rounds, capacity, words]` int32 each.
      counts: `[rounds]` int32, 0 from no peer.
      faults: `[entries, 2]` int32: (expected, got) of a message under another number, (number, TIMED_OUT) of a wait
        that expired, (-1, -1) for none.
      sequence: int32, the next sequence number.
    """

    rows: jax.Array | None
    columns: tuple[jax.Array, ...]
    counts: jax.Array | None
    faults: jax.Array
    sequence: jax.Array


def push(
    plan: PushPlan,
    table: jax.Array,
    sequence: jax.Array,
    rows: jax.Array | None = None,
    counts: jax.Array | None = None,
    columns: tuple[jax.Array, ...] = (),
    index: jax.Array | None = None,
    *,
    implementation: Literal["pallas", "reference"],
) -> Pushed:
    """Sends one message to each peer and takes one from each, as the plan says; waits are bounded.

    Row i of round r's message is rows[index[r, i]], or rows[r, i] without an index, for i < counts[r]; row counts are
    read on the device, and exactly those rows travel. Messages of one direction arrive in the order in which they are
    sent. Both sides count them alike, whatever their numbers say: a number is only compared.

    Args:
      plan: sizes and numbers.
      table: `[plan.mailbox.table_words]` int32: this device's mailbox, its peers', the deadline.
      sequence: int32, from the call before: that orders the calls.
      rows: `[rounds, capacity, width]`, or `[any, width]` with an index; None where nothing is sent, like the rest.
      counts: `[rounds]` int32.
      columns: `[rounds, capacity, words]` int32 each.
      index: `[rounds, capacity]` int32, or None.
      implementation: "pallas" (GPUs that reach each other's memory) or "reference" (threads of one process).

    Returns:
      What arrived.

    Raises:
      ValueError: rows that "pallas" can't move by 16-byte vectors, or an unknown implementation.
    """
    if implementation == "pallas":
        return Pushed(*_push_pallas(plan, table, sequence, rows, counts, columns, index))
    if implementation != "reference":
        raise ValueError(f"push.implementation: expected 'pallas' or 'reference', got {implementation!r}")
    sent = () if plan.sends is None else (rows, index, counts, *columns)
    found = _types(plan.receives, plan.mailbox.num_rounds)
    entries = jax.ShapeDtypeStruct((2 * plan.mailbox.num_rounds, 2), jnp.int32)
    types = (found, entries, jax.ShapeDtypeStruct((), jnp.int32))
    received, faults, after = io_callback(functools.partial(push_on_host, plan), types, table, sequence, sent)
    if plan.receives is None:
        return Pushed(None, (), None, faults, after)
    rows, counts, *columns_out = received
    return Pushed(rows, tuple(columns_out), counts, faults, after)


# Traced and lowered once for each plan and shape: a program holds one call for each layer and micro-batch.
@functools.partial(jax.jit, static_argnums=0)
def _push_pallas(plan: PushPlan, *args: Any) -> Any:
    from jmoe.pallas_kernels.push_mosaic import push_pallas  # a third of what importing a runtime takes

    return push_pallas(plan, *args)


def _types(message: Message | None, rounds: int) -> tuple[Any, ...]:
    if message is None:
        return ()
    shape = (rounds, message.capacity)
    columns = (jax.ShapeDtypeStruct((*shape, words), np.int32) for words in message.columns)
    return (
        jax.ShapeDtypeStruct((*shape, message.width), message.dtype),
        jax.ShapeDtypeStruct((rounds,), np.int32),
        *columns,
    )
