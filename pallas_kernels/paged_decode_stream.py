"""A stream of decode attention: which pieces are its own, and the warpgroup that loads their pages."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe.pallas_kernels import paged_decode_plan as planning
from jmoe.pallas_kernels import paged_decode_queue as queue
from jmoe.pallas_kernels import simt
from jmoe.pallas_kernels.paged_decode_plan import PIECES, TILE_UNITS, UNIT, Decode


def num_tiles(units):
    return lax.div(units + (TILE_UNITS - 1), jnp.int32(TILE_UNITS))


@dataclasses.dataclass(frozen=True)
class Stream:
    """What all its warpgroups know of it.

    Attributes:
      shape: of the call.
      number, head: of the stream among its head's, and its KV head.
      start_g, tokens_g: positions and numbers of the rows' new tokens.
      whole_g, plan_g: `decode_plan`, of the interpreter alone.
      counters_g: of the head.
      words_s, rows_s: what the stream worked out, and the pieces that were announced, `[WORDS + messages]` and `[rows]`
        int32.
      announced: barriers, one a message.
    """

    shape: Decode
    number: Any
    head: Any
    start_g: Any
    tokens_g: Any
    whole_g: Any
    plan_g: Any
    counters_g: Any
    words_s: Any
    rows_s: Any
    announced: Any

    def bounds(self, row):
        tokens = 1 if self.tokens_g is None else self.tokens_g[row]
        return planning.bounds(self.start_g[row], tokens, self.shape.sliding_window)

    def extent(self, code):
        """Of a piece: its row, its number, how many the row has, its first unit behind `low`, units, low and high."""
        row, piece = lax.div(code, jnp.int32(PIECES)), lax.rem(code, jnp.int32(PIECES))
        low, high, units = self.bounds(row)
        count, each = self.shape.cut(units)
        return row, piece, count, piece * each, jnp.minimum(each, units - piece * each), low, high

    def queries_of(self, row):
        """Rows of q that fill the columns, and how many of the first ones belong to others."""
        want = row * self.shape.num_heads + self.head * self.shape.group
        start = jnp.minimum(want, self.shape.flat_rows - self.shape.columns)
        return start, want - start

    def whole(self, row):
        """Whether all of a row's pieces are one item."""
        if self.shape.interpret:
            return self.whole_g[row] == 1
        return lax.rem(self.rows_s[row], jnp.int32(queue.HALF)) >= queue.WHOLE

    def plan(self):
        given = [self.start_g, *([] if self.tokens_g is None else [self.tokens_g])]
        program = queue.plan_program(self.shape, self.tokens_g is not None)
        simt.program(program, *given, self.counters_g, self.words_s, self.rows_s)

    def take(self, first, cut, row):
        """Draws a ticket; `find` says which item it is for."""
        words = first.astype(jnp.int32), cut.astype(jnp.int32), row
        simt.program(queue.take_program(self.shape), self.counters_g, self.words_s, words=words)

    def find(self):
        simt.program(queue.find_program(self.shape), self.counters_g, self.words_s, self.rows_s)
        return self.words_s[queue.CODE]

    def ended(self, row, count):
        """Counts a piece, of so many, whose partial result was stored."""
        simt.program(queue.ended_program(self.shape), self.counters_g, self.words_s, words=(row, count))

    def ended_before(self):
        return self.words_s[queue.BEFORE]

    def announce(self, count, code):
        """Puts a piece, or `end`, where the others look once the message's barrier lets them."""
        self.words_s[queue.WORDS + self.message(count)] = code

    def message(self, count):
        return lax.rem(count, jnp.int32(self.shape.messages))

    def heard(self, count):
        """What was announced, once it was."""
        plgpu.barrier_wait(self.announced.at[self.message(count)])
        return self.words_s[queue.WORDS + self.message(count)]


