"""What becomes of the sums of a piece of decode attention: the row's result, or a partial one that others add to."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe.pallas_kernels.grouped_matmul_threads import load_by_row
from jmoe.pallas_kernels.paged_decode_plan import MASKED, Decode
from jmoe.pallas_kernels.paged_decode_stream import Stream

LAYOUT = plgpu.Layout.WGMMA
TURNED = plgpu.Layout.WGMMA_TRANSPOSED  # the same, by columns: what is stored transposed
BY_HEAD = LAYOUT.reduce(0)
RUN, HALF = 0, 1  # sums in shared memory: of a row's earlier pieces, of the second consumer's tiles


def down(vector, length):
    """[n] -> [length, n]."""
    return lax.broadcast_in_dim(vector, (length, vector.shape[0]), (1,))


def filled(value, shape, layout):
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


@dataclasses.dataclass(frozen=True)
class Sums:
    """A warpgroup's view: (acc `[H, n]`, maxima `[n]` as log2, sums `[n]`) of a piece, n columns of a KV head.

    Attributes:
      shape, stream: of the call, and what the block is.
      sinks_g: of the query heads, in log2, with n more on both sides; None for none.
      v_scale_g: of the values.
      out_g: `[rows, Q, H]`.
      acc_g, ml_g: partial results, `[rows, G, pieces, H, n]` and `[rows, G, pieces, 2, n]`.
      out_s: `[n, H]`, on its way to out_g.
      acc_s, ml_s: RUN, and HALF where two consumers add up.
      halved, joined: barriers: the second consumer's sums are there, and were read.
    """

    shape: Decode
    stream: Stream
    sinks_g: Any
    v_scale_g: Any
    out_g: Any
    acc_g: Any
    ml_g: Any
    out_s: Any
    acc_s: Any
    ml_s: Any
    halved: Any
    joined: Any

    def hand_over(self, number, found):
        """The second consumer's tiles of the stream's piece of this number."""
        pl.when(number > 0)(lambda: plgpu.barrier_wait(self.joined))
        self._store(HALF, *found)
        plgpu.barrier_arrive(self.halved)

    def join(self, found):
        """Both consumers' tiles: a sum of two is the same, whoever has the even ones."""
        plgpu.barrier_wait(self.halved)
        both = self._add(found, self._stored(HALF))
        plgpu.barrier_arrive(self.joined)
        return both

    def end(self, row, piece, count, found):
        """Of a piece: added to those before where the row is one item, else kept; who ends the row's last adds up."""
        whole = self.stream.whole(row)
        found = lax.cond(whole & (piece > 0), lambda: self._add(self._stored(RUN), found), lambda: found)

        @pl.when(whole & (piece == count - 1))
        def _():
            self._write(row, *found)

        @pl.when(whole & (piece < count - 1))
        def _():
            self._store(RUN, *found)

        @pl.when(jnp.logical_not(whole))
        def _():
            self._keep(row, piece, *found)
            if not self.shape.interpret:
                self.stream.ended(row, count)
                pl.when(self.stream.ended_before() == count - 1)(lambda: self._merge(row, count))

    def _add(self, sum_of_earlier, piece):
        """Maxima are whole numbers, so the factors powers of two: no product is rounded."""
        (acc, m, total), (acc_i, m_i, total_i) = sum_of_earlier, piece
        m_new = jnp.maximum(m, m_i)
        old, new = jnp.exp2(m - m_new), jnp.exp2(m_i - m_new)
        length = self.shape.head_dim
        return acc * down(old, length) + acc_i * down(new, length), m_new, total * old + total_i * new

    def _store(self, place, acc, m, total):
        self.acc_s[place], self.ml_s[place, 0], self.ml_s[place, 1] = acc, m, total

    def _stored(self, place):
        m, total = (plgpu.load(self.ml_s.at[place, i], (), layout=BY_HEAD, optimized=False) for i in (0, 1))
        return plgpu.load(self.acc_s.at[place], (), layout=LAYOUT, optimized=False), m, total

    def _keep(self, row, index, acc, m, total):
        head = self.stream.head
        self.acc_g[row, head, index] = acc
        self.ml_g[row, head, index, 0] = m
        self.ml_g[row, head, index, 1] = total

    def _kept(self, row, index):
        at = row, self.stream.head, index
        m, total = (plgpu.load(self.ml_g.at[*at, i], (), layout=BY_HEAD, optimized=False) for i in (0, 1))
        return plgpu.load(self.acc_g.at[at], (), layout=LAYOUT, optimized=False), m, total

    def _merge(self, row, count):
        """All pieces of a row, in order; some on their way together, as each takes a microsecond to come."""
        shape = self.shape
        at_once = shape.partials_at_once

        def step(i, found):
            first = i * at_once
            together = [self._kept(row, jnp.minimum(first + j, count - 1)) for j in range(at_once)]
            for j, piece in enumerate(together):
                more = self._add(found, piece)
                there = first + j < count
                found = tuple(jnp.where(there, new, old) for new, old in zip(more, found, strict=True))
            return found

        none = tuple(filled(value, (shape.columns,), BY_HEAD) for value in (MASKED, 0))
        rounds = lax.div(count + (at_once - 1), jnp.int32(at_once))
        acc = filled(0, (shape.head_dim, shape.columns), LAYOUT)
        self._write(row, *lax.fori_loop(0, rounds, step, (acc, *none)))

    def _write(self, row, acc, m, total):
        shape, head = self.shape, self.stream.head
        skipped = self.stream.queries_of(row)[1]
        if self.sinks_g is not None:
            total = total + jnp.exp2(self._sinks_of(shape.columns + head * shape.group - skipped) - m)
        out = acc * down(self.v_scale_g[0] / total, shape.head_dim)
        self.out_s.T[...] = plgpu.layout_cast(out.astype(shape.out_dtype), TURNED)
        plgpu.commit_smem()
        own = pl.ds(head * shape.group, shape.group)
        plgpu.copy_smem_to_gmem(self.out_s.at[pl.ds(skipped, shape.group)], self.out_g.at[row, own])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def _sinks_of(self, first):
        n = self.shape.columns
        if self.shape.interpret:
            return plgpu.load(self.sinks_g.at[pl.ds(first, n)], (), layout=BY_HEAD, optimized=False)
        return load_by_row(self.sinks_g, n, first, jnp.int32(0), reduced=0)
