"""ProcessesExecutor over worker processes with a fake runtime: what is sent, what comes back, and a clean end."""

import os
import pathlib
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from worker_cell import (
    DECODE,
    FAKE_COMMAND,
    PREFILL,
    SAMPLING,
    all_gone,
    fake_executor,
    is_alive,
    tiny_cell,
)

from jmoe.serving.deadlines import Deadlines
from jmoe.serving.errors import CellFailedError, WorkerDiedError
from jmoe.serving.executors.create import create_executor
from jmoe.serving.executors.processes import ProcessesExecutor, _join_outputs, worker_places
from jmoe.serving.executors.protocol import ProgramKey
from jmoe.serving.process_options import ProcessOptions
from jmoe.sharding.mesh_config import MeshConfig
from jmoe.step_inputs import StepInputs


def expected_tokens(cell, call: int, num_steps: int, rows: int) -> np.ndarray:
    mesh = cell.mesh
    tokens = np.full((num_steps, mesh.attention, mesh.num_micro_batches, rows), 1000 * call, np.int32)
    tokens += 100 * np.arange(mesh.attention, dtype=np.int32)[:, None, None]
    return tokens + np.arange(mesh.num_micro_batches, dtype=np.int32)[:, None]


@pytest.mark.parametrize(("per", "mesh"), [("role", {}), ("device", {}), ("device", {"attention_tensor": 2})])
def test_calls_reach_every_worker_and_replicas_come_back_in_order(monkeypatch, per, mesh):
    cell = tiny_cell(2, 1, **mesh)
    lines = []
    executor = fake_executor(monkeypatch, cell=cell, per=per, progress=lines.append)
    try:
        executor.compile([DECODE, PREFILL], lines.append)
        out = executor.run(DECODE, StepInputs(cell, "decode"))
        np.testing.assert_array_equal(out.tokens, expected_tokens(cell, 1, cell.num_steps, cell.rows))
        assert out.logprobs is None and out.top_ids is None and out.dropped_rows == 1
        out = executor.run(PREFILL, StepInputs(cell, "prefill"))
        np.testing.assert_array_equal(out.tokens, expected_tokens(cell, 2, 1, 1))
        out = executor.run(SAMPLING, StepInputs(cell, "decode"))  # compiled on its first use
        assert out.logprobs is not None and (out.logprobs == -1.5).all()
        assert out.top_ids is not None and out.top_ids.shape == (*out.tokens.shape, cell.num_top_logprobs)
        executor.check()
    finally:
        executor.close()
    assert "worker 0 (attention): read /some/checkpoint" in lines
    assert f"worker {len(executor.worker_pids) - 1} (expert): read /some/checkpoint" in lines
    assert "compiling decode, greedy" in lines


def test_workers_are_told_where_all_mailboxes_stand_before_they_load(monkeypatch):
    """The fake runtime compares what it is told, and that it is told anything only where rows are pushed."""
    cell = tiny_cell(2, 3, "push")
    executor = fake_executor(monkeypatch, cell=cell)
    try:
        out = executor.run(DECODE, StepInputs(cell, "decode"))
        np.testing.assert_array_equal(out.tokens, expected_tokens(cell, 1, cell.num_steps, cell.rows))
    finally:
        executor.close()


def test_calls_in_flight_come_back_in_order_and_a_program_may_compile_behind_them(monkeypatch):
    cell = tiny_cell(2, 1)
    executor = fake_executor(monkeypatch, cell=cell, programs=[DECODE])
    try:
        for key in (DECODE, DECODE, PREFILL):
            executor.submit(key, StepInputs(cell, key.kind))
        for n in (1, 2):
            want = expected_tokens(cell, n, cell.num_steps, cell.rows)
            np.testing.assert_array_equal(executor.collect().tokens, want)
        np.testing.assert_array_equal(executor.collect().tokens, expected_tokens(cell, 3, 1, 1))
        with pytest.raises(ValueError, match="expected a call in flight, got none"):
            executor.collect()
    finally:
        executor.close()


def test_close_twice_leaves_no_process_and_later_calls_fail(monkeypatch):
    executor = fake_executor(monkeypatch)
    pids = executor.worker_pids
    assert len(pids) == 2 and all(is_alive(pid) for pid in pids)
    executor.close()
    executor.close()
    assert not any(is_alive(pid) for pid in pids)
    with pytest.raises(CellFailedError, match="ended by close"):
        executor.run(DECODE, StepInputs(executor.cell, "decode"))
    with pytest.raises(CellFailedError, match="ended by close"):
        executor.check()


