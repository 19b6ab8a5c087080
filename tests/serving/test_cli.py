"""The command: what it prints, its exit codes, what it imports, and what signals and failures do to it."""

import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import types

import grpc
import pytest
from fake_executor import FakeExecutor, expected_tokens, make_cell
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tiny_tokenizer import CHAT_TEMPLATE, byte_level_backend

import jmoe
from jmoe.serving.cli import main
from jmoe.serving.deadlines import Deadlines
from jmoe.serving.errors import WorkerDiedError
from jmoe.serving.grpc_client import Client
from jmoe.serving.process_options import ProcessOptions
from jmoe.serving.progress import Progress
from jmoe.serving.requests import SamplingParams
from jmoe.serving.text.tokenizer import Tokenizer
from jmoe.sharding.mesh_config import MeshConfig

BACKEND = byte_level_backend()
VOCAB = BACKEND.get_vocab_size()
HERE = pathlib.Path(__file__).parent


@pytest.fixture
def checkpoint(tmp_path):
    """A Mixtral checkpoint folder without weights."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    config = {
        "model_type": "mixtral", "vocab_size": VOCAB, "hidden_size": 8, "num_hidden_layers": 1, "eos_token_id": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2,
        "intermediate_size": 8, "max_position_embeddings": 64,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    BACKEND.save(str(folder / "tokenizer.json"))
    return folder


class Created(list):
    """What fake executors were asked for."""

    caches: list[str]


@pytest.fixture
def created(monkeypatch):
    """Fake executors in place of real ones; the cells that were asked for, and as `caches` where to keep programs."""
    cells, caches = Created(), []
    cells.caches = caches

    def create_executor(model, cell, kind, progress, programs, processes, compile_cache):
        cells.append((model, cell, kind))
        caches.append(compile_cache)
        progress("starting")
        return FakeExecutor(cell)

    module = types.SimpleNamespace(create_executor=create_executor)
    monkeypatch.setitem(sys.modules, "jmoe.serving.executors.create", module)
    monkeypatch.setenv("JAX_PLATFORMS", os.environ.get("JAX_PLATFORMS", "cpu"))
    return cells


def answer(prompt_ids, cell, max_tokens):
    tokens = expected_tokens(prompt_ids, SamplingParams(max_tokens=max_tokens, ignore_eos=True), cell)
    return BACKEND.decode(tokens)


# ---- what it imports

BLOCKED = """
import sys
for name in ("jax", "jaxlib", "flax", "orbax"):
    sys.modules[name] = None  # an import of it raises
import jmoe
from jmoe.serving.cli import main
import jmoe.serving.server, jmoe.serving.grpc_server, jmoe.serving.grpc_client
for words in (["--help"], ["serve", "--help"], ["generate", "--help"], ["demo", "--help"], ["plan", "--help"]):
    try:
        main(words)
    except SystemExit as e:
        assert e.code == 0, words
