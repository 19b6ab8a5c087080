"""What a warpgroup of the grouped products' kernel does with one item: wgmma, SwiGLU, the rows' weights, out."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

from jmoe.pallas_kernels import simt, simt_marks
from jmoe.pallas_kernels.grouped_items import Item
from jmoe.pallas_kernels.grouped_matmul import SCALED
from jmoe.pallas_kernels.grouped_matmul_threads import load_by_row, store_rows
from jmoe.pallas_kernels.grouped_product import HALF

LAYOUT = plgpu.Layout.WGMMA
TURNED = plgpu.Layout.WGMMA_TRANSPOSED  # pairs along M: what is stored by rows
accumulator: Any = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]


@dataclasses.dataclass(frozen=True)
class Consumer:
    """One consumer's view of the kernel.

    Attributes:
      shape: the `Product`.
      own: number of this consumer.
      weights_s, rows_s, full, free: the stages of the pipeline.
      out_s: tiles of results, `Product.out_tiles`.
      met: a barrier of all consumers.
      scales: (rows' scales, of each part the weights' scales), in global memory.
      out_g: in global memory.
    """

    shape: Any
    own: Any
    weights_s: Any
    rows_s: Any
    out_s: Any
    full: Any
    free: Any
    met: Any
    scales: tuple[Any, tuple[Any, ...]]
    out_g: Any

    def factors(self, source: Any, num_rows: int, first: Any, column: Any, reduced: int) -> Any:
        """source[first : first + num_rows, column], a factor of each row; see `load_by_row`."""
        if not self.shape.interpret:
            return load_by_row(source, num_rows, first, jnp.int32(column), reduced)
        cells = source.at[pl.ds(first, num_rows)]
        cells = cells if len(source.shape) == 1 else cells.at[:, column]
        layout: Any = LAYOUT.reduce(reduced)
        return plgpu.load(cells, layout=layout, optimized=False)  # pyright: ignore[reportCallIssue]

    def meet(self) -> None:
        """All consumers are here."""
        if self.shape.blocks.consumers > 1:
            plgpu.barrier_arrive(self.met)
            plgpu.barrier_wait(self.met)


@dataclasses.dataclass(frozen=True)
class Multiplier(Consumer):
    """A consumer that takes its share of the columns; row_weights_g: in global memory, or None."""

    row_weights_g: Any = None

    @property
    def halves(self) -> int:
        return self.shape.share // HALF

    def visit(self, item: Item) -> None:
        """The item's columns of this consumer, HALF at a time."""
        shape, rows = self.shape, self.shape.blocks.block_rows
        found = self.products(item)
        by_row = None if self.row_weights_g is None else self._factors(self.row_weights_g, item.first)
        for (part, half), out in zip(self.shape.sums, self.results(found), strict=False):
            if by_row is not None:
                out = out * lax.broadcast_in_dim(by_row, (HALF, rows), (1,))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            self.out_s.at[self.own].T[...] = plgpu.layout_cast(out.astype(shape.out_dtype), TURNED)
            plgpu.commit_smem()
            self._store(item, self._column(item, part, half))

    def products(self, item: Item) -> tuple[Any, ...]:
        """[HALF, block_rows] float32 for each part and half."""
        return (self._scaled_products if self.shape.small else self._products)(item)

    def results(self, found: tuple[Any, ...]) -> Iterator[Any]:
        """Of the products what is said: gate and up as one, neighbouring columns one by one."""
        for i, gate in enumerate(found[: self.halves] if self.shape.gated else found):
            yield swiglu(gate, found[self.halves + i], self.shape.interpret) if self.shape.gated else gate

    def _column(self, item: Item, part: int, half: int) -> Any:
        """The first column of one wgmma, in the weights."""
        return self.shape.column(item.tile, part) + self.own * self.shape.share + half * HALF

    def _columns(self, half: int) -> Any:
        """Columns of one wgmma within a stage."""
        return pl.ds(self.own * self.shape.share + half * HALF, HALF)

    def _parts(self, part: int) -> list[tuple[int, int]]:
        """(part of the weights, part of the rows) whose products are one sum."""
        return [(n, n) for n in range(self.shape.parts)] if self.shape.split == "terms" else [(part, 0)]

    def _products(self, item: Item) -> tuple[Any, ...]:
        stages, steps = jnp.int32(self.shape.stages), self.shape.steps

        def sums(*accs):
            def step(k, _):
                slot = lax.rem(item.step + k, stages)
                plgpu.barrier_wait(self.full.at[slot])
                self._fence()
                for (part, half), acc in zip(self.shape.sums, accs, strict=True):
                    for of_weights, of_rows in self._parts(part):
                        weights = self.weights_s.at[slot, of_weights, :, self._columns(half)].T
                        plgpu.wgmma(acc, weights, self.rows_s.at[slot, of_rows].T)
                # Of the step before this one nothing is still read.
                plgpu.wgmma_wait(len(accs) * len(self._parts(0)))

                @pl.when(k > 0)
                def _():
                    plgpu.barrier_arrive(self.free.at[lax.rem(item.step + k - 1, stages)])

            lax.fori_loop(0, steps, step, None)
            return tuple(acc[...] for acc in accs)

        kind = accumulator((HALF, self.shape.blocks.block_rows), jnp.float32)
        found: Any = pl.run_scoped(sums, *[kind] * len(self.shape.sums))
        plgpu.barrier_arrive(self.free.at[lax.rem(item.step + steps - 1, stages)])
        return found

    def _fence(self) -> None:
        """Before sums go on. Without it ptxas 13.5 (not 13.0 to 13.4) puts one in and, as threads may part in the loop
        over items as it sees it, runs all wgmma one after the other (its note C7519)."""
        if not self.shape.interpret:
            simt.program(lambda: simt_marks.run("wgmma.fence.sync.aligned;", [], ""))

    def _factors(self, source: Any, first: Any, column: Any = 0) -> Any:
        return self.factors(source, self.shape.blocks.block_rows, first, column, reduced=0)

    def _scaled_products(self, item: Item) -> tuple[Any, ...]:
        """The same; every 128 terms are summed by themselves and scaled: wgmma's float8 sums keep few bits."""
        shape, b = self.shape, self.shape.blocks
        stages, size, sums = jnp.int32(shape.stages), (HALF, b.block_rows), shape.sums
        by_row_g, by_block_g = self.scales
        fits = max(1, 160 // b.block_rows)  # sums beside their totals in the registers
        at_once = max(n for n in range(1, len(sums) + 1) if n <= fits and len(sums) % n == 0)
        in_stage = shape.depth // SCALED

        def factors(k):
            """Of 128 terms: by row, and of each sum the weights' block."""
            blocks = [
                by_block_g[part][item.expert, lax.div(self._column(item, part, half), SCALED), k] for part, half in sums
            ]
            return self._factors(by_row_g, item.first, k), *blocks

        def products(slot, n, start):
            """`at_once` sums of the n-th 128 terms of a stage, from one on."""
            terms = pl.ds(n * SCALED % b.block_in, SCALED)
            of_rows = n * SCALED // b.block_in

            def product(*accs):
                for (part, half), acc in zip(sums[start:], accs, strict=False):
                    of_weights = self._parts(part)[of_rows][0]
                    weights = self.weights_s.at[slot, of_weights, self._columns(half), terms]
                    plgpu.wgmma(acc, weights, self.rows_s.at[slot, of_rows, :, terms].T)
                return tuple(acc[...] for acc in accs)

            return pl.run_scoped(product, *[accumulator(size, jnp.float32)] * at_once)

        def step(k, state):
            slot = lax.rem(item.step + k, stages)
            totals, ahead = list(state[0]), state[1]

            @pl.when(k > 0)
            def _():
                plgpu.barrier_wait(self.full.at[slot])

            for n in range(in_stage):
                by_row, *by_block = ahead
                # Asked for 128 terms before they are needed.
                ahead = factors(jnp.minimum(k * in_stage + n + 1, shape.steps * in_stage - 1))
                for start in range(0, len(sums), at_once):
                    found: Any = products(slot, n, start)
                    if n == in_stage - 1 and start + at_once == len(sums):
                        plgpu.barrier_arrive(self.free.at[slot])
                    for i, product_sum in enumerate(found, start):
                        totals[i] += product_sum * lax.broadcast_in_dim(by_row * by_block[i], size, (1,))
            return tuple(totals), ahead

        none = plgpu.layout_cast(jnp.zeros(size, jnp.float32), LAYOUT)
        plgpu.barrier_wait(self.full.at[lax.rem(item.step, stages)])  # rows' scales may be as new as the rows
        return lax.fori_loop(0, shape.steps, step, ((none,) * len(sums), factors(0)))[0]

    def _store(self, item: Item, column: Any) -> None:
        """The tile in out_s to rows of the group and columns from `column` on."""
        shape, rows = self.shape, self.shape.blocks.block_rows
        tile = self.out_s.at[self.own]
        if shape.interpret:
            self._store_pieces(item, column)
            return

        @pl.when(item.meant == rows)
        def _():
            plgpu.copy_smem_to_gmem(tile, self.out_g.at[pl.ds(item.first, rows), pl.ds(column, HALF)])

        @pl.when(item.meant < rows)
        def _():
            scalars = item.first, item.skipped, item.meant, column
            store_rows(tile, self.out_g, shape.out_transforms, HALF, *scalars)

    def _store_pieces(self, item: Item, column: Any) -> None:
        """The interpreter's: it has no single threads. Pieces of a power of two rows, the largest first."""
        size = 1 << (self.shape.blocks.block_rows.bit_length() - 1)
        while size:

            @pl.when((item.meant & size) != 0)
            def _(size=size):
                done = item.skipped + (item.meant & ~(2 * size - 1))
                cells = pl.ds(item.first + done, size), pl.ds(column, HALF)
                plgpu.copy_smem_to_gmem(self.out_s.at[self.own, pl.ds(done, size)], self.out_g.at[cells])

            size //= 2


def swiglu(gate: Any, up: Any, interpret: bool) -> Any:
    """gate / (1 + exp(-gate)) * up in WGMMA's layout, float32; the hardware's 2^x and 1/x, an ulp or two off.

    By hand, as Mosaic divides with a care for the ends of the range that costs 12 instructions an element, not 6.
    """
    if interpret:
        return gate / (1 + jnp.exp(-gate)) * up
    text = (
        "{ .reg .f32 e; mul.f32 e, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 e, e; add.f32 e, e, 0f3F800000;"
        " rcp.approx.ftz.f32 e, e; mul.f32 e, e, $1; mul.f32 $0, e, $2; }"
    )

    @plgpu.inline_mgpu(
        arg_types=(LAYOUT, LAYOUT), return_type=plgpu.ShapeDtypeStruct(gate.shape, jnp.float32, layout=LAYOUT)
    )
    def inlined(_ctx, gate, up):
        registers = np.empty_like(gate.registers)
        for at, vector_of_gate in np.ndenumerate(gate.registers):
            pairs = zip(simt.elements_of(vector_of_gate), simt.elements_of(up.registers[at]), strict=True)
            each: Any = [llvm.inline_asm(ir.F32Type.get(), list(pair), text, "=f,f,f") for pair in pairs]
            registers[at] = vector.from_elements(vector_of_gate.type, each)
        return fragmented_array.FragmentedArray(_registers=registers, _layout=gate.layout, _is_signed=None)

    return inlined(gate, up)  # pyright: ignore[reportCallIssue]
