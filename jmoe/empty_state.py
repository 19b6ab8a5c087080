"""EmptyState: what a cell's devices keep from call to call, before the first one: zeros on this process's devices."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jmoe.decode_loop import DeviceState
from jmoe.kept_programs import KeptPrograms
from jmoe.lowering import AbstractCell
from jmoe.sampling import TokenCounts
from jmoe.sharding.meshes import from_shards


class EmptyState:
    """Makes the state of `AbstractCell.state`, part by part.

    Args:
      abstract: shapes.
      mesh: the program's.
      devices: those of this process on it.
      programs: of those devices.
    """

    def __init__(self, abstract: AbstractCell, mesh: Mesh, devices: list[jax.Device], programs: KeptPrograms):
        self._abstract = abstract
        self._mesh = mesh
        self._devices = devices
        self._programs = programs

    def state(self) -> DeviceState:
        """Without counts, and without a mailbox."""
        has_attention = self._abstract.role != "expert"
        return DeviceState(
            sequence=self._filled((), np.int32),
            pages=self._pages() if has_attention else None,
            next_ids=self._filled(self._abstract.slots_shape, np.int32) if has_attention else None,
        )

    def counts(self) -> list[TokenCounts]:
        """By micro-batch: no token seen yet."""
        cell = self._abstract.cell
        shape = (cell.rows, cell.model.vocab_size)
        return [
            TokenCounts(self._filled(shape, bool), self._filled(shape, np.int32))
            for _ in range(cell.mesh.num_micro_batches)
        ]

    def _pages(self) -> list[tuple[jax.Array, jax.Array]]:
        shape, dtype = self._abstract.page_shape(), self._abstract.page_dtype
        layers = range(self._abstract.cell.model.num_layers)
        return [(self._filled(shape, dtype), self._filled(shape, dtype)) for _ in layers]

    def _filled(self, shape: tuple[int, ...], dtype) -> jax.Array:
        """Zeros of `shape` on every device of this process."""
        static = ((1, *shape), jnp.dtype(dtype).name)
        return from_shards(self._mesh, {d: self._programs.call(_zeros, static, d) for d in self._devices})


def _zeros(shape: tuple[int, ...], dtype: str) -> jax.Array:
    return jnp.zeros(shape, dtype)
