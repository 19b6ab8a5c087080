"""Orbax checkpoints: both halves saved as one, restored into two meshes in one call, or one role's part alone."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jmoe.config import ModelConfig
from jmoe.models.arrays import ArraySpec
from jmoe.models.model import array_specs
from jmoe.sharding.mesh_config import MeshConfig

Role = Literal["attention", "expert"]

# Which mesh axis splits a logical axis; an axis that it does not divide evenly stays whole.
RULES = {"vocab": "tensor", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor", "expert": "node"}


class Restored(NamedTuple):
    """What `restore_orbax` returns; a role that was not asked for is None."""

    config: ModelConfig
    attention: dict[str, jax.Array] | None
    experts: dict[str, jax.Array] | None


def role_mesh(mesh: MeshConfig, devices: Sequence[jax.Device], role: Role) -> Mesh:
    """One role's sub-mesh of the joint mesh: axes ("replica", "tensor") for attention, ("node", "tensor") for experts.

    Args:
      mesh: how many devices serve each role.
      devices: those of the joint axis, attention's first.
      role: which sub-mesh.
    """
    split = mesh.num_attention_devices
    if role == "attention":
        return Mesh(np.array(devices[:split]).reshape(mesh.attention, mesh.attention_tensor), ("replica", "tensor"))
    held = np.array(devices[mesh.first_expert_device : mesh.num_devices])
    return Mesh(held.reshape(mesh.expert, mesh.expert_tensor), ("node", "tensor"))


def save_orbax(
    folder: str | pathlib.Path,
    config: ModelConfig,
    attention: Mapping[str, jax.Array],
    experts: Mapping[str, jax.Array],
    *,
    overwrite: bool = False,
) -> None:
    """Saves both halves as one checkpoint; it appears whole or not at all.

    Args:
      folder: the checkpoint to make.
      config: saved beside the arrays.
      attention, experts: every parameter by path (`Model.arrays_by_path()`), each on any mesh.
      overwrite: replace a checkpoint that is there.

    Raises:
      ValueError: `folder` exists and overwrite is False, or the arrays are not those of `config`.
    """
    for role, specs, arrays in zip(("attention", "expert"), array_specs(config), (attention, experts), strict=True):
        expected, got = {p: s.shape for p, s in specs.items()}, {p: tuple(a.shape) for p, a in arrays.items()}
        if wrong := sorted(set(expected.items()) ^ set(got.items())):
            path = wrong[0][0]
            raise ValueError(f"save_orbax: {role} {path}: expected shape {expected.get(path)}, got {got.get(path)}")
    items = ocp.args.Composite(
        config=ocp.args.JsonSave(dataclasses.asdict(config)),
        attention=ocp.args.StandardSave(dict(attention)),
        expert=ocp.args.StandardSave(dict(experts)),
    )
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(pathlib.Path(folder).absolute(), args=items, force=overwrite)


def restore_orbax(
    folder: str | pathlib.Path, *, attention: Mesh | None = None, experts: Mesh | None = None
) -> Restored:
    """Restores the halves whose mesh is given, in one call; each device reads its own shards.

    Args:
      folder: what `save_orbax` made, on any meshes.
      attention, experts: where each half goes (see `role_mesh`); None leaves that role's arrays on disk.

    Raises:
      FileNotFoundError: no checkpoint there.
      ValueError: no mesh given.
    """
    if attention is None and experts is None:
        raise ValueError("restore_orbax: expected a mesh for attention, experts or both, got neither")
    folder = pathlib.Path(folder).absolute()
    if not folder.is_dir():
        raise FileNotFoundError(f"restore_orbax: expected an orbax checkpoint, got no folder {folder}")
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        saved: Any = checkpointer.restore(folder, args=ocp.args.Composite(config=ocp.args.JsonRestore()))
        config = _config_from(saved["config"])
        wanted = {}
        for role, mesh, specs in zip(("attention", "expert"), (attention, experts), array_specs(config), strict=True):
            if mesh is not None:
                wanted[role] = ocp.args.StandardRestore(_abstract(specs, mesh, config.dtype))
        arrays: Any = checkpointer.restore(folder, args=ocp.args.Composite(**wanted))
    return Restored(config, arrays.get("attention"), arrays.get("expert"))


def partition(spec: ArraySpec, mesh: Mesh) -> PartitionSpec:
    """How an array lies on a role's mesh, by `RULES`."""
    axes = []
    for size, axis in zip(spec.shape, spec.axes, strict=True):
        by = RULES.get(axis) if axis is not None else None
        axes.append(by if by in mesh.shape and size % mesh.shape[by] == 0 else None)
    return PartitionSpec(*axes)


def _abstract(specs: dict[str, ArraySpec], mesh: Mesh, dtype: str) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        path: jax.ShapeDtypeStruct(spec.shape, jnp.dtype(dtype), sharding=NamedSharding(mesh, partition(spec, mesh)))
        for path, spec in specs.items()
    }


def _config_from(saved: dict[str, Any]) -> ModelConfig:
    """JSON turns tuples into lists; turn them back."""
    fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in saved.items()}
    return ModelConfig(**fields)
