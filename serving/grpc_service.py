"""GenerationService: jmoe.v1.Generation over a Server. Every way in which a call can end frees its pages. No JAX."""

import asyncio
import re
import secrets
from typing import Literal, Never

import grpc
import grpc.aio

from jmoe.serving.errors import CellFailedError, EngineClosedError, JmoeError, QueueFullError
from jmoe.serving.grpc_config import GrpcConfig
from jmoe.serving.grpc_messages import chunk_message, failure_details, model_info, params_of, prompt_of
from jmoe.serving.output_buffer import OutputBuffer, Wakeups
from jmoe.serving.protos import jmoe_pb2 as pb
from jmoe.serving.protos import jmoe_pb2_grpc
from jmoe.serving.requests import RequestOutput
from jmoe.serving.server import Server

REQUEST_ID_KEY = "jmoe-request-id"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}\Z")  # it travels as metadata too
Context = grpc.aio.ServicerContext


class GenerationService(jmoe_pb2_grpc.GenerationServicer):
    """The servicer; it refuses calls until a server is attached, and after it has begun to drain.

    Args:
      config: bounds of buffers and waits.
    """

    def __init__(self, config: GrpcConfig):
        self.state: Literal["loading", "serving", "draining", "failed"] = "loading"
        self._config = config
        self._server: Server | None = None
        self._wakeups: Wakeups | None = None

    def attach(self, server: Server) -> None:
        """Begins to serve."""
        self._server, self.state = server, "serving"

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:
        """Streams one request's output; see the .proto for statuses."""
        server = await self._ready(context)
        request_id = request.request_id or f"req-{secrets.token_hex(8)}"
        self._wakeups = self._wakeups or Wakeups(asyncio.get_running_loop())
        buffer = OutputBuffer(self._wakeups, self._config.max_buffered_outputs, lambda: server.abort(request_id))
        try:
            if not _REQUEST_ID.match(request_id):
                raise ValueError(f"request_id: expected 1 to 128 of A-Z a-z 0-9 . _ : -, got {request_id!r:.160}")
            params = params_of(request.sampling)
            # Tokenizing a megabyte takes a second: not on the loop that every stream shares.
            async with asyncio.timeout(self._config.tokenize_timeout_s):
                ids = await asyncio.to_thread(lambda: server.prompt_ids(prompt_of(request)))
            server.submit(ids, params, buffer.put, request_id)
        except TimeoutError:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"input: expected a prompt that is tokenized within {self._config.tokenize_timeout_s} s",
            )
        except (ValueError, JmoeError) as error:
            await self._abort(context, error)
        finished = False
        try:
            await context.send_initial_metadata(((REQUEST_ID_KEY, request_id),))
            await self._send_outputs(context, buffer)
            finished = True
        finally:
            if not finished:  # cancelled, past its deadline, or aborted above
                server.abort(request_id)

    async def _send_outputs(self, context: Context, buffer: OutputBuffer) -> None:
        """Sends chunks up to the last."""
        config = self._config
        while True:
            try:
                outputs = await buffer.take(config.max_silence_s)
            except TimeoutError:
                message = f"no output within {config.max_silence_s} s"
                await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, message)
            if buffer.overflowed:
                await self._refuse_slow(context)
            if (error := outputs[-1].error) is not None:
                await self._send(context, outputs[:-1], buffer)
                await self._abort(context, error)
            await self._send(context, outputs, buffer)
            if outputs[-1].finish_reason is not None:
                return

    async def _send(self, context: Context, outputs: list[RequestOutput], buffer: OutputBuffer) -> None:
        """Sends one chunk; a client that does not take it in time has its request aborted meanwhile.

        The write itself goes on, because no status can overtake it: it ends when the client reads or its connection
        does (at `max_connection_s` at the latest).
        """
        if not outputs:
            return
        watchdog = asyncio.get_running_loop().call_later(self._config.write_timeout_s, buffer.give_up)
        try:
            await context.write(chunk_message(outputs))
        finally:
            watchdog.cancel()

    async def _refuse_slow(self, context: Context) -> Never:
        await context.abort(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            f"this client reads too slowly: {self._config.max_buffered_outputs} outputs or "
            f"{self._config.write_timeout_s} s behind",
        )
        raise AssertionError("abort raises")

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        """Ends a request."""
        server = await self._ready(context, also_draining=True)
        server.abort(request.request_id)
        return pb.AbortResponse()

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Context) -> pb.ModelInfo:
        """The model and its meshes."""
        return model_info(await self._ready(context, also_draining=True))

    async def GetStats(self, request: pb.GetStatsRequest, context: Context) -> pb.Stats:
        """Counters and latencies."""
        server = await self._ready(context, also_draining=True)
        return pb.Stats(values=server.stats())

    async def _ready(self, context: Context, also_draining: bool = False) -> Server:
        """The server, or the call's end if there is none to ask."""
        server = self._server
        if server is not None and server.failure is not None:
            await self._abort(context, server.failure)
        if server is None or (self.state == "draining" and not also_draining):
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"the server is {self.state}")
        assert server is not None  # abort raises
        return server

    async def _abort(self, context: Context, error: Exception) -> Never:
        """Ends the call with the status that stands for an error."""
        if isinstance(error, QueueFullError):
            status = grpc.StatusCode.RESOURCE_EXHAUSTED
        elif isinstance(error, CellFailedError | EngineClosedError):
            status = grpc.StatusCode.UNAVAILABLE
        elif isinstance(error, JmoeError):
            status = grpc.StatusCode.INTERNAL
        else:
            status = grpc.StatusCode.INVALID_ARGUMENT
        details = str(error) if status is grpc.StatusCode.INVALID_ARGUMENT else failure_details(error)
        await context.abort(status, details)
        raise AssertionError("abort raises")
