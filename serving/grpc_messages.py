"""Between jmoe.v1 messages and the types of serving, both ways. No JAX."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jmoe
from jmoe.serving import errors
from jmoe.serving.prompts import Prompt
from jmoe.serving.protos import jmoe_pb2 as pb
from jmoe.serving.requests import FinishReason, RequestOutput, SamplingParams, TokenLogprobs
from jmoe.serving.server import Server

_REPEATED = ("stop_token_ids", "stop")
_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORT: pb.FINISH_REASON_ABORT,
}


def params_of(message: pb.SamplingParams) -> SamplingParams:
    """Sampling parameters from the wire; an absent field is its default.

    Raises:
      ValueError: a value out of range.
    """
    values: dict[str, Any] = {name: tuple(getattr(message, name)) for name in _REPEATED}
    for field in dataclasses.fields(SamplingParams):
        if field.name not in _REPEATED and message.HasField(field.name):
            value = getattr(message, field.name)
            # A float32 of the wire reads as its shortest decimal again: 0.7, not 0.699999988.
            values[field.name] = float(f"{value:.7g}") if isinstance(value, float) else value
    return SamplingParams(**values)


def params_message(params: SamplingParams) -> pb.SamplingParams:
    """Sampling parameters for the wire."""
    return pb.SamplingParams(**{k: v for k, v in dataclasses.asdict(params).items() if v is not None})


def prompt_of(request: pb.GenerateRequest) -> Prompt:
    """The prompt of a request: text, token ids or messages.

    Raises:
      ValueError: none was given.
    """
    match request.WhichOneof("input"):
        case "text":
            return request.text
        case "token_ids":
            return list(request.token_ids.ids)
        case "chat":
            return [{"role": m.role, "content": m.content} for m in request.chat.messages]
    raise ValueError("input: expected text, token_ids or chat, got none of them")


def request_message(prompt: Prompt, params: SamplingParams, request_id: str) -> pb.GenerateRequest:
    """A request for the wire."""
    request = pb.GenerateRequest(request_id=request_id, sampling=params_message(params))
    if isinstance(prompt, str):
        request.text = prompt
    elif len(prompt) > 0 and isinstance(prompt[0], Mapping):
        for message in prompt:
            assert isinstance(message, Mapping)
            request.chat.messages.add(role=message["role"], content=message["content"])
    else:
        request.token_ids.SetInParent()
        request.token_ids.ids.extend(prompt)  # type: ignore[arg-type]
    return request


def chunk_message(outputs: Sequence[RequestOutput]) -> pb.GenerateChunk:
    """One chunk for the outputs that came since the last one."""
    last = outputs[-1]
    chunk = pb.GenerateChunk(
        request_id=last.request_id,
        text="".join(output.text for output in outputs),
        token_ids=[token for output in outputs for token in output.token_ids],
        finish_reason=_REASONS[last.finish_reason] if last.finish_reason else pb.FINISH_REASON_UNSPECIFIED,
        usage=pb.Usage(prompt_tokens=last.num_prompt_tokens, output_tokens=last.num_output_tokens),
    )
    for output in outputs:
        for entry in output.logprobs or ():
            chunk.logprobs.add(**dataclasses.asdict(entry))
    return chunk


def output_of(chunk: pb.GenerateChunk) -> RequestOutput:
    """The output that a chunk carries."""
    reasons = {number: reason for reason, number in _REASONS.items()}
    logprobs = tuple(
        TokenLogprobs(e.token_id, e.logprob, tuple(e.top_ids), tuple(e.top_logprobs)) for e in chunk.logprobs
    )
    return RequestOutput(
        request_id=chunk.request_id,
        token_ids=tuple(chunk.token_ids),
        text=chunk.text,
        finish_reason=reasons.get(chunk.finish_reason),
        num_prompt_tokens=chunk.usage.prompt_tokens,
        num_output_tokens=chunk.usage.output_tokens,
        logprobs=logprobs or None,
    )


def model_info(server: Server) -> pb.ModelInfo:
    """What a client may want to know about the model and its meshes."""
    cell, tokenizer = server.cell, server.tokenizer
    model, mesh = cell.model, cell.mesh
    return pb.ModelInfo(
        name=server.name,
        family=model.family,
        dtype=model.dtype,
        vocab_size=model.vocab_size,
        num_layers=model.num_layers,
        num_experts=model.num_experts,
        num_experts_per_tok=model.num_experts_per_tok,
        max_len=cell.max_len,
        eos_token_ids=model.eos_token_ids,
        has_tokenizer=tokenizer is not None,
        has_chat_template=tokenizer is not None and tokenizer.chat_template is not None,
        attention=mesh.attention,
        expert=mesh.expert,
        num_micro_batches=mesh.num_micro_batches,
        attention_tensor=mesh.attention_tensor,
        expert_tensor=mesh.expert_tensor,
        num_slots=cell.num_slots,
        version=jmoe.__version__,
    )


def failure_details(error: Exception) -> str:
    """An error as status details: its type's name, then the first line of what it says (more is for this side only)."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def error_of(details: str) -> errors.JmoeError | None:
    """The typed error that status details name; None if they name none."""
    name, _, text = details.partition(": ")
    kind = getattr(errors, name, None)
    return kind(text) if isinstance(kind, type) and issubclass(kind, errors.JmoeError) else None
