"""place_weights: what it leaves behind in memory, after weights and after an error."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import EVEN

from jmoe.cell_config import CellConfig
from jmoe.checkpoints import host_buffers
from jmoe.checkpoints.host_buffers import HostBuffers
from jmoe.device_params import HALVES, DeviceParams
from jmoe.models.model import array_specs
from jmoe.sharding.mesh_config import MeshConfig
from jmoe.sharding.meshes import joint_mesh
from jmoe.weights_source import place_weights


class BufferedSource:
    """Zeros in the buffers' memory; fails at one path."""

    def __init__(self, buffers: HostBuffers, broken: str = ""):
        self.buffers, self.broken = buffers, broken
        self.specs = dict(zip(("attention", "expert"), array_specs(EVEN), strict=True))

    def read(self, role, path, index=None):
        if path == self.broken:
            raise ValueError(f"{path} is broken")
        found = self.buffers.empty(self.specs[role][path].shape, np.dtype(np.float32))
        found[...] = 0
        return found

    def read_experts(self, path, expert_ids, index=None):
        return self.read("expert", path)


@pytest.mark.parametrize("broken", ["", "layers.0.o_proj"])
def test_no_memory_stays(monkeypatch, broken):
    monkeypatch.setattr(host_buffers, "SMALLEST", 64)
    cell = CellConfig(EVEN, MeshConfig.colocate(1).resolve(EVEN.num_experts))
    params, buffers = DeviceParams(cell, joint_mesh(cell.mesh, jax.devices())), HostBuffers()
    source = BufferedSource(buffers, broken)
    if broken:
        with pytest.raises(ValueError, match="is broken"):
            place_weights(source, params, HALVES["colocated"], buffers, lambda _: None)
    else:
        placed = place_weights(source, params, HALVES["colocated"], buffers, lambda _: None)
        assert set(placed) == {"attention", "expert"}
        del placed
    for n in range(3):  # JAX lets go of what it was given in a later call
        jax.jit(lambda x: x + 1)(jnp.ones(n + 1)).block_until_ready()
        gc.collect()
    assert not buffers._idle and buffers.pins is None
