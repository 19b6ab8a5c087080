"""What the two roles of a thread block of the prefill kernel share: its shape, its refs, its walk and its stores."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jmoe.pallas_kernels.paged_prefill_plan import (
    HEAD_ITEM,
    HEAD_TILES,
    LINE_BEGIN,
    LINE_ITEMS,
    LINE_STEP,
    NUM_TILES,
    ROW_TILE,
    TAIL_ITEM,
    TAIL_TILE,
    TAIL_TILES,
    UNIT,
    WAVES,
    PrefillTiles,
)

LOWEST = -1e30  # where a maximum begins; finite, so that a row that saw nothing has weight 0 and not NaN
LOG2E = math.log2(math.e)
LAYOUT = plgpu.Layout.WGMMA
BY_ROW = LAYOUT.reduce(1)


@dataclasses.dataclass(frozen=True)
class PrefillShape:
    """What a call's kernel is compiled for.

    Attributes:
      num_heads, num_kv_heads, head_dim, page_len: Q, G, H and the pages' length.
      tiles: block sizes.
      num_blocks: thread blocks.
      dtype: of the products' operands, float16 for float8 pages (it holds them exactly, and the hardware converts to
        nothing else).
      out_dtype: of the result.
      float8: whether the pages are float8_e4m3fn.
      sliding_window, soft_cap: as in the call.
      with_sinks: whether the softmax has sinks.
      interpret: whether the CPU interpreter runs it: it has no run_state and no wgmma with an operand in registers.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_len: int
    tiles: PrefillTiles
    num_blocks: int
    dtype: Any
    out_dtype: Any
    float8: bool = False
    sliding_window: int | None = None
    soft_cap: float | None = None
    with_sinks: bool = False
    interpret: bool = False

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def blocks_of_group(self) -> int:
        """Head blocks of a KV head."""
        return -(-self.group // self.tiles.heads)

    @property
    def page_rows(self) -> int:
        """Positions that one copy brings."""
        return min(self.page_len, self.tiles.kv_tile)

    @property
    def copies(self) -> int:
        """Copies of a KV tile."""
        return self.tiles.kv_tile // self.page_rows

    @property
    def out_columns(self) -> int:
        """Columns of the result that are staged at once."""
        return min(self.head_dim, 128)

    def heads_of(self, head_block: Any) -> tuple[Any, Any, Any]:
        """KV head, first query head, and end of the KV head's query heads, of a head block."""
        kv_head = lax.div(head_block, jnp.int32(self.blocks_of_group))
        first = kv_head * self.group + lax.rem(head_block, jnp.int32(self.blocks_of_group)) * self.tiles.heads
        return kv_head, first, (kv_head + 1) * self.group


@dataclasses.dataclass(frozen=True)
class PrefillRefs:
    """The kernel's operands (`_g`), shared memory (`_s`) and barriers, in the order of the call and its scratch."""

    q_g: Any
    k_g: Any
    v_g: Any
    table_g: Any
    items_g: Any
    shares_g: Any
    scales_g: Any
    sinks_g: Any
    out_g: Any
    acc_g: Any  # parts
    ml_g: Any
    state_g: Any  # of cut items, as parts are
    state_ml_g: Any
    flags_g: Any
    q_s: Any
    k_s: Any
    v_s: Any
    o_s: Any
    q_full: Any
    q_free: Any
    k_full: Any
    k_free: Any
    v_full: Any
    v_free: Any
    raw: Any  # barriers (of K and V) of tiles that the producer still changes
    k_raw: Any = None  # float8 tiles
    v_raw: Any = None
    weights_s: Any = None  # the interpreter's


def walk(shape: PrefillShape, refs: PrefillRefs, piece: Any, carry: Any) -> tuple[Any, Any]:
    """piece(item, first tile, tiles, tiles before, carry) for all pieces of this thread block.

    The beginning of an item that another ends comes first, the end of one that another began last: then nobody waits.

    Returns:
      The number of tiles of all pieces, and the last carry.
    """
    block = lax.axis_index("block")
    used = WAVES, HEAD_TILES, LINE_BEGIN, LINE_ITEMS, LINE_STEP, TAIL_TILES
    share = {column: refs.shares_g[block, column] for column in used}
    heads = jnp.where(share[HEAD_TILES] > 0, 1, 0)
    begin_line = heads + share[WAVES]
    begin_tail = begin_line + share[LINE_ITEMS]
    end = begin_tail + jnp.where(share[TAIL_TILES] > 0, 1, 0)

    def step(state):
        i, before, carry = state
        head, tail = i < heads, i >= begin_tail
        line = share[LINE_BEGIN] + (i - begin_line) * share[LINE_STEP]
        wave = jnp.where(i < begin_line, block + (i - heads) * shape.num_blocks, line)
        cut = jnp.where(head, refs.shares_g[block, HEAD_ITEM], refs.shares_g[block, TAIL_ITEM])
        item = jnp.where(head | tail, cut, wave)
        first = jnp.where(tail, refs.shares_g[block, TAIL_TILE], 0)
        length = jnp.where(head, share[HEAD_TILES], jnp.where(tail, share[TAIL_TILES], refs.items_g[item, NUM_TILES]))
        return i + 1, before + length, piece(item, first, length, before, carry)

    return lax.while_loop(lambda state: state[0] < end, step, (jnp.int32(0), jnp.int32(0), carry))[1:]


def across(vector, length):
    """[rows] -> [rows, length]."""
    return lax.broadcast_in_dim(vector, (vector.shape[0], length), (0,))


def store_rows(shape: PrefillShape, o_s, out_g, first_token, lead, num_tokens, head_block, consumer, columns):
    """Writes a consumer's 64 rows, 8 tokens of a head at once; where only some of the 8 are this item's, one by one."""
    _, first_head, last_head = shape.heads_of(head_block)
    for unit in range(ROW_TILE // UNIT):
        row = consumer * ROW_TILE + unit * UNIT
        in_block = lax.div(row, jnp.int32(shape.tiles.queries))
        token = lax.rem(row, jnp.int32(shape.tiles.queries))
        head = first_head + in_block
        there = (in_block < shape.tiles.heads) & (head < last_head)
        begin, end = jnp.clip(lead - token, 0, UNIT), jnp.where(there, jnp.clip(num_tokens - token, 0, UNIT), 0)

        @pl.when(end - begin == UNIT)
        def _whole(unit=unit, token=token, head=head):
            there = out_g.at[pl.ds(pl.multiple_of(first_token + token, UNIT), UNIT), head, columns]
            plgpu.copy_smem_to_gmem(o_s.at[pl.ds(unit * UNIT, UNIT)], there, commit_group=False)

        @pl.when(end - begin < UNIT)
        def _part(unit=unit, token=token, head=head, begin=begin, end=end):
            def one(i, _):
                there = out_g.at[first_token + token + i, head, columns]
                plgpu.copy_smem_to_gmem(o_s.at[unit * UNIT + i], there, commit_group=False)

            lax.fori_loop(begin, end, one, None)

    plgpu.commit_smem_to_gmem_group()
