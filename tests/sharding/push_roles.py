"""Both roles' programs of a push exchange on CPU devices of this process, each over its own devices, from two threads."""

import concurrent.futures
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jmoe.lowering import on_each_device
from jmoe.sharding.exchange import Chain
from jmoe.sharding.mailboxes import Mailboxes
from jmoe.sharding.mesh_config import AXIS
from jmoe.sharding.push_exchange import PushExchange

ROLES = ("attention", "expert")


@dataclasses.dataclass
class Roles:
    """Programs of both roles over one set of mailboxes; what they return is by role, devices in front."""

    exchange: PushExchange
    deadline_s: float = 30.0

    def __post_init__(self):
        mesh = self.exchange.mesh
        self.devices = jax.devices()[: mesh.num_devices]
        self.mailboxes = Mailboxes(mesh, list(enumerate(self.devices)), self.exchange.slot_bytes, self.deadline_s)
        self.mailboxes.connect(self.mailboxes.handles())

    def indices(self, role: str) -> range:
        attention = self.exchange.mesh.num_attention_devices
        return range(attention) if role == "attention" else range(attention, self.exchange.mesh.num_devices)

    def run(self, program: Callable[..., Any], given: Any, sequences: Sequence[int], roles=ROLES) -> dict[str, Any]:
        """program(exchange of the role, chain, this device's part of `given`), for all devices of `roles` at once."""

        def one(role: str) -> Any:
            own, exchange = self.indices(role), self.exchange.playing(role)  # type: ignore[arg-type]
            tables = jnp.asarray(np.stack([self.mailboxes.table(i) for i in own]))
            numbers = jnp.asarray([sequences[i] for i in own], jnp.int32)
            part = jax.tree.map(lambda a: np.asarray(a)[own.start : own.stop], given)

            def on_device(table, number, part):
                return program(exchange, Chain.start(number, mailbox=table), part)

            mesh = Mesh(np.array(self.devices[own.start : own.stop]), (AXIS,))
            return jax.tree.map(np.asarray, jax.jit(on_each_device(on_device, mesh))(tables, numbers, part))

        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            return dict(zip(roles, pool.map(one, roles), strict=True))
