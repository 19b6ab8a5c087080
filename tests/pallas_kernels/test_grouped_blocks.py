"""The block sizes that the grouped products choose, and what a thread block finds of its items."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import pytest

from jmoe.pallas_kernels import grouped_blocks
from jmoe.pallas_kernels.block_table import TABLE, bucket, find_blocks
from jmoe.pallas_kernels.expert_products_mosaic import shape_of
from jmoe.pallas_kernels.grouped_blocks import choose_blocks
from jmoe.pallas_kernels.grouped_matmul import ExpertBlocks
from jmoe.pallas_kernels.grouped_product import Product, check_blocks
from jmoe.pallas_kernels.permute import num_padded_rows

# experts, choices a token, hidden, width: Qwen3-30B-A3B, a node of DeepSeek-V3, DBRX, Mixtral-8x22B, and odd ones
MODELS = [(128, 8, 2048, 768), (32, 1, 7168, 2048), (16, 4, 6144, 10752), (8, 2, 6144, 16384), (3, 1, 192, 320)]
MODELS += [(512, 10, 2048, 512)]  # Qwen3-Next: what is kept of each expert takes the place of a stage


def product(rows, num_experts, num_in, num_out, parts, small, blocks):
    split = "gated" if parts == 2 else "columns"
    return Product(
        rows, num_in, num_out, num_experts, parts, split, small, jnp.dtype(jnp.bfloat16), blocks, 132, False, False
    )


@pytest.mark.parametrize("model", MODELS, ids=str)
@pytest.mark.parametrize("tokens", [8, 16, 100, 512, 4096, 65536])
def test_what_is_chosen_runs(model, tokens):
    """It divides, and two stages of it and more fit shared memory; a group takes no more blocks than it must."""
    num_experts, k, hidden, width = model
    pairs = tokens * k
    for parts, num_in, num_out in ((2, hidden, width), (1, width, hidden)):
        for small in (False, True) if hidden % 128 == 0 and width % 128 == 0 else (False,):
            blocks = choose_blocks(pairs, num_experts, num_in, num_out, parts, small)
            shape = product(pairs + 8 * num_experts, num_experts, num_in, num_out, parts, small, blocks)
            check_blocks(shape)
            assert shape.stages >= 3
            average = pairs / num_experts
            assert blocks.block_rows <= max(16, 4 * average), "rows of a block that hold none"
            assert blocks.block_rows >= min(64, average), "weights that are read again"


@pytest.mark.parametrize("kind", ["NVIDIA H100", "NVIDIA H200"])
@pytest.mark.parametrize("model", MODELS, ids=str)
@pytest.mark.parametrize("tokens", [8, 16, 100, 512, 2304, 4096, 65536])
def test_what_is_chosen_for_both_products_runs(model, tokens, kind, monkeypatch):
    """By the table of a kind or by the estimate: equal stages of both products, three, or two large ones, at least."""
    num_experts, k, hidden, width = model
    monkeypatch.setattr(grouped_blocks, "find_blocks", functools.partial(find_blocks, kind=kind))
    for dtype in (jnp.bfloat16, jnp.float8_e4m3fn):
        blocks = grouped_blocks.expert_blocks(jnp.dtype(dtype), tokens * k, num_experts, hidden, width)
        if blocks is None:
            assert tokens > 100 or hidden == 192, "few rows are what the kernel is for"
            continue
        rows = jax.ShapeDtypeStruct((num_padded_rows(tokens, k, num_experts, 8), hidden), dtype)
        small = rows.dtype.itemsize == 1
        sizes = (num_experts, width, hidden) if small else (num_experts, hidden, width)
        shape = shape_of(rows, jax.ShapeDtypeStruct(sizes, dtype), blocks, 132, False)
        assert shape.gated.stages == shape.down.stages >= (2 if blocks.block_in == 256 or num_experts > 128 else 3)


def test_every_measured_entry_for_both_products_is_taken(monkeypatch):
    """Blocks that don't fit the models they were measured for would be passed over without a word."""
    monkeypatch.setattr(grouped_blocks, "find_blocks", functools.partial(find_blocks, kind="NVIDIA H200"))
    entries = json.loads(TABLE.read_text())["h200"]
    for dtype in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float8_e4m3fn)):
        met = {}
        for (num_experts, k, hidden, width), tokens in itertools.product(MODELS, [16, 128, 512, 4096]):
            shape = {"rows": tokens * k, "experts": num_experts, "hidden": hidden, "width": width}
            measured = entries[f"expert_products {dtype.name}"].get(bucket(shape))
            if measured is not None and hidden % 128 == 0:
                found = grouped_blocks.expert_blocks(dtype, tokens * k, num_experts, hidden, width)
                met[bucket(shape)] = found == ExpertBlocks(**measured["blocks"]) or met.get(bucket(shape), False)
        assert met == dict.fromkeys(met.keys() | entries[f"expert_products {dtype.name}"].keys(), True)


def test_padding_is_not_counted():
    """16 tokens of 8 choices among 128 experts stand in 1,024 padded rows; one expert has one row on average."""
    assert choose_blocks(128, 128, 2048, 768, 2, False).block_rows == 8
