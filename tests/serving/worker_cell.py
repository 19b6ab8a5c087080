"""A tiny cell on fake workers (no JAX), for the tests of processes and of faults."""

import dataclasses
import json
import os
import pathlib
import sys
import time

from jmoe.cell_config import CellConfig
from jmoe.config import ModelConfig
from jmoe.serving.deadlines import Deadlines
from jmoe.serving.executors.processes import ProcessesExecutor
from jmoe.serving.executors.protocol import ProgramKey
from jmoe.serving.process_options import ProcessOptions
from jmoe.sharding.mesh_config import MeshConfig

FAKE_COMMAND = (sys.executable, "-P", str(pathlib.Path(__file__).with_name("fake_worker.py")))
DECODE = ProgramKey("decode", False)
SAMPLING = ProgramKey("decode", True)
PREFILL = ProgramKey("prefill", False)
# Deadlines that a healthy fake worker keeps on a crowded machine; tests of a deadline set theirs short.
PATIENT = Deadlines(start_s=60, step_s=60, heartbeat_s=60, busy_heartbeat_s=60)


def tiny_cell(attention: int = 2, expert: int = 3, transport="ppermute", **mesh) -> CellConfig:
    model = ModelConfig("mixtral", 97, 24, 2, 3, 3, 8, 6, 3, 16, dtype="float32")
    return CellConfig(model, MeshConfig(attention, expert, **mesh).resolve(6, transport), max_len=64, num_steps=2)


def fake_executor(monkeypatch, faults=None, cell=None, **options) -> ProcessesExecutor:
    """An executor over fake workers; `faults` is worker index -> command -> fault."""
    monkeypatch.setenv("FAKE_WORKER", json.dumps(faults or {}))
    named = {f.name for f in dataclasses.fields(ProcessOptions)}
    processes = {"deadlines": PATIENT, "command": FAKE_COMMAND} | {k: v for k, v in options.items() if k in named}
    rest = {name: value for name, value in options.items() if name not in named}
    return ProcessesExecutor(cell or tiny_cell(), "/some/checkpoint", ProcessOptions(**processes), **rest)


def is_alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def all_gone(pids: list[int], within_s: float = 30.0) -> bool:
    """Waits until none of the processes runs; False when the time is up."""
    until = time.monotonic() + within_s
    while any(is_alive(pid) for pid in pids):
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def every_process() -> list[int]:
    """Ids of all processes that run."""
    return [pid for path in pathlib.Path("/proc").glob("[0-9]*") if is_alive(pid := int(path.name))]


def group_of(pid: int) -> int | None:
    """The process group; None if the process has ended meanwhile."""
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None
