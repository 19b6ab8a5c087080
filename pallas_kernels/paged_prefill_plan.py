"""Which thread block attends to what: the schedule of the prefill kernel, made on the device from lengths alone.

An item is a block of queries of one sequence and a block of query heads of one KV head, with the KV tiles that it sees.
Items are ordered by sequence, KV head and query block (longest first). Whole items are dealt to the thread blocks in
waves, so that blocks that run together read the same keys; as many waves as leave no block with more than its equal
share of all tiles. What remains lies on one line of tiles and is cut where each block's share is full (an item that is
cut leaves partial results, which are merged in order of position). No block has more tiles than any other.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

ROW_TILE = 64  # wgmma's M: rows of a consumer warpgroup
UNIT = 8  # rows that are loaded and stored together
SHARED_BYTES = 226 * 1024  # of a thread block on Hopper, some left for barriers

# Columns of `PrefillPlan.items`.
ROW, HEAD_BLOCK, FIRST_TOKEN, FIRST_POS, LEAD, NUM_TOKENS, FIRST_TILE, NUM_TILES, LENGTH = range(9)
# Columns of `PrefillPlan.shares`.
WAVES, BEGIN_ITEM, BEGIN_TILE, SHARE, MERGE_ITEM, MERGE_BLOCK, MERGE_SLOT, _UNUSED = range(8)


@dataclasses.dataclass(frozen=True)
class PrefillTiles:
    """Block sizes of the kernel.

    Attributes:
      queries: tokens of an item, a multiple of 8.
      heads: query heads of an item, all of one KV head.
      consumers: warpgroups that compute, 64 rows (a query's head each) every one.
      kv_tile: positions of one step.
      stages: KV tiles in shared memory.
    """

    queries: int
    heads: int
    consumers: int
    kv_tile: int
    stages: int

    @property
    def rows(self) -> int:
        return self.consumers * ROW_TILE


@functools.partial(jax.tree_util.register_dataclass, data_fields=["items", "shares"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class PrefillPlan:
    """The schedule of a call, the same for all layers of a step.

    Attributes:
      items: `[max_items, 9]` int32, columns as named above; those behind the last item have no tiles.
      shares: `[blocks, 8]` int32, of each thread block: waves of whole items, where its part of the line begins (item,
        tile) and its number of tiles, the item whose merge it names (or -1), the block and slot of that item's first
        part.
    """

    items: jax.Array
    shares: jax.Array


def prefill_plan(
    query_offsets: jax.Array,
    num_tokens: jax.Array,
    start_pos: jax.Array,
    *,
    max_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    tiles: PrefillTiles,
    num_blocks: int,
    sliding_window: int | None = None,
) -> PrefillPlan:
    """The plan of a ragged call.

    Args:
      query_offsets, num_tokens, start_pos: `[rows]` int32, first query in the array, number, position of the first.
      max_tokens: bound of the sum of num_tokens.
      num_heads, num_kv_heads: Q and G.
      tiles: block sizes.
      num_blocks: thread blocks that run at once, one an SM.
      sliding_window: positions a token may see.
    """
    items = _items(query_offsets, num_tokens, start_pos, max_tokens, num_heads, num_kv_heads, tiles, sliding_window)
    return PrefillPlan(items, _shares(items, num_blocks))


def _items(offsets, num_tokens, start_pos, max_tokens, num_heads, num_kv_heads, tiles, window):
    """Blocks of queries begin at multiples of 8 in the token array, as TMA wants it: a row's first may have a lead."""
    group = num_heads // num_kv_heads
    head_blocks = num_kv_heads * -(-group // tiles.heads)
    rows = num_tokens.shape[0]
    max_items = ((max_tokens + (UNIT - 1) * rows) // tiles.queries + rows) * head_blocks
    lead = offsets % UNIT
    blocks = jnp.where(num_tokens > 0, -(-(lead + num_tokens) // tiles.queries), 0)
    ends = jnp.cumsum(blocks * head_blocks)
    item = jnp.arange(max_items, dtype=jnp.int32)
    row = jnp.minimum(jnp.sum(ends[None, :] <= item[:, None], axis=1, dtype=jnp.int32), rows - 1)
    rest = item - (ends - blocks * head_blocks)[row]
    of_row = jnp.maximum(blocks[row], 1)
    first = (of_row - 1 - rest % of_row) * tiles.queries
    lead = lead[row]
    count = jnp.clip(lead + num_tokens[row] - first, 0, tiles.queries)
    pos = start_pos[row] + first - lead
    lead_here = jnp.where(first == 0, lead, 0)
    low = jnp.zeros_like(pos)
    if window is not None:
        low = jnp.maximum(pos + lead_here + 1 - window, 0) // tiles.kv_tile
    num_tiles = jnp.where(item < ends[-1], -(-(pos + count) // tiles.kv_tile) - low, 0)
    length = start_pos[row] + num_tokens[row]
    token = offsets[row] - lead + first
    columns = (row, rest // of_row, token, pos, lead_here, count, low, num_tiles, length)
    return jnp.stack(columns, axis=1).astype(jnp.int32)


def _shares(items: jax.Array, num_blocks: int) -> jax.Array:
    work = items[:, NUM_TILES]
    max_items = work.shape[0]
    total = work.sum()
    share = -(-total // num_blocks)
    waves = jnp.pad(work, (0, -max_items % num_blocks)).reshape(-1, num_blocks)
    loads = jnp.cumsum(waves, axis=0)
    fits = jnp.sum(loads.max(1) <= share, dtype=jnp.int32)
    num_waves = jnp.minimum(fits, jnp.sum(work > 0, dtype=jnp.int32) // num_blocks)
    load = jnp.where(num_waves > 0, loads[jnp.maximum(num_waves - 1, 0)], 0)
    before = jnp.cumsum(work) - work  # tiles ahead of each item, on the line of all
    origin = jnp.sum(jnp.where(jnp.arange(max_items) < num_waves * num_blocks, work, 0))
    room = share - load
    begin = jnp.minimum(origin + jnp.cumsum(room) - room, total)
    room = jnp.minimum(room, total - begin)
    at = jnp.sum((before + work)[None, :] <= begin[:, None], axis=1, dtype=jnp.int32)
    at = jnp.minimum(at, max_items - 1)
    tile = begin - before[at]
    # The block in which a cut item ends names its merge. The first part is its block's second piece, unless the block
    # begins with it.
    ends_here = (room > 0) & (tile > 0) & (work[at] - tile <= room)
    first = jnp.sum(begin[None, :] <= before[at][:, None], axis=1, dtype=jnp.int32) - 1
    first = jnp.maximum(first, 0)
    slot = jnp.where(begin[first] == before[at], 0, 1)
    merged = jnp.where(ends_here, at, -1)
    waves_column = jnp.broadcast_to(num_waves, at.shape)
    columns = (waves_column, at, tile, room, merged, first, slot, jnp.zeros_like(at))
    return jnp.stack(columns, axis=1).astype(jnp.int32)


def prefill_tiles(heads_per_kv: int, head_dim: int, tokens_per_row: float, float8: bool = False) -> PrefillTiles:
    """Block sizes for a call with so many queries a row on average.

    Short chunks are bound by reading: all heads of a KV head in one item, so that a KV tile is read once, in the fewest
    rows that hold the chunk. Long ones are bound by products: as few idle rows as can be, two consumers with KV tiles
    of 128 (82 to 90 % of the product rate on an H100 against 74 to 84 with three and tiles of 64, whose scores read as
    much shared memory as there is bandwidth).
    """
    if head_dim == 256:  # 3 consumers have too few registers for it, and 2 leave no room for a raw float8 tile
        consumers = 1 if float8 else 2
        heads = min(heads_per_kv, consumers * ROW_TILE // UNIT)
        return _fitted(_queries(consumers, heads), heads, consumers, 64, head_dim, float8)
    if tokens_per_row <= _queries(2, heads_per_kv):
        return _fitted(_queries(2, heads_per_kv), heads_per_kv, 2, 128, head_dim, float8)
    if tokens_per_row <= _queries(3, heads_per_kv):
        return _fitted(_queries(3, heads_per_kv), heads_per_kv, 3, 64, head_dim, float8)
    divisors = [heads for heads in range(1, heads_per_kv + 1) if heads_per_kv % heads == 0]
    heads = max(divisors, key=lambda heads: (_queries(2, heads) * heads, heads))
    return _fitted(_queries(2, heads), heads, 2, 128, head_dim, float8)


def _queries(consumers: int, heads: int) -> int:
    return consumers * ROW_TILE // heads // UNIT * UNIT


def _fitted(queries: int, heads: int, consumers: int, kv_tile: int, head_dim: int, float8: bool) -> PrefillTiles:
    """Shared memory holds the queries, the staged output, one raw float8 tile and as many KV tiles as fit, up to 4."""
    left = SHARED_BYTES - consumers * ROW_TILE * 2 * (head_dim + min(head_dim, 128))
    left -= 2 * kv_tile * head_dim if float8 else 0
    return PrefillTiles(queries, heads, consumers, kv_tile, min(left // (2 * 2 * kv_tile * head_dim), 4))