def load_pages(stream: Stream, planned, table_g, queries, sides) -> None:
    """Brings all tiles of a stream; leaves no barrier with a phase that nobody saw.

    Args:
      planned: the barrier of the stream's plan.
      table_g: `[rows, max_pages]`.
      queries: q `[rows * Q, H]` in memory, and a place in shared memory a message.
      sides: (pages in memory, their tiles in shared memory, how many, barriers of full and of free ones) of keys and of
        values.
    """
    shape = stream.shape

    def load_piece(pieces, items, tile, code):
        """How many tiles it has. The next ticket is drawn before the last one, to be there behind it."""
        row, piece, count, first, length, low, _ = stream.extent(code)
        q_g, q_s = queries
        stream.announce(pieces, code)
        at = stream.message(pieces)
        own = pl.ds(stream.queries_of(row)[0], shape.columns)
        plgpu.copy_gmem_to_smem(q_g.at[own], q_s.at[at], stream.announced.at[at])
        base, tiles = lax.div(low, jnp.int32(UNIT)) + first, num_tiles(length)

        def draw():
            @pl.when((pieces == 0) & (stream.number < shape.first_wave))
            def _():
                plgpu.barrier_wait(planned)

            whole = stream.whole(row)

            @pl.when(jnp.logical_not(whole) | (piece == count - 1))
            def _():
                stream.take(items == 0, jnp.logical_not(whole), row)

        def load(i, _):
            where = []
            for j in range(TILE_UNITS):  # behind the row's end its last unit again, out of L2
                token = (base + jnp.minimum(i * TILE_UNITS + j, length - 1)) * UNIT
                page = table_g[row, lax.div(token, jnp.int32(shape.page_len))]
                where.append((page, pl.ds(lax.rem(token, jnp.int32(shape.page_len)), UNIT), stream.head))
            if not shape.interpret:
                pl.when(i == tiles - 1)(draw)
            for pages, smem, stages, full, free in sides:
                slot = lax.rem(tile + i, jnp.int32(stages))

                @pl.when(tile + i >= stages)
                def _(free=free, slot=slot):
                    plgpu.barrier_wait(free.at[slot])

                for j, cells in enumerate(where):
                    to = smem.at[slot, pl.ds(j * UNIT, UNIT)]
                    plgpu.copy_gmem_to_smem(pages.at[cells], to, full.at[slot])

        lax.fori_loop(0, tiles, load, None)
        return tiles

    def begin():
        """A row of the first wave, or what comes behind it."""

        def behind():
            plgpu.barrier_wait(planned)
            simt.program(queue.begin_program(shape), stream.words_s)
            return stream.find()

        if shape.interpret:
            return stream.plan_g[stream.number]
        return lax.cond(stream.number < shape.first_wave, lambda: stream.number * PIECES, behind)

    def next_item(items):
        return stream.plan_g[stream.number + items * shape.streams_of_head] if shape.interpret else stream.find()

    def step(state):
        pieces, items, tile, code = state
        tile = tile + load_piece(pieces, items, tile, code)
        row, piece, count = stream.extent(code)[:3]
        more = stream.whole(row) & (piece < count - 1)
        items = items + jnp.where(more, 0, 1)
        return pieces + 1, items, tile, lax.cond(more, lambda: code + 1, lambda: next_item(items))

    start = jnp.int32(0), jnp.int32(0), jnp.int32(0), begin()
    pieces, _, brought, _ = lax.while_loop(lambda state: state[3] < shape.end, step, start)
    stream.announce(pieces, jnp.int32(shape.end))
    plgpu.barrier_arrive(stream.announced.at[stream.message(pieces)])
    if not shape.interpret:

        @pl.when(pieces == 0)
        def _():
            stream.take(pieces == 0, pieces > 0, pieces)
            stream.find()

    for _pages, _tiles, stages, _full, free in sides:
        for last in range(1, stages + 1):

            @pl.when(brought >= last)
            def _(free=free, stages=stages, last=last):
                plgpu.barrier_wait(free.at[lax.rem(brought - last, jnp.int32(stages))])
