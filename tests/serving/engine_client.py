"""What engine tests share: a client that collects outputs, a tokenizer of letters, engines run to their end."""

import random
import threading

from fake_executor import FakeExecutor

from jmoe.serving.engine import Engine, EngineConfig
from jmoe.serving.requests import SamplingParams

GREEDY = SamplingParams(max_tokens=20)


class Client:
    """Collects one request's outputs."""

    def __init__(self, then=None):
        self.outputs = []
        self.threads = set()
        self.done = threading.Event()
        self._then = then

    def __call__(self, output):
        self.outputs.append(output)
        self.threads.add(threading.current_thread())
        if self._then is not None:
            self._then(output)
        if output.finish_reason is not None:
            self.done.set()

    @property
    def tokens(self):
        return [token for output in self.outputs for token in output.token_ids]

    @property
    def text(self):
        return "".join(output.text for output in self.outputs)

    @property
    def last(self):
        assert [o.finish_reason is not None for o in self.outputs] == [False] * (len(self.outputs) - 1) + [True]
        return self.outputs[-1]


class Letters:
    """A tokenizer whose tokens are letters; a detokenizer holds back the letter `?` until the next one comes."""

    def detokenizer(self):
        return LettersDetokenizer()


class LettersDetokenizer:
    def __init__(self):
        self._held = ""

    def push(self, ids):
        text = self._held + letters(ids)
        self._held = text[-1:] if text.endswith("?") else ""
        return text[: len(text) - len(self._held)]

    def flush(self):
        return self._held


def letters(ids):
    return "".join("?" if token % 9 == 0 else chr(ord("a") + token % 7) for token in ids)


def prompt_of(length, seed=0):
    return [random.Random(f"{seed}/{i}").randrange(101) for i in range(length)]


def finish(engine):
    """Runs an engine without a thread until it has nothing to do."""
    for _ in range(5000):
        if not engine.step():
            return
        engine.scheduler.check_integrity()
    raise AssertionError("the engine goes round in circles")


def run(cell, requests, tokenizer=None, config=None):
    """Runs (prompt, params) pairs together; returns their clients and the engine."""
    engine = Engine(FakeExecutor(cell), config or EngineConfig(max_waiting=1000), tokenizer)
    clients = []
    for prompt, params in requests:
        clients.append(Client())
        engine.submit(prompt, params, clients[-1])
    finish(engine)
    assert engine.stats()["used_pages"] == 0 and engine.stats()["running"] == 0
    return clients, engine
