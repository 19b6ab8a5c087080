"""CellSizes: the sizes a user may choose, and how those left open are resolved into a CellConfig. No JAX."""

import dataclasses
from typing import Literal

from jmoe.cell_config import CellConfig
from jmoe.config import ModelConfig
from jmoe.sharding.mesh_config import MeshConfig

QUANTIZATIONS: dict[str, Literal["model", "fp8"]] = {"fp8": "fp8", "none": "model"}
MAX_LEN_AUTO = 2048  # a KV pool for more is worth asking for: it grows with every slot


@dataclasses.dataclass(frozen=True, slots=True)
class CellSizes:
    """What fixes the shapes of a cell's programs; None leaves a choice to `resolve`.

    Args:
      rows: decode slots of one micro-batch of one attention replica; None is 4.
      chunk_len: prompt tokens that one prefill micro-batch takes; None is 64, cut to max_len.
      num_steps: decode steps of one call; None is 4.
      page_len: tokens of one KV page; None is 16.
      num_pages: KV pages of one attention replica; None lets every slot reach max_len.
      max_len: longest sequence, prompt and output together; None is the model's, at most 2048.
      dtype: of weights and activations; None is the checkpoint's.
      quantization: "fp8" keeps the experts' weights in float8 with a scale a block of 128x128, "none" in `dtype`; None
        leaves them as the checkpoint has them.
      kv_dtype: "fp8", or "auto" for `dtype`; None is "auto".
      kernels: "auto", "xla" or "pallas" (see `CellConfig`); None is "auto".
    """

    rows: int | None = None
    chunk_len: int | None = None
    num_steps: int | None = None
    page_len: int | None = None
    num_pages: int | None = None
    max_len: int | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    quantization: Literal["fp8", "none"] | None = None
    kv_dtype: Literal["auto", "fp8"] | None = None
    kernels: Literal["auto", "xla", "pallas"] | None = None

    def __post_init__(self):
        for name in ("rows", "chunk_len", "num_steps", "page_len", "num_pages", "max_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if self.dtype not in (None, "float32", "bfloat16"):
            raise ValueError(f"dtype: expected 'float32' or 'bfloat16', got {self.dtype!r}")
        if self.quantization not in (None, *QUANTIZATIONS):
            raise ValueError(f"quantization: expected 'fp8' or 'none', got {self.quantization!r}")

    def resolve(
        self, model: ModelConfig, mesh: MeshConfig, best_transport: Literal["ppermute", "push"] = "ppermute"
    ) -> CellConfig:
        """Returns the cell in which nothing is left open; `best_transport` is what the mesh's "auto" stands for.

        Raises:
          ValueError: sizes that don't fit the model or one another.
        """
        rows, page_len = self.rows or 4, self.page_len or 16
        max_len = self.max_len or min(model.max_position, MAX_LEN_AUTO)
        max_pages = -(-max_len // page_len)
        expert_dtype = QUANTIZATIONS[self.quantization] if self.quantization else model.expert_dtype
        return CellConfig(
            model=dataclasses.replace(model, dtype=self.dtype or model.dtype, expert_dtype=expert_dtype),
            mesh=mesh.resolve(model.num_experts, best_transport),
            rows=rows,
            chunk_len=self.chunk_len or min(64, max_len),
            num_steps=self.num_steps or 4,
            page_len=page_len,
            num_pages=self.num_pages or mesh.num_micro_batches * rows * max_pages + 1,  # + the idle page
            max_len=max_len,
            kv_dtype=self.kv_dtype or "auto",
            kernels=self.kernels or "auto",
        )
