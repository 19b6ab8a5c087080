"""Exchanges message by message through the simulated network, for small cells. No JAX."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jmoe.planner.network import Network
from jmoe.planner.network_messages import many_to_many
from jmoe.planner.network_options import NetworkOptions
from jmoe.schedule import Stage


@dataclasses.dataclass(frozen=True)
class MessageTransfer:
    """One direction of a pass as messages; a `Carrier` for `jmoe.planner.lanes`.

    One rank of every tensor group is simulated: the other ranks do the same on NICs of their own. The two directions
    have networks of their own: links are full duplex, but data of one direction doesn't delay the other's.

    Attributes:
      options: of the networks.
      networks: one a cell, kept from pass to pass (connections keep their paths).
      num_bytes: `[L, m, C, senders, receivers]` of one rank's messages.
      first_sender, first_receiver: endpoint ids of the first of each.
    """

    options: NetworkOptions
    networks: Sequence[Network]
    num_bytes: np.ndarray
    first_sender: int
    first_receiver: int

    def carry(
        self, stage: Stage, start: np.ndarray, port_free: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Runs one stage's messages, cell by cell. As in `Carrier`; a message waits for its receiver's port."""
        sizes = self.num_bytes[stage.layer, stage.micro_batch]
        sent, received = start.copy(), np.maximum(port_free, start.max(axis=1, keepdims=True))
        num_senders, num_receivers = sizes.shape[1:]
        senders = self.first_sender + np.arange(num_senders)
        receivers = self.first_receiver + np.arange(num_receivers)
        for cell, cell_sizes in enumerate(sizes):
            messages = many_to_many(cell_sizes, senders, receivers, start[cell], self.options.posting)
            open_s = port_free[cell][messages.receiver - self.first_receiver]
            messages = dataclasses.replace(messages, ready_s=np.maximum(messages.ready_s, open_s))
            arrived = self.networks[cell].run(messages).arrived_s
            np.maximum.at(sent[cell], messages.sender - self.first_sender, arrived)
            np.maximum.at(received[cell], messages.receiver - self.first_receiver, arrived)
        return sent, received, np.zeros(())

    def busy_s(self) -> tuple[float, float]:
        """As in `Carrier`: bytes over the NICs' rate."""
        cells, senders, receivers = self.num_bytes.shape[2:]
        seconds = float(self.num_bytes.sum()) / (self.options.bytes_per_s * self.options.rails)
        return seconds / (cells * senders), seconds / (cells * receivers)
