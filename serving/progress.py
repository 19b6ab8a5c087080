"""Progress: what starting up is doing, redrawn in place on a terminal and as plain lines elsewhere. No JAX."""

import re
import sys
import threading
import time
from typing import Self, TextIO

_BAR_WIDTH = 24
_REDRAW_S = 0.1  # a bar on a terminal
_PLAIN_SHARE = 0.25  # a bar elsewhere: one line for each quarter
_COUNTED = re.compile(r"(.+): (\d+) of (\d+)\b")  # "expert weights: 50 of 90 arrays" is a bar


class Progress:
    """Steps and bars. Call it with a line to begin a step; the step ends when the next one begins, or at `close`.

    Args:
      stream: where to write; None is standard error.
      tty: whether to redraw; None asks the stream.
    """

    def __init__(self, stream: TextIO | None = None, tty: bool | None = None):
        self._stream = stream if stream is not None else sys.stderr
        self._tty = self._stream.isatty() if tty is None else tty
        self._lock = threading.RLock()
        self._step: str | None = None
        self._since = 0.0
        self._drawn = 0.0
        self._share = -1.0

    def __call__(self, text: str) -> None:
        """Begins a step, or goes on with it where the line says "...: 50 of 90"."""
        with self._lock:
            if counted := _COUNTED.match(text):
                self.bar(counted[1], int(counted[2]), int(counted[3]))
            else:
                self._begin(text)

    def bar(self, text: str, done: int, total: int) -> None:
        """Shows how far a step is, in any unit; a first call with a new text begins that step."""
        with self._lock:
            if text != self._step:
                self._begin(text)
            share = min(max(done / total, 0.0), 1.0) if total > 0 else 0.0
            now = time.monotonic()
            if self._tty and (share == 1.0 or now - self._drawn >= _REDRAW_S):
                filled = round(share * _BAR_WIDTH)
                self._write(f"\r\x1b[2K{text} [{'#' * filled}{'.' * (_BAR_WIDTH - filled)}] {share:4.0%}")
                self._drawn = now
            elif not self._tty and share >= self._share + _PLAIN_SHARE:
                self._share = share
                self._write(f"{text}: {share:.0%}\n")

    def report(self, share: float | None, text: str) -> None:
        """Shows a step of which a share of 0 to 1 is done, or None where that is not known."""
        if share is not None:
            self.bar(text, round(share * 1000), 1000)
        elif text != self._step:
            self(text)

    def close(self) -> None:
        """Ends the step that is shown, with its time."""
        with self._lock:
            if self._step is not None and self._tty:
                self._write(f"\r\x1b[2K{self._step} ({time.monotonic() - self._since:.1f} s)\n")
            self._step = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _begin(self, text: str) -> None:
        self.close()
        self._step, self._since, self._share = text, time.monotonic(), -1.0
        self._write(f"\r\x1b[2K{text} ..." if self._tty else f"{text}\n")

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()
