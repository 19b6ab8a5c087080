"""The exchange: dispatch and combine between the two meshes as one ordered chain, with a check and a gradient.

Every exchange sends a sequence number in each message; a receiver compares it with its own and the chain's next
number comes out of what arrived. That number is the only thing that keeps an exchange alive and in order on a role
that does not use the rest of its result: XLA removes unused collectives, on that role alone.
"""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.pallas_kernels.push_plan import SEQUENCE_MASK, TIMED_OUT
from jmoe.sharding.mesh_config import AXIS, MeshConfig
from jmoe.sharding.message import HEADER_WORDS, MessageFormat
from jmoe.sharding.rounds import Rounds, build_rounds

NO_SEQUENCE = TIMED_OUT  # what no header holds


@dataclasses.dataclass(frozen=True)
class Chain:
    """What travels from exchange to exchange within one pass.

    Attributes:
      base: int32, the number of the pass's first exchange; exchange n expects base + n. Counting from the base and not
        from the number before keeps XLA from fusing the whole chain into every message (quadratic code).
      count: exchanges so far.
      sequence: int32, the number that the next exchange sends: out of the exchange before, so that it can't be dropped.
      faults: int32 `[2]` or `[entries, 2]` each, (expected, got) of every exchange so far, (-1, -1) where they agreed;
        got is TIMED_OUT where nothing came.
      order: float32 zero with which training differentiates through the order (see `Exchange.__call__`).
      mailbox: `[words]` int32, this device's `Mailboxes.table`; None where the transport has none.
      dispatches, combines: exchanges so far that carried one. A push's numbers count each direction by itself, since
        its two roles need not call together.
    """

    base: jax.Array
    count: int
    sequence: jax.Array
    faults: tuple[jax.Array, ...]
    order: jax.Array
    mailbox: jax.Array | None = None
    dispatches: int = 0
    combines: int = 0

    @classmethod
    def start(cls, sequence: jax.Array, order: jax.Array | float = 0.0, mailbox: jax.Array | None = None) -> "Chain":
        return cls(sequence, 0, sequence, (), jnp.asarray(order, jnp.float32), mailbox)

    def after(self, dispatch: bool, combine: bool) -> "Chain":
        """Counts one exchange of a transport whose directions are numbered apart: `count` is the larger of the two."""
        dispatches, combines = self.dispatches + dispatch, self.combines + combine
        return dataclasses.replace(self, count=max(dispatches, combines), dispatches=dispatches, combines=combines)

    def offsets(self, attention: bool) -> tuple[int, int]:
        """The numbers of the next message that a role sends and of the next that it receives, less `sequence`."""
        numbers = (self.dispatches, self.combines) if attention else (self.combines, self.dispatches)
        return numbers[0] - self.count, numbers[1] - self.count

    def fault(self) -> jax.Array:
        """`[2]` int32: (expected, got) of the first exchange that was out of step, (-1, -1) if none was."""
        faults = jnp.concatenate([fault.reshape(-1, 2) for fault in self.faults])
        return faults[jnp.argmax(faults[:, 0] >= 0)]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Box:
    """What a device puts in for its partners, or gets out, by round. Combines carry `hidden` and `num_rows` alone.

    Attributes:
      hidden: `[rounds, capacity, width]`, one slice of each row's hidden vector.
      topk_weights: `[rounds, capacity, k]` float32.
      local_idx: `[rounds, capacity, k]` int32, the receiving node's experts, -1 where the choice is elsewhere.
      slot: `[rounds, capacity]` int32, the row's token within the sender's micro-batch.
      num_rows: `[rounds]` int32.
      row_index: `[rounds, capacity]` int32 or None; with it `hidden` is `[any, width]` and row i of a round is
        hidden[row_index[round, i]]. Transports that can't gather by themselves take `gathered()`.
      row_scales: `[rounds, capacity]` float32 or None: what float8 rows are to be multiplied with.
    """

    hidden: jax.Array
    topk_weights: jax.Array
    local_idx: jax.Array
    slot: jax.Array
    num_rows: jax.Array
    row_index: jax.Array | None = None
    row_scales: jax.Array | None = None

    def gathered(self) -> "Box":
        """The same box with its rows in their places."""
        if self.row_index is None:
            return self
        hidden = self.hidden.at[self.row_index].get(mode="promise_in_bounds", wrap_negative_indices=False)
        return dataclasses.replace(self, hidden=hidden, row_index=None)


