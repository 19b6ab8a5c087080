"""Completion and OutputStream: what a caller of the server holds while and after its request runs. No JAX."""

import dataclasses
import queue
import time
from collections.abc import Callable, Iterable
from typing import Protocol, Self

from jmoe.serving.errors import JmoeError
from jmoe.serving.requests import FinishReason, RequestOutput, TokenLogprobs


@dataclasses.dataclass(frozen=True, slots=True)
class Completion:
    """A finished request.

    Attributes:
      request_id: whose.
      text: of the output, without special tokens; empty where the server has no tokenizer.
      token_ids: of the output; a stop token is among them.
      finish_reason: why it ended.
      num_prompt_tokens: length of the prompt.
      logprobs: one entry for each output token, if asked for.
    """

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    num_prompt_tokens: int
    logprobs: tuple[TokenLogprobs, ...] | None = None

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids)

    @classmethod
    def of(cls, outputs: Iterable[RequestOutput]) -> "Completion":
        """Joins the outputs of one request, up to its last."""
        pieces, token_ids, logprobs, last = [], [], [], None
        for last in outputs:
            pieces.append(last.text)
            token_ids += last.token_ids
            logprobs += last.logprobs or ()
        if last is None or last.finish_reason is None:
            raise JmoeError("expected outputs up to one with a finish_reason, got fewer")
        return cls(
            request_id=last.request_id,
            text="".join(pieces),
            token_ids=tuple(token_ids),
            finish_reason=last.finish_reason,
            num_prompt_tokens=last.num_prompt_tokens,
            logprobs=tuple(logprobs) if logprobs else None,
        )


class Submit(Protocol):
    """Hands a request over; the callback gets its outputs."""

    def __call__(self, on_output: Callable[[RequestOutput], None], /) -> str: ...


class OutputStream:
    """The outputs of one running request, as an iterator. Leaving it early aborts the request.

    Args:
      submit: hands the request over and returns its id.
      abort: ends a request by its id.
      timeout_s: longest wait for the next output.

    Raises:
      TimeoutError: from `next`, when no output came in time; the request is aborted.
      JmoeError: from `next`, what the request ended with; a CellFailedError if the cell failed.
    """

    def __init__(self, submit: Submit, abort: Callable[[str], object], timeout_s: float):
        self.request_id = ""
        self.finished = False
        self._abort = abort
        self._timeout_s = timeout_s
        self._queue: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
        try:
            self.request_id = submit(self._queue.put)
        except BaseException:
            self.finished = True  # nothing runs
            raise

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> RequestOutput:
        return self.next_output(self._timeout_s)

    def next_output(self, timeout_s: float) -> RequestOutput:
        """The next output, waiting at most `timeout_s` for it."""
        if self.finished:
            raise StopIteration
        try:
            output = self._queue.get(timeout=max(timeout_s, 0.0))
        except queue.Empty:
            self.close()
            raise TimeoutError(f"request {self.request_id}: no output within {timeout_s:.1f} s") from None
        self.finished = output.finish_reason is not None
        if output.error is not None:
            # A fresh one for each caller: one failure ends many requests, and each raise adds to a traceback.
            raise type(output.error)(str(output.error)) from output.error
        return output

    def outputs_until(self, deadline: float) -> Iterable[RequestOutput]:
        """The outputs up to the last, or up to a moment of `time.monotonic`."""
        while not self.finished:
            yield self.next_output(deadline - time.monotonic())

    def close(self) -> None:
        """Aborts the request if it still runs."""
        if not self.finished:
            self.finished = True
            self._abort(self.request_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self):
        self.close()
