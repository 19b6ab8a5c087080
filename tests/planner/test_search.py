"""The vectorised search against a slow loop that shares none of its array code, and the questions put to its table."""

import itertools

import numpy as np
import pytest

from jmoe.planner.deployment import Deployment, Problem, largest_rows
from jmoe.planner.formulas import total_time
from jmoe.planner.hardware import load_catalogue
from jmoe.planner.model_shape import load_model_shape
from jmoe.planner.performance import ExchangeModel, Memory, Roofline, distinct_nodes
from jmoe.planner.search import SearchOptions, search
from jmoe.planner.simulator import ConstantTimes, simulate
from jmoe.planner.table import OBJECTIVES, explain, find, pareto, rank, read_parquet, write_parquet
from jmoe.planner.workload import Workload, busiest_replica
from jmoe.schedule import build_schedule

KINDS = load_catalogue()
WORK = Workload((2000, 500), (100, 400), slo_s=0.12)


def problem(model="dbrx", pool=None, work=WORK):
    return Problem(load_model_shape(model), KINDS, pool or {"h20": 12, "l40s": 10}, work)


def slow_step(task, attention, expert, tensor_a, tensor_e, m, kind, replicas, nodes, rows):
    """One cell, scalars only, written from the definitions."""
    model, work = task.model, task.workload
    times = Roofline(model, KINDS[attention], KINDS[expert], task.precision)
    context = work.mean_context * float(busiest_replica(work.context_variance, work.mean_context, rows, replicas))
    t_a = float(times.attention_s(rows, context, tensor_a))
    local = -(-model.num_experts // nodes)
    copies = max(1, nodes // model.num_experts)
    share = min(1.0, local / (model.num_experts * copies))
    touched = float(distinct_nodes(model.num_experts, model.num_experts_per_tok, nodes))
    fuller = max(1.0, share * nodes)
    tokens = rows * replicas * min(1.0, touched * fuller / nodes)
    t_e = float(times.expert_s(rows * replicas * model.num_experts_per_tok * share, local, tensor_e, tokens))
    one_domain = attention == expert and replicas * tensor_a + nodes * tensor_e <= KINDS[attention].scale_up_domain
    exchange = ExchangeModel(model, KINDS[attention], KINDS[expert], task.precision)
    t_c = float(exchange.exchange_s(rows, replicas, nodes, tensor_a, tensor_e, fuller, one_domain))
    head = float(times.head_s(rows, tensor_a))
    total = float(total_time(kind, model.num_moe_layers, m, t_a, t_e, t_c))
    return total + head + (m - 1) * max(0.0, head - max(t_a, t_e, t_c))


def test_every_row_of_a_small_search():
    """All cells of a small space: the batch is the largest that memory and SLO allow, the step is right."""
    task = problem()
    options = SearchOptions(tensor_sizes=(1, 2), schedules=((2, "one"), (4, "both")), num_replicas=(1, 3, 5))
    table = search(task, options)
    memory = Memory(task.model)
    seen = 0
    for row in table.itertuples():
        cell = (row.attention_gpu, row.expert_gpu, row.attention_tensor, row.expert_tensor, row.num_micro_batches,
                row.schedule, row.attention, row.expert)  # fmt: skip
        need = -(-16 // row.expert) * memory.expert_bytes / row.expert_tensor
        if need > KINDS[row.expert_gpu].usable_bytes:
            assert row.status == "expert memory" and row.need == pytest.approx(need / 1e9)
            continue
        tokens = float(memory.max_kv_tokens(KINDS[row.attention_gpu], row.attention_tensor))
        most = min(4096, int(tokens // (row.num_micro_batches * WORK.mean_context)))
        if most < 1:
            assert row.status == "attention memory"
            continue
        if row.status == "slo":
            assert slow_step(task, *cell, 1) > WORK.slo_s
            continue
        seen += 1
        assert row.status == "ok"
        assert row.step_s == pytest.approx(slow_step(task, *cell, row.rows), rel=1e-9)
        assert row.step_s <= WORK.slo_s and 1 <= row.rows <= most
        assert row.limit == ("KV memory" if row.rows == most else "SLO")
        if row.rows < most:
            assert slow_step(task, *cell, row.rows + 1) > WORK.slo_s
        assert row.tokens_s == pytest.approx(row.rows * row.attention * row.num_micro_batches / row.step_s)
        gpus = {"h20": 0, "l40s": 0}
        gpus[row.attention_gpu] += row.attention * row.attention_tensor
        gpus[row.expert_gpu] += row.expert * row.expert_tensor
        assert row.num_gpus == sum(gpus.values()) and all(gpus[k] <= task.pool[k] for k in gpus)
        assert row.price == pytest.approx(gpus["h20"] * 1.85 + gpus["l40s"] * 1.08)
        assert row.watts == gpus["h20"] * 500 + gpus["l40s"] * 350
    assert seen > 100
    shapes = {(r.attention_gpu, r.expert_gpu, r.attention, r.expert) for r in table.itertuples()}
    assert {a for a, *_ in shapes} == {"h20", "l40s"} and len({e for *_, e in shapes}) >= 5


def test_any_ratio_is_tried_and_nothing_better_is_left_out():
    """N left out of the search has as many experts on its fullest node as a smaller N that is in it."""
    task = problem(pool={"h20": 24})
    table = search(task, SearchOptions(tensor_sizes=(1,), schedules=((3, "both"),)))
    assert set(table["attention"]) == set(range(1, 24))
    best = rank(table, "gpu").iloc[0]["tokens_s_per_gpu"]
    for m, n in itertools.product(range(1, 24), range(1, 24)):
        if m + n > 24:
            continue
        cell = Deployment(task, KINDS["h20"], KINDS["h20"], 1, 1, 3, "both", np.array([m]), np.array([n]))
        tokens = float(Memory(task.model).max_kv_tokens(KINDS["h20"], 1))
        if -(-16 // n) * Memory(task.model).expert_bytes > KINDS["h20"].usable_bytes:
            continue
        most = np.array([int(tokens // (3 * WORK.mean_context))])
        rows = int(largest_rows(cell.step, most, WORK.slo_s)[0])
        if rows:
            step = float(cell.step(np.array([rows]))[0])
            assert m * 3 * rows / step / (m + n) <= best * (1 + 1e-9)


def test_replicated_experts_share_the_rows():
    """N = 2 E: a node has one expert and half of its rows; N = E + 1 helps nobody."""
    task = problem("mixtral-8x22b")
    nodes = np.array([8, 9, 16])
    cell = Deployment(task, KINDS["h20"], KINDS["l40s"], 1, 1, 3, "one", np.array([8]), nodes)
    np.testing.assert_allclose(cell.node_share, [1 / 8, 1 / 8, 1 / 16])
    _, expert, _ = cell.stages(np.array([2048]))
    assert expert[2] == pytest.approx(expert[0] / 2, rel=0.05) and expert[1] == pytest.approx(expert[0])


def test_dense_layers_and_mla_are_priced():
    """DeepSeek-V3: a step is longer than its 58 MoE layers by three dense layers a micro-batch."""
    task = problem("deepseek-v3", {"h200": 64}, Workload((4000,), (1,), slo_s=1.0))
    cell = Deployment(task, KINDS["h200"], KINDS["h200"], 1, 1, 3, "both", np.array([8]), np.array([32]))
    rows = np.array([32])
    a, e, c = cell.stages(rows)
    times = Roofline(task.model, KINDS["h200"], KINDS["h200"])
    pipeline = total_time("both", 58, 3, a, e, c)
    rest = cell.step(rows) - pipeline
    head = times.head_s(rows, 1)
    heads = head + 2 * np.maximum(head - max(a, e, c), 0)
    assert rest == pytest.approx(9 * times.dense_s(rows, 4000.0, 1) + heads, rel=1e-9)


@pytest.mark.parametrize(
    ("m", "kind"),
    [(1, "one"), (2, "one"), (3, "one"), (3, "both"), (4, "both"), (6, "both"), (2, "separate"), (3, "separate")],
)
def test_the_simulator_agrees_with_the_best_plan_of_every_schedule(m, kind):
    """The step that the search prices, head included, is what walking the schedule takes."""
    task = problem("mixtral-8x22b", {"h20": 16, "l40s": 32})
    best = rank(search(task, SearchOptions(schedules=((m, kind),))), "gpu").iloc[0]
    times = Roofline(task.model, KINDS[best["attention_gpu"]], KINDS[best["expert_gpu"]])
    head = float(times.head_s(best["rows"], int(best["attention_tensor"])))
    constant = ConstantTimes(best["attention_s"], best["expert_s"], best["exchange_s"], head)
    walked = simulate(build_schedule(task.model.num_moe_layers, m, kind), constant).total_s
    assert best["step_s"] == pytest.approx(walked, rel=0.005)


def test_imbalance_makes_experts_and_exchange_slower():
    even, skewed = (problem(work=Workload((500,), (100,), expert_imbalance=i)) for i in (1.0, 1.5))
    cells = [
        Deployment(task, KINDS["h20"], KINDS["l40s"], 1, 1, 3, "one", np.array([32]), np.array([16]))
        for task in (even, skewed)
    ]
    stages = [cell.stages(np.array([64])) for cell in cells]
    assert stages[1][0] == stages[0][0]
    assert stages[1][1] > 1.3 * stages[0][1]
    assert stages[1][2] > 1.3 * stages[0][2]


@pytest.mark.parametrize("most", [0, 1, 2, 7, 64, 1000])
def test_largest_rows_by_hand(most):
    for limit in (0, 1, 5, 63, 64, 65, 2000):
        got = largest_rows(lambda rows: rows.astype(float), np.array([most]), limit + 0.5)
        assert got == [min(most, limit)]


def test_pareto_against_all_pairs(tmp_path):
    table = search(problem(), SearchOptions(tensor_sizes=(1,), num_replicas=(1, 2, 4, 8)))
    good = table[table["status"] == "ok"]
    for cost, gain in (("step_s", "tokens_s_per_gpu"), ("price", "tokens_s")):
        front = pareto(table, cost, "gpu")
        points = good[[cost, gain]].to_numpy()
        beaten = [bool(((points[:, 0] <= c) & (points[:, 1] >= g) & ((points[:, 0] < c) | (points[:, 1] > g))).any())
                  for c, g in points]  # fmt: skip
        expected = {tuple(p) for p, lost in zip(points, beaten, strict=True) if not lost}
        assert {tuple(p) for p in front[[cost, gain]].to_numpy()} == expected
    path = tmp_path / "table.parquet"
    write_parquet(table, path)
    assert len(read_parquet(path)) == len(table)
    assert (read_parquet(path)["status"] == table["status"].astype(str)).all()


def test_pareto_keeps_one_of_equals():
    import pandas

    table = pandas.DataFrame(
        {"status": ["ok"] * 4 + ["slo"], "step_s": [1.0, 2.0, 2.0, 3.0, 0.5], "tokens_s_per_gpu": [5.0, 7, 7, 7, 9]}
    )
    assert pareto(table, "step_s", "gpu")["step_s"].tolist() == [1.0, 2.0]


def test_why_was_it_rejected_and_what_is_second():
    task = problem()
    table = search(task)
    ranked = rank(table, "price")
    assert ranked["tokens_s_per_price"].is_monotonic_decreasing
    best, second = ranked.iloc[0], ranked.iloc[1]
    assert explain(best, task, best, "price").startswith("best; batch held by")
    behind = 1 - second[OBJECTIVES["price"]] / best[OBJECTIVES["price"]]
    assert explain(second, task, best, "price").startswith(f"{behind:.1%} behind")
    rejected = find(table, status="expert memory", expert_gpu="l40s", expert_tensor=1).iloc[0]
    assert "rejected: its experts need" in explain(rejected, task) and "43.2 usable" in explain(rejected, task)
    strict = problem(work=Workload((2000,), (100,), slo_s=0.004))
    slow = search(strict, SearchOptions(tensor_sizes=(1,)))
    assert (slow["status"] != "ok").all()
    assert "the SLO is 4 ms" in explain(find(slow, status="slo").iloc[0], strict)
    with pytest.raises(ValueError, match="expected columns of the table"):
        find(table, colour=1)


def test_attention_that_does_not_fit_is_told_apart():
    task = problem("deepseek-v3", {"l20": 64, "h200": 64})
    table = search(task, SearchOptions(tensor_sizes=(1,), num_nodes=(256,), num_replicas=(1,)))
    assert not len(table)  # 256 nodes are more than the pool has
    table = search(task, SearchOptions(tensor_sizes=(1,), num_nodes=(32,), num_replicas=(2,), schedules=((1, "one"),)))
    small = find(table, attention_gpu="l20", expert_gpu="h200")
    assert (small["status"] == "attention memory").all() or (small["status"] == "ok").all()
    long = problem("deepseek-v3", {"l20": 64, "h200": 64}, Workload((200_000,), (10,), 1.0))
    table = search(long, SearchOptions(tensor_sizes=(1,), num_nodes=(32,), num_replicas=(2,), schedules=((1, "one"),)))
    assert "do not fit" in explain(find(table, attention_gpu="l20", status="attention memory").iloc[0], long)


def test_a_search_over_two_kinds_stays_small():
    """128 GPUs of two kinds: some ten thousand configurations, not millions."""
    assert 10_000 < len(search(problem("mixtral-8x22b", {"h20": 64, "l40s": 64}))) < 200_000


def test_what_is_built_is_priced_pushes_inside_a_domain_and_chains_beyond():
    """A cell of one kind that fits its scale-up domain is priced as roles that push, one kernel a stage."""
    task = problem("mixtral-8x22b", {"h100": 16})
    table = search(task)
    inside = table["attention_gpus"] + table["expert_gpus"] <= KINDS["h100"].scale_up_domain
    assert inside.any() and not inside.all()
    assert set(table[inside]["schedule"]) == {"separate"} and set(table[~inside]["schedule"]) == {"one", "both"}
    assert set(search(task, SearchOptions(transport="ppermute"))["schedule"]) == {"one", "both"}
    one = np.array([1])
    for schedule, added in (("separate", KINDS["h100"].kernels.push_us), ("one", 0.0)):
        stages = Deployment(task, KINDS["h100"], KINDS["h100"], 4, 4, 3, schedule, one, one).stages(np.array([64]))
        free = Deployment(task, KINDS["h100"], KINDS["h100"], 4, 4, 3, "both", one, one).stages(np.array([64]))
        assert [float(a[0] - b[0]) * 1e6 for a, b in zip(stages, free, strict=True)] == pytest.approx([added, added, 0])
