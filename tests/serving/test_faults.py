"""Faults of worker processes (fake runtime): each ends the whole cell with a typed error, and leaves no process.

A time limit here is the capability itself: the deadline is set short, every other one to a minute, and the error must
come from the short one.
"""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from worker_cell import (
    DECODE,
    PATIENT,
    all_gone,
    every_process,
    fake_executor,
    group_of,
    is_alive,
)

from jmoe.serving import errors
from jmoe.serving.errors import (
    CellFailedError,
    ExchangeTimeoutError,
    SequenceMismatchError,
    StepTimeoutError,
    WorkerDiedError,
)
from jmoe.serving.wire import Channel, WireError
from jmoe.step_inputs import StepInputs

HANG_BOTH = {"0": {"run": "hang"}, "1": {"run": "hang"}}  # a run that lasts until somebody ends it


def run_in_thread(executor) -> tuple[threading.Thread, dict]:
    """Runs one call in a thread; `result` gets what it raised and when, or the output."""
    result = {}

    def run():
        try:
            result["output"] = executor.run(DECODE, StepInputs(executor.cell, "decode"))
        except Exception as e:
            result["error"] = e
        result["alive"] = [pid for pid in executor.worker_pids if is_alive(pid)]
        result["at"] = time.monotonic()

    thread = threading.Thread(target=run)
    thread.start()
    return thread, result


def wait_until_running(executor):
    """Both fake workers have said that they hang in the run."""
    until = time.monotonic() + 60
    while not all(" in run" in worker.last_lines() for worker in executor._supervisor._workers):
        assert time.monotonic() < until, "the workers never got the run"
        time.sleep(0.01)


@pytest.mark.parametrize(("victim", "per"), [(0, "role"), (1, "role"), (0, "device"), (3, "device")])
def test_a_killed_worker_ends_the_run_within_two_seconds(monkeypatch, victim, per):
    faults = {str(i): {"run": "hang"} for i in range(5)}
    executor = fake_executor(monkeypatch, faults, per=per)
    try:
        pids = executor.worker_pids
        thread, result = run_in_thread(executor)
        wait_until_running(executor)
        killed_at = time.monotonic()
        os.kill(pids[victim], signal.SIGKILL)
        thread.join(60)
        role = "attention" if victim < (1 if per == "role" else 2) else "expert"
        error = result["error"]
        assert type(error) is WorkerDiedError
        assert f"worker {victim} ({role}) was killed by SIGKILL" in str(error)
        assert f"fake worker {victim}: hang in run" in str(error), "the worker's last lines are in the message"
        assert result["alive"] == [], "the error surfaced while workers still ran"
        assert result["at"] - killed_at < 2.0, "the issue's limit; every deadline of this cell is a minute"
        for again in (executor.check, lambda: executor.run(DECODE, StepInputs(executor.cell, "decode"))):
            with pytest.raises(WorkerDiedError, match=f"worker {victim}"):
                again()
    finally:
        executor.close()


def test_a_worker_that_dies_while_the_cell_is_idle_is_noticed(monkeypatch):
    executor = fake_executor(monkeypatch)
    try:
        pids = executor.worker_pids
        os.kill(pids[1], signal.SIGKILL)
        assert all_gone(pids), "the other worker goes too, though nobody called anything"
        with pytest.raises(WorkerDiedError, match=r"worker 1 \(expert\) was killed by SIGKILL"):
            until = time.monotonic() + 30
            while time.monotonic() < until:
                executor.check()
    finally:
        executor.close()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_worker_is_noticed_in_a_run(monkeypatch, victim):
    """By its missing heartbeats; the step's deadline is a minute. Stopped processes ignore SIGTERM, not SIGKILL."""
    deadlines = dataclasses.replace(PATIENT, heartbeat_s=2.5)
    executor = fake_executor(monkeypatch, HANG_BOTH, deadlines=deadlines)
    try:
        thread, result = run_in_thread(executor)
        wait_until_running(executor)
        os.kill(executor.worker_pids[victim], signal.SIGSTOP)
        thread.join(50)
        assert type(result["error"]) is StepTimeoutError
        assert f"worker {victim} " in str(result["error"]) and "no heartbeat for 2.5 s" in str(result["error"])
        assert result["alive"] == []
    finally:
        executor.close()


def test_a_stopped_worker_is_noticed_while_idle(monkeypatch):
    executor = fake_executor(monkeypatch, deadlines=dataclasses.replace(PATIENT, heartbeat_s=2.5))
    try:
        pids = executor.worker_pids
        os.kill(pids[0], signal.SIGSTOP)
        assert all_gone(pids)
        with pytest.raises(StepTimeoutError, match=r"worker 0 \(attention\) sent no heartbeat"):
            until = time.monotonic() + 30
            while time.monotonic() < until:
                executor.check()
    finally:
        executor.close()


