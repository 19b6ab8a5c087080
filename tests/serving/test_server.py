"""serve() and Server on a fake cell: completions, streams, bounds, typed errors, and what is closed when."""

import json
import sys
import threading
import types

import pytest
from fake_executor import FakeExecutor, expected_tokens, make_cell
from tiny_tokenizer import CHAT_TEMPLATE, byte_level_backend

import jmoe
from jmoe.serving.engine_config import EngineConfig
from jmoe.serving.errors import EngineClosedError, QueueFullError, WorkerDiedError
from jmoe.serving.metrics import Metrics
from jmoe.serving.process_options import ProcessOptions
from jmoe.serving.requests import FinishReason, RequestOutput, SamplingParams
from jmoe.serving.server import Server
from jmoe.serving.sizes import CellSizes
from jmoe.serving.text.tokenizer import Tokenizer
from jmoe.sharding.mesh_config import MeshConfig

BACKEND = byte_level_backend()
VOCAB = BACKEND.get_vocab_size()
LONG = SamplingParams(max_tokens=20, ignore_eos=True)


def make_tokenizer() -> Tokenizer:
    return Tokenizer(BACKEND, eos_token_ids=[2], chat_template=CHAT_TEMPLATE)


def make_server(executor=None, **config) -> Server:
    executor = executor or FakeExecutor(make_cell(vocab_size=VOCAB))
    return Server(executor, tokenizer=make_tokenizer(), engine_config=EngineConfig(check_interval_s=0.01, **config))


def test_generate_one_text():
    with make_server() as server:
        done = server.generate("the fox", LONG)
    prompt = make_tokenizer().encode("the fox")
    assert done.token_ids == tuple(expected_tokens(prompt, LONG, server.cell))
    assert done.text == BACKEND.decode(list(done.token_ids))
    assert (done.finish_reason, done.num_prompt_tokens, done.num_output_tokens) == (
        FinishReason.LENGTH,
        len(prompt),
        20,
    )


def test_generate_takes_ids_messages_and_sequences_of_them():
    chat = [{"role": "user", "content": "fox"}]
    prompts = ["the fox", [5, 6, 7], chat]
    with make_server() as server:
        done = server.generate(prompts, LONG)
        assert server.generate(chat, LONG).token_ids == done[2].token_ids
        assert server.generate((5, 6, 7), LONG).token_ids == done[1].token_ids
        assert server.generate([], LONG) == []
    tokenizer = make_tokenizer()
    ids = [tokenizer.encode("the fox"), [5, 6, 7], tokenizer.encode_chat(chat)]
    assert [d.token_ids for d in done] == [tuple(expected_tokens(i, LONG, server.cell)) for i in ids]


def test_generate_more_prompts_than_the_queue_holds():
    prompts = [[i, i + 1] for i in range(5, 30)]
    with make_server(max_waiting=3) as server:
        done = server.generate(prompts, LONG)
        assert server.stats()["requests_refused"] > 0  # it did run into the bound
    assert [d.token_ids for d in done] == [tuple(expected_tokens(p, LONG, server.cell)) for p in prompts]


def test_params_for_each_prompt_and_logprobs():
    each = [SamplingParams(max_tokens=2, logprobs=3, ignore_eos=True), SamplingParams(max_tokens=5, ignore_eos=True)]
    with make_server() as server:
        one, two = server.generate([[5], [6]], each)
        with pytest.raises(ValueError, match="one for each of 2 prompts, got 1"):
            server.generate([[5], [6]], each[:1])
        with pytest.raises(ValueError, match="expected SamplingParams for one prompt, got list"):
            server.generate([5], each)
    assert [lp.token_id for lp in one.logprobs] == list(one.token_ids) and len(one.logprobs[0].top_ids) == 3
    assert two.logprobs is None and two.num_output_tokens == 5


def test_stream_gives_pieces_and_its_id():
    with make_server() as server:
        stream = server.stream("the fox", LONG, request_id="mine")
        assert stream.request_id == "mine"
        outputs = list(stream)
    assert len(outputs) > 2 and [o.finish_reason is None for o in outputs] == [True] * (len(outputs) - 1) + [False]
    prompt = make_tokenizer().encode("the fox")
    assert [t for o in outputs for t in o.token_ids] == expected_tokens(prompt, LONG, server.cell)


def held_server(**config):
    """A server whose executor waits in its first call until the gate opens."""
    executor = FakeExecutor(make_cell(vocab_size=VOCAB), gate=threading.Event())
    return make_server(executor, **config), executor


