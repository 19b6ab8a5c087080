"""A stream of decode attention: which pieces of which rows are its own, and the warpgroup that loads their pages."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe.pallas_kernels import paged_decode_plan as planning
from jmoe.pallas_kernels import paged_decode_share as sharing
from jmoe.pallas_kernels.paged_decode_plan import PIECES, TILE_UNITS, UNIT, Decode


def num_tiles(units):
    return lax.div(units + (TILE_UNITS - 1), jnp.int32(TILE_UNITS))


@dataclasses.dataclass(frozen=True)
class Stream:
    """One warpgroup's view of it.

    Attributes:
      shape: of the call.
      number, head: of the stream, and its KV head.
      start_g, tokens_g: positions and numbers of the rows' new tokens.
      plan_g: `decode_plan`, of the interpreter alone.
      words_s: what the warpgroup worked out, `[WORDS]` int32.
    """

    shape: Decode
    number: Any
    head: Any
    start_g: Any
    tokens_g: Any
    plan_g: Any
    words_s: Any

    def ends(self):
        """Row and piece where the range begins and ends; read wherever they are needed, to save registers."""
        if self.shape.interpret:
            codes = [self.plan_g[lax.div(self.number, jnp.int32(self.shape.num_kv_heads)), i] for i in (0, 1)]
        else:
            codes = [self.words_s[i] for i in (sharing.BEGIN, sharing.END)]
        return [(lax.div(code, jnp.int32(PIECES)), lax.rem(code, jnp.int32(PIECES))) for code in codes]

    def bounds(self, row):
        tokens = 1 if self.tokens_g is None else self.tokens_g[row]
        return planning.bounds(self.start_g[row], tokens, self.shape.sliding_window)

    def pieces(self, row, units):
        """First piece of a row that is the stream's, the one behind its last; all of them, and units of each."""
        count, each = self.shape.cut(units)
        (first_row, first_piece), (end_row, end_piece) = self.ends()
        first = jnp.where(row == first_row, first_piece, 0)
        return first, jnp.where(row == end_row, end_piece, count), count, each

    def walk(self, fetch, segment):
        """segment(row, fetched, tile) for what the stream has of each row; how many tiles there were."""

        def step(state):
            row, tile, fetched = state
            ahead = fetch(jnp.minimum(row + 1, self.shape.rows - 1))
            return row + 1, tile + segment(row, fetched, tile), ahead

        (first_row, _), (end_row, end_piece) = self.ends()
        last_row = jnp.where(end_piece > 0, end_row, end_row - 1)
        start = first_row, jnp.int32(0), fetch(jnp.minimum(first_row, self.shape.rows - 1))
        return lax.while_loop(lambda state: state[0] <= last_row, step, start)[1]


def load_pages(stream: Stream, table_g, sides, behind: Callable[[], None]) -> None:
    """Brings all tiles of a stream; leaves no barrier with a phase that nobody saw.

    Args:
      table_g: `[rows, max_pages]`.
      sides: (pages in memory, their tiles in shared memory, barriers of full and of free tiles) of keys and of values.
      behind: called when all were asked for, before the last ones are there.
    """
    shape, stages = stream.shape, stream.shape.stages

    def segment(row, fetched, tile):
        low, _, units = fetched
        first, last, _, each = stream.pieces(row, units)
        base = lax.div(low, jnp.int32(UNIT)) + first * each
        length = jnp.minimum(last * each, units) - first * each

        def load(i, _):
            slot = lax.rem(tile + i, jnp.int32(stages))
            where = []
            for j in range(TILE_UNITS):  # behind the row's end its last unit again, out of L2
                token = (base + jnp.minimum(i * TILE_UNITS + j, length - 1)) * UNIT
                page = table_g[row, lax.div(token, jnp.int32(shape.page_len))]
                where.append((page, pl.ds(lax.rem(token, jnp.int32(shape.page_len)), UNIT), stream.head))
            for pages, smem, full, free in sides:

                @pl.when(tile + i >= stages)
                def _(free=free):
                    plgpu.barrier_wait(free.at[slot])

                for j, cells in enumerate(where):
                    to = smem.at[slot, pl.ds(j * UNIT, UNIT)]
                    plgpu.copy_gmem_to_smem(pages.at[cells], to, full.at[slot])

        lax.fori_loop(0, num_tiles(length), load, None)
        return num_tiles(length)

    brought = stream.walk(stream.bounds, segment)
    behind()
    for last in range(1, stages + 1):

        @pl.when(brought >= last)
        def _(last=last):
            for *_, free in sides:
                plgpu.barrier_wait(free.at[lax.rem(brought - last, jnp.int32(stages))])
