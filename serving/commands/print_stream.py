"""print_stream: a request's text on a stream as it comes, and what it took in one line. No JAX."""

import sys
import time
from collections.abc import Iterable
from typing import TextIO

from jmoe.serving.requests import RequestOutput


def print_stream(outputs: Iterable[RequestOutput], stream: TextIO | None = None) -> str:
    """Writes each piece at once, and a newline at the end.

    Returns:
      "23 tokens (stop) in 3.2 s, 7.2 tok/s, first token after 1.1 s". The time starts here.
    """
    out = sys.stdout if stream is None else stream
    start = time.monotonic()
    first, num_tokens, reason = 0.0, 0, "cut off"
    for output in outputs:
        if num_tokens == 0:
            first = time.monotonic() - start
        num_tokens = output.num_output_tokens
        reason = output.finish_reason.value if output.finish_reason else reason
        out.write(output.text)
        out.flush()
    out.write("\n")
    out.flush()
    total = time.monotonic() - start
    rate = num_tokens / total if total > 0 else 0.0
    return f"{num_tokens} tokens ({reason}) in {total:.1f} s, {rate:.1f} tok/s, first token after {first:.1f} s"
