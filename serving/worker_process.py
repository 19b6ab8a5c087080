"""One child worker process as its parent sees it: its start, its last lines, its end. No JAX."""

import collections
import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO

import jmoe

DEFAULT_COMMAND = (sys.executable, "-P", "-m", "jmoe.serving.worker")  # -P: no module of the current folder gets in
_MAX_LINES = 40
_MAX_LINE_LEN = 500
_MAX_LOG_BYTES = 64 << 20
_WAIT_STEP_S = 0.005
_REAP_S = 5.0  # a killed process may take so long to be gone (memory to unmap, a device to close)


class WorkerProcess:
    """A child in a session of its own; what it writes is kept (the last lines) and logged (where a folder is named)."""

    def __init__(self, name: str, command: Sequence[str], variables: Mapping[str, str], log: pathlib.Path | None):
        self.name = name
        self._lines: collections.deque[str] = collections.deque(maxlen=_MAX_LINES)
        self.popen = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **_import_path(), "PYTHONUNBUFFERED": "1", **variables},
            start_new_session=True,  # Ctrl-C in the terminal goes to the parent alone, and the group can be killed
        )
        assert self.popen.stdout is not None
        self._reader = threading.Thread(target=self._keep, args=(self.popen.stdout, log), name=f"{name} output")
        self._reader.daemon = True
        self._reader.start()

    def _keep(self, stream: IO[bytes], log: pathlib.Path | None) -> None:
        """The output thread: keeps the last lines, and writes a log of bounded size."""
        with stream, log.open("ab") if log else contextlib.nullcontext() as file:
            left = _MAX_LOG_BYTES
            while line := stream.readline(1 << 16):
                self._lines.append(line.decode(errors="replace").rstrip()[:_MAX_LINE_LEN])
                if file and left > 0:
                    left -= file.write(line)
                    file.flush()

    @property
    def alive(self) -> bool:
        return self._exit_code() is None

    def _exit_code(self) -> int | None:
        """As Popen.poll (negative for a signal), but leaves a zombie: while it stands, its group's id is its own."""
        if self.popen.returncode is not None or not hasattr(os, "waitid"):  # macOS before Python 3.13
            return self.popen.poll()
        ended = os.waitid(os.P_PID, self.popen.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None:
            return None
        return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status

    def wait(self, timeout_s: float) -> bool:
        """True when the process has ended within the time."""
        until = time.monotonic() + timeout_s
        while self.alive and time.monotonic() < until:
            time.sleep(_WAIT_STEP_S)
        return not self.alive

    def signal_group(self, number: signal.Signals) -> None:
        """Signals the process and what it has started, also when it has ended itself."""
        if self.popen.returncode is None:  # not reaped
            with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: a group of zombies
                os.killpg(self.popen.pid, number)

    def reap(self) -> None:
        """Takes the exit code; from here on nothing is signalled."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(_REAP_S)

    def describe_exit(self) -> str:
        """How it ended, in words."""
        code = self._exit_code()
        if code is None:
            return "still runs"
        if code >= 0:
            return f"ended with exit code {code}"
        hint = " (by hand, or out of memory)" if code == -signal.SIGKILL else ""
        return f"was killed by {signal.Signals(-code).name}{hint}"

    def last_lines(self, count: int = 8) -> str:
        """The last lines that it wrote, indented, with a heading; empty if it wrote none."""
        self._reader.join(0.2 if not self.alive else 0)  # let what was in the pipe arrive
        lines = list(self._lines)[-count:]
        return "".join([f"\nlast output of {self.name}:", *(f"\n  {line}" for line in lines)]) if lines else ""


def end_processes(processes: Sequence[WorkerProcess], grace_s: float) -> None:
    """Ends them all: SIGTERM, a short grace, SIGKILL to the whole process groups, and waits until they are gone."""
    for process in processes:
        process.signal_group(signal.SIGTERM)
    until = time.monotonic() + grace_s
    for process in processes:
        process.wait(max(0.0, until - time.monotonic()))
    for process in processes:
        process.signal_group(signal.SIGKILL)
    for process in processes:
        process.reap()


def _import_path() -> dict[str, str]:
    """Lets a child import this very jmoe from a bare checkout; an installed one needs no help."""
    root = pathlib.Path(jmoe.__file__).resolve().parent.parent
    if {"site-packages", "dist-packages"} & set(root.parts):
        return {}
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))}
