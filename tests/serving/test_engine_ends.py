"""Aborts, broken clients, failed cells, close and drain: every request ends exactly once, and nothing hangs."""

import threading

import pytest
from engine_client import GREEDY, Client, Letters, finish, prompt_of
from fake_executor import FakeExecutor, expected_tokens, make_cell

from jmoe.serving.engine import Engine, EngineConfig
from jmoe.serving.errors import CellFailedError, EngineClosedError, JmoeError, StepTimeoutError, WorkerDiedError
from jmoe.serving.requests import FinishReason, SamplingParams


@pytest.fixture
def start_engine():
    """Makes engines with a running thread, and sees to it that none is left."""
    engines = []

    def start(executor, config=None, on_failure=None):
        engines.append(Engine(executor, config, on_failure=on_failure))
        engines[-1].start()
        return engines[-1]

    yield start
    for engine in engines:
        if engine.executor.gate is not None:
            engine.executor.gate.set()
        engine.close()
        assert not engine._thread.is_alive()


# ---- aborts and broken clients


def test_abort_in_the_middle_of_a_call_drops_its_tokens_and_frees_the_pages(start_engine):
    gate = threading.Event()
    engine = start_engine(FakeExecutor(make_cell(), gate=gate))
    gone, stays = Client(), Client()
    engine.submit(prompt_of(5), GREEDY, gone, "gone")
    assert engine.executor.entered.wait(10)
    engine.submit(prompt_of(6), GREEDY, stays, "stays")
    assert engine.abort("gone") and not gone.outputs
    gate.set()
    assert gone.done.wait(10) and stays.done.wait(10)
    assert gone.tokens == [] and gone.last.finish_reason is FinishReason.ABORT and gone.last.error is None
    assert stays.tokens == expected_tokens(prompt_of(6), GREEDY, engine.cell)
    assert stays.threads == gone.threads == {engine._thread}
    assert engine.drain(10) and engine.stats()["used_pages"] == 0
    assert not engine.abort("gone") and not engine.abort("never heard of")


def test_abort_of_a_waiting_request_and_abort_twice():
    engine = Engine(FakeExecutor(make_cell(micro_batches=1, rows=1)))
    clients = {name: Client() for name in "abc"}
    for name, client in clients.items():
        engine.submit([5], GREEDY, client, name)
    engine.step()
    assert engine.abort("b") and engine.abort("b") and engine.abort("c")
    finish(engine)
    assert clients["a"].tokens == expected_tokens([5], GREEDY, engine.cell)
    assert [len(clients[name].outputs) for name in "bc"] == [1, 1]
    assert {clients[name].last.finish_reason for name in "bc"} == {FinishReason.ABORT}
    assert not engine.scheduler.waiting and engine.stats()["used_pages"] == 0


def test_an_abort_does_not_hit_a_later_request_of_the_same_id():
    engine = Engine(FakeExecutor(make_cell()))
    first, second = Client(), Client()
    engine.submit([5], GREEDY, first, "same")
    assert engine.abort("same")
    engine.step()
    engine.submit([6], GREEDY, second, "same")
    finish(engine)
    assert first.last.finish_reason is FinishReason.ABORT
    assert second.tokens == expected_tokens([6], GREEDY, engine.cell)


def test_a_client_that_raises_loses_its_request_and_nothing_else():
    def broken(output):
        raise KeyError("a bug in the client")

    engine, fine = Engine(FakeExecutor(make_cell())), Client()
    engine.submit([5], GREEDY, broken, "broken")
    engine.submit([6], GREEDY, fine)
    finish(engine)
    assert fine.tokens == expected_tokens([6], GREEDY, engine.cell)
    stats = engine.stats()
    assert stats["callback_errors"] == 1 and stats["used_pages"] == 0 and not engine.abort("broken")
    # The second call was in flight when the client raised.
    assert [rows for _, rows in engine.executor.calls] == [2, 2, 1, 1, 1, 1]


