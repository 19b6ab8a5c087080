"""The joint mesh and arrays over it, built from local shards only."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jmoe.sharding.mesh_config import AXIS, MeshConfig


def joint_mesh(config: MeshConfig, devices: Sequence[jax.Device]) -> Mesh:
    """The one-axis mesh in the order of `MeshConfig`: attention devices, then expert devices, or both roles on each.

    Raises:
      ValueError: too few devices.
    """
    if len(devices) < config.num_devices:
        split = f"{config.num_attention_devices} attention + {config.num_expert_devices} expert"
        raise ValueError(
            f"joint_mesh: expected at least {config.num_devices} devices "
            f"({'both roles on each' if config.colocated else split}), got {len(devices)}"
        )
    return Mesh(np.array(devices[: config.num_devices]), (AXIS,))


def program_mesh(config: MeshConfig, devices: Sequence[jax.Device], role: str) -> Mesh:
    """What a role's program runs over: the joint mesh, or where roles stand apart the role's own devices of it.

    Raises:
      ValueError: too few devices for the joint mesh.
    """
    own = config.program_devices(role)
    return Mesh(joint_mesh(config, devices).devices[own.start : own.stop], (AXIS,))


def device_index(config: MeshConfig, role: str) -> jax.Array:
    """This device's index on the joint axis, int32, within a program of a role."""
    return jax.lax.axis_index(AXIS) + config.program_devices(role).start


def from_shards(mesh: Mesh, shards: dict[jax.Device, jax.Array]) -> jax.Array:
    """A global array whose leading axis is the device: this process's shards, each `[1, ...]` on its device.

    The other processes' shards need not exist anywhere for this process; all shards here have one shape.
    """
    parts = list(shards.values())
    shape = (mesh.devices.size, *parts[0].shape[1:])
    return jax.make_array_from_single_device_arrays(shape, NamedSharding(mesh, PartitionSpec(AXIS)), parts)


def local_devices(mesh: Mesh, first_device: int = 0) -> list[tuple[int, jax.Device]]:
    """(index on the joint axis, device) of the devices that this process holds; the mesh begins at `first_device`."""
    here = jax.process_index()
    return [(i, d) for i, d in enumerate(mesh.devices.flat, first_device) if d.process_index == here]
