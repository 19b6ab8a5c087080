"""RequestStream: turns a request's new tokens into what its client gets: ids, text, stop strings. No JAX."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

from jmoe.serving.requests import FinishReason, Request, RequestOutput, TokenLogprobs
from jmoe.serving.scheduler import Call, Progress
from jmoe.serving.stop import StopMatcher
from jmoe.serving.text.detokenizer import Detokenizer
from jmoe.step_inputs import StepOutputs


class Tokenizer(Protocol):
    """What the engine asks of a tokenizer."""

    def detokenizer(self) -> Detokenizer:
        """A new detokenizer for one request."""
        ...


@dataclasses.dataclass(slots=True, eq=False)
class RequestStream:
    """One live request and its client.

    Attributes:
      request: the scheduler's state; `output_ids` there may run ahead of a stop string.
      on_output: called in the engine's thread with each output.
      detokenizer: None where there is no tokenizer; then text stays empty.
      stop: stop strings of the request.
      num_output: tokens handed to the client so far.
      ended: the last output has been made; there is never another one.
    """

    request: Request
    on_output: Callable[[RequestOutput], None]
    detokenizer: Detokenizer | None
    stop: StopMatcher
    num_output: int = 0
    ended: bool = False

    def advance(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs] | None) -> RequestOutput:
        """Makes the output for new tokens. A stop string drops the tokens after the one that completed it."""
        reason = self.request.finish_reason
        num_kept, text = len(tokens), ""
        if self.detokenizer is not None:
            # The text of a stop token is not part of the answer.
            spoken = tokens[:-1] if reason is FinishReason.STOP else tokens
            num_read, text = self._read(self.detokenizer, spoken, is_last=reason is not None)
            if self.stop.found:
                num_kept, reason = num_read, FinishReason.STOP
        self.num_output += num_kept
        return self._output(
            token_ids=tuple(tokens[:num_kept]),
            text=text,
            finish_reason=reason,
            logprobs=None if logprobs is None else tuple(logprobs[:num_kept]),
        )

    def _read(self, detokenizer: Detokenizer, tokens: Sequence[int], is_last: bool) -> tuple[int, str]:
        """Text of tokens, and how many of them were read: all, or those up to the end of a stop string."""
        num_read, text = len(tokens), ""
        if self.stop.stop:
            for num_read, token in enumerate(tokens, 1):
                text += self.stop.push(detokenizer.push([token]))
                if self.stop.found:
                    return num_read, text
        else:
            text = detokenizer.push(tokens)
        if is_last:
            text += self.stop.push(detokenizer.flush())
            text += self.stop.flush()
        return num_read, text

    def end(self, reason: FinishReason, error: Exception | None = None) -> RequestOutput:
        """Makes a last output without tokens; text that was held back is dropped."""
        return self._output(finish_reason=reason, error=error)

    def _output(self, **fields) -> RequestOutput:
        self.ended = self.ended or fields["finish_reason"] is not None
        return RequestOutput(
            request_id=self.request.id,
            num_prompt_tokens=self.request.num_prompt,
            num_output_tokens=self.num_output,
            **fields,
        )


def token_logprobs(progress: Progress, call: Call, outputs: StepOutputs, num_top: int) -> list[TokenLogprobs]:
    """One entry for each new token, with its num_top likeliest neighbours.

    Raises:
      RuntimeError: the call brought no log-probabilities.
    """
    if outputs.logprobs is None or outputs.top_ids is None or outputs.top_logprobs is None:
        raise RuntimeError(f"request {progress.request.id}: expected log-probabilities from {call.kind}, got none")
    replica, micro_batch, row = call.work[progress.work_idx].slot
    place = (replica, micro_batch, row if call.kind == "decode" else 0)
    return [
        TokenLogprobs(
            token_id=token,
            logprob=float(outputs.logprobs[(step, *place)]),
            top_ids=tuple(outputs.top_ids[(step, *place)][:num_top].tolist()),
            top_logprobs=tuple(outputs.top_logprobs[(step, *place)][:num_top].tolist()),
        )
        for step, token in enumerate(progress.tokens)
    ]
