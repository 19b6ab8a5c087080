"""Both roles' programs of a push exchange on CPU devices of this process, one program and one thread a device.

Not one program a role: XLA's CPU client runs one program of several devices at a time, and the roles would never meet.
"""

import concurrent.futures
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jmoe.sharding.exchange import Chain
from jmoe.sharding.mailboxes import Mailboxes
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
        programs = {role: self._compiled(program, role) for role in roles}

        def one(index: int) -> Any:
            part = jax.tree.map(lambda a: np.asarray(a)[index], given)
            words = self.mailboxes.table(index), np.int32(sequences[index]), part
            found = programs[self.exchange.mesh.role(index)](*jax.device_put(words, self.devices[index]))
            return jax.tree.map(np.asarray, found)

        indices = [i for role in roles for i in self.indices(role)]
        with concurrent.futures.ThreadPoolExecutor(len(indices)) as pool:
            found = dict(zip(indices, pool.map(one, indices), strict=True))
        return {
            role: jax.tree.map(lambda *parts: np.stack(parts), *(found[i] for i in self.indices(role)))
            for role in roles
        }

    def _compiled(self, program: Callable[..., Any], role: str) -> Any:
        exchange = self.exchange.playing(role)  # type: ignore[arg-type]
        return jax.jit(lambda table, number, part: program(exchange, Chain.start(number, mailbox=table), part))
