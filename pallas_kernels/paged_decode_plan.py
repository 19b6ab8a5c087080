"""How decode attention cuts rows into pieces, and the order in which streams take them; here in XLA.

A unit is 16 tokens of one row, a piece some tiles of 64: where a row is cut into pieces follows from its own length and
the call's sizes. Each piece is attended to by itself, and the pieces of a row are added up one by one in order of
position. So no neighbour of a row changes a bit of its result, whoever attends to its pieces.

A stream is a thread block of one KV head, and whenever it has asked for all of an item it takes the head's next one:
the memory is busy until the last are taken, whatever the streams' speeds. An item is a piece, or all pieces of a row
that is not long beside the others: those need no partial results. The first items of the first rows come first, one a
stream, as a stream can begin with them before it knows any other row's length; then all others, the longest first, so
that those taken last are short (`paged_decode_queue`).
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
PIECES = 64  # bound of a row's pieces
CLASSES = 8  # of pieces' lengths, to take long ones first
MAX_PARTIALS = 1 << 15  # partial results that there is room for: 4 KB each


@dataclasses.dataclass(frozen=True)
class Cut:
    """Tokens of a row's pieces: as short as evens out streams, as long as spares partial results.

    Attributes:
      least: of a piece in a row of up to `enough` pieces.
      enough: pieces of a row, but for rows longer than so many of `most`.
      most: of a piece in longer rows.
      few: of a piece, at least, where the rows alone don't give each stream one.
      whole: of a row that is one item, at most, if it has no more than half as many again as a stream's share; half the
        share always is.
    """

    least: int = 1536
    enough: int = 8
    most: int = 4096
    few: int = 256
    whole: int = 4096


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
    consumers: int  # warpgroups that compute, a stream
    stages: int  # tiles of keys on their way
    value_stages: int
    sliding_window: int | None
    logit_soft_cap: float | None
    pages_dtype: Any
    out_dtype: Any
    interpret: bool
    tokens: Cut = Cut()

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
    def streams_of_head(self) -> int:
        return self.num_streams // self.num_kv_heads

    @property
    def first_wave(self) -> int:
        """Rows whose first pieces come first, one a stream."""
        return min(self.rows, self.streams_of_head)

    @property
    def messages(self) -> int:
        """Pieces that a stream's loader may announce before its slower consumer begins with them: as all may be of one
        tile, every other one the consumer's, those of the stages and two more."""
        return self.stages + 2

    @property
    def partials_at_once(self) -> int:
        """That registers have room for: 168 a thread where two compute, 128 where two streams share an SM, else 255."""
        return max(1, (8 if self.consumers > 1 else 4 if self.head_dim > 128 else 2) * 8 // self.columns)

    @property
    def end(self) -> int:
        """The code behind the last piece's."""
        return self.rows * PIECES

    @property
    def most(self) -> int:
        """Pieces of a row: as many as the page table's width needs and there is room for."""
        needed = int(self.wanted(self.max_pages * self.page_len // UNIT, max, min, lambda a, b: a // b))
        return max(1, min(PIECES, needed, MAX_PARTIALS // (self.rows * self.num_kv_heads)))

    def wanted(self, units, larger, smaller, divide):
        """Pieces of a row, were there room for any number; in the arithmetic that is given."""
        least, longest, few = (n // UNIT for n in (self.tokens.least, self.tokens.most, self.tokens.few))
        count = larger(smaller(divide(units, least), self.tokens.enough), divide(units, longest))
        return larger(count, smaller(divide(units, few), self.streams_of_head // self.rows))

    def whole_tiles(self, total, larger, smaller, divide):
        """Of a row that is one item, at most, among so many of all rows; in the arithmetic that is given."""
        share = divide(total, self.streams_of_head)
        return larger(divide(share, 2), smaller(share + divide(share, 2), self.tokens.whole // TILE))

    def cut(self, units):
        """(pieces, units of each but the last) of rows of so many units; an array or a scalar."""
        count = jnp.clip(self.wanted(units, jnp.maximum, jnp.minimum, _divide), 1, self.most)
        length = _ceil(_ceil(units, count), TILE_UNITS) * TILE_UNITS
        return _ceil(units, length), length


def _divide(dividend, divisor):
    return lax.div(dividend, jnp.broadcast_to(jnp.asarray(divisor, jnp.int32), jnp.shape(dividend)))


def _ceil(dividend, divisor):
    return _divide(dividend + (jnp.asarray(divisor, jnp.int32) - 1), divisor)


def bounds(start_pos, num_tokens, sliding_window: int | None):
    """First visible position of rows, end of the visible ones, number of units (at least one); arrays or scalars."""
    high = start_pos + num_tokens
    low = jnp.zeros_like(high) if sliding_window is None else jnp.maximum(start_pos + 1 - sliding_window, 0)
    return low, high, jnp.maximum((high + UNIT - 1) // UNIT - low // UNIT, 1)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A head's items, in XLA: for the interpreter, and to test `paged_decode_queue`.

    Attributes:
      whole: `[rows]` int32, 1 where a row is one item.
      codes: `[rows * most + 2 * streams_of_head]` int32, row * PIECES + piece of the items in the order in which they
        are taken; `end` behind the last.
    """

    whole: jax.Array
    codes: jax.Array


def decode_plan(start_pos, num_tokens, shape: Decode) -> Plan:
    units = bounds(start_pos, num_tokens, shape.sliding_window)[2]
    count, length = shape.cut(units)
    tiles = _ceil(units, TILE_UNITS)
    whole = (count == 1) | (tiles <= shape.whole_tiles(tiles.sum(), jnp.maximum, jnp.minimum, _divide))
    count, length = jnp.where(whole, 1, count), jnp.where(whole, tiles * TILE_UNITS, length)
    rank = (CLASSES - 1) - _divide(length * CLASSES - 1, length.max())
    row, piece = (grid.reshape(-1) for grid in jnp.indices((shape.rows, shape.most), dtype=jnp.int32))
    first = (piece == 0) & (row < shape.first_wave)
    rank = jnp.where(first, -1, jnp.where(piece < count[row], rank[row], CLASSES))
    codes = jnp.where(rank < CLASSES, row * PIECES + piece, shape.end)[jnp.argsort(rank)]
    return Plan(whole.astype(jnp.int32), jnp.pad(codes, (0, 2 * shape.streams_of_head), constant_values=shape.end))


def merge_partials(out, acc, maxima_sums, start_pos, num_tokens, sinks, v_scale, shape: Decode):
    """What the stream that ends a row's last piece does, in XLA: for the interpreter, which has no atomics.

    Args:
      out: `[rows, Q, H]`, right where a row is one item.
      acc: `[rows, G, pieces, H, columns]` float32.
      maxima_sums: `[rows, G, pieces, 2, columns]` float32, their maxima (log2) and sums.
      sinks: `[G, Q / G]` float32, in log2; MASKED for none.

    Returns:
      `[rows, Q, H]`.
    """
    count, _ = shape.cut(bounds(start_pos, num_tokens, shape.sliding_window)[2])
    whole = decode_plan(start_pos, num_tokens, shape).whole
    group, index = shape.group, jnp.arange(acc.shape[2])
    merged = []
    for row in range(shape.rows):
        mine = (index < count[row])[:, None]
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
    return jnp.where(whole[:, None, None], out, result)
