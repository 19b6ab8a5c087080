"""A worker process of one cell: follows its parent's numbered commands. Run as `python -m jmoe.serving.worker`.

As a child (`--connect`) it gets the token in the environment and calls its parent; on another host (`--listen`) it
waits for a parent that holds the same token, serves that one, and ends. Four threads: the main one follows commands (of
a run it waits for the start alone); one waits for results, maybe for ever in a collective, and answers in order; the
reader ends the process when the parent is gone; the last sends heartbeats.
This module imports no JAX: the `init` command says what JAX is to see, and only then is it loaded.
"""

import argparse
import contextlib
import ctypes
import functools
import os
import pathlib
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn, Protocol

import numpy as np

import jmoe
from jmoe.serving.errors import SequenceMismatchError
from jmoe.serving.executors.protocol import WAITING_FOR_PROGRAMS, ProgramKey
from jmoe.serving.wire import Channel, WireError, handshake
from jmoe.serving.worker_start import TOKEN_VARIABLE, split_address

HEARTBEAT_INTERVAL_S = 1.0
HANDSHAKE_S = 10.0
EXIT_REFUSED = 2  # bad arguments, or no handshake
EXIT_PARENT_GONE = 3
_MAX_TEXT = 2000  # characters of an error or a progress line on the wire
_MAX_QUEUED = 16  # commands; the parent has a few calls in flight at most
_PR_SET_PDEATHSIG = 1


class Runtime(Protocol):
    """What a worker does with its devices (`jmoe.cell_runtime.CellRuntime`; tests have a fake one)."""

    def open_mailboxes(self) -> dict[int, bytes]: ...

    def connect(self, handles: Mapping[int, bytes]) -> None: ...

    def load(self, source: str, progress: Callable[[str], None]) -> None: ...

    def compile(self, *keys: ProgramKey) -> str: ...

    def submit(self, key: ProgramKey, inputs: np.ndarray | None) -> Any: ...

    def collect(self, submitted: Any) -> dict[str, Any] | None: ...


RuntimeFactory = Callable[[Mapping[str, Any]], Runtime]
_Result = Callable[[], Any]  # waits for a command's value, or raises


def main(argv: Sequence[str] | None = None, runtime_factory: RuntimeFactory | None = None) -> NoReturn:
    """Connects to (or waits for) the parent and follows its commands until it says stop or goes away; then exits."""
    args = _parse(argv)
    token = _token(args)
    try:
        channel, spare = _connect(args, token) if args.connect else _listen(args, token)
    except (OSError, EOFError, WireError, ValueError) as e:
        _exit(EXIT_REFUSED, str(e))
    if runtime_factory is None:
        from jmoe.serving.worker_jax import start_jax_runtime as runtime_factory
    channel.socket.settimeout(None)
    commands: queue.Queue[dict[str, Any]] = queue.Queue(_MAX_QUEUED)
    threading.Thread(target=_read_commands, args=(channel, commands), name="commands", daemon=True).start()
    threading.Thread(target=_send_heartbeats, args=(channel,), name="heartbeats", daemon=True).start()
    _follow(channel, commands, runtime_factory, spare)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m jmoe.serving.worker", description=(__doc__ or "").splitlines()[0])
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--connect", metavar="HOST:PORT", help="the parent's address (used for its own children)")
    where.add_argument("--listen", metavar="HOST:PORT", help="wait here for a parent on another host")
    parser.add_argument("--index", type=int, default=-1, help="with --connect: which worker of the cell this is")
    parser.add_argument("--token-file", help=f"file that holds the cell's token; without it, ${TOKEN_VARIABLE}")
    parser.add_argument("--wait-s", type=float, default=86_400.0, help="with --listen: give up after so long")
    return parser.parse_args(argv)


def _token(args: argparse.Namespace) -> str:
    from_environment = os.environ.pop(TOKEN_VARIABLE, "")  # taken out: nothing that this process starts may see it
    return pathlib.Path(args.token_file).read_text().strip() if args.token_file else from_environment


def _connect(args: argparse.Namespace, token: str) -> tuple[Channel, socket.socket]:
    _die_with_parent()
    address = split_address(args.connect)
    channel = Channel(socket.create_connection(address, timeout=HANDSHAKE_S))
    spare = _spare_port(channel.socket.getsockname()[0])
    handshake(channel, token, "worker", _hello(args.index, spare), HANDSHAKE_S)
    return channel, spare


def _listen(args: argparse.Namespace, token: str) -> tuple[Channel, socket.socket]:
    """Waits for the parent; a peer that does not hold the token is turned away and the wait goes on."""
    host, port = split_address(args.listen)
    give_up = time.monotonic() + args.wait_s
    with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as server:
        where = f"{args.listen.rpartition(':')[0]}:{server.getsockname()[1]}"  # port 0 takes a free one
        print(f"jmoe worker: waiting for a parent on {where}", file=sys.stderr, flush=True)
        while (left := give_up - time.monotonic()) > 0:
            server.settimeout(left)
            sock, peer = server.accept()
            channel = Channel(sock)
            spare = _spare_port(sock.getsockname()[0])
            try:
                handshake(channel, token, "worker", _hello(args.index, spare), HANDSHAKE_S)
                return channel, spare
            except (OSError, EOFError, WireError) as e:
                print(f"jmoe worker: turned {peer[0]} away: {e}", file=sys.stderr, flush=True)
                channel.close()
                spare.close()
                time.sleep(0.1)  # slows guessing down
    raise TimeoutError(f"no parent came within {args.wait_s:.0f} s")


