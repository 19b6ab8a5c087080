"""DequantizedFiles: float8 weights with a scale a block read as float32, everything else as it is stored."""

import numpy as np

from jmoe.checkpoints.layout import BLOCK, SCALES
from jmoe.checkpoints.safetensors_reader import TensorFiles


class DequantizedFiles:
    """A view of a checkpoint's tensors in which `X.weight` is multiplied by `X.weight_scale_inv`, where that is there.

    Args:
      files: the tensors as they are stored.
    """

    def __init__(self, files: TensorFiles):
        self.folder = files.folder
        self._files = files

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a stored tensor."""
        return self._files.shape(name)

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Part of one tensor: float32 where it has scales, else in the stored dtype.

        Raises:
          ValueError: a tensor that is missing, or scales of another shape than one a block of 128x128.
        """
        values = self._files.read(name, index)
        if name + SCALES not in self._files:
            if values.dtype.itemsize == 1:
                raise ValueError(f"{self.folder}: {name}: expected {name}{SCALES} beside {values.dtype}, got none")
            return values
        shape = self.shape(name)
        expected = tuple(-(-size // BLOCK) for size in shape)
        if len(shape) != 2 or self.shape(name + SCALES) != expected:
            raise ValueError(
                f"{self.folder}: {name}{SCALES}: expected shape {expected}, got {self.shape(name + SCALES)}"
            )
        rows, columns = (np.arange(*part.indices(size)) // BLOCK for part, size in zip(index, shape, strict=True))
        scales = self._files.read(name + SCALES, (slice(None), slice(None))).astype(np.float32)
        return values.astype(np.float32) * scales[rows][:, columns]
