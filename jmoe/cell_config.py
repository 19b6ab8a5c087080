"""CellConfig: everything that fixes the shapes of a cell's programs (a cell = one attention mesh + one expert mesh)."""

import dataclasses
from typing import Any, Literal

from jmoe.config import ModelConfig
from jmoe.sharding.mesh_config import MeshConfig
from jmoe.sharding.placement import ExpertPlacement

KV_DTYPES = ("auto", "fp8")
KERNELS = ("auto", "xla", "pallas")


@dataclasses.dataclass(frozen=True, slots=True)
class CellConfig:
    """The model, the meshes and the sizes that programs are compiled for. No JAX.

    Attributes:
      model: the model's facts.
      mesh: resolved (`MeshConfig.resolve`): nothing "auto", placement explicit.
      rows: decode slots of one micro-batch of one attention replica [B].
      chunk_len: prompt tokens of one request that one prefill micro-batch takes.
      num_steps: decode steps of one call [K].
      page_len: tokens of one KV page.
      num_pages: KV pages of one attention replica, page 0 included (it takes writes of idle rows and is never read).
      max_len: longest sequence, prompt and output together.
      max_stop_ids: stop token ids a request may have, end-of-sequence ids included.
      num_top_logprobs: top tokens whose log-probabilities the sampling programs return.
      kv_dtype: of the KV pages: "auto" for the model's, "fp8" for float8_e4m3fn (numbers beyond 448 are clipped).
      kernels: what attention and expert FFNs run: "pallas" (an error where it can't), "xla", or "auto" for "pallas"
        where it can and "xla" elsewhere. With "pallas" too the few kernels of a decode step and the greedy head stand
        back where they can't.
    """

    model: ModelConfig
    mesh: MeshConfig
    rows: int = 4
    chunk_len: int = 64
    num_steps: int = 4
    page_len: int = 16
    num_pages: int = 257
    max_len: int = 1024
    max_stop_ids: int = 8
    num_top_logprobs: int = 20
    kv_dtype: Literal["auto", "fp8"] = "auto"
    kernels: Literal["auto", "xla", "pallas"] = "auto"

    def __post_init__(self):
        for name in ("rows", "chunk_len", "num_steps", "page_len", "max_len"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"CellConfig.{name}: expected at least 1, got {value}")
        for name, known in (("kv_dtype", KV_DTYPES), ("kernels", KERNELS)):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"CellConfig.{name}: expected one of {', '.join(known)}, got {value!r}")
        if self.mesh.placement is None or "auto" in (self.mesh.directions, self.mesh.transport):
            raise ValueError("CellConfig.mesh: expected a resolved MeshConfig, got one with 'auto'; call .resolve()")
        if not 0 <= self.num_top_logprobs <= self.model.vocab_size:
            raise ValueError(
                f"CellConfig.num_top_logprobs: expected 0 to {self.model.vocab_size} (the vocabulary), "
                f"got {self.num_top_logprobs}"
            )
        if self.max_len > self.model.max_position:
            raise ValueError(
                f"CellConfig.max_len: expected at most {self.model.max_position} (the model's), got {self.max_len}"
            )
        if self.num_pages - 1 < self.max_pages:
            raise ValueError(
                f"CellConfig.num_pages: expected at least {self.max_pages + 1}, so that one sequence of max_len "
                f"{self.max_len} fits beside the idle page, got {self.num_pages}"
            )

    @property
    def implementation(self) -> Literal["xla", "pallas"] | None:
        """What `kernels` means to a kernel's `implementation=`."""
        return None if self.kernels == "auto" else self.kernels

    @property
    def max_pages(self) -> int:
        """Pages of the longest sequence: the width of a page table row."""
        return -(-self.max_len // self.page_len)

    @property
    def num_slots(self) -> int:
        """Requests that can decode at once."""
        return self.mesh.attention * self.mesh.num_micro_batches * self.rows

    def largest_array_bytes(self, role: str) -> int:
        """Of the arrays that are read whole for one device of a role: the vocabulary's, or its node's experts'.

        0 where none is: shares of the vocabulary are cut, and float8 experts may be made of another type.
        """
        m, mesh, width = self.model, self.mesh, 4 if self.model.dtype == "float32" else 2
        head = width * m.vocab_size * m.hidden_size if role != "expert" and mesh.attention_tensor == 1 else 0
        if role == "attention" or mesh.placement is None or m.expert_dtype == "fp8":
            return head
        matrix = width * m.hidden_size * m.expert_ffn_size // mesh.expert_tensor
        return max(head, mesh.placement.max_local_experts * matrix)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for a worker's command stream."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "CellConfig":
        """The inverse of `to_dict`, also after a trip through JSON or msgpack (tuples become lists there)."""
        model = dict(data["model"])
        model.update(dense_layers=tuple(model["dense_layers"]), eos_token_ids=tuple(model["eos_token_ids"]))
        mesh = dict(data["mesh"])
        mesh["placement"] = ExpertPlacement.of(mesh["placement"]["nodes"])
        rest = {k: v for k, v in data.items() if k not in ("model", "mesh")}
        return cls(model=ModelConfig(**model), mesh=MeshConfig(**mesh), **rest)