def test_text_that_can_not_be_made_ends_one_request_with_an_error():
    class Broken(Letters):
        def detokenizer(self):
            detokenizer = super().detokenizer()
            if not engine._streams:
                detokenizer.push = lambda ids: 1 / 0
            return detokenizer

    engine = Engine(FakeExecutor(make_cell()), tokenizer=Broken())
    bad, fine = Client(), Client()
    engine.submit([5], GREEDY, bad)
    engine.submit([6], GREEDY, fine)
    finish(engine)
    assert bad.last.finish_reason is FinishReason.ERROR and isinstance(bad.last.error, JmoeError)
    assert "division" in str(bad.last.error) and bad.tokens == []
    assert fine.tokens == expected_tokens([6], GREEDY, engine.cell) and engine.failure is None


def test_a_callback_may_submit_abort_and_close(start_engine):
    engine = start_engine(FakeExecutor(make_cell(max_len=1000, num_pages=300)))
    child = Client(then=lambda output: engine.close())

    def spawn(output):
        if output.finish_reason is None and "parent" in engine._streams and "child" not in engine._streams:
            engine.submit([7], SamplingParams(max_tokens=900, ignore_eos=True), child, "child")
            engine.abort("parent")

    parent = Client(then=spawn)
    engine.submit([5], SamplingParams(max_tokens=900, ignore_eos=True), parent, "parent")
    assert parent.done.wait(10) and child.done.wait(10)
    assert parent.last.finish_reason is FinishReason.ABORT
    assert child.last.finish_reason is FinishReason.ERROR and isinstance(child.last.error, EngineClosedError)


# ---- failures


@pytest.mark.parametrize("fail_at", [0, 1, 3])
@pytest.mark.parametrize("error", [WorkerDiedError("worker 3 died"), OSError("no such device")])
def test_a_failed_call_ends_every_request_with_a_typed_error(start_engine, error, fail_at):
    heard, clients = [], [Client() for _ in range(7)]

    def on_failure(failure):
        heard.append((failure, [client.done.is_set() for client in clients]))

    gate = threading.Event()
    cell = make_cell(micro_batches=1, rows=2)
    engine = start_engine(FakeExecutor(cell, fail_at, error, gate), on_failure=on_failure)
    prompts = [prompt_of(5 + i, i) for i in range(7)]
    for prompt, client in zip(prompts, clients, strict=True):
        engine.submit(prompt, SamplingParams(max_tokens=30, ignore_eos=True), client)
    gate.set()
    assert all(client.done.wait(10) for client in clients)
    failure = engine.failure
    assert isinstance(failure, CellFailedError) and str(error) in str(failure)
    assert failure is error or (type(failure) is CellFailedError and failure.__cause__ is error)
    assert heard == [(failure, [False] * 7)]
    for prompt, client in zip(prompts, clients, strict=True):
        assert client.last.finish_reason is FinishReason.ERROR and client.last.error is failure
        want = expected_tokens(prompt, SamplingParams(max_tokens=30, ignore_eos=True), cell)
        assert client.tokens == want[: len(client.tokens)]
    # Calls go p d p d: what the calls before the failed one made was handed out, and nothing of that one.
    assert sum(len(client.tokens) for client in clients) == {0: 0, 1: 1, 3: 1 + 4 + 1}[fail_at]
    with pytest.raises(CellFailedError, match=str(error)) as refused:
        engine.submit([1], GREEDY, Client())
    assert type(refused.value) is type(failure) and refused.value.__cause__ is failure
    assert not engine.drain(1)
    engine.close()
    assert engine.failure is failure and len(heard) == 1


def test_an_idle_engine_hears_of_a_dead_cell(start_engine):
    failed = threading.Event()
    engine = start_engine(
        FakeExecutor(make_cell()), EngineConfig(check_interval_s=0.01), on_failure=lambda failure: failed.set()
    )
    client = Client()
    engine.submit([5], GREEDY, client)
    assert client.done.wait(10) and engine.failure is None
    engine.executor.check_error = WorkerDiedError("worker 0 died")
    assert failed.wait(10)
    assert isinstance(engine.failure, WorkerDiedError) and engine.executor.num_checks >= 1


def test_tokens_that_no_program_can_have_made_fail_the_cell(start_engine):
    executor = FakeExecutor(make_cell())
    real = executor.run

    def run_and_lie(key, inputs):
        outputs = real(key, inputs)
        if key.kind == "decode":
            outputs.tokens[0] = -1
        return outputs

    executor.run = run_and_lie
    engine, client = start_engine(executor), Client()
    engine.submit([5], SamplingParams(ignore_eos=True), client)
    assert client.done.wait(10)
    assert isinstance(client.last.error, CellFailedError) and len(client.tokens) == 1


