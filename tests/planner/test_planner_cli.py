"""`jmoe plan` as a person runs it: the table, the plan that loads, and answers to what can't be done."""

import argparse
import itertools
import json
import re

import pytest

from jmoe.planner import cli
from jmoe.planner.plan_file import read_plan
from jmoe.planner.table import read_parquet


@pytest.fixture
def plan(tmp_path, capsys):
    def run(*words):
        parser = argparse.ArgumentParser()
        cli.add_arguments(parser)
        code = cli.run(parser.parse_args([*words, "--output", str(tmp_path / "plan.json")]))
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_the_issues_example(plan, tmp_path):
    code, out, err = plan("--model", "mixtral-8x22b", "--gpus", "h20:64,l40s:64", "--slo-ms", "150")
    assert (code, err) == (0, "")
    assert "disaggregate:" in out and "configurations tried" in out and "slowest lane" in out
    kept = read_plan(tmp_path / "plan.json")
    mesh = kept.mesh.resolve(8)  # what serve does with it
    assert mesh.placement.num_experts == 8
    assert kept.gpus == {"attention": "h20", "expert": "l40s"} and kept.advice == "disaggregate"
    assert kept.mesh.num_attention_devices <= 64 and kept.mesh.num_expert_devices <= 64
    assert kept.predicted["step_ms"] <= 150
    batch = kept.rows * kept.mesh.attention * kept.mesh.num_micro_batches
    assert kept.predicted["batch"] == batch
    assert kept.predicted["tokens_s"] == pytest.approx(batch / kept.predicted["step_ms"] * 1e3)
    # The pages hold the slots of a replica at the workload's mean context of 650 tokens.
    assert kept.num_pages * kept.page_len >= kept.rows * kept.mesh.num_micro_batches * 650
    table = read_parquet(tmp_path / "plan.parquet")
    assert {"disaggregated", "wide", "tensor"} <= set(table["mode"])
    best = table.loc[table[table["mode"] == "disaggregated"]["tokens_s_per_price"].idxmax()]
    assert kept.mesh.directions == best["schedule"] == "one"
    assert kept.mesh.num_micro_batches == best["num_micro_batches"]
    assert table["tokens_s_per_price"].max() == pytest.approx(kept.predicted["tokens_s_per_price"])


def test_says_when_not_to_disaggregate(plan, tmp_path):
    code, out, _ = plan("--model", "qwen3-30b-a3b", "--gpus", "h100:8", "--slo-ms", "30", "--objective", "gpu")
    assert code == 0 and "do not disaggregate:" in out
    kept = read_plan(tmp_path / "plan.json")
    assert kept.advice == "do not disaggregate" and kept.colocated["gain"] < 1


def test_explains_rows(plan):
    _, out, _ = plan(
        "--model", "dbrx", "--gpus", "h20:16,l40s:16", "--explain", "expert=4,expert_gpu=l40s,expert_tensor=1"
    )
    assert "configurations with expert=4" in out and "its experts need" in out


def test_longer_traces_and_precisions_change_the_plan(plan, tmp_path):
    args = ("--model", "dbrx", "--gpus", "h200:16", "--objective", "gpu")
    rates = []
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"prompt_len": 9000, "output_len": 500}\n')
    for more in ((), ("--trace", str(trace)), ("--weights", "fp8", "--kv", "fp8"), ("--expert-imbalance", "1.5"),
                 ("--length-sigma", "1.0"), ("--transport", "ppermute"), ("--routing", "drawn")):  # fmt: skip
        assert plan(*args, *more)[0] == 0
        rates.append(read_plan(tmp_path / "plan.json").predicted["tokens_s_per_gpu"])
    base, long, fp8, skewed, spread, padded, drawn = rates
    assert long < base and fp8 > 1.2 * base and skewed < base and spread < base and padded < base and drawn < base


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", "mixtral", "--gpus", "h20:8"), "did you mean mixtral-8x7b"),
        (("--model", "dbrx", "--gpus", "h21:8"), "expected one of a800"),
        (("--model", "dbrx", "--gpus", "h20:8", "--slo-ms", "3"), r"--slo-ms: expected at least [\d.]+ ms, the least"),
        (("--model", "deepseek-v3", "--gpus", "l40s:8"), "at least: l40s: 1 for attention and 32 for experts"),
        (("--model", "dbrx", "--gpus", "h20:1"), "expected enough memory for the 263 GB"),
        (("--model", "dbrx", "--gpus", "h20:8", "--slo-ms", "-1"), "expected a positive time"),
        (("--model", "dbrx", "--gpus", "h20:8", "--trace", "/nowhere"), "/nowhere"),
        (("--model", "dbrx", "--gpus", "h20:8", "--explain", "colour=1"), "expected columns of the table"),
    ],
)
def test_bad_requests_are_answered(plan, words, message):
    code, _, err = plan(*words)
    assert code == (1 if "least" in message or "memory" in message else 2)
    assert re.search(message, err), err


def test_the_needed_gpus_suffice(plan):
    """The answer to a model that does not fit is true: with that many it does."""
    _, _, err = plan("--model", "deepseek-v3", "--gpus", "l40s:8", "--slo-ms", "500")
    attention, experts = map(int, re.search(r"l40s: (\d+) for attention and (\d+) for experts", err).groups())
    total = attention + experts
    assert plan("--model", "deepseek-v3", "--gpus", f"l40s:{total}", "--slo-ms", "500")[0] == 0
    assert plan("--model", "deepseek-v3", "--gpus", f"l40s:{total - 1}", "--slo-ms", "500")[0] == 1


def test_a_histogram_places_experts(plan, tmp_path):
    """Skewed traffic: replicas and a placement by it do better than the default under the same traffic."""
    counts = [2000, 1500] + [100] * 14
    path = tmp_path / "counts.json"
    path.write_text(json.dumps(counts))
    args = ("--model", "dbrx", "--gpus", "h20:8,a800:16")
    assert plan(*args, "--histogram", str(path))[0] == 0
    placed = read_plan(tmp_path / "plan.json")
    placement = placed.mesh.placement
    assert placement is not None and len(placement.replicas(0)) > len(placement.replicas(5))
    share = [sum(counts[e] / len(placement.replicas(e)) for e in node) for node in placement.nodes]
    skew = max(share) / (sum(counts) / len(share))
    default = max(counts[2 * n] + counts[2 * n + 1] for n in range(8)) / (sum(counts) / 8)
    assert skew < 0.5 * default
    path.write_text("[1, 2]")
    code, _, err = plan(*args, "--histogram", str(path))
    assert code == 2 and "expected 16 counts" in err
    path.write_text('["many"]')
    assert plan(*args, "--histogram", str(path))[0] == 2


def test_plots(plan, tmp_path):
    folder = tmp_path / "plots"
    code, out, _ = plan("--model", "dbrx", "--gpus", "h20:8,l40s:16", "--plot", str(folder))
    assert code == 0 and out.count("drew ") == 4
    for name in ("throughput.png", "pareto.png", "timeline.png"):
        data = (folder / name).read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) > 10_000
    trace = json.loads((folder / "timeline.json").read_text())
    stages = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    m = read_plan(tmp_path / "plan.json").mesh.num_micro_batches
    assert len(stages) == 4 * 4 * m + m  # four layers on four lanes, and the heads
    assert {e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"} == {
        "attention", "dispatch", "expert", "combine",
    }  # fmt: skip
    for lane in range(4):  # one thing at a time on a lane
        spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in stages if e["tid"] == lane)
        assert all(a[1] <= b[0] + 1e-6 for a, b in itertools.pairwise(spans))
