"""The prefill kernel's schedule, walked as the kernel walks it: every tile once, no block more than its share."""

import functools
import itertools

import jax
import numpy as np
import pytest

from jmoe.pallas_kernels import paged_prefill_plan as planning
from jmoe.pallas_kernels.paged_prefill_plan import PrefillTiles, prefill_plan, prefill_tiles

TILES = PrefillTiles(queries=16, heads=3, consumers=2, kv_tile=64, stages=2)


def walk(plan):
    """(item, first tile, tiles) of each block, in the kernel's order."""
    items, pieces = np.asarray(plan.items), []
    for block, share in enumerate(np.asarray(plan.shares)):
        waves, head_item, head_tiles, first, count, step, tail_item, tail_tile, tail_tiles, _ = share.tolist()
        whole = [*range(block, block + waves * len(plan.shares), len(plan.shares))]
        whole += [first + i * step for i in range(count)]
        mine = [(head_item, 0, head_tiles)] if head_tiles else []
        mine += [(item, 0, int(items[item, planning.NUM_TILES])) for item in whole]
        mine += [(tail_item, tail_tile, tail_tiles)] if tail_tiles else []
        assert all(count > 0 for _, _, count in mine), "a piece without tiles would never be brought"
        pieces.append(mine)
    return pieces


@functools.cache
def compiled(rows, max_tokens, num_blocks, window):
    """Few sizes, and not optimised: each takes seconds to compile."""

    def plan(*lengths):
        sizes = {"max_tokens": max_tokens, "num_heads": 6, "num_kv_heads": 2, "tiles": TILES}
        return prefill_plan(*lengths, **sizes, num_blocks=num_blocks, sliding_window=window)

    lengths = [jax.ShapeDtypeStruct((rows,), np.int32)] * 3
    return jax.jit(plan).lower(*lengths).compile(compiler_options={"xla_backend_optimization_level": "0"})


def plan_of(rows, num_blocks, window=None):
    """Rows of short chunks on average if there are many of them."""
    rows = (*rows, *[(0, 0)] * (-len(rows) % 5))
    start, num = (np.array(column, np.int32) for column in zip(*rows, strict=True))
    offsets = (np.cumsum(num) - num).astype(np.int32)
    return compiled(len(rows), 600 if len(rows) == 40 else 800, num_blocks, window)(offsets, num, start)


ROWS = [
    ((0, 1),),
    ((1000, 17), (0, 0), (63, 1), (64, 1), (5000, 1)),
    ((0, 700), (100, 33)),
    tuple((100 * i, 1 + i % 3) for i in range(40)),
]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("num_blocks", "window"), [(8, None), (40, None), (3, 100)])
def test_every_tile_once_and_equal_shares(rows, num_blocks, window):
    """Of short chunks teams of two blocks share, one block for each of the two head blocks."""
    by_teams = rows is ROWS[3]
    plan = plan_of(rows, num_blocks, window)
    items, shares = np.asarray(plan.items), np.asarray(plan.shares)
    seen = [np.zeros(count, int) for count in items[:, planning.NUM_TILES]]
    handed: dict[int, tuple[int, int]] = {}  # what a block hands on: item, tile
    taken = []
    pieces = walk(plan)
    for block, mine in enumerate(pieces):
        for at, (item, tile, count) in enumerate(mine):
            seen[item][tile : tile + count] += 1
            if tile + count < items[item, planning.NUM_TILES]:
                assert block not in handed and (tile > 0 or at == 0), "who takes it over waits for it"
                handed[block] = item, tile + count
            if tile > 0:
                assert at == len(mine) - 1
                taken.append((int(shares[block, planning.HANDS_IT]), (item, tile)))
                assert taken[-1][0] < block, "no two blocks wait for each other"
    assert all((s == 1).all() for s in seen)
    loads = [sum(piece[2] for piece in mine) for mine in pieces]
    working = num_blocks // 2 * 2 if by_teams else num_blocks
    assert max(loads) <= -(-sum(loads) // working) + (1 if by_teams else 0)
    assert not by_teams or loads[:working:2] == loads[1:working:2], "side by side"
    assert dict(taken) == handed and len(taken) == len(handed)


def parts_of(plan):
    """(row, head block, first token) of each item that has parts: their (slot, first tile, tiles) in order."""
    found: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for row, block, token, _, _, _, first, count, _, slot in np.asarray(plan.items).tolist():
        if count and slot >= 0:
            found.setdefault((row, block, token), []).append((slot, first, count))
    return found


@pytest.mark.parametrize("num_blocks", [8, 40])
@pytest.mark.parametrize("rows", ROWS)
def test_merges_name_every_item_that_has_parts(rows, num_blocks):
    plan = plan_of(rows, num_blocks)
    items, parts = np.asarray(plan.items), parts_of(plan)
    merges = [(first, count) for first, count in np.asarray(plan.merges).tolist() if count]
    assert len(merges) == len(parts) and bool(parts) == (rows is ROWS[1])
    slots = sorted(slot for mine in parts.values() for slot, *_ in mine)
    assert slots == list(range(len(slots))) and len(slots) <= 4 * num_blocks
    for first, count in merges:
        mine = parts[tuple(items[first, [planning.ROW, planning.HEAD_BLOCK, planning.FIRST_TOKEN]].tolist())]
        assert [slot for slot, *_ in mine] == [items[first, planning.PART] + i for i in range(count)]
        assert all(a[1] + a[2] == b[1] for a, b in itertools.pairwise(mine)), "in order of position, without gaps"


def test_neighbours_move_no_part():
    """Where results are added up depends on the row's own length and how many rows the call has room for."""
    mine = (5000, 17)
    found = []
    for others in (((0, 1), (63, 1)), ((9000, 16), (20000, 16)), ((0, 0), (0, 0))):
        plan = plan_of((others[0], mine, others[1]), 40)
        of_row = {key: value for key, value in parts_of(plan).items() if key[0] == 1}
        first_token = min(token for _, _, token in of_row)
        found.append(
            sorted((block, token - first_token, *part[1:]) for (_, block, token), p in of_row.items() for part in p)
        )
    assert found[0] and found[0] == found[1] == found[2]


def test_items_hold_every_query_of_every_head_once():
    rows = ROWS[2]
    items = np.asarray(plan_of(rows, 8).items)
    found = np.zeros((sum(new for _, new in rows), 2), int)
    for _, block, token, _, lead, count, _, num_tiles, *_ in items:
        assert token % 8 == 0
        if num_tiles:
            found[token + lead : token + count, block] += 1
    assert (found == 1).all()


def test_a_window_leaves_out_what_no_query_sees():
    items = np.asarray(plan_of(((5000, 20),), 3, window=100).items)
    of_two = [(first, count) for *_, first, count, _, _ in items.tolist() if count]
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