def test_workers_stop_by_themselves_when_asked(monkeypatch, tmp_path):
    executor = fake_executor(monkeypatch, log_dir=tmp_path)
    workers = executor._supervisor._workers
    executor.close()
    assert [worker.process.popen.returncode for worker in workers] == [0, 0]
    assert sorted(log.name for log in tmp_path.iterdir()) == ["worker-0-attention.log", "worker-1-expert.log"]


def test_the_token_is_in_no_argument_list_and_not_handed_on(monkeypatch):
    lines = []
    executor = fake_executor(monkeypatch, progress=lines.append)
    assert "worker 0 (attention): sees the token: False" in lines, "what a worker starts would see it too"
    token = executor._supervisor._start.token
    try:
        for pid in executor.worker_pids:
            assert token not in pathlib.Path(f"/proc/{pid}/cmdline").read_text()
        assert token not in os.environ.values()
        assert token not in repr(executor._supervisor._start)
    finally:
        executor.close()


def test_listening_workers_are_reached_by_address(monkeypatch):
    """Two workers that listen, as on other hosts; a peer without the token is turned away first."""
    monkeypatch.setenv("JMOE_WORKER_TOKEN", "the token of this cell")
    workers, addresses = [], []
    try:
        for _ in range(2):
            command = [*FAKE_COMMAND, "--listen", "127.0.0.1:0", "--wait-s", "60"]
            workers.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
            addresses.append(workers[-1].stderr.readline().split()[-1])
        with pytest.raises(CellFailedError, match=r"does not hold|closed"):
            fake_executor(monkeypatch, addresses=tuple(addresses), token="another token of a cell")
        cell = tiny_cell(1, 1)
        executor = fake_executor(monkeypatch, cell=cell, addresses=tuple(addresses))
        out = executor.run(DECODE, StepInputs(cell, "decode"))
        np.testing.assert_array_equal(out.tokens, expected_tokens(cell, 1, cell.num_steps, cell.rows))
        assert executor.worker_pids == [worker.pid for worker in workers]
        executor.close()
        assert [worker.wait(20) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
            worker.stderr.close()
            worker.wait()


def test_places_divide_the_joint_axis():
    mesh = MeshConfig(2, 3, expert_tensor=2)
    assert [(p.role, p.num_devices, p.local_device_ids) for p in worker_places(mesh, "role", "cpu")] == [
        ("attention", 2, None),
        ("expert", 6, None),
    ]
    places = worker_places(MeshConfig(1, 2), "device", "gpu")
    assert [(p.index, p.role, p.local_device_ids) for p in places] == [
        (0, "attention", (0,)),
        (1, "expert", (1,)),
        (2, "expert", (2,)),
    ]
    places = worker_places(MeshConfig(1, 2), "device", "gpu", ["a:1", "b:1", "b:2"])
    assert [(p.address, p.local_device_ids) for p in places] == [(("a", 1), (0,)), (("b", 1), (0,)), (("b", 2), (1,))]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("role", "tpu"), "platform: expected 'cpu' or 'gpu', got 'tpu'"),
        (("role", "cpu", ["a:1"]), "worker addresses: expected 2 .* got 1"),
        (("role", "cpu", ["a:1", "b"]), "worker address: expected HOST:PORT, got 'b'"),
        (("role", "cpu", ["a:1", "b:99999"]), "expected HOST:PORT, got 'b:99999'"),
    ],
)
def test_bad_arguments_are_named(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        worker_places(MeshConfig(2, 3), *arguments)


def test_a_live_model_for_workers_elsewhere_is_refused():
    with pytest.raises(ValueError, match="got a live model"):
        ProcessesExecutor(
            tiny_cell(),
            object(),  # pyright: ignore[reportArgumentType]
            ProcessOptions(addresses=("a:1", "b:1"), token="x" * 20),
        )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"step_s": 0}, "Deadlines.step_s: expected more than 0 seconds, got 0"),
        ({"load_s": float("nan")}, "Deadlines.load_s: expected more than 0 seconds, got nan"),
        ({"heartbeat_s": 1.5}, "expected at least 2 seconds for heartbeat_s and busy_heartbeat_s, got 1.5 and 60.0"),
    ],
)
def test_bad_deadlines_are_named(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Deadlines(**options)


def test_bad_process_options_are_named(monkeypatch):
    with pytest.raises(ValueError, match="processes_per: expected 'role' or 'device', got 'node'"):
        ProcessOptions(per="node")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="worker address: expected HOST:PORT, got 'b'"):
        ProcessOptions(addresses=("a:1", "b"))
    monkeypatch.delenv("JMOE_WORKER_TOKEN", raising=False)
    with pytest.raises(ValueError, match=r"at least 16 characters, given or in \$JMOE_WORKER_TOKEN, .* got 0"):
        ProcessOptions(addresses=("a:1",)).start()
    assert "hidden" not in repr(ProcessOptions(token="hidden"))


