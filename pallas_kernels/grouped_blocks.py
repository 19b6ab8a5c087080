"""Block sizes of the grouped products: out of the table of measured ones, or else by an estimate."""

import functools
import math
from collections.abc import Mapping
from typing import Any

from jmoe.pallas_kernels.block_table import find_blocks
from jmoe.pallas_kernels.choice import NUM_SMS
from jmoe.pallas_kernels.grouped_matmul import SCALED, ExpertBlocks, GroupedBlocks

UNIT = 8  # rows of one tile in shared memory
LARGEST = {(1, False): 152, (2, False): 168, (1, True): 96, (2, True): 96}  # rows: what the registers hold, and shared
# memory three stages of
MANY = {False: 64, True: 72}  # rows of a block above which two kernels are as good as one


def grouped_shape(num_rows: int, num_experts: int, num_in: int, num_out: int) -> dict[str, int]:
    """The sizes that a choice of blocks depends on, as the table names them; rows of all groups, without padding."""
    return {"rows": num_rows, "experts": num_experts, "in": num_in, "out": num_out}


def measured_blocks(op: str, dtype: Any, shape: Mapping[str, int]) -> GroupedBlocks | None:
    """What the table has for `gated_grouped_matmul` or `grouped_matmul`, or None: the op's own heuristic.

    A bucket holds several shapes: blocks that don't divide this one's columns are not taken.
    """
    found = find_blocks(op, dtype, shape)
    if found is None or shape["out"] % found["block_out"] or shape["in"] % found["block_in"]:
        return None
    return GroupedBlocks(**found) if found["block_rows"] <= -(-shape["rows"] // UNIT) * UNIT else None


def blocks_for(op: str, dtype: Any, shape: Mapping[str, int]) -> GroupedBlocks:
    """Measured ones, else `choose_blocks`."""
    found = measured_blocks(op, dtype, shape)
    if found is not None:
        return found
    parts, small = (2 if op == "gated_grouped_matmul" else 1), dtype.itemsize == 1
    return choose_blocks(shape["rows"], shape["experts"], shape["in"], shape["out"], parts, small)


def expert_blocks(dtype: Any, num_rows: int, num_experts: int, hidden: int, width: int) -> ExpertBlocks | None:
    """Of both products in one kernel: measured ones, else an estimate; None where none fits these sizes."""
    shape = {"rows": num_rows, "experts": num_experts, "hidden": hidden, "width": width}
    small = dtype.itemsize == 1
    found: Any = find_blocks("expert_products", dtype, shape)
    choices = [] if found is None else [ExpertBlocks(**found)]
    rows = choose_blocks(num_rows, num_experts, hidden, width, 2, small).block_rows
    if rows <= MANY[small]:
        choices += _expert_choices(rows, small)
    for blocks in choices:
        if fits_experts(blocks, num_rows, hidden, width) and _stages(blocks, shape, small) >= 2:
            return blocks
    return None


def _stages(blocks: ExpertBlocks, shape: Mapping[str, int], small: bool) -> int:
    """What shared memory holds of them."""
    from jmoe.pallas_kernels.grouped_product import both_products  # Mosaic GPU, where it is needed only

    return both_products(shape["rows"], shape["experts"], shape["hidden"], shape["width"], blocks, small)[0].stages


def _expert_choices(rows: int, small: bool) -> list[ExpertBlocks]:
    """In the order of preference: float8, read in pieces of 128 bytes, in deep stages; small items before large."""
    if small:
        ways = (True, False) if rows <= 64 else (False, True)  # rows twice in a stage would leave two stages
        return [ExpertBlocks(rows, SCALED, depth, None, 2, terms) for depth in (256, SCALED) for terms in ways]
    broad = [ExpertBlocks(rows, 128, 64, None, 2, terms) for terms in (True, False)]
    return [*broad, ExpertBlocks(rows, 64, 64, None, 1), ExpertBlocks(rows, 64, 64, None, 1, False)]


def fits_experts(blocks: ExpertBlocks, num_rows: int, hidden: int, width: int) -> bool:
    """Whether the blocks divide these sizes."""
    columns, depth = (1, 2) if blocks.terms else (2, 1)
    whole = blocks.block_rows == 64 * blocks.consumers and blocks.block_out == SCALED and not blocks.terms
    return (
        (whole or not blocks.rows_first)
        and blocks.block_rows <= -(-num_rows // UNIT) * UNIT
        and width % blocks.block_out == 0
        and hidden % (columns * blocks.block_out) == 0
        and hidden % blocks.block_in == 0
        and width % (depth * blocks.block_in) == 0
    )


@functools.cache
def choose_blocks(num_rows: int, num_experts: int, num_in: int, num_out: int, parts: int, small: bool) -> GroupedBlocks:
    """The block_rows of least estimated time where rows choose experts evenly; columns that fill the last wave.

    Args:
      num_rows: of all groups; where they are padded, the rows that mean something.
      num_experts, num_in, num_out: of the weights.
      parts: 2 for gate and up.
      small: float8.
    """
    sizes = _size_odds(num_rows, num_experts)
    most = min(LARGEST[parts, small], -(-num_rows // UNIT) * UNIT)
    block_rows = min(range(UNIT, most + 1, UNIT), key=lambda n: _clocks(n, sizes))
    depth = SCALED if small else 64
    if parts == 1 and num_out % 256 == 0 and (block_rows >= 72 or (num_in <= 2048 and block_rows <= 32)):
        return GroupedBlocks(block_rows, 256, depth, None, 2)  # many rows: fewer reads of them; short sums: fewer items
    narrow = GroupedBlocks(block_rows, 64, SCALED if num_in % SCALED == 0 else 64, None, 1)
    if num_out % 128:
        return narrow
    broad = GroupedBlocks(block_rows, 128, depth, None, 2)
    blocks = num_experts * sum(odds * -(-size // block_rows) for size, odds in sizes)
    items = [blocks * num_out / b.block_out for b in (broad, narrow)]
    shares = [n / (n + NUM_SMS / 2) for n in items]  # the last wave is half empty on average
    return narrow if block_rows <= 64 and shares[1] > shares[0] + 0.1 else broad


def _size_odds(num_rows: int, num_experts: int) -> list[tuple[int, float]]:
    """(size, odds) of a group that gets each of the rows by a chance of 1 in num_experts (Poisson)."""
    mean = num_rows / num_experts
    spread = 6 * math.sqrt(mean) + 6
    sizes = range(max(1, int(mean - spread)), min(num_rows, int(mean + spread)) + 1)
    odds = [math.exp(size * math.log(mean) - mean - math.lgamma(size + 1)) for size in sizes]
    return list(zip(sizes, odds, strict=True))


def _clocks(block_rows: int, sizes: list[tuple[int, float]]) -> float:
    """Of an SM, for 64 columns and 64 terms (float8: 128) of a group, on average.

    A block takes wgmma 2 clocks a row, or shared memory one a row and 64 for the weights, and about 32 of start and
    end; each further block of a group reads the weights again, out of L2: about 200.
    """
    block = max(2 * block_rows, 64 + block_rows) + 32
    total = 0.0
    for size, odds in sizes:
        blocks = -(-size // block_rows)
        total += odds * (blocks * block + (blocks - 1) * max(0, 200 - block))
    return total