@dataclasses.dataclass(frozen=True)
class Exchange:
    """The `ppermute` transport: one permute a round, both directions in one permute where asked.

    Portable: it runs wherever XLA has collective permutes, over any number of hosts. It moves the worst case for every
    pair, so bytes sent over bytes needed grow with M, N and the sparsity of the routing.
    """

    mesh: MeshConfig
    format: MessageFormat
    rounds: Rounds

    @classmethod
    def of(cls, mesh: MeshConfig, hidden_size: int, capacity: int, num_experts_per_tok: int, dtype) -> Self:
        """For one micro-batch of `capacity` rows a replica.

        Raises:
          ValueError: a hidden size that the tensor ranks can't share evenly.
        """
        rounds = build_rounds(mesh)
        if hidden_size % rounds.num_slices:
            raise ValueError(
                f"Exchange: expected hidden_size to be a multiple of {rounds.num_slices} (the least common multiple of "
                f"attention_tensor {mesh.attention_tensor} and expert_tensor {mesh.expert_tensor}), got {hidden_size}"
            )
        width = hidden_size // rounds.num_slices
        return cls(mesh, MessageFormat(capacity, width, num_experts_per_tok, jnp.dtype(dtype)), rounds)

    def empty_box(self) -> Box:
        """A box with nothing in it."""
        f, r = self.format, self.rounds.num_rounds
        return Box(
            hidden=jnp.zeros((r, f.capacity, f.width), f.dtype),
            topk_weights=jnp.zeros((r, f.capacity, f.num_experts_per_tok), jnp.float32),
            local_idx=jnp.zeros((r, f.capacity, f.num_experts_per_tok), jnp.int32),
            slot=jnp.zeros((r, f.capacity), jnp.int32),
            num_rows=jnp.zeros((r,), jnp.int32),
        )

    def __call__(self, box: Box, chain: Chain, *, dispatch: bool, combine: bool) -> tuple[Box, Chain]:
        """Swaps boxes with the partners of every round.

        Differentiable in `hidden` and `topk_weights`: the gradient of a dispatch is a combine, and the reverse. Thread
        `chain.order` through both roles' programs as a float input and output, and give its output a zero cotangent:
        the backward exchanges then form a chain that follows the forward one.

        Args:
          box: what this device sends.
          chain: from the exchange before.
          dispatch: attention devices send. combine: expert devices send.

        Returns:
          The box that arrived (zeros from no one), and the chain for the next exchange.
        """
        box = box.gathered()
        (hidden, topk_weights), ints, order = _swap(
            self, dispatch, combine, (box.hidden, box.topk_weights, chain.order),
            (box.local_idx, box.slot, box.num_rows, chain.sequence),
        )  # fmt: skip
        local_idx, slot, num_rows, sequences = ints
        scheduled = self._receives(dispatch, combine)
        expected = (chain.base + chain.count) & SEQUENCE_MASK
        wrong = scheduled & (sequences != expected)
        got = jnp.max(jnp.where(wrong, sequences, -1))
        fault = jnp.where(wrong.any(), jnp.stack([expected, got]), -1)
        arrived = jnp.max(jnp.where(scheduled, sequences, -1))
        sequence = (jnp.where(scheduled.any(), arrived, expected) + 1) & SEQUENCE_MASK
        chain = Chain(chain.base, chain.count + 1, sequence, (*chain.faults, fault), order)
        return Box(hidden, topk_weights, local_idx, slot, num_rows), chain

    def _receives(self, dispatch: bool, combine: bool) -> jax.Array:
        """[rounds] bool: rounds in which this device gets a message."""
        table = self.rounds.peer >= 0
        attention = np.arange(self.mesh.num_devices) < self.mesh.num_attention_devices
        table = table & np.where(attention, combine, dispatch)[:, None]
        return jnp.asarray(table)[jax.lax.axis_index(AXIS)]

    def permute(self, words: jax.Array, dispatch: bool, combine: bool) -> jax.Array:
        """One permute a round: `[rounds, words]` -> `[rounds, words]`."""
        received = []
        for r, pairs in enumerate(self.rounds.pairs):
            outward = list(pairs) if dispatch else []
            back = [(e, a) for a, e in pairs] if combine else []
            received.append(jax.lax.ppermute(words[r], AXIS, outward + back))
        return jnp.stack(received)