def _hello(index: int, spare: socket.socket) -> dict[str, Any]:
    return {"index": index, "pid": os.getpid(), "version": jmoe.__version__, "spare_port": spare.getsockname()[1]}


def _spare_port(host: str) -> socket.socket:
    """Holds a free port for JAX's coordinator: bound with SO_REUSEPORT but not listening, so gRPC can bind it too."""
    spare = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    spare.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    spare.bind((host, 0))
    return spare


def _die_with_parent() -> None:
    """On Linux the kernel kills this process when the thread that started it ends, even while it is stopped."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended in between
            os._exit(EXIT_PARENT_GONE)


def _read_commands(channel: Channel, commands: queue.Queue[dict[str, Any]]) -> NoReturn:
    """The reader thread. It ends the process by force: the main thread may be in a collective that never returns."""
    try:
        while True:
            commands.put_nowait(channel.receive())
    except (EOFError, OSError):
        _exit(EXIT_PARENT_GONE, "the parent is gone")
    except (WireError, queue.Full) as e:
        _exit(EXIT_PARENT_GONE, f"the parent sent what it may not: {type(e).__name__}: {e}")


def _send_heartbeats(channel: Channel) -> None:
    with contextlib.suppress(OSError):  # the reader thread sees it too, and ends the process
        while True:
            channel.send({"kind": "alive"})
            time.sleep(HEARTBEAT_INTERVAL_S)


def _exit(code: int, why: str = "") -> NoReturn:
    """Ends at once, without the exit handlers: JAX's wait for peers that may be dead."""
    if why:
        print(f"jmoe worker: {why}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _follow(
    channel: Channel, commands: queue.Queue[dict[str, Any]], runtime_factory: RuntimeFactory, spare: socket.socket
) -> NoReturn:
    """The main thread: one command after another, each answered under its own number, in order."""
    runtime, expected = None, 1
    answers: queue.Queue[tuple[Any, _Result]] = queue.Queue(_MAX_QUEUED)
    threading.Thread(target=_send_answers, args=(channel, answers), name="answers", daemon=True).start()
    while True:
        command = commands.get()  # bounded by the reader thread, which ends the process with its connection
        number, kind = command.get("number"), command.get("kind")
        try:
            if number != expected:
                raise SequenceMismatchError(f"command number: expected {expected}, got {number!r}")
            if kind == "init":
                runtime, result = runtime_factory(command), _nothing
                spare.close()
            else:
                result = _execute(runtime, command, channel)
        except Exception as e:
            result = functools.partial(_raise, e)
        answers.put((number, result))
        expected += 1


def _send_answers(channel: Channel, answers: "queue.Queue[tuple[Any, _Result]]") -> NoReturn:
    """The thread that waits for results, which may be a collective's, and answers in the order of the commands."""
    while True:
        number, result = answers.get()
        try:
            channel.send({"number": number, "kind": "done", "value": result()})
        except Exception as e:
            traceback.print_exc()
            sys.stderr.flush()
            _send_failure(channel, number, e)
        if result is _stop:
            _exit(0)


def _execute(runtime: Runtime | None, command: dict[str, Any], channel: Channel) -> "_Result":
    """Follows a command, or of a run starts what it asks for; returns what brings the answer's value."""
    kind = command.get("kind")
    if kind == "stop":
        return _stop
    if runtime is None:
        raise SequenceMismatchError(f"command {kind!r}: expected 'init' first")
    if kind == "run":
        return functools.partial(runtime.collect, runtime.submit(ProgramKey(*command["key"]), command.get("inputs")))
    if kind == "compile":
        _progress(channel, command)(runtime.compile(*(ProgramKey(*key) for key in command["keys"])))
        return _nothing
    if kind == "load":
        _load(runtime, command, channel)
        return _nothing
    if kind == "mailboxes":
        return functools.partial(list, runtime.open_mailboxes().items())
    if kind == "connect":
        runtime.connect({int(device): bytes(handle) for device, handle in command["handles"]})
        return _nothing
    known = "init, load, compile, mailboxes, connect, run or stop"
    raise SequenceMismatchError(f"command kind: expected {known}, got {str(kind)[:40]!r}")


def _load(runtime: Runtime, command: dict[str, Any], channel: Channel) -> None:
    """Reads the weights, and finds or compiles programs meanwhile."""
    progress = _progress(channel, command)
    keys = [ProgramKey(*key) for key in command.get("keys", ())]
    pool = ThreadPoolExecutor(1, "compile")
    compiling = pool.submit(runtime.compile, *keys)
    runtime.load(command["path"], progress)  # what is wrong with a checkpoint is told without the compiler's wait
    if not compiling.done():
        progress(WAITING_FOR_PROGRAMS)
    progress(compiling.result())
    pool.shutdown()


def _progress(channel: Channel, command: Mapping[str, Any]) -> Callable[[str], None]:
    """What sends lines about a command that is being followed."""
    return lambda text: channel.send({"number": command["number"], "kind": "progress", "text": str(text)[:_MAX_TEXT]})


def _nothing() -> None:
    """The value of a command that was followed to its end."""


def _stop() -> None:
    """The value of a stop command, after which the process ends."""


def _raise(error: Exception) -> NoReturn:
    raise error


def _send_failure(channel: Channel, number: Any, error: Exception) -> None:
    message = {"number": number, "kind": "failed", "error": type(error).__name__, "text": str(error)[:_MAX_TEXT]}
    try:
        channel.send(message)
    except OSError:
        _exit(EXIT_PARENT_GONE, "the parent is gone")


if __name__ == "__main__":
    main()