jmoe.SamplingParams, jmoe.MeshConfig, jmoe.serve
"""


def test_the_face_and_every_help_work_without_jax():
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for word in ("examples:", "exit codes:", "--micro-batches", "jmoe plan --model"):
        assert word in done.stdout


# ---- usage


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0 and capsys.readouterr().out == f"jmoe {jmoe.__version__}\n"


def test_without_a_command_it_teaches(capsys):
    assert main([]) == 2
    assert "jmoe demo" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["cook"], "invalid choice"),
        (["serve"], "required: MODEL"),
        (["serve", "m", "--rows", "x"], "invalid int"),
        (["serve", "m", "--rows", "0"], "rows: expected at least 1, got 0"),
        (["serve", "m", "--attention", "0"], "attention: expected at least 1, got 0"),
        (["serve", "m", "--port", "70000"], "port: expected 0 to 65535"),
        (["serve", "m", "--tls-cert", "c"], "expected both a certificate and a key"),
        (["serve", "m", "--plan", "p", "--expert", "2"], "no other option of the meshes beside it, got expert"),
        (["serve", "m", "--tensor", "2"], "--tensor: expected --colocated beside it, got --tensor 2 alone"),
        (["serve", "m", "--colocated", "2", "--expert", "2"], "--placement beside it, got --expert"),
        (["serve", "m", "--colocated", "3", "--tensor", "2"], "got 3 devices and tensor 2"),
        (["serve", "m", "--colocated", "2", "--plan", "p"], "no other option of the meshes beside it, got colocated"),
        (["serve", "m", "--worker", "b"], "worker address: expected HOST:PORT, got 'b'"),
        (["serve", "m", "--step-deadline-s", "0"], "step_s: expected more than 0 seconds, got 0.0"),
        (["generate", "m", "p", "--heartbeat-deadline-s", "1"], "expected at least 2 seconds for heartbeat_s"),
        (["generate", "m", "p", "--token-file", os.devnull], "--token-file: expected 1 to 4096 bytes, got none"),
        (["generate", "prompt"], "expected MODEL PROMPT, got 1 words"),
        (["generate", "--address", "h:1", "m", "prompt"], "expected PROMPT beside --address, got 2 words"),
        (["generate", "m", "p", "--temperature", "-1"], "temperature: expected"),
    ],
)
def test_wrong_usage_is_exit_code_2(words, sentence, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2 and sentence in capsys.readouterr().err


def test_failures_are_exit_code_1_and_one_line(tmp_path, capsys, created):
    assert main(["generate", str(tmp_path / "nothing"), "hi"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("jmoe generate: expected a Hugging Face checkpoint folder")
    assert main(["generate", "--address", "127.0.0.1:1", "hi"]) == 1
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "127.0.0.1:1" in err


def test_a_cell_that_fails_is_named(checkpoint, created, monkeypatch, capsys):
    def create_executor(model, cell, kind, progress, programs, processes, compile_cache):
        return FakeExecutor(cell, fail_at=0, error=WorkerDiedError("worker 1 was killed\nits last words"))

    monkeypatch.setattr(sys.modules["jmoe.serving.executors.create"], "create_executor", create_executor)
    assert main(["generate", str(checkpoint), "the fox"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "jmoe generate: WorkerDiedError: worker 1 was killed"


def test_a_bug_says_where_with_verbose(checkpoint, created, monkeypatch, capsys):
    def create_executor(*args):
        raise KeyError("layer")

    monkeypatch.setattr(sys.modules["jmoe.serving.executors.create"], "create_executor", create_executor)
    assert main(["generate", str(checkpoint), "x"]) == 1
    assert "KeyError: 'layer' (a bug? --verbose shows where)" in capsys.readouterr().err
    assert main(["--verbose", "generate", str(checkpoint), "x"]) == 1
    assert "Traceback" in capsys.readouterr().err


# ---- generate and demo


def test_generate_in_process(checkpoint, created, capsys):
    words = [
        "generate",
        str(checkpoint),
        "the fox",
        "--max-tokens",
        "9",
        "--ignore-eos",
        "--attention",
        "2",
        "--expert",
    ]
    assert main([*words, "3", "--micro-batches", "4", "--max-len", "32", "--executor", "inline"]) == 0
    model, cell, kind = created[0]
    assert (model, kind, cell.rows, cell.max_len) == (str(checkpoint), "inline", 1, 32)
    assert (cell.mesh.attention, cell.mesh.expert, cell.mesh.num_micro_batches) == (2, 3, 4)
    shown = capsys.readouterr()
    assert shown.out == answer(BACKEND.encode("the fox").ids, cell, 9) + "\n"
    assert "starting\n" in shown.err
    assert shown.err.splitlines()[-1].startswith("jmoe generate: 9 tokens (length) in ")


def test_generate_colocated(checkpoint, created):
    words = ["generate", str(checkpoint), "the fox", "--max-tokens", "2", "--ignore-eos", "--max-len", "32"]
    assert main([*words, "--colocated", "4", "--tensor", "2", "--micro-batches", "3"]) == 0
    assert created[0][1].mesh == MeshConfig.colocate(4, tensor=2, num_micro_batches=3).resolve(4)
    assert main([*words, "--colocated", "1"]) == 0
    assert (created[1][1].mesh.num_devices, created[1][1].mesh.num_micro_batches) == (1, 1)


def test_generate_chat_from_stdin(checkpoint, created, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("fox"))
    assert main(["generate", str(checkpoint), "-", "--chat", "--max-tokens", "5", "--ignore-eos"]) == 0
    ids = Tokenizer.from_dir(checkpoint).encode_chat([{"role": "user", "content": "fox"}])
    assert capsys.readouterr().out == answer(ids, created[0][1], 5) + "\n"


def test_options_of_worker_processes(checkpoint, created, monkeypatch, tmp_path):
    asked = []

    def create_executor(model, cell, kind, progress, programs, processes, compile_cache):
        asked.append((kind, processes))
        return FakeExecutor(cell)

    monkeypatch.setattr(sys.modules["jmoe.serving.executors.create"], "create_executor", create_executor)
    words = ["generate", str(checkpoint), "fox", "--max-tokens", "1", "--executor", "processes"]
    assert main(words) == 0
    (tmp_path / "token").write_text("a secret of this cell\n")
    words += ["--processes-per", "device", "--worker", "a:1", "--worker", "[::1]:2", "--log-dir", str(tmp_path)]
    words += ["--step-deadline-s", "3", "--heartbeat-deadline-s", "4.5", "--load-deadline-s", "5"]
    assert main([*words, "--compile-deadline-s", "6", "--token-file", str(tmp_path / "token")]) == 0
    deadlines = Deadlines(step_s=3, heartbeat_s=4.5, load_s=5, compile_s=6)
    options = ProcessOptions("device", ("a:1", "[::1]:2"), "a secret of this cell", deadlines, str(tmp_path))
    assert asked == [("processes", None), ("processes", options)]


def test_where_compiled_programs_are_kept(checkpoint, created):
    words = ["generate", str(checkpoint), "fox", "--max-tokens", "1"]
    assert main(words) == 0
    assert main([*words, "--compile-cache", "off"]) == 0
    assert created.caches == ["auto", "off"]


def test_placement_file(checkpoint, created, tmp_path, capsys):
    file = tmp_path / "placement.json"
    file.write_text("[[0, 1, 2], [3, 0]]")
    words = ["generate", str(checkpoint), "fox", "--max-tokens", "2", "--expert", "2", "--placement", str(file)]
    assert main(words) == 0
    assert created[0][1].mesh.placement.nodes == ((0, 1, 2), (3, 0))
    for wrong in ("[[0, 1], [1]", "[[0], [2]]", "7"):
        file.write_text(wrong)
        with pytest.raises(SystemExit):
            main(words)


def test_demo(checkpoint, created, capsys, monkeypatch):
    def ensure_demo_model(progress):
        progress(None, "Building")
        progress(0.5, "Downloading")
        return checkpoint

    fake = types.SimpleNamespace(ensure_demo_model=ensure_demo_model)
    monkeypatch.setitem(sys.modules, "jmoe.checkpoints.demo_model", fake)
    monkeypatch.setattr("jmoe.serving.commands.demo._SIZES", jmoe_sizes(max_len=64))
    assert main(["demo", "the fox", "--max-tokens", "6", "--ignore-eos"]) == 0
    _, cell, kind = created[0]
    assert (kind, cell.mesh.num_devices, cell.mesh.num_micro_batches, cell.model.dtype) == ("inline", 2, 1, "float32")
    ids = Tokenizer.from_dir(checkpoint).encode_chat([{"role": "user", "content": "the fox"}])
    shown = capsys.readouterr()
    *text, last = shown.out.splitlines()
    assert "\n".join(text) == answer(ids, cell, 6)
    assert last.startswith("jmoe demo: 6 tokens (length) in ") and "tok/s" in last
    assert "Downloading: 50%" in shown.err


def jmoe_sizes(**sizes):
    from jmoe.serving.sizes import CellSizes

    return CellSizes(rows=1, dtype="float32", **sizes)


# ---- serve, as a process


class Served:
    """`jmoe serve` in a process of its own."""

    def __init__(self, mode, checkpoint, *words, gate):
        environment = os.environ | {"GATE": str(gate), "PYTHONUNBUFFERED": "1", "GRPC_VERBOSITY": "NONE"}
        command = [sys.executable, str(HERE / "serve_fake.py"), mode, "serve", str(checkpoint), "--port", "0", *words]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )

    def line(self):
        return self.process.stdout.readline().strip()

    def address(self):
        line = self.line()
        assert line.startswith("serving tiny on 127.0.0.1:"), (line, self.process.poll())
        return line.split()[-1]

    def end(self):
        out, err = self.process.communicate(timeout=30)
        return self.process.returncode, out.splitlines(), err.splitlines()


@pytest.fixture
def served(checkpoint, tmp_path):
    """Starts `jmoe serve` in a mode; whatever still runs at the end is killed."""
    started = []

    def start(mode, *words):
        started.append(Served(mode, checkpoint, *words, gate=tmp_path / "gate"))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.communicate()


def wait_for(path):
    for _ in range(1000):
        if path.exists():
            return
        signal.sigtimedwait([], 0.01)
    raise AssertionError(f"no {path} within 10 s")


def test_serve_answers_and_sigterm_ends_it_with_0(served, checkpoint, capsys):
    front = served("ok")
    address = front.address()
    words = ["generate", "--address", address, "the fox", "--max-tokens", "9", "--ignore-eos"]
    assert main(words) == 0
    shown = capsys.readouterr()
    cell = make_cell(vocab_size=VOCAB)
    assert shown.out == answer(BACKEND.encode("the fox").ids, cell, 9) + "\n"
    assert "9 tokens (length)" in shown.err
    with Client(address) as client:
        assert client.model_info().name == "tiny"
    front.process.send_signal(signal.SIGTERM)
    code, out, err = front.end()
    assert (code, out[-1]) == (0, "drained")
    assert "loading: 50%" in err and "\x1b" not in "".join(err)  # plain lines: it is no terminal


def test_sigterm_lets_running_requests_finish(served, tmp_path):
    front = served("slow_steps")
    with Client(front.address()) as client:
        stream = client.stream([5], SamplingParams(max_tokens=9, ignore_eos=True))
        wait_for(tmp_path / "gate.entered")
        front.process.send_signal(signal.SIGTERM)
        assert front.line() == "draining: running requests have 30 s"
        (tmp_path / "gate").touch()
        assert sum(len(o.token_ids) for o in stream) == 9
    code, out, _ = front.end()
    assert (code, out) == (0, ["drained", "closed"])


def test_sigterm_while_loading(served):
    front = served("slow_load")
    assert front.line() == "loading"
    front.process.send_signal(signal.SIGTERM)
    code, out, _ = front.end()
    assert (code, out) == (0, ["stopped while the model was loading"])


def test_a_failed_cell_ends_serve_with_1_and_one_line(served, tmp_path):
    front = served("fail")
    address = front.address()
    with Client(address) as client, grpc.insecure_channel(address) as channel:
        stream = client.stream([5])
        wait_for(tmp_path / "gate.entered")
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=20)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        (tmp_path / "gate").touch()
        with pytest.raises(WorkerDiedError, match="worker expert-1 ended with signal 9"):
            next(stream)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
    code, out, err = front.end()
    assert code == 1 and "closed" in out
    assert [line for line in err if "ended with signal 9" in line] == [
        "jmoe serve: WorkerDiedError: worker expert-1 ended with signal 9"
    ]
    assert err[-1].startswith("jmoe serve:") and not any("Traceback" in line for line in err)


def test_a_cell_that_fails_in_a_drain_is_a_failure(served, tmp_path):
    front = served("fail")
    with Client(front.address()) as client:
        stream = client.stream([5])
        wait_for(tmp_path / "gate.entered")
        front.process.send_signal(signal.SIGTERM)
        assert front.line().startswith("draining")
        (tmp_path / "gate").touch()
        with pytest.raises(WorkerDiedError):
            next(stream)
    code, out, err = front.end()
    assert (code, out) == (1, ["closed"])
    assert err[-1] == "jmoe serve: WorkerDiedError: worker expert-1 ended with signal 9"


def test_other_hosts_without_tls_are_warned_about_and_a_taken_port_fails(served):
    front = served("ok", "--host", "0.0.0.0")
    line = front.line()
    assert line.startswith("serving tiny on 0.0.0.0:")
    code, out, err = served("ok", "--port", line.rpartition(":")[2], "--host", "0.0.0.0").end()
    assert (code, out) == (1, []) and err[-1].startswith("jmoe serve: can't listen on 0.0.0.0:")
    front.process.send_signal(signal.SIGINT)
    code, _, err = front.end()
    assert code == 0 and "warning: 0.0.0.0 is not loopback" in err[0]


# ---- progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_on_a_terminal_redraws_in_place():
    stream = Terminal()
    with Progress(stream) as progress:
        progress("compiling")
        progress("weights: 1 of 2 arrays")
        progress("weights: 2 of 2 arrays")
    lines = stream.getvalue().split("\n")
    assert lines[0].startswith("\r\x1b[2Kcompiling ...\r\x1b[2Kcompiling (") and lines[0].endswith(" s)")
    assert "100%" in lines[1] and "weights (" in lines[1] and lines[2:] == [""]


def test_progress_elsewhere_writes_plain_lines():
    stream = io.StringIO()
    with Progress(stream) as progress:
        progress("compiling")
        for done in range(101):
            progress.report(done / 100, "downloading")
        progress.report(None, "unpacking")
    assert stream.getvalue().splitlines() == [
        "compiling", "downloading", "downloading: 0%", "downloading: 25%", "downloading: 50%", "downloading: 75%",
        "downloading: 100%", "unpacking",
    ]  # fmt: skip
