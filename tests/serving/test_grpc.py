"""The gRPC server on a fake cell, over a real socket: statuses, health, cancellation, deadlines, slow readers."""

import asyncio
import contextlib
import pathlib
import shutil
import subprocess
import sys
import threading
import time

import grpc
import pytest
from fake_executor import FakeExecutor, expected_tokens, make_cell
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tiny_tokenizer import CHAT_TEMPLATE, byte_level_backend

from jmoe.serving.completions import Completion
from jmoe.serving.engine_config import EngineConfig
from jmoe.serving.errors import EngineClosedError, JmoeError, QueueFullError, SequenceMismatchError, WorkerDiedError
from jmoe.serving.grpc_client import Client
from jmoe.serving.grpc_config import GrpcConfig
from jmoe.serving.grpc_messages import error_of, params_message, params_of
from jmoe.serving.grpc_server import SERVICE, GrpcServer
from jmoe.serving.output_buffer import OutputBuffer, Wakeups
from jmoe.serving.protos import jmoe_pb2 as pb
from jmoe.serving.protos import jmoe_pb2_grpc
from jmoe.serving.requests import FinishReason, RequestOutput, SamplingParams
from jmoe.serving.server import Server
from jmoe.serving.text.tokenizer import Tokenizer

BACKEND = byte_level_backend()
VOCAB = BACKEND.get_vocab_size()
LONG = SamplingParams(max_tokens=20, ignore_eos=True)
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class Front:
    """A GrpcServer with its loop in a thread."""

    def __init__(self, config):
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.grpc = self.run(self._make(config))
        self.address = f"127.0.0.1:{self.grpc.port}"
        self.channel = grpc.insecure_channel(self.address)
        self.stub = jmoe_pb2_grpc.GenerationStub(self.channel)

    async def _make(self, config):
        front = GrpcServer(config)
        await front.start()
        return front

    def run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(20)

    def health(self, name=""):
        request = health_pb2.HealthCheckRequest(service=name)
        return health_pb2_grpc.HealthStub(self.channel).Check(request, timeout=10).status

    def close(self):
        self.channel.close()
        self.run(self.grpc.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()


@contextlib.contextmanager
def running(executor=None, max_waiting=256, attach=True, template=CHAT_TEMPLATE, **config):
    """A front with a server attached, both closed at the end."""
    executor = executor or FakeExecutor(make_cell(vocab_size=VOCAB))
    tokenizer = Tokenizer(BACKEND, eos_token_ids=[2], chat_template=template)
    engine_config = EngineConfig(check_interval_s=0.01, max_waiting=max_waiting)
    with Server(executor, tokenizer=tokenizer, engine_config=engine_config, name="tiny") as server:
        front = Front(GrpcConfig(port=0, **config))
        front.server, front.executor, front.tokenizer = server, executor, tokenizer
        try:
            if attach:
                front.run(front.grpc.attach(server))
            yield front
        finally:
            if executor.gate is not None:
                executor.gate.set()
            front.close()


def gated():
    return FakeExecutor(make_cell(vocab_size=VOCAB), gate=threading.Event())


def until(condition):
    """Waits, 10 s at most, for something that happens in another thread."""
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "it did not happen within 10 s"
        time.sleep(0.005)


def all_free(front) -> bool:
    return front.server.stats()["used_pages"] == 0 and front.server.stats()["running"] == 0


def test_generate_equals_the_server_in_process():
    chat = [{"role": "user", "content": "fox"}]
    params = SamplingParams(max_tokens=9, temperature=0.7, seed=11, top_p=0.9, logprobs=2, ignore_eos=True)
    with running() as front, Client(front.address) as client:
        for prompt in ("the fox", [5, 6, 7], chat):
            for chosen in (LONG, params):
                ours, theirs = client.generate(prompt, chosen), front.server.generate(prompt, chosen)
                assert (ours.text, ours.token_ids, ours.logprobs) == (theirs.text, theirs.token_ids, theirs.logprobs)
                assert (ours.finish_reason, ours.num_prompt_tokens) == (theirs.finish_reason, theirs.num_prompt_tokens)
        ids = front.tokenizer.encode("the fox")
        assert client.generate("the fox", LONG).token_ids == tuple(expected_tokens(ids, LONG, front.server.cell))


def test_chunks_carry_ids_text_usage_and_reason():
    with running() as front:
        request = pb.GenerateRequest(request_id="mine", text="the fox", sampling=params_message(LONG))
        call = front.stub.Generate(request, timeout=10)
        assert dict(call.initial_metadata())["jmoe-request-id"] == "mine"
        chunks = list(call)
        prompt = front.tokenizer.encode("the fox")
    assert {c.request_id for c in chunks} == {"mine"}
    tokens = [t for c in chunks for t in c.token_ids]
    assert tokens == expected_tokens(prompt, LONG, front.server.cell)
    assert "".join(c.text for c in chunks) == BACKEND.decode(tokens)
    assert [c.finish_reason for c in chunks[:-1]] == [pb.FINISH_REASON_UNSPECIFIED] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == pb.FINISH_REASON_LENGTH
    assert chunks[-1].usage == pb.Usage(prompt_tokens=len(prompt), output_tokens=20)


def test_streams_run_at_once():
    with running() as front, Client(front.address) as client:
        streams = [client.stream([i, 7], LONG) for i in range(5, 13)]
        done = [Completion.of(s) for s in streams]
    assert [d.token_ids for d in done] == [
        tuple(expected_tokens([i, 7], LONG, front.server.cell)) for i in range(5, 13)
    ]


def test_absent_parameters_are_the_defaults():
    assert params_of(pb.SamplingParams()) == SamplingParams()
    every = SamplingParams(
        max_tokens=3, temperature=0.7, top_k=4, top_p=0.95, min_p=0.05, seed=0, repetition_penalty=1.1,
        presence_penalty=-0.3, frequency_penalty=0.2, stop_token_ids=(7, 8), stop=("x", "y"), ignore_eos=True,
        logprobs=0,
    )  # fmt: skip
    assert params_of(params_message(every)) == every


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (pb.GenerateRequest(), "expected text, token_ids or chat, got none"),
        (pb.GenerateRequest(text=""), "at least one token"),
        (pb.GenerateRequest(token_ids=pb.TokenIds()), "at least one token id"),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[VOCAB])), "the vocabulary"),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5] * 64)), "expected 1 to 63 tokens"),
        (pb.GenerateRequest(chat=pb.Chat()), "at least one token id or messages"),
        (pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="nobody")])), "nobody speaks"),
        (pb.GenerateRequest(text="x", sampling=pb.SamplingParams(top_p=float("nan"))), "top_p: expected"),
        (pb.GenerateRequest(text="x", sampling=pb.SamplingParams(max_tokens=0)), "max_tokens: expected"),
        (pb.GenerateRequest(text="x", sampling=pb.SamplingParams(stop=["s"] * 17)), "at most 16 strings"),
        (pb.GenerateRequest(text="x", request_id="ü\n"), "request_id: expected"),
        (pb.GenerateRequest(text="x", request_id="x" * 129), "request_id: expected"),
    ],
)
def test_bad_input_is_invalid_argument_with_a_sentence(request_, sentence):
    with running() as front:
        with pytest.raises(grpc.RpcError, match=sentence) as caught:
            list(front.stub.Generate(request_, timeout=10))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert front.health() == SERVING