def _swap_plain(exchange: Exchange, dispatch: bool, combine: bool, floats, ints):
    """Packs, permutes, unpacks: ((hidden, weights, order), (ids, slot, rows, sequence)) -> what arrived."""
    (hidden, topk_weights, order), (local_idx, slot, num_rows, sequence) = floats, ints
    form, rounds = exchange.format, exchange.rounds.num_rounds
    header = jnp.stack([jnp.full((rounds,), sequence, jnp.int32), num_rows], axis=1)
    parts = [jax.lax.bitcast_convert_type(header, jnp.uint32), form.pack_hidden(hidden)]
    if dispatch:
        parts += [form.pack_weights(topk_weights), form.pack_ids(slot, local_idx)]
    words = exchange.permute(jnp.concatenate(parts, axis=1), dispatch, combine)
    header = jax.lax.bitcast_convert_type(words[:, :HEADER_WORDS], jnp.int32)
    cut = HEADER_WORDS + form.hidden_words
    hidden = form.unpack_hidden(words[:, HEADER_WORDS:cut])
    if dispatch:
        topk_weights = form.unpack_weights(words[:, cut : cut + form.weight_words])
        slot, local_idx = form.unpack_ids(words[:, cut + form.weight_words :])
    else:
        topk_weights, slot, local_idx = (jnp.zeros_like(a) for a in (topk_weights, slot, local_idx))
    return (hidden, topk_weights), (local_idx, slot, header[:, 1], header[:, 0]), order


def _swap_forward(exchange, dispatch, combine, floats, ints):
    results = _swap_plain(exchange, dispatch, combine, floats, ints)
    _, _, _, sequences = results[1]
    return results, (sequences, tuple(a.shape for a in ints))


def _swap_backward(exchange, dispatch, combine, residuals, cotangents):
    """The permutation turned round: what arrived forward goes back, and its sender gets the gradient.

    The order's cotangent is sent in the header and taken from what arrives, so backward exchanges chain as well. The
    numbers that arrived forward go in too: a role to which the last exchanges bring nothing would else drop them, or
    begin with the backward ones while the other role still waits in the forward ones.
    """
    (hidden, topk_weights), _, order = cotangents
    sequences, int_shapes = residuals
    order = order + jnp.any(sequences == NO_SEQUENCE)  # adds 0, which XLA can't know
    form, rounds = exchange.format, exchange.rounds.num_rounds
    header = jax.lax.bitcast_convert_type(jnp.full((rounds, HEADER_WORDS), order, jnp.float32), jnp.uint32)
    parts = [header, form.pack_hidden(hidden)] + ([form.pack_weights(topk_weights)] if dispatch else [])
    words = exchange.permute(jnp.concatenate(parts, axis=1), dispatch=combine, combine=dispatch)
    arrived = jax.lax.bitcast_convert_type(words[:, 0], jnp.float32)
    cut = HEADER_WORDS + form.hidden_words
    weights = form.unpack_weights(words[:, cut:]) if dispatch else jnp.zeros_like(topk_weights)
    floats = (form.unpack_hidden(words[:, HEADER_WORDS:cut]), weights, order + jnp.max(arrived))
    return floats, tuple(np.zeros(shape, jax.dtypes.float0) for shape in int_shapes)


_swap = jax.custom_vjp(_swap_plain, nondiff_argnums=(0, 1, 2))
_swap.defvjp(_swap_forward, _swap_backward)
