"""Real gRPC clients in processes of their own: each sends requests when they are due and notes every piece's arrival.

As a script it is one such process: requests come as JSON lines on stdin, records go as JSON lines to stdout.
"""

import asyncio
import contextlib
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from serve_metrics import Record

_CHANNELS = 4  # connections of a process: one connection's streams share a flow-control window
_READY_S = 120.0


def send_all(
    address: str,
    requests: Sequence[dict[str, Any]],
    num_processes: int,
    progress: Callable[[int], None],
    timeout_s: float,
    around: Callable[[], AbstractContextManager] = contextlib.nullcontext,
) -> list[Record]:
    """Sends requests from several client processes and waits for all of them.

    Args:
      address: HOST:PORT of the server.
      requests: each `{"at": seconds from the start, "prompt": token ids, "output_len": tokens}`.
      num_processes: client processes; requests are dealt out in turn.
      progress: gets the number of requests that have ended.
      timeout_s: for all of them together.
      around: entered once the clients are ready, for as long as requests run (a lock on a shared machine, say).

    Returns:
      A Record for each request, in order.

    Raises:
      TimeoutError: not all ended in time.
    """
    lines: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    clients = [
        subprocess.Popen([sys.executable, __file__, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(min(num_processes, len(requests)))
    ]
    try:
        for n, client in enumerate(clients):
            assert client.stdin is not None
            mine = [{**request, "index": i} for i, request in enumerate(requests) if i % len(clients) == n]
            client.stdin.write(json.dumps(mine) + "\n")
            client.stdin.flush()
            threading.Thread(target=_read, args=(client, lines), daemon=True).start()
        for _ in clients:
            _next(lines, time.monotonic() + _READY_S)
        with around():
            start = time.monotonic() + 0.2
            for client in clients:
                assert client.stdin is not None
                client.stdin.write(f"{start}\n")
                client.stdin.close()
            return _gather(lines, requests, start, progress, timeout_s)
    finally:
        for client in clients:
            client.kill()
            client.wait()


def _gather(lines, requests, start: float, progress, timeout_s: float) -> list[Record]:
    records: dict[int, Record] = {}
    while len(records) < len(requests):
        got = _next(lines, start + timeout_s)
        request = requests[got["index"]]
        chunks = tuple((when, num) for when, num in got["chunks"])
        records[got["index"]] = Record(len(request["prompt"]), start + request["at"], chunks, got["error"])
        progress(len(records))
    return [records[i] for i in range(len(requests))]


def _read(client: subprocess.Popen, lines: queue.SimpleQueue) -> None:
    assert client.stdout is not None
    for line in client.stdout:
        lines.put(json.loads(line))
    lines.put({"ended": client.wait()})


def _next(lines: queue.SimpleQueue, deadline: float) -> dict[str, Any]:
    while True:
        try:
            got = lines.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise TimeoutError("clients: not all requests ended in time") from None
        if got.get("ended"):
            raise RuntimeError(f"a client process ended with exit code {got['ended']}")
        if "ended" not in got:
            return got


async def _client(address: str) -> None:
    """The body of a client process. What it imports takes a second: before it says that it is ready."""
    import grpc.aio

    from jmoe.serving.grpc_messages import request_message
    from jmoe.serving.protos import jmoe_pb2_grpc
    from jmoe.serving.requests import SamplingParams

    requests = json.loads(sys.stdin.readline())
    options = [("grpc.use_local_subchannel_pool", 1)]  # a connection for each channel
    channels = [grpc.aio.insecure_channel(address, options=options) for _ in range(_CHANNELS)]
    await asyncio.gather(*(channel.channel_ready() for channel in channels))
    stubs = [jmoe_pb2_grpc.GenerationStub(channel) for channel in channels]
    messages = [
        request_message(request["prompt"], SamplingParams(request["output_len"], ignore_eos=True), "")
        for request in requests
    ]
    _say({"ready": True})
    start = float(sys.stdin.readline())
    pairs = enumerate(zip(messages, requests, strict=True))
    await asyncio.gather(*(_stream(stubs[n % _CHANNELS], *pair, start) for n, pair in pairs))
    await asyncio.gather(*(channel.close() for channel in channels))


async def _stream(stub, message, request: dict[str, Any], start: float) -> None:
    """One request, sent when it is due."""
    import grpc

    await asyncio.sleep(max(0.0, start + request["at"] - time.monotonic()))
    chunks, error = [], None
    try:
        async for chunk in stub.Generate(message):
            if len(chunk.token_ids):
                chunks.append((time.monotonic(), len(chunk.token_ids)))
        if sum(num for _, num in chunks) != request["output_len"]:
            error = f"expected {request['output_len']} tokens, got {sum(num for _, num in chunks)}"
    except grpc.RpcError as failure:
        error = f"{failure.code().name}: {failure.details()}"  # type: ignore[attr-defined]
    _say({"index": request["index"], "chunks": chunks, "error": error})


def _say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    asyncio.run(_client(sys.argv[1]))
