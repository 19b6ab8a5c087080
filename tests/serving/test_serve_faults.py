"""The whole command on real JAX workers: a fault in the middle of decoding, as clients and whoever started it see it.

The time limits asserted here are the capability itself: 2 s after a death, 10 s after a stop.
"""

import os
import pathlib
import signal
import subprocess
import sys
import time

import grpc
import pytest
from served_cell import SIZES, HealthWatch, ServedCell, Streams
from worker_cell import all_gone, is_alive

import jmoe
from jmoe.serving.requests import SamplingParams

PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [5, 6, 7], [90], [17, 33]]
DEATH_S, STOP_S = 2.0, 10.0
DRILL_TOKEN = "the token of the drilled cell"
DRILL_CALL = 60  # far enough into decoding that all four prompts are in
WORKER = (sys.executable, "-P", "-m", "jmoe.serving.worker")
DRILL = (sys.executable, "-P", str(pathlib.Path(__file__).with_name("drill_worker.py")))


@pytest.fixture(scope="module")
def undisturbed(tiny_checkpoint):
    """The first tokens of every prompt's undisturbed run, as many as are asked for."""
    with jmoe.serve(tiny_checkpoint, executor="inline", **SIZES) as server:

        def tokens(counts):
            params = [SamplingParams(max_tokens=max(count, 1), ignore_eos=True) for count in counts]
            done = server.generate(PROMPTS, params)
            return [list(one.token_ids[:count]) for one, count in zip(done, counts, strict=True)]

        yield tokens


@pytest.fixture
def serve_cell(tmp_path, tiny_checkpoint):
    started = []

    def start(*words, **options):
        started.append(ServedCell(tmp_path, tiny_checkpoint, *words, **options))
        return started[-1]

    yield start
    for cell in started:
        cell.close()


def check_end(cell, streams, health, undisturbed, fault_at, limit_s, error, sentence):
    """What every fault must look like from outside."""
    streams.join()
    turned_at = health.join()
    for caught in streams.errors:
        assert caught is not None and type(caught).__name__ == error and sentence in str(caught)
        status = caught.__cause__
        assert isinstance(status, grpc.RpcError)
        assert status.code() is grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]
        assert status.details().startswith(f"{error}: ")  # type: ignore[attr-defined]
    took = [at - fault_at for at in (*streams.ended_at, turned_at)]
    print(f"{error}: streams ended after {max(took[:-1]):.2f} s, health turned after {took[-1]:.2f} s")
    assert turned_at > 0 and max(took) < limit_s
    assert not any(is_alive(pid) for pid in cell.workers), "the error was told while workers ran"
    code, stderr = cell.end()
    last = stderr.splitlines()[-1]
    assert code == 1 and last.startswith(f"jmoe serve: {error}: ") and sentence in last
    assert stderr.count("jmoe serve:") == 1 and "Traceback" not in stderr and "ERROR" not in stderr
    counts = [len(tokens) for tokens in streams.tokens]
    assert streams.tokens == undisturbed(counts), "a token of the lost step was emitted"
    assert {(count - 1) % SIZES["num_steps"] for count in counts} == {0}, "calls come whole or not at all"


@pytest.mark.parametrize(
    ("mesh", "victim", "number", "error", "sentence"),
    [
        ((1, 1, "role"), 0, signal.SIGKILL, "WorkerDiedError", "worker 0 (attention) was killed by SIGKILL"),
        ((1, 1, "role"), 1, signal.SIGKILL, "WorkerDiedError", "worker 1 (expert) was killed by SIGKILL"),
        ((1, 2, "device"), 2, signal.SIGKILL, "WorkerDiedError", "worker 2 (expert) was killed by SIGKILL"),
        ((2, 1, "device"), 1, signal.SIGSTOP, "StepTimeoutError", "worker 1 (attention) sent no heartbeat for 7 s"),
    ],
    ids=["kill the coordinator", "kill the expert", "kill one expert of two", "stop one attention of two"],
)
def test_a_fault_while_decoding(serve_cell, undisturbed, mesh, victim, number, error, sentence):
    attention, expert, per = mesh
    words = ["--attention", str(attention), "--expert", str(expert), "--processes-per", per]
    cell = serve_cell(*words)
    assert len(set(cell.workers)) == (2 if per == "role" else attention + expert)
    health, streams = HealthWatch(cell.address), Streams(cell.address, PROMPTS)
    streams.wait_for_tokens(3 * SIZES["num_steps"])
    fault_at = time.monotonic()
    os.kill(cell.workers[victim], number)
    limit_s = DEATH_S if number == signal.SIGKILL else STOP_S
    check_end(cell, streams, health, undisturbed, fault_at, limit_s, error, sentence)


@pytest.fixture
def listening():
    """Two workers that listen, as on other hosts; the expert's is drilled to fall out of step."""
    variables = {"JMOE_WORKER_TOKEN": DRILL_TOKEN, "DRILL_CALL": str(DRILL_CALL)}
    started = [
        subprocess.Popen(
            [*command, "--listen", "127.0.0.1:0", "--wait-s", "60"],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | variables,
        )
        for command in (WORKER, DRILL)
    ]
    try:
        yield started, [worker.stderr.readline().split()[-1] for worker in started if worker.stderr]
    finally:
        for worker in started:
            worker.kill()
            worker.communicate()


def test_an_exchange_out_of_step_at_workers_that_listen(serve_cell, undisturbed, listening):
    workers, addresses = listening
    cell = serve_cell("--worker", addresses[0], "--worker", addresses[1], token=DRILL_TOKEN)
    assert cell.workers == [worker.pid for worker in workers]
    health, streams = HealthWatch(cell.address), Streams(cell.address, PROMPTS)
    streams.wait_for_tokens(1)
    fault_at = time.monotonic()
    streams.join()
    assert all_gone(cell.workers), "a worker that listened outlived its cell"
    assert min(map(len, streams.tokens)) > 3 * SIZES["num_steps"]
    sentence = "expected an exchange with sequence number"  # whichever worker tells it first
    check_end(cell, streams, health, undisturbed, fault_at, 60, "SequenceMismatchError", sentence)
