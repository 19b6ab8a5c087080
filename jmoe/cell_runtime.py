"""CellRuntime: a cell's programs, weights and state on the devices that this process holds. Both executors use it."""

import dataclasses
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.cell_config import CellConfig
from jmoe.checkpoints.host_buffers import HostBuffers
from jmoe.compiled_programs import Program, load_program, program_key, save_program
from jmoe.decode_loop import DeviceState, Role
from jmoe.device_params import HALVES, DeviceParams, ParamSource
from jmoe.empty_state import EmptyState
from jmoe.errors import ExchangeTimeoutError, SequenceMismatchError
from jmoe.kept_programs import KeptPrograms
from jmoe.lowering import COMPILER_OPTIONS, AbstractCell, Key, lower_program, on_each_device, slot_bytes
from jmoe.models.model import Model
from jmoe.pallas_kernels.choice import has_hopper
from jmoe.pallas_kernels.push_plan import TIMED_OUT
from jmoe.program_files import ProgramFiles
from jmoe.sharding.mailboxes import Mailboxes
from jmoe.sharding.meshes import from_shards, local_devices, program_mesh
from jmoe.step_inputs import StepLayout
from jmoe.weights_source import place_weights

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Submitted:
    """A call under way: its devices' fault words by index on the joint axis, and what it brings, by replica."""

    faults: list[tuple[int, jax.Array]]
    parts: dict[str, list[jax.Array]]


