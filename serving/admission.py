"""make_request: checks what a client sent against the cell: every size that it controls has its cap here. No JAX."""

import operator
import secrets
from array import array
from collections.abc import Sequence

from jmoe.cell_config import CellConfig
from jmoe.serving.requests import Request, SamplingParams

MAX_ID_LEN = 256


def make_request(
    cell: CellConfig, prompt_ids: Sequence[int], params: SamplingParams, request_id: str, has_tokenizer: bool
) -> Request:
    """Makes a request that the cell can serve even if it is alone.

    `max_tokens` is cut to what max_len leaves beside the prompt. Pages need no check: CellConfig sees to it that a
    sequence of max_len fits into one replica's pool.

    Args:
      cell: sizes of the programs, vocabulary and end-of-sequence ids.
      prompt_ids: token ids of the prompt, at least one and fewer than max_len.
      params: sampling parameters.
      request_id: 1 to 256 characters.
      has_tokenizer: whether there is text in which stop strings can be found.

    Returns:
      The request, with every id that stops it and, where the client gave none, a seed drawn here.

    Raises:
      ValueError: something that this cell can't serve, with the numbers.
    """
    num_prompt = len(prompt_ids)
    if not 1 <= len(request_id) <= MAX_ID_LEN:
        raise ValueError(f"request_id: expected 1 to {MAX_ID_LEN} characters, got {len(request_id)}")
    if not 1 <= num_prompt < cell.max_len:
        raise ValueError(
            f"prompt_ids: expected 1 to {cell.max_len - 1} tokens, so that one more fits into max_len {cell.max_len}, "
            f"got {num_prompt}"
        )
    if params.logprobs is not None and params.logprobs > cell.num_top_logprobs:
        raise ValueError(f"logprobs: expected at most {cell.num_top_logprobs}, got {params.logprobs}")
    if params.stop and not has_tokenizer:
        raise ValueError("stop: expected an engine with a tokenizer, got one without; use stop_token_ids")
    return Request(
        id=request_id,
        prompt_ids=_tokens("prompt_ids", prompt_ids, cell.model.vocab_size),
        params=params,
        max_tokens=min(params.max_tokens, cell.max_len - num_prompt),
        stop_ids=_stop_ids(cell, params),
        seed=secrets.randbits(31) if params.seed is None else params.seed,
    )


def _tokens(name: str, tokens: Sequence[int], vocab_size: int) -> "array[int]":
    """Tokens (numpy's are taken too), all of them in the vocabulary."""
    try:
        ids = [operator.index(token) for token in tokens]
    except TypeError as e:
        raise ValueError(f"{name}: expected integers, got {e}") from None
    if bad := [token for token in ids if not 0 <= token < vocab_size]:
        raise ValueError(f"{name}: expected 0 to {vocab_size - 1} (the vocabulary), got {bad[0]}")
    return array("i", ids)


def _stop_ids(cell: CellConfig, params: SamplingParams) -> tuple[int, ...]:
    """End-of-sequence ids, unless ignored, and the client's own, each once."""
    eos = () if params.ignore_eos else cell.model.eos_token_ids
    stop_ids = tuple(dict.fromkeys((*eos, *_tokens("stop_token_ids", params.stop_token_ids, cell.model.vocab_size))))
    if len(stop_ids) > cell.max_stop_ids:
        raise ValueError(
            f"stop_token_ids: expected at most {cell.max_stop_ids} with the model's end-of-sequence ids, "
            f"got {len(stop_ids)}"
        )
    return stop_ids
