"""DeviceParams: each device's share of the parameters, read straight from their source onto that device."""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jmoe.cell_config import CellConfig
from jmoe.kept_programs import KeptPrograms
from jmoe.models.arrays import ArraySpec
from jmoe.models.model import array_specs
from jmoe.sharding.meshes import from_shards, local_devices
from jmoe.sharding.partition import pad_to, tensor_share

HalfRole = Literal["attention", "expert"]
BOTH: tuple[HalfRole, ...] = ("attention", "expert")
HALVES = {"attention": BOTH[:1], "expert": BOTH[1:], "inline": BOTH, "colocated": BOTH}  # whose weights a role has
# Arrays under way at once: one is read (0.05 to 0.1 s of 400 MB) while others are copied and turned.
NUM_THREADS = min(4, os.cpu_count() or 1)


class ParamSource(Protocol):
    """Where parameters come from: `jmoe.checkpoints.load.CheckpointReader`, or `ArraySource` for a live model.

    What is made and not read (`RandomWeights`) is made on JAX's default device: the one that will hold it.
    """

    def read(self, role: HalfRole, path: str, index: tuple[slice, ...] | None = None) -> np.ndarray | jax.Array: ...

    def read_experts(
        self, path: str, expert_ids: Sequence[int], index: tuple[slice, ...] | None = None
    ) -> np.ndarray | jax.Array: ...


class ArraySource:
    """A live model's arrays by path as a source."""

    def __init__(self, attention: dict[str, jax.Array], experts: dict[str, jax.Array]):
        self._arrays = {"attention": attention, "expert": experts}

    def read(self, role, path, index=None):
        array = self._arrays[role][path]
        return np.asarray(array if index is None else array[index])

    def read_experts(self, path, expert_ids, index=None):
        held = self._arrays["expert"][path][np.array(expert_ids)]
        return np.asarray(held if index is None else held[(slice(None), *index)])


