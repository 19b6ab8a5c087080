"""RawTensors: whole tensors of safetensors files straight into memory, by several threads at once.

`safetensors` maps a file and copies under the interpreter's lock, page fault by page fault: one core's speed. A plain
read leaves the lock, and several at once are what a disk wants.
"""

import json
import os
import pathlib
import struct
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

DTYPES = {"BF16": "bfloat16", "F32": "float32", "F16": "float16", "F8_E4M3": "float8_e4m3fn"}
MAX_THREADS = 16
CHUNK = 16 << 20  # bytes that one thread reads of a tensor before another may: a table of 600 MB is one tensor
MAX_HEADER_BYTES = 100 << 20  # what the format allows


class RawTensors:
    """Reads whole tensors of the files of one checkpoint folder."""

    def __init__(self):
        self._num_threads = min(MAX_THREADS, 2 * (os.cpu_count() or 1))
        self._pool = ThreadPoolExecutor(self._num_threads, "read")  # of all arrays under way: no thread before one is
        self._headers: dict[pathlib.Path, tuple[int, dict]] = {}
        self._lock = threading.Lock()

    def holds(self, path: pathlib.Path, name: str, shape: tuple[int, ...], dtype: np.dtype) -> bool:
        """Whether the tensor has this shape and dtype."""
        entry = self._header(path)[1].get(name, {})
        return tuple(entry.get("shape", ())) == shape and DTYPES.get(entry.get("dtype", "")) == dtype.name

    def read_into(self, tensors: Sequence[tuple[pathlib.Path, str]], out: np.ndarray) -> None:
        """Tensor i into out[i], which is contiguous and of its size.

        Raises:
          ValueError: a file that ends too early.
        """
        jobs = []
        for (path, name), row in zip(tensors, out, strict=True):
            into = memoryview(row.reshape(-1).view(np.uint8))
            jobs += [(path, name, start, into[start : start + CHUNK]) for start in range(0, len(into), CHUNK)]
        num_threads = min(self._num_threads, len(jobs))
        if num_threads < 2:  # most of a model's arrays are small: they need no threads of their own
            self._read_all(jobs)
            return
        list(self._pool.map(lambda first: self._read_all(jobs[first::num_threads]), range(num_threads)))

    def _read_all(self, jobs: Sequence[tuple[pathlib.Path, str, int, memoryview]]) -> None:
        """Each from its start within a tensor."""
        for path, name, start, into in jobs:
            begin, header = self._header(path)
            with open(path, "rb", buffering=0) as file:
                file.seek(begin + header[name]["data_offsets"][0] + start)
                while into:
                    count = file.readinto(into)
                    if not count:
                        raise ValueError(f"{path}: expected {len(into)} more bytes of {name}, got the file's end")
                    into = into[count:]

    def _header(self, path: pathlib.Path) -> tuple[int, dict]:
        """Where data begins, and the tensors by name."""
        with self._lock:
            if path not in self._headers:
                with path.open("rb") as file:
                    (length,) = struct.unpack("<Q", file.read(8))
                    if length > MAX_HEADER_BYTES:
                        raise ValueError(f"{path}: expected a header of at most {MAX_HEADER_BYTES} bytes, got {length}")
                    self._headers[path] = 8 + length, json.loads(file.read(length))
            return self._headers[path]