def test_leaving_a_stream_early_frees_its_pages():
    server, executor = held_server()
    with server:
        with server.stream([5, 6], LONG) as stream:
            assert executor.entered.wait(10)
        executor.gate.set()
        with pytest.raises(StopIteration):
            next(stream)
        assert server.drain(10)
    assert server.stats()["used_pages"] == 0 and server.stats()["requests_abort"] == 1


def test_abort_ends_the_stream_with_abort():
    server, executor = held_server()
    with server:
        stream = server.stream([5, 6], LONG)
        assert executor.entered.wait(10)
        server.abort(stream.request_id)
        server.abort("nobody")
        executor.gate.set()
        assert [o.finish_reason for o in stream][-1] is FinishReason.ABORT


def test_waits_have_a_bound_and_abort():
    server, executor = held_server()
    with server:
        stream = server.stream([5, 6], LONG, timeout_s=0.05)
        with pytest.raises(TimeoutError, match=r"no output within 0.1 s|no output within 0.0 s"):
            next(stream)
        with pytest.raises(TimeoutError):
            server.generate([5], LONG, timeout_s=0.05)
        executor.gate.set()
        assert server.drain(10)
        assert server.stats()["requests_abort"] == 2


def test_a_full_queue_is_an_error_where_none_of_ours_runs():
    server, executor = held_server(max_waiting=1)
    with server:
        streams = [server.stream([5], LONG)]
        assert executor.entered.wait(10)
        streams.append(server.stream([6], LONG))
        with pytest.raises(QueueFullError):
            server.generate([7], LONG)
        executor.gate.set()
        assert all(list(s)[-1].finish_reason is FinishReason.LENGTH for s in streams)


def test_cell_failure_is_raised_with_its_type_and_reported_once():
    executor = FakeExecutor(make_cell(vocab_size=VOCAB), fail_at=2, error=WorkerDiedError("worker 1 was killed"))
    heard = []
    with make_server(executor) as server:
        server.on_failure(heard.append)
        with pytest.raises(WorkerDiedError, match="worker 1 was killed"):
            server.generate(["the fox", "dog"], LONG)
        with pytest.raises(WorkerDiedError, match="worker 1 was killed"):
            server.generate("the fox", LONG)
        late = []
        server.on_failure(late.append)
    assert heard == late == [server.failure] and isinstance(server.failure, WorkerDiedError)
    assert executor.closed


def test_a_failure_while_a_stream_waits_is_raised_there():
    executor = FakeExecutor(
        make_cell(vocab_size=VOCAB), fail_at=0, error=WorkerDiedError("worker 1 was killed"), gate=threading.Event()
    )
    with make_server(executor) as server:
        streams = [server.stream([5], LONG), server.stream([6], LONG)]
        executor.gate.set()
        for stream in streams:
            with pytest.raises(WorkerDiedError, match="worker 1 was killed"):
                next(stream)
            assert stream.finished and list(stream) == []


def test_closed_server_takes_nothing_and_closes_its_executor():
    server = make_server()
    server.close()
    server.close()
    assert server._executor.closed
    with pytest.raises(EngineClosedError):
        server.generate("the fox")


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ("", "at least one token"),
        ([[]], "prompt: expected text, at least one token id"),
        ({"role": "user"}, "got a dict"),
        (7, "got a int"),
        ([VOCAB], "the vocabulary"),
        ([5] * 64, "expected 1 to 63 tokens"),
        ("fox 7 " * 30, "expected 1 to 63 tokens"),
        ("x" * 10_000, "expected at most 64 tokens, got 10000 characters"),
        ([{"role": "user", "content": "x" * 10_000}], "expected at most 64 tokens, got 100"),
        ([{"role": "nobody", "content": ""}], "nobody speaks"),
        ([5, "x"], "expected integers"),
    ],
)
def test_bad_prompts(prompt, sentence):
    with make_server() as server, pytest.raises(ValueError, match=sentence):
        server.generate(prompt)


def test_without_a_tokenizer_only_ids():
    with Server(FakeExecutor(make_cell())) as server:
        assert server.generate([5], LONG).text == ""
        with pytest.raises(ValueError, match="came without a tokenizer"):
            server.generate("the fox")


# ---- serve()


