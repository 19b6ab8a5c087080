"""ModelConfig: the facts of a Mixture-of-Experts model, read from a Hugging Face `config.json`. No JAX."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

RANDOM_WEIGHTS = "random:"  # "random:SEED" stands where a checkpoint folder would: random weights of any size
FAMILIES = ("mixtral", "qwen3_moe", "dbrx")


@dataclasses.dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only MoE transformer. Letters of the shape comments in brackets.

    Attributes:
      family: which Hugging Face architecture the checkpoint names come from.
      vocab_size, hidden_size [D], num_layers, num_heads [Q], num_kv_heads [G], head_dim [H]: as usual; head_dim is
        independent of hidden_size / num_heads.
      num_experts [E], num_experts_per_tok [k], expert_ffn_size [F]: of every MoE layer.
      dense_layers: decoder layers with an ordinary FFN of dense_ffn_size instead of experts.
      renormalize_topk: divide the k chosen softmax weights by their sum.
      norm: "rms", or "layer" for LayerNorm without bias.
      qk_norm: RMSNorm over each query and key head.
      attention_bias: biases on q, k, v and output projections.
      clip_qkv: clamp of q, k and v, or None.
      sliding_window: how many positions back a token may look, itself included; None for all.
      eos_token_ids: any of them ends a generation.
      dtype: of weights and activations.
      expert_dtype: "fp8" keeps the experts' weights as float8_e4m3fn with a scale a block of 128x128; "model" as dtype.
    """

    family: Literal["mixtral", "qwen3_moe", "dbrx"]
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int
    expert_ffn_size: int
    dense_layers: tuple[int, ...] = ()
    dense_ffn_size: int = 0
    renormalize_topk: bool = True
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    qk_norm: bool = False
    attention_bias: bool = False
    clip_qkv: float | None = None
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    max_position: int = 4096
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    expert_dtype: Literal["model", "fp8"] = "model"

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"ModelConfig.num_heads: expected a multiple of {self.num_kv_heads} (num_kv_heads), "
                f"got {self.num_heads}"
            )
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"ModelConfig.num_experts_per_tok: expected 1 to {self.num_experts} (num_experts), "
                f"got {self.num_experts_per_tok}"
            )
        if self.head_dim % 2:
            raise ValueError(f"ModelConfig.head_dim: expected an even number (rotary halves), got {self.head_dim}")
        if self.expert_dtype not in ("model", "fp8"):
            raise ValueError(f"ModelConfig.expert_dtype: expected 'model' or 'fp8', got {self.expert_dtype!r}")
        if not self.moe_layers:
            raise ValueError("ModelConfig.dense_layers: expected at least one MoE layer, got only dense ones")

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Decoder layers with experts, in order; the schedule's layer j is moe_layers[j]."""
        return tuple(layer for layer in range(self.num_layers) if layer not in self.dense_layers)

    @classmethod
    def from_hf(cls, source: str | pathlib.Path | Mapping[str, Any]) -> "ModelConfig":
        """Reads a checkpoint folder's `config.json` (or a mapping already parsed from one).

        Raises:
          ValueError: an architecture or an option that is not supported, by name.
          FileNotFoundError: no `config.json` in the folder.
        """
        if isinstance(source, Mapping):
            hf = dict(source)
        else:
            path = pathlib.Path(source) / "config.json"
            if not path.is_file():
                raise FileNotFoundError(f"expected a Hugging Face checkpoint folder, got no {path}")
            hf = json.loads(path.read_text())
            generation = path.with_name("generation_config.json")
            if generation.is_file():  # chat models name more end tokens there, and `generate` obeys that file
                hf |= {k: v for k, v in json.loads(generation.read_text()).items() if k == "eos_token_id"}
        family = hf.get("model_type")
        if family not in _READERS:
            raise ValueError(f"config.json model_type: expected one of {', '.join(FAMILIES)}, got {family!r}")
        try:
            config = _READERS[family](hf)
            return dataclasses.replace(config, expert_dtype=_expert_dtype(hf, family))
        except KeyError as missing:
            raise ValueError(f"config.json: expected the key {missing} of a {family} model, got none") from None


def _expert_dtype(hf: Mapping[str, Any], family: str) -> Literal["model", "fp8"]:
    """ "fp8" for block-scaled checkpoints as those of DeepSeek-V3 and Qwen3; other quantisations are refused."""
    quantization = hf.get("quantization_config")
    if not quantization:
        return "model"
    expected = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"}
    for key, value in expected.items():
        default = value if key in ("activation_scheme", "fmt") else None
        if (got := quantization.get(key, default)) != value:
            raise ValueError(
                f"config.json quantization_config.{key}: expected {value!r} (float8 weights with a scale a block), "
                f"got {got!r}"
            )
    if family == "dbrx":
        raise ValueError(
            "config.json quantization_config: expected none for dbrx (its experts are one matrix), got fp8"
        )
    return "fp8"


