"""Prompts: the three forms in which a caller may give one, and their token ids. No JAX."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from jmoe.serving.text.chat_template import Message
from jmoe.serving.text.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Sequence[Message]


def is_one_prompt(prompts: Any) -> bool:
    """Whether this is a single prompt (text, token ids or messages) rather than a sequence of them.

    Raises:
      ValueError: neither.
    """
    if isinstance(prompts, str):
        return True
    if isinstance(prompts, Mapping) or not hasattr(prompts, "__len__") or not hasattr(prompts, "__getitem__"):
        raise ValueError(
            f"prompts: expected text, token ids, messages or a sequence of such prompts, got a {type(prompts).__name__}"
        )
    return len(prompts) > 0 and (isinstance(prompts[0], Mapping) or _is_integer(prompts[0]))


def prompt_ids(prompt: Prompt, tokenizer: Tokenizer | None, max_tokens: int | None = None) -> Sequence[int]:
    """The token ids of one prompt; `max_tokens` lets text that is far too long be refused early.

    Raises:
      ValueError: text or messages without a tokenizer, messages that the chat template refuses, or another form.
    """
    is_text = isinstance(prompt, str)
    is_chat = not is_text and len(prompt) > 0 and isinstance(prompt[0], Mapping)
    if not is_text and not is_chat:
        if len(prompt) == 0 or not _is_integer(prompt[0]):
            raise ValueError(f"prompt: expected text, at least one token id or messages, got {prompt!r:.80}")
        return prompt  # type: ignore[return-value]  # each element is checked where the request is made
    if tokenizer is None:
        raise ValueError("prompt: expected token ids, because this model came without a tokenizer, got text")
    if is_text:
        ids = tokenizer.encode(prompt, max_tokens=max_tokens)  # type: ignore[arg-type]
    else:
        ids = tokenizer.encode_chat(prompt, max_tokens=max_tokens)  # type: ignore[arg-type]
    if not ids:
        raise ValueError("prompt: expected text of at least one token, got none")
    return ids


def _is_integer(value: Any) -> bool:
    try:
        operator.index(value)
    except TypeError:
        return False
    return True
