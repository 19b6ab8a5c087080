"""A real worker process around a runtime without JAX, which misbehaves as $FAKE_WORKER says; for tests alone.

FAKE_WORKER is JSON: worker index -> command kind -> what goes wrong in it.
"""

import json
import os
import signal
import struct
import sys
import time

import numpy as np

from jmoe.cell_config import CellConfig
from jmoe.serving import worker
from jmoe.serving.errors import ExchangeTimeoutError, SequenceMismatchError
from jmoe.serving.wire import Channel

FAULTS = json.loads(os.environ.get("FAKE_WORKER", "{}"))
real_send = Channel.send
armed: list[str] = []  # what the next answer is to suffer


def bad_send(channel: Channel, message: dict) -> None:
    if message.get("kind") != "done" or not armed:
        return real_send(channel, message)
    fault = armed.pop()
    if fault == "wrong_number":
        return real_send(channel, {**message, "number": message["number"] + 1})
    if fault == "twice":
        real_send(channel, message)
        return real_send(channel, message)
    if fault == "oversized":
        return channel.send_frame(struct.pack(">I", (64 << 20) + 1))
    if fault == "malformed":
        return channel.send_frame(struct.pack(">I", 3) + b"\xc1\xc1\xc1")
    if fault == "closed":
        channel.close()
        time.sleep(600)
    raise AssertionError(fault)


class FakeRuntime:
    """Tokens are 1000 * call + 100 * replica + micro-batch, so that a test can tell whose they are."""

    def __init__(self, init):
        if init.get("hang"):
            print("fake worker: stuck", file=sys.stderr, flush=True)
            time.sleep(600)
        self.cell = CellConfig.from_dict(init["cell"])
        self.role, self.index = init["role"], init["process_id"]
        mesh = self.cell.mesh
        first = 0 if init["num_processes"] == 2 else self.index
        self.replicas = range(first, first + init["num_devices"]) if self.role == "attention" else []
        self.replicas = [r // mesh.attention_tensor for r in self.replicas if r % mesh.attention_tensor == 0]
        self.calls, self.devices, self.connected = 0, init["num_devices"], False
        if "ignore_sigterm" in FAULTS.get(str(self.index), {}).values():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # here: in the main thread
        self.suffer("init")

    def suffer(self, command):
        fault = FAULTS.get(str(self.index), {}).get(command)
        if fault is None:
            return
        print(f"fake worker {self.index}: {fault} in {command}", file=sys.stderr, flush=True)
        if fault in ("hang", "ignore_sigterm"):
            time.sleep(600)
        elif fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault == "killed_later":
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault == "exit":
            os._exit(7)
        elif fault == "exit_leaving_a_child":  # which holds the connection open and ignores SIGTERM
            if os.fork() == 0:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                time.sleep(600)
            os._exit(7)
        elif fault == "slow":
            time.sleep(0.3)
        elif fault == "slower":
            time.sleep(0.8)
        elif fault == "value_error":
            raise ValueError("expected a good checkpoint, got a bad one")
        elif fault == "sequence_error":
            raise SequenceMismatchError("exchange 3: expected sequence number 3, got 2")
        elif fault == "exchange_timeout":
            raise ExchangeTimeoutError("attention device 0: expected message 3 of a peer, got none in time")
        elif fault == "peer_lost":
            raise RuntimeError("gloo: connection closed by peer")
        elif fault == "misshapen":
            return
        else:
            armed.append(fault)

    def open_mailboxes(self):
        mesh = self.cell.mesh
        first = 0 if self.role == "attention" else mesh.num_attention_devices
        return {device: bytes([0, 255, device]) for device in range(first, first + self.devices)}

    def connect(self, handles):
        assert handles == {device: bytes([0, 255, device]) for device in range(self.cell.mesh.num_devices)}
        self.suffer("connect")
        self.connected = True

    def load(self, path, progress):
        assert self.connected == self.cell.mesh.roles_apart
        progress(f"read {path}")
        progress(f"sees the token: {worker.TOKEN_VARIABLE in os.environ}")
        self.suffer("load")

    def compile(self, *keys):
        self.suffer("compile")
        return f"compiled {len(keys)} programs"

    def submit(self, key, inputs):
        return key, inputs

    def collect(self, submitted):
        key, inputs = submitted
        self.calls += 1
        self.suffer("run")
        self.suffer(f"run{self.calls}")
        if self.role == "expert":
            assert inputs is None, "an expert worker gets nothing but the number"
            return {"dropped_rows": 1}
        num_steps = self.cell.num_steps if key.kind == "decode" else 1
        rows = inputs.shape[2]
        mesh = self.cell.mesh
        tokens = np.zeros((num_steps, len(self.replicas), mesh.num_micro_batches, rows), np.int32)
        tokens += 1000 * self.calls + np.arange(mesh.num_micro_batches, dtype=np.int32)[:, None]
        tokens += 100 * np.array(self.replicas, np.int32)[:, None, None]
        if FAULTS.get(str(self.index), {}).get("run") == "misshapen":
            tokens = tokens[..., :0]
        out = {"replicas": np.array(self.replicas, np.int32), "tokens": tokens, "dropped_rows": 0}
        if key.sampling:
            top = (*tokens.shape, self.cell.num_top_logprobs)
            out |= {"logprobs": np.full(tokens.shape, -1.5, np.float32)}
            out |= {"top_ids": np.ones(top, np.int32), "top_logprobs": np.full(top, -2.5, np.float32)}
        return out


if __name__ == "__main__":
    if "start" in FAULTS.get(sys.argv[-1], {}):
        sys.exit("fake worker: no such module")
    Channel.send = bad_send
    worker.main(runtime_factory=FakeRuntime)
