"""The other way round for float8 and many rows: 64 rows are wgmma's M side, 128 columns of weights its N.

Then a thread holds two rows instead of a quarter of them: their scales are two registers, not 32, and two sums of 64 x
128 fit beside the product that is being scaled. Shared memory is read less: 6 KB for 64 x 128 x 32 terms instead of 5
for 64 x 96. A block of rows that is partly empty costs a multiple of 64 rows.

Two sums are 128 columns of gate and up for 64 rows, or 64 columns of each for two times 64 rows. The second form reads
the rows twice as often and the weights half as often: for experts whose rows don't fill two blocks of 128.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe.pallas_kernels import expert_products_share as sharing
from jmoe.pallas_kernels import simt, simt_marks, wgmma_ahead
from jmoe.pallas_kernels.grouped_items import Item
from jmoe.pallas_kernels.grouped_matmul import SCALED
from jmoe.pallas_kernels.grouped_matmul_threads import store_rows
from jmoe.pallas_kernels.grouped_multiply import LAYOUT, Consumer, accumulator, swiglu
from jmoe.pallas_kernels.grouped_product import HALF, ROWS, transforms

# A turn is a barrier of both consumers, one of which waits; Mosaic's own barriers have the numbers up to 4.
_TAKE, _GIVE = "bar.sync", "bar.arrive"
_FIRST_BARRIER = 8
_CONSUMERS = 2


@dataclasses.dataclass(frozen=True)
class RowMultiplier(Consumer):
    """A consumer that takes every second 64 rows of the item's block, with all its columns; of float8.

    Attributes:
      out_scales_g: where results are rounded to float8, their scales in global memory, else None.
    """

    out_scales_g: Any = None

    def visit(self, item: Item) -> None:
        """The item's rows of this consumer, if any are meant."""
        used = lax.div(item.skipped + item.meant + (ROWS - 1), ROWS)  # of the block's 64 rows each
        count = lax.div(used - self.own + (_CONSUMERS - 1), _CONSUMERS)
        alike = (lax.rem(used, _CONSUMERS) == 0).astype(jnp.int32)
        for number in range(1 + -(-self.shape.row_copies // _CONSUMERS)):

            @pl.when(count == number)
            def _(number=number):
                if number:
                    self._multiply(item, [self.own + i * _CONSUMERS for i in range(number)], alike)
                else:
                    lax.fori_loop(0, self.shape.steps, lambda k, _: self._pass_by(item, k), None)

    def _pass_by(self, item: Item, k: Any) -> None:
        """A stage that nothing is needed of."""
        slot = lax.rem(item.step + k, jnp.int32(self.shape.stages))
        plgpu.barrier_wait(self.full.at[slot])
        plgpu.barrier_arrive(self.free.at[slot])

    def _multiply(self, item: Item, places: list[Any], alike: Any) -> None:
        """places: which 64 rows of the block; alike: whether the other consumer has as many."""
        shape, width = self.shape, SCALED // self.shape.passes

        def make(number, _=None):
            joined = shape.joined and len(places) == 1 and not shape.interpret
            totals = self._joined_products(item, number) if joined else self._products(item, places, alike, number)
            for place, part, out in self._results(places, totals):
                tile = self.out_s.at[place]
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                tile.at[:, pl.ds(number * width, width)][...] = out.astype(shape.out_dtype)
                plgpu.commit_smem()
                store = functools.partial(self._store, tile, _rows_of(item, place), shape.column(item.tile, part))
                pl.when(number == shape.passes - 1)(store)

        if shape.passes > 1:
            lax.fori_loop(0, shape.passes, make, None)
        else:
            make(0)

    def _results(self, places: list[Any], totals: tuple[Any, ...]) -> list[tuple[Any, int, Any]]:
        """(place, part, what is to be stored)."""
        shape = self.shape
        if not shape.joined:
            found = (swiglu(*totals, shape.interpret),) if shape.gated else totals
            return [(places[0], part, out) for part, out in enumerate(found)]
        if shape.gated:
            totals = tuple(swiglu(*_halves(total, shape.interpret), shape.interpret) for total in totals)
        return [(place, 0, out) for place, out in zip(places, totals, strict=True)]

    def _products(self, item: Item, places: list[Any], alike: Any, number: Any) -> tuple[Any, ...]:
        """[ROWS, SCALED] float32 of a pass, for each place or part; 128 terms are summed by themselves and scaled."""
        shape, size = self.shape, (ROWS, SCALED)
        sums = [(i, part) for i in range(len(places)) for part in range(1 if shape.joined else shape.parts)]
        begin = item.step + number * shape.steps_of_pass

        def product(slot, place, part):
            def run(acc):
                self._turn(_TAKE, alike)
                rows = self.rows_s.at[slot, 0, pl.ds(place * ROWS, ROWS)]
                plgpu.wgmma(acc, rows, self.weights_s.at[slot, part].T)
                self._turn(_GIVE, alike)
                return acc[...]

            return pl.run_scoped(run, accumulator(size, jnp.float32))

        def step(k, totals):
            slot, totals = lax.rem(begin + k, jnp.int32(shape.stages)), list(totals)
            plgpu.barrier_wait(self.full.at[slot])  # rows' scales may be as new as the rows
            by_row, by_block = None, self._by_blocks(item, number, k)
            for n, (i, part) in enumerate(sums):
                # There when the product is. Asked for a step before, they leave too few registers: in some shapes 60 of
                # them went to memory and back in every step, and it took a third more.
                if part == 0:
                    by_row = self.factors(self.scales[0], ROWS, item.first + places[i] * ROWS, k, reduced=1)
                found: Any = product(slot, places[i], part)
                if n == len(sums) - 1:
                    plgpu.barrier_arrive(self.free.at[slot])
                totals[n] += found * self._factors(by_row, by_block, part)
            return tuple(totals)

        none = plgpu.layout_cast(jnp.zeros(size, jnp.float32), LAYOUT)
        return lax.fori_loop(0, shape.steps_of_pass, step, (none,) * len(sums))

    def _joined_products(self, item: Item, number: Any) -> tuple[Any, ...]:
        """The same for joined parts: a step's product is in the tensor cores while the one before it is scaled."""
        shape, size = self.shape, (ROWS, SCALED)
        at_once = max(n for n in (1, 2, 3, 4) if shape.steps_of_pass % n == 0)
        begin = item.step + number * shape.steps_of_pass

        def ask(step):
            """A step's product, on its way, and what it takes to add it."""
            slot = lax.rem(begin + step, jnp.int32(shape.stages))
            plgpu.barrier_wait(self.full.at[slot])  # rows' scales may be as new as the rows
            by_row = self.factors(self.scales[0], ROWS, item.first + self.own * ROWS, step, reduced=1)
            factors = self._factors(by_row, self._by_blocks(item, number, step), 0)
            rows = self.rows_s.at[slot, 0, pl.ds(self.own * ROWS, ROWS)]
            return slot, wgmma_ahead.ask(rows, self.weights_s.at[slot, 0], transforms(shape.in_dtype)), factors

        def add(total, asked, pending):
            slot, found, factors = asked
            plgpu.wgmma_wait(pending)
            found = wgmma_ahead.settled(found)
            plgpu.barrier_arrive(self.free.at[slot])
            return total + found * factors

        def steps(k, total):
            before = ask(k * at_once)
            for n in range(1, at_once):
                now = ask(k * at_once + n)
                total, before = add(total, before, 1), now
            return add(total, before, 0)

        none = plgpu.layout_cast(jnp.zeros(size, jnp.float32), LAYOUT)
        return (lax.fori_loop(0, shape.steps_of_pass // at_once, steps, none),)

    def _by_blocks(self, item: Item, number: Any, k: Any) -> list[Any]:
        """Of 128 terms the weights' factor of each part."""
        parts = range(1 if self.shape.joined and not self.shape.gated else self.shape.parts)
        columns = [lax.div(self.shape.column(item.tile, part, number), SCALED) for part in parts]
        return [self.scales[1][part][item.expert, column, k] for part, column in enumerate(columns)]

    def _factors(self, by_row: Any, by_block: list[Any], part: int) -> Any:
        """Of a product; joined parts of gate and up have each their own."""
        if self.shape.joined and self.shape.gated:
            return _side_by_side(by_row * by_block[0], by_row * by_block[1], self.shape.interpret)
        return lax.broadcast_in_dim(by_row * by_block[part], (ROWS, SCALED), (0,))

    def open(self) -> None:
        """Before the first item: the first consumer's turn comes from the second."""
        if not self.shape.interpret:
            simt.program(_turn_program(_GIVE), words=(self.own, (self.own == 1).astype(jnp.int32)))

    def _turn(self, what: str, alike: Any) -> None:
        """Products are asked for in turn, so that one consumer's stand in the tensor cores while the other scales its.

        Not where one has more of them.
        """
        if not self.shape.interpret:
            simt.program(_turn_program(what), words=(self.own, alike))

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


def _rows_of(item: Item, place: Any) -> Item:
    """The item with the 64 rows of its block at this place."""
    start = place * ROWS
    low, high = (jnp.clip(n - start, 0, ROWS) for n in (item.skipped, item.skipped + item.meant))
    return dataclasses.replace(item, first=item.first + start, skipped=low, meant=high - low)


def _halves(x: Any, interpret: bool) -> tuple[Any, Any]:
    """The first and the last HALF of SCALED columns; no instruction: a thread has some of each in its registers."""
    if interpret:
        return x[:, :HALF], x[:, HALF:]
    half = plgpu.ShapeDtypeStruct((ROWS, HALF), jnp.float32, layout=LAYOUT)

    @plgpu.inline_mgpu(arg_types=(LAYOUT,), return_type=(half, half))
    def inlined(_ctx, x):
        return tuple(_array(registers, x.layout) for registers in np.split(x.registers, 2, axis=1))

    return inlined(x)  # pyright: ignore[reportReturnType]


def _side_by_side(left: Any, right: Any, interpret: bool) -> Any:
    """[ROWS, SCALED], `left` by row in the first HALF of the columns and `right` in the others."""
    if interpret:
        return jnp.concatenate([lax.broadcast_in_dim(x, (ROWS, HALF), (0,)) for x in (left, right)], axis=1)
    by_row: Any = LAYOUT.reduce(1)
    whole = plgpu.ShapeDtypeStruct((ROWS, SCALED), jnp.float32, layout=LAYOUT)

    @plgpu.inline_mgpu(arg_types=(by_row, by_row), return_type=whole)
    def inlined(_ctx, *factors):
        layout = LAYOUT.to_mgpu()
        parts = [factor.broadcast_in_dim((ROWS, HALF), (0,), layout).registers for factor in factors]
        return _array(np.concatenate(parts, axis=1), layout)

    return inlined(left, right)  # pyright: ignore[reportCallIssue]


def _array(registers: Any, layout: Any) -> Any:
    return fragmented_array.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def _turn_program(what: str):
    """`program(own, whether)`: waits for the consumer's turn, or gives it to the other one."""

    def program(own: simt.Word, whether: simt.Word) -> None:
        of = own if what == _TAKE else simt.word(1) - own
        text = f"{{ .reg .pred p; setp.ne.s32 p, $1, 0; @p {what} $0, {_CONSUMERS * simt.BLOCK_THREADS}; }}"
        simt_marks.run(text, [(of + _FIRST_BARRIER).value, whether.value], "r,r")

    return program
