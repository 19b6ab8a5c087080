"""The expert FFN of one node: rows in, one weighted partial sum a row out."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.pallas_kernels.block_scaled import BlockScaled
from jmoe.pallas_kernels.block_scaled_ffn import block_scaled_ffn
from jmoe.pallas_kernels.choice import by_platform
from jmoe.pallas_kernels.grouped_blocks import blocks_for, expert_blocks, grouped_shape
from jmoe.pallas_kernels.grouped_matmul import ExpertBlocks, gated_grouped_matmul, grouped_matmul
from jmoe.pallas_kernels.permute import Permuted, permute, unpermute

Implementation = Literal["xla", "pallas", "reference"]
ALIGN = 8  # rows that a group starts at a multiple of: TMA takes tiles of 8, and stores of whole tiles need no mask


def expert_ffn(
    rows: jax.Array,
    local_idx: jax.Array,
    topk_weights: jax.Array,
    gate_proj: jax.Array | BlockScaled,
    up_proj: jax.Array | BlockScaled,
    down_proj: jax.Array | BlockScaled,
    *,
    out_dtype: jax.typing.DTypeLike = jnp.float32,
    implementation: Implementation | None = None,
) -> jax.Array:
    """y[r] = sum_j w[r, j] * down[e_j](silu(x[r] gate[e_j]) * (x[r] up[e_j])), e_j = local_idx[r, j], over e_j >= 0.

    Args:
      rows: `[rows, D]`.
      local_idx: `[rows, k]` int32, experts of this node that the row chose; -1 where its choice is elsewhere.
      topk_weights: `[rows, k]` float32, ignored where local_idx is -1.
      gate_proj, up_proj: `[E, D, F]`; down_proj: `[E, F, D]`; E experts of this node, F this tensor rank's columns.
        Or all three `BlockScaled`, of values `[E, F, D]` and `[E, D, F]`: see `block_scaled_ffn`.
      out_dtype: float32, or bfloat16 for sums that nothing is added to in float32: rounded once, half the bytes.
      implementation: "xla" (every expert over every row, batched: reads each weight once and copies none; its waste
        is E/k in operations, none in bytes), "pallas" (rows permuted by expert, grouped products; Hopper, bf16 or
        scaled float8), "reference" (float32, a gathered expert a row), None for "pallas" where it fits, else "xla".

    Returns:
      `[rows, D]` partial sums (over the node's experts and this rank's columns). A row with no local expert
      gives zeros.

    Raises:
      ValueError: shapes that don't belong together, or an implementation that is unknown or can't run.
    """
    shapes = [_shape(weights) for weights in (gate_proj, up_proj, down_proj)]
    num_experts, hidden, width = shapes[0]
    scaled = {isinstance(weights, BlockScaled) for weights in (gate_proj, up_proj, down_proj)}
    if shapes[1:] != [shapes[0], (num_experts, width, hidden)] or rows.shape[1] != hidden or len(scaled) > 1:
        raise ValueError(
            f"expert_ffn: expected rows [rows, D], gate and up [E, D, F] and down [E, F, D], all BlockScaled or none, "
            f"got {rows.shape} and (as [E, in, out]) {', '.join(map(str, shapes))}"
        )
    if jnp.dtype(out_dtype) not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"expert_ffn: expected out_dtype float32 or bfloat16, got {jnp.dtype(out_dtype)}")
    arguments = (rows, local_idx, topk_weights, gate_proj, up_proj, down_proj)
    forms = {
        "xla": lambda *given: _xla(*given).astype(out_dtype),
        "pallas": lambda *given: _pallas(*given, out_dtype),
        "reference": lambda *given: _reference(*given).astype(out_dtype),
    }
    if implementation is None:
        fits = _fits_pallas(*arguments)
        return by_platform("expert_ffn", forms["pallas" if fits else "xla"], forms["xla"], *arguments)
    if implementation not in forms:
        raise ValueError(
            f"expert_ffn: expected implementation 'xla', 'pallas', 'reference' or None, got {implementation!r}"
        )
    return forms[implementation](*arguments)


def _shape(weights: jax.Array | BlockScaled) -> tuple[int, ...]:
    """[E, in, out]; BlockScaled has `in` last."""
    shape = tuple(weights.shape)
    return (*shape[:1], *shape[:0:-1]) if isinstance(weights, BlockScaled) else shape


def _xla(rows, local_idx, topk_weights, gate_proj, up_proj, down_proj):
    """Every expert over every row, batched: reads each weight once and copies none."""
    if isinstance(gate_proj, BlockScaled):
        return block_scaled_ffn(rows, local_idx, topk_weights, gate_proj, up_proj, down_proj, implementation="xla")
    num_experts = gate_proj.shape[0]
    chosen = local_idx[:, :, None] == jnp.arange(num_experts, dtype=jnp.int32)
    share = jnp.sum(jnp.where(chosen, topk_weights[:, :, None], 0.0), axis=1)  # [rows, E], 0 where not chosen
    batched = jnp.broadcast_to(rows, (num_experts, *rows.shape))
    gate = _batched_matmul(batched, gate_proj)
    up = _batched_matmul(batched, up_proj)
    down = _batched_matmul((jax.nn.silu(gate) * up).astype(rows.dtype), down_proj)  # [E, rows, D] float32
    # Unrolled, not an einsum: a fixed order of additions, and a zero share drops whatever a stray row computed.
    terms = [jnp.where(share[:, e, None] != 0, share[:, e, None] * down[e], 0.0) for e in range(num_experts)]
    return sum(terms[1:], terms[0])


def _fits_pallas(rows, local_idx, topk_weights, gate_proj, up_proj, down_proj) -> bool:
    """Whether the Mosaic bodies take these: bf16 (or scaled float8) in whole tiles, eight pairs at least."""
    _, hidden, width = _shape(gate_proj)
    scaled = isinstance(gate_proj, BlockScaled)
    unit = 128 if scaled else 64
    kind = rows.dtype == jnp.bfloat16 and (scaled or gate_proj.dtype == jnp.bfloat16)
    return kind and hidden % unit == 0 and width % unit == 0 and local_idx.size >= 8


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _pallas(rows, local_idx, topk_weights, gate_proj, up_proj, down_proj, out_dtype=jnp.float32):
    """permute, the products, unpermute, each a Mosaic GPU kernel (permute: three above MAX_FUSED_PAIRS pairs)."""
    values = gate_proj.values if isinstance(gate_proj, BlockScaled) else gate_proj
    blocks = expert_blocks(values.dtype, local_idx.size, *_shape(gate_proj))
    return pallas_ffn(rows, local_idx, topk_weights, gate_proj, up_proj, down_proj, blocks, out_dtype)


def pallas_ffn(
    rows, local_idx, topk_weights, gate_proj, up_proj, down_proj, blocks: ExpertBlocks | None, out_dtype=jnp.float32
):
    """`expert_ffn` in Mosaic GPU kernels; both products in one, with `blocks`, or for None one after the other."""
    scaled = isinstance(gate_proj, BlockScaled)
    permuted = permute(rows, local_idx, gate_proj.shape[0], align=ALIGN, float8=scaled, implementation="pallas")
    weights = gate_proj, up_proj, down_proj
    out = _one_by_one(permuted, local_idx.size, *weights) if blocks is None else _at_once(permuted, *weights, blocks)
    back = {"older_positions": True, "out_dtype": out_dtype, "implementation": "pallas"}
    return unpermute(out, permuted.positions, topk_weights, **back)


def _at_once(permuted: Permuted, gate_proj, up_proj, down_proj, blocks: ExpertBlocks) -> jax.Array:
    from jmoe.pallas_kernels.expert_products_mosaic import expert_products

    groups = permuted.group_sizes, permuted.group_starts, permuted.scales
    return expert_products(permuted.rows, gate_proj, up_proj, down_proj, *groups, blocks=blocks)


def _one_by_one(permuted: Permuted, pairs: int, gate_proj, up_proj, down_proj) -> jax.Array:
    """Two kernels, with float8 weights one more, which rounds what stands between them."""
    from jmoe.pallas_kernels.quantize_rows_mosaic import quantize_rows_pallas

    x, sizes = permuted.rows, permuted.group_sizes
    num_experts, hidden_size, width = _shape(gate_proj)
    groups = {"group_starts": permuted.group_starts, "implementation": "pallas"}
    wide = blocks_for("gated_grouped_matmul", x.dtype, grouped_shape(pairs, num_experts, hidden_size, width))
    back = blocks_for("grouped_matmul", x.dtype, grouped_shape(pairs, num_experts, width, hidden_size))
    hidden = gated_grouped_matmul(x, gate_proj, up_proj, sizes, rows_scales=permuted.scales, blocks=wide, **groups)
    scaled = permuted.scales is not None
    hidden, scales = quantize_rows_pallas(hidden) if scaled else (hidden, None)
    return grouped_matmul(hidden, down_proj, sizes, rows_scales=scales, blocks=back, older_groups=True, **groups)


def _pallas_forward(*arguments):
    return _pallas(*arguments), arguments[:-1]


def _pallas_backward(_, arguments, cotangent):
    """The XLA form's."""
    rows, local_idx, *rest = arguments
    _, pull = jax.vjp(lambda rows, *rest: _xla(rows, local_idx, *rest), rows, *rest)
    found = pull(cotangent.astype(jnp.float32))
    return found[0], np.zeros(local_idx.shape, jax.dtypes.float0), *found[1:]


_pallas.defvjp(_pallas_forward, _pallas_backward)


def _batched_matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """[E, rows, in] x [E, in, out] -> [E, rows, out] in float32."""
    return jax.lax.dot_general(x, w, (((2,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32)


def _reference(rows, local_idx, topk_weights, gate_proj, up_proj, down_proj):
    """Float32, the chosen experts' weights gathered for each row."""
    if isinstance(gate_proj, BlockScaled):
        weights = (gate_proj, up_proj, down_proj)
        return block_scaled_ffn(rows, local_idx, topk_weights, *weights, implementation="reference")
    x = rows.astype(jnp.float32)
    out = jnp.zeros_like(x)
    for j in range(local_idx.shape[1]):
        expert = jnp.maximum(local_idx[:, j], 0)
        gate, up, down = (w[expert].astype(jnp.float32) for w in (gate_proj, up_proj, down_proj))
        hidden = jax.nn.silu(jnp.einsum("rd,rdf->rf", x, gate)) * jnp.einsum("rd,rdf->rf", x, up)
        term = topk_weights[:, j, None] * jnp.einsum("rf,rfd->rd", hidden, down)
        out = out + jnp.where(local_idx[:, j, None] >= 0, term, 0.0)
    return out
