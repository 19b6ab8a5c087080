"""Client: a server's generate and stream over gRPC, with the same types and the same errors. No JAX."""

import pathlib
from typing import Self

import grpc

from jmoe.serving.completions import Completion
from jmoe.serving.errors import EngineClosedError, JmoeError, QueueFullError
from jmoe.serving.grpc_messages import error_of, output_of, request_message
from jmoe.serving.prompts import Prompt
from jmoe.serving.protos import jmoe_pb2 as pb
from jmoe.serving.protos import jmoe_pb2_grpc
from jmoe.serving.requests import RequestOutput, SamplingParams
from jmoe.serving.text.chat_template import check_messages

_MAX_MESSAGE_BYTES = 16 * 1024 * 1024


class ResponseStream:
    """The outputs of one request, as an iterator. Leaving it early cancels the request.

    Raises:
      ValueError, JmoeError, TimeoutError, ConnectionError: from `next`, as `Client.generate` does.
    """

    def __init__(self, call: grpc.Call):
        self._call = call
        self._closed = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> RequestOutput:
        try:
            return output_of(next(self._call))  # type: ignore[call-overload]
        except grpc.RpcError as error:
            if self._closed:
                raise StopIteration from None
            raise _typed(error) from error

    def close(self) -> None:
        """Cancels the request if it still runs; the server frees its pages."""
        self._closed = True
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Client:
    """A connection to `jmoe serve`.

    Args:
      address: HOST:PORT.
      tls_ca: PEM file of the authority that signed the server's certificate; None connects without TLS.
      timeout_s: the deadline of each call.
    """

    def __init__(self, address: str, *, tls_ca: str | pathlib.Path | None = None, timeout_s: float = 600.0):
        self._timeout_s = timeout_s
        options = [("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES)]
        if tls_ca is None:
            self._channel = grpc.insecure_channel(address, options=options)
        else:
            credentials = grpc.ssl_channel_credentials(pathlib.Path(tls_ca).read_bytes())
            self._channel = grpc.secure_channel(address, credentials, options=options)
        self._stub = jmoe_pb2_grpc.GenerationStub(self._channel)

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> Completion:
        """Runs one prompt to the end; arguments as `stream`'s.

        Raises:
          ValueError: a prompt or parameters that the server can't serve.
          QueueFullError: its inbox is full, or this client read too slowly.
          CellFailedError, EngineClosedError: the cell failed; the server is loading, draining or closed.
          TimeoutError: not done in time.
          ConnectionError: no server there, or it went away.
        """
        with self.stream(prompt, params, request_id=request_id, timeout_s=timeout_s) as outputs:
            return Completion.of(outputs)

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> ResponseStream:
        """Starts a request.

        Args:
          prompt: text, token ids or messages.
          params: None is greedy.
          request_id: unique among the server's live requests; empty lets it make one.
          timeout_s: the call's deadline; None is the client's.

        Returns:
          The iterator of its outputs.
        """
        if not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], dict):
            check_messages(prompt)  # type: ignore[arg-type]
        request = request_message(prompt, params or SamplingParams(), request_id)
        return ResponseStream(self._stub.Generate(request, timeout=timeout_s or self._timeout_s))

    def abort(self, request_id: str) -> None:
        """Ends a request."""
        self._unary(self._stub.Abort, pb.AbortRequest(request_id=request_id))

    def model_info(self) -> pb.ModelInfo:
        """The model and its meshes."""
        return self._unary(self._stub.GetModelInfo, pb.GetModelInfoRequest())

    def stats(self) -> dict[str, float]:
        """Counters and latencies."""
        return dict(self._unary(self._stub.GetStats, pb.GetStatsRequest()).values)

    def _unary(self, method, request):
        try:
            return method(request, timeout=self._timeout_s)
        except grpc.RpcError as error:
            raise _typed(error) from error

    def close(self) -> None:
        """Ends the connection and what still runs on it."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _typed(error: grpc.RpcError) -> Exception:
    """The error that a status stands for."""
    code, details = error.code(), error.details() or ""  # type: ignore[attr-defined]
    match code:
        case grpc.StatusCode.INVALID_ARGUMENT:
            return ValueError(details)
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return error_of(details) or QueueFullError(details)
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return TimeoutError(details)
        case grpc.StatusCode.UNAVAILABLE:
            if details.startswith("the server is "):
                return EngineClosedError(details)
            return error_of(details) or ConnectionError(details)
    return error_of(details) or JmoeError(f"{code.name}: {details}")
