"""PushExchange: the `push` transport, one kernel an exchange that writes exactly the needed rows into peers' memory."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from jmoe.pallas_kernels.push import push
from jmoe.pallas_kernels.push_plan import Message, PushPlan
from jmoe.sharding.exchange import Box, Chain, Exchange
from jmoe.sharding.mailboxes import mailbox_map


@dataclasses.dataclass(frozen=True)
class PushExchange(Exchange):
    """The `push` transport: GPUs of one host, or threads of one process on CPU devices.

    Each role is a program of its own over its own devices, so that `role` is known when it is traced. The calls of the
    two roles need not match: a role's n-th call that sends a dispatch meets the other's n-th that receives one. The
    boxes hold what `ppermute`'s do up to `num_rows`; rows beyond it are undefined.

    Attributes:
      role: what the traced program plays.
      implementation: "pallas" or "reference"; None takes "pallas" on GPUs.
      scaled: rows come with a scale each (`Box.row_scales`), as float8 ones do; both ways.
    """

    role: Literal["attention", "expert"] | None = None
    implementation: Literal["pallas", "reference"] | None = None
    scaled: bool = False

    def playing(self, role: Literal["attention", "expert"]) -> "PushExchange":
        """The same exchange for a program of one role."""
        return dataclasses.replace(self, role=role)

    @property
    def slot_bytes(self) -> int:
        """What a mailbox slot must hold."""
        return self._message(dispatch=True).num_bytes

    def __call__(self, box: Box, chain: Chain, *, dispatch: bool, combine: bool) -> tuple[Box, Chain]:
        """Sends this role's rows and takes the other role's.

        Args:
          box: what this device sends. With `box.row_index` `[rounds, capacity]` int32, row i of round r is
            hidden[row_index[r, i]] of a `[any, width]` hidden: nothing need be gathered before.
          chain: from the exchange before; its `mailbox` is this device's `Mailboxes.table`.
          dispatch: attention devices send. combine: expert devices send.

        Returns:
          The box that arrived, and the chain for the next exchange. Parts that nobody sent are zeros.

        Raises:
          ValueError: no role, no mailbox table, or no scales where rows have them.
        """
        if self.role is None or chain.mailbox is None:
            raise ValueError(
                "PushExchange: expected a role (PushExchange.playing) and a mailbox table (Chain.mailbox), "
                f"got {self.role!r} and {chain.mailbox!r}"
            )
        attention = self.role == "attention"
        sends, receives = (dispatch, combine) if attention else (combine, dispatch)
        plan = PushPlan(
            mailbox_map(self.mesh),
            self._message(attention) if sends else None,
            self._message(not attention) if receives else None,
            *chain.offsets(attention),
            chain.after(dispatch, combine).count - chain.count,
        )
        pushed = push(
            plan, chain.mailbox, chain.sequence,
            rows=box.hidden if sends else None,
            counts=box.num_rows if sends else None,
            columns=self._columns(box) if sends else (),
            index=box.row_index if sends else None,
            implementation=self._implementation(),
        )  # fmt: skip
        chain = dataclasses.replace(
            chain.after(dispatch, combine), sequence=pushed.sequence, faults=(*chain.faults, pushed.faults)
        )
        box = self.empty_box()
        if pushed.rows is not None and pushed.counts is not None:
            box = dataclasses.replace(box, hidden=pushed.rows, num_rows=pushed.counts)
        columns = list(pushed.columns)
        if columns and self.scaled:
            scales = jax.lax.bitcast_convert_type(columns.pop()[..., 0], jnp.float32)
            box = dataclasses.replace(box, row_scales=scales)
        if columns:
            weights, ids, slot = columns
            weights = jax.lax.bitcast_convert_type(weights, jnp.float32)
            box = dataclasses.replace(box, topk_weights=weights, local_idx=ids, slot=slot[..., 0])
        return box, chain

    def _message(self, dispatch: bool) -> Message:
        f = self.format
        columns = (f.num_experts_per_tok, f.num_experts_per_tok, 1) if dispatch else ()
        return Message(f.capacity, f.width, f.dtype, columns + (1,) * self.scaled)

    def _columns(self, box: Box) -> tuple[jax.Array, ...]:
        """Words that go with the rows that this role sends."""
        columns: tuple[jax.Array, ...] = ()
        if self.role == "attention":
            columns = (_words(box.topk_weights), box.local_idx, box.slot[..., None])
        if self.scaled:
            if box.row_scales is None:
                raise ValueError("PushExchange.scaled: expected Box.row_scales beside the rows, got none")
            columns += (_words(box.row_scales)[..., None],)
        return columns

    def _implementation(self) -> Literal["pallas", "reference"]:
        if self.implementation is not None:
            return self.implementation
        return "pallas" if jax.default_backend() == "gpu" else "reference"


def _words(array: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(array.astype(jnp.float32), jnp.int32)
