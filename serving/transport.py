"""Which transport a cell takes where nobody said, and why one that was named can't run. No JAX."""

import logging
from collections.abc import Sequence
from typing import Literal

from jmoe.serving.host_devices import no_peer_access
from jmoe.serving.process_options import ProcessOptions
from jmoe.serving.worker_start import split_address
from jmoe.sharding.mesh_config import MeshConfig

logger = logging.getLogger(__name__)


def choose_transport(
    mesh: MeshConfig, platform: Literal["cpu", "gpu"], kind: str, processes: ProcessOptions | None = None
) -> Literal["ppermute", "push"]:
    """What "auto" stands for: "push" where all devices are GPUs of one host that can write into each other's memory.

    Args:
      mesh: how many devices, and what was asked for.
      platform: what the cell runs on.
      kind: the executor, "inline" or "processes" ("auto" is the latter on GPUs).
      processes: of the latter, where its workers are.

    Raises:
      ValueError: "push" was named and can't run, with the reason.
    """
    if mesh.colocated or mesh.transport == "ppermute":
        return "ppermute"
    why = _no_push(mesh, platform, kind, processes.addresses if processes else ())
    if mesh.transport == "push":
        if why is not None:
            raise ValueError(f"transport: expected devices that can 'push' into each other's memory, got none: {why}")
        return "push"
    if platform == "cpu":
        return "ppermute"
    logger.info("transport: %s", "push" if why is None else f"ppermute ({why})")
    return "push" if why is None else "ppermute"


def _no_push(mesh: MeshConfig, platform: str, kind: str, addresses: Sequence[str]) -> str | None:
    """Why rows can't be pushed; None if they can."""
    if platform == "cpu":
        if kind == "processes":
            return "on CPU only devices of one process share memory; take the executor 'inline' or 'ppermute'"
        if mesh.num_attention_devices > 1 and mesh.num_expert_devices > 1:
            # Its client starts a program of several devices when the one before has ended, whoever waits for it.
            return "on CPU XLA runs one program of several devices at a time; give one role a single device"
        return None
    hosts = {split_address(address)[0] for address in addresses}
    if len(hosts) > 1:
        return f"workers on several hosts ({', '.join(sorted(hosts))})"
    return no_peer_access(mesh.num_devices)
