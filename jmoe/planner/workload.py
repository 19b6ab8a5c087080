"""Workload: how long prompts and answers are, and what a decode step sees of them. No JAX."""

import csv
import dataclasses
import json
import pathlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

MAX_TRACE_BYTES = 1 << 30
MAX_TRACE_ROWS = 5_000_000


@dataclasses.dataclass(frozen=True, slots=True)
class Workload:
    """Requests as (prompt length, output length) pairs that stand for the traffic.

    Attributes:
      prompt_lens, output_lens: one entry a request, tokens; equal lengths.
      slo_s: longest time between two tokens of one request.
      expert_imbalance: rows of the busiest expert node over the mean (1 = even).
      attention_imbalance: KV tokens of the fullest attention replica over the mean (1 = even).
      drawn_routing: whether the busiest expert node also has the chance excess of tokens that draw their experts
        evenly (`performance.drawn_excess`); False takes the even split.

    Raises:
      ValueError: lengths below 1 (prompts below 0), of unequal number, or an SLO that is not positive.
    """

    prompt_lens: tuple[int, ...] = (571,)
    output_lens: tuple[int, ...] = (159,)
    slo_s: float = 0.150
    expert_imbalance: float = 1.0
    attention_imbalance: float = 1.0
    drawn_routing: bool = False

    def __post_init__(self):
        if not self.prompt_lens or len(self.prompt_lens) != len(self.output_lens):
            raise ValueError(
                f"Workload: expected as many prompt as output lengths, at least one, got {len(self.prompt_lens)} "
                f"and {len(self.output_lens)}"
            )
        if min(self.prompt_lens) < 0 or min(self.output_lens) < 1:
            raise ValueError(
                f"Workload: expected prompts of at least 0 and outputs of at least 1 token, got minima "
                f"{min(self.prompt_lens)} and {min(self.output_lens)}"
            )
        if not self.slo_s > 0:
            raise ValueError(f"Workload.slo_s: expected a positive time, got {self.slo_s}")
        for name in ("expert_imbalance", "attention_imbalance"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"Workload.{name}: expected at least 1 (max over mean), got {getattr(self, name)}")

    @property
    def mean_context(self) -> float:
        """KV tokens of a decode slot at a random step: E[d p + d (d - 1) / 2] / E[d].

        A slot is refilled at once, so long answers weigh by how long they stay.

        Source: renewal reward, as in arXiv 2601.21351.
        """
        p, d = np.asarray(self.prompt_lens, np.float64), np.asarray(self.output_lens, np.float64)
        return float((d * p + d * (d - 1) / 2).sum() / d.sum())

    @property
    def context_variance(self) -> float:
        """Variance of the same quantity over slots and steps."""
        p, d = np.asarray(self.prompt_lens, np.float64), np.asarray(self.output_lens, np.float64)
        squares = d * p * p + p * d * (d - 1) + d * (d - 1) * (2 * d - 1) / 6
        return max(0.0, float(squares.sum() / d.sum()) - self.mean_context**2)

    @property
    def max_len(self) -> int:
        """Longest sequence, prompt and output together."""
        return max(p + d for p, d in zip(self.prompt_lens, self.output_lens, strict=True))

    @classmethod
    def lognormal(
        cls, prompt_median: float, output_median: float, sigma: float, slo_s: float = 0.150, size: int = 4096
    ) -> "Workload":
        """Log-normal lengths around two medians; quantiles, not draws, so the same every time."""
        from scipy.special import ndtri  # here, so that the module loads without the planner extra

        rng = np.random.default_rng(0)
        z = ndtri((np.arange(size) + 0.5) / size)
        prompts = np.maximum(1, np.rint(prompt_median * np.exp(sigma * z))).astype(int)
        outputs = np.maximum(1, np.rint(output_median * np.exp(sigma * rng.permutation(z)))).astype(int)
        return cls(tuple(prompts.tolist()), tuple(outputs.tolist()), slo_s)

    @classmethod
    def from_trace(cls, path: str | pathlib.Path, slo_s: float = 0.150) -> "Workload":
        """Reads a trace: JSON lines or CSV with `prompt_len` and `output_len` in every row.

        Raises:
          ValueError: no rows, too many, or a row without the two numbers, by line.
        """
        path = pathlib.Path(path)
        if path.stat().st_size > MAX_TRACE_BYTES:
            raise ValueError(f"--trace {path}: expected at most {MAX_TRACE_BYTES} bytes, got a larger file")
        with path.open(newline="") as file:
            is_csv = path.suffix == ".csv"
            rows = csv.DictReader(file) if is_csv else (json.loads(line) for line in file if line.strip())
            pairs = []
            for number, row in enumerate(rows, start=2 if is_csv else 1):
                try:
                    pairs.append((int(row["prompt_len"]), int(row["output_len"])))
                except (KeyError, TypeError, ValueError) as error:
                    raise ValueError(
                        f"--trace {path}, row {number}: expected integers prompt_len and output_len, got {row}"
                    ) from error
                if len(pairs) > MAX_TRACE_ROWS:
                    raise ValueError(f"--trace {path}: expected at most {MAX_TRACE_ROWS} rows, got more")
        if not pairs:
            raise ValueError(f"--trace {path}: expected at least one row, got none")
        prompts, outputs = zip(*pairs, strict=True)
        return cls(prompts, outputs, slo_s)


def busiest_replica(variance: float, mean: float, rows: ArrayLike, num_replicas: ArrayLike) -> np.ndarray:
    """Expected KV tokens of the fullest of M replicas over the mean, rows slots each (Gaussian approximation).

    Args:
      variance, mean: of one slot's context.
      rows: slots of one replica.
      num_replicas: M.

    Returns:
      1 + z(M) sqrt(variance / rows) / mean, z(M) as in `expected_largest`.
    """
    return 1.0 + expected_largest(num_replicas) * np.sqrt(variance / np.asarray(rows, np.float64)) / mean


def expected_largest(count: ArrayLike) -> np.ndarray:
    """Expected largest of `count` standard normals by Blom's approximation (within 5 % for 2 to 1000); 0 for one."""
    from scipy.special import ndtri  # here, so that the module loads without the planner extra

    count = np.asarray(count, np.float64)
    return np.where(count > 1, ndtri((count - 0.375) / (count + 0.25)), 0.0)


def lengths_summary(lens: Sequence[int]) -> str:
    """Median and 99th percentile, for a table's header."""
    values = np.asarray(lens)
    if values.min() == values.max():
        return f"{values[0]}"
    return f"median {np.median(values):.0f}, p99 {np.percentile(values, 99):.0f}"
