"""TensorFiles: the tensors of a Hugging Face checkpoint folder by name, read lazily and slice by slice."""

import json
import pathlib
import struct
import threading
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_OPEN = 2  # shards mapped at once: pages that were read count as this process's memory until their file is closed


class TensorFiles:
    """The tensors of `model.safetensors`, or of the shards that `model.safetensors.index.json` names.

    Files are memory-mapped when needed, so a read touches the pages of its own slice. Shard names must be bare file
    names: an index file can't point outside its folder.

    Args:
      folder: the checkpoint folder.

    Raises:
      FileNotFoundError: neither file is there, or a shard is missing.
      ValueError: an index or a safetensors file that can't be read, or an unsafe shard name.
    """

    def __init__(self, folder: str | pathlib.Path):
        self.folder = pathlib.Path(folder)
        self._files: dict[pathlib.Path, Any] = {}
        self._headers: dict[pathlib.Path, tuple[int, dict[str, Any]]] = {}
        self._lock = threading.Lock()  # of what is open; reads copy under the interpreter's lock anyhow
        index, single = self.folder / INDEX_FILE, self.folder / SINGLE_FILE
        if index.is_file():
            self._file_of = _read_index(index)
        elif single.is_file():
            self._file_of = dict.fromkeys(self._open(single).keys(), single)
        else:
            raise FileNotFoundError(f"expected {SINGLE_FILE} or {INDEX_FILE} in {self.folder}, got neither")

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def file_of(self, name: str) -> pathlib.Path:
        """Which file a tensor stands in."""
        return self._file_of[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a stored tensor, from the file's header."""
        with self._lock:
            return tuple(self._slice(name).get_shape())

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Reads part of one tensor: one slice of step 1 an axis, in the stored dtype (the short ones as ml_dtypes')."""
        with self._lock:
            stored = self._slice(name)
            if stored.get_dtype() == "F8_E4M3":
                return self._read_float8(name, index)
            try:
                return stored[index] if index else stored[:]
            except safetensors.SafetensorError as error:
                raise ValueError(f"{self._file_of[name]}: reading {name}: {error}") from None

    def _read_float8(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Through a map of our own: safetensors 0.8 asks numpy for this type, which has none."""
        path = self._file_of[name]
        if path not in self._headers:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                self._headers = {path: (8 + length, json.loads(file.read(length)))}  # one: tensors come file by file
        start, header = self._headers[path]
        entry = header[name]
        raw = np.memmap(path, np.uint8, "r", start + entry["data_offsets"][0], tuple(entry["shape"]))
        return np.array(raw[index]).view(ml_dtypes.float8_e4m3fn)

    def open_all(self) -> None:
        """Opens every file once, so that a missing or truncated one is found now."""
        for path in set(self._file_of.values()):
            self._open(path)

    def close(self) -> None:
        """Unmaps the files; the next read maps them again."""
        for handle in self._files.values():
            handle.__exit__(None, None, None)
        self._files.clear()

    def _slice(self, name: str) -> Any:
        if name not in self._file_of:
            raise ValueError(f"{self.folder}: expected a tensor named {name}, got none")
        handle = self._open(self._file_of[name])
        try:
            return handle.get_slice(name)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{self._file_of[name]}: expected a tensor named {name}: {error}") from None

    def _open(self, path: pathlib.Path) -> Any:
        if path in self._files:
            self._files[path] = self._files.pop(path)  # now the latest used
            return self._files[path]
        if not path.is_file():
            raise FileNotFoundError(f"expected the shard {path} that {INDEX_FILE} names, got no such file")
        while len(self._files) >= MAX_OPEN:
            self._files.pop(next(iter(self._files))).__exit__(None, None, None)
        try:
            self._files[path] = safetensors.safe_open(path, "np").__enter__()
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path}: expected a safetensors file: {error}") from None
        return self._files[path]


def _read_index(index: pathlib.Path) -> dict[str, pathlib.Path]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        items = list(weight_map.items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: expected JSON with a weight_map object: {error!r}") from None
    for name, file in items:
        # A separator of either system, a drive or ".." could leave the folder; bare names can't.
        if not isinstance(file, str) or not file.endswith(".safetensors") or set(file) & set("/\\:\0"):
            raise ValueError(f"{index}: expected a bare *.safetensors file name for {name}, got {file!r}")
    return {name: index.parent / file for name, file in items}
