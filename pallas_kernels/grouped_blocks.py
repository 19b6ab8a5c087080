"""Block sizes of the grouped products out of the table of measured ones."""

from collections.abc import Mapping
from typing import Any

from jmoe.pallas_kernels.block_table import find_blocks
from jmoe.pallas_kernels.grouped_matmul import GroupedBlocks


def grouped_shape(num_rows: int, num_experts: int, num_in: int, num_out: int) -> dict[str, int]:
    """The sizes that a choice of blocks depends on, as the table names them; rows as padded by `permute`."""
    return {"rows": num_rows, "experts": num_experts, "in": num_in, "out": num_out}


def measured_blocks(op: str, dtype: Any, shape: Mapping[str, int]) -> GroupedBlocks | None:
    """What the table has for `gated_grouped_matmul` or `grouped_matmul`, or None: the op's own heuristic.

    A bucket holds several shapes: blocks that don't divide this one's columns are not taken.
    """
    found = find_blocks(op, dtype, shape)
    if found is None or shape["out"] % found["block_out"] or shape["in"] % found["block_in"]:
        return None
    return GroupedBlocks(**found) if found["block_rows"] <= shape["rows"] else None
