"""ModelShape: the sizes of a model that the planner needs, from a preset, a ModelConfig or a config.json. No JAX."""

import dataclasses
import difflib
import functools
import importlib.resources
import json
import pathlib
import tomllib
from collections.abc import Mapping
from typing import Any

from jmoe.config import ModelConfig

MAX_CONFIG_BYTES = 4 << 20  # a config.json is a few kB; anything larger is not one


@dataclasses.dataclass(frozen=True, slots=True)
class MlaShape:
    """Multi-head latent attention: the cache holds one compressed vector and one rotary key a token."""

    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


@dataclasses.dataclass(frozen=True, slots=True)
class ModelShape:
    """Counts and sizes of a decoder-only MoE model; parameters are counted in elements, not bytes.

    Attributes:
      num_layers: all decoder layers; the first num_dense_layers of them have an ordinary FFN of dense_ffn_size.
      hidden_size [D], num_heads [Q], num_kv_heads [G], head_dim [H]: attention.
      num_experts [E], num_experts_per_tok [k], expert_ffn_size [F]: of every MoE layer; gated, three matrices each.
      shared_ffn_size: width of the shared experts of a layer together (they run on the attention mesh); 0 for none.
      mla: latent attention, or None for grouped-query attention.
    """

    name: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int
    expert_ffn_size: int
    num_dense_layers: int = 0
    dense_ffn_size: int = 0
    shared_ffn_size: int = 0
    tie_word_embeddings: bool = False
    mla: MlaShape | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and (not isinstance(value, int) or value < 0):
                raise ValueError(f"ModelShape.{field.name}: expected an integer of at least 0, got {value!r}")
        if self.num_moe_layers < 1:
            raise ValueError(f"ModelShape.num_dense_layers: expected fewer than {self.num_layers}, got {self}")
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"ModelShape.num_experts_per_tok: expected 1 to {self.num_experts}, got {self.num_experts_per_tok}"
            )

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - self.num_dense_layers

    @property
    def attention_params(self) -> int:
        """Projections of one layer: query, key, value and output (or MLA's low-rank factors)."""
        d = self.hidden_size
        if self.mla is None:
            return d * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        a, q = self.mla, self.num_heads
        query = d * a.q_lora_rank + a.q_lora_rank * q * (a.qk_nope_head_dim + a.qk_rope_head_dim)
        latent = d * (a.kv_lora_rank + a.qk_rope_head_dim)
        up = a.kv_lora_rank * q * (a.qk_nope_head_dim + a.v_head_dim)
        return query + latent + up + q * a.v_head_dim * d

    @property
    def expert_params(self) -> int:
        """One expert of one layer."""
        return 3 * self.hidden_size * self.expert_ffn_size

    @property
    def shared_params(self) -> int:
        """Shared experts and router of one MoE layer."""
        return 3 * self.hidden_size * self.shared_ffn_size + self.hidden_size * self.num_experts

    @property
    def dense_params(self) -> int:
        """FFN of one dense layer."""
        return 3 * self.hidden_size * self.dense_ffn_size

    @property
    def head_params(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def attention_role_params(self) -> int:
        """Everything that an attention replica holds."""
        embeddings = self.head_params * (1 if self.tie_word_embeddings else 2)
        return (
            self.num_layers * self.attention_params
            + self.num_moe_layers * self.shared_params
            + self.num_dense_layers * self.dense_params
            + embeddings
        )

    @property
    def total_params(self) -> int:
        return self.attention_role_params + self.num_moe_layers * self.num_experts * self.expert_params

    @property
    def kv_elements(self) -> int:
        """Cache elements of one token in one layer."""
        if self.mla is not None:
            return self.mla.kv_lora_rank + self.mla.qk_rope_head_dim
        return 2 * self.num_kv_heads * self.head_dim

    @property
    def score_flops(self) -> int:
        """Operations of one new token against one cached token in one layer (MLA in its absorbed form)."""
        if self.mla is not None:
            return 2 * self.num_heads * (2 * self.mla.kv_lora_rank + self.mla.qk_rope_head_dim)
        return 4 * self.num_heads * self.head_dim

    def kv_copies(self, tensor: int) -> float:
        """How often a replica's `tensor` ranks hold each cache element: 1 until they outnumber the KV heads."""
        heads = 1 if self.mla is not None else self.num_kv_heads
        return max(1.0, tensor / heads)

    def splits_attention(self, tensor: int) -> bool:
        """Whether attention can run on `tensor` ranks (heads divide; KV heads divide or are replicated)."""
        heads = 1 if self.mla is not None else self.num_kv_heads
        return self.num_heads % tensor == 0 and (heads % tensor == 0 or tensor % heads == 0)

    def splits_experts(self, tensor: int) -> bool:
        return self.expert_ffn_size % tensor == 0

    @classmethod
    def from_config(cls, config: ModelConfig, name: str = "") -> "ModelShape":
        """From the facts that the serving side reads."""
        return cls(
            name=name or config.family,
            num_layers=config.num_layers,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            num_experts=config.num_experts,
            num_experts_per_tok=config.num_experts_per_tok,
            expert_ffn_size=config.expert_ffn_size,
            num_dense_layers=len(config.dense_layers),
            dense_ffn_size=config.dense_ffn_size,
            tie_word_embeddings=config.tie_word_embeddings,
        )


@functools.cache
def presets() -> Mapping[str, ModelShape]:
    """The models of models.toml by name."""
    text = importlib.resources.files("jmoe.planner").joinpath("models.toml").read_text()
    shapes = {}
    for name, fields in tomllib.loads(text).items():
        mla = fields.pop("mla", None)
        shapes[name] = ModelShape(name=name, mla=MlaShape(**mla) if mla else None, **fields)
    return shapes


def load_model_shape(source: str) -> ModelShape:
    """A preset's name, a Hugging Face checkpoint folder, or a path to its config.json.

    Raises:
      ValueError: neither a known name nor a readable config; the message lists the names.
    """
    if source in presets():
        return presets()[source]
    path = pathlib.Path(source)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        near = difflib.get_close_matches(source, presets(), 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(
            f"--model: expected one of {', '.join(presets())}, or a folder with a config.json, got {source!r}{hint}"
        )
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ValueError(f"{path}: expected a config.json of at most {MAX_CONFIG_BYTES} bytes, got a larger file")
    hf = json.loads(path.read_text())
    name = path.resolve().parent.name
    # The planner asks for the precision separately, so a quantized checkpoint's sizes serve as well.
    hf.pop("quantization_config", None)
    if hf.get("model_type") == "deepseek_v3":
        return _deepseek(hf, name)
    return ModelShape.from_config(ModelConfig.from_hf(hf), name)


def _deepseek(hf: Mapping[str, Any], name: str) -> ModelShape:
    if hf.get("moe_layer_freq", 1) != 1:
        raise ValueError(f"config.json moe_layer_freq: expected 1, got {hf['moe_layer_freq']}")
    mla = MlaShape(**{field.name: hf[field.name] for field in dataclasses.fields(MlaShape)})
    return ModelShape(
        name=name,
        num_layers=hf["num_hidden_layers"],
        hidden_size=hf["hidden_size"],
        vocab_size=hf["vocab_size"],
        num_heads=hf["num_attention_heads"],
        num_kv_heads=1,
        head_dim=mla.qk_nope_head_dim + mla.qk_rope_head_dim,
        num_experts=hf["n_routed_experts"],
        num_experts_per_tok=hf["num_experts_per_tok"],
        expert_ffn_size=hf["moe_intermediate_size"],
        num_dense_layers=hf.get("first_k_dense_replace", 0),
        dense_ffn_size=hf["intermediate_size"],
        shared_ffn_size=hf.get("n_shared_experts", 0) * hf["moe_intermediate_size"],
        tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
        mla=mla,
    )
