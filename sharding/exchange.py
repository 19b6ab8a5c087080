"""The exchange: dispatch and combine between the two meshes as one ordered chain, with a check and a gradient.

Every exchange sends a sequence number in each message; a receiver compares it with its own and the chain's next
number comes out of what arrived. That number is the only thing that keeps an exchange alive and in order on a role
that does not use the rest of its result: XLA removes unused collectives, on that role alone.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.sharding.mesh_config import AXIS, MeshConfig
from jmoe.sharding.message import HEADER_WORDS, MessageFormat
from jmoe.sharding.rounds import Rounds, build_rounds

SEQUENCE_MASK = 0x3FFFFFFF  # sequence numbers wrap here, far from int32's sign


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chain:
    """What travels from exchange to exchange.

    Attributes:
      sequence: int32, the number that the next exchange sends.
      fault: int32 `[2]`, (expected, got) of the first mismatch, (-1, -1) while there is none.
      order: float32 zero with which training differentiates through the order (see `Exchange.__call__`).
    """

    sequence: jax.Array
    fault: jax.Array
    order: jax.Array

    @classmethod
    def start(cls, sequence: jax.Array, order: jax.Array | float = 0.0) -> "Chain":
        return cls(sequence, jnp.full((2,), -1, jnp.int32), jnp.asarray(order, jnp.float32))


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
    def of(cls, mesh: MeshConfig, hidden_size: int, capacity: int, num_experts_per_tok: int, dtype) -> "Exchange":
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

    def box_shapes(self) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """What a device puts in for its partners, or gets out: hidden, metadata, row counts, each by round."""
        f, r = self.format, self.rounds.num_rounds
        return (
            jax.ShapeDtypeStruct((r, f.capacity, f.width), f.dtype),
            jax.ShapeDtypeStruct((r, f.metadata_words), jnp.uint32),
            jax.ShapeDtypeStruct((r,), jnp.int32),
        )

    def empty_box(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """A box with nothing in it."""
        hidden, metadata, num_rows = (jnp.zeros(s.shape, s.dtype) for s in self.box_shapes())
        return hidden, metadata, num_rows

    def __call__(self, box, chain: Chain, *, dispatch: bool, combine: bool):
        """Swaps boxes with the partners of every round.

        Differentiable in the hidden part: the gradient of a dispatch is a combine, and the reverse. Thread
        `chain.order` through both roles' programs as a float input and output, and give its output a zero cotangent:
        the backward exchanges then form a chain of their own.

        Args:
          box: (hidden `[rounds, capacity, width]`, metadata `[rounds, words]` uint32, num_rows `[rounds]` int32).
          chain: from the exchange before.
          dispatch: attention devices send. combine: expert devices send (hidden and num_rows only).

        Returns:
          The box that arrived (zeros from no one), and the chain for the next exchange.
        """
        hidden, metadata, num_rows = box
        got, order = _swap(self, dispatch, combine, hidden, metadata, num_rows, chain.sequence, chain.order)
        hidden, metadata, num_rows, sequences = got
        scheduled = self._receives(dispatch, combine)
        expected = chain.sequence
        wrong = scheduled & (sequences != expected)
        bad = jnp.stack([expected, jnp.max(jnp.where(wrong, sequences, -1))])
        fault = jnp.where((chain.fault[0] < 0) & wrong.any(), bad, chain.fault)
        arrived = jnp.max(jnp.where(scheduled, sequences, -1))
        sequence = (jnp.where(scheduled.any(), arrived, expected) + 1) & SEQUENCE_MASK
        return (hidden, metadata, num_rows), Chain(sequence, fault, order)

    def _receives(self, dispatch: bool, combine: bool) -> jax.Array:
        """[rounds] bool: rounds in which this device gets a message."""
        table = self.rounds.peer >= 0
        attention = np.arange(self.mesh.num_devices) < self.mesh.num_attention_devices
        table = table & np.where(attention, combine, dispatch)[:, None]
        return jnp.asarray(table)[jax.lax.axis_index(AXIS)]

    def _permute(self, words: jax.Array, dispatch: bool, combine: bool) -> jax.Array:
        """One permute a round: [rounds, words] -> [rounds, words]."""
        received = []
        for r, pairs in enumerate(self.rounds.pairs):
            outward = list(pairs) if dispatch else []
            back = [(e, a) for a, e in pairs] if combine else []
            received.append(jax.lax.ppermute(words[r], AXIS, outward + back))
        return jnp.stack(received)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _swap(exchange: Exchange, dispatch: bool, combine: bool, hidden, metadata, num_rows, sequence, order):
    """Packs, permutes, unpacks. Returns ((hidden, metadata, num_rows, sequences), order)."""
    form, rounds = exchange.format, exchange.rounds.num_rounds
    header = jnp.stack([jnp.full((rounds,), sequence), num_rows], axis=1).astype(jnp.int32)
    parts = [jax.lax.bitcast_convert_type(header, jnp.uint32), form.pack_hidden(hidden)]
    if dispatch:
        parts.append(metadata)
    words = exchange._permute(jnp.concatenate(parts, axis=1), dispatch, combine)
    header = jax.lax.bitcast_convert_type(words[:, :HEADER_WORDS], jnp.int32)
    hidden = form.unpack_hidden(words[:, HEADER_WORDS : HEADER_WORDS + form.hidden_words])
    metadata = words[:, HEADER_WORDS + form.hidden_words :] if dispatch else jnp.zeros_like(metadata)
    return (hidden, metadata, header[:, 1], header[:, 0]), order


def _swap_forward(exchange, dispatch, combine, hidden, metadata, num_rows, sequence, order):
    return _swap(exchange, dispatch, combine, hidden, metadata, num_rows, sequence, order), None


def _swap_backward(exchange, dispatch, combine, _, cotangents):
    """The permutation turned round: what arrived forward goes back, its sender gets the gradient.

    The order's cotangent is sent in the header and taken from what arrives, so backward exchanges chain as well.
    """
    (hidden, _, _, _), order = cotangents
    form, rounds = exchange.format, exchange.rounds.num_rounds
    header = jax.lax.bitcast_convert_type(jnp.full((rounds, HEADER_WORDS), order, jnp.float32), jnp.uint32)
    words = jnp.concatenate([header, form.pack_hidden(hidden.astype(form.dtype))], axis=1)
    words = exchange._permute(words, dispatch=combine, combine=dispatch)
    arrived = jax.lax.bitcast_convert_type(words[:, 0], jnp.float32)
    none = functools.partial(np.zeros, dtype=jax.dtypes.float0)
    _, metadata, num_rows = (none(s.shape) for s in exchange.box_shapes())
    hidden = form.unpack_hidden(words[:, HEADER_WORDS:])
    return hidden, metadata, num_rows, none(()), order + jnp.max(arrived)


_swap.defvjp(_swap_forward, _swap_backward)