def test_client_raises_value_error():
    with running(template=None) as front, Client(front.address) as client:
        with pytest.raises(ValueError, match="expected a checkpoint with a chat template"):
            client.generate([{"role": "user", "content": "fox"}])
        with pytest.raises(ValueError, match="the vocabulary"):
            client.generate([VOCAB])


def test_an_id_in_use_is_refused_and_the_first_request_goes_on():
    with running(gated()) as front, Client(front.address) as client:
        first = client.stream([5], LONG, request_id="mine")
        assert front.executor.entered.wait(10)
        with pytest.raises(ValueError, match="not in use"):
            client.generate([6], LONG, request_id="mine")
        front.executor.gate.set()
        assert Completion.of(first).num_output_tokens == 20


def test_messages_have_a_size_cap():
    with running(max_message_bytes=1000) as front:
        with pytest.raises(grpc.RpcError) as caught:
            list(front.stub.Generate(pb.GenerateRequest(text="x" * 1001), timeout=10))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_full_inbox_is_resource_exhausted():
    with running(gated(), max_waiting=1) as front, Client(front.address) as client:
        first = client.stream([5], LONG)
        assert front.executor.entered.wait(10)  # it is out of the inbox
        second = client.stream([6], LONG)
        until(lambda: front.server.stats()["waiting"] == 1)
        with pytest.raises(QueueFullError, match="max_waiting 1"):
            client.generate([7], LONG)
        with pytest.raises(grpc.RpcError) as caught:
            list(front.stub.Generate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=[7])), timeout=10))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        front.executor.gate.set()
        assert [Completion.of(s).num_output_tokens for s in (first, second)] == [20, 20]