class CellRuntime:
    """Holds one role's share of a cell, or with roles "inline" and "colocated" both on the devices of this process.

    Args:
      cell: sizes; its mesh gives the order of `devices`.
      devices: every device of the joint mesh in order, other processes' included.
      role: what this runtime plays.
      files: where compiled programs are found and kept; None compiles each one.

    Raises:
      ValueError: too few devices, or tensor sizes that the model can't be cut by.
    """

    def __init__(self, cell: CellConfig, devices: Sequence[jax.Device], role: Role, files: ProgramFiles | None = None):
        self.cell = cell
        self.buffers = HostBuffers()  # that weights are read into
        # A reference push calls back into this process: such a program can't come back from disk.
        calls_back = cell.mesh.roles_apart and devices[0].platform == "cpu"
        self._files = None if calls_back else files
        self.role: Role = role
        self.mesh = program_mesh(cell.mesh, devices, role)
        first_device = cell.mesh.program_devices(role).start
        self._local = local_devices(self.mesh, first_device)
        self._mailboxes: Mailboxes | None = None
        self._replicas = [  # (replica, device) of the first tensor ranks here: they answer for their replica
            (i // cell.mesh.attention_tensor, d)
            for i, d in self._local
            if cell.mesh.role(i) == "attention" and i % cell.mesh.attention_tensor == 0
        ]
        kept = KeptPrograms(local := [device for _, device in self._local], files)
        self._params = DeviceParams(cell, self.mesh, first_device, kept)
        self._abstract = AbstractCell(cell, self.mesh, role)
        self._empty = EmptyState(self._abstract, self.mesh, local, kept)
        self._programs, self._file_names = dict[Key, Program](), dict[Key, str]()
        self._attention, self._experts = dict[str, jax.Array](), dict[str, jax.Array]()
        self._state: DeviceState | None = None
        self._kernels_told = False

    @property
    def abstract(self) -> AbstractCell:
        """Shapes of what each device holds."""
        return self._abstract

    @property
    def has_attention(self) -> bool:
        return self.role != "expert"

    def load(self, source: ParamSource | str | os.PathLike[str] | Model, progress: Callable[[str], None]) -> None:
        """Places this process's share of the weights, and an empty KV cache.

        Args:
          source: a Hugging Face checkpoint folder, "random:SEED", a live model, or anything that parameters can be read
            from as the cell keeps them.
          progress: gets a line now and then.
        """
        placed = place_weights(source, self._params, HALVES[self.role], self.buffers, progress)
        self.adopt(placed.get("attention", {}), placed.get("expert", {}))

    def adopt(self, attention: dict[str, jax.Array], experts: dict[str, jax.Array]) -> None:
        """Takes arrays over the joint mesh as this process's weights (`AbstractCell.params`), with empty pages."""
        self._attention, self._experts = attention, experts
        self._state = self._empty.state()

    def open_mailboxes(self) -> dict[int, bytes]:
        """Opens the mailboxes of this process's devices (transport "push"); returns the way to each, by device."""
        self._mailboxes = Mailboxes(self.cell.mesh, self._local, slot_bytes(self.cell))
        return self._mailboxes.handles()

    def connect(self, handles: Mapping[int, bytes]) -> None:
        """Connects the open mailboxes with all others of the cell; before the first call."""
        if self._mailboxes is None:
            raise ValueError("CellRuntime.connect: expected open mailboxes (open_mailboxes), got none")
        self._mailboxes.connect(handles)

    def close(self) -> None:
        """Lets go of weights, pages, programs and mailboxes, the last when the calls in flight have ended."""
        if self._mailboxes is not None:
            jax.block_until_ready(self._state)
            self._mailboxes.close()
        self._attention, self._experts, self._state = {}, {}, None
        self._programs.clear()

    def compile(self, *keys: Key) -> str:
        """Finds or compiles programs for this process's devices, each once, several at a time (XLA leaves the lock).

        Needs no weights: it may run beside `load`.

        Returns:
          What was done, in words.
        """
        unique: dict[Key, None] = dict.fromkeys((k[0], k[1]) for k in keys)
        wanted = [key for key in unique if key not in self._programs]
        start = time.monotonic()
        with ThreadPoolExecutor(max(len(wanted), 1)) as pool:
            found = dict(zip(wanted, pool.map(self._find, wanted), strict=True))
            missing = [key for key in wanted if found[key] is None]
            lowered = [lower_program(self.cell, self.mesh, self.role, key) for key in missing]
            lowered_s = time.monotonic() - start
            compiled = list(pool.map(jax.stages.Lowered.compile, lowered))
            for key, program in zip(missing, compiled, strict=True):
                if self._files is not None:
                    save_program(self._files, self._file_names[key], program)
        self._programs |= {k: p for k, p in found.items() if p is not None} | dict(zip(missing, compiled, strict=True))
        took_s = time.monotonic() - start
        if not missing:
            return f"{len(wanted)} compiled programs from the cache in {took_s:.1f} s{self._kernels(wanted)}"
        refused = self._files.refused if self._files is not None else {}
        reasons = {why for key in missing if (why := refused.get(self._file_names.get(key, "")))}
        why = "; on disk: ".join([f"{lowered_s:.1f} s to trace them", *sorted(reasons)])
        return f"compiled {len(missing)} of {len(wanted)} programs in {took_s:.1f} s ({why}){self._kernels(wanted)}"

    def _kernels(self, wanted: Sequence[Key]) -> str:
        """Which kernels this process runs: logged and said once, later nothing."""
        if self._kernels_told or not wanted:
            return ""
        self._kernels_told = True
        ops = {"expert": "expert_ffn", "attention": "paged_attention"}
        played = [op for role, op in ops.items() if self.role in (role, "inline", "colocated")]
        best = "pallas" if has_hopper() else "xla"
        line = f"kernels: {', '.join(f'{op} {self.cell.implementation or best}' for op in played)}"
        logger.info(line)
        return f"; {line}"

    def _find(self, key: Key) -> Program | None:
        if self._files is None:
            return None
        # Once, before anything is traced: a second start looks before it traces too, whatever tracing does to options.
        self._file_names[key] = program_key(self._abstract, key)
        return load_program(self._files, self._file_names[key], self._abstract.results(key), self._abstract.sharding)

    def run(self, key: Key, inputs: np.ndarray | None) -> dict[str, Any]:
        """Runs one call and waits for it; see `submit` and `collect`."""
        return self.collect(self.submit(key, inputs))

    def submit(self, key: Key, inputs: np.ndarray | None) -> "Submitted":
        """Starts one call behind those that run, and the copies of what it brings; waits for none of it.

        Args:
          key: which program.
          inputs: `[M, m, rows, width]` int32 (`StepInputs.array`); None in a process without attention devices.
        """
        key = (key[0], key[1])
        self.compile(key)
        state, emitted, fault, dropped = self._programs[key](*self._arguments(key, inputs))
        self._keep(state)
        brought = {"dropped_rows": dropped} | {
            name: array
            for name in ("tokens", "logprobs", "top_ids", "top_logprobs")
            if self.has_attention and (array := getattr(emitted, name)) is not None
        }
        parts = {name: self._of_replicas(array) for name, array in brought.items()}
        indices = {device: index for index, device in self._local}
        faults = [(indices[s.device], s.data) for s in fault.addressable_shards]
        for part in (*(data for _, data in faults), *(data for datas in parts.values() for data in datas)):
            part.copy_to_host_async()
        return Submitted(faults, parts)

    def collect(self, submitted: "Submitted") -> dict[str, Any]:
        """Waits for a call; from any thread.

        Returns:
          In a process with attention devices: `replicas` (those whose first tensor rank is here), `tokens`
          `[num_steps, replicas, m, rows]` and, from sampling programs, `logprobs`, `top_ids`, `top_logprobs`;
          everywhere `dropped_rows`.

        Raises:
          SequenceMismatchError: an exchange was out of step.
          ExchangeTimeoutError: a peer's rows did not come.
        """
        for index, shard in submitted.faults:
            expected, got = np.asarray(shard)[0]
            who = f"{self.cell.mesh.role(index)} device {index}"
            if got == TIMED_OUT:
                raise ExchangeTimeoutError(f"{who}: expected message {expected} of a peer, got none in time")
            if expected >= 0:
                raise SequenceMismatchError(f"{who}: expected an exchange with sequence number {expected}, got {got}")
        parts = {name: [np.asarray(data)[0] for data in datas] for name, datas in submitted.parts.items()}
        result: dict[str, Any] = {"dropped_rows": int(sum(parts.pop("dropped_rows")))}
        if self.has_attention:
            result["replicas"] = np.array([r for r, _ in self._replicas], np.int32)
            result |= {name: np.stack(arrays, axis=1) for name, arrays in parts.items()}
        return result

    def _keep(self, state: DeviceState) -> None:
        """The state of the next call; penalty counts of before where this call touched none."""
        before = self._state.counts if self._state is not None else None
        self._state = dataclasses.replace(state, counts=before if state.counts is None else state.counts)

    def measure(self, function: Callable[..., Any], inputs: np.ndarray) -> Callable[[], Any]:
        """Compiles `function(attention, experts, state, decode inputs) -> (state, result)` over every device.

        Returns:
          A function of no arguments that runs it once, keeps the state (donated, as in a decode call, else every call
          would copy the KV cache) and returns the result over the joint mesh.
        """
        key: Key = ("decode", False)
        mapped = jax.jit(on_each_device(function, self.mesh), donate_argnums=(2,), compiler_options=COMPILER_OPTIONS)
        compiled = mapped.lower(*self._arguments(key, inputs)).compile()

        def call():
            state, result = compiled(*self._arguments(key, inputs))
            self._keep(state)
            return result

        return call

    def set_sequence(self, device_index: int, value: int) -> None:
        """Puts one device of this process out of step; a drill for what `SequenceMismatchError` is for."""
        assert self._state is not None
        shards = {s.device: s.data for s in self._state.sequence.addressable_shards}
        device = dict(self._local)[device_index]
        shards[device] = jnp.full((1,), value, jnp.int32, device=device)
        sequence = from_shards(self.mesh, {d: shards[d] for _, d in self._local})
        self._state = dataclasses.replace(self._state, sequence=sequence)

    def _arguments(self, key: Key, inputs: np.ndarray | None):
        if self._state is None:
            raise ValueError("CellRuntime: expected load() before run()")
        counts = self._state.counts
        if key[1] and self.has_attention and counts is None:
            counts = self._empty.counts()
        if self.cell.mesh.roles_apart and self._state.mailbox is None:
            self._state = dataclasses.replace(self._state, mailbox=self._mailbox_tables())
        self._state = dataclasses.replace(self._state, counts=counts)
        state = dataclasses.replace(self._state, counts=counts if key[1] else None)
        return self._attention, self._experts, state, self._inputs(key, inputs) if self.has_attention else None

    def _inputs(self, key: Key, inputs: np.ndarray | None) -> jax.Array:
        """The host's batch on the attention devices, zeros on expert devices."""
        layout, mesh = StepLayout.of(self.cell, key[0]), self.cell.mesh
        shape = (mesh.num_micro_batches, layout.num_rows, layout.width)
        if inputs is None:
            raise ValueError(f"CellRuntime.run: expected inputs {(mesh.attention, *shape)} for attention, got none")
        if inputs.shape != (mesh.attention, *shape) or inputs.dtype != np.int32:
            raise ValueError(
                f"CellRuntime.run: expected int32 inputs {(mesh.attention, *shape)}, got {inputs.dtype} {inputs.shape}"
            )
        idle = np.zeros((1, *shape), np.int32)
        parts = [
            inputs[i // mesh.attention_tensor][None] if mesh.role(i) == "attention" else idle for i, _ in self._local
        ]
        devices = [device for _, device in self._local]
        return from_shards(self.mesh, dict(zip(devices, jax.device_put(parts, devices), strict=True)))

    def _of_replicas(self, array: jax.Array) -> list[jax.Array]:
        """`[1, ...]` each; none in a process without attention devices."""
        shards = {s.device: s.data for s in array.addressable_shards}
        return [shards[device] for _, device in self._replicas]

    def _mailbox_tables(self) -> jax.Array:
        """Where each device's peers get what it sends; ValueError before mailboxes are open and connected."""
        if self._mailboxes is None:
            raise ValueError("CellRuntime: expected open, connected mailboxes for the transport 'push', got none")
        return from_shards(self.mesh, {d: jax.device_put(self._mailboxes.table(i)[None], d) for i, d in self._local})
