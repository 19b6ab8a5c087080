"""TensorGroup: collectives over the tensor ranks of one node, in a program of one role."""

import dataclasses

import jax
import jax.numpy as jnp

from jmoe.sharding.mesh_config import AXIS, MeshConfig


@dataclasses.dataclass(frozen=True)
class TensorGroup:
    """The tensor ranks of this device's node; with size 1 every operation is the identity.

    `groups` partition the axis of the program (the other role's devices, if they are on it, stand alone), so that only
    devices of one role take part: a program of one role may call these although the other role's program does not.
    """

    size: int = 1
    first_device: int = 0
    groups: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(cls, mesh: MeshConfig, role: str) -> "TensorGroup":
        """The groups of one role."""
        attention, total = mesh.num_attention_devices, mesh.num_devices
        start, stop, size = (
            (0, attention, mesh.attention_tensor)
            if role == "attention"
            else (mesh.first_expert_device, total, mesh.expert_tensor)
        )
        devices = mesh.program_devices(role)  # the program's axis
        start, stop = start - devices.start, stop - devices.start
        nodes = [tuple(range(d, d + size)) for d in range(start, stop, size)]
        alone = [(d,) for d in range(len(devices)) if not start <= d < stop]
        return cls(size, start, tuple(sorted(nodes + alone)))

    def rank(self) -> jax.Array:
        """This device's tensor rank, int32 scalar."""
        if self.size == 1:
            return jnp.int32(0)
        return (jax.lax.axis_index(AXIS) - self.first_device) % self.size

    def sum(self, x: jax.Array) -> jax.Array:
        """The sum over the group's ranks, on each of them."""
        if self.size == 1:
            return x
        return jax.lax.psum(x, AXIS, axis_index_groups=[list(g) for g in self.groups])

    def gather(self, x: jax.Array) -> jax.Array:
        """`[...]` on each rank -> `[size, ...]` on all: a sum of zero-padded parts, which is exact.

        A sum because groups of uneven size (the other role's devices) rule out all_gather, and because a permute
        inside a branch waits for every device on CPU.
        """
        if self.size == 1:
            return x[None]
        if all(len(group) == self.size for group in self.groups):  # no devices of another role
            return jax.lax.all_gather(x, AXIS, axis_index_groups=[list(g) for g in self.groups])
        slots = jnp.zeros((self.size, *x.shape), x.dtype)
        return self.sum(jax.lax.dynamic_update_index_in_dim(slots, x, self.rank(), 0))