def test_dropped_rows_are_counted_and_reported(caplog):
    executor = FakeExecutor(make_cell())
    real = executor.run

    def run_and_drop(key, inputs):
        outputs = real(key, inputs)
        object.__setattr__(outputs, "dropped_rows", 3)
        return outputs

    executor.run = run_and_drop
    engine = Engine(executor)
    engine.submit([5], SamplingParams(max_tokens=5, ignore_eos=True), Client())
    finish(engine)
    assert engine.stats()["dropped_rows"] == 6 and "3 rows found no room" in caplog.text


# ---- the end


def test_close_ends_running_and_waiting_requests_and_refuses_new_ones(start_engine):
    gate = threading.Event()
    engine = start_engine(FakeExecutor(make_cell(micro_batches=1, rows=1), gate=gate))
    clients = [Client() for _ in range(3)]
    for client in clients:
        engine.submit(prompt_of(5), GREEDY, client)
    assert engine.executor.entered.wait(10)
    threading.Timer(0.05, gate.set).start()
    engine.close()
    for client in clients:
        assert client.last.finish_reason is FinishReason.ERROR and isinstance(client.last.error, EngineClosedError)
    with pytest.raises(EngineClosedError, match="closed"):
        engine.submit([1], GREEDY, Client())
    engine.close()
    assert engine.failure is None and not engine.drain(0.1)


def test_close_does_not_wait_for_ever_for_a_call_that_hangs(start_engine):
    gate = threading.Event()
    heard = []
    executor = FakeExecutor(make_cell(), 0, WorkerDiedError("killed at last"), gate)
    engine = start_engine(executor, EngineConfig(close_timeout_s=0.05), heard.append)
    client = Client()
    engine.submit([5], GREEDY, client)
    assert engine.executor.entered.wait(10)
    engine.close()
    assert isinstance(client.last.error, StepTimeoutError) and isinstance(engine.failure, StepTimeoutError)
    gate.set()
    engine._thread.join(10)
    assert len(client.outputs) == 1 and heard == [engine.failure] and "took over 0.05 s" in str(engine.failure)


def test_close_before_start_ends_what_waits():
    engine, client = Engine(FakeExecutor(make_cell())), Client()
    engine.submit([5], GREEDY, client)
    engine.close()
    assert isinstance(client.last.error, EngineClosedError)


def test_drain_waits_for_live_requests_and_takes_no_new_ones(start_engine):
    gate = threading.Event()
    engine = start_engine(FakeExecutor(make_cell(), gate=gate))
    clients = [Client() for _ in range(9)]
    for i, client in enumerate(clients):
        engine.submit(prompt_of(5, i), GREEDY, client)
    assert not engine.drain(0.01)
    with pytest.raises(EngineClosedError, match="draining"):
        engine.submit([1], GREEDY, Client())
    gate.set()
    assert engine.drain(10)
    for i, client in enumerate(clients):
        assert client.tokens == expected_tokens(prompt_of(5, i), GREEDY, engine.cell) and client.done.is_set()


def test_many_threads_at_once(start_engine):
    cell = make_cell(attention=2, micro_batches=2, rows=2, num_pages=20)
    engine = start_engine(FakeExecutor(cell), EngineConfig(max_waiting=1000))
    clients = [[Client() for _ in range(12)] for _ in range(6)]

    def submit(worker):
        for i, client in enumerate(clients[worker]):
            name = engine.submit(prompt_of(1 + 3 * i, worker), GREEDY, client)
            if i % 3 == 0:
                engine.abort(name)

    threads = [threading.Thread(target=submit, args=(worker,)) for worker in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert engine.drain(30) and engine.failure is None
    engine.scheduler.check_integrity()
    assert engine.stats()["used_pages"] == 0 and engine.stats()["running"] == 0
    for worker in range(6):
        for i, client in enumerate(clients[worker]):
            want = expected_tokens(prompt_of(1 + 3 * i, worker), GREEDY, cell)
            if client.last.finish_reason is FinishReason.ABORT:
                assert i % 3 == 0 and client.tokens == want[: len(client.tokens)]
            else:
                assert client.tokens == want
