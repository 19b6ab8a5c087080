"""Times measured over a rectangular grid, and what lies between its points. No JAX."""

import dataclasses
import itertools
from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

REACH = 4.0  # how many times past an axis's last point the last segment's slope is trusted


@dataclasses.dataclass(frozen=True)
class Grid:
    """Values over a rectangular grid, linear in between.

    Args:
      axes: name -> increasing coordinates, in the order of the values' dimensions.
      values: seconds, `[len(axis), ...]`, all positive.

    Raises:
      ValueError: an axis that does not increase, or values of another shape or not positive.
    """

    axes: Mapping[str, tuple[float, ...]]
    values: np.ndarray

    def __post_init__(self):
        axes = {name: tuple(float(x) for x in points) for name, points in self.axes.items()}
        values = np.asarray(self.values, np.float64)
        object.__setattr__(self, "axes", axes)
        object.__setattr__(self, "values", values)
        for name, points in axes.items():
            if not points or any(b <= a for a, b in itertools.pairwise(points)) or points[0] < 0:
                raise ValueError(f"Grid.axes {name}: expected increasing numbers of at least 0, got {points}")
        if values.shape != tuple(len(points) for points in axes.values()):
            shape = tuple(len(points) for points in axes.values())
            raise ValueError(f"Grid.values: expected shape {shape} (axes {', '.join(axes)}), got {values.shape}")
        if not np.all(np.isfinite(values) & (values > 0)):
            raise ValueError("Grid.values: expected positive seconds everywhere, got one that is not")

    def at(self, **coordinates: ArrayLike) -> np.ndarray:
        """Interpolates; arrays broadcast.

        Below an axis's first point its value is held (a kernel has a least time). Above the last point the last
        segment goes on up to REACH times as far; beyond, the answer is infinity: nobody has measured that.

        Raises:
          ValueError: coordinates other than the axes.
        """
        if set(coordinates) != set(self.axes):
            raise ValueError(f"Grid.at: expected {', '.join(self.axes)}, got {', '.join(coordinates)}")
        points = np.broadcast_arrays(*(np.asarray(coordinates[name], np.float64) for name in self.axes))
        result = np.zeros(points[0].shape)
        lower, weights, unknown = [], [], np.zeros(points[0].shape, bool)
        for x, axis in zip(points, self.axes.values(), strict=True):
            known = np.asarray(axis)
            if len(axis) == 1:
                unknown |= x != known[0]
                lower.append(np.zeros(x.shape, int))
                weights.append(np.zeros(x.shape))
                continue
            i = np.clip(np.searchsorted(known, x, side="right") - 1, 0, len(axis) - 2)
            lower.append(i)
            weights.append(np.maximum((x - known[i]) / (known[i + 1] - known[i]), 0.0))
            unknown |= x > known[-1] * REACH
        for corner in range(1 << len(points)):
            share, index = np.ones(points[0].shape), []
            for d, (i, w) in enumerate(zip(lower, weights, strict=True)):
                up = corner >> d & 1
                share = share * (w if up else 1 - w)
                index.append(np.minimum(i + up, self.values.shape[d] - 1))
            result += share * self.values[tuple(index)]
        return np.where(unknown, np.inf, result)
