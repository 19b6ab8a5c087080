"""Incremental detokenizer: token ids in, text that can no longer change out. Linear in the number of tokens. No JAX.

Two kinds of decoder cover the supported families. Byte-level (Qwen3, DBRX, SmolLM): every letter of a token stands for
one byte, and a character may be spread over tokens. Byte-fallback (Mixtral): the letter U+2581 stands for a space, and
tokens like <0xE2> for one byte; a run of those is one UTF-8 string, or as many U+FFFD as it has bytes.
"""

import codecs
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Protocol

DecoderKind = Literal["byte_level", "byte_fallback"]
_SPACE = "\u2581"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")


class Detokenizer(Protocol):
    """Turns the tokens of one request into text, piece by piece."""

    def push(self, ids: Iterable[int]) -> str:
        """Takes new tokens and returns the text that no later token can change."""
        ...

    def flush(self) -> str:
        """Returns what was held back; bytes that never became a character read as U+FFFD."""
        ...


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """The letter of each byte in byte-level vocabularies: printable Latin-1 stands for itself, the rest from U+0100.

    Source: GPT-2's `bytes_to_unicode`.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    return letters | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def decoder_kind(decoder: Mapping[str, Any] | None) -> tuple[DecoderKind, bool]:
    """Which of the two kinds the `decoder` entry of a `tokenizer.json` is.

    Returns:
      The kind, and whether the text's first space is dropped.

    Raises:
      ValueError: any other decoder, by name.
    """
    steps = (decoder or {}).get("decoders", [decoder]) if decoder else []
    names = [step["type"] for step in steps]
    if names == ["ByteLevel"]:
        return "byte_level", False
    if names == ["Metaspace"] and steps[0].get("replacement") == _SPACE:
        return "byte_fallback", steps[0].get("prepend_scheme", "always") != "never"
    if names in (["Replace", "ByteFallback", "Fuse"], ["Replace", "ByteFallback", "Fuse", "Strip"]):
        replaces = steps[0]["pattern"] == {"String": _SPACE} and steps[0]["content"] == " "
        strip = steps[3] if len(steps) == 4 else {"content": " ", "start": 0, "stop": 0}
        if replaces and strip["content"] == " " and strip["start"] in (0, 1) and strip["stop"] == 0:
            return "byte_fallback", strip["start"] == 1
    raise ValueError(
        "tokenizer.json decoder: expected ByteLevel, Metaspace or Replace + ByteFallback + Fuse (+ Strip), got "
        f"{' + '.join(names) or 'none'}"
    )


class ByteLevelDetokenizer:
    """Byte-level: the tokens' bytes through one incremental UTF-8 decoder.

    Args:
      token_bytes: the bytes of a token id; empty for special tokens.
    """

    def __init__(self, token_bytes: Callable[[int], bytes]):
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        return self._utf8.decode(b"".join(map(self._token_bytes, ids)))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class ByteFallbackDetokenizer:
    """Byte-fallback: a run of byte tokens is held back until a token of another kind ends it.

    Args:
      token_piece: a token id as text, as a byte (an int), or None for special tokens.
      strip_space: drop the text's first space, which the encoder put there.
    """

    def __init__(self, token_piece: Callable[[int], str | int | None], strip_space: bool):
        self._token_piece = token_piece
        self._strip_space = strip_space
        self._run = bytearray()

    def push(self, ids: Iterable[int]) -> str:
        pieces: list[str] = []
        for token in ids:
            piece = self._token_piece(token)
            if isinstance(piece, int):
                self._run.append(piece)
            elif piece is not None:
                pieces += (self._end_run(), piece)
        return self._strip("".join(pieces))

    def flush(self) -> str:
        return self._strip(self._end_run())

    def _end_run(self) -> str:
        run, self._run = self._run, bytearray()
        try:
            return run.decode("utf-8")
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _strip(self, text: str) -> str:
        if self._strip_space and text:
            self._strip_space = False
            return text.removeprefix(" ")
        return text


def byte_level_bytes(token: str) -> bytes:
    """The bytes of a byte-level token; a token with a letter outside the alphabet (an added one) is plain UTF-8."""
    alphabet = byte_alphabet()
    try:
        return bytes(alphabet[letter] for letter in token)
    except KeyError:
        return token.encode("utf-8")


def byte_fallback_piece(token: str, byte_tokens: bool) -> str | int:
    """The text of a byte-fallback token, or its byte as an int."""
    match = _BYTE_TOKEN.match(token) if byte_tokens else None
    return int(match[1], 16) if match else token.replace(_SPACE, " ")