def test_an_executor_without_processes_refuses_their_options(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    for kind in ("inline", "auto"):
        with pytest.raises(ValueError, match="expected the executor 'processes' for its options, got 'inline' on cpu"):
            create_executor("/some/checkpoint", tiny_cell(), kind, processes=ProcessOptions())


def test_programs_are_compiled_with_the_load(monkeypatch):
    """A fault of `compile` shows in the start itself, and what was compiled there is not compiled again."""
    with pytest.raises(WorkerDiedError, match="worker 1"):
        fake_executor(monkeypatch, {"1": {"compile": "exit"}}, programs=[PREFILL, DECODE])
    lines = []
    executor = fake_executor(monkeypatch, programs=[PREFILL, DECODE], progress=lines.append)
    try:
        assert {f"worker {i}: compiled 2 programs" for i in ("0 (attention)", "1 (expert)")} < set(lines)
        num_lines = len(lines)
        executor.compile([PREFILL, DECODE], lines.append)
        assert len(lines) == num_lines
    finally:
        executor.close()


def answer(cell, replicas, **changes):
    shape = (cell.num_steps, len(replicas), cell.mesh.num_micro_batches, cell.rows)
    return {"replicas": np.array(replicas, np.int32), "tokens": np.zeros(shape, np.int32)} | changes


@pytest.mark.parametrize(
    "replicas", [[[0]], [[0, 1], [1]], [[0, 2]], [[-1, 0, 1]], [[0, 1, 1]], [[], []]], ids=lambda r: str(r)
)
def test_replicas_missing_or_double_are_refused(replicas):
    cell = tiny_cell()
    with pytest.raises(ValueError, match="replicas: expected"):
        _join_outputs(cell, DECODE, [*(answer(cell, r) for r in replicas), None])


def test_misshapen_answers_are_refused():
    cell = tiny_cell()
    for change in ({"tokens": np.zeros((1, 2, 2, 4), np.int32)}, {"tokens": np.zeros((2, 2, 2, 4), np.int64)}):
        with pytest.raises(ValueError, match="tokens: expected int32"):
            _join_outputs(cell, DECODE, [answer(cell, [0, 1], **change)])
    with pytest.raises(KeyError):
        _join_outputs(cell, ProgramKey("decode", True), [answer(cell, [0, 1])])


def test_the_parent_needs_no_jax_and_no_main_guard(tmp_path):
    """From a plain script without a __main__ guard, with JAX blocked in the parent, as a notebook's kernel would."""
    script = tmp_path / "notebook.py"
    tests = str(pathlib.Path(__file__).parent)
    script.write_text(
        textwrap.dedent(f"""
        import sys
        sys.modules.update(dict.fromkeys(["jax", "jaxlib", "flax", "orbax"]))
        sys.path.insert(0, {tests!r})
        from worker_cell import FAKE_COMMAND, DECODE, PATIENT, tiny_cell
        from jmoe.serving.executors.processes import ProcessesExecutor
        from jmoe.serving.process_options import ProcessOptions
        from jmoe.step_inputs import StepInputs
        executor = ProcessesExecutor(tiny_cell(), "/x", ProcessOptions(command=FAKE_COMMAND, deadlines=PATIENT))
        print(executor.run(DECODE, StepInputs(executor.cell, "decode")).tokens.sum(), *executor.worker_pids)
        """)
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    tokens, *pids = map(int, done.stdout.split())
    assert tokens == expected_tokens(tiny_cell(), 1, 2, 4).sum()
    assert all_gone(pids), "a script that never called close() left workers behind"


def test_default_deadlines_keep_what_is_promised():
    """A stopped worker is noticed within 10 s, the end of all workers included."""
    assert Deadlines().heartbeat_s + Deadlines().grace_s + 1 < 10
    limits = [Deadlines().step_limit_s(kind, first) for kind in ("gpu", "cpu") for first in (True, False)]
    assert limits == [60, 10, 170, 120]
    assert Deadlines(step_s=3, first_step_s=4).step_limit_s("cpu", True) == 4
