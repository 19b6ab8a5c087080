"""The producer warpgroup of the prefill kernel: brings queries and KV tiles, clears what is not a sequence's own."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe.pallas_kernels.paged_prefill_block import LAYOUT, PrefillRefs, PrefillShape, walk
from jmoe.pallas_kernels.paged_prefill_plan import FIRST_TILE, FIRST_TOKEN, HEAD_BLOCK, LENGTH, ROW, ROW_TILE, UNIT


def produce(shape: PrefillShape, refs: PrefillRefs) -> None:
    """All pieces of this thread block; leaves no barrier with a phase that nobody saw."""
    stages = jnp.int32(shape.tiles.stages)

    def piece(item, first, length, before, pieces):
        _piece(shape, refs, item, first, length, before, pieces)
        return pieces + 1

    num_tiles, pieces = walk(shape, refs, piece, jnp.int32(0))
    for i in range(1, shape.tiles.stages + 1):

        @pl.when(num_tiles >= i)
        def _(i=i):
            plgpu.barrier_wait(refs.k_free.at[lax.rem(num_tiles - i, stages)])
            plgpu.barrier_wait(refs.v_free.at[lax.rem(num_tiles - i, stages)])

    @pl.when(pieces > 0)
    def _():
        plgpu.barrier_wait(refs.q_free)


def _piece(shape: PrefillShape, refs: PrefillRefs, item, first, length, before, pieces) -> None:
    row, token = refs.items_g[item, ROW], refs.items_g[item, FIRST_TOKEN]
    kv_head, first_head, _ = shape.heads_of(refs.items_g[item, HEAD_BLOCK])
    base = refs.items_g[item, FIRST_TILE] + first
    num_positions = refs.items_g[item, LENGTH]
    last_page = lax.div(num_positions - 1, jnp.int32(shape.page_len))
    kv_tile = shape.tiles.kv_tile
    stages = jnp.int32(shape.tiles.stages)

    def pages_of(start):
        """Where in the pages a tile's copies begin; behind the sequence's last page that page again."""
        where = []
        for j in range(shape.copies):
            page = jnp.minimum(lax.div(start + j * shape.page_rows, jnp.int32(shape.page_len)), last_page)
            offset = lax.rem(start, jnp.int32(shape.page_len)) if shape.copies == 1 else 0
            where.append((refs.table_g[row, page], pl.ds(offset, shape.page_rows), kv_head))
        return where

    def bring(pages_g, where, tile_s, barrier):
        for j, w in enumerate(where):
            plgpu.copy_gmem_to_smem(pages_g.at[w], tile_s.at[pl.ds(j * shape.page_rows, shape.page_rows)], barrier)

    def queries():
        @pl.when(pieces > 0)
        def _():
            plgpu.barrier_wait(refs.q_free)

        for h in range(shape.tiles.heads):
            head = jnp.minimum(first_head + h, shape.num_heads - 1)
            there = refs.q_s.at[pl.ds(h * shape.tiles.queries, shape.tiles.queries)]
            mine = refs.q_g.at[pl.ds(pl.multiple_of(token, UNIT), shape.tiles.queries), head]
            plgpu.copy_gmem_to_smem(mine, there, refs.q_full)

    def wait_free(barrier, tile, slot):
        @pl.when(tile >= stages)
        def _():
            plgpu.barrier_wait(barrier.at[slot])

    def load(i, _):
        tile = before + i
        slot = lax.rem(tile, stages)
        start = (base + i) * kv_tile
        where = pages_of(start)
        wait_free(refs.k_free, tile, slot)
        bring(refs.k_g, where, refs.k_s.at[slot], refs.k_full.at[slot])
        pl.when(i == 0)(queries)
        wait_free(refs.v_free, tile, slot)
        tail = start + kv_tile > num_positions

        @pl.when(jnp.logical_not(tail))
        def _():
            bring(refs.v_g, where, refs.v_s.at[slot], refs.v_full.at[slot])

        @pl.when(tail)
        def _():
            bring(refs.v_g, where, refs.v_s.at[slot], refs.raw.at[1])
            plgpu.barrier_wait(refs.raw.at[1])
            _rewrite(shape, refs.v_s.at[slot], refs.v_s.at[slot], num_positions - start)
            for _ in range(shape.copies):
                plgpu.barrier_arrive(refs.v_full.at[slot])

    def load_float8(i, _):
        """Tiles arrive in `k_raw` and `v_raw`, the next ones while these are converted."""
        tile = before + i
        slot = lax.rem(tile, stages)
        start = (base + i) * kv_tile
        where = pages_of(start + kv_tile)
        sides = (
            (refs.k_g, refs.k_raw, refs.k_s, refs.k_full, refs.k_free, kv_tile),
            (refs.v_g, refs.v_raw, refs.v_s, refs.v_full, refs.v_free, num_positions - start),
        )
        for side, (pages_g, raw_s, tile_s, full, free, own) in enumerate(sides):
            plgpu.barrier_wait(refs.raw.at[side])
            wait_free(free, tile, slot)
            _rewrite(shape, raw_s, tile_s.at[slot], own)
            plgpu.barrier_arrive(full.at[slot])

            @pl.when(i + 1 < length)
            def _(pages_g=pages_g, raw_s=raw_s, side=side):
                bring(pages_g, where, raw_s, refs.raw.at[side])

    if shape.float8:
        where = pages_of(base * kv_tile)
        bring(refs.k_g, where, refs.k_raw, refs.raw.at[0])
        bring(refs.v_g, where, refs.v_raw, refs.raw.at[1])
        queries()
    lax.fori_loop(0, length, load_float8 if shape.float8 else load, None)


def _rewrite(shape: PrefillShape, from_s, to_s, own) -> None:
    """Copies a tile in the products' dtype, zeros from row `own` on; in squares of 64, which few registers hold."""
    for r in range(0, shape.tiles.kv_tile, ROW_TILE):
        for c in range(0, shape.head_dim, ROW_TILE):
            square = pl.ds(r, ROW_TILE), pl.ds(c, ROW_TILE)
            values = plgpu.load(from_s.at[square], (), layout=LAYOUT, optimized=not shape.float8).astype(shape.dtype)
            position = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=LAYOUT)
            to_s.at[square][...] = jnp.where(position < own - r, values, jnp.zeros_like(values))
    plgpu.commit_smem()
