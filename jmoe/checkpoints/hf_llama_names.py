"""Names that Mixtral and Qwen3-MoE checkpoints share: everything but router and experts, and the fused expert form."""

from jmoe.checkpoints.layout import (
    AttentionMap,
    ExpertMap,
    Piece,
    head_bias,
    heads_in,
    heads_out,
    scaled,
    transposed,
    whole,
)
from jmoe.config import ModelConfig


def shared_attention_map(c: ModelConfig, router: str) -> AttentionMap:
    """`model.layers.N.*`; `router` is the name inside a MoE layer, "block_sparse_moe.gate" for example."""
    pieces: AttentionMap = {
        "embed": whole("model.embed_tokens.weight", c.vocab_size, c.hidden_size),
        "final_norm": whole("model.norm.weight", c.hidden_size),
    }
    if not c.tie_word_embeddings:
        pieces["lm_head"] = transposed("lm_head.weight", c.hidden_size, c.vocab_size)
    for layer in range(c.num_layers):
        ours, theirs = f"layers.{layer}.", f"model.layers.{layer}."
        pieces[ours + "input_norm"] = whole(theirs + "input_layernorm.weight", c.hidden_size)
        pieces[ours + "ffn_norm"] = whole(theirs + "post_attention_layernorm.weight", c.hidden_size)
        for short, heads in (("q", c.num_heads), ("k", c.num_kv_heads), ("v", c.num_kv_heads)):
            name = f"{theirs}self_attn.{short}_proj"
            pieces[f"{ours}{short}_proj"] = heads_out(f"{name}.weight", c.hidden_size, heads, c.head_dim)
            if c.attention_bias:
                pieces[f"{ours}{short}_bias"] = head_bias(f"{name}.bias", heads, c.head_dim)
        out = f"{theirs}self_attn.o_proj"
        pieces[ours + "o_proj"] = heads_in(f"{out}.weight", c.hidden_size, c.num_heads, c.head_dim)
        if c.attention_bias:
            pieces[ours + "o_bias"] = whole(f"{out}.bias", c.hidden_size)
        if c.qk_norm:
            for norm in ("q_norm", "k_norm"):
                pieces[ours + norm] = whole(f"{theirs}self_attn.{norm}.weight", c.head_dim)
        if layer in c.dense_layers:
            for name in ("gate_proj", "up_proj"):
                pieces[ours + name] = transposed(f"{theirs}mlp.{name}.weight", c.hidden_size, c.dense_ffn_size)
            pieces[ours + "down_proj"] = transposed(f"{theirs}mlp.down_proj.weight", c.dense_ffn_size, c.hidden_size)
        else:
            pieces[ours + "router"] = transposed(f"{theirs}{router}.weight", c.hidden_size, c.num_experts)
    return pieces


def separate_expert_map(c: ModelConfig, experts: str, names: tuple[str, str, str]) -> ExpertMap:
    """One tensor an expert and projection; `names` are those of gate_proj, up_proj and down_proj."""
    gate, up, down = names
    pieces: ExpertMap = {}
    for j, layer in enumerate(c.moe_layers):
        theirs = [f"model.layers.{layer}.{experts}.{e}." for e in range(c.num_experts)]
        wide, back = (c.hidden_size, c.expert_ffn_size), (c.expert_ffn_size, c.hidden_size)
        for ours, name, size in (("gate", gate, wide), ("up", up, wide), ("down", down, back)):
            stored = [f"{t}{name}.weight" for t in theirs]
            if c.expert_dtype == "model":
                pieces[f"layers.{j}.{ours}_proj"] = tuple(transposed(s, *size) for s in stored)
                continue
            pairs = zip(*(scaled(s, *size) for s in stored), strict=True)
            pieces[f"layers.{j}.{ours}_proj"], pieces[f"layers.{j}.{ours}_scales"] = pairs
    return pieces


def fused_name(layer: int, projection: str) -> str:
    """Name of a layer's fused experts, as transformers 5 holds them in memory and can save them."""
    return f"model.layers.{layer}.mlp.experts.{projection}"


def fused_expert_map(c: ModelConfig) -> ExpertMap:
    """`gate_up_proj` [E, 2F, D] (gate first) and `down_proj` [E, D, F] of each layer."""
    experts, hidden, ffn = c.num_experts, c.hidden_size, c.expert_ffn_size
    pieces: ExpertMap = {}
    for j, layer in enumerate(c.moe_layers):
        for name, start in (("gate_proj", 0), ("up_proj", ffn)):
            pieces[f"layers.{j}.{name}"] = tuple(
                Piece(
                    fused_name(layer, "gate_up_proj"),
                    (experts, 2 * ffn, hidden),
                    ((), (ffn,), (hidden,)),
                    (1, 0),
                    (e, start, 0),
                )
                for e in range(experts)
            )
        pieces[f"layers.{j}.down_proj"] = tuple(
            Piece(fused_name(layer, "down_proj"), (experts, hidden, ffn), ((), (hidden,), (ffn,)), (1, 0), (e, 0, 0))
            for e in range(experts)
        )
    return pieces