@pytest.fixture
def checkpoint(tmp_path):
    """A Mixtral checkpoint folder without weights."""
    config = {
        "model_type": "mixtral", "vocab_size": VOCAB, "hidden_size": 8, "num_hidden_layers": 1, "eos_token_id": 3,
        "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2,
        "intermediate_size": 8, "max_position_embeddings": 100, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    BACKEND.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.fixture
def created(monkeypatch):
    """Fake executors in place of real ones; the list of what was asked for."""
    calls = []

    def create_executor(model, cell, kind, progress, programs, processes, compile_cache):
        executor = FakeExecutor(cell)
        calls.append((model, cell, kind, executor, programs, processes, compile_cache))
        progress("starting")
        return executor

    module = types.SimpleNamespace(create_executor=create_executor)
    monkeypatch.setitem(sys.modules, "jmoe.serving.executors.create", module)
    return calls


def test_serve_resolves_everything(checkpoint, created):
    lines = []
    with jmoe.serve(checkpoint, MeshConfig(2, 2, 3), executor="inline", progress=lines.append) as server:
        assert server.generate([5], SamplingParams(max_tokens=3, ignore_eos=True)).num_output_tokens == 3
        assert server.name == checkpoint.name
    model, cell, kind, executor, programs, processes, compile_cache = created[0]
    assert (model, kind) == (checkpoint, "inline")
    assert cell.mesh == MeshConfig(2, 2, 3).resolve(4)
    assert (cell.rows, cell.max_len, cell.page_len, cell.num_pages) == (4, 100, 16, 3 * 4 * 7 + 1)
    assert cell.model.eos_token_ids == (3, 2)  # config.json's and the tokenizer's
    assert [(k.kind, k.sampling) for k in programs] == [("prefill", False), ("decode", False)]
    assert executor.closed and "starting" in lines and processes is None
    assert compile_cache == "auto"


def test_serve_takes_sizes_by_name(checkpoint, created):
    options = {"rows": 2, "max_len": 32, "num_pages": 5, "dtype": "float32", "programs": "all"}
    workers = ProcessOptions(per="device")
    with jmoe.serve(checkpoint, processes=workers, **options) as server:
        assert created[0][5] is workers
        assert (server.cell.rows, server.cell.max_len, server.cell.num_pages) == (2, 32, 5)
        assert server.cell.model.dtype == "float32" and len(created[0][4]) == 4
    with pytest.raises(ValueError, match="either sizes= or single ones"):
        jmoe.serve(checkpoint, sizes=CellSizes(), rows=2)
    with pytest.raises(ValueError, match="at most 100"):
        jmoe.serve(checkpoint, max_len=101)
    with pytest.raises(ValueError, match="rows: expected at least 1, got 0"):
        jmoe.serve(checkpoint, rows=0)
    with pytest.raises(ValueError, match="programs"):
        jmoe.serve(checkpoint, programs="some")


def test_serve_takes_a_chunk_budget_and_a_compile_cache(checkpoint, created):
    with jmoe.serve(checkpoint, chunk_len=8, max_prefill_tokens=50, compile_cache="off") as server:
        assert server._engine.scheduler._max_prefill_streak == 3  # of 16 tokens each: two micro-batches
    assert created[0][6] == "off"
    with pytest.raises(ValueError, match="max_prefill_tokens: expected more than 0, got 0"):
        jmoe.serve(checkpoint, max_prefill_tokens=0)


def test_serve_closes_the_executor_when_the_engine_refuses(checkpoint, created):
    with pytest.raises(ValueError, match="max_waiting"):
        jmoe.serve(checkpoint, max_waiting=0)
    assert created[0][3].closed


def test_serve_without_a_checkpoint(tmp_path, created):
    with pytest.raises(FileNotFoundError, match=r"config.json"):
        jmoe.serve(tmp_path / "nothing")
    assert created == []


def test_metrics_count_and_time():
    now = [0.0]
    metrics = Metrics(lambda: now[0])
    seen = []
    watched = metrics.watch(seen.append)
    now[0] = 2.0
    watched(RequestOutput("a", token_ids=(1,), num_prompt_tokens=7, num_output_tokens=1))
    now[0] = 5.0
    last = RequestOutput(
        "a", token_ids=(2, 3, 4), num_prompt_tokens=7, num_output_tokens=4, finish_reason=FinishReason.STOP
    )
    watched(last)
    values = metrics.snapshot()
    assert len(seen) == 2
    assert {k: values[k] for k in ("output_tokens", "prompt_tokens", "requests_stop")} == {
        "output_tokens": 4, "prompt_tokens": 7, "requests_stop": 1,
    }  # fmt: skip
    assert (values["first_token_s_p50"], values["token_s_p95"], values["request_s_p50"]) == (2.0, 1.0, 5.0)
