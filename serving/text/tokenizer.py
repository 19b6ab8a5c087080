"""Tokenizer: a checkpoint's `tokenizer.json`, its end-of-sequence ids and its chat template. No JAX."""

import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers

from jmoe.serving.text import detokenizer
from jmoe.serving.text.chat_template import ChatTemplate, ChatTemplateError, Message, read_chat_template

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class Tokenizer:
    """Text to token ids and back.

    Args:
      backend: the `tokenizers` object.
      eos_token_ids: any of them ends a generation.
      special_tokens: by name, for the chat template.
      chat_template: its jinja2 source, or None.

    Raises:
      ValueError: a decoder that can't be run incrementally, by name.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_token_ids: Iterable[int] = (),
        special_tokens: Mapping[str, str] | None = None,
        chat_template: str | None = None,
    ):
        self._backend = backend
        backend.no_truncation()  # some checkpoints carry a training length: it would cut prompts without a word
        backend.no_padding()
        spec = json.loads(backend.to_str())
        self._kind, self._strip_space = detokenizer.decoder_kind(spec.get("decoder"))
        self._byte_tokens = self._kind == "byte_fallback" and "ByteFallback" in json.dumps(spec["decoder"])
        self._special_ids = frozenset(t["id"] for t in spec.get("added_tokens") or () if t["special"])
        self._max_token_chars = max(map(len, backend.get_vocab(with_added_tokens=True)), default=1)
        self._bytes: dict[int, bytes] = {}
        self._pieces: dict[int, str | int] = {}
        self.eos_token_ids = tuple(dict.fromkeys(eos_token_ids))
        self.special_tokens = dict(special_tokens or {})
        self.chat_template = None if chat_template is None else ChatTemplate(chat_template, self.special_tokens)

    @classmethod
    def from_dir(cls, path: str | pathlib.Path) -> "Tokenizer":
        """Reads a checkpoint folder.

        `tokenizer.json` is needed; `tokenizer_config.json`, `generation_config.json`, `config.json` and
        `chat_template.jinja` are read where they exist. Every end-of-sequence id that any of them names counts.

        Raises:
          FileNotFoundError: no `tokenizer.json`.
          ValueError: a decoder or a chat template that can't be run.
        """
        folder = pathlib.Path(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(f"expected a Hugging Face checkpoint folder with a tokenizer, got no {file}")
        backend = tokenizers.Tokenizer.from_file(str(file))
        config = _read_json(folder / "tokenizer_config.json")
        special = {name: text for name in _NAMED_TOKENS if (text := _token_text(config.get(name))) is not None}
        eos: list[int] = []
        for source in (_read_json(folder / "generation_config.json"), _read_json(folder / "config.json")):
            ids = source.get("eos_token_id")
            eos += [] if ids is None else ids if isinstance(ids, list) else [ids]
        named = backend.token_to_id(special["eos_token"]) if "eos_token" in special else None
        template_file = folder / "chat_template.jinja"
        template_text = template_file.read_text(encoding="utf-8") if template_file.is_file() else None
        return cls(
            backend,
            eos_token_ids=eos if named is None else [*eos, named],
            special_tokens=special,
            chat_template=read_chat_template(config, template_text),
        )

    @property
    def vocab_size(self) -> int:
        """Tokens that have a text, added ones included (the model's vocabulary may be padded beyond)."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True, max_tokens: int | None = None) -> list[int]:
        """Text to token ids; special tokens written out in the text are recognised, as `transformers` does.

        Args:
          text: any text.
          add_special_tokens: put the tokens around it that the tokenizer was made to put.
          max_tokens: refuse text that is sure to make more, before the work of finding out how many. A megabyte takes
            a second.

        Raises:
          ValueError: far too long.
        """
        # A token is at most so many characters, and normal forms (NFC, NFKC) shrink real text fourfold at most.
        if max_tokens is not None and len(text) > 4 * max_tokens * self._max_token_chars:
            raise ValueError(f"prompt: expected at most {max_tokens} tokens, got {len(text)} characters")
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        options: Mapping[str, Any] | None = None,
        max_tokens: int | None = None,
    ) -> list[int]:
        """Messages to the token ids of the prompt after which the assistant speaks.

        Args:
          messages: mappings with a `role` and a `content` string.
          options: more names for the template.
          max_tokens: as in `encode`.

        Raises:
          ChatTemplateError: no chat template, or one that refuses the messages.
          ValueError: far too long.
        """
        if self.chat_template is None:
            raise ChatTemplateError("messages: expected a checkpoint with a chat template, got one without; send text")
        # The template writes the first special token itself.
        text = self.chat_template.render(messages, options=options)
        return self.encode(text, add_special_tokens=False, max_tokens=max_tokens)

    def decode(self, ids: Iterable[int]) -> str:
        """Token ids of a whole text to text, without special tokens."""
        pieces = self.detokenizer(continues=False)
        return pieces.push(ids) + pieces.flush()

    def detokenizer(self, *, continues: bool = True) -> detokenizer.Detokenizer:
        """A fresh incremental detokenizer.

        Args:
          continues: the tokens go on after a prompt, so that a first space belongs to the text. False where they are
            a whole text, whose first space some encoders put there themselves.
        """
        if self._kind == "byte_level":
            return detokenizer.ByteLevelDetokenizer(self._token_bytes)
        return detokenizer.ByteFallbackDetokenizer(self._token_piece, self._strip_space and not continues)

    def _token_bytes(self, token_id: int) -> bytes:
        known = self._bytes.get(token_id)
        if known is None and (token := self._token(token_id)) is not None:
            known = self._bytes[token_id] = detokenizer.byte_level_bytes(token)
        return known or b""

    def _token_piece(self, token_id: int) -> str | int | None:
        known = self._pieces.get(token_id)
        if known is None and (token := self._token(token_id)) is not None:
            known = self._pieces[token_id] = detokenizer.byte_fallback_piece(token, self._byte_tokens)
        return known

    def _token(self, token_id: int) -> str | None:
        """The token as it stands in the vocabulary; None for special and unknown ids, which have no text."""
        return None if token_id in self._special_ids or token_id < 0 else self._backend.id_to_token(token_id)


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _token_text(entry: Any) -> str | None:
    """`tokenizer_config.json` names a token by its text or by a mapping with `content`."""
    return entry.get("content") if isinstance(entry, dict) else entry
