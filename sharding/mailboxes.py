"""Mailboxes: memory of each device that the other role's devices write into, and their kernels' address tables."""

import json
import os
import pathlib
import socket
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from jmoe.pallas_kernels.push_host import HostMailbox, close_host_mailbox
from jmoe.pallas_kernels.push_plan import (
    TABLE_DEADLINE,
    TABLE_DEVICE,
    TABLE_HEAD,
    TABLE_OWN,
    TABLE_SLOT_UNITS,
    TICK_NS,
    VECTOR_BYTES,
    MailboxMap,
    slots_for,
)
from jmoe.sharding import cuda_driver
from jmoe.sharding.mesh_config import MeshConfig
from jmoe.sharding.rounds import build_rounds

_BOOT_ID = pathlib.Path("/proc/sys/kernel/random/boot_id")
DEADLINE_S = {"gpu": 8.0, "cpu": 60.0}  # of one wait: far above a stage, below the host's deadline for a step


def mailbox_map(mesh: MeshConfig) -> MailboxMap:
    """Sections and slots of each mailbox: a role may be `num_micro_batches` messages ahead of what the other takes."""
    return MailboxMap(build_rounds(mesh).num_rounds, slots_for(mesh.num_micro_batches))


def table_shape(mesh: MeshConfig) -> tuple[int, ...]:
    """Of one device's address table."""
    return (mailbox_map(mesh).table_words,)


