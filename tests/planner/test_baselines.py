"""Colocated deployments by hand, and when they win."""

import dataclasses

import numpy as np
import pytest

from jmoe.planner.baselines import BaselineOptions, Engine, baselines, engines
from jmoe.planner.collectives import collective_s
from jmoe.planner.deployment import Problem
from jmoe.planner.hardware import load_catalogue
from jmoe.planner.model_shape import load_model_shape
from jmoe.planner.performance import Memory, Roofline
from jmoe.planner.table import find, rank
from jmoe.planner.workload import Workload

KINDS = load_catalogue()
A800 = KINDS["a800"]


def problem(model="mixtral-8x22b", pool=None, work=None):
    return Problem(load_model_shape(model), KINDS, pool or {"a800": 16}, work or Workload())


def test_tensor_parallel_step_by_hand():
    task = problem()
    engine = Engine(task, A800, "tensor", 8)
    rows = np.array([256])
    times = Roofline(task.model, A800, A800)
    layer = (
        times.attention_s(rows, 650.0, 8)
        + times.expert_products_s(rows * 2, 8, 8)
        + 20e-6
        + collective_s(A800, rows * 6144 * 2, 8)
    )
    assert engine.step(rows) == pytest.approx(56 * layer + times.head_s(rows, 8))
    memory = Memory(task.model)
    held = memory.attention_weight_bytes / 8 + 8 * memory.expert_bytes / 8
    assert engine.weight_bytes() == pytest.approx(held)
    assert engine.max_rows() == int((A800.usable_bytes - held) * 8 / memory.kv_token_bytes(8) / 650.0)


def test_pipeline_holds_a_batch_a_stage():
    task = problem()
    one, two = Engine(task, A800, "tensor", 8), Engine(task, A800, "pipeline", 8, 2)
    rows = np.array([128])
    assert two.step(rows) == pytest.approx(one.step(rows))
    # Both hosts' pages together hold the requests of both batches.
    tokens = (two.max_rows() * 2 * 650.0, (two.max_rows() + 1) * 2 * 650.0)
    held = tokens[0] * Memory(task.model).kv_token_bytes(8) / 16 + two.weight_bytes()
    assert held <= A800.usable_bytes < tokens[1] * Memory(task.model).kv_token_bytes(8) / 16 + two.weight_bytes()
    table = baselines(task, BaselineOptions(modes=("pipeline",), hosts=(2,)))
    assert (table["batch"] == table["rows"] * 2).all() and (table["num_gpus"] == 16).all()


@pytest.mark.parametrize(("kind", "requests", "hidden"), [("a800", 64, False), ("h200", 16, True)])
def test_overlap_hides_the_exchange_behind_compute(kind, requests, hidden):
    task, gpu = problem("qwen3-235b-a22b", {kind: 64}), KINDS[kind]
    apart, overlapped = (Engine(task, gpu, "wide", 1, 1, 64, 64, m) for m in (1, 2))
    rows = np.array([requests])
    attention, expert, exchange = apart.lanes(rows)
    compute = attention + expert
    layers = task.model.num_moe_layers
    head = Roofline(task.model, gpu, gpu).head_s(rows, 1)
    assert apart.step(rows) == pytest.approx(layers * (compute + 2 * exchange) + head)
    assert (2 * compute > 4 * exchange) == hidden and exchange > 0
    slower = max(2 * compute, 4 * exchange)[0]
    heads = head[0] + max(0.0, head[0] - compute[0])  # the second batch's head waits for the first one's
    assert overlapped.step(rows)[0] == pytest.approx(layers * slower + heads)


def test_batch_is_the_largest_within_memory_slo_and_cap():
    task = problem()
    for options in (BaselineOptions(), BaselineOptions(max_batch=100)):
        table = baselines(task, options)
        good = table[table["status"] == "ok"]
        assert len(good) > 10 and (good["step_s"] <= 0.150).all()
        if options.max_batch:
            assert (good["batch"] <= 100).all() and (find(good, mode="tensor")["limit"] == "batch cap").all()
    sliced = baselines(task, BaselineOptions(expert_parallel=False, modes=("tensor",)))
    assert (sliced["expert"] == 1).all()


def test_wide_goes_as_far_as_asked():
    task = problem("deepseek-v3", {"h200": 400})
    sizes = {e.num_gpus for e in engines(task, KINDS["h200"], BaselineOptions(modes=("wide",)))}
    assert max(sizes) == 320 and {8, 16, 32, 320} <= sizes
    table = baselines(task, BaselineOptions(modes=("wide",), max_wide=64))
    assert table["num_gpus"].max() == 64
    small = find(table, num_gpus=4)
    assert (small["status"] == "attention memory").all()


def test_what_does_not_fit_says_how_much_it_needs():
    table = baselines(problem("scaled-moe-317b", {"a800": 8}), BaselineOptions(modes=("tensor",)))
    assert (table["status"] == "attention memory").all()
    assert table["need"].max() == pytest.approx(2 * 317 / 8, rel=0.02)


def test_small_models_on_one_fast_host_are_better_left_whole():
    """Attention and experts of Qwen3-30B fit one GPU many times over: splitting only adds an exchange."""
    from jmoe.planner.search import search

    task = problem("qwen3-30b-a3b", {"h100": 8}, Workload(slo_s=0.03))
    split = rank(search(task), "gpu").iloc[0]["tokens_s_per_gpu"]
    whole = rank(baselines(task), "gpu").iloc[0]["tokens_s_per_gpu"]
    assert whole > 1.05 * split


def test_host_time_between_steps_counts_once_a_step():
    task = problem()
    slow = dataclasses.replace(A800, kernels=dataclasses.replace(A800.kernels, step_host_us=6500.0))
    rows = np.array([256])
    for mode, ranks, stages in (("tensor", 8, 1), ("pipeline", 8, 2), ("wide", 1, 1)):
        fast = Engine(task, A800, mode, ranks, stages).step(rows)
        assert Engine(task, slow, mode, ranks, stages).step(rows) == pytest.approx(fast + 6.5e-3)


def test_drawn_routing_costs_whole_experts_and_not_sliced_ones():
    rows = np.array([256])
    drawn = problem(work=Workload(drawn_routing=True))
    for nodes, costs in ((1, False), (8, True)):
        even = Engine(problem(), A800, "tensor", 8, 1, 1, nodes).lanes(rows)[1]
        assert (Engine(drawn, A800, "tensor", 8, 1, 1, nodes).lanes(rows)[1] > even) == costs
