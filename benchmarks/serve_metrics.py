"""What a run of requests says: throughput, latencies and goodput, under the names of `vllm bench serve`. No JAX."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

PERCENTILES = (50, 90, 99)


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """One request as its client saw it; seconds of one clock that all processes of a host share.

    Attributes:
      start: when it was due: waiting for a busy client counts.
      chunks: (arrival, tokens) of each piece of output.
      error: why it failed, or None.
    """

    num_prompt: int
    start: float
    chunks: tuple[tuple[float, int], ...]
    error: str | None = None

    @property
    def num_output(self) -> int:
        return sum(num for _, num in self.chunks)

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return self.chunks[0][0] - self.start

    @property
    def e2el_s(self) -> float:
        """End-to-end latency."""
        return self.chunks[-1][0] - self.start

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first."""
        return (self.e2el_s - self.ttft_s) / max(self.num_output - 1, 1)

    @property
    def itl_s(self) -> list[float]:
        """Inter-token latencies as vLLM takes them: between pieces, each of which may hold several tokens."""
        return [later - earlier for (earlier, _), (later, _) in zip(self.chunks, self.chunks[1:], strict=False)]


def percentile(values: Sequence[float], share: float) -> float:
    """Linear between the two nearest; NaN of nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    place = (len(ordered) - 1) * share / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def metrics(records: Sequence[Record], goodput: Mapping[str, float]) -> dict[str, float]:
    """Figures of one run.

    Args:
      records: of all its requests.
      goodput: milliseconds that a good request keeps, by "ttft", "tpot" or "e2el"; empty counts none.

    Returns:
      By vLLM's names; times in milliseconds, rates a second from the first start to the last piece.
    """
    done = [record for record in records if record.error is None and record.chunks]
    if not done:
        raise ValueError(f"expected a finished request, got {len(records)} failures: {records[0].error}")
    duration = max(record.chunks[-1][0] for record in done) - min(record.start for record in records)
    tokens_in, tokens_out = sum(r.num_prompt for r in done), sum(r.num_output for r in done)
    result: dict[str, float] = {
        "duration": duration,
        "completed": len(done),
        "failed": len(records) - len(done),
        "total_input_tokens": tokens_in,
        "total_output_tokens": tokens_out,
        "request_throughput": len(done) / duration,
        "output_throughput": tokens_out / duration,
        "total_token_throughput": (tokens_in + tokens_out) / duration,
    }
    times = {
        "ttft": [r.ttft_s for r in done],
        "tpot": [r.tpot_s for r in done if r.num_output > 1],
        "itl": [gap for r in done for gap in r.itl_s],
        "e2el": [r.e2el_s for r in done],
    }
    for name, values in times.items():
        milliseconds = [1e3 * value for value in values]
        result[f"mean_{name}_ms"] = statistics.fmean(milliseconds) if milliseconds else math.nan
        result[f"median_{name}_ms"] = percentile(milliseconds, 50)
        result[f"std_{name}_ms"] = statistics.pstdev(milliseconds) if milliseconds else math.nan
        result |= {f"p{share}_{name}_ms": percentile(milliseconds, share) for share in PERCENTILES}
        result[f"max_{name}_ms"] = max(milliseconds, default=math.nan)
    if goodput:
        good = sum(all(1e3 * getattr(r, f"{name}_s") <= limit for name, limit in goodput.items()) for r in done)
        result["request_goodput"] = good / duration
    return result


def steady_tokens_per_s(records: Sequence[Record]) -> float:
    """Output tokens a second while every request decodes: between the last first token and the first last one.

    Each request's own rate between its first and its last piece in that window, summed: so it does not matter where in
    a burst of pieces the window begins.

    Raises:
      ValueError: no such window, or a request with fewer than two pieces in it.
    """
    begin = max(record.chunks[0][0] for record in records)
    end = min(record.chunks[-1][0] for record in records)
    total = 0.0
    for record in records:
        inside = [chunk for chunk in record.chunks[1:] if begin <= chunk[0] <= end]
        if len(inside) < 2:
            raise ValueError(
                f"expected every request to decode for a while beside all others, got {len(inside)} pieces"
            )
        total += sum(num for _, num in inside[1:]) / (inside[-1][0] - inside[0][0])
    return total