@pytest.mark.parametrize("how", ["cancel", "deadline", "connection"])
def test_a_call_that_ends_early_frees_its_pages(how):
    with running(gated()) as front, Client(front.address) as client:
        stream = client.stream([5], LONG, timeout_s=0.3 if how == "deadline" else 20)
        assert front.executor.entered.wait(10)
        if how == "cancel":
            stream.close()
            assert list(stream) == []
        elif how == "connection":
            client.close()
        else:
            with pytest.raises(TimeoutError):
                next(stream)
        # The gate is still shut: the abort must come from the call's end, not from the request's.
        until(lambda: front.server._engine._inbox)
        front.executor.gate.set()
        until(lambda: all_free(front))
        assert front.server.stats()["requests_abort"] == 1


def test_abort_by_another_call():
    with running(gated()) as front, Client(front.address) as client:
        stream = client.stream([5], LONG, request_id="mine")
        assert front.executor.entered.wait(10)
        client.abort("mine")
        client.abort("unknown")
        front.executor.gate.set()
        assert Completion.of(stream).finish_reason is FinishReason.ABORT


@pytest.mark.parametrize("error", [WorkerDiedError("worker 1 was killed"), SequenceMismatchError("expected 4, got 5")])
def test_a_failed_cell_is_unavailable_with_the_errors_name(error):
    executor = FakeExecutor(make_cell(vocab_size=VOCAB), fail_at=2, error=error)
    with running(executor) as front, Client(front.address) as client:
        assert front.health() == SERVING
        with pytest.raises(type(error), match=str(error)):
            client.generate([5], LONG)
        with pytest.raises(type(error), match=str(error)):
            client.generate([6], LONG)
        with pytest.raises(grpc.RpcError) as caught:
            front.stub.GetStats(pb.GetStatsRequest(), timeout=10)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert caught.value.details() == f"{type(error).__name__}: {error}"
        until(front.grpc.failed.is_set)
        assert front.grpc.failure is front.server.failure
        assert [front.health(name) for name in ("", SERVICE)] == [NOT_SERVING] * 2


def test_no_token_of_the_failed_step_is_sent():
    executor = FakeExecutor(make_cell(vocab_size=VOCAB), fail_at=2, error=WorkerDiedError("gone"))
    with running(executor) as front, Client(front.address) as client:
        tokens = []
        with pytest.raises(WorkerDiedError):
            for output in client.stream([5], LONG):
                tokens += output.token_ids
        whole = expected_tokens([5], LONG, front.server.cell)
    assert tokens == whole[: len(tokens)] and len(tokens) <= 1 + executor.cell.num_steps


def test_a_request_that_fails_alone_is_internal_and_others_go_on():
    with running() as front, Client(front.address) as client:
        plain = front.server._engine.tokenizer.detokenizer

        def broken():
            pieces = plain()
            pieces.push = lambda ids: 1 // 0
            return pieces

        front.server._engine.tokenizer.detokenizer = broken
        with pytest.raises(JmoeError, match="ZeroDivisionError"):
            client.generate([5], LONG)
        with pytest.raises(grpc.RpcError) as caught:
            list(front.stub.Generate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5])), timeout=10))
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        del front.server._engine.tokenizer.detokenizer
        assert client.generate([5], LONG).num_output_tokens == 20 and front.health() == SERVING