def _shared(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that every family spells alike."""
    eos = hf.get("eos_token_id")
    eos_ids = () if eos is None else tuple(eos) if isinstance(eos, list) else (int(eos),)
    dtype = hf.get("dtype") or hf.get("torch_dtype") or "float32"
    return {
        "vocab_size": hf["vocab_size"],
        "tie_word_embeddings": bool(hf.get("tie_word_embeddings", False)),
        "eos_token_ids": eos_ids,
        "bos_token_id": hf.get("bos_token_id"),
        "dtype": "float32" if dtype == "float32" else "bfloat16",
    }


def _rope_theta(hf: Mapping[str, Any], default: float) -> float:
    """The rotary base, from either place where Hugging Face keeps it; scaled variants are refused."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind != "default":
        raise ValueError(f"config.json rope_parameters: expected rope_type 'default', got {kind!r}")
    partial = rope.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1
    if partial != 1:
        raise ValueError(f"config.json partial_rotary_factor: expected 1 (rotary over whole heads), got {partial}")
    return float(rope.get("rope_theta") or hf.get("rope_theta") or default)


def _check_activation(name: str) -> None:
    if name not in ("silu", "swish"):
        raise ValueError(f"config.json activation: expected 'silu', got {name!r}")


def _mixtral(hf: Mapping[str, Any]) -> ModelConfig:
    _check_activation(hf.get("hidden_act", "silu"))
    hf = {"bos_token_id": 1, "eos_token_id": 2} | dict(hf)  # MixtralConfig's defaults, which its files may leave out
    return ModelConfig(
        family="mixtral",
        hidden_size=hf["hidden_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=hf["num_attention_heads"],
        num_kv_heads=hf["num_key_value_heads"],
        head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
        num_experts=hf["num_local_experts"],
        num_experts_per_tok=hf["num_experts_per_tok"],
        expert_ffn_size=hf["intermediate_size"],
        norm_eps=hf.get("rms_norm_eps", 1e-5),
        rope_theta=_rope_theta(hf, 1e6),
        sliding_window=hf.get("sliding_window"),
        max_position=hf.get("max_position_embeddings", 4096 * 32),
        **_shared(hf),
    )


def _qwen3_moe(hf: Mapping[str, Any]) -> ModelConfig:
    _check_activation(hf.get("hidden_act", "silu"))
    sparse_step = hf.get("decoder_sparse_step", 1)
    mlp_only = set(hf.get("mlp_only_layers") or ())
    num_layers = hf["num_hidden_layers"]
    dense = tuple(i for i in range(num_layers) if i in mlp_only or (i + 1) % sparse_step)
    if hf.get("use_sliding_window") and hf.get("max_window_layers", 0) not in (0, num_layers):
        raise ValueError("config.json max_window_layers: expected one window for all layers, got a mixture")
    return ModelConfig(
        family="qwen3_moe",
        hidden_size=hf["hidden_size"],
        num_layers=num_layers,
        num_heads=hf["num_attention_heads"],
        num_kv_heads=hf["num_key_value_heads"],
        head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
        num_experts=hf.get("num_experts") or hf["num_local_experts"],
        num_experts_per_tok=hf["num_experts_per_tok"],
        expert_ffn_size=hf["moe_intermediate_size"],
        dense_layers=dense,
        dense_ffn_size=hf["intermediate_size"] if dense else 0,
        renormalize_topk=bool(hf.get("norm_topk_prob", False)),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        rope_theta=_rope_theta(hf, 1e4),
        qk_norm=True,
        attention_bias=bool(hf.get("attention_bias", False)),
        sliding_window=hf.get("sliding_window", 4096) if hf.get("use_sliding_window") else None,
        max_position=hf.get("max_position_embeddings", 32768),
        **_shared(hf),
    )


def _dbrx(hf: Mapping[str, Any]) -> ModelConfig:
    attn, ffn = hf.get("attn_config") or {}, hf["ffn_config"]
    _check_activation((ffn.get("ffn_act_fn") or {}).get("name", "silu"))
    p_norm = ffn.get("moe_normalize_expert_weights", 1.0)
    if hf.get("tie_word_embeddings"):
        raise ValueError("config.json tie_word_embeddings: expected false (DBRX has a head of its own), got true")
    # DBRX's own files keep the base in attn_config; transformers 5 adds a top-level default that it must not win over.
    rope_theta = _rope_theta(hf, 1e4)
    rope_theta = attn.get("rope_theta") or rope_theta
    if p_norm not in (None, 1, 1.0):
        raise ValueError(f"config.json moe_normalize_expert_weights: expected 1 or null, got {p_norm}")
    return ModelConfig(
        family="dbrx",
        hidden_size=hf["d_model"],
        num_layers=hf["n_layers"],
        num_heads=hf["n_heads"],
        num_kv_heads=attn.get("kv_n_heads", 1),
        head_dim=hf["d_model"] // hf["n_heads"],
        num_experts=ffn.get("moe_num_experts", 4),
        num_experts_per_tok=ffn.get("moe_top_k", 1),
        expert_ffn_size=ffn.get("ffn_hidden_size", 3584),
        renormalize_topk=p_norm is not None,
        norm="layer",
        norm_eps=1e-5,  # torch's LayerNorm default, which DBRX uses
        rope_theta=float(rope_theta),
        clip_qkv=attn.get("clip_qkv"),
        max_position=hf.get("max_seq_len", 2048),
        **_shared(hf),
    )


_READERS = {"mixtral": _mixtral, "qwen3_moe": _qwen3_moe, "dbrx": _dbrx}
