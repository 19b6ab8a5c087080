"""Chat template: a checkpoint's own jinja2 program, run in a sandbox with caps on what goes in and comes out. No JAX.

The sandbox keeps a template from Python's objects, files and imports. It does not bound memory inside an expression
(`{% set s = s ~ s %}` in a loop doubles): serve checkpoints that you trust that far.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
from jinja2.exceptions import SecurityError

MAX_TEMPLATE_CHARS = 256 * 1024  # the longest published ones are near 20 thousand
MAX_PROMPT_CHARS = 8 * 1024 * 1024
MAX_MESSAGES = 4096

Message = Mapping[str, Any]


class ChatTemplateError(ValueError):
    """The template refused the messages, tried what the sandbox forbids, or made too much text."""


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for training; here it is its body."""

    tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """An attempt to leave the sandbox ends the rendering at once; jinja2's own only fails where the value is used."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        raise SecurityError(f"{attribute!r} of a {type(obj).__name__}")


class ChatTemplate:
    """Messages in, prompt text out, as `transformers` renders the same template.

    Args:
      source: the jinja2 text.
      special_tokens: what templates may name, `bos_token` and `eos_token` for example.

    Raises:
      ChatTemplateError: source too long, or no jinja2.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None):
        if len(source) > MAX_TEMPLATE_CHARS:
            raise ChatTemplateError(
                f"chat template: expected at most {MAX_TEMPLATE_CHARS} characters, got {len(source)}"
            )
        self.source = source
        self._special_tokens = dict(special_tokens or {})
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"chat template: expected jinja2, got {_line(error)}") from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """Renders the prompt.

        Args:
          messages: mappings with a `role` and a `content` string, more keys as the template knows them.
          add_generation_prompt: end with the words after which the assistant speaks.
          options: more names for the template, `tools` or `enable_thinking` for example.

        Raises:
          ChatTemplateError: messages of the wrong form, or anything that goes wrong in the template.
        """
        check_messages(messages)
        names = {"tools": None, "documents": None, **self._special_tokens, **(options or {})}
        names |= {"messages": [dict(m) for m in messages], "add_generation_prompt": add_generation_prompt}
        pieces, size = [], 0
        try:
            for piece in self._template.generate(names):
                size += len(piece)
                if size > MAX_PROMPT_CHARS:
                    raise ChatTemplateError(f"chat template: expected at most {MAX_PROMPT_CHARS} characters, got more")
                pieces.append(piece)
        except SecurityError as error:
            raise ChatTemplateError(f"chat template: the sandbox forbids {_line(error)}") from error
        except ChatTemplateError:
            raise
        except RecursionError as error:
            raise ChatTemplateError("chat template: the recursion is too deep") from error
        except Exception as error:  # a template can raise anything: arithmetic, missing keys, its own refusal
            raise ChatTemplateError(f"chat template: {_line(error)}") from error
        return "".join(pieces)


def check_messages(messages: Sequence[Message]) -> None:
    """Checks the form of a conversation.

    Raises:
      ChatTemplateError: none or too many messages, or one without a role and content.
    """
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise ChatTemplateError(f"messages: expected 1 to {MAX_MESSAGES}, got {len(messages)}")
    total = 0
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ChatTemplateError(f"messages[{i}]: expected a mapping with a 'role' string, got {message!r:.80}")
        content = message.get("content")
        if not isinstance(content, str) and (content is not None or "tool_calls" not in message):
            raise ChatTemplateError(f"messages[{i}].content: expected a string, got {type(content).__name__}")
        total += len(content or "")
    if total > MAX_PROMPT_CHARS:
        raise ChatTemplateError(f"messages: expected at most {MAX_PROMPT_CHARS} characters together, got {total}")


def read_chat_template(config: Mapping[str, Any], file_text: str | None, name: str = "default") -> str | None:
    """Picks the template's source: `chat_template.jinja` first, then `tokenizer_config.json`'s string or named list.

    Raises:
      ChatTemplateError: a named list without `name`.
    """
    if file_text is not None:
        return file_text
    entry = config.get("chat_template")
    if isinstance(entry, list):
        entry = {item["name"]: item["template"] for item in entry}
        if name not in entry:
            raise ChatTemplateError(f"chat_template: expected one named {name!r}, got {', '.join(entry) or 'none'}")
        return entry[name]
    return entry


@functools.cache
def _environment() -> _Sandbox:
    env = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols])
    env.filters["tojson"] = _to_json
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = _strftime_now
    return env


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as `transformers` writes it: not escaped for HTML, letters kept."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form[:256])


def _line(error: BaseException) -> str:
    """The error as one short line."""
    return " ".join(f"{error}".split())[:300] or type(error).__name__