@pytest.mark.parametrize("victim", ["0", "1"])
def test_a_stuck_collective_passes_the_step_deadline(monkeypatch, victim):
    """The worker's main thread is stuck, its heartbeats go on: the deadline ends it."""
    deadlines = dataclasses.replace(PATIENT, first_step_s=0.5)
    executor = fake_executor(monkeypatch, {victim: {"run": "hang"}}, deadlines=deadlines)
    try:
        pids = executor.worker_pids
        executor.compile([DECODE], lambda line: None)
        with pytest.raises(StepTimeoutError, match=rf"run: no answer within 0.5 s from worker {victim}"):
            executor.run(DECODE, StepInputs(executor.cell, "decode"))
        assert not any(is_alive(pid) for pid in pids)
    finally:
        executor.close()


def test_later_calls_have_a_shorter_deadline_than_a_program_s_first(monkeypatch):
    deadlines = dataclasses.replace(PATIENT, first_step_s=60, step_s=0.5)
    executor = fake_executor(monkeypatch, {"1": {"run1": "slower", "run2": "hang"}}, deadlines=deadlines)
    executor.run(DECODE, StepInputs(executor.cell, "decode"))
    with pytest.raises(StepTimeoutError, match=r"run: no answer within 0.5 s from worker 1"):
        executor.run(DECODE, StepInputs(executor.cell, "decode"))
    executor.close()


def test_the_deadline_of_a_call_in_flight_begins_when_the_one_before_is_answered(monkeypatch):
    """Three calls of 0.8 s each, sent at once, under a deadline of 1.5 s; the fourth one hangs."""
    faults = {"1": {"run1": "slower", "run2": "slower", "run3": "slower", "run4": "hang"}}
    executor = fake_executor(monkeypatch, faults, deadlines=dataclasses.replace(PATIENT, first_step_s=1.5, step_s=1.5))
    executor.compile([DECODE], lambda line: None)
    for _ in range(4):
        executor.submit(DECODE, StepInputs(executor.cell, "decode"))
    for _ in range(3):
        executor.collect()
    with pytest.raises(StepTimeoutError, match=r"run: no answer within 1.5 s from worker 1"):
        executor.collect()
    executor.close()


def test_a_worker_that_dies_with_calls_in_flight_fails_those_that_it_has_not_answered(monkeypatch):
    executor = fake_executor(monkeypatch, {"0": {"run2": "exit"}})
    pids = executor.worker_pids
    for _ in range(3):
        executor.submit(DECODE, StepInputs(executor.cell, "decode"))
    with pytest.raises(WorkerDiedError, match=r"worker 0 \(attention\) ended with exit code 7"):
        for _ in range(2):  # the first may have come before
            executor.collect()
    with pytest.raises(WorkerDiedError, match="worker 0"):
        executor.collect()
    assert not any(is_alive(pid) for pid in pids)
    executor.close()


def test_a_worker_that_ignores_sigterm_is_killed(monkeypatch):
    deadlines = dataclasses.replace(PATIENT, first_step_s=0.5)
    executor = fake_executor(monkeypatch, {"1": {"run": "ignore_sigterm"}}, deadlines=deadlines)
    pids = executor.worker_pids
    with pytest.raises(StepTimeoutError):
        executor.run(DECODE, StepInputs(executor.cell, "decode"))
    assert not any(is_alive(pid) for pid in pids)
    assert executor._supervisor._workers[1].process.popen.returncode == -signal.SIGKILL
    executor.close()


@pytest.mark.parametrize(
    ("fault", "error", "sentence"),
    [
        ("wrong_number", SequenceMismatchError, "answer to command 5, expected 4"),
        ("twice", SequenceMismatchError, "answer to command 4, expected none"),
        ("sequence_error", SequenceMismatchError, "exchange 3: expected sequence number 3, got 2"),
        ("oversized", WireError, "expected at most 67108864 bytes, got a length of 67108865"),
        ("malformed", WireError, "malformed frame"),
        ("closed", WorkerDiedError, "ended with exit code 3"),
        ("exit", WorkerDiedError, "ended with exit code 7"),
        ("exit_leaving_a_child", WorkerDiedError, "ended with exit code 7"),
        ("killed", WorkerDiedError, "was killed by SIGKILL"),
        ("exchange_timeout", ExchangeTimeoutError, "run failed: .* expected message 3 of a peer, got none in time"),
        ("peer_lost", CellFailedError, "run failed: RuntimeError: gloo: connection closed by peer"),
    ],
)
@pytest.mark.parametrize("victim", ["0", "1"])
def test_a_bad_answer_ends_the_cell(monkeypatch, fault, error, sentence, victim):
    other = "1" if victim == "0" else "0"
    # The other worker answers late, so that what is wrong comes while the command is in flight.
    executor = fake_executor(monkeypatch, {victim: {"run": fault}, other: {"run": "slow"}})
    pids = executor.worker_pids
    with pytest.raises(error, match=sentence) as caught:
        executor.run(DECODE, StepInputs(executor.cell, "decode"))
    assert type(caught.value) is error and isinstance(caught.value, CellFailedError)
    assert not any(is_alive(pid) for pid in pids)
    assert all_gone([pid for pid in every_process() if group_of(pid) in pids]), "what a worker started runs on"
    with pytest.raises(error, match=sentence):
        executor.check()
    executor.close()


