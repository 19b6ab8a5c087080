"""Moments of a decode slot against drawn requests, and traces."""

import numpy as np
import pytest

from jmoe.planner.workload import Workload, busiest_replica


def test_moments_are_those_of_a_slot_at_a_random_step():
    work = Workload.lognormal(300, 60, 0.7, size=257)
    rng = np.random.default_rng(0)
    # Lay the requests end to end in one slot and look at steps at random.
    contexts = np.concatenate([p + np.arange(d) for p, d in zip(work.prompt_lens, work.output_lens, strict=True)])
    seen = rng.choice(contexts, 400_000)
    assert work.mean_context == pytest.approx(contexts.mean(), rel=1e-12)
    assert work.context_variance == pytest.approx(contexts.var(), rel=1e-9)
    assert seen.mean() == pytest.approx(work.mean_context, rel=0.01)


def test_the_papers_workload():
    assert Workload().mean_context == 571 + 158 / 2
    assert Workload().max_len == 730


def test_busiest_replica_against_draws():
    rng = np.random.default_rng(1)
    mean, std, rows = 500.0, 200.0, 64
    for replicas in (2, 8, 64):
        loads = rng.normal(mean * rows, std * rows**0.5, (200_000, replicas))
        expected = (loads.max(1) / (rows * mean)).mean()
        assert busiest_replica(std**2, mean, rows, replicas) - 1 == pytest.approx(expected - 1, rel=0.055)
    assert busiest_replica(std**2, mean, rows, 1) == 1.0


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_traces(tmp_path, suffix):
    path = tmp_path / f"trace{suffix}"
    if suffix == ".csv":
        path.write_text("prompt_len,output_len\n10,3\n20,5\n")
    else:
        path.write_text('{"prompt_len": 10, "output_len": 3}\n\n{"prompt_len": 20, "output_len": 5}\n')
    work = Workload.from_trace(path, slo_s=0.05)
    assert (work.prompt_lens, work.output_lens, work.slo_s) == ((10, 20), (3, 5), 0.05)


def test_bad_traces_name_the_row(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("prompt_len,output_len\n10,3\n20,many\n")
    with pytest.raises(ValueError, match="row 3: expected integers"):
        Workload.from_trace(path)
    path.write_text("prompt_len,output_len\n")
    with pytest.raises(ValueError, match="at least one row"):
        Workload.from_trace(path)


@pytest.mark.parametrize(
    "bad",
    [
        {"prompt_lens": ()}, {"output_lens": (0,)}, {"prompt_lens": (-1,)}, {"slo_s": 0.0},
        {"expert_imbalance": 0.9}, {"prompt_lens": (1, 2)}, {"slo_s": float("nan")},
    ],
)  # fmt: skip
def test_bad_workloads(bad):
    with pytest.raises(ValueError, match="expected"):
        Workload(**bad)
