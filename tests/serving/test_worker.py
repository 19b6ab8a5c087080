"""A worker process seen from its parent's end: what it refuses, and that it never outlives its parent."""

import os
import pathlib
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import time

import pytest
from worker_cell import FAKE_COMMAND, all_gone, is_alive, tiny_cell

from jmoe.serving.wire import Channel, handshake

INIT = {
    "number": 1,
    "kind": "init",
    "cell": tiny_cell().to_dict(),
    "role": "attention",
    "process_id": 0,
    "num_processes": 2,
    "num_devices": 2,
}


@pytest.fixture
def bare_worker(monkeypatch):
    """A fake worker whose parent is this test itself: (its process, a channel past the handshake)."""
    monkeypatch.setenv("FAKE_WORKER", "{}")
    monkeypatch.setenv("JMOE_WORKER_TOKEN", "the token of this cell")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        address = f"127.0.0.1:{server.getsockname()[1]}"
        process = subprocess.Popen([*FAKE_COMMAND, "--connect", address], stderr=subprocess.PIPE, text=True)
        channel = Channel(server.accept()[0])
    handshake(channel, "the token of this cell", "parent", {}, 30)
    yield process, channel
    channel.close()
    process.kill()
    process.stderr.close()
    process.wait()


@pytest.mark.parametrize("command", ["init", "none"])
def test_a_worker_ends_when_its_connection_ends(bare_worker, command):
    """Though its parent lives, and in one case with the main thread stuck in a command."""
    process, channel = bare_worker
    if command == "init":
        channel.send({"number": 1, "kind": "init", "hang": True})
        while " stuck" not in process.stderr.readline():
            pass
    channel.close()
    assert process.wait(30) == 3
    assert "the parent is gone" in process.stderr.read()


def answer_of(channel: Channel) -> dict:
    while (message := channel.receive(time.monotonic() + 30))["kind"] in ("alive", "progress"):
        pass
    return message


@pytest.mark.parametrize(
    ("commands", "sentence"),
    [
        ([{"number": 2, "kind": "init"}], "command number: expected 1, got 2"),
        ([{"kind": "init"}], "command number: expected 1, got None"),
        ([{"number": 1, "kind": "run", "key": ["decode", False]}], "expected 'init' first"),
        ([INIT, {"number": 3, "kind": "load", "path": "/x"}], "command number: expected 2, got 3"),
        ([INIT, {"number": 2, "kind": "load", "path": "/x"}, INIT], "command number: expected 3, got 1"),
        ([INIT, {"number": 2, "kind": "reboot"}], "mailboxes, connect, run or stop, got 'reboot'"),
    ],
)
def test_a_worker_refuses_commands_out_of_order(bare_worker, commands, sentence):
    _, channel = bare_worker
    for command in commands[:-1]:
        channel.send(command)
        assert answer_of(channel)["kind"] == "done"
    channel.send(commands[-1])
    answer = answer_of(channel)
    assert (answer["kind"], answer["error"]) == ("failed", "SequenceMismatchError")
    assert sentence in answer["text"] and answer["number"] == commands[-1].get("number")


@pytest.mark.parametrize("frame", [struct.pack(">I", (64 << 20) + 1), struct.pack(">I", 1) + b"\xc1"])
def test_a_worker_ends_when_its_parent_sends_nonsense(bare_worker, frame):
    process, channel = bare_worker
    channel.send_frame(frame)
    assert process.wait(30) == 3
    assert "sent what it may not: WireError" in process.stderr.read()


def test_a_worker_without_the_right_token_gives_up():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        command = [*FAKE_COMMAND, "--connect", f"127.0.0.1:{server.getsockname()[1]}"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "FAKE_WORKER": "{}"})
        assert process.wait(30) == 2, "no token at all"
        assert "expected at least 16 characters, got 0" in process.stderr.read()
        process.stderr.close()


@pytest.mark.parametrize("state", ["idle", "stuck", "stopped"])
def test_workers_end_when_their_parent_is_killed(tmp_path, state):
    """Idle, with the main thread stuck in a run, and stopped (where only the kernel's signal can reach them)."""
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys, threading, time
        sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})
        from test_faults import HANG_BOTH, run_in_thread, wait_until_running
        from worker_cell import fake_executor
        import pytest
        result = []
        # Started from a thread that ends: the workers must outlive it.
        build = lambda: result.append(fake_executor(pytest.MonkeyPatch(), HANG_BOTH))
        thread = threading.Thread(target=build)
        thread.start()
        thread.join()
        executor = result[0]
        if {state == "stuck"}:
            run_in_thread(executor)
            wait_until_running(executor)
        time.sleep(0.5)
        executor.check()
        print(*executor.worker_pids, flush=True)
        time.sleep(600)
        """)
    )
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2 and all(is_alive(pid) for pid in pids)
        if state == "stopped":
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
        parent.kill()
        parent.wait()
        assert all_gone(pids), "orphans"
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
        for pid in pids:
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
