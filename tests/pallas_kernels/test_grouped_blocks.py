"""The block sizes that the grouped products choose, and what a thread block finds of its items."""

import jax.numpy as jnp
import pytest

from jmoe.pallas_kernels import grouped_matmul_mosaic as mosaic
from jmoe.pallas_kernels.grouped_blocks import choose_blocks

# experts, choices a token, hidden, width: Qwen3-30B-A3B, a node of DeepSeek-V3, DBRX, Mixtral-8x22B, and odd ones
MODELS = [(128, 8, 2048, 768), (32, 1, 7168, 2048), (16, 4, 6144, 10752), (8, 2, 6144, 16384), (3, 1, 192, 320)]


def product(rows, num_experts, num_in, num_out, parts, small, blocks):
    return mosaic.Product(
        rows, num_in, num_out, num_experts, parts, small, jnp.dtype(jnp.bfloat16), blocks, 132, False, False
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
            mosaic._check_blocks(shape)
            assert shape.stages >= 3
            average = pairs / num_experts
            assert blocks.block_rows <= max(16, 4 * average), "rows of a block that hold none"
            assert blocks.block_rows >= min(64, average), "weights that are read again"


def test_padding_is_not_counted():
    """16 tokens of 8 choices among 128 experts stand in 1,024 padded rows; one expert has one row on average."""
    assert choose_blocks(128, 128, 2048, 768, 2, False).block_rows == 8
