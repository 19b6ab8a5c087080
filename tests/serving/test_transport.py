"""Which transport a cell takes: what "auto" stands for, and what a named one says where it can't run."""

import pytest

from jmoe.serving import transport
from jmoe.serving.process_options import ProcessOptions
from jmoe.serving.transport import choose_transport
from jmoe.sharding.mesh_config import MeshConfig

FAR = ProcessOptions(addresses=("one:7000", "two:7000"), token="0123456789abcdef")
NEAR = ProcessOptions(addresses=("one:7000", "one:7001"), token="0123456789abcdef")
NO_PEERS = "GPU 0 can't write into the memory of GPU 1"
CASES = [  # (mesh, platform, executor, processes, why GPUs have no peer access) -> transport, or why it is refused
    (MeshConfig(), "gpu", "auto", None, None, "push"),
    (MeshConfig(), "gpu", "inline", None, None, "push"),
    (MeshConfig(), "gpu", "processes", NEAR, None, "push"),
    (MeshConfig(), "gpu", "auto", None, NO_PEERS, "ppermute"),
    (MeshConfig(), "gpu", "processes", FAR, None, "ppermute"),
    (MeshConfig(), "cpu", "inline", None, None, "ppermute"),
    (MeshConfig(transport="ppermute"), "gpu", "auto", None, None, "ppermute"),
    (MeshConfig.colocate(2), "gpu", "auto", None, None, "ppermute"),
    (MeshConfig(transport="push"), "gpu", "auto", None, NO_PEERS, f"got none: {NO_PEERS}"),
    (MeshConfig(transport="push"), "gpu", "processes", FAR, None, r"workers on several hosts \(one, two\)"),
    (MeshConfig(3, 1, transport="push"), "cpu", "inline", None, None, "push"),
    (MeshConfig(2, 2, transport="push"), "cpu", "inline", None, None, "give one role a single device"),
    (MeshConfig(transport="push"), "cpu", "processes", None, None, "only devices of one process share memory"),
]


@pytest.mark.parametrize(("mesh", "platform", "kind", "processes", "why", "expected"), CASES)
def test_transport(monkeypatch, mesh, platform, kind, processes, why, expected):
    monkeypatch.setattr(transport, "no_peer_access", lambda num_gpus: why)
    if expected in ("push", "ppermute"):
        assert choose_transport(mesh, platform, kind, processes) == expected
        return
    with pytest.raises(ValueError, match=f"transport: expected .*{expected}"):
        choose_transport(mesh, platform, kind, processes)
