"""Requests: sampling parameters, the mutable state of one request, and what its client gets back. No JAX."""

import dataclasses
import enum
from array import array
from collections.abc import Sequence
from typing import NamedTuple

MAX_SEED = 2**31 - 1  # the device takes the seed as an int32
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_LEN = 256  # characters; at most this much text is ever held back


@dataclasses.dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one request are chosen and where they end. The default is greedy.

    Args:
      max_tokens: most tokens to generate; cut to what `max_len` leaves beside the prompt.
      temperature: 0 is greedy (our default), else 0.001 to 100.
      top_k: keep the k likeliest tokens; 0 is off.
      top_p: keep the smallest set of likeliest tokens that holds this much probability; 1 is off.
      min_p: keep tokens of at least this share of the likeliest one's probability; 0 is off.
      seed: 0 to 2^31 - 1; the same seed gives the same tokens in any batch. None lets the engine draw one.
      repetition_penalty: divides the positive logits of tokens that stand in prompt or output, and multiplies the
        negative ones; 1 is off.
      presence_penalty: taken from the logit of every token in the output; 0 is off.
      frequency_penalty: taken from a token's logit once for each time it stands in the output; 0 is off.
      stop_token_ids: end the output like an end-of-sequence id; the id is returned, its text is not.
      stop: strings that end the output; neither they nor the text after them are returned.
      ignore_eos: go on past the model's end-of-sequence ids.
      logprobs: return the log-probability of each chosen token and of this many likeliest ones; None is off.

    Raises:
      ValueError: a value out of range.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self):
        # Lists are welcome, and one string means one stop string, not its letters.
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        _check_int("max_tokens", self.max_tokens, 1)
        _check_int("top_k", self.top_k, 0)
        if self.seed is not None:
            _check_int("seed", self.seed, 0)
        if self.logprobs is not None:
            _check_int("logprobs", self.logprobs, 0)
        if self.temperature != 0:
            # Below 0.001 logits / temperature leaves float32, and the result is greedy in all but name.
            _check_float("temperature", self.temperature, 1e-3, 100.0, "0 or ")
        _check_float("top_p", self.top_p, 1e-6, 1.0)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_float("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        for token in self.stop_token_ids:
            _check_int("stop_token_ids", token, 0)
        self._check_stop_strings()

    def _check_stop_strings(self):
        if len(self.stop) > MAX_STOP_STRINGS:
            raise ValueError(f"SamplingParams.stop: expected at most {MAX_STOP_STRINGS} strings, got {len(self.stop)}")
        for text in self.stop:
            if not isinstance(text, str):
                raise ValueError(f"SamplingParams.stop: expected strings, got {text!r}")
            if not 1 <= len(text) <= MAX_STOP_STRING_LEN:
                raise ValueError(
                    f"SamplingParams.stop: expected strings of 1 to {MAX_STOP_STRING_LEN} characters, got {len(text)}"
                )

    @property
    def needs_sampling(self) -> bool:
        """Whether the program must do more than take the argmax of the logits."""
        return (
            self.temperature > 0
            or self.logprobs is not None
            or self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


def _check_int(name: str, value: object, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= MAX_SEED:
        raise ValueError(f"SamplingParams.{name}: expected an integer of {low} to {MAX_SEED}, got {value!r}")


def _check_float(name: str, value: object, low: float, high: float, also: str = "") -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"SamplingParams.{name}: expected {also}{low} to {high}, got {value!r}")


class FinishReason(enum.StrEnum):
    """Why a request ended."""

    STOP = "stop"  # a stop token id (end of sequence included) or a stop string
    LENGTH = "length"  # max_tokens or max_len
    ABORT = "abort"  # the client asked
    ERROR = "error"  # RequestOutput.error says what


class RequestState(enum.Enum):
    """Where a request stands: in the queue (new or preempted), in a slot, or done."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Slot(NamedTuple):
    """A place in the decode batch; the replica also fixes the pool of KV pages."""

    replica: int
    micro_batch: int
    row: int


@dataclasses.dataclass(slots=True, eq=False)
class Request:
    """The state of one request; the scheduler alone changes it.

    Attributes:
      id: unique among live requests.
      prompt_ids: the prompt, never changed.
      params: as the client gave them.
      max_tokens: `params.max_tokens` cut to what max_len leaves.
      stop_ids: every token id that ends the output, end-of-sequence ids included.
      seed: the client's, or one that the engine drew.
      output_ids: tokens generated so far; they survive a preemption.
      state: waiting, running or finished.
      finish_reason: set once, when the request ends.
      arrival: order of submission; the lowest is served first and preempted last.
      slot: its place while running, else None.
      page_ids: KV pages it holds, in order of position.
      num_computed: positions whose keys and values those pages hold once the calls in flight have returned.
      num_in_flight: tokens that the calls in flight bring unless a stop token comes first.
      prefill_len: tokens to compute before decode can go on: the prompt, and the output so far after a preemption.
      num_admissions: how many times it got a slot.
    """

    id: str
    prompt_ids: "array[int]"  # 4 bytes a token, and nothing for the garbage collector to walk through
    params: SamplingParams
    max_tokens: int
    stop_ids: tuple[int, ...] = ()
    seed: int = 0
    output_ids: "array[int]" = dataclasses.field(default_factory=lambda: array("i"))
    state: RequestState = RequestState.WAITING
    finish_reason: FinishReason | None = None
    arrival: int = -1
    slot: Slot | None = None
    page_ids: list[int] = dataclasses.field(default_factory=list)
    num_computed: int = 0
    num_in_flight: int = 0
    prefill_len: int = 0
    num_admissions: int = 0

    @property
    def num_prompt(self) -> int:
        return len(self.prompt_ids)

    @property
    def num_tokens(self) -> int:
        """Prompt and output so far, without what is in flight."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def remaining(self) -> int:
        """Tokens that may still be asked for, beside those in flight."""
        return self.max_tokens - len(self.output_ids) - self.num_in_flight

    @property
    def is_prefilling(self) -> bool:
        """Whether tokens must be computed before the next decode step."""
        return self.num_computed < self.prefill_len

    def tokens(self, start: int, stop: int) -> "array[int]":
        """Prompt and output as one sequence, positions start to stop - 1."""
        shift = len(self.prompt_ids)
        if stop <= shift:
            return self.prompt_ids[start:stop]
        return self.prompt_ids[start:] + self.output_ids[max(0, start - shift) : stop - shift]


@dataclasses.dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one output position, before temperature and filters."""

    token_id: int
    logprob: float
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class RequestOutput:
    """What is new about a request since its last output.

    Attributes:
      request_id: whose.
      token_ids: the new tokens; a stop token is among them.
      text: the new piece of text; may lag behind `token_ids` by an unfinished character or a possible stop string.
      finish_reason: None until the last output.
      error: set if and only if finish_reason is ERROR.
      num_prompt_tokens, num_output_tokens: totals so far.
      logprobs: one entry for each new token where the request asked for them.
    """

    request_id: str
    token_ids: Sequence[int] = ()
    text: str = ""
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    logprobs: tuple[TokenLogprobs, ...] | None = None
