"""`jmoe` with a fake cell behind it, as a process of its own: python serve_fake.py MODE ARGUMENTS...

Modes: ok; slow_load (loading takes 60 s); slow_steps (each call waits for the file GATE, 10 s at most); fail (each call
waits for GATE, then a worker has died).
"""

import os
import pathlib
import sys
import time
import types

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from fake_executor import FakeExecutor

from jmoe.serving.cli import main
from jmoe.serving.errors import WorkerDiedError


class SlowExecutor(FakeExecutor):
    """Waits for a file before each call."""

    def run(self, key, inputs):
        gate = pathlib.Path(os.environ["GATE"])
        gate.with_suffix(".entered").touch()
        end = time.monotonic() + 10
        while not gate.exists() and time.monotonic() < end:
            time.sleep(0.01)
        return super().run(key, inputs)

    def close(self):
        super().close()
        print("closed", flush=True)


def create_executor(model, cell, kind, progress, programs, processes, compile_cache):
    progress("loading: 1 of 2 arrays")
    if mode == "slow_load":
        print("loading", flush=True)
        time.sleep(60)
    if mode == "fail":
        return SlowExecutor(cell, fail_at=0, error=WorkerDiedError("worker expert-1 ended with signal 9"))
    return SlowExecutor(cell) if mode == "slow_steps" else FakeExecutor(cell)


mode = sys.argv[1]
sys.modules["jmoe.serving.executors.create"] = types.SimpleNamespace(create_executor=create_executor)
sys.exit(main(sys.argv[2:]))
