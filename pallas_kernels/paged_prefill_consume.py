"""A consumer warpgroup of the prefill kernel: 64 rows of scores, their softmax, and its product with the values."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe.pallas_kernels import simt
from jmoe.pallas_kernels.paged_prefill_block import (
    BY_ROW,
    LAYOUT,
    LOG2E,
    LOWEST,
    PrefillRefs,
    PrefillShape,
    across,
    store_rows,
    walk,
)
from jmoe.pallas_kernels.paged_prefill_pass import hand_on, take_over
from jmoe.pallas_kernels.paged_prefill_plan import (
    FIRST_POS,
    FIRST_TILE,
    FIRST_TOKEN,
    HANDS_IT,
    HEAD_BLOCK,
    LEAD,
    NUM_TILES,
    NUM_TOKENS,
    PART,
    ROW_TILE,
)

ACC = plgpu.WGMMAAccumulatorRef


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of an item: its queries' positions, and tiles `begin` to `end` of the sequence's keys.

    Attributes:
      pos0: position of row 0 of each head.
      begin, end: tiles.
      before: tiles of this thread block ahead of it.
    """

    pos0: Any
    begin: Any
    end: Any
    before: Any


@dataclasses.dataclass(frozen=True)
class Consumer:
    """One of the warpgroups that compute; `role` is its number."""

    shape: PrefillShape
    refs: PrefillRefs
    role: Any
    score_scale: Any

    @property
    def overlap(self) -> bool:
        return not self.shape.interpret

    @property
    def queries(self) -> Any:
        return self.refs.q_s.at[pl.ds(self.role * ROW_TILE, ROW_TILE)]

    def slot(self, piece: Piece, tile: Any) -> Any:
        return lax.rem(piece.before + tile - piece.begin, jnp.int32(self.shape.tiles.stages))

    def masked(self, s: Any, piece: Piece, tile: Any) -> Any:
        """-inf where a query does not see a key: weight 0 even in a row that sees nothing, as its maximum is finite."""
        index = plgpu.broadcasted_iota(jnp.int32, s.shape, 0, layout=LAYOUT) + self.role * ROW_TILE
        ahead = piece.pos0 - tile * s.shape[1] + lax.rem(index, jnp.int32(self.shape.tiles.queries))
        column = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=LAYOUT)
        seen = column <= ahead
        if self.shape.sliding_window is not None:
            seen = seen & (column > ahead - self.shape.sliding_window)
        return jnp.where(seen, s, -jnp.inf)

    def softmax(self, s: Any, m: Any, total: Any, piece: Piece, tile: Any, with_mask: bool) -> tuple[Any, ...]:
        """2^(s - m) with the new maximum, that maximum, the new sum, and what older results are multiplied by."""
        factor, cap = self.score_scale, self.shape.soft_cap
        if cap is not None:  # cap tanh(x / cap), in log2: exact where tanh.approx has an error of 2^-11
            e = jnp.exp2(s * (self.score_scale * (2 * LOG2E / cap)))
            s, factor = cap * LOG2E - (2 * cap * LOG2E) / (e + 1), 1.0
        if with_mask:
            s = self.masked(s, piece, tile)
        m_new = jnp.maximum(m, s.max(axis=1) * factor)
        p = jnp.exp2(s * factor - across(m_new, s.shape[1]))
        alpha = jnp.exp2(m - m_new)
        return p, m_new, total * alpha + p.sum(axis=1), alpha

    def scores(self, slot: Any) -> Any:
        def product(s_ref):
            plgpu.wgmma(s_ref, self.queries, self.refs.k_s.at[slot].T)
            return s_ref[...]

        s = pl.run_scoped(product, ACC((ROW_TILE, self.shape.tiles.kv_tile), jnp.float32))
        plgpu.barrier_arrive(self.refs.k_free.at[slot])
        return s

    def add_values(self, acc: Any, p: Any, slot: Any) -> Any:
        values = self.refs.v_s.at[slot]
        if self.shape.interpret:
            weights = self.refs.weights_s.at[self.role]
            weights[...] = p

            def product(o_ref):
                plgpu.wgmma(o_ref, weights, values)
                return o_ref[...]

            acc = acc + pl.run_scoped(product, ACC((ROW_TILE, self.shape.head_dim), jnp.float32))
        else:
            acc = pl.run_state(lambda o_ref: plgpu.wgmma(o_ref, p, values))(ACC.init(acc))
        plgpu.barrier_arrive(self.refs.v_free.at[slot])
        return acc

    def plain(self, piece: Piece, with_mask: bool, tile: Any, carry: Any) -> Any:
        """Scores, softmax, values, one after the other: what the interpreter runs."""
        acc, m, total = carry
        slot = self.slot(piece, tile)
        plgpu.barrier_wait(self.refs.k_full.at[slot])
        p, m, total, alpha = self.softmax(self.scores(slot), m, total, piece, tile, with_mask)
        acc = acc * across(alpha, self.shape.head_dim)
        plgpu.barrier_wait(self.refs.v_full.at[slot])
        return self.add_values(acc, p.astype(self.shape.dtype), slot), m, total

    def overlapped(self, piece: Piece, with_mask: bool, tile: Any, carry: Any) -> Any:
        """The last tile's values and this tile's scores, as one run of products; then this tile's softmax."""
        acc, m, total, p = carry
        slot, last = self.slot(piece, tile), self.slot(piece, tile - 1)
        plgpu.barrier_wait(self.refs.k_full.at[slot])
        plgpu.barrier_wait(self.refs.v_full.at[last])

        def products(s_ref):
            def both(o_ref):
                # The weights come first: what defines an operand in registers between two products would make ptxas
                # wait for each product.
                plgpu.wgmma(o_ref, p, self.refs.v_s.at[last])
                plgpu.wgmma(s_ref, self.queries, self.refs.k_s.at[slot].T)

            return pl.run_state(both)(ACC.init(acc)), s_ref[...]

        acc, s = pl.run_scoped(products, ACC((ROW_TILE, self.shape.tiles.kv_tile), jnp.float32))
        plgpu.barrier_arrive(self.refs.v_free.at[last])
        plgpu.barrier_arrive(self.refs.k_free.at[slot])
        p, m, total, alpha = self.softmax(s, m, total, piece, tile, with_mask)
        return acc * across(alpha, self.shape.head_dim), m, total, p.astype(self.shape.dtype)

    @property
    def rows(self) -> Any:
        return pl.ds(self.role * ROW_TILE, ROW_TILE)

    def fresh(self) -> tuple[Any, Any, Any]:
        acc = plgpu.layout_cast(jnp.zeros((ROW_TILE, self.shape.head_dim), jnp.float32), LAYOUT)
        m = plgpu.layout_cast(jnp.full((ROW_TILE,), LOWEST, jnp.float32), BY_ROW)
        total = plgpu.layout_cast(jnp.zeros((ROW_TILE,), jnp.float32), BY_ROW)
        return acc, m, total

    def taken_over(self) -> tuple[Any, Any, Any]:
        """What the block that began the item hands on."""
        refs = self.refs
        block = refs.shares_g[lax.axis_index("block"), HANDS_IT]
        if not self.shape.interpret:
            simt.program(take_over, refs.flags_g.at[block, self.role])
        m, total = (
            plgpu.load(refs.state_ml_g.at[block, i, self.rows], (), layout=BY_ROW, optimized=False) for i in (0, 1)
        )
        return plgpu.load(refs.state_g.at[block, self.rows], (), layout=LAYOUT, optimized=False), m, total

    def handed_on(self, acc: Any, m: Any, total: Any) -> None:
        block = lax.axis_index("block")
        self.keep(self.refs.state_g.at[block], self.refs.state_ml_g.at[block], acc, m, total)
        if not self.shape.interpret:
            simt.program(hand_on, self.refs.flags_g.at[block, self.role])

    def keep(self, acc_g: Any, ml_g: Any, acc: Any, m: Any, total: Any) -> None:
        acc_g.at[self.rows][...] = acc
        ml_g.at[0, self.rows][...] = m
        ml_g.at[1, self.rows][...] = total

    def attend(self, piece: Piece, num_tokens: Any, carry: Any) -> tuple[Any, Any, Any]:
        """acc, m and sum at a piece's end, those at its begin given. Tiles that all queries see whole need no mask."""
        kv_tile, window = self.shape.tiles.kv_tile, self.shape.sliding_window
        now, step = piece.begin, self.plain
        if self.overlap:
            slot = self.slot(piece, now)
            plgpu.barrier_wait(self.refs.k_full.at[slot])
            acc, m, total = carry
            p, m, total, alpha = self.softmax(self.scores(slot), m, total, piece, now, True)
            acc = acc * across(alpha, self.shape.head_dim)
            carry, now, step = (acc, m, total, p.astype(self.shape.dtype)), now + 1, self.overlapped

        def through(now, end, with_mask, carry):
            return lax.fori_loop(now, end, lambda tile, c: step(piece, with_mask, tile, c), carry)

        end = jnp.maximum(piece.end, now)
        if window is not None:
            behind = jnp.maximum(piece.pos0 + num_tokens - window, 0) + kv_tile - 1
            inside = jnp.clip(lax.div(behind, jnp.int32(kv_tile)), now, end)
            carry, now = through(now, inside, True, carry), inside
        diagonal = jnp.clip(lax.div(piece.pos0 + 1, jnp.int32(kv_tile)), now, end)
        carry = through(now, diagonal, False, carry)
        carry = through(diagonal, end, True, carry)
        acc, m, total = carry[:3]
        if self.overlap:
            last = self.slot(piece, piece.end - 1)
            plgpu.barrier_wait(self.refs.v_full.at[last])
            acc = self.add_values(acc, carry[3], last)
        return acc, m, total

    def write(self, item: Any, acc: Any, m: Any, total: Any) -> None:
        """A whole item's rows."""
        shape, refs = self.shape, self.refs
        columns = (HEAD_BLOCK, FIRST_TOKEN, LEAD, NUM_TOKENS)
        head_block, token, lead, num_tokens = (refs.items_g[item, column] for column in columns)
        if shape.with_sinks:
            rows = refs.sinks_g.at[head_block, pl.ds(self.role * ROW_TILE, ROW_TILE)]
            total = total + jnp.exp2(plgpu.load(rows, (), layout=BY_ROW, optimized=False) - m)
        out = (acc * across(refs.scales_g[1] / total, shape.head_dim)).astype(shape.out_dtype)
        mine = refs.o_s.at[self.role]
        for column in range(0, shape.head_dim, shape.out_columns):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            mine[...] = out[:, column : column + shape.out_columns]
            plgpu.commit_smem()
            columns = pl.ds(column, shape.out_columns)
            store_rows(shape, mine, refs.out_g, token, lead, num_tokens, head_block, self.role, columns)


def consume(shape: PrefillShape, refs: PrefillRefs, role: Any) -> None:
    """All pieces of this thread block, for the rows of warpgroup `role`."""
    consumer = Consumer(shape, refs, role, refs.scales_g[0])

    def attend(item, first, length, before, carry):
        begin = refs.items_g[item, FIRST_TILE] + first
        piece = Piece(refs.items_g[item, FIRST_POS], begin, begin + length, before)
        num_tokens = refs.items_g[item, NUM_TOKENS]
        plgpu.barrier_wait(refs.q_full)
        state = lax.cond(first > 0, consumer.taken_over, consumer.fresh)
        state = consumer.attend(piece, num_tokens, state)
        plgpu.barrier_arrive(refs.q_free)
        done, part = first + length == refs.items_g[item, NUM_TILES], refs.items_g[item, PART]
        pl.when(jnp.logical_not(done))(lambda: consumer.handed_on(*state))
        pl.when(done & (part < 0))(lambda: consumer.write(item, *state))
        pl.when(done & (part >= 0))(lambda: consumer.keep(refs.acc_g.at[part], refs.ml_g.at[part], *state))
        return carry

    walk(shape, refs, attend, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)
