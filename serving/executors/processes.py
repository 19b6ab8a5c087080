"""ProcessesExecutor: worker processes, each tracing only its role's program, driven from a parent without JAX."""

import contextlib
import os
import pathlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from jmoe.cell_config import CellConfig
from jmoe.config import RANDOM_WEIGHTS
from jmoe.serving.command import Command
from jmoe.serving.errors import CellFailedError
from jmoe.serving.executors.protocol import ProgramKey, compiling_line, run
from jmoe.serving.model_handover import LiveModel, handed_over
from jmoe.serving.process_options import ProcessOptions
from jmoe.serving.supervisor import Supervisor
from jmoe.serving.worker_start import WorkerPlace, split_address
from jmoe.sharding.mesh_config import MeshConfig
from jmoe.step_inputs import StepInputs, StepLayout, StepOutputs


class ProcessesExecutor:
    """Starts the workers of one cell, has them load a checkpoint, and runs calls through them.

    Args:
      cell: what the programs are compiled for.
      checkpoint: a Hugging Face checkpoint folder, from which each worker reads its own role's part (at the same path
        on every host), or a live model, which is handed over in shared memory.
      options: how the workers are placed, reached, timed and logged.
      platform: "cpu" (virtual devices, gloo) or "gpu" (NCCL).
      programs: found or compiled while the weights load.
      compile_cache: where each worker keeps compiled programs on its host: a folder, "auto" or "off".
      progress: gets a line now and then while workers start, load and compile.

    Raises:
      ValueError: another number of addresses than workers, a checkpoint that does not fit, or a live model for
        workers that listen.
      CellFailedError: workers that do not come up.
    """

    def __init__(
        self,
        cell: CellConfig,
        checkpoint: str | os.PathLike[str] | LiveModel,
        options: ProcessOptions | None = None,
        *,
        platform: Literal["cpu", "gpu"] = "cpu",
        programs: Sequence[ProgramKey] = (),
        compile_cache: str = "off",
        progress: Callable[[str], None] | None = None,
    ):
        self.cell = cell
        options = options or ProcessOptions()
        self._platform: Literal["cpu", "gpu"] = platform
        self._deadlines = options.deadlines
        self._compile_cache = compile_cache
        self._compiled: set[ProgramKey] = set()
        self._has_run: set[ProgramKey] = set()
        self._in_flight: deque[tuple[ProgramKey, Command]] = deque()
        self._places = worker_places(cell.mesh, options.per, platform, options.addresses)
        if options.addresses and not isinstance(checkpoint, (str, os.PathLike)):
            raise ValueError("checkpoint: expected a folder that every worker's host has, got a live model")
        self._supervisor = Supervisor(self._places, options.start(), self._deadlines)
        report = progress or (lambda line: None)
        try:
            report(f"starting {len(self._places)} workers")
            hellos = self._supervisor.start()
            for place, hello in zip(self._places, hellos, strict=True):
                report(f"{place.name}: process {hello['pid']}")
            reads_files = not (isinstance(checkpoint, str) and checkpoint.startswith(RANDOM_WEIGHTS))
            self._supervisor.call("init", self._init_payloads(platform, hellos, reads_files), self._deadlines.init_s)
            if cell.mesh.roles_apart:
                self._join_mailboxes()
            self._load(checkpoint, programs, report)
        except BaseException:
            self._supervisor.close()
            raise

    def _load(
        self,
        checkpoint: str | os.PathLike[str] | LiveModel,
        programs: Sequence[ProgramKey],
        report: Callable[[str], None],
    ) -> None:
        with contextlib.ExitStack() as stack:
            if not isinstance(checkpoint, (str, os.PathLike)):
                report("handing the model over")
                checkpoint = stack.enter_context(handed_over(checkpoint))
            is_random = str(checkpoint).startswith(RANDOM_WEIGHTS)
            path = str(checkpoint) if is_random else str(pathlib.Path(checkpoint).absolute())
            keys = list(dict.fromkeys(programs))
            limit_s = self._deadlines.load_s + self._deadlines.compile_s * len(keys)
            self._supervisor.call("load", self._same({"path": path, "keys": [list(k) for k in keys]}), limit_s, report)
            self._compiled |= set(keys)

    def _join_mailboxes(self) -> None:
        """Has every worker open its devices' mailboxes, and tells all of them where all stand (transport "push")."""
        answers = self._supervisor.call("mailboxes", self._same({}), self._deadlines.init_s)
        handles = [handle for answer in answers for handle in answer]
        if sorted(device for device, _ in handles) != list(range(self.cell.mesh.num_devices)):
            self._supervisor.fail(CellFailedError(f"mailboxes: expected one a device, got {len(handles)}"))
        self._supervisor.call("connect", self._same({"handles": handles}), self._deadlines.init_s)

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers, attention first (on their own hosts)."""
        return self._supervisor.pids

    def compile(self, keys: Sequence[ProgramKey], progress: Callable[[str], None]) -> None:
        """Compiles programs ahead of their first use; `progress` gets a line for each."""
        new = [key for key in dict.fromkeys(keys) if key not in self._compiled]
        if not new:
            return
        for key in new:
            progress(compiling_line(key))
        payload = {"keys": [list(key) for key in new]}
        self._supervisor.call("compile", self._same(payload), self._deadlines.compile_s * len(new), progress)
        self._compiled |= set(new)

    def submit(self, key: ProgramKey, inputs: StepInputs) -> None:
        """Starts one prefill chunk or num_steps decode steps behind the calls in flight."""
        self.compile([key], lambda line: None)
        expert = {"key": list(key)}
        attention = {**expert, "inputs": inputs.array}
        payloads = [expert if place.role == "expert" else attention for place in self._places]
        limit_s = self._deadlines.step_limit_s(self._platform, key not in self._has_run)
        self._in_flight.append((key, self._supervisor.submit("run", payloads, limit_s)))

    def collect(self) -> StepOutputs:
        """Waits for the oldest call in flight; its tokens count once all workers have answered."""
        if not self._in_flight:
            raise ValueError("ProcessesExecutor.collect: expected a call in flight, got none")
        key, call = self._in_flight.popleft()
        replies = self._supervisor.wait_for(call)
        self._has_run.add(key)
        try:
            return _join_outputs(self.cell, key, replies)
        except (ValueError, KeyError, TypeError) as e:
            self._supervisor.fail(CellFailedError(f"run: an answer that does not fit the cell: {e}"))

    def run(self, key: ProgramKey, inputs: StepInputs) -> StepOutputs:
        """One call alone."""
        return run(self, key, inputs)

    def check(self) -> None:
        """Raises if the cell is known to have failed; called while the engine is idle."""
        self._supervisor.check()

    def close(self) -> None:
        """Ends the workers; safe to call twice, after a failure, and during a call, which then fails."""
        self._supervisor.close()

    def _same(self, payload: dict[str, Any]) -> list[dict[str, Any]]:
        return [payload] * len(self._places)

    def _init_payloads(
        self, platform: str, hellos: Sequence[dict[str, Any]], reads_files: bool
    ) -> list[dict[str, Any]]:
        """The `init` arguments; the coordinator stands with worker 0, on loopback unless workers are on other hosts."""
        first = self._places[0]
        host = first.address[0] if first.address else "127.0.0.1"
        coordinator = f"[{host}]:{hellos[0]['spare_port']}" if ":" in host else f"{host}:{hellos[0]['spare_port']}"
        shared = {
            "cell": self.cell.to_dict(),
            "platform": platform,
            "num_processes": len(self._places),
            "coordinator": coordinator,
            "timeout_s": self._deadlines.init_s,
            "compile_cache": self._compile_cache,
            "reads_files": reads_files,
        }
        return [
            {
                **shared,
                "role": place.role,
                "process_id": place.index,
                "num_devices": place.num_devices,
                "local_device_ids": list(place.local_device_ids) if place.local_device_ids else None,
            }
            for place in self._places
        ]


def worker_places(
    mesh: MeshConfig,
    processes_per: Literal["role", "device"],
    platform: Literal["cpu", "gpu"],
    addresses: Sequence[str] = (),
) -> list[WorkerPlace]:
    """Divides a mesh among workers, in the order of the joint axis: attention first. Colocated roles share workers.

    Raises:
      ValueError: an unknown `platform`, or another number of addresses than workers.
    """
    if platform not in ("cpu", "gpu"):
        raise ValueError(f"platform: expected 'cpu' or 'gpu', got {platform!r}")
    by_role = [("attention", mesh.num_attention_devices), ("expert", mesh.num_expert_devices)]
    if mesh.colocated:
        by_role = [("colocated", mesh.num_devices)]
    parts = by_role if processes_per == "role" else [(role, 1) for role, count in by_role for _ in range(count)]
    if addresses and len(addresses) != len(parts):
        devices = " and ".join(f"{count} {role}" for role, count in by_role)
        raise ValueError(
            f"worker addresses: expected {len(parts)} (one a {processes_per}: {devices} devices), got {len(addresses)}"
        )
    places, used = [], {}
    for index, (role, num_devices) in enumerate(parts):
        address = split_address(addresses[index]) if addresses else None
        first = used.get(address and address[0], 0)
        used[address and address[0]] = first + num_devices
        local_ids = tuple(range(first, first + num_devices)) if platform == "gpu" else None
        places.append(WorkerPlace(index, role, num_devices, local_ids, address))
    return places


def _join_outputs(cell: CellConfig, key: ProgramKey, replies: Sequence[Any]) -> StepOutputs:
    """Puts the replicas of all attention workers side by side; ValueError if one is missing, double or misshapen."""
    mesh = cell.mesh
    num_steps = cell.num_steps if key.kind == "decode" else 1
    shape = (num_steps, mesh.attention, mesh.num_micro_batches, StepLayout.of(cell, key.kind).num_rows)
    wanted: dict[str, tuple[tuple[int, ...], type]] = {"tokens": (shape, np.int32)}
    if key.sampling:
        top = (*shape, cell.num_top_logprobs)
        wanted |= {"logprobs": (shape, np.float32), "top_ids": (top, np.int32), "top_logprobs": (top, np.float32)}
    joined = {name: np.empty(full, dtype) for name, (full, dtype) in wanted.items()}
    seen: list[int] = []
    dropped_rows = 0
    for reply in replies:
        if not reply:
            continue
        dropped_rows += int(reply.get("dropped_rows", 0))
        if "replicas" not in reply:
            continue
        replicas = [int(replica) for replica in reply["replicas"]]
        seen += replicas
        if not set(replicas) <= set(range(mesh.attention)):
            raise ValueError(f"replicas: expected some of 0 to {mesh.attention - 1}, got {replicas}")
        for name, full in joined.items():
            part, expected = reply[name], (num_steps, len(replicas), *full.shape[2:])
            if part.shape != expected or part.dtype != full.dtype:
                raise ValueError(f"{name}: expected {full.dtype}{list(expected)}, got {part.dtype}{list(part.shape)}")
            full[:, replicas] = part
    if sorted(seen) != list(range(mesh.attention)):
        raise ValueError(f"replicas: expected 0 to {mesh.attention - 1} once each, got {sorted(seen)}")
    return StepOutputs(**joined, dropped_rows=dropped_rows)
