"""Metrics: how many requests ended how, and how long they took. Thread-safe and small. No JAX."""

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable

from jmoe.serving.requests import RequestOutput

WINDOW = 1024  # the latest values that percentiles look back on


class Metrics:
    """Counts requests and keeps their latest latencies.

    Args:
      clock: seconds that only go forward.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._latencies: dict[str, deque[float]] = {
            "first_token_s": deque(maxlen=WINDOW),
            "token_s": deque(maxlen=WINDOW),
            "request_s": deque(maxlen=WINDOW),
        }

    def watch(self, on_output: Callable[[RequestOutput], None]) -> Callable[[RequestOutput], None]:
        """Wraps a request's callback; the request's time starts here."""
        start = self._clock()
        first: float | None = None

        def watched(output: RequestOutput) -> None:
            nonlocal first
            now = self._clock()
            with self._lock:
                self._counts["output_tokens"] += len(output.token_ids)
                if first is None and output.token_ids:
                    first = now
                    self._latencies["first_token_s"].append(now - start)
                if output.finish_reason is not None:
                    self._finish(output, start, first, now)
            on_output(output)

        return watched

    def refused(self) -> None:
        """Counts a request that was not taken."""
        with self._lock:
            self._counts["requests_refused"] += 1

    def _finish(self, output: RequestOutput, start: float, first: float | None, now: float) -> None:
        assert output.finish_reason is not None
        self._counts[f"requests_{output.finish_reason.value}"] += 1
        self._counts["prompt_tokens"] += output.num_prompt_tokens
        self._latencies["request_s"].append(now - start)
        if first is not None and output.num_output_tokens > 1:
            self._latencies["token_s"].append((now - first) / (output.num_output_tokens - 1))

    def snapshot(self) -> dict[str, float]:
        """Counts by name; p50 and p95 of each latency over the latest 1024 (absent while there is none)."""
        with self._lock:
            values: dict[str, float] = dict(self._counts)
            for name, window in self._latencies.items():
                ordered = sorted(window)
                for share in (50, 95) if ordered else ():
                    values[f"{name}_p{share}"] = ordered[math.ceil(len(ordered) * share / 100) - 1]
        return values
