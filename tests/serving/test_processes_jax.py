"""Real JAX workers over gloo: tokens equal to the reference's, and faults in the middle of real collectives.

Start and compilation cost seconds of CPU each, so one cell serves for its tokens first and for a fault after that.
"""

import dataclasses
import os
import pathlib
import signal
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from worker_cell import DECODE, PATIENT, PREFILL, is_alive

from jmoe.cell_config import CellConfig
from jmoe.checkpoints.save import save_hf
from jmoe.config import ModelConfig
from jmoe.models.model import Model, array_specs, reference_forward
from jmoe.serving.errors import SequenceMismatchError, StepTimeoutError, WorkerDiedError
from jmoe.serving.executors.processes import ProcessesExecutor
from jmoe.serving.executors.protocol import ProgramKey
from jmoe.serving.process_options import ProcessOptions
from jmoe.sharding.mesh_config import MeshConfig
from jmoe.step_inputs import StepInputs

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from cell_driver import generate

CONFIG = ModelConfig("mixtral", 97, 24, 1, 3, 3, 8, 6, 3, 16, dtype="float32", max_position=64)
PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [5, 6, 7], [90]]
DEADLINES = dataclasses.replace(PATIENT, step_s=60, heartbeat_s=30)
DRILL_COMMAND = (sys.executable, "-P", str(pathlib.Path(__file__).with_name("drill_worker.py")))


@pytest.fixture(scope="module")
def model():
    rng = np.random.default_rng(0)  # by numpy: flax's own start compiles array by array

    def arrays(specs):
        return {path: jnp.asarray(rng.normal(size=spec.shape, scale=max(spec.fan_in, 1) ** -0.5), jnp.float32)
                for path, spec in specs.items()}  # fmt: skip

    return Model.from_arrays(CONFIG, *map(arrays, array_specs(CONFIG)))


def cell_of(mesh: MeshConfig) -> CellConfig:
    sizes = {"rows": 2, "chunk_len": 8, "num_steps": 3, "page_len": 4, "num_pages": 65, "max_len": 32}
    return CellConfig(CONFIG, mesh.resolve(6), **sizes)


def tokens_of(executor) -> list[list[int]]:
    def run(key, array):
        inputs = StepInputs(executor.cell, key[0])
        inputs.array[...] = array
        return {"tokens": executor.run(ProgramKey(*key), inputs).tokens}

    return generate(run, executor.cell, PROMPTS, 6)[0]


def reference_tokens(model) -> list[list[int]]:
    """Greedy, over one padded batch: attention is causal, so what stands behind a token does not matter."""
    num_tokens, ids = 6, np.zeros((len(PROMPTS), 20), np.int32)
    lens = [len(prompt) for prompt in PROMPTS]
    for row, prompt in enumerate(PROMPTS):
        ids[row, : len(prompt)] = prompt
    forward = jax.jit(lambda ids: reference_forward(model, ids)[0])
    for step in range(num_tokens):
        logits = np.asarray(forward(ids))
        for row, start in enumerate(lens):
            ids[row, start + step] = logits[row, start + step - 1].argmax()
    return [ids[row, start : start + num_tokens].tolist() for row, start in enumerate(lens)]


def break_while_decoding(executor, act) -> Exception:
    """Decodes call after call in a thread, does `act` in the middle, and returns what the decoding raised."""
    calls, caught = [], []

    def decode():
        try:
            until = time.monotonic() + 120
            while time.monotonic() < until:
                calls.append(executor.run(DECODE, StepInputs(executor.cell, "decode")))
        except Exception as e:
            caught.append(e)

    thread = threading.Thread(target=decode)
    thread.start()
    until = time.monotonic() + 60
    while len(calls) < 5 and time.monotonic() < until:
        time.sleep(0.001)
    act()
    thread.join(150)
    assert len(calls) >= 5 and caught, "decoding never began, or never ended"
    return caught[0]


def test_one_to_one_from_a_live_model_then_the_coordinator_is_killed(model):
    executor = ProcessesExecutor(cell_of(MeshConfig(1, 1)), model, ProcessOptions(deadlines=DEADLINES))
    try:
        assert list(pathlib.Path("/dev/shm").glob(f"jmoe-handover-{os.getpid()}.*")) == []
        executor.compile([PREFILL, DECODE], lambda line: None)
        assert tokens_of(executor) == reference_tokens(model)
        pids = executor.worker_pids
        error = break_while_decoding(executor, lambda: os.kill(pids[0], signal.SIGKILL))
        assert type(error) is WorkerDiedError
        assert "worker 0 (attention) was killed by SIGKILL" in str(error)
        assert not any(is_alive(pid) for pid in pids)
    finally:
        executor.close()


def test_two_to_three_with_a_process_a_device_then_an_expert_stops(model, tmp_path):
    save_hf(tmp_path, CONFIG, *model.arrays_by_path())
    deadlines = dataclasses.replace(DEADLINES, heartbeat_s=6)
    cell = cell_of(MeshConfig(2, 3))
    executor = ProcessesExecutor(cell, tmp_path, ProcessOptions(deadlines=deadlines, per="device"))
    try:
        pids = executor.worker_pids
        assert len(set(pids)) == 5
        assert tokens_of(executor) == reference_tokens(model)
        error = break_while_decoding(executor, lambda: os.kill(pids[3], signal.SIGSTOP))
        assert type(error) is StepTimeoutError
        assert "worker 3 (expert) sent no heartbeat for 6 s" in str(error)
        assert not any(is_alive(pid) for pid in pids)
    finally:
        executor.close()


def test_colocated_with_a_process_a_device(model, tmp_path):
    save_hf(tmp_path, CONFIG, *model.arrays_by_path())
    options = ProcessOptions(deadlines=DEADLINES, per="device")
    executor = ProcessesExecutor(cell_of(MeshConfig.colocate(2)), tmp_path, options)
    try:
        assert len(set(executor.worker_pids)) == 2
        assert tokens_of(executor) == reference_tokens(model)
    finally:
        executor.close()


def test_an_exchange_out_of_step_ends_the_cell(model, tmp_path):
    """A device's sequence number is wrong from the third call on: no token of that call comes back."""
    save_hf(tmp_path, CONFIG, *model.arrays_by_path())
    cell = cell_of(MeshConfig(1, 1, num_micro_batches=1))
    executor = ProcessesExecutor(cell, tmp_path, ProcessOptions(deadlines=DEADLINES, command=DRILL_COMMAND))
    try:
        pids = executor.worker_pids
        for _ in range(2):
            executor.run(DECODE, StepInputs(cell, "decode"))
        with pytest.raises(SequenceMismatchError, match=r"sequence number (12345, got|\d+, got 1234\d)"):
            executor.run(DECODE, StepInputs(cell, "decode"))
        assert not any(is_alive(pid) for pid in pids)
    finally:
        executor.close()
