"""Which exchange a program of a mesh calls: one class a transport, with one interface."""

import dataclasses
from typing import Literal

from jmoe.sharding.exchange import Exchange
from jmoe.sharding.mesh_config import MeshConfig
from jmoe.sharding.push_exchange import PushExchange


def exchange_of(
    mesh: MeshConfig,
    role: str,
    hidden_size: int,
    capacity: int,
    num_experts_per_tok: int,
    dtype,
    implementation: Literal["pallas", "reference"] | None = None,
) -> Exchange:
    """The exchange of a mesh's transport for one micro-batch of `capacity` rows a replica.

    Args:
      mesh: sizes, and the transport.
      role: what the program plays: "attention", "expert" or, with "ppermute", "inline" for both.
      hidden_size, num_experts_per_tok, dtype: of a row.
      capacity: the most rows.
      implementation: of a push (`PushExchange`).

    Raises:
      ValueError: a role that the transport has no program for, or a hidden size that the tensor ranks can't share.
    """
    sizes = (mesh, hidden_size, capacity, num_experts_per_tok, dtype)
    if not mesh.roles_apart:
        return Exchange.of(*sizes)
    if role not in ("attention", "expert"):
        raise ValueError(f"role: expected 'attention' or 'expert' with transport {mesh.transport!r}, got {role!r}")
    return dataclasses.replace(PushExchange.of(*sizes).playing(role), implementation=implementation)
