"""How the blocks of a grouped product share out the work: items of (expert, columns, rows), taken in turn."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jmoe.pallas_kernels.grouped_blocks import UNIT
from jmoe.pallas_kernels.grouped_matmul_threads import find_expert, line_up_items


@dataclasses.dataclass(frozen=True)
class Item:
    """One item of a block's walk; scalars.

    Attributes:
      expert: whose weights.
      tile: block of columns.
      first: row that its rows start at, a multiple of 8: TMA takes tiles of 8 rows, and would fill zeros in.
      skipped: rows at its begin that aren't meant; meant: rows behind them that are.
      step: steps of this thread block before it; count: items.
      blocks: blocks of rows that the expert has.
    """

    expert: Any
    tile: Any
    first: Any
    skipped: Any
    meant: Any
    step: Any
    count: Any
    blocks: Any


@dataclasses.dataclass(frozen=True)
class Groups:
    """Where the groups stand, as one warpgroup sees it.

    Attributes:
      num_experts, block_rows, num_rows: static.
      sizes, starts: in global memory; starts may be None.
      words: of `line_up_items`, this warpgroup's; None in the interpreter, which has no single threads.
    """

    num_experts: int
    block_rows: int
    num_rows: int
    sizes: Any
    starts: Any
    words: Any

    def line_up(self) -> None:
        """Reads sizes and starts; before anything else."""
        if self.words is not None:
            groups = (self.sizes,) if self.starts is None else (self.sizes, self.starts)
            line_up_items(self.num_experts, self.block_rows, self.words, *groups)

    @property
    def num_blocks(self) -> Any:
        """Blocks of rows of all experts; not in the interpreter."""
        return self.words[0, self.num_experts]

    def walk(
        self, tiles: int, steps: int, visit: Callable[[Item], None], advance: Callable[[Any, Any], Any],
        start: tuple[Any, Any, Any], before: Any = 0,
    ) -> tuple[Any, Any, Any]:  # fmt: skip
        """visit(...) for item after item, as long as there are any.

        Args:
          tiles: blocks of columns.
          steps: of one item.
          visit: what to do with an item.
          advance: from an item's number, and how many this thread block had before it, to the next one's number.
          start: number of the first item, items and steps of this thread block before it.
          before: items, of another product, that are numbered before these.

        Returns:
          The same as `start` of the item that isn't there.
        """

        def body(state):
            item, (expert, base, size, start), count, step = state
            others = lax.rem(start, jnp.int32(UNIT))
            blocks = lax.div(size + others + (self.block_rows - 1), jnp.int32(self.block_rows))
            tile, row_block = lax.div(item - before - base, blocks), lax.rem(item - before - base, blocks)
            begin = start - others + row_block * self.block_rows
            skipped = jnp.where(row_block == 0, others, 0)
            end = jnp.minimum(size + others - row_block * self.block_rows, self.block_rows)
            first = jnp.minimum(begin, self.num_rows - self.block_rows)  # no block reaches behind the last row
            first = pl.multiple_of(first, UNIT)
            visit(Item(expert, tile, first, begin - first + skipped, end - skipped, step, count, blocks))
            item = advance(item, count)
            return item, self._of(item - before, tiles), count + 1, step + steps

        item, count, step = start
        state = item, self._of(item - before, tiles), jnp.asarray(count, jnp.int32), jnp.asarray(step, jnp.int32)
        item, _, count, step = lax.while_loop(lambda state: state[1][0] < self.num_experts, body, state)
        return item, count, step

    def _of(self, item: Any, tiles: int) -> tuple[Any, ...]:
        """(expert, its first item, size, start); behind the last item the expert is num_experts."""
        if self.words is None:
            return self._interpreted(item, tiles)
        expert = find_expert(self.num_experts, tiles, self.words, item)
        return expert, self.words[0, expert] * tiles, self.words[1, expert], self.words[2, expert]

    def _interpreted(self, item: Any, tiles: int) -> tuple[jax.Array, ...]:
        """The same, an expert after the other."""

        def size_and_start(expert, before):
            here = jnp.minimum(expert, self.num_experts - 1)
            return self.sizes[here], before if self.starts is None else self.starts[here]

        def items(size, start):
            blocks = lax.div(size + lax.rem(start, jnp.int32(UNIT)) + (self.block_rows - 1), jnp.int32(self.block_rows))
            return jnp.where(size > 0, blocks * tiles, 0)

        def passes(state):
            expert, base, before = state
            return (expert < self.num_experts) & (item >= base + items(*size_and_start(expert, before)))

        def step(state):
            expert, base, before = state
            size, start = size_and_start(expert, before)
            return expert + 1, base + items(size, start), before + size

        expert, base, before = lax.while_loop(passes, step, (jnp.int32(0), jnp.int32(0), jnp.int32(0)))
        return expert, base, *size_and_start(expert, before)
