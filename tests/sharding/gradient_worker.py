"""One process of two, which traces and differentiates its own role alone: PROCESS_ID PORT M N FOLDER.

Process 0 plays attention on M devices, process 1 the experts on N. The order of exchanges goes in and comes out as a
float, with a zero cotangent: backward exchanges then form a chain that neither program can drop or reorder.
"""

import functools
import os
import pathlib
import sys

os.environ.update(JAX_PLATFORMS="cpu", NPROC="16")
sys.path.insert(0, str(pathlib.Path(__file__).parent))

import jax
import numpy as np
from two_role_gradient import Problem, attention_step, expert_step

from jmoe.lowering import on_each_device
from jmoe.sharding.mesh_config import MeshConfig
from jmoe.sharding.meshes import from_shards, joint_mesh, local_devices


def on_local_devices(mesh, values):
    """One tree of arrays a local device -> the tree of arrays over the joint mesh."""

    def place(*arrays):
        shards = zip(local_devices(mesh), arrays, strict=True)
        return from_shards(mesh, {device: jax.device_put(np.asarray(a)[None], device) for (_, device), a in shards})

    return jax.tree.map(place, *values)


def main(process_id: int, port: str, attention: int, expert: int, folder: pathlib.Path) -> None:
    jax.config.update("jax_num_cpu_devices", (attention, expert)[process_id])
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    address = f"127.0.0.1:{port}"
    jax.distributed.initialize(
        address, num_processes=2, process_id=process_id, initialization_timeout=60,
        cluster_detection_method="deactivate", coordinator_bind_address=address if process_id == 0 else None,
    )  # fmt: skip
    problem = Problem.of(MeshConfig(attention, expert))
    devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
    mesh = joint_mesh(problem.cell.mesh, devices)
    order = np.float32(0)
    if process_id == 0:
        step = functools.partial(attention_step, problem)
        fields = ("topk_idx", "valid", "cotangent", "x", "topk_weights")
        shares = [(*(getattr(problem, name)[r] for name in fields), order) for r in range(attention)]
    else:
        step = functools.partial(expert_step, problem)
        shares = [(problem.held_by(node), order) for node in range(expert)]
    gradients = jax.jit(on_each_device(step, mesh))(*on_local_devices(mesh, shares))
    for name, array in gradients.items():
        shards = {shard.device: np.asarray(shard.data)[0] for shard in array.addressable_shards}
        np.save(folder / f"{name}.{process_id}.npy", np.stack([shards[d] for _, d in local_devices(mesh)]))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), pathlib.Path(sys.argv[5]))
