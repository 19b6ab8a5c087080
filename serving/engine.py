"""Engine: one thread that schedules, fills, runs and hands out tokens. No JAX: the device is behind the executor."""

import logging
import secrets
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal

from jmoe.serving.admission import make_request
from jmoe.serving.engine_config import EngineConfig
from jmoe.serving.errors import CellFailedError, EngineClosedError, JmoeError, QueueFullError, StepTimeoutError
from jmoe.serving.executors.protocol import Executor, ProgramKey
from jmoe.serving.request_stream import RequestStream, Tokenizer, token_logprobs
from jmoe.serving.requests import FinishReason, RequestOutput, SamplingParams
from jmoe.serving.scheduler import Call, Progress, Scheduler
from jmoe.serving.step_batch import StepBatch
from jmoe.serving.stop import StopMatcher
from jmoe.step_inputs import StepOutputs

_log = logging.getLogger(__name__)
_COUNTS: tuple[str, ...] = (
    "prefill_calls", "decode_calls", "prefill_tokens", "output_tokens", "dropped_rows", "callback_errors",
)  # fmt: skip


class Engine:
    """Takes requests from any thread, runs them on an executor in its own, and calls back with their tokens.

    Args:
      executor: runs the programs; whoever made it closes it, after the engine.
      config: see EngineConfig.
      tokenizer: makes the text of outputs; None leaves text empty and allows no stop strings.
      on_failure: called once, before the requests hear of it, when the cell fails.
    """

    def __init__(
        self,
        executor: Executor,
        config: EngineConfig | None = None,
        tokenizer: Tokenizer | None = None,
        on_failure: Callable[[CellFailedError], None] | None = None,
    ):
        self.executor = executor
        self.cell = executor.cell
        self.config = config or EngineConfig()
        self.tokenizer = tokenizer
        self.scheduler = Scheduler(self.cell, self.config.prefill_streak(self.cell))
        self.failure: CellFailedError | None = None
        self._batch = StepBatch(self.cell)
        self._in_flight: deque[Call] = deque()
        self._on_failure = on_failure
        self._thread = threading.Thread(target=self._loop, name="jmoe-engine", daemon=True)
        # The lock guards what other threads touch: streams, inbox, state. It is never held in a callback or a call.
        self._changed = threading.Condition()
        self._streams: dict[str, RequestStream] = {}
        self._inbox: deque[tuple[Literal["submit", "abort"], RequestStream]] = deque()
        self._num_inbox_requests = 0
        self._state: Literal["open", "draining", "closed"] = "open"
        self._counts = dict.fromkeys(_COUNTS, 0)

    # ---- any thread

    def start(self) -> None:
        """Starts the engine's thread."""
        self._thread.start()

    def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        on_output: Callable[[RequestOutput], None],
        request_id: str | None = None,
    ) -> str:
        """Queues a request. Greedy unless `params` says otherwise.

        Args:
          prompt_ids: token ids of the prompt, at least one and fewer than max_len.
          params: sampling parameters; max_tokens is cut to what max_len leaves beside the prompt.
          on_output: called in the engine's thread with every RequestOutput, the last one with a finish_reason. One
            that raises ends its own request.
          request_id: unique among live requests; None makes one.

        Returns:
          The request's id.

        Raises:
          ValueError: a prompt or parameters that this cell can't serve, or an id in use.
          QueueFullError: max_waiting requests wait already.
          EngineClosedError: the engine is draining or closed.
          CellFailedError: the cell has failed; of the failure's own type.
        """
        request_id = f"req-{secrets.token_hex(8)}" if request_id is None else request_id
        request = make_request(self.cell, prompt_ids, params, request_id, self.tokenizer is not None)
        detokenizer = self.tokenizer.detokenizer() if self.tokenizer is not None else None
        stream = RequestStream(request, on_output, detokenizer, StopMatcher(params.stop))
        with self._changed:
            if self.failure is not None:
                raise type(self.failure)(*self.failure.args) from self.failure
            if self._state != "open":
                raise EngineClosedError(f"the engine is {self._state}")
            if request.id in self._streams:
                raise ValueError(f"request_id: expected one not in use, got {request.id!r}")
            if (num_waiting := self._num_waiting()) >= self.config.max_waiting:
                raise QueueFullError(f"{num_waiting} requests are waiting (max_waiting {self.config.max_waiting})")
            self._streams[request.id] = stream
            self._inbox.append(("submit", stream))
            self._num_inbox_requests += 1
            self._changed.notify_all()
        return request.id

    def abort(self, request_id: str) -> bool:
        """Ends a request and frees its pages; its last output says ABORT. False if no such request is live."""
        with self._changed:
            stream = self._streams.get(request_id)
            if stream is None or stream.ended:
                return False
            self._inbox.append(("abort", stream))
            self._changed.notify_all()
        return True

    def drain(self, timeout_s: float) -> bool:
        """Refuses new requests and waits for the live ones; True if all of them ended by themselves in time."""
        with self._changed:
            if self._state == "open":
                self._state = "draining"
            self._changed.wait_for(lambda: not self._streams, timeout_s)
            return not self._streams and self._state == "draining"

    def close(self) -> None:
        """Ends live requests with EngineClosedError and the thread with the call in flight. Safe to call twice."""
        with self._changed:
            self._state = "closed"
            self._changed.notify_all()
        if self._thread is threading.current_thread():
            return  # called back from the loop, which ends next
        if self._thread.is_alive():
            self._thread.join(self.config.close_timeout_s)
        if self._thread.is_alive():
            self._fail(StepTimeoutError(f"close: the call in flight took over {self.config.close_timeout_s} s"))
        self._end_all(EngineClosedError("the engine was closed"))

    def stats(self) -> dict[str, int]:
        """Counters since the start, and how many requests and pages there are right now."""
        with self._changed:
            allocators = self.scheduler.slots.allocators
            return {
                "waiting": self._num_waiting(),
                "running": len(self.scheduler.running) + len(self.scheduler.ending),
                "free_slots": self.cell.num_slots - len(self.scheduler.running),
                "free_pages": sum(allocator.num_free for allocator in allocators),
                "used_pages": sum(allocator.num_used for allocator in allocators),
                "preemptions": self.scheduler.num_preemptions,
                **self._counts,
            }

    def _num_waiting(self) -> int:
        return len(self.scheduler.waiting) + self._num_inbox_requests

    # ---- the engine's thread

    def step(self) -> bool:
        """Starts one call behind those in flight; where that fills the line, takes in the oldest one's tokens.

        So all that the host does (admission, scheduling, text, callbacks) goes on while the device runs a call.

        Returns:
          False if there was nothing to do.
        """
        self._take_inbox()
        call = self.scheduler.schedule()
        if call is not None:
            self.executor.submit(ProgramKey(call.kind, call.sampling), self._batch.fill(call))
            self._in_flight.append(call)
        elif not self._in_flight:
            if self.scheduler.waiting or self.scheduler.running:
                raise RuntimeError(f"the scheduler found no call for {self.stats()}")
            return False
        if call is None or len(self._in_flight) == self.config.max_calls_in_flight:
            self._take_outputs()
        return True

    def _take_outputs(self) -> None:
        """Waits for the oldest call in flight and hands its tokens out."""
        outputs = self.executor.collect()
        call = self._in_flight.popleft()
        self._take_inbox()  # an abort that came during the call wins over its tokens
        self._count(call, outputs)
        for progress in self.scheduler.update(call, outputs.tokens):
            self._hand_out(progress, call, outputs)

    def _loop(self) -> None:
        try:
            while self._state != "closed":
                if not self.step() and not self._wait_for_inbox():
                    self.executor.check()
            while self._in_flight:  # whoever closes the executor next finds it idle
                self._in_flight.popleft()
                self.executor.collect()
        except BaseException as e:  # whatever it is, no request may wait for a thread that is gone
            self._fail(e)
        self._end_all(EngineClosedError("the engine was closed"))

    def _wait_for_inbox(self) -> bool:
        """Waits until something is asked for; False after check_interval_s without."""
        with self._changed:
            if not self._inbox and self._state != "closed":
                self._changed.wait(self.config.check_interval_s)
            return bool(self._inbox) or self._state == "closed"

    def _take_inbox(self) -> None:
        """Hands new requests and aborts to the scheduler, in order."""
        aborted = []
        with self._changed:
            while self._inbox:
                what, stream = self._inbox.popleft()
                if what == "submit":
                    self._num_inbox_requests -= 1
                    self.scheduler.add(stream.request)
                elif not stream.ended:
                    self.scheduler.finish(stream.request, FinishReason.ABORT)
                    aborted.append((stream, stream.end(FinishReason.ABORT)))
        for stream, output in aborted:
            self._emit(stream, output)

    def _hand_out(self, progress: Progress, call: Call, outputs: StepOutputs) -> None:
        """Gives a client its new tokens; a stop string found in them ends the request here."""
        stream = self._streams.get(progress.request.id)
        if stream is None or stream.ended:
            return
        num_top = progress.request.params.logprobs
        logprobs = None if num_top is None else token_logprobs(progress, call, outputs, num_top)
        try:
            output = stream.advance(progress.tokens, logprobs)
        except Exception as e:  # its text can't be made, which is no reason to end the others
            _log.exception("text of request %s", progress.request.id)
            output = stream.end(FinishReason.ERROR, JmoeError(f"text of the output: {type(e).__name__}: {e}"))
        self._counts["output_tokens"] += len(output.token_ids)
        if output.finish_reason is not None:
            self.scheduler.finish(progress.request, output.finish_reason)
        self._emit(stream, output)

    def _emit(self, stream: RequestStream, output: RequestOutput) -> None:
        """Calls back, without the lock; a client that can't take its output loses its request and nothing else."""
        try:
            stream.on_output(output)
        except Exception:
            _log.exception("on_output of request %s raised; the request is aborted", stream.request.id)
            self._counts["callback_errors"] += 1
            self.scheduler.finish(stream.request, FinishReason.ABORT)
            stream.ended = True
        if stream.ended:
            with self._changed:
                self._streams.pop(stream.request.id, None)
                self._changed.notify_all()

    def _count(self, call: Call, outputs: StepOutputs) -> None:
        """Keeps the books of `stats`."""
        self._counts[f"{call.kind}_calls"] += 1
        self._counts["dropped_rows"] += outputs.dropped_rows
        if call.kind == "prefill":
            self._counts["prefill_tokens"] += sum(work.num_tokens for work in call.work)
        if outputs.dropped_rows:
            _log.warning("%d rows found no room in the exchange of this %s call", outputs.dropped_rows, call.kind)

    def _fail(self, error: BaseException) -> None:
        """Closes the engine for good: health hears of it first, then every request, with the typed error."""
        failure, unknown = error, None
        if not isinstance(failure, CellFailedError):
            failure, unknown = CellFailedError(f"{type(error).__name__}: {error}"), error
            failure.__cause__ = error
        with self._changed:
            if self.failure is not None:
                return
            self.failure, self._state = failure, "closed"
        _log.error("the cell failed: %s", failure, exc_info=unknown)  # a typed error says it all in one line
        if self._on_failure is not None:
            try:
                self._on_failure(failure)
            except Exception:
                _log.exception("on_failure raised")
        self._end_all(failure)

    def _end_all(self, error: Exception) -> None:
        """Gives every live request its last output."""
        with self._changed:
            self._state = "closed"
            streams = [stream for stream in self._streams.values() if not stream.ended]
            outputs = [stream.end(FinishReason.ERROR, error) for stream in streams]
            self._inbox.clear()
            self._num_inbox_requests = 0
        for stream, output in zip(streams, outputs, strict=True):
            try:
                stream.on_output(output)
            except Exception:
                _log.exception("on_output of request %s raised", stream.request.id)
        with self._changed:
            self._streams.clear()
            self._changed.notify_all()
