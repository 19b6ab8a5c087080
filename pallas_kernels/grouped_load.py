"""What the first warpgroup of a grouped product's kernel does: it keeps TMA some stages ahead of the others."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe.pallas_kernels.grouped_items import Item
from jmoe.pallas_kernels.grouped_product import Product


@dataclasses.dataclass(frozen=True)
class Loader:
    """What the first warpgroup does: asks for the stages of one item after the other, some ahead of the consumers.

    Attributes:
      shape: the `Product`.
      rows_g: `[rows, in]`; sources: of each part the weights; both in global memory.
      weights_s, rows_s, full, free: the stages.
    """

    shape: Product
    rows_g: Any
    sources: tuple[Any, ...]
    weights_s: Any
    rows_s: Any
    full: Any
    free: Any

    def visit(self, item: Item, first_step: Any = 0, end: Any = None) -> None:
        """The item's stages from `first_step` on, up to `end`, each as soon as its place is free."""
        stages = self.shape.stages

        def load(k, _):
            slot = lax.rem(item.step + k, jnp.int32(stages))

            @pl.when(item.step + k >= stages)
            def _():
                plgpu.barrier_wait(self.free.at[slot])

            self.weights(item, k, slot)
            self.rows(item, k, slot)

        lax.fori_loop(first_step, self.shape.steps if end is None else end, load, None)

    def weights(self, item: Item, k: Any, slot: Any) -> None:
        shape, b = self.shape, self.shape.blocks
        for part, source in enumerate(self.sources):
            columns = pl.ds(shape.column(item.tile, part), b.block_out)
            terms = pl.ds(shape.term(k, part), b.block_in)
            cells = (item.expert, columns, terms) if shape.small else (item.expert, terms, columns)
            plgpu.copy_gmem_to_smem(source.at[cells], self.weights_s.at[slot, part], self.full.at[slot])

    def rows(self, item: Item, k: Any, slot: Any) -> None:
        shape, b, full = self.shape, self.shape.blocks, self.full.at[slot]
        height = b.block_rows // shape.row_copies
        for part in range(shape.row_parts):
            for n in range(shape.row_copies):

                def copy(part=part, n=n):
                    cells = pl.ds(item.first + n * height, height), pl.ds(shape.term(k, part), b.block_in)
                    place = pl.ds(n * height, height)
                    plgpu.copy_gmem_to_smem(self.rows_g.at[cells], self.rows_s.at[slot, part, place], full)

                if part * b.block_in >= shape.depth:
                    plgpu.barrier_arrive(full)  # for rows that the stage has room for and the product has not
                elif n == 0:
                    copy()
                else:
                    needed = item.skipped + item.meant > n * height
                    pl.when(needed)(copy)
                    pl.when(~needed)(lambda: plgpu.barrier_arrive(full))

    def drain(self, num_steps: Any) -> None:
        """Nobody leaves while another may still arrive."""
        for last in range(1, self.shape.stages + 1):

            @pl.when(num_steps >= last)
            def _(last=last):
                plgpu.barrier_wait(self.free.at[lax.rem(num_steps - last, jnp.int32(self.shape.stages))])
