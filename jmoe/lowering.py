"""Lowering: a cell's programs over their mesh from abstract arrays alone, so they compile before weights arrive.

The same lowering serves real devices and the ahead-of-time compiler's imaginary ones.
"""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jmoe.cell_config import CellConfig
from jmoe.decode_loop import CellProgram, DeviceState, Emitted, Role
from jmoe.models.model import array_specs
from jmoe.sampling import TokenCounts
from jmoe.sharding.mailboxes import table_shape
from jmoe.sharding.mesh_config import AXIS
from jmoe.sharding.partition import tensor_share
from jmoe.sharding.push_exchange import PushExchange
from jmoe.step_inputs import StepLayout

Key: TypeAlias = tuple[Literal["prefill", "decode"], bool]  # (kind, sampling)

# XLA would hand a slice of a larger array (the page table within the packed inputs) to a Mosaic kernel as an address
# within that array; the kernel refuses one that isn't a multiple of 256 bytes, when it runs.
COMPILER_OPTIONS: dict[str, bool | int | str] = {"xla_gpu_enable_dynamic_slice_fusion": False}


class AbstractCell:
    """Shapes of everything that one device holds, as arrays over its program's mesh (leading axis: the device)."""

    def __init__(self, cell: CellConfig, mesh: Mesh, role: Role):
        self.cell = cell
        self.mesh = mesh
        self.role = role
        self.sharding = NamedSharding(mesh, PartitionSpec(AXIS))  # of everything: the leading axis is the device

    def params(self) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, jax.ShapeDtypeStruct]]:
        """(attention, experts) by path; empty for a role that is not played."""
        attention, experts = array_specs(self.cell.model)
        c = self.cell.mesh
        assert c.placement is not None
        held = c.placement.max_local_experts
        shares = (
            {p: tensor_share(s.shape, s.axes, c.attention_tensor, 0)[1] for p, s in attention.items()},
            {p: (held, *tensor_share(s.shape, s.axes, c.expert_tensor, 0)[1][1:]) for p, s in experts.items()},
        )
        played, dtype = (self.role != "expert", self.role != "attention"), self.cell.model.dtype
        return tuple(  # type: ignore[return-value]
            {path: self._abstract(part[path], spec.numpy_dtype(dtype)) for path, spec in specs.items()} if here else {}
            for part, specs, here in zip(shares, (attention, experts), played, strict=True)
        )

    def page_shape(self) -> tuple[int, ...]:
        """Of one layer's keys, or values, on one device."""
        c = self.cell
        heads = (c.model.num_kv_heads, c.model.head_dim)
        return (c.num_pages, c.page_len, *tensor_share(heads, ("kv_heads", None), c.mesh.attention_tensor, 0)[1])

    @property
    def page_dtype(self) -> Any:
        """Of the KV cache."""
        return jnp.dtype(self.cell.model.dtype if self.cell.kv_dtype == "auto" else jnp.float8_e4m3fn)

    @property
    def slots_shape(self) -> tuple[int, int]:
        """Of what is kept of each decode slot on one device."""
        return self.cell.mesh.num_micro_batches, self.cell.rows

    def state(self, sampling: bool) -> DeviceState:
        """What is kept from call to call."""
        sequence, mailbox = self._abstract((), np.int32), None
        if self.cell.mesh.roles_apart:
            mailbox = self._abstract(table_shape(self.cell.mesh), np.int32)
        if self.role == "expert":
            return DeviceState(sequence, mailbox=mailbox)
        pages = self._abstract(self.page_shape(), self.page_dtype)
        table = (self.cell.rows, self.cell.model.vocab_size)
        counts = TokenCounts(self._abstract(table, bool), self._abstract(table, np.int32))
        return DeviceState(
            sequence,
            [(pages, pages)] * self.cell.model.num_layers,
            [counts] * self.cell.mesh.num_micro_batches if sampling else None,
            self._abstract(self.slots_shape, np.int32),
            mailbox,
        )

    def inputs(self, kind: Literal["prefill", "decode"]) -> jax.ShapeDtypeStruct | None:
        """The host's packed batch."""
        if self.role == "expert":
            return None
        layout = StepLayout.of(self.cell, kind)
        return self._abstract((self.cell.mesh.num_micro_batches, layout.num_rows, layout.width), np.int32)

    def results(self, key: Key) -> tuple[DeviceState, Emitted | None, Any, Any]:
        """What a program returns: state, what it emits, fault, dropped rows."""
        kind, sampling = key
        fault, dropped = self._abstract((2,), np.int32), self._abstract((), np.int32)
        if self.role == "expert":
            return self.state(sampling), None, fault, dropped
        num_steps = self.cell.num_steps if kind == "decode" else 1
        shape = (num_steps, self.cell.mesh.num_micro_batches, StepLayout.of(self.cell, kind).num_rows)
        emitted = Emitted(self._abstract(shape, np.int32))
        if sampling:
            top, real = (*shape, self.cell.num_top_logprobs), np.float32
            emitted = Emitted(emitted.tokens, *map(self._abstract, (shape, top, top), (real, np.int32, real)))
        return self.state(sampling), emitted, fault, dropped

    def _abstract(self, shape: tuple[int, ...], dtype) -> Any:
        return jax.ShapeDtypeStruct((self.mesh.devices.size, *shape), dtype, sharding=self.sharding)


def on_each_device(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """A function of one device's arrays as a function of arrays over the joint mesh."""

    def wrapped(*args):
        args = jax.tree.map(lambda a: a[0], args)  # every array's leading axis is the device: of size 1 here
        return jax.tree.map(lambda a: a[None], function(*args))

    spec = PartitionSpec(AXIS)
    return jax.shard_map(wrapped, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)


def slot_bytes(cell: CellConfig) -> int:
    """What a mailbox slot must hold: the largest message of the cell's programs (transport "push")."""
    sizes = []
    for kind in ("prefill", "decode"):
        exchange = CellProgram(cell, kind, False, "attention").exchange
        assert isinstance(exchange, PushExchange)
        sizes.append(exchange.slot_bytes)
    return max(sizes)


def lower_program(cell: CellConfig, mesh: Mesh, role: Role, key: Key) -> jax.stages.Lowered:
    """Traces one program of a cell for the role that the calling process plays.

    Args:
      cell: sizes.
      mesh: `program_mesh` of the role, of real devices or of a topology's.
      role: "attention", "expert", "inline" or "colocated".
      key: (kind, sampling).

    Returns:
      The lowered program of (attention params, expert params, DeviceState (donated), inputs).
    """
    kind, sampling = key
    abstract = AbstractCell(cell, mesh, role)
    push = "reference" if mesh.devices.flat[0].platform == "cpu" else "pallas"
    program = on_each_device(CellProgram(cell, kind, sampling, role, push), mesh)
    # keep_unused: its arguments are those of AbstractCell, so that a compiled program can come back from disk alone.
    return jax.jit(program, donate_argnums=(2,), keep_unused=True, compiler_options=COMPILER_OPTIONS).lower(
        *abstract.params(), abstract.state(sampling), abstract.inputs(kind)
    )
