"""The push transport between two GPUs, in one process and in two: every row right, and a dead peer is a fault."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.gpu

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))


@pytest.mark.parametrize("who", ["push", "push_processes"])
def test_rows_ids_and_weights_arrive(who):
    """Small messages with tags, bulk ones with flags; widths that fill no unit; the check is the benchmark's own."""
    for hidden, sizes in (("2048", "32,4096"), ("72", "96"), ("1096", "3000")):
        command = [sys.executable, str(ROOT / "benchmarks" / "exchange.py"), "--who", who, "--sizes", sizes]
        command += ["--hidden", hidden, "--routing", "rows,zipf", "--patterns", "half_rtt,two_way", "--timeout", "100"]
        env = os.environ | {"PYTHONPATH": str(ROOT), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
        lines = [line for line in done.stdout.splitlines() if line.startswith(who)]
        assert len(lines) == 4 * len(sizes.split(",")), done.stdout + done.stderr[-3000:]
        assert "WRONG" not in done.stdout, done.stdout


def test_a_peer_that_never_comes_is_a_fault():
    from exchange_push import Case, PushCase

    from jmoe.sharding.mailboxes import Mailboxes
    from jmoe.sharding.mesh_config import MeshConfig

    mesh, devices = MeshConfig(1, 1, num_micro_batches=3), list(enumerate(jax.devices()[:2]))
    for size in (32 * 1024, 8 * 1024 * 1024):
        case = PushCase(Case("half_rtt", size), mesh, devices)
        case.compile()
        mailboxes = Mailboxes(mesh, devices, case.slot_bytes, deadline_s=0.3)
        mailboxes.connect(mailboxes.handles())
        alone = case.devices[0]
        _, fault, _ = alone.run(jax.device_put(mailboxes.table(0), alone.device), alone.sequence, alone.box)
        assert np.asarray(fault)[0] >= 0
        mailboxes.close()