def test_an_answer_of_another_shape_ends_the_cell(monkeypatch):
    executor = fake_executor(monkeypatch, {"0": {"run": "misshapen"}})
    pids = executor.worker_pids
    for _ in range(2):
        with pytest.raises(CellFailedError, match=r"tokens: expected int32\[2, 2, 2, 4\], got int32\[2, 2, 2, 0\]"):
            executor.run(DECODE, StepInputs(executor.cell, "decode"))
        assert not any(is_alive(pid) for pid in pids)
    executor.close()


def test_a_dead_peer_explains_a_lost_connection(monkeypatch):
    """One worker dies and the other reports a broken collective: the death is what is told."""
    executor = fake_executor(monkeypatch, {"0": {"run": "peer_lost"}, "1": {"run": "killed_later"}})
    with pytest.raises(WorkerDiedError, match=r"worker 1 \(expert\) was killed by SIGKILL"):
        executor.run(DECODE, StepInputs(executor.cell, "decode"))
    executor.close()


@pytest.mark.parametrize(
    ("command", "fault", "error", "sentence"),
    [
        ("start", "any", WorkerDiedError, r"worker 1 \(expert\) ended with exit code 1 while it started(.|\n)*no such"),
        ("init", "exit", WorkerDiedError, "ended with exit code 7"),
        ("load", "value_error", ValueError, "expected a good checkpoint, got a bad one"),
        ("load", "killed", WorkerDiedError, "out of memory"),
    ],
)
def test_a_cell_that_does_not_come_up_raises_and_leaves_nothing(monkeypatch, command, fault, error, sentence):
    started = []
    real_popen = subprocess.Popen

    def popen(*args, **kwargs):
        started.append(real_popen(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", popen)
    with pytest.raises(error, match=sentence):
        fake_executor(monkeypatch, {"1": {command: fault}})
    assert len(started) == 2 and not any(is_alive(process.pid) for process in started)


def test_a_start_that_takes_too_long_names_who_is_late(monkeypatch):
    silent = (sys.executable, "-c", "import time; print('importing', flush=True); time.sleep(600)")
    deadlines = dataclasses.replace(PATIENT, start_s=1.0)
    with pytest.raises(StepTimeoutError, match=r"no connection within 1 s with worker 0 \(attention\), worker 1"):
        fake_executor(monkeypatch, deadlines=deadlines, command=silent)


def test_close_during_a_run_fails_the_run(monkeypatch):
    executor = fake_executor(monkeypatch, HANG_BOTH)
    thread, result = run_in_thread(executor)
    wait_until_running(executor)
    executor.close()
    thread.join(30)
    assert type(result["error"]) is CellFailedError and "closed during the call" in str(result["error"])
    assert not any(is_alive(pid) for pid in executor.worker_pids)
    executor.close()


def test_strangers_on_the_port_are_dropped(monkeypatch):
    """While workers start, peers that send nonsense, nothing, or a claim without the token change nothing."""
    real_server, strangers = socket.create_server, []

    def server_with_strangers(address, **kwargs):
        server = real_server(address, **kwargs)
        for first in (b"GET / HTTP/1.1\r\n\r\n", b"\xff\xff\xff\xff", b""):
            strangers.append(socket.create_connection(server.getsockname()))
            strangers[-1].sendall(first)
        claim = Channel(socket.create_connection(server.getsockname()))
        claim.send({"hello": b"\x81\xa5index\x00"})
        claim.send({"proof": b"0" * 32})
        strangers.append(claim.socket)
        return server

    monkeypatch.setattr("jmoe.serving.worker_start.socket.create_server", server_with_strangers)
    executor = fake_executor(monkeypatch)
    try:
        assert len(strangers) == 4
        executor.run(DECODE, StepInputs(executor.cell, "decode"))
    finally:
        executor.close()
        for stranger in strangers:
            stranger.close()


def test_every_failure_is_one_that_a_server_can_map():
    for error in (WorkerDiedError, StepTimeoutError, SequenceMismatchError, WireError):
        assert issubclass(error, errors.CellFailedError)
