"""Starts, watches and ends the workers of one cell; one failure ends all of them. No JAX.

One thread owns the workers: it starts them (Linux's parent-death signal is tied to the starting thread), reads all
their messages, and checks exits, heartbeats and the deadline of the command in flight. Whoever calls only sends frames
and waits for that thread's verdict.
"""

import collections
import contextlib
import selectors
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from jmoe.serving.command import Command
from jmoe.serving.deadlines import Deadlines
from jmoe.serving.errors import REPORTED, CellFailedError, SequenceMismatchError, StepTimeoutError, WorkerDiedError
from jmoe.serving.wire import WireError, encode
from jmoe.serving.worker_process import end_processes
from jmoe.serving.worker_start import Worker, WorkerPlace, WorkerStart

_POLL_S = 0.1  # between looks at exits and clocks; messages and closed connections wake the thread at once
_SETTLE_S = 0.2  # after a first sign of failure: a peer's death shows within this, and is the better explanation
_STALL_S = 1.0  # this process itself stood still for longer: heartbeats are still in the sockets


class Supervisor:
    """The workers of one cell. After any failure, `call` and `check` raise it, and all workers have been ended."""

    def __init__(self, places: Sequence[WorkerPlace], start: WorkerStart, deadlines: Deadlines):
        self.deadlines = deadlines
        self._workers = [Worker(place) for place in places]
        self._start = start
        self._selector = selectors.DefaultSelector()
        self._changed = threading.Condition()
        self._call_lock = threading.Lock()
        self._in_flight: collections.deque[Command] = collections.deque()  # not answered by all; guarded by _changed
        self._number = 0
        self._started = False
        self._failure: Exception | None = None  # set last, when all workers have ended
        self._verdict: Exception | None = None  # a failure that a caller found, for the owning thread to act on
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._own_workers, name="jmoe supervisor", daemon=True)

    # What callers use, from any thread.

    def start(self) -> list[dict[str, Any]]:
        """Starts or reaches every worker and returns their hellos, by index."""
        self._thread.start()
        limit_s = self.deadlines.start_s + self.deadlines.grace_s + 10
        with self._changed:
            self._changed.wait_for(lambda: self._started or self._failure is not None, limit_s)
        self.check()
        return [worker.hello for worker in self._workers]

    def call(
        self,
        kind: str,
        payloads: Sequence[dict[str, Any]],
        limit_s: float,
        progress: Callable[[str], None] | None = None,
    ) -> list[Any]:
        """Sends one command to all workers, then waits for all their answers.

        Args:
          kind: the command.
          payloads: its arguments, one map a worker (the same object for several is encoded once).
          limit_s: the deadline of the slowest answer.
          progress: gets the workers' progress lines, in the calling thread.

        Returns:
          The answers' values, by worker.

        Raises:
          CellFailedError (or the ValueError or FileNotFoundError that a worker reported): the cell has failed.
        """
        return self.wait_for(self.submit(kind, payloads, limit_s), progress)

    def submit(self, kind: str, payloads: Sequence[dict[str, Any]], limit_s: float) -> Command:
        """Sends one command to all workers, behind those in flight, and does not wait; see `call`."""
        with self._call_lock:
            self.check()
            self._number += 1
            frames: dict[int, bytes] = {}
            for payload in payloads:
                if id(payload) not in frames:
                    frames[id(payload)] = encode({"number": self._number, "kind": kind, **payload})
            command = Command(self._number, kind, limit_s)
            with self._changed:
                self._in_flight.append(command)
                self._start_clock()
            for worker, payload in zip(self._workers, payloads, strict=True):
                assert worker.channel is not None
                with contextlib.suppress(OSError):  # the owning thread sees it too and gives the verdict
                    worker.channel.send_frame(frames[id(payload)])
            return command

    def _start_clock(self) -> None:
        """The oldest command's deadline begins now, unless it has one."""
        if self._in_flight and self._in_flight[0].deadline is None:
            self._in_flight[0].deadline = time.monotonic() + self._in_flight[0].limit_s

    def wait_for(self, command: Command, progress: Callable[[str], None] | None = None) -> list[Any]:
        """Waits for all answers to a command that was submitted; see `call`."""
        late_s = self.deadlines.grace_s + 10  # past its deadline: the owning thread is late or gone
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._failure or command.done or (progress and command.progress),
                    late_s if command.deadline is None else max(0.0, command.deadline + late_s - time.monotonic()),
                )
                lines = [command.progress.popleft() for _ in range(len(command.progress))]
                done = command.done
            for line in lines:
                if progress:
                    progress(line)
            self.check()
            if done:
                return [command.replies[worker.place.index] for worker in self._workers]
            if command.deadline is not None and time.monotonic() >= command.deadline + late_s:
                raise CellFailedError(f"{command.kind}: no verdict {late_s:.0f} s past its deadline")

    def check(self) -> None:
        """Raises the cell's failure, if it has failed or was closed."""
        alive = self._started and self._thread.is_alive()  # looked at first: the thread sets _failure, then ends
        if self._failure is not None:
            raise type(self._failure)(*self._failure.args) from self._failure
        if not alive:
            raise CellFailedError("the cell's workers are not running")

    def fail(self, error: CellFailedError) -> NoReturn:
        """Ends all workers because of what a caller found (an answer that makes no sense, say), and raises it."""
        self._verdict = error
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None, self.deadlines.grace_s + 10)
        raise error

    def close(self) -> None:
        """Ends all workers: by a stop command if all is well, else by force. Safe to call twice."""
        self._closing.set()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(self.deadlines.start_s + self.deadlines.stop_s + self.deadlines.grace_s + 10)

    @property
    def pids(self) -> list[int]:
        """The process ids that the workers gave in their hellos."""
        return [worker.hello["pid"] for worker in self._workers]

    # The owning thread.

    def _own_workers(self) -> None:
        try:
            self._start.bring_up(self._workers, self.deadlines, self._check_start)
            for worker in self._workers:
                assert worker.channel is not None
                worker.last_seen = time.monotonic()
                self._selector.register(worker.channel.socket, selectors.EVENT_READ, worker)
            with self._changed:
                self._started = True
                self._changed.notify_all()
            while not self._closing.is_set():
                self._watch_once()
            self._leave()
            failure = CellFailedError("the cell's workers were ended by close()")
        except Exception as e:
            expected = isinstance(e, (CellFailedError, *REPORTED.values()))
            failure = e if expected else CellFailedError(f"supervisor: {type(e).__name__}: {e}")
        self._end_by_force()  # before anybody hears of it: whoever catches the error finds no worker running
        self._selector.close()
        with self._changed:
            self._failure = failure
            self._changed.notify_all()

    def _check_start(self) -> None:
        if self._closing.is_set():
            raise CellFailedError("the cell was closed while its workers started")
        for worker in self._workers:
            if worker.process and not worker.process.alive:
                raise self._death_of(worker, "while it started")

    def _watch_once(self) -> None:
        """Takes in what has arrived, then looks at exits and clocks; raises on the first sign of failure."""
        if self._verdict is not None:
            raise self._verdict
        before = time.monotonic()
        for key, _ in self._selector.select(_POLL_S):
            self._receive(key.data)
        for worker in self._workers:
            if worker.process and not worker.process.alive:
                raise self._death_of(worker)
        now = time.monotonic()
        if now - before > _STALL_S:
            return
        command = next(iter(self._in_flight), None)
        if command and command.deadline and now > command.deadline:
            raise self._lateness_of(command, now)
        starting = command is not None and command.kind != "run"
        limit_s = self.deadlines.busy_heartbeat_s if starting else self.deadlines.heartbeat_s
        for worker in self._workers:
            if now - worker.last_seen > limit_s:
                raise StepTimeoutError(
                    f"{worker.place.name} sent no heartbeat for {limit_s:g} s: it is stopped, or its host hangs"
                )

    def _receive(self, worker: Worker) -> None:
        assert worker.channel is not None
        try:
            messages = worker.channel.read_ready()
        except (EOFError, OSError):
            raise self._death_of(worker) from None
        except WireError as e:
            raise WireError(f"{worker.place.name}: {e}") from e
        worker.last_seen = time.monotonic()
        for message in messages:
            if message.get("kind") != "alive":
                self._take(worker, message)

    def _take(self, worker: Worker, message: dict[str, Any]) -> None:
        """Books a progress line, or an answer under the oldest command that this worker has not answered."""
        index, kind, number = worker.place.index, message.get("kind"), message.get("number")
        open_commands = [c for c in tuple(self._in_flight) if index not in c.replies]
        command = next((c for c in open_commands if c.number == number), None)
        if command is None or (kind != "progress" and command is not open_commands[0]):
            expected = open_commands[0].number if open_commands else "none"
            raise SequenceMismatchError(f"{worker.place.name}: answer to command {number!r}, expected {expected}")
        if kind == "failed":
            raise self._reported(worker, command, message)
        if kind not in ("done", "progress"):
            raise WireError(f"{worker.place.name}: expected an answer or progress, got kind {str(kind)[:40]!r}")
        with self._changed:
            if kind == "progress":
                command.progress.append(f"{worker.place.name}: {message.get('text')}")
            else:
                command.replies[index] = message.get("value")
                command.done = len(command.replies) == len(self._workers)
                if command.done:  # the oldest of all: every worker answers in order
                    self._in_flight.popleft()
                    self._start_clock()
            self._changed.notify_all()

    # What is said about a failure.

    def _reported(self, worker: Worker, command: Command, message: dict[str, Any]) -> Exception:
        """The error that a worker reports, unless a peer's death explains it."""
        name, text = str(message.get("error")), str(message.get("text"))
        if name in REPORTED and name != "ExchangeTimeoutError":
            return REPORTED[name](f"{worker.place.name}: {text}" if name == "SequenceMismatchError" else text)
        time.sleep(_SETTLE_S)
        for other in self._workers:
            if other is not worker and other.process and not other.process.alive:
                return self._death_of(other)
        failed = f"{worker.place.name}: {command.kind} failed: {name}: {text}"
        return REPORTED[name](failed) if name in REPORTED else CellFailedError(failed)

    def _death_of(self, worker: Worker, when: str = "") -> Exception:
        """The death of a worker, or of the peer that took it along (JAX aborts when its coordinator is gone)."""
        time.sleep(_SETTLE_S)
        dead = [w for w in (worker, *self._workers) if w.process and not w.process.alive]
        dead.sort(key=lambda w: "SIGABRT" in w.process.describe_exit() if w.process else False)
        first = dead[0] if dead else worker
        how = first.process.describe_exit() if dead and first.process else "closed its connection"
        return WorkerDiedError(" ".join(filter(None, (first.place.name, how, when))) + first.last_lines())

    def _lateness_of(self, command: Command, now: float) -> Exception:
        late = [worker for worker in self._workers if worker.place.index not in command.replies]
        names = ", ".join(f"{w.place.name}, last heartbeat {now - w.last_seen:.1f} s ago" for w in late)
        return StepTimeoutError(
            f"{command.kind}: no answer within {command.limit_s:g} s from {names}{late[0].last_lines()}"
        )

    # The end.

    def _leave(self) -> None:
        """Closed by the caller: a stop command if the cell is idle; a call in flight fails."""
        if self._in_flight:
            raise CellFailedError(f"{self._in_flight[0].kind}: the cell was closed during the call")
        frame = encode({"number": self._number + 1, "kind": "stop"})
        for worker in self._workers:
            assert worker.channel is not None
            with contextlib.suppress(OSError):
                worker.channel.send_frame(frame)
        until = time.monotonic() + self.deadlines.stop_s
        for worker in self._workers:
            assert worker.channel is not None
            with contextlib.suppress(EOFError, OSError, WireError):  # TimeoutError is an OSError
                while True:
                    worker.channel.receive(until)  # heartbeats and the answer, then the end of the connection
            if worker.process:
                worker.process.wait(max(0.0, until - time.monotonic()))

    def _end_by_force(self) -> None:
        end_processes([worker.process for worker in self._workers if worker.process], self.deadlines.grace_s)
        for worker in self._workers:
            if worker.channel is not None:
                worker.channel.close()  # a worker on another host ends itself at this
