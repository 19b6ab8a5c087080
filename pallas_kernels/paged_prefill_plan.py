"""Which thread block attends to what: the schedule of the prefill kernel, made on the device from lengths alone.

An item is a block of queries of one sequence and a block of query heads of one KV head, with the KV tiles that it
sees, or, where a call has few, one of equal parts of these tiles. How many parts follows from the row's own length and
the call's sizes, never from the other rows: a merge adds parts up, and where they meet shows in a result's last bit.

Long chunks: items are ordered by sequence, KV head and query block (longest first). Whole items are dealt to the thread
blocks in waves, so that blocks that run together read the same keys; as many waves as leave no block with more than its
equal share of all tiles, but one. What remains lies on one line of tiles and is cut where each block's share is full.
The block whose share ends inside an item does its beginning first, and hands its state on, bit for bit, to the block
that does the rest last: such a cut changes no result. No block has more tiles than any other.

Short chunks (one block of queries a row) are bound by reading: the items of all head blocks at the same keys go to a
team of as many thread blocks, which walk the same pieces side by side and so read neighbouring bytes of the same pages
(a head's part of a token is 256 bytes, little for DRAM to open a row for). Teams share a line of tiles as blocks do.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

ROW_TILE = 64  # wgmma's M: rows of a consumer warpgroup
UNIT = 8  # rows that are loaded and stored together
SHARED_BYTES = 226 * 1024  # of a thread block on Hopper, some left for barriers

SHORTEST = 8  # tiles of a part: it leaves 64 KB beside 512 KB or more that it reads

# Columns of `PrefillPlan.items`.
ROW, HEAD_BLOCK, FIRST_TOKEN, FIRST_POS, LEAD, NUM_TOKENS, FIRST_TILE, NUM_TILES, LENGTH, PART = range(10)
# Columns of `PrefillPlan.shares`.
WAVES, HEAD_ITEM, HEAD_TILES, LINE_BEGIN, LINE_ITEMS, LINE_STEP, TAIL_ITEM, TAIL_TILE, TAIL_TILES, HANDS_IT = range(10)
# Columns of `PrefillPlan.merges`.
FIRST_ITEM, NUM_PARTS = range(2)


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


@functools.partial(jax.tree_util.register_dataclass, data_fields=["items", "shares", "merges"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class PrefillPlan:
    """The schedule of a call, the same for all layers of a step.

    Attributes:
      items: `[max_items, 10]` int32, columns as named above (`PART`: where its partial result goes, -1 if it is all of
        its tiles); those behind the last item have no tiles.
      shares: `[blocks, 10]` int32, of each thread block: waves of whole items; the beginning of an item that it does
        first (item, tiles, 0 for none); whole items of the line (first, how many, step from one to the next); the rest
        of an item that it does last (item, first tile, tiles, the block that hands its state on).
      merges: `[2 blocks, 2]` int32, first item and number of parts (0 for none) of what is merged.
    """

    items: jax.Array
    shares: jax.Array
    merges: jax.Array


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
    rows = _Rows(
        query_offsets, num_tokens, start_pos, max_tokens, num_heads, num_kv_heads, tiles, num_blocks, sliding_window
    )
    items = rows.items()
    if rows.team == 1:
        return PrefillPlan(items, _shares(items[:, NUM_TILES], num_blocks, num_blocks), rows.merges())
    of_team = _shares(items[:: rows.team, NUM_TILES], num_blocks // rows.team, 0)
    return PrefillPlan(items, _of_members(of_team, rows.team, num_blocks), rows.merges())


class _Rows:
    """The rows of a call, each as blocks of queries, blocks of heads and parts of KV tiles, all `[rows]` int32.

    Blocks of queries begin at multiples of 8 in the token array, as TMA wants it: a row's first may have a lead.
    """

    def __init__(self, offsets, num_tokens, start_pos, max_tokens, num_heads, num_kv_heads, tiles, num_blocks, window):
        self.offsets, self.num_tokens, self.start_pos, self.tiles = offsets, num_tokens, start_pos, tiles
        self.max_tokens, self.window, self.num_blocks = max_tokens, window, num_blocks
        self.rows = num_tokens.shape[0]
        self.head_blocks = num_kv_heads * -(-(num_heads // num_kv_heads) // tiles.heads)
        short = max_tokens <= tiles.queries * self.rows and self.head_blocks <= num_blocks
        self.team = self.head_blocks if short else 1
        self.lead = offsets % UNIT
        self.blocks = jnp.where(num_tokens > 0, -(-(self.lead + num_tokens) // tiles.queries), 0)
        _, _, _, shortest = self.tiles_of(jnp.arange(self.rows), jnp.zeros_like(offsets))
        units = num_blocks // self.team * self.team
        wanted = -(-2 * units // jnp.maximum(self.blocks * (self.head_blocks * self.rows), 1))
        self.parts = jnp.maximum(jnp.minimum(wanted, shortest // SHORTEST), 1)
        of_row = self.blocks * self.head_blocks
        self.ends = jnp.cumsum(of_row * self.parts)
        merged = jnp.where(self.parts > 1, of_row, 0)
        self.merge_ends = jnp.cumsum(merged)
        self.part_ends = jnp.cumsum(merged * self.parts)

    def tiles_of(self, row, first):
        """Lead, queries (the lead among them), first KV tile and number of KV tiles of a block of queries."""
        lead = self.lead[row]
        count = jnp.clip(lead + self.num_tokens[row] - first, 0, self.tiles.queries)
        pos = self.start_pos[row] + first - lead
        lead = jnp.where(first == 0, lead, 0)
        low = jnp.zeros_like(pos)
        if self.window is not None:
            low = jnp.maximum(pos + lead + 1 - self.window, 0) // self.tiles.kv_tile
        return lead, count, low, -(-(pos + count) // self.tiles.kv_tile) - low

    def items(self) -> jax.Array:
        """`PrefillPlan.items`. By the choice of `wanted`, all that have parts have fewer than 4 a thread block."""
        queries = self.tiles.queries
        max_blocks = (self.max_tokens + (UNIT - 1) * self.rows) // queries + self.rows
        max_items = max_blocks * self.head_blocks + 4 * self.num_blocks
        item = jnp.arange(max_items, dtype=jnp.int32)
        row = jnp.minimum(jnp.sum(self.ends[None, :] <= item[:, None], axis=1, dtype=jnp.int32), self.rows - 1)
        parts, blocks = self.parts[row], jnp.maximum(self.blocks[row], 1)
        rest = item - (self.ends - self.blocks * self.head_blocks * self.parts)[row]
        if self.team == 1:
            head_block, block, part = rest // (parts * blocks), rest // parts % blocks, rest % parts
        else:
            head_block, block, part = rest % self.team, rest // (parts * self.team), rest // self.team % parts
        first = (blocks - 1 - block) * queries
        lead, count, low, tiles = self.tiles_of(row, first)
        begin, end = part * tiles // parts, (part + 1) * tiles // parts
        slot = self.part_ends[row] + ((head_block - self.head_blocks) * blocks + block) * parts + part
        slot = jnp.where(parts > 1, slot, -1)
        token = self.offsets[row] - self.lead[row] + first
        pos = self.start_pos[row] + first - self.lead[row]
        length = self.start_pos[row] + self.num_tokens[row]
        tiles = jnp.where(item < self.ends[-1], end - begin, 0)
        columns = (row, head_block, token, pos, lead, count, low + begin, tiles, length, slot)
        return jnp.stack(columns, axis=1).astype(jnp.int32)

    def merges(self) -> jax.Array:
        merge = jnp.arange(2 * self.num_blocks, dtype=jnp.int32)
        row = jnp.minimum(jnp.sum(self.merge_ends[None, :] <= merge[:, None], axis=1), self.rows - 1)
        of_row = self.blocks * self.head_blocks
        index = merge - self.merge_ends[row] + of_row[row]
        if self.team == 1:
            first = index * self.parts[row]
        else:
            first = index // self.team * (self.parts[row] * self.team) + index % self.team
        first = first + (self.ends - of_row * self.parts)[row]
        parts = jnp.where(merge < self.merge_ends[-1], self.parts[row], 0)
        return jnp.stack([jnp.where(parts > 0, first, 0), parts], axis=1).astype(jnp.int32)


def _of_members(shares: jax.Array, team: int, num_blocks: int) -> jax.Array:
    """Shares of the blocks of teams: a team's item stands for `team` items one behind the other."""
    by_member = jnp.repeat(shares, team, axis=0)
    member = jnp.tile(jnp.arange(team, dtype=jnp.int32), shares.shape[0])
    for column in (HEAD_ITEM, LINE_BEGIN, TAIL_ITEM, HANDS_IT):
        by_member = by_member.at[:, column].set(by_member[:, column] * team + member)
    by_member = by_member.at[:, LINE_STEP].set(team)
    return jnp.pad(by_member, ((0, num_blocks - by_member.shape[0]), (0, 0)))