def test_loading_then_serving_then_draining():
    with running(gated(), attach=False) as front, Client(front.address) as client:
        assert front.health() == NOT_SERVING
        with pytest.raises(EngineClosedError, match="the server is loading"):
            client.generate([5])
        front.run(front.grpc.attach(front.server))
        assert [front.health(name) for name in ("", SERVICE)] == [SERVING] * 2
        stream = client.stream([5], LONG)
        assert front.executor.entered.wait(10)
        drained = asyncio.run_coroutine_threadsafe(front.grpc.drain(), front.loop)
        until(lambda: front.health() == NOT_SERVING)
        with pytest.raises(EngineClosedError, match="the server is draining"):
            client.generate([6])
        assert client.model_info().name == "tiny"
        front.executor.gate.set()
        assert Completion.of(stream).num_output_tokens == 20  # the running request went to its end
        assert drained.result(10) is True
        with pytest.raises(ConnectionError):
            client.generate([7])


def test_a_drain_has_a_bound():
    with running(gated(), grace_s=0.1) as front, Client(front.address) as client:
        stream = client.stream([5], LONG)
        assert front.executor.entered.wait(10)
        drained = asyncio.run_coroutine_threadsafe(front.grpc.drain(), front.loop)
        assert drained.result(10) is False
        with pytest.raises((JmoeError, ConnectionError)):
            Completion.of(stream)


def talkative(front):
    """Makes every output 20 kB long, and a millisecond apart; returns a call for 1000 of them, 20 MB."""
    plain = front.server._engine.tokenizer.detokenizer

    def detokenizer():
        pieces = plain()
        pieces.push = lambda ids: time.sleep(0.001) or "x" * 20_000 * len(ids)
        return pieces

    front.server._engine.tokenizer.detokenizer = detokenizer
    params = SamplingParams(max_tokens=1000, ignore_eos=True)
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5]), sampling=params_message(params))
    return front.stub.Generate(request, timeout=30)


def long_cell():
    return FakeExecutor(make_cell(vocab_size=VOCAB, max_len=1024, num_pages=1025, num_steps=1))


@pytest.mark.parametrize(
    "bound", [{"max_buffered_outputs": 64}, {"write_timeout_s": 0.2, "max_buffered_outputs": 10**6}]
)
def test_a_client_that_does_not_read_is_aborted(bound):
    """Once the connection's window is full, the buffer's bound is met (or one write's), and the request ends."""
    with running(long_cell(), **bound) as front:
        call = talkative(front)
        until(lambda: front.server.stats().get("requests_abort") == 1)
        until(lambda: all_free(front))
        with pytest.raises(grpc.RpcError, match="reads too slowly") as caught:
            list(call)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_client_that_reads_gets_all_of_a_long_answer():
    with running(long_cell()) as front:
        assert sum(len(chunk.text) for chunk in talkative(front)) == 20_000 * 1000


def test_many_outputs_of_another_thread_wake_the_loop_once_and_none_is_lost():
    async def main():
        loop = asyncio.get_running_loop()
        real, calls = loop.call_soon_threadsafe, []
        loop.call_soon_threadsafe = lambda *args: (calls.append(1), real(*args))[1]
        wakeups = Wakeups(loop)
        buffers = [OutputBuffer(wakeups, 99, lambda: None) for _ in range(50)]
        for number in range(3):  # while the loop does not run, as when the engine has Python's lock
            for buffer in buffers:
                buffer.put(RequestOutput("a", (number,)))
        woken = len(calls)
        assert [len(await buffer.take(10)) for buffer in buffers] == [3] * 50

        def put_all():
            for number in range(500):
                buffers[number % 50].put(RequestOutput("a", (number,)))

        thread = threading.Thread(target=put_all)
        thread.start()
        counts = [0] * 50
        for index in [*range(50)] * 10:  # each buffer gets ten, in whatever portions
            while counts[index] < 10:
                counts[index] += len(await buffers[index].take(10))
        thread.join()
        return woken, counts

    assert asyncio.run(main()) == (1, [10] * 50)


