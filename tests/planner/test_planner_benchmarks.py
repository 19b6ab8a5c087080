"""The issue's bars that need no GPU, as far as they are met; the benchmarks print every row."""

import importlib.util
import pathlib
import sys

import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def no_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmark"])


def test_micro_batches_gain_what_the_paper_measured():
    ablation = load("planner_ablation")
    gains = {(kind, model): (first, second) for kind, model, first, second in ablation.main()}
    for model, (_, published) in ablation.PUBLISHED.items():
        for kind in ("separate", "one"):
            first, second = gains[kind, model]
            assert second == pytest.approx(published, rel=0.01)
            assert first == pytest.approx(1.9, rel=0.06)


def test_fastafd_within_a_tenth():
    for _, published, predicted in load("planner_fastafd").main():
        assert predicted == pytest.approx(published, rel=0.10)


def test_kernels_and_steps_measured_on_h100():
    """Within 25 % everywhere and 10 % in most: kernels from 16 to 4,096 tokens, attention, whole steps."""
    errors = [abs(predicted / measured - 1) for _, measured, predicted in load("planner_h100").main()]
    assert max(errors) < 0.25
    assert sum(error <= 0.10 for error in errors) >= 0.75 * len(errors)


def test_optimal_ratio_within_a_tenth():
    """The exact rule against drawn requests, 10 of the 25 cases; the paper's two rules miss some of them."""
    errors = load("planner_ratio").main(["--steps", "200", "--gpus", "h200", "910c"])
    assert len(errors["exact"]) == 10 and max(errors["exact"]) <= 0.10
    assert max(errors["mean-field"]) > 0.10 and max(errors["Gaussian"]) > 0.10


def test_headline_rows():
    """What holds with constants fixed beforehand; docs/planner.md explains the rows that miss."""
    headline = load("planner_headline")
    rows = headline.main(["--runs", "registered"])["registered"]
    near = {row.name for row in rows if row.counts and abs(row.error) <= 0.15}
    within, outside, every = headline.count(rows)
    assert every == 10 and within >= 5 and outside <= 3
    assert {name for name in near if "TensorRT-LLM" in name and "per GPU" in name} == {
        f"per GPU, {model}, over TensorRT-LLM" for model in ("mixtral-8x22b", "dbrx", "scaled-moe-317b")
    }
