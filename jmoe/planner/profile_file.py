"""Measured stage times: the file that `jmoe profile` writes, and how the planner prices with it. No JAX.

The file is JSON:

    {"format": "jmoe-profile", "version": 1,
     "gpu": "h100",                      the catalogue's kind
     "device": "NVIDIA H100 80GB HBM3",  as the driver names it
     "date": "2026-11-22",
     "versions": {"jax": "0.11.2", ...},
     "model": "qwen3-30b-a3b",
     "precision": {"weight_bytes": 2.0, "kv_bytes": 2.0, "dispatch_bytes": 2.0, "combine_bytes": 2.0},
     "grids": {"attention_s": {"axes": {"tensor": [1], "context": [...], "rows": [...]}, "values": [[[...]]]},
               "expert_s":    {"axes": {"tensor": [1], "num_local_experts": [...], "rows": [...]}, "values": ...},
               "exchange_s":  {"axes": {"num_bytes": [...]}, "values": [...]},
               "head_s":      {"axes": {"tensor": [1], "rows": [...]}, "values": ...}}}    head_s may be left out

Values are seconds, indexed in the order of the axes. attention_s: one layer, rows requests of one replica with context
KV tokens each, everything between two exchanges. expert_s: one layer, rows (token, expert) pairs spread evenly over
num_local_experts. exchange_s: one way, num_bytes out of (or into) the busiest GPU.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from jmoe.planner.measured_grid import Grid
from jmoe.planner.performance import ExchangeModel, Precision, Roofline

FORMAT, VERSION = "jmoe-profile", 1
MAX_PROFILE_BYTES = 64 << 20
AXES = {
    "attention_s": ("tensor", "context", "rows"),
    "expert_s": ("tensor", "num_local_experts", "rows"),
    "exchange_s": ("num_bytes",),
    "head_s": ("tensor", "rows"),
}


@dataclasses.dataclass(frozen=True)
class Profile:
    """A profile file's content; see the module's head for each field.

    Raises:
      ValueError: a grid that is missing, unknown or has other axes.
    """

    gpu: str
    device: str
    date: str
    versions: Mapping[str, str]
    model: str
    precision: Precision
    grids: Mapping[str, Grid]

    def __post_init__(self):
        if missing := {"attention_s", "expert_s", "exchange_s"} - set(self.grids):
            raise ValueError(f"Profile.grids: expected attention_s, expert_s and exchange_s, got none of {missing}")
        for name, grid in self.grids.items():
            if name not in AXES:
                raise ValueError(f"Profile.grids: expected only {', '.join(AXES)}, got {name}")
            if tuple(grid.axes) != AXES[name]:
                raise ValueError(f"Profile.grids {name}: expected the axes {AXES[name]}, got {tuple(grid.axes)}")

    @property
    def tensor_sizes(self) -> tuple[int, ...]:
        """Tensor sizes for which both roles were measured."""
        both = set(self.grids["attention_s"].axes["tensor"]) & set(self.grids["expert_s"].axes["tensor"])
        return tuple(sorted(int(t) for t in both))


@dataclasses.dataclass(frozen=True)
class MeasuredTimes:
    """StageTimes from profiles where a role's GPU kind has one, and the roofline for the rest.

    Args:
      roofline: model, kinds and precision; it prices the head and dense layers that a profile leaves out.
      profiles: by GPU kind.
    """

    roofline: Roofline
    profiles: Mapping[str, Profile]

    def _grid(self, kind: str, name: str) -> Grid | None:
        profile = self.profiles.get(kind)
        return profile.grids.get(name) if profile else None

    def attention_s(self, rows: ArrayLike, context: ArrayLike, tensor: int) -> np.ndarray:
        """See StageTimes."""
        grid = self._grid(self.roofline.attention_gpu.name, "attention_s")
        if grid is None:
            return self.roofline.attention_s(rows, context, tensor)
        return grid.at(tensor=tensor, context=context, rows=rows)

    def expert_s(
        self, rows: ArrayLike, num_local_experts: ArrayLike, tensor: int, tokens: ArrayLike | None = None
    ) -> np.ndarray:
        """See StageTimes; the grid's rows already include their tokens' way inside the node."""
        grid = self._grid(self.roofline.expert_gpu.name, "expert_s")
        if grid is None:
            return self.roofline.expert_s(rows, num_local_experts, tensor, tokens)
        return grid.at(tensor=tensor, num_local_experts=num_local_experts, rows=rows)

    def head_s(self, rows: ArrayLike, tensor: int) -> np.ndarray:
        """See StageTimes."""
        grid = self._grid(self.roofline.attention_gpu.name, "head_s")
        return self.roofline.head_s(rows, tensor) if grid is None else grid.at(tensor=tensor, rows=rows)

    def dense_s(self, rows: ArrayLike, context: ArrayLike, tensor: int) -> np.ndarray:
        """See StageTimes; always the roofline."""
        return self.roofline.dense_s(rows, context, tensor)

    def exchange_s(
        self, exchange: ExchangeModel, rows: ArrayLike, num_replicas: ArrayLike, num_nodes: ArrayLike,
        attention_tensor: int, expert_tensor: int, imbalance: ArrayLike, one_domain: ArrayLike,
    ) -> np.ndarray:  # fmt: skip
        """T_c: measured by bytes inside a scale-up domain, where profiles are taken; over NICs from the model."""
        args = (rows, num_replicas, num_nodes, attention_tensor, expert_tensor, imbalance)
        priced = exchange.exchange_s(*args, one_domain)
        sent, received = exchange.bytes_a_gpu(*args)
        kinds = (self.roofline.attention_gpu.name, self.roofline.expert_gpu.name)
        grids = [self._grid(kind, "exchange_s") for kind in kinds]
        if grids[0] is None or grids[1] is None:
            return priced
        measured = np.maximum(grids[0].at(num_bytes=sent), grids[1].at(num_bytes=received))
        return np.where(one_domain, measured, priced)


def profile_to_json(profile: Profile) -> str:
    """The file's text."""
    grids = {n: {"axes": {a: list(p) for a, p in g.axes.items()}, "values": g.values.tolist()}
             for n, g in profile.grids.items()}  # fmt: skip
    head = {"format": FORMAT, "version": VERSION, "gpu": profile.gpu, "device": profile.device, "date": profile.date}
    rest = {"versions": dict(profile.versions), "model": profile.model}
    return json.dumps(head | rest | {"precision": dataclasses.asdict(profile.precision), "grids": grids}) + "\n"


