"""The prefill kernel's schedule, walked as the kernel walks it: every tile once, no block more than its share."""

import itertools

import jax
import numpy as np
import pytest

from jmoe.pallas_kernels import paged_prefill_plan as planning
from jmoe.pallas_kernels.paged_prefill_plan import PrefillTiles, prefill_plan, prefill_tiles

TILES = PrefillTiles(queries=16, heads=3, consumers=2, kv_tile=64, stages=2)


def walk(plan):
    """(item, first tile, tiles, slot or None) of each block, in the kernel's order."""
    items, shares = np.asarray(plan.items), np.asarray(plan.shares)
    pieces = []
    for block, (waves, item, tile, left, *_) in enumerate(shares):
        mine = [
            (block + wave * len(shares), 0, items[block + wave * len(shares), planning.NUM_TILES])
            for wave in range(waves)
        ]
        slots = [None] * len(mine)
        while left > 0:
            count = min(items[item, planning.NUM_TILES] - tile, left)
            whole = count == items[item, planning.NUM_TILES]
            slots.append(None if whole else 2 * block + min(len(mine) - waves, 1))
            mine.append((item, tile, count))
            item, tile, left = item + 1, 0, left - count
        pieces.append([(*piece, slot) for piece, slot in zip(mine, slots, strict=True)])
    return pieces


def plan_of(rows, num_blocks, max_tokens=None, window=None, heads=(6, 2)):
    start, num = (np.array(column, np.int32) for column in zip(*rows, strict=True))
    offsets = (np.cumsum(num) - num).astype(np.int32)
    return jax.jit(
        lambda *lengths: prefill_plan(
            *lengths,
            max_tokens=max_tokens or int(num.sum()),
            num_heads=heads[0],
            num_kv_heads=heads[1],
            tiles=TILES,
            num_blocks=num_blocks,
            sliding_window=window,
        )
    )(offsets, num, start)


ROWS = [
    ((0, 1),),
    ((1000, 17), (0, 0), (63, 1), (64, 1), (5000, 1)),
    ((0, 700), (100, 33)),
    tuple((100 * i, 1 + i % 3) for i in range(40)),
]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("num_blocks", "window"), [(1, None), (8, None), (3, 100)])
def test_every_tile_once_and_equal_shares(rows, num_blocks, window):
    plan = plan_of(rows, num_blocks, max_tokens=800, window=window)
    items, shares = np.asarray(plan.items), np.asarray(plan.shares)
    seen = [np.zeros(count, int) for count in items[:, planning.NUM_TILES]]
    parts: dict[int, list[int]] = {}
    pieces = walk(plan)
    for mine in pieces:
        for item, tile, count, slot in mine:
            seen[item][tile : tile + count] += 1
            if slot is not None:
                parts.setdefault(item, []).append(slot)
    assert all((s == 1).all() for s in seen)
    loads = [sum(piece[2] for piece in mine) for mine in pieces]
    assert max(loads) == -(-sum(loads) // num_blocks)
    merges = {}
    for block, share in enumerate(shares):
        if share[planning.MERGE_ITEM] >= 0:
            first = share[planning.MERGE_BLOCK]
            slots = [2 * first + share[planning.MERGE_SLOT], *range(2 * first + 2, 2 * block + 1, 2)]
            merges[share[planning.MERGE_ITEM]] = [s for s in slots if shares[s // 2, planning.SHARE] > 0]
    assert merges == parts


def test_items_hold_every_query_of_every_head_once():
    rows = ROWS[2]
    items = np.asarray(plan_of(rows, 4).items)
    found = np.zeros((sum(new for _, new in rows), 2), int)
    for _, block, token, _, lead, count, _, num_tiles, _ in items:
        assert token % 8 == 0
        if num_tiles:
            found[token + lead : token + count, block] += 1
    assert (found == 1).all()


def test_a_window_leaves_out_what_no_query_sees():
    items = np.asarray(plan_of(((5000, 20),), 4, window=100).items)
    of_two = [(first, count) for *_, first, count, _ in items.tolist() if count]
    # Queries 5016..5019 see from 4917 on, 5000..5015 from 4901: tiles 76 to 78.
    assert set(of_two) == {(76, 3)}


@pytest.mark.parametrize("heads_per_kv", range(1, 17))
def test_blocks_fit(heads_per_kv):
    for head_dim, tokens_per_row, float8 in itertools.product((64, 128, 256), (1, 16, 24, 500), (False, True)):
        tiles = prefill_tiles(heads_per_kv, head_dim, tokens_per_row, float8)
        assert tiles.queries % 8 == 0 and tiles.queries > 0 and tiles.queries * tiles.heads <= tiles.rows
        assert tokens_per_row < 500 or head_dim == 256 or tiles.queries * tiles.heads >= 0.8 * tiles.rows
        assert tokens_per_row > 8 or tiles.heads == heads_per_kv or head_dim == 256
        held = 2 * tiles.rows * (head_dim + min(head_dim, 128)) + 4 * tiles.stages * tiles.kv_tile * head_dim
        held += 2 * tiles.kv_tile * head_dim if float8 else 0
        assert tiles.stages >= 2 and held <= planning.SHARED_BYTES
