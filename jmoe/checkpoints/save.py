"""save_hf: a model as a Hugging Face checkpoint folder, with the family's classic tensor names."""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from jmoe.checkpoints.hf_config import hf_config
from jmoe.checkpoints.hf_names import name_maps
from jmoe.checkpoints.layout import AttentionMap, ExpertMap
from jmoe.checkpoints.safetensors_reader import INDEX_FILE, SINGLE_FILE
from jmoe.config import ModelConfig

# Which parts make up each stored tensor: name -> [(role, path, expert)], expert None in the attention half.
_Parts = dict[str, list[tuple[str, str, int | None]]]


def save_hf(
    folder: str | pathlib.Path,
    config: ModelConfig,
    attention: Mapping[str, Any],
    experts: Mapping[str, Any],
    *,
    max_shard_bytes: int = 1 << 30,
) -> None:
    """Writes `config.json` and safetensors shards; a shard holds tensors of one role only.

    Host memory in use at a time: one shard, plus the one parameter being converted.

    Args:
      folder: made if need be; files of the same names are replaced, and a `model.safetensors` is deleted.
      config: the model's facts; its dtype is what is written, and float8 for experts of `expert_dtype` "fp8".
      attention, experts: every parameter by path (`Model.arrays_by_path()`), anything that numpy can convert.
      max_shard_bytes: a shard is closed before it would pass this (a larger tensor gets a shard alone).

    Raises:
      ValueError: a parameter missing, unexpected, or of another shape than `config` says.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    maps = name_maps(config)
    _check(maps, attention, experts)
    writer = _Writer(config, maps, attention, experts)
    (folder / "config.json").write_text(json.dumps(hf_config(config), indent=2) + "\n")
    shards = writer.plan(max_shard_bytes)
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: writer.tensor(name) for name in names}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": writer.total_bytes}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    (folder / SINGLE_FILE).unlink(missing_ok=True)  # transformers would prefer an older one to the index


class _Writer:
    """Builds stored tensors one by one out of our parameters."""

    def __init__(self, config: ModelConfig, maps: tuple[AttentionMap, ExpertMap], attention, experts):
        self.maps, self.params, self.config = maps, (attention, experts), config
        self.parts: _Parts = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        for path, piece in maps[0].items():
            self._add(piece, ("attention", path, None))
        for path, pieces in maps[1].items():
            for expert, piece in enumerate(pieces):
                self._add(piece, ("expert", path, expert))
        self._converted: tuple[str, np.ndarray] = ("", np.empty(0))

    def _add(self, piece, part) -> None:
        self.parts.setdefault(piece.name, []).append(part)
        self.shapes[piece.name] = piece.stored
        self.dtypes[piece.name] = piece.numpy_dtype(self.config.dtype)

    @property
    def total_bytes(self) -> int:
        return sum(self._num_bytes(name) for name in self.shapes)

    def _num_bytes(self, name: str) -> int:
        return math.prod(self.shapes[name]) * self.dtypes[name].itemsize

    def plan(self, max_shard_bytes: int) -> list[list[str]]:
        """Tensor names of each shard, a new one also where the role changes."""
        shards: list[list[str]] = []
        size, last_role = 0, ""
        for name, parts in self.parts.items():
            num_bytes, role = self._num_bytes(name), parts[0][0]
            if not shards or size + num_bytes > max_shard_bytes or role != last_role:
                shards.append([])
                size = 0
            shards[-1].append(name)
            size, last_role = size + num_bytes, role
        return shards

    def tensor(self, name: str) -> np.ndarray:
        """One stored tensor, assembled of its parts."""
        stored = np.empty(self.shapes[name], self.dtypes[name])
        for role, path, expert in self.parts[name]:
            if expert is None:
                self.maps[0][path].write(self._host(role, path, stored.dtype), stored)
            else:
                self.maps[1][path][expert].write(self._host(role, path, stored.dtype)[expert], stored)
        return stored

    def _host(self, role: str, path: str, dtype: np.dtype) -> np.ndarray:
        # A layer's experts come one after another out of one parameter: convert it once.
        key = f"{role}.{path}"
        if self._converted[0] != key:
            self._converted = key, np.asarray(self.params[role == "expert"][path]).astype(dtype, copy=False)
        return self._converted[1]


def _check(maps: tuple[AttentionMap, ExpertMap], attention: Mapping[str, Any], experts: Mapping[str, Any]) -> None:
    shapes = {path: piece.shape for path, piece in maps[0].items()}
    expert_shapes = {path: (len(pieces), *pieces[0].shape) for path, pieces in maps[1].items()}
    for role, expected, got in (("attention", shapes, attention), ("expert", expert_shapes, experts)):
        if missing := expected.keys() - got.keys():
            raise ValueError(f"save_hf: expected the {role} half to have {sorted(missing)[0]}, got no such parameter")
        if extra := got.keys() - expected.keys():
            raise ValueError(f"save_hf: got {sorted(extra)[0]} in the {role} half, which the config does not have")
        for path, shape in expected.items():
            if tuple(got[path].shape) != shape:
                raise ValueError(f"save_hf: {path}: expected shape {shape}, got {tuple(got[path].shape)}")
