"""Brings a cell's workers up: children of this process, or workers that listen on other hosts. No JAX."""

import dataclasses
import pathlib
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

import jmoe
from jmoe.serving.deadlines import Deadlines
from jmoe.serving.errors import CellFailedError, StepTimeoutError
from jmoe.serving.wire import Channel, WireError, handshake
from jmoe.serving.worker_process import DEFAULT_COMMAND, WorkerProcess

TOKEN_VARIABLE = "JMOE_WORKER_TOKEN"
_ACCEPT_S = 0.1  # between looks at the children and the clock
_HANDSHAKE_S = 2.0
_SEND_S = 5.0


@dataclasses.dataclass(frozen=True, slots=True)
class WorkerPlace:
    """Where one worker stands: its role, its devices, and its address (None: a child of this process)."""

    index: int
    role: str
    num_devices: int
    local_device_ids: tuple[int, ...] | None = None
    address: tuple[str, int] | None = None

    @property
    def name(self) -> str:
        return f"worker {self.index} ({self.role})"


class Worker:
    """A worker's place with what belongs to it at run time."""

    def __init__(self, place: WorkerPlace):
        self.place = place
        self.process: WorkerProcess | None = None
        self.channel: Channel | None = None
        self.hello: dict[str, Any] = {}
        self.last_seen = time.monotonic()

    def last_lines(self) -> str:
        return self.process.last_lines() if self.process else ""


@dataclasses.dataclass(frozen=True, slots=True)
class WorkerStart:
    """How workers are started.

    Attributes:
      token: the cell's secret, at least `wire.MIN_TOKEN_LEN` characters.
      command: what starts a child; the address and the index are appended.
      log_dir: where each child's output goes besides its last lines; None for nowhere.
    """

    token: str = dataclasses.field(repr=False)
    command: tuple[str, ...] = DEFAULT_COMMAND
    log_dir: pathlib.Path | None = None

    def bring_up(self, workers: Sequence[Worker], deadlines: Deadlines, check: Callable[[], None]) -> None:
        """Starts or reaches every worker and shakes hands with it; `check` is called often and may raise.

        Raises:
          StepTimeoutError: not all came within `deadlines.start_s`.
          CellFailedError: a worker on another host refused, or runs another version.
        """
        deadline = time.monotonic() + deadlines.start_s

        def check_all() -> None:
            check()
            if time.monotonic() > deadline:
                late = [worker for worker in workers if worker.channel is None]
                names = ", ".join(worker.place.name for worker in late)
                raise StepTimeoutError(
                    f"start: no connection within {deadlines.start_s:g} s with {names}{late[0].last_lines()}"
                )

        children = [worker for worker in workers if worker.place.address is None]
        if children:
            with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
                for worker in children:
                    self._launch(worker, f"127.0.0.1:{server.getsockname()[1]}")
                while any(worker.channel is None for worker in children):
                    check_all()
                    self._accept(server, workers)
        for worker in workers:
            while worker.channel is None:
                check_all()
                self._reach(worker)

    def _launch(self, worker: Worker, address: str) -> None:
        place, log = worker.place, None
        if self.log_dir:
            self.log_dir.mkdir(parents=True, exist_ok=True)
            log = self.log_dir / f"worker-{place.index}-{place.role}.log"
        command = (*self.command, "--connect", address, "--index", str(place.index))
        worker.process = WorkerProcess(place.name, command, {TOKEN_VARIABLE: self.token}, log)

    def _accept(self, server: socket.socket, workers: Sequence[Worker]) -> None:
        """Takes one connection in, if one comes and holds the token; anything else is dropped and the wait goes on."""
        server.settimeout(_ACCEPT_S)
        try:
            sock, _ = server.accept()
        except TimeoutError:
            return
        channel = Channel(sock)
        try:
            hello = handshake(channel, self.token, "parent", {"version": jmoe.__version__}, _HANDSHAKE_S)
        except (OSError, EOFError, WireError):
            channel.close()
            return
        index = hello.get("index")
        if not isinstance(index, int) or not 0 <= index < len(workers) or workers[index].channel:
            channel.close()
            return
        _admit(workers[index], channel, hello)

    def _reach(self, worker: Worker) -> None:
        """Tries once to connect to a worker that listens on another host."""
        assert worker.place.address is not None
        try:
            channel = Channel(socket.create_connection(worker.place.address, timeout=_HANDSHAKE_S))
        except OSError:
            time.sleep(_ACCEPT_S)  # not there yet
            return
        try:
            hello = handshake(channel, self.token, "parent", {"version": jmoe.__version__}, _HANDSHAKE_S)
        except (OSError, EOFError, WireError) as e:
            channel.close()
            raise CellFailedError(f"{worker.place.name} at {worker.place.address}: {e}") from e
        _admit(worker, channel, hello)


def _admit(worker: Worker, channel: Channel, hello: dict[str, Any]) -> None:
    version, port = hello.get("version"), hello.get("spare_port")
    if version != jmoe.__version__ or not isinstance(port, int) or not isinstance(hello.get("pid"), int):
        raise CellFailedError(f"{worker.place.name}: expected a worker of jmoe {jmoe.__version__}, got {version!r}")
    channel.socket.settimeout(_SEND_S)
    worker.channel, worker.hello = channel, hello


def split_address(address: str) -> tuple[str, int]:
    """'host:port' or '[v6]:port' as a pair; ValueError with the sentence otherwise."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"worker address: expected HOST:PORT, got {address!r}")
    return host.strip("[]"), int(port)
