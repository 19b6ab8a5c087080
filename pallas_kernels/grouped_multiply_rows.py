"""The other way round for float8 and many rows: 64 rows are wgmma's M side, 128 columns of weights its N.

Then a thread holds two rows instead of a quarter of them: their scales are two registers, not 32, and 128 rows of gate
and up fit beside the product that is being scaled. Shared memory is read less: 6 KB for 64 x 128 x 32 terms instead of
5 for 64 x 96. A block with rows of one consumer only is shared by both, 64 of the 128 columns each: at 140 rows an
expert the second block of 12 would take as long as the first.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe.pallas_kernels import expert_products_share as sharing
from jmoe.pallas_kernels import simt, simt_marks
from jmoe.pallas_kernels.grouped_items import Item
from jmoe.pallas_kernels.grouped_matmul import SCALED
from jmoe.pallas_kernels.grouped_matmul_threads import store_rows
from jmoe.pallas_kernels.grouped_multiply import LAYOUT, Consumer, accumulator, swiglu
from jmoe.pallas_kernels.grouped_product import HALF, ROWS

# A turn is a barrier of both consumers, one of which waits; Mosaic's own barriers have the numbers up to 4.
_TAKE, _GIVE = "bar.sync", "bar.arrive"
_FIRST_BARRIER = 8


@dataclasses.dataclass(frozen=True)
class Mine(Item):
    """A consumer's part of an item.

    Attributes:
      start: where its ROWS rows begin within the stage's.
      columns: of each block of 128, which it takes; a slice.
      both: whether the other consumer has rows of the item, too.
    """

    start: Any
    columns: Any
    both: Any

    @property
    def size(self) -> tuple[int, int]:
        """Of one product."""
        return ROWS, self.columns.size


@dataclasses.dataclass(frozen=True)
class RowMultiplier(Consumer):
    """A consumer that takes 64 rows of the item's block, with all its columns, or half of the columns; of float8.

    Attributes:
      out_scales_g: where results are rounded to float8, their scales in global memory, else None.
    """

    out_scales_g: Any = None

    def visit(self, item: Item) -> None:
        """The item's rows of this consumer, or its columns of an item whose rows are few."""
        end = item.skipped + item.meant
        together = (end <= ROWS) if self.shape.blocks.consumers == 2 else False

        @pl.when(together)
        def _():
            columns = pl.ds(self.own * HALF, HALF)
            self._multiply_together(Mine(**vars(item), start=0, columns=columns, both=jnp.int32(0)))

        @pl.when(jnp.logical_not(together))
        def _():
            start = self.own * ROWS
            low, high = (jnp.clip(n - start, 0, ROWS) for n in (item.skipped, end))
            mine = {**vars(item), "first": item.first + start, "skipped": low, "meant": high - low}
            both = (item.skipped < ROWS).astype(jnp.int32)
            self._visit(Mine(**mine, start=start, columns=pl.ds(0, SCALED), both=both))

    def _visit(self, mine: Mine) -> None:
        @pl.when(mine.meant > 0)
        def _():
            self._multiply(mine)

        @pl.when(mine.meant <= 0)
        def _():
            lax.fori_loop(0, self.shape.steps, lambda k, _: self._pass(mine, k), None)

    def _pass(self, item: Item, k: Any) -> None:
        """A stage that nothing is needed of."""
        slot = lax.rem(item.step + k, jnp.int32(self.shape.stages))
        plgpu.barrier_wait(self.full.at[slot])
        plgpu.barrier_arrive(self.free.at[slot])

    def _multiply(self, item: Mine) -> None:
        products = self._products(item)
        tile = self.out_s.at[self.own]
        for part, out in enumerate(self._results(products)):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            tile[...] = out.astype(self.shape.out_dtype)
            plgpu.commit_smem()
            self._store(tile, item, self.shape.column(item.tile, part))

    def _multiply_together(self, item: Mine) -> None:
        """Both consumers' columns stand side by side in one tile a part, of which each stores half of the rows."""
        results = self._results(self._products(item))
        if self.shape.steps <= self.shape.stages:
            self.meet()  # the other may still store rows of the item before; it is never further behind than all stages
        for part, out in enumerate(results):
            self.out_s.at[part, :, item.columns][...] = out.astype(self.shape.out_dtype)
        plgpu.commit_smem()
        self.meet()
        before = lax.div(item.meant + 15, 16) * 8  # the first consumer's: groups start at multiples of 8
        low, high = (jnp.where(self.own == 0, *n) for n in ((0, before), (before, item.meant)))
        half = dataclasses.replace(item, skipped=item.skipped + low, meant=jnp.maximum(high - low, 0))
        for part in range(len(results)):
            self._store(self.out_s.at[part], half, self.shape.column(item.tile, part))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        self.meet()  # the tiles may be written again

    def _results(self, products: tuple[Any, ...]) -> tuple[Any, ...]:
        if not self.shape.gated:
            return products
        gate, up = products
        return (swiglu(gate, up, self.shape.interpret),)

    def _products(self, item: Mine) -> tuple[Any, ...]:
        """item.size float32 for each part; every 128 terms are summed by themselves and scaled."""
        shape, stages, size = self.shape, jnp.int32(self.shape.stages), item.size
        in_stage = self.shape.depth // SCALED
        at_once = 1 if size[1] == SCALED else shape.parts  # sums beside their totals in the registers
        by_row_g, by_block_g = self.scales

        def by_blocks(k):
            """Of 128 terms the weights' factor, of each part."""
            columns = [lax.div(shape.column(item.tile, part), SCALED) for part in range(shape.parts)]
            return [by_block_g[part][item.expert, column, k] for part, column in enumerate(columns)]

        def products(slot, n, start):
            """Of `at_once` parts from one on, the n-th 128 terms of a stage."""
            terms = pl.ds(n * SCALED, SCALED)
            rows = self.rows_s.at[slot, 0, pl.ds(item.start, ROWS), terms]

            def run(*accs):
                self._turn(_TAKE, item)
                for part, acc in enumerate(accs, start):
                    plgpu.wgmma(acc, rows, self.weights_s.at[slot, part, item.columns, terms].T)
                self._turn(_GIVE, item)
                return tuple(acc[...] for acc in accs)

            return pl.run_scoped(run, *[accumulator(size, jnp.float32)] * at_once)

        def step(k, totals):
            slot, totals = lax.rem(item.step + k, stages), list(totals)
            plgpu.barrier_wait(self.full.at[slot])  # rows' scales may be as new as the rows
            for n in range(in_stage):
                # There when the first product is. Asked for a step before, they leave too few registers: in some shapes
                # 60 of them went to memory and back in every step, and it took a third more.
                number = k * in_stage + n
                by_row, by_block = self.factors(by_row_g, ROWS, item.first, number, reduced=1), by_blocks(number)
                for start in range(0, shape.parts, at_once):
                    found: Any = products(slot, n, start)
                    if n == in_stage - 1 and start + at_once == shape.parts:
                        plgpu.barrier_arrive(self.free.at[slot])
                    for part, product in enumerate(found, start):
                        totals[part] += product * lax.broadcast_in_dim(by_row * by_block[part], size, (0,))
            return tuple(totals)

        none = plgpu.layout_cast(jnp.zeros(size, jnp.float32), LAYOUT)
        return lax.fori_loop(0, shape.steps, step, (none,) * shape.parts)

    def open(self) -> None:
        """Before the first item: the first consumer's turn comes from the second."""
        if self.turns:
            simt.program(_turn_program(_GIVE), words=(self.own, (self.own == 1).astype(jnp.int32)))

    @property
    def turns(self) -> bool:
        return not self.shape.interpret and self.shape.blocks.consumers == 2

    def _turn(self, what: str, item: Mine) -> None:
        """Products are asked for in turn, so that one consumer's stand in the tensor cores while the other scales its.

        Not where the block's rows end with the first consumer's.
        """
        if self.turns:
            simt.program(_turn_program(what), words=(self.own, item.both))

    def _store(self, tile: Any, item: Item, column: Any) -> None:
        """The tile to the rows that are meant, and columns from `column` on."""
        shape = self.shape
        scalars = item.first, item.skipped, item.meant, column
        if shape.interpret:
            for n in range(0, ROWS, 8):  # groups start at multiples of 8

                @pl.when((n >= item.skipped) & (n < item.skipped + item.meant))
                def _(n=n):
                    cells = pl.ds(item.first + n, 8), pl.ds(column, SCALED)
                    plgpu.copy_smem_to_gmem(tile.at[pl.ds(n, 8)], self.out_g.at[cells])

        elif self.out_scales_g is not None:
            sharing.store_float8(tile, self.out_g, self.out_scales_g, shape.out_transforms, 1, *scalars, jnp.int32(0))
        else:  # by threads: a store by TMA waits behind the loads, and the tile with it (qwen3, 4096: 672 us, not 458)
            store_rows(tile, self.out_g, shape.out_transforms, SCALED, *scalars)


def _turn_program(what: str):
    """`program(own, whether)`: waits for the consumer's turn, or gives it to the other one."""

    def program(own: simt.Word, whether: simt.Word) -> None:
        of = own if what == _TAKE else simt.word(1) - own
        text = f"{{ .reg .pred p; setp.ne.s32 p, $1, 0; @p {what} $0, {2 * simt.BLOCK_THREADS}; }}"
        simt_marks.run(text, [(of + _FIRST_BARRIER).value, whether.value], "r,r")

    return program
