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


def from_shards(mesh: Mesh, shards: dict[jax.Device, jax.Array]) -> jax.Array:
    """A global array whose leading axis is the device: this process's shards, each `[1, ...]` on its device.

    The other processes' shards need not exist anywhere for this process; all shards here have one shape.
    """
    parts = list(shards.values())
    shape = (mesh.devices.size, *parts[0].shape[1:])
    return jax.make_array_from_single_device_arrays(shape, NamedSharding(mesh, PartitionSpec(AXIS)), parts)


def local_devices(mesh: Mesh) -> list[tuple[int, jax.Device]]:
    """(index on the joint axis, device) of the devices that this process holds."""
    here = jax.process_index()
    return [(i, d) for i, d in enumerate(mesh.devices.flat) if d.process_index == here]