def profile_from_json(text: str) -> Profile:
    """Parses a profile file's text.

    Raises:
      ValueError: not a profile of this version, or a field is missing or malformed.
    """
    try:
        data = json.loads(text)
        if (data["format"], data["version"]) != (FORMAT, VERSION):
            raise ValueError(
                f"profile file: expected {FORMAT} version {VERSION}, got {data['format']} {data['version']}"
            )
        fields = {name: data[name] for name in ("gpu", "device", "date", "versions", "model")}
        grids = {name: Grid(grid["axes"], np.asarray(grid["values"])) for name, grid in data["grids"].items()}
        return Profile(**fields, precision=Precision(**data["precision"]), grids=grids)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"profile file: expected the fields of {FORMAT} version {VERSION}, got {error!r}") from error


def read_profiles(paths: Sequence[str | pathlib.Path]) -> dict[str, Profile]:
    """Reads profile files, one a GPU kind.

    Raises:
      ValueError: too large, not a profile, or two for one kind.
      FileNotFoundError: no such file.
    """
    profiles: dict[str, Profile] = {}
    for path in map(pathlib.Path, paths):
        if path.stat().st_size > MAX_PROFILE_BYTES:
            raise ValueError(f"--profile {path}: expected at most {MAX_PROFILE_BYTES} bytes, got a larger file")
        profile = profile_from_json(path.read_text())
        if profile.gpu in profiles:
            raise ValueError(f"--profile {path}: expected one profile a GPU kind, got a second for {profile.gpu}")
        profiles[profile.gpu] = profile
    return profiles


def points_to_measure(max_rows: int, max_context: int, max_bytes: int) -> dict[str, list[int]]:
    """Powers of two for the three long axes of a profile: rows from 1, context from 128, bytes from 4 KiB.

    Times are close to piecewise linear with knees where products turn compute-bound, so doubling keeps the error of
    linear interpolation small at both ends.
    """

    def doubling(first: int, last: int) -> list[int]:
        return [first << i for i in range(int(math.log2(max(1, last // first))) + 1)]

    return {
        "rows": doubling(1, max_rows),
        "context": doubling(128, max_context),
        "num_bytes": doubling(4096, max_bytes),
    }


def check_profile(profile: Profile, model: str, precision: Precision) -> None:
    """Refuses a profile of another model or precision.

    Raises:
      ValueError: with both.
    """
    got: tuple[Any, ...] = (profile.model, profile.precision)
    if got != (model, precision):
        raise ValueError(
            f"--profile: expected one of {model} with {precision}, got {profile.model} with {profile.precision}"
        )
