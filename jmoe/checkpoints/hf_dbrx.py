"""Names of DBRX checkpoints: fused `Wqkv`, and experts stacked flat along the rows of `w1`, `v1` and `w2`."""

from jmoe.checkpoints.layout import AttentionMap, ExpertMap, Piece, heads_in, transposed, whole
from jmoe.config import ModelConfig


def attention_map(config: ModelConfig) -> AttentionMap:
    """Where each parameter of the attention half stands; q, k and v are row ranges of `Wqkv`."""
    c = config
    pieces: AttentionMap = {
        "embed": whole("transformer.wte.weight", c.vocab_size, c.hidden_size),
        "final_norm": whole("transformer.norm_f.weight", c.hidden_size),
        "lm_head": transposed("lm_head.weight", c.hidden_size, c.vocab_size),
    }
    fused = ((c.num_heads + 2 * c.num_kv_heads) * c.head_dim, c.hidden_size)
    for layer in range(c.num_layers):
        ours, theirs = f"layers.{layer}.", f"transformer.blocks.{layer}."
        attn = theirs + "norm_attn_norm."
        pieces[ours + "input_norm"] = whole(attn + "norm_1.weight", c.hidden_size)
        pieces[ours + "ffn_norm"] = whole(attn + "norm_2.weight", c.hidden_size)
        start = 0
        for name, heads in (("q_proj", c.num_heads), ("k_proj", c.num_kv_heads), ("v_proj", c.num_kv_heads)):
            groups = ((heads, c.head_dim), (c.hidden_size,))
            pieces[ours + name] = Piece(attn + "attn.Wqkv.weight", fused, groups, (2, 0, 1), (start, 0))
            start += heads * c.head_dim
        pieces[ours + "o_proj"] = heads_in(attn + "attn.out_proj.weight", c.hidden_size, c.num_heads, c.head_dim)
        pieces[ours + "router"] = transposed(theirs + "ffn.router.layer.weight", c.hidden_size, c.num_experts)
    return pieces


def expert_map(config: ModelConfig) -> ExpertMap:
    """Where each expert's parameters stand: rows e*F to (e+1)*F of `[E*F, D]`; only `w2` is stored as ours."""
    c = config
    stored, groups = (c.num_experts * c.expert_ffn_size, c.hidden_size), ((c.expert_ffn_size,), (c.hidden_size,))
    pieces: ExpertMap = {}
    for j, layer in enumerate(c.moe_layers):
        for ours, theirs, order in (
            ("gate_proj", "w1", (1, 0)),
            ("up_proj", "v1", (1, 0)),
            ("down_proj", "w2", (0, 1)),
        ):
            name = f"transformer.blocks.{layer}.ffn.experts.mlp.{theirs}"
            pieces[f"layers.{j}.{ours}"] = tuple(
                Piece(name, stored, groups, order, (e * c.expert_ffn_size, 0)) for e in range(c.num_experts)
            )
    return pieces
