"""The serving benchmark's own arithmetic; `.ci/run` runs it whole."""

import math
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "benchmarks"))

import serve_throughput
from serve_metrics import Record, metrics, percentile, steady_tokens_per_s


def test_metrics_of_two_requests_by_hand():
    records = [
        Record(10, 0.0, ((1.0, 1), (1.4, 4), (2.0, 2))),
        Record(20, 1.0, ((1.5, 1), (2.5, 4))),
        Record(5, 0.5, (), "UNAVAILABLE: gone"),
    ]
    got = metrics(records, {"ttft": 800, "e2el": 1600})
    assert (got["duration"], got["completed"], got["failed"]) == (2.5, 2, 1)
    assert (got["total_input_tokens"], got["total_output_tokens"]) == (30, 12)
    assert got["request_throughput"] == 0.8 and got["output_throughput"] == 4.8
    assert got["total_token_throughput"] == pytest.approx(16.8)
    assert (got["mean_ttft_ms"], got["median_ttft_ms"], got["std_ttft_ms"]) == (750, 750, 250)
    assert got["mean_tpot_ms"] == pytest.approx((1000 / 6 + 250) / 2)
    assert got["median_itl_ms"] == pytest.approx(600) and got["max_itl_ms"] == pytest.approx(1000)
    assert got["p99_e2el_ms"] == pytest.approx(1500 + 0.99 * 500)
    assert got["request_goodput"] == pytest.approx(1 / 2.5), "only the second request keeps both"
    with pytest.raises(ValueError, match="gone"):
        metrics(records[2:], {})


def test_percentiles_are_linear_between_neighbours():
    assert [percentile([3, 1, 2, 4], share) for share in (0, 50, 90, 100)] == pytest.approx([1, 2.5, 3.7, 4])
    assert math.isnan(percentile([], 50))


def test_the_steady_rate_is_that_of_the_time_when_all_decode():
    """Two requests at 4 tokens in 0.5 s each; the second begins late, and pieces of one burst arrive apart."""
    first = Record(1, 0.0, ((0.0, 1), *((0.5 * i, 4) for i in range(1, 9))))
    second = Record(1, 0.0, ((1.0, 1), *((1.01 + 0.5 * i, 4) for i in range(1, 20))))
    assert steady_tokens_per_s([first, second]) == pytest.approx(16)
    with pytest.raises(ValueError, match="got 0 pieces"):
        steady_tokens_per_s([first, Record(1, 0.0, ((4.5, 1), (5.0, 4)))])


def test_arrivals_and_lengths_have_the_means_that_were_asked_for():
    args = serve_throughput.parse(
        ["--platform", "cpu", "--max-len", "4096", "--input-len", "571", "--output-len", "159"]
    )
    requests = serve_throughput.make_requests(args, 3000, 20.0, seed=1)
    assert requests[-1]["at"] / 2999 == pytest.approx(1 / 20, rel=0.06)
    assert sum(len(r["prompt"]) for r in requests) / 3000 == pytest.approx(571, rel=0.06)
    assert sum(r["output_len"] for r in requests) / 3000 == pytest.approx(159, rel=0.06)
    assert all(len(r["prompt"]) + r["output_len"] <= 4096 for r in requests)
    fixed = serve_throughput.parse(["--platform", "cpu", "--fixed-len"])
    requests = serve_throughput.make_requests(fixed, 5, math.inf, seed=1)
    assert {(r["at"], len(r["prompt"]), r["output_len"]) for r in requests} == {(0.0, 20, 12)}
    assert [r["prompt"] for r in requests] == [
        r["prompt"] for r in serve_throughput.make_requests(fixed, 5, math.inf, 1)
    ]
