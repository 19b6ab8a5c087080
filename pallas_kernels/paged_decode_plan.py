"""How decode attention cuts rows into pieces, and the XLA forms of what its thread blocks work out among themselves.

A unit is 16 tokens of one row. A row is cut into pieces of equal length, at places that its own length and the call's
sizes fix: no neighbour moves a cut, so none moves a bit of the result. Pieces, ordered by row and position, are what
streams attend to (`paged_decode_share`); a stream belongs to one KV head, and streams of all heads walk the pieces side
by side, so that they read neighbouring bytes of the same pages (a head's part of a token is 128 or 256 bytes, little
for DRAM to open a row for). A row of several pieces is merged in order of position.
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
PIECES_OF_STREAM = 4  # so many a stream has at least, where rows are long enough: blocks don't get equal bandwidth
SHORTEST = 256 // UNIT  # units of a piece: one leaves a partial result of 4 KB beside the 128 KB that it reads
LONGEST = 4096 // UNIT  # units of a piece, where the partial results are not too many: a row of 128k among short ones
MAX_PARTIALS = 1 << 14  # partial results that there is room for: 4 KB each
PIECES = 64  # bound of a row's pieces, as a word holds a row and a piece of it


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
    def cuts(self) -> "Cuts":
        wanted = -(-PIECES_OF_STREAM * self.streams_of_head // self.rows)
        capacity = -(-self.max_pages * self.page_len // (SHORTEST * UNIT))
        most = max(1, min(PIECES, capacity, MAX_PARTIALS // (self.rows * self.num_kv_heads)))
        return Cuts(min(wanted, most), most)


@dataclasses.dataclass(frozen=True)
class Cuts:
    """Into how many pieces a row is cut if it is long enough, and at most."""

    wanted: int
    most: int

    def of(self, units):
        """(pieces, units of each but the last) of rows of so many units; an array or a scalar."""
        count = jnp.maximum(_ceil(units, LONGEST), self.wanted)
        count = jnp.minimum(jnp.minimum(count, self.most), _ceil(units, SHORTEST))
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
    """What each stream of a KV head attends to where streams take pieces in turn: for the interpreter, without atomics.

    Returns:
      `[streams of a head, n]` int32, row * PIECES + piece; rows * PIECES behind a stream's last.
    """
    count, _ = shape.cuts.of(bounds(start_pos, num_tokens, shape.sliding_window)[2])
    ends = jnp.cumsum(count)
    rounds = -(-shape.rows * shape.cuts.most // shape.streams_of_head) + 2
    piece = jnp.arange(rounds * shape.streams_of_head, dtype=jnp.int32)
    row = jnp.sum(ends[None, :] <= piece[:, None], axis=1, dtype=jnp.int32)
    first = (ends - count)[jnp.minimum(row, shape.rows - 1)]
    words = jnp.where(row < shape.rows, row * PIECES + piece - first, shape.rows * PIECES)
    return words.reshape(rounds, -1).T.astype(jnp.int32)


def merge_partials(out, acc, maxima_sums, start_pos, num_tokens, sinks, v_scale, shape: Decode):
    """What the last stream of each row and head does, in XLA: for the interpreter, which has no atomics.

    Args:
      out: `[rows, Q, H]`, right where a row is one piece.
      acc: `[rows, G, pieces, H, columns]` float32.
      maxima_sums: `[rows, G, pieces, 2, columns]` float32, their maxima (log2) and sums.
      sinks: `[G, Q / G]` float32, in log2; MASKED for none.

    Returns:
      `[rows, Q, H]`.
    """
    count, _ = shape.cuts.of(bounds(start_pos, num_tokens, shape.sliding_window)[2])
    group, most = shape.group, acc.shape[2]
    merged = []
    for row in range(shape.rows):
        mine = (jnp.arange(most) < count[row])[:, None]
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
    return jnp.where((count > 1)[:, None, None], result, out)
