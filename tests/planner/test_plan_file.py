"""A plan survives its file, and files that are not plans are refused by what they lack."""

import dataclasses
import json

import pytest

from jmoe.planner.plan_file import Plan, read_plan, write_plan
from jmoe.sharding.mesh_config import MeshConfig
from jmoe.sharding.placement import ExpertPlacement

PLAN = Plan(
    model="mixtral-8x22b",
    mesh=MeshConfig(3, 4, 3, 2, 1, ExpertPlacement.of([[0, 1], [2], [3], [0]]), "one"),
    rows=64,
    num_pages=1000,
    page_len=16,
    gpus={"attention": "h20", "expert": "l40s"},
    num_cells=2,
    precision={"weight_bytes": 2.0, "kv_bytes": 2.0, "dispatch_bytes": 2.0, "combine_bytes": 2.0},
    slo_ms=150.0,
    objective="price",
    predicted={"step_ms": 100.0},
    advice="disaggregate",
    colocated={"mode": "wide", "gain": 1.5},
    why="because",
)


def test_round_trip(tmp_path):
    for plan in (PLAN, dataclasses.replace(PLAN, mesh=MeshConfig(2, 2))):
        write_plan(plan, tmp_path / "plan.json")
        assert read_plan(tmp_path / "plan.json") == plan


def change(**fields):
    return json.dumps(json.loads(PLAN.to_json()) | fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected JSON"),
        ("[]", "another file"),
        (change(version=2), "another file"),
        (change(colour=1), "expected the fields"),
        (change(mesh={"attention": 0}), "expected at least 1"),
        (change(mesh={"colour": 1}), "expected the fields of MeshConfig"),
        (change(mesh={"expert": 2, "placement": {"nodes": [[0]]}}), "expected 2 nodes"),
    ],
)
def test_bad_files(text, message):
    with pytest.raises(ValueError, match=message):
        Plan.from_json(text)


def test_a_plan_with_nan_is_not_written():
    with pytest.raises(ValueError, match="JSON compliant"):
        dataclasses.replace(PLAN, predicted={"step_ms": float("nan")}).to_json()
