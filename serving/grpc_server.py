"""GrpcServer: listens, says how it is (health), loads, serves, drains. One event loop in one thread. No JAX."""

import asyncio
import contextlib
import signal
import threading
from collections.abc import Callable

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from jmoe.serving.errors import CellFailedError
from jmoe.serving.grpc_config import GrpcConfig
from jmoe.serving.grpc_service import GenerationService
from jmoe.serving.protos import jmoe_pb2, jmoe_pb2_grpc
from jmoe.serving.server import Server

SERVICE = jmoe_pb2.DESCRIPTOR.services_by_name["Generation"].full_name
LOADING_THREAD = "jmoe-load"
_Status = health_pb2.HealthCheckResponse
_STOP_S = 2.0  # how long calls may still end by themselves once nothing runs
_LINGER_S = 1.0  # how long a failed server still answers, so that health checks and clients hear why
_LOADING_S = 5.0  # how long a signal waits for a model that is loading
_CLOSE_S = 60.0  # how long closing may take: the engine alone waits 30 s for a call in flight


class GrpcServer:
    """The network side of a Server: jmoe.v1.Generation, grpc.health.v1 and reflection.

    Args:
      config: where to listen, and bounds.
    """

    def __init__(self, config: GrpcConfig):
        self.config = config
        self.port = 0
        self.failed = asyncio.Event()
        self.failure: CellFailedError | None = None
        self._service = GenerationService(config)
        self._health = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]
        self._server: Server | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        size = config.max_message_bytes
        options = [
            ("grpc.max_receive_message_length", size),
            ("grpc.max_send_message_length", size),
            ("grpc.keepalive_time_ms", 30_000),  # a client that vanished without a word is noticed,
            ("grpc.keepalive_timeout_ms", 20_000),  # its calls end, and their pages are free
            ("grpc.max_connection_age_ms", int(config.max_connection_s * 1000)),
            ("grpc.max_connection_age_grace_ms", 600_000),
            ("grpc.so_reuseport", 0),  # a second server on this port is an error, not a share of the calls
        ]
        self._grpc = grpc.aio.server(options=options, maximum_concurrent_rpcs=config.max_calls)
        jmoe_pb2_grpc.add_GenerationServicer_to_server(self._service, self._grpc)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._grpc)

    async def start(self) -> None:
        """Binds and answers; health says NOT_SERVING until a server is attached.

        Raises:
          OSError: the address can't be had.
        """
        self._loop = asyncio.get_running_loop()
        await self._set_health(_Status.NOT_SERVING)
        credentials, address = self.config.credentials(), self.config.address
        try:
            if credentials is None:
                self.port = self._grpc.add_insecure_port(address)
            else:
                self.port = self._grpc.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise OSError(f"can't listen on {address}: {error}") from error
        await self._grpc.start()

    async def attach(self, server: Server) -> None:
        """Begins to serve; health says SERVING until the cell fails or a drain begins."""
        loop = self._loop
        assert loop is not None, "start() comes first"
        self._server = server
        self._service.attach(server)
        await self._set_health(_Status.SERVING)

        def failed(failure: CellFailedError) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(self._begin_failing, failure)

        server.on_failure(failed)

    def _begin_failing(self, failure: CellFailedError) -> None:
        self._service.state, self.failure = "failed", failure
        # The set method only writes a dict and wakes watchers: it ends in this turn of the loop or the next.
        task = asyncio.ensure_future(self._set_health(_Status.NOT_SERVING))
        task.add_done_callback(lambda _: self.failed.set())

    async def drain(self, grace_s: float | None = None) -> bool:
        """Refuses new requests, lets running ones finish, then stops listening; False if some were cut off."""
        self._service.state = "draining"
        await self._set_health(_Status.NOT_SERVING)
        grace_s = self.config.grace_s if grace_s is None else grace_s
        done = self._server is None or await asyncio.to_thread(self._server.drain, grace_s)
        await self.stop()
        return done

    async def stop(self) -> None:
        """Stops listening; calls that have not ended after 2 s are cancelled."""
        await self._grpc.stop(_STOP_S)

    async def _set_health(self, status: "_Status.ServingStatus") -> None:
        for name in ("", SERVICE):
            await self._health.set(name, status)


async def run_grpc(config: GrpcConfig, load: Callable[[], Server], say: Callable[[str], None]) -> int:
    """Serves until SIGTERM or SIGINT (drains, returns 0; a second one ends at once), or until the cell fails (raises).

    Args:
      config: where to listen, and bounds.
      load: makes the server; runs in a thread of its own while health already answers NOT_SERVING.
      say: gets a line when something has changed.

    Raises:
      CellFailedError: the cell failed, here or in `load`.
      OSError, ValueError: what `start` and `load` raise.
    """
    stop = asyncio.Event()
    _on_signals(stop.set)
    front = GrpcServer(config)
    await front.start()
    loading = _Loading(load)
    try:
        await _first_of(stop.wait(), loading.done.wait())
        if not loading.done.is_set():
            say("stopped while the model was loading")
            return 0
        server = loading.result()
        await front.attach(server)
        say(f"serving {server.name} on {_shown(config.host)}:{front.port}")
        await _first_of(stop.wait(), front.failed.wait())
        if front.failure is not None:
            await asyncio.sleep(_LINGER_S)
            raise front.failure
        say(f"draining: running requests have {config.grace_s:g} s")
        done = await front.drain()
        if front.failure is not None:
            raise front.failure
        say("drained" if done else "drained; requests that were still running were cut off")
        return 0
    finally:
        await front.stop()
        await loading.close()


def _on_signals(stop: Callable[[], None]) -> None:
    """The first SIGTERM or SIGINT calls `stop`; after that both do what they always do."""
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGTERM, signal.SIGINT)

    def first() -> None:
        for number in numbers:
            loop.remove_signal_handler(number)
        stop()

    for number in numbers:
        loop.add_signal_handler(number, first)


class _Loading:
    """Loads, holds and closes the server in one daemon thread, so that a signal need not wait for a compiler.

    One thread for all three: worker processes may be bound to the life of the thread that started them
    (PR_SET_PDEATHSIG).
    """

    def __init__(self, load: Callable[[], Server]):
        self.done = asyncio.Event()
        self._closed = asyncio.Event()
        self._let_go = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._load = load
        self._server: Server | None = None
        self._error: BaseException | None = None
        threading.Thread(target=self._run, name=LOADING_THREAD, daemon=True).start()

    def _run(self) -> None:
        try:
            self._server = self._load()
        except BaseException as error:
            self._error = error
        self._tell(self.done)
        self._let_go.wait()
        try:
            if self._server is not None:
                self._server.close()
        finally:
            self._tell(self._closed)

    def _tell(self, event: asyncio.Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(event.set)

    def result(self) -> Server:
        """The server, or what went wrong instead."""
        if self._error is not None:
            raise self._error
        assert self._server is not None
        return self._server

    async def close(self) -> None:
        """Closes the server; one that is still loading is left behind after 5 s, to end with the process."""
        self._let_go.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_S if self.done.is_set() else _LOADING_S):
                await self._closed.wait()


async def _first_of(*waits) -> None:
    """Returns when one of them is done."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
