"""PinnedMemory: host memory that a GPU reads by itself, for as long as weights are placed.

From other memory the driver copies through its own pinned pages: to an H100 8 GB/s for one array of 400 MB at a time
and 28 for eight, where pinned memory gave 50 whatever the number. To pin 400 MB takes 0.02 s, so it must be used again.
"""

import logging
import mmap
import threading
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

logger = logging.getLogger(__name__)


class PinnedMemory:
    """Pins mapped memory for the devices of one process; nothing stays pinned behind the `with`.

    Args:
      devices: of this process. Those that are no GPUs need nothing pinned.
    """

    def __init__(self, devices: Sequence[jax.Device]):
        self._client: Any = devices[0].client if devices and devices[0].platform == "gpu" else None
        self._unmap = None if self._client is None else self._client.dma_unmap
        self._pinned: set[int] = set()
        self._lock = threading.Lock()

    def __enter__(self) -> "PinnedMemory":
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            for address in self._pinned:
                self._unmap(address)  # type: ignore[misc]
            self._pinned.clear()

    def pin(self, memory: mmap.mmap) -> None:
        """Before the memory is read into, as often as one likes; any thread, of one piece of memory one at a time."""
        address = address_of(memory)
        if self._client is None or address in self._pinned:
            return
        try:
            self._client.dma_map(address, len(memory))
        except jax.errors.JaxRuntimeError as error:
            logger.warning("weights are read into memory that is not pinned, which takes longer: %s", error)
            self._client = None
            return
        with self._lock:
            self._pinned.add(address)

    def unpin(self, memory: mmap.mmap) -> None:
        """Before the memory is given back; any thread, and also behind the `with`."""
        address = address_of(memory)
        with self._lock:
            if address in self._pinned:
                self._unmap(address)  # type: ignore[misc]
                self._pinned.remove(address)


def address_of(memory: mmap.mmap) -> int:
    """Where it begins."""
    return np.frombuffer(memory, np.uint8).ctypes.data
