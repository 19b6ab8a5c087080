"""The table of measured block sizes: found by bucket, dtype and device kind, and otherwise not."""

import jax.numpy as jnp
import pytest

from jmoe.pallas_kernels import grouped_blocks
from jmoe.pallas_kernels.block_table import TABLE, bucket, device_kind, find_blocks, write_blocks
from jmoe.pallas_kernels.grouped_matmul import GroupedBlocks

SHAPE = {"rows": 100, "experts": 8, "in": 2048}


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "table.json"
    found = {"out": 64, "stages": 4}
    write_blocks("product", jnp.bfloat16, SHAPE, found, us=12.3, measured="x", kind="NVIDIA H100 80GB HBM3", table=path)
    return path


def test_buckets_are_powers_of_two_whatever_the_order():
    assert bucket(SHAPE) == bucket(dict(reversed(SHAPE.items()))) == "experts=8 in=2048 rows=128"
    assert bucket({"rows": 0}) == bucket({"rows": 1}) == "rows=1"
    assert bucket({"rows": 129}) == "rows=256"


def test_device_kinds():
    names = ["NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA GH200 480GB", "NVIDIA B200", "NVIDIA A100-SXM4-80GB"]
    assert [device_kind(name) for name in names] == ["h100", "h200", "gh200", "b200", "a100"]


def test_without_a_gpu_the_kind_is_that_of_the_compile_target():
    assert device_kind() == "h100"


def test_what_was_written_is_found_in_its_bucket_only(table):
    assert find_blocks("product", jnp.bfloat16, SHAPE, table=table) == {"out": 64, "stages": 4}
    assert find_blocks("product", jnp.bfloat16, SHAPE | {"rows": 65}, table=table) == {"out": 64, "stages": 4}
    assert find_blocks("product", jnp.bfloat16, SHAPE | {"rows": 64}, table=table) is None
    assert find_blocks("product", jnp.float8_e4m3fn, SHAPE, table=table) is None
    assert find_blocks("another", jnp.bfloat16, SHAPE, table=table) is None


def test_a_gpu_of_the_same_processors_takes_what_its_own_kind_lacks(table):
    assert find_blocks("product", jnp.bfloat16, SHAPE, kind="NVIDIA H200", table=table) == {"out": 64, "stages": 4}
    assert find_blocks("product", jnp.bfloat16, SHAPE, kind="NVIDIA B200", table=table) is None
    write_blocks("product", jnp.bfloat16, SHAPE, {"out": 128}, us=1, measured="x", kind="NVIDIA H200", table=table)
    assert find_blocks("product", jnp.bfloat16, SHAPE, kind="NVIDIA H200", table=table) == {"out": 128}
    assert find_blocks("product", jnp.bfloat16, SHAPE, table=table) == {"out": 64, "stages": 4}


def test_a_caller_may_change_what_it_got(table):
    blocks = find_blocks("product", jnp.bfloat16, SHAPE, table=table)
    assert blocks is not None
    blocks["out"] = 1
    assert find_blocks("product", jnp.bfloat16, SHAPE, table=table) == {"out": 64, "stages": 4}


def test_grouped_blocks_that_do_not_divide_are_not_taken(monkeypatch):
    found = {"block_rows": 16, "block_out": 128, "block_in": 64, "consumers": 2}
    monkeypatch.setattr(grouped_blocks, "find_blocks", lambda *key: dict(found))
    shape = grouped_blocks.grouped_shape(1024, 128, 2048, 768)
    assert grouped_blocks.measured_blocks("grouped_matmul", jnp.bfloat16, shape) == GroupedBlocks(16, 128, 64, None, 2)
    for smaller in ({"out": 704}, {"in": 96}, {"rows": 8}):
        assert grouped_blocks.measured_blocks("grouped_matmul", jnp.bfloat16, shape | smaller) is None


def test_the_committed_table_says_where_its_figures_come_from():
    """Read as an op reads it: it is package data."""
    import json

    for kind, ops in json.loads(TABLE.read_text()).items():
        assert device_kind(kind) == kind
        for entries in ops.values():
            for entry in entries.values():
                assert entry["blocks"] and entry["us"] > 0 and entry["from"]
