"""Measured times: interpolation, its edges, the file, and a search that prices with it."""

import json

import numpy as np
import pytest

from jmoe.planner.deployment import Problem
from jmoe.planner.hardware import load_catalogue
from jmoe.planner.measured_grid import Grid
from jmoe.planner.model_shape import load_model_shape
from jmoe.planner.performance import ExchangeModel, Precision, Roofline
from jmoe.planner.profile_file import (
    MeasuredTimes,
    Profile,
    check_profile,
    points_to_measure,
    profile_from_json,
    profile_to_json,
    read_profiles,
)
from jmoe.planner.search import SearchOptions, search
from jmoe.planner.table import find, rank

KINDS = load_catalogue()
MODEL = load_model_shape("qwen3-30b-a3b")
H100 = KINDS["h100"]
ROOFLINE = Roofline(MODEL, H100, H100)


def sampled(slower=1.0):
    """A profile "measured" on the roofline, all times `slower` times as long."""
    points = points_to_measure(2048, 16384, 1 << 26)
    rows, context, sizes = (np.array(points[n], float) for n in ("rows", "context", "num_bytes"))
    local = np.array([8.0, 16, 32, 64, 128])
    grids = {
        "attention_s": Grid(
            {"tensor": (1,), "context": context, "rows": rows},
            slower * ROOFLINE.attention_s(rows, context[:, None], 1)[None],
        ),
        "expert_s": Grid(
            {"tensor": (1,), "num_local_experts": local, "rows": rows},
            slower * ROOFLINE.expert_s(rows, local[:, None], 1)[None],
        ),
        "exchange_s": Grid({"num_bytes": sizes}, slower * (8e-6 + sizes / H100.scale_up_bytes_s)),
        "head_s": Grid({"tensor": (1,), "rows": rows}, slower * ROOFLINE.head_s(rows, 1)[None]),
    }
    return Profile("h100", "NVIDIA H100", "2026-11-22", {"jax": "0.11.2"}, "qwen3-30b-a3b", Precision(), grids)


def test_linear_in_between_and_at_the_edges():
    grid = Grid({"a": (0.0, 10.0), "b": (1.0, 2.0, 4.0)}, np.array([[1.0, 2.0, 4.0], [11.0, 12.0, 14.0]]))
    assert grid.at(a=0, b=1) == 1.0 and grid.at(a=10, b=4) == 14.0
    assert grid.at(a=5, b=3) == 8.0
    assert grid.at(a=5, b=0.5) == 6.0  # below the first point: held
    assert grid.at(a=20, b=8) == 28.0  # the last segments go on
    assert grid.at(a=20, b=17) == np.inf  # more than four times past the last point: unknown
    values = grid.at(a=np.array([0.0, 10.0])[:, None], b=np.array([1.0, 2.0, 4.0]))
    np.testing.assert_array_equal(values, grid.values)


def test_a_single_point_is_known_only_there():
    grid = Grid({"tensor": (2,), "rows": (1, 2)}, np.array([[1.0, 2.0]]))
    assert grid.at(tensor=2, rows=1.5) == 1.5
    assert grid.at(tensor=1, rows=1) == np.inf


@pytest.mark.parametrize(
    ("axes", "values"),
    [({"a": (2, 1)}, [1, 1]), ({"a": (1, 2)}, [1]), ({"a": (1, 2)}, [1, 0]), ({"a": ()}, []), ({"a": (-1, 2)}, [1, 1])],
)
def test_bad_grids(axes, values):
    with pytest.raises(ValueError, match="expected"):
        Grid(axes, np.array(values, float))


def test_interpolation_follows_the_roofline():
    times = MeasuredTimes(ROOFLINE, {"h100": sampled()})
    rng = np.random.default_rng(0)
    rows, context = rng.integers(1, 2000, 200), rng.integers(128, 16000, 200)
    np.testing.assert_allclose(times.attention_s(rows, context, 1), ROOFLINE.attention_s(rows, context, 1), rtol=0.05)
    np.testing.assert_allclose(times.expert_s(rows, 32, 1), ROOFLINE.expert_s(rows, 32, 1), rtol=0.12)
    np.testing.assert_allclose(times.head_s(rows, 1), ROOFLINE.head_s(rows, 1), rtol=0.05)


def test_exchange_is_measured_inside_a_domain_and_modelled_over_nics():
    times = MeasuredTimes(ROOFLINE, {"h100": sampled(slower=3.0)})
    exchange = ExchangeModel(MODEL, H100, H100)
    args = (np.array([64]), np.array([2]), np.array([4]), 1, 1, 1.0)
    assert times.exchange_s(exchange, *args, False) == exchange.exchange_s(*args, False)
    assert times.exchange_s(exchange, *args, True) == pytest.approx(3 * exchange.exchange_s(*args, True), rel=0.01)


def test_file_round_trip(tmp_path):
    path = tmp_path / "h100.json"
    path.write_text(profile_to_json(sampled()))
    read = read_profiles([path])["h100"]
    assert (read.gpu, read.date, read.versions) == ("h100", "2026-11-22", {"jax": "0.11.2"})
    for name, grid in sampled().grids.items():
        np.testing.assert_array_equal(read.grids[name].values, grid.values)
        assert read.grids[name].axes == grid.axes
    assert read.tensor_sizes == (1,)
    with pytest.raises(ValueError, match="got a second for h100"):
        read_profiles([path, path])


def test_bad_files():
    good = json.loads(profile_to_json(sampled()))
    cases = {
        "expected the fields": {k: v for k, v in good.items() if k != "device"},
        "version 1, got jmoe-profile 2": good | {"version": 2},
        "expected the axes": good | {"grids": good["grids"] | {"exchange_s": good["grids"]["head_s"]}},
        "expected attention_s, expert_s and exchange_s": good | {"grids": {"head_s": good["grids"]["head_s"]}},
    }
    for message, data in cases.items():
        with pytest.raises(ValueError, match=message):
            profile_from_json(json.dumps(data))
    with pytest.raises(ValueError, match="expected the fields"):
        profile_from_json("[1")
    with pytest.raises(ValueError, match="expected one of dbrx"):
        check_profile(sampled(), "dbrx", Precision())


def test_a_search_prices_with_the_profile():
    """Twice the times, half the throughput; tensor sizes that nobody measured are not chosen."""
    pool = {"h100": 8}
    best = []
    for profile in (None, sampled(1.0), sampled(2.0)):
        times = None
        if profile is not None:
            times = lambda a, e, p=profile: MeasuredTimes(Roofline(MODEL, a, e), {"h100": p})  # noqa: E731
        table = search(Problem(MODEL, KINDS, pool, times=times), SearchOptions(tensor_sizes=(1, 2)))
        best.append(rank(table, "gpu").iloc[0])
        if profile is not None:
            assert (find(table, attention_tensor=2)["status"] == "not measured").all()
    assert best[1]["tokens_s_per_gpu"] == pytest.approx(best[0]["tokens_s_per_gpu"], rel=0.1)
    assert best[2]["tokens_s_per_gpu"] == pytest.approx(best[1]["tokens_s_per_gpu"] / 2, rel=0.05)
