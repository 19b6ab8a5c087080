"""How decode attention cuts rows into pieces, and the XLA forms of what its thread blocks work out for themselves.

A unit is 16 tokens of one row, a piece some tiles of 64: where a row is cut into pieces follows from its own length and
the call's sizes. Each piece is attended to by itself, and pieces are added up one by one in order of position. So no
neighbour of a row changes a bit of its result, whoever attends to its pieces.

All pieces of a call, ordered by row and position, are cut into ranges of equal length (up to a piece; a little longer
where rows of one length then stay whole); a stream is one range and one KV head, so that streams that run side by side
read neighbouring bytes of the same pages (a head's part of a token is 128 or 256 bytes, little for DRAM to open a row
for). What a stream has of a row from its first piece on it
adds up itself; where a range begins inside a row, it leaves every piece of that row as a partial result, and the stream
that comes last at the row adds them up (`paged_decode_share`).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

UNIT = 16  # tokens
TILE_UNITS = 4  # 64 tokens: wgmma's M
TILE = UNIT * TILE_UNITS
MASKED = -1e30
# Tokens of a piece, a multiple of a tile's. With 128 the cut rows' partial results were 8 MB to write and as much to
# read at 128 rows of 1024: 110 us instead of 104; 165 instead of 152 at 32 rows of 4096.
SHORTEST = 768
PIECES = 32  # bound of a row's pieces: more would share out more evenly, and take longer to add up
SPARE = 16  # of so many ranges one may idle for rows of one length to stay whole: the rest still fills the memory
MAX_PARTIALS = 1 << 15  # partial results that there is room for: 4 KB each


@dataclasses.dataclass(frozen=True)
class Decode:
    """What is fixed when the kernel is compiled."""

    rows: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_len: int
    max_pages: int
    num_streams: int
    stages: int
    sliding_window: int | None
    logit_soft_cap: float | None
    pages_dtype: Any
    out_dtype: Any
    interpret: bool
    shortest: int = SHORTEST  # tokens of a piece, at least

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def columns(self) -> int:
        """wgmma's N: a multiple of 8."""
        return -(-self.group // 8) * 8

    @property
    def flat_rows(self) -> int:
        """Rows of q with all heads in one axis; at least `columns`."""
        return max(self.rows * self.num_heads, self.columns)

    @property
    def small_pages(self) -> bool:
        return jnp.dtype(self.pages_dtype).itemsize == 1

    @property
    def dtype(self) -> Any:
        """Of the products' operands: float16 holds every float8_e4m3fn, and the hardware converts to nothing else."""
        return jnp.float16 if self.small_pages else self.pages_dtype

    @property
    def ranges(self) -> int:
        return self.num_streams // self.num_kv_heads

    @property
    def most(self) -> int:
        """Pieces of a row: as many as the page table's width needs and there is room for."""
        capacity = -(-self.max_pages * self.page_len // self.shortest)
        return max(1, min(PIECES, capacity, MAX_PARTIALS // (self.rows * self.num_kv_heads)))

    def cut(self, units):
        """(pieces, units of each but the last) of rows of so many units; an array or a scalar."""
        count = jnp.minimum(_ceil(units, self.shortest // UNIT), self.most)
        length = _ceil(_ceil(units, count), TILE_UNITS) * TILE_UNITS
        return _ceil(units, length), length


def _ceil(dividend, divisor):
    divisor = jnp.asarray(divisor, jnp.int32)
    return lax.div(dividend + (divisor - 1), jnp.broadcast_to(divisor, jnp.shape(dividend)))


def bounds(start_pos, num_tokens, sliding_window: int | None):
    """First visible position of rows, end of the visible ones, number of units (at least one); arrays or scalars."""
    high = start_pos + num_tokens
    low = jnp.zeros_like(high) if sliding_window is None else jnp.maximum(start_pos + 1 - sliding_window, 0)
    return low, high, jnp.maximum((high + UNIT - 1) // UNIT - low // UNIT, 1)


def decode_plan(start_pos, num_tokens, shape: Decode) -> jax.Array:
    """Where every range begins and ends, in XLA: for the interpreter, and to test `paged_decode_share.plan_program`.

    Returns:
      `[ranges, 2]` int32, row * PIECES + piece; rows * PIECES behind the last.
    """
    units = bounds(start_pos, num_tokens, shape.sliding_window)[2]
    count, length = shape.cut(units)
    tiles = _ceil(units, TILE_UNITS)
    ends = jnp.cumsum(tiles)
    share, longest = _ceil(ends[-1], shape.ranges), tiles.max()
    whole = _ceil(share, longest) * longest
    share = jnp.where(whole - share <= share // SPARE, whole, share)
    position = jnp.arange(shape.ranges + 1, dtype=jnp.int32) * share
    row = jnp.sum(ends[None, :] <= position[:, None], axis=1, dtype=jnp.int32)
    inside = jnp.minimum(row, shape.rows - 1)
    piece = _ceil(position - (ends - tiles)[inside], length[inside] // TILE_UNITS)
    codes = jnp.where(piece < count[inside], inside * PIECES + piece, (inside + 1) * PIECES)
    codes = jnp.where(row < shape.rows, codes, shape.rows * PIECES)
    return jnp.stack([codes[:-1], codes[1:]], axis=1).astype(jnp.int32)


def merge_partials(out, acc, maxima_sums, start_pos, num_tokens, sinks, v_scale, shape: Decode):
    """What the last stream of each row and head does, in XLA: for the interpreter, which has no atomics.

    Args:
      out: `[rows, Q, H]`, right where one stream did all of a row.
      acc: `[rows, G, pieces, H, columns]` float32; the first of a row may be of several pieces.
      maxima_sums: `[rows, G, pieces, 2, columns]` float32, their maxima (log2) and sums.
      sinks: `[G, Q / G]` float32, in log2; MASKED for none.

    Returns:
      `[rows, Q, H]`.
    """
    count, _ = shape.cut(bounds(start_pos, num_tokens, shape.sliding_window)[2])
    begins = decode_plan(start_pos, num_tokens, shape)[:, 0]
    group, most = shape.group, acc.shape[2]
    merged, cut = [], []
    for row in range(shape.rows):
        # The first piece that a stream begins with inside the row: those before it are in the first partial result.
        piece = begins - row * PIECES
        inside = jnp.where((piece > 0) & (piece < count[row]), piece, PIECES)
        cover = inside.min()
        cut.append(cover < PIECES)
        index = jnp.arange(most)
        mine = ((index == 0) | ((index >= cover) & (index < count[row])))[:, None]
        for head in range(shape.num_kv_heads):
            skipped = max(0, row * shape.num_heads + head * group - (shape.flat_rows - shape.columns))  # see `place`
            own = slice(skipped, skipped + group)
            m, sums = (maxima_sums[row, head, :, i, own] for i in (0, 1))
            m = jnp.where(mine, m, MASKED)
            top = m.max(0)
            weight = jnp.where(mine, jnp.exp2(m - top), 0)
            total = jnp.where(mine, sums * weight, 0).sum(0) + jnp.exp2(sinks[head] - top)
            parts = jnp.where(mine[:, None], acc[row, head][..., own] * weight[:, None], 0).sum(0)
            merged.append(parts * v_scale / total)
    result = jnp.stack(merged).swapaxes(1, 2).reshape(out.shape).astype(out.dtype)
    return jnp.where(jnp.stack(cut)[:, None, None], result, out)
