"""GPUs that are not there: Hopper devices for the ahead-of-time compiler."""

import pathlib

import jax
import pytest

TARGET = pathlib.Path(__file__).parent / "data" / "h200_target_config.txtpb"


def imaginary_gpus(count: int):
    """`count` devices of one process; skips the test where they can't be compiled for."""
    pytest.importorskip("jax_cuda13_plugin", reason="ahead-of-time compilation needs the `aot` extra")
    if jax.__version_info__ < (0, 11):
        pytest.skip(f"ahead-of-time GPU compilation needs jax 0.11 or newer, got {jax.__version__}")
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        topology_name="h200", platform="cuda", target_config=TARGET.read_text(), topology=f"1x1x{count}"
    )
    return topology.devices