class Mailboxes:
    """The mailboxes of the devices that this process holds, and the way to their peers'.

    Open them, hand `handles()` to every process of the cell, `connect` all of them, and give each device its `table`.

    Args:
      mesh: which devices exchange rows.
      devices: (index on the joint axis, device) of this process's devices.
      slot_bytes: of the largest message, `PushExchange.slot_bytes` (the largest over a cell's programs).
      deadline_s: how long a kernel waits for a peer before it gives up; None takes DEADLINE_S.

    Raises:
      ValueError: devices of a kind that has no mailbox, or memory that is not to be had.
    """

    def __init__(
        self,
        mesh: MeshConfig,
        devices: Sequence[tuple[int, jax.Device]],
        slot_bytes: int,
        deadline_s: float | None = None,
    ):
        self.mesh = mesh
        self.map = mailbox_map(mesh)
        self.slot_bytes = -(-slot_bytes // 256) * 256
        self._devices = dict(devices)
        seconds = deadline_s or max(DEADLINE_S.get(d.platform, 0.0) for d in self._devices.values())
        self._deadline = max(1, int(seconds * 1e9) // TICK_NS)
        self._own: dict[int, int] = {}  # addresses, or numbers of host mailboxes
        self._peers: dict[tuple[int, int], int] = {}  # (device, peer) -> where the peer's mailbox is for the device
        self._imported: list[tuple[int, int]] = []  # (ordinal, address)
        for index, device in devices:
            if device.platform not in ("cpu", "gpu"):
                raise ValueError(f"Mailboxes: expected CPU devices or GPUs, got {device.platform!r}")
            on_host = device.platform == "cpu"
            size = self.map.num_bytes(self.slot_bytes)
            self._own[index] = HostMailbox().open() if on_host else cuda_driver.allocate(_ordinal(device), size)

    def handles(self) -> dict[int, bytes]:
        """What other processes need to reach these mailboxes, by index on the joint axis."""
        return {index: self._handle(index) for index in self._own}

    def connect(self, handles: Mapping[int, bytes]) -> None:
        """Maps the mailbox of every partner of a device held here.

        Raises:
          ValueError: a partner without a handle, on another host, in another process on CPU, or out of reach.
        """
        for index, device in self._devices.items():
            for peer in partners(self.mesh, index):
                if peer not in handles:
                    raise ValueError(f"Mailboxes.connect: expected a handle of device {peer}, got {sorted(handles)}")
                self._peers[index, peer] = self._reach(index, device, peer, json.loads(handles[peer]))

    def table(self, device_index: int) -> np.ndarray:
        """`[words]` int32 for a device's kernels: its mailbox, the deadline, its partner's mailbox in each round.

        Raises:
          ValueError: a device of another process, or mailboxes that are not connected.
        """
        if device_index not in self._own:
            raise ValueError(f"Mailboxes.table: expected one of {sorted(self._own)}, got {device_index}")
        table = np.zeros(table_shape(self.mesh), np.int32)
        table[TABLE_DEVICE] = device_index
        table[TABLE_SLOT_UNITS] = self.slot_bytes // VECTOR_BYTES
        table[TABLE_DEADLINE] = self._deadline
        table[TABLE_OWN : TABLE_OWN + 2] = _words(self._own[device_index])
        for r, pairs in enumerate(build_rounds(self.mesh).pairs):
            peers = [e if a == device_index else a for a, e in pairs if device_index in (a, e)]
            for peer in peers:
                if (device_index, peer) not in self._peers:
                    raise ValueError("Mailboxes.table: expected connected mailboxes (connect), got none")
                table[TABLE_HEAD + 2 * r : TABLE_HEAD + 2 * r + 2] = _words(self._peers[device_index, peer])
        return table

    def close(self) -> None:
        """Unmaps what others own, gives back what is ours. No program may run any more."""
        for ordinal, address in self._imported:
            cuda_driver.close_import(ordinal, address)
        for index, mailbox in self._own.items():
            device = self._devices[index]
            if device.platform == "cpu":
                close_host_mailbox(mailbox)
            else:
                cuda_driver.free(_ordinal(device), mailbox)
        self._imported, self._own, self._peers = [], {}, {}

    def _handle(self, index: int) -> bytes:
        device, mailbox = self._devices[index], self._own[index]
        handle = {"host": _host(), "process": os.getpid(), "mailbox": mailbox, "slot_bytes": self.slot_bytes}
        if device.platform == "gpu":
            handle |= {"ordinal": _ordinal(device), "ipc": cuda_driver.export(_ordinal(device), mailbox).hex()}
        return json.dumps(handle).encode()

    def _reach(self, index: int, device: jax.Device, peer: int, handle: dict) -> int:
        if handle["slot_bytes"] != self.slot_bytes:
            raise ValueError(
                f"Mailboxes.connect: expected slots of {self.slot_bytes} bytes at device {peer}, "
                f"got {handle['slot_bytes']}"
            )
        if handle["host"] != _host():
            raise ValueError(
                f"Mailboxes.connect: expected device {peer} on this host ({_host()!r}), got {handle['host']!r}; "
                "transport 'ppermute' goes from host to host"
            )
        here = handle["process"] == os.getpid()
        if device.platform == "cpu":
            if not here:
                raise ValueError(f"Mailboxes.connect: expected CPU device {peer} in this process, got another's")
            return handle["mailbox"]
        if here:
            cuda_driver.enable_peer_access(_ordinal(device), handle["ordinal"])
            return handle["mailbox"]
        address = cuda_driver.import_(_ordinal(device), bytes.fromhex(handle["ipc"]))
        self._imported.append((_ordinal(device), address))
        return address


def partners(mesh: MeshConfig, index: int) -> list[int]:
    """The devices of the other role with which a device exchanges rows."""
    pairs = (pair for r in build_rounds(mesh).pairs for pair in r if index in pair)
    return sorted({e if a == index else a for a, e in pairs})


def _ordinal(device: jax.Device) -> int:
    """CUDA's number of a device."""
    number = device.local_hardware_id
    return device.id if number is None else number


def _host() -> str:
    """Which host this is, by the boot of its kernel: containers may share a name."""
    return _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else socket.gethostname()


def _words(address: int) -> np.ndarray:
    """An address as two words, low one first."""
    return np.array([address], np.uint64).view(np.int32)
