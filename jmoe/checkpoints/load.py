"""CheckpointReader: any slice of any parameter of a Hugging Face checkpoint, in our shapes, and nothing else of it."""

import pathlib
from collections.abc import Sequence
from typing import Literal

import ml_dtypes
import numpy as np

from jmoe.checkpoints.dequantized_files import DequantizedFiles
from jmoe.checkpoints.hf_names import name_maps
from jmoe.checkpoints.host_buffers import HostBuffers
from jmoe.checkpoints.layout import SCALES, Piece
from jmoe.checkpoints.raw_tensors import RawTensors
from jmoe.checkpoints.safetensors_reader import TensorFiles
from jmoe.config import ModelConfig

Role = Literal["attention", "expert"]
Index = tuple[slice, ...]


class CheckpointReader:
    """Reads parameters of one checkpoint folder, role by role, as `jmoe.models` names and shapes them.

    A slice reads its own bytes only: one expert's matrices, one tensor rank's heads. Values are cast to the dtype of
    `config`, whatever the files hold (float32, float16, bfloat16, or float8 with a scale a block). Only experts of
    `expert_dtype` "fp8" stay float8, bit for bit.

    Args:
      folder: a Hugging Face checkpoint folder.
      config: what the model should be; None reads the folder's `config.json`. Give one to read in another dtype.
      buffers: memory that large arrays are read into; None for its own.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a tensor is missing, or has another shape than `config` says (found when it is read).
    """

    def __init__(
        self, folder: str | pathlib.Path, config: ModelConfig | None = None, buffers: HostBuffers | None = None
    ):
        self.config = config or ModelConfig.from_hf(folder)
        self.files = TensorFiles(folder)
        self._attention, self._experts = name_maps(self.config, self.files)
        self._dequantized = DequantizedFiles(self.files)
        self._expert_files = self._dequantized if self.config.expert_dtype == "model" else self.files
        self._raw = RawTensors()
        self._buffers = buffers or HostBuffers()
        self._dtype = np.dtype(np.float32 if self.config.dtype == "float32" else ml_dtypes.bfloat16)

    @property
    def has_scaled_experts(self) -> bool:
        """Whether the files hold float8 experts with a scale a block."""
        return next(iter(self._experts.values()))[0].name + SCALES in self.files

    def shapes(self, role: Role) -> dict[str, tuple[int, ...]]:
        """Whole shape of every parameter of a role, by path."""
        if role == "attention":
            return {path: piece.shape for path, piece in self._attention.items()}
        return {path: (len(pieces), *pieces[0].shape) for path, pieces in self._experts.items()}

    def read(self, role: Role, path: str, index: Index | None = None) -> np.ndarray:
        """Reads a slice of one parameter.

        Args:
          role: "attention" or "expert".
          path: "layers.3.q_proj" for example.
          index: one slice (step 1) an axis of the whole parameter; None for all of it.

        Returns:
          That slice in the config's dtype; contiguous where something was cut or cast, else perhaps a transposed view.

        Raises:
          ValueError: an unknown path, a slice outside the shape, or a stored tensor that is missing or misshapen.
        """
        if role == "expert":
            whole_shape = (len(self._expert_pieces(path)), *self._expert_pieces(path)[0].shape)
            experts, *rest = _resolve(path, whole_shape, index)
            return self._stack(path, range(experts.start, experts.stop), tuple(rest))
        if path not in self._attention:
            raise ValueError(f"expected a parameter of the attention half, got {path!r}")
        piece = self._attention[path]
        resolved = _resolve(path, piece.shape, index)
        if (whole := self._read_whole([piece], resolved, self._dtype)) is not None:
            return whole[0]
        part = piece.read(self._dequantized, resolved)
        return np.ascontiguousarray(part, self._dtype)

    def read_experts(self, path: str, expert_ids: Sequence[int], index: Index | None = None) -> np.ndarray:
        """Reads some experts' matrices, in the order given, as a node's placement lists them.

        Args:
          path: "layers.2.gate_proj" for example; the number counts MoE layers.
          expert_ids: which experts.
          index: one slice (step 1) an axis of an expert's array, such as the columns of one tensor rank; None for all.

        Returns:
          `[len(expert_ids), D, F']` for gate_proj and up_proj, `[len(expert_ids), F', D]` for down_proj; of float8
          experts as `jmoe.models.experts` has them. Whole experts lie in memory as they are stored: a transposed view.

        Raises:
          ValueError: as `read`, or an expert id that the model does not have.
        """
        pieces = self._expert_pieces(path)
        for expert in expert_ids:
            if not 0 <= expert < len(pieces):
                raise ValueError(f"{path}: expected expert ids of 0 to {len(pieces) - 1}, got {expert}")
        return self._stack(path, expert_ids, _resolve(path, pieces[0].shape, index))

    def close(self) -> None:
        """Unmaps the files, whose pages count as this process's memory, and lets idle memory go; one may read again."""
        self.files.close()
        self._buffers.forget()

    def _read_whole(self, pieces: Sequence[Piece], index: Index, dtype: np.dtype) -> np.ndarray | None:
        """`[pieces, ...]`, read as it is stored and turned by strides alone; None if something is cut or cast."""
        first = pieces[0] if pieces else None
        if first is None or index != tuple(slice(0, size) for size in first.shape):
            return None
        for piece in pieces:
            is_whole = piece.region() == tuple(slice(0, size) for size in piece.stored)
            if not (is_whole and piece.stored == first.stored and piece.name in self.files):
                return None
            if not self._raw.holds(self.files.file_of(piece.name), piece.name, piece.stored, dtype):
                return None
        stored = self._buffers.empty((len(pieces), *first.stored), dtype)
        self._raw.read_into([(self.files.file_of(piece.name), piece.name) for piece in pieces], stored)
        return stored.reshape(len(pieces), *first.view).transpose(0, *(axis + 1 for axis in first.order))

    def _expert_pieces(self, path: str) -> tuple[Piece, ...]:
        if path not in self._experts:
            raise ValueError(f"expected a parameter of the expert half, got {path!r}")
        return self._experts[path]

    def _stack(self, path: str, expert_ids: Sequence[int], index: Index) -> np.ndarray:
        pieces = self._experts[path]
        dtype = pieces[0].numpy_dtype(self.config.dtype)
        if (whole := self._read_whole([pieces[expert] for expert in expert_ids], index, dtype)) is not None:
            return whole
        # Filled expert by expert: the peak is the result plus one expert's slice.
        stacked = self._buffers.empty((len(expert_ids), *(s.stop - s.start for s in index)), dtype)
        for row, expert in enumerate(expert_ids):
            stacked[row] = pieces[expert].read(self._expert_files, index)
        return stacked


def _resolve(path: str, shape: tuple[int, ...], index: Index | None) -> Index:
    """Replaces None bounds and checks the rest; no clipping and no steps."""
    index = index or (slice(None),) * len(shape)
    if len(index) != len(shape):
        raise ValueError(f"{path}: expected {len(shape)} slices (shape {shape}), got {len(index)}")
    resolved = []
    for part, size in zip(index, shape, strict=True):
        start, stop = part.start or 0, size if part.stop is None else part.stop
        if part.step not in (None, 1) or not 0 <= start <= stop <= size:
            raise ValueError(f"{path}: expected slices of step 1 inside shape {shape}, got {index}")
        resolved.append(slice(int(start), int(stop)))
    return tuple(resolved)