def test_output_buffer_keeps_its_bound_and_the_last_output():
    async def fill():
        aborted = []
        buffer = OutputBuffer(Wakeups(asyncio.get_running_loop()), 2, lambda: aborted.append(1))
        last = RequestOutput("a", finish_reason=FinishReason.STOP)
        for output in (RequestOutput("a"), RequestOutput("a"), last):
            buffer.put(output)
        assert not aborted and len(await buffer.take(1)) == 3
        with pytest.raises(TimeoutError):
            await buffer.take(0.01)
        for _ in range(4):
            buffer.put(RequestOutput("a"))
        assert aborted == [1] and buffer.overflowed
        assert await buffer.take(1) == []

    asyncio.run(fill())


def test_silence_has_a_bound():
    with running(gated(), max_silence_s=0.1) as front, Client(front.address) as client:
        with pytest.raises(TimeoutError, match=r"no output within 0.1 s"):
            client.generate([5], LONG)
        front.executor.gate.set()
        until(lambda: all_free(front))


def test_reflection_and_model_info():
    with running() as front, Client(front.address) as client:
        stub = reflection_pb2_grpc.ServerReflectionStub(front.channel)
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        reply = next(stub.ServerReflectionInfo(iter([asked]), timeout=10))
        names = {s.name for s in reply.list_services_response.service}
        info = client.model_info()
    assert {"jmoe.v1.Generation", "grpc.health.v1.Health"} <= names
    assert (info.name, info.family, info.max_len, info.num_slots) == ("tiny", "mixtral", 64, 4)
    assert info.has_tokenizer and info.has_chat_template and list(info.eos_token_ids) == [3]


def test_stats():
    with running() as front, Client(front.address) as client:
        client.generate([5], LONG)
        until(lambda: all_free(front))
        stats = client.stats()
    assert (stats["requests_length"], stats["output_tokens"], stats["running"]) == (1, 20, 0)
    assert stats["first_token_s_p50"] > 0


def test_config():
    assert GrpcConfig().warning is None and GrpcConfig(host="localhost").warning is None
    assert GrpcConfig(host="::1").address == "[::1]:50051" and GrpcConfig(host="::1").warning is None
    assert "0.0.0.0 is not loopback" in (GrpcConfig(host="0.0.0.0").warning or "")
    assert GrpcConfig(host="0.0.0.0", tls_cert="c", tls_key="k").warning is None
    for wrong in ({"port": 70000}, {"tls_cert": "c"}, {"max_calls": 0}, {"grace_s": -1}, {"write_timeout_s": 0}):
        with pytest.raises(ValueError, match="expected"):
            GrpcConfig(**wrong)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_tls(tmp_path):
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "1", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*command, "-keyout", key, "-out", cert], check=True, timeout=60, capture_output=True)
    with running(tls_cert=str(cert), tls_key=str(key)) as front:
        with Client(front.address, tls_ca=cert) as client:
            assert client.generate([5], LONG).num_output_tokens == 20
        with Client(front.address) as client, pytest.raises(ConnectionError):
            client.generate([5], LONG)


def test_a_port_in_use_is_an_error():
    with running() as front, pytest.raises(OSError, match=r"can't listen on 127\.0\.0\.1"):
        Front(GrpcConfig(port=front.grpc.port))


def test_details_name_an_error_or_none():
    assert (
        isinstance(error_of("WorkerDiedError: x: y"), WorkerDiedError)
        and str(error_of("WorkerDiedError: x: y")) == "x: y"
    )
    assert (
        error_of("RuntimeError: x") is None and error_of("failed to connect") is None and error_of("__doc__: x") is None
    )


def test_generated_files_are_those_of_the_proto(tmp_path):
    pytest.importorskip("grpc_tools", reason="needs grpcio-tools (the dev extra)")
    root = pathlib.Path(__file__).parents[2]
    out = tmp_path / "jmoe.bin"
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", f"--descriptor_set_out={out}"]
    subprocess.run([*command, "jmoe/serving/protos/jmoe.proto"], cwd=root, check=True, timeout=60)
    compiled = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file[0]
    for message in compiled.message_type:
        clear_json_names(message)
    committed = descriptor_pb2.FileDescriptorProto()
    pb.DESCRIPTOR.CopyToProto(committed)
    assert committed == compiled


def clear_json_names(message):
    """A descriptor set spells out names that the Python files leave to their default."""
    for field in message.field:
        field.ClearField("json_name")
    for nested in message.nested_type:
        clear_json_names(nested)
