"""decoder_layer: one layer without its experts, op by op, and as the few kernels that a decode step on Hopper takes."""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jmoe.cell_config import CellConfig
from jmoe.models.attention import AttentionLayer
from jmoe.pallas_kernels.choice import by_platform
from jmoe.pallas_kernels.choose_top_k import MAX_EXPERTS, MAX_K, choose_top_k
from jmoe.pallas_kernels.paged_attention import paged_attention
from jmoe.pallas_kernels.place_heads import place_heads, place_partial_heads
from jmoe.pallas_kernels.residual_norm import residual_norm
from jmoe.pallas_kernels.thin_matmul import MAX_ROWS, thin_partials, why_not
from jmoe.rows import Rows
from jmoe.sharding.tensor_group import TensorGroup

KV: TypeAlias = tuple[jax.Array, jax.Array]  # keys and values of one layer, [P, page_len, G, H]
PARTS = {"qkv": 4, "o": 8, "router": 16}  # tiles times parts of Qwen3-30B-A3B: a grid or two of an H100


class Chosen(NamedTuple):
    """What a router hands to the experts: rows `[tokens, D]`, topk_idx and topk_weights `[tokens, k]`.

    topk_idx is -1 where no token stands.
    """

    rows: jax.Array
    topk_idx: jax.Array
    topk_weights: jax.Array


def decoder_layer(
    cell: CellConfig,
    module: AttentionLayer,
    x: jax.Array,
    delta: jax.Array | None,
    kv: KV,
    rows: Rows,
) -> tuple[jax.Array, KV, Chosen | None]:
    """Residual, attention, and the router, or the dense FFN where the layer has one.

    Args:
      cell: sizes.
      module: the layer.
      x: residual `[tokens, D]` before the last experts' sums are added.
      delta: those, `[tokens, D]` float32; None where nothing is to be added.
      kv: the layer's pages.
      rows: what the tokens are.

    Returns:
      The residual, the pages with the new tokens, and what the router chose (None in a dense layer).
    """

    def few(*arrays):
        return _few_kernels(cell, module, *arrays)

    def plain(*arrays):
        return _op_by_op(cell, module, *arrays)

    arrays = (x, delta, kv, rows)
    return by_platform("decoder_layer", few, plain, *arrays) if _fits(cell, module, x, kv, rows) else plain(*arrays)


def _fits(cell: CellConfig, module: AttentionLayer, x: jax.Array, kv: KV, rows: Rows) -> bool:
    """Whether the few kernels can: bfloat16 decode of few rows on one tensor rank, RMSNorm, sizes that they take.

    12 layers of Qwen3-30B-A3B on an H100 took 4.06 ms a step so, and 4.11 op by op, at 16 rows; 7.08 and 7.23 at 128.
    """
    c = cell.model
    is_plain = not (module.is_dense or c.attention_bias or c.clip_qkv) and c.norm == "rms"
    whole = not any(
        (c.hidden_size % PARTS["qkv"], c.num_heads * c.head_dim % PARTS["o"], c.hidden_size % PARTS["router"])
    )
    is_decode = rows.token_ids.shape[1] == 1 and len(x) <= MAX_ROWS
    dtypes = x.dtype == kv[0].dtype == jnp.bfloat16
    alone = cell.mesh.attention_tensor == 1 and cell.kernels != "xla"
    choosable = c.num_experts <= MAX_EXPERTS and c.num_experts_per_tok <= MAX_K
    return alone and is_plain and whole and is_decode and dtypes and c.head_dim % 64 == 0 and choosable


def attend(cell: CellConfig, module: AttentionLayer, x: jax.Array, kv: KV, rows: Rows) -> tuple[jax.Array, KV]:
    """Attention with its residual; the new keys and values go to their pages first."""
    grid = x.reshape(*rows.token_ids.shape, -1)
    place = (rows.page_table, rows.start_pos, rows.num_tokens)
    (q, k, v), scales = module.heads(grid), module.head_scales()
    q, k_pages, v_pages = place_heads(
        q, k, v, scales[0], scales[1], kv[0], kv[1], *place,
        theta=cell.model.rope_theta, eps=cell.model.norm_eps,
        implementation="xla" if cell.kernels == "xla" else None,
    )  # fmt: skip
    heads = paged_attention(
        q, k_pages, v_pages, *place, sliding_window=cell.model.sliding_window, implementation=cell.implementation
    )
    tensor = TensorGroup.of(cell.mesh, "attention")
    return x + module.output(heads, tensor).reshape(x.shape), (k_pages, v_pages)


def _op_by_op(cell: CellConfig, module: AttentionLayer, x, delta, kv: KV, rows: Rows):
    if delta is not None:
        x = x + delta.astype(x.dtype)
    x, kv = attend(cell, module, x, kv, rows)
    h = module.ffn_input(x)
    if module.is_dense:
        return x + module.dense_ffn(h, TensorGroup.of(cell.mesh, "attention")), kv, None
    return x, kv, Chosen(h, *module.route(h, rows.valid.reshape(-1).astype(jnp.int32)))


def _few_kernels(cell: CellConfig, module: AttentionLayer, x, delta, kv: KV, rows: Rows):
    """Products leave partial sums, and what reads them adds them up: 12 kernels with the experts', else 15."""
    c, eps = cell.model, cell.model.norm_eps
    place = (rows.page_table, rows.start_pos, rows.num_tokens)
    qkv = [w[...].reshape(c.hidden_size, -1) for w in (module.q_proj, module.k_proj, module.v_proj)]
    o_proj, router = module.o_proj[...].reshape(-1, c.hidden_size), module.router[...]
    if delta is None:
        h = module.normed_input(x)
    else:
        x, h = residual_norm(x, delta[None], module.input_norm[...], eps, implementation="pallas")
    q, k_pages, v_pages = place_partial_heads(
        _projected(h, qkv), c.num_heads, *module.head_scales(), *kv, *place,
        theta=c.rope_theta, eps=eps, implementation="pallas",
    )  # fmt: skip
    heads = paged_attention(
        q, k_pages, v_pages, *place, sliding_window=c.sliding_window, implementation=cell.implementation
    )
    sums = thin_partials(heads.reshape(len(x), -1), [o_proj], PARTS["o"])
    x, h = residual_norm(x, sums, module.ffn_norm[...], eps, next_weights=[router], implementation="pallas")
    chosen = choose_top_k(
        thin_partials(h, [router], PARTS["router"]), c.num_experts_per_tok, c.renormalize_topk,
        num_tokens=rows.num_tokens, dtype=x.dtype, implementation="pallas",
    )  # fmt: skip
    return x, (k_pages, v_pages), Chosen(h, *chosen)


def _projected(rows: jax.Array, weights: Sequence[jax.Array]) -> jax.Array:
    """Partial sums of the QKV projections.

    Qwen3's take XLA 9.2 us at 16 rows and 14.6 at 128, Mosaic 10.2 and 13.6; the output's 10.5 and 12.8 at 128.
    """
    is_pallas = len(rows) > 64 and not why_not(rows, weights)
    return thin_partials(rows, weights, PARTS["qkv"], implementation="pallas" if is_pallas else "xla")