class DeviceParams:
    """Reads and places the parameters of a cell, array by array: the host never holds more than NUM_THREADS.

    Args:
      cell: model, meshes, placement.
      mesh: the program's; only this process's devices get anything.
      first_device: index on the joint axis of the mesh's first device.
      programs: of this process's devices; None compiles in this process what turns arrays.
    """

    def __init__(self, cell: CellConfig, mesh: Mesh, first_device: int = 0, programs: KeptPrograms | None = None):
        self.cell = cell
        self.mesh = mesh
        self._local = local_devices(mesh, first_device)
        self._programs = programs or KeptPrograms(self.devices)
        self._lock = threading.Lock()
        self._idle: dict[tuple[jax.Device, tuple[int, ...], np.dtype], jax.Array] = {}
        specs = array_specs(cell.model)
        self.specs = {"attention": specs[0], "expert": specs[1]}
        for role, size in (("attention", cell.mesh.attention_tensor), ("expert", cell.mesh.expert_tensor)):
            for path, spec in self.specs[role].items():
                try:
                    tensor_share(spec.shape, spec.axes, size, 0, spec.block)
                except ValueError as e:
                    raise ValueError(f"MeshConfig.{role}_tensor: {path}: {e}") from None

    @property
    def devices(self) -> list[jax.Device]:
        """This process's."""
        return [device for _, device in self._local]

    def place(self, role: HalfRole, source: ParamSource, progress: Callable[[str], None]) -> dict[str, jax.Array]:
        """Every parameter of a role as an array over the joint mesh, by path; see `place_roles`."""
        return self.place_roles([role], source, progress)[role]

    def place_roles(
        self, roles: Sequence[HalfRole], source: ParamSource, progress: Callable[[str], None]
    ) -> dict[HalfRole, dict[str, jax.Array]]:
        """Every parameter of some roles as an array over the joint mesh, by role and path.

        Devices of the other role that this process holds too (executor `inline`) get a buffer of the same shape,
        one for all arrays of that shape, since one program needs one shape everywhere.
        """
        started: dict[HalfRole, dict[str, Future[jax.Array]]] = {role: {} for role in roles}

        def start(pool: ThreadPoolExecutor, are_scales: bool) -> None:
            for role in roles:
                for path, spec in self.specs[role].items():
                    if path.endswith("_scales") == are_scales:
                        started[role][path] = pool.submit(self._place_one, role, path, spec, source)

        with ThreadPoolExecutor(NUM_THREADS) as pool:
            start(pool, are_scales=False)
            if "expert" in roles and any(path.endswith("_scales") for path in self.specs["expert"]):
                wait(started["expert"].values())  # `QuantizedExperts` has a scale when it has made the values
                start(pool, are_scales=True)
            try:
                return {role: _results(role, arrays, progress) for role, arrays in started.items()}
            except BaseException:
                pool.shutdown(cancel_futures=True)  # what is wrong with a checkpoint is told at once
                raise

    def _place_one(self, role, path: str, spec: ArraySpec, source: ParamSource) -> jax.Array:
        shards: dict[jax.Device, jax.Array] = {}
        read: dict[tuple[int, int], np.ndarray | jax.Array] = {}  # replicas share what was read for one of them
        shape, dtype = (), spec.numpy_dtype(self.cell.model.dtype)
        mine = [(index, device) for index, device in self._local if self.cell.mesh.plays(index, role)]
        for index, device in mine:
            node, rank = self._node_and_rank(role, index)
            key = (node if role == "expert" else 0, rank)
            if key not in read:
                with jax.default_device(device):
                    read[key] = self._read(role, path, spec, source, node, rank)
            shape = read[key].shape
            shards[device] = self._put(read[key], device)
        for _, device in self._local:
            if device not in shards:
                shards[device] = self._idle_buffer(device, (1, *shape), dtype)
        ordered = {device: shards[device] for _, device in self._local}
        jax.block_until_ready(list(ordered.values()))  # else the host copies pile up
        return from_shards(self.mesh, ordered)

    def _node_and_rank(self, role, index: int) -> tuple[int, int]:
        mesh = self.cell.mesh
        if role == "attention":
            return divmod(index, mesh.attention_tensor)
        return divmod(index - mesh.first_expert_device, mesh.expert_tensor)

    def _read(self, role, path: str, spec: ArraySpec, source: ParamSource, node: int, rank: int):
        mesh, placement = self.cell.mesh, self.cell.mesh.placement
        assert placement is not None
        if role == "attention":
            slices, shape = tensor_share(spec.shape, spec.axes, mesh.attention_tensor, rank)
            return pad_to(source.read(role, path, slices), shape)
        slices, shape = tensor_share(spec.shape, spec.axes, mesh.expert_tensor, rank)
        held = source.read_experts(path, placement.nodes[node], slices[1:])
        return pad_to(held, (placement.max_local_experts, *shape[1:]))  # nodes may hold different numbers of experts

    def _idle_buffer(self, device: jax.Device, shape: tuple[int, ...], dtype: np.dtype) -> jax.Array:
        with self._lock:
            if (device, shape, dtype) not in self._idle:
                self._idle[device, shape, dtype] = jnp.zeros(shape, dtype, device=device)
            return self._idle[device, shape, dtype]

    def _put(self, array: np.ndarray | jax.Array, device: jax.Device) -> jax.Array:
        """`[1, ...]` on the device; what lies in memory with its axes in another order is turned there."""
        if isinstance(array, jax.Array) or array.flags.c_contiguous:
            return jax.device_put(array[None], device)
        order = sorted(range(array.ndim), key=lambda axis: -array.strides[axis])
        stored = array.transpose(order)
        if not stored.flags.c_contiguous:
            return jax.device_put(array[None], device)
        back = tuple(order.index(axis) for axis in range(array.ndim))
        return self._programs.call(_turned, (back,), device, jax.device_put(stored, device))


def _results(role: HalfRole, arrays: dict[str, Future[jax.Array]], progress: Callable[[str], None]) -> dict[str, Any]:
    placed = {}
    for n, (path, array) in enumerate(arrays.items(), 1):
        placed[path] = array.result()
        if n % 50 == 0 or n == len(arrays):
            progress(f"{role} weights: {n} of {len(arrays)} arrays")
    return placed


def _turned(order: tuple[int, ...], array: jax.Array) -> jax.Array:
    """The leading axis comes last: before it, XLA on CPU took 4.4 s for 0.9 GB of bfloat16, not 0.9 to 1.3."""
    return array.transpose(order)[None]
