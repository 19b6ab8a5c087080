"""permute and unpermute compiled for a Hopper GPU that isn't there: how many launches, and nothing beside them."""

import re

import jax
import jax.numpy as jnp
import pytest
from imaginary_gpus import imaginary_gpus

from jmoe.pallas_kernels.permute import permute, unpermute

pytestmark = pytest.mark.aot


@pytest.fixture(scope="module")
def device():
    return jax.sharding.SingleDeviceSharding(imaginary_gpus(1)[0])


def launches(device, function, *shapes):
    """(Mosaic kernels, other kernels) of a compiled function."""
    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=device) for shape, dtype in shapes]
    lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    text = lowered.compile().as_text()
    entry = text[text.index("\nENTRY ") :]
    return len(re.findall(r"custom_call_target=\"mosaic_gpu", entry)), len(re.findall(r" fusion\(| sort\(", entry))


@pytest.mark.parametrize(("num_rows", "kernels"), [(16, 1), (128, 1), (4096, 3)])
def test_permute(device, num_rows, kernels):
    def run(rows, local_idx):
        return permute(rows, local_idx, 128, align=8, implementation="pallas")

    assert launches(device, run, ((num_rows, 2048), jnp.bfloat16), ((num_rows, 8), jnp.int32)) == (kernels, 0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_unpermute(device, dtype):
    def run(rows, positions, shares):
        return unpermute(rows, positions, shares, implementation="pallas")

    shapes = (((1024, 7168), dtype), ((16, 8), jnp.int32), ((16, 8), jnp.float32))
    assert launches(device, run, *shapes) == (1, 0)