def _shares(work: jax.Array, num_blocks: int, wave: int) -> jax.Array:
    """`PrefillPlan.shares` of items with so many tiles, whole ones dealt in waves of `wave` items (0: none is)."""
    max_items = work.shape[0]
    total = work.sum()
    share = -(-total // num_blocks)
    num_waves, load = jnp.int32(0), jnp.zeros(num_blocks, jnp.int32)
    if wave:
        loads = jnp.cumsum(jnp.pad(work, (0, -max_items % wave)).reshape(-1, wave), axis=0)
        fits = jnp.sum(loads.max(1) <= share, dtype=jnp.int32)
        # One wave less than fits: a block's part of the line is then longer than most items, so that few of these span
        # three blocks. The third of them would wait for the second, which has to wait for the first.
        num_waves = jnp.maximum(jnp.minimum(fits, jnp.sum(work > 0, dtype=jnp.int32) // wave) - 1, 0)
        load = jnp.where(num_waves > 0, loads[jnp.maximum(num_waves - 1, 0)], 0)
    ends = jnp.cumsum(work)  # tiles up to each item's end, on the line of all
    origin = jnp.sum(jnp.where(jnp.arange(max_items) < num_waves * num_blocks, work, 0))
    room = share - load
    begin = jnp.minimum(origin + jnp.cumsum(room) - room, total)
    end = jnp.minimum(begin + room, total)
    at, last = (jnp.sum(ends[None, :] <= tile[:, None], axis=1, dtype=jnp.int32) for tile in (begin, end))
    at, last = (jnp.minimum(item, jnp.sum(work > 0, dtype=jnp.int32)) for item in (at, last))
    cut, cut_last = (tile - _before(ends, work, item) for tile, item in ((begin, at), (end, last)))
    there = end > begin
    tail = jnp.where(there & (cut > 0), jnp.minimum(_before(ends, work, at + 1), end) - begin, 0)
    inside = there & (cut > 0) & (at == last)  # all of it inside one item
    head = jnp.where(there & ~inside, cut_last, 0)
    line = jnp.where(cut > 0, at + 1, at)
    # The state of a cut item comes from the last block ahead that has any of the line.
    block = jnp.arange(num_blocks, dtype=jnp.int32)
    ahead = jnp.where(there[None, :] & (block[None, :] < block[:, None]), block[None, :], 0).max(1)
    columns = (
        jnp.broadcast_to(num_waves, at.shape),
        *(last, head, line, jnp.where(there, jnp.maximum(last - line, 0), 0), jnp.ones_like(line)),
        *(at, cut, tail, ahead),
    )
    return jnp.stack(columns, axis=1).astype(jnp.int32)


def _before(ends: jax.Array, work: jax.Array, item: jax.Array) -> jax.Array:
    """Tiles ahead of an item; of all items behind the last."""
    safe = jnp.minimum(item, work.shape[0] - 1)
    return jnp.where(item < work.shape[0], ends[safe] - work[safe], ends[-1])


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
