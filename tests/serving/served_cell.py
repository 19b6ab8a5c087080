"""`jmoe serve` on real workers in a process of its own, with several streams in flight; for tests of faults."""

import os
import re
import subprocess
import sys
import threading
import time

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from worker_cell import all_gone

from jmoe.serving.grpc_client import Client
from jmoe.serving.requests import SamplingParams

SIZES = {"rows": 2, "chunk_len": 16, "num_steps": 4, "max_len": 4096, "page_len": 64}
LONG = SamplingParams(max_tokens=4000, ignore_eos=True)
_PID = re.compile(r"worker \d+ \(\w+\): process (\d+)$", re.MULTILINE)
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class ServedCell:
    """Runs the command until it ends; `workers` are the process ids that it names."""

    def __init__(self, folder, checkpoint, *words, token=None, sizes=SIZES):
        sizes = [word for name, size in sizes.items() for word in (f"--{name.replace('_', '-')}", str(size))]
        command = [
            sys.executable, "-m", "jmoe.serving.cli", "serve", str(checkpoint), "--port", "0", "--platform", "cpu",
            "--executor", "processes", "--programs", "greedy", *sizes, *words,
        ]  # fmt: skip
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "GRPC_VERBOSITY": "NONE"}
        environment |= {"JMOE_WORKER_TOKEN": token} if token else {}
        self._errors = folder / "stderr"
        with self._errors.open("w") as errors:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, cwd=folder
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("serving "), (line, self.stderr())
        self.address = line.split()[-1]
        self.workers = [int(pid) for pid in _PID.findall(self.stderr())]

    def stderr(self) -> str:
        return self._errors.read_text()

    def end(self) -> tuple[int, str]:
        """Waits for the command's own end; its exit code and stderr."""
        self.process.communicate(timeout=30)
        return self.process.returncode, self.stderr()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        assert all_gone(self.workers), "workers outlived the command"


class Streams:
    """Several requests in flight, each in a thread; what each got, and how and when it ended."""

    def __init__(self, address, prompts):
        self.client = Client(address, timeout_s=120)
        self.tokens = [[] for _ in prompts]
        self.errors: list[Exception | None] = [None] * len(prompts)
        self.ended_at = [0.0] * len(prompts)
        self._threads = [threading.Thread(target=self._follow, args=(i, p)) for i, p in enumerate(prompts)]
        for thread in self._threads:
            thread.start()

    def _follow(self, index, prompt):
        try:
            for output in self.client.stream(prompt, LONG):
                self.tokens[index] += output.token_ids
        except Exception as error:
            self.errors[index] = error
        self.ended_at[index] = time.monotonic()

    def wait_for_tokens(self, least):
        """Waits until every stream decodes."""
        until = time.monotonic() + 60
        while min(map(len, self.tokens)) < least:
            assert time.monotonic() < until and all(thread.is_alive() for thread in self._threads), self.errors
            time.sleep(0.002)

    def join(self):
        for thread in self._threads:
            thread.join(120)
        assert not any(thread.is_alive() for thread in self._threads), "a stream hangs"
        self.client.close()


class HealthWatch:
    """When health turned NOT_SERVING."""

    def __init__(self, address):
        self._channel = grpc.insecure_channel(address)
        request = health_pb2.HealthCheckRequest()
        self._watch = health_pb2_grpc.HealthStub(self._channel).Watch(request, timeout=120)
        assert next(self._watch).status == health_pb2.HealthCheckResponse.SERVING
        self.turned_at = 0.0
        self._thread = threading.Thread(target=self._follow)
        self._thread.start()

    def _follow(self):
        if next(self._watch).status == NOT_SERVING:
            self.turned_at = time.monotonic()

    def join(self):
        self._thread.join(60)
        self._watch.cancel()
        self._channel.close()
        return self.turned_at
