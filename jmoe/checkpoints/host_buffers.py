"""HostBuffers: memory for arrays that come and go, used again rather than asked of the kernel anew.

Fresh pages cost more than the bytes that are read into them: arrays of 400 MB came out of the page cache at 1.8 to 2.4
GB/s into new memory and at 4.3 to 4.9 GB/s into memory used before (four threads, two busy cores of a virtual machine).
So a start may ask for its pages while it has nothing to read yet.
"""

import ctypes
import math
import mmap
import threading
import weakref
from typing import Protocol

import numpy as np

SMALLEST = 16 << 20  # bytes: less is not worth keeping
MOST_IDLE = 4  # buffers: as many as arrays are under way at once


class Pins(Protocol):
    """Makes memory such that devices can read it by themselves: `jmoe.pinned_memory.PinnedMemory`."""

    def pin(self, memory: mmap.mmap) -> None: ...

    def unpin(self, memory: mmap.mmap) -> None: ...


class HostBuffers:
    """Makes uninitialised arrays whose memory returns here when the last view of them is gone.

    Attributes:
      pins: is told of memory before it is used, and before it is given back; None for nobody.
    """

    def __init__(self):
        self.pins: Pins | None = None
        self._idle: list[mmap.mmap] = []
        self._lock = threading.Lock()

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array as `numpy.empty` makes it, C contiguous."""
        size = math.prod(shape) * dtype.itemsize
        if size < SMALLEST:
            return np.empty(shape, dtype)
        memory = self._take(size)
        # Every view of it, however made, keeps this array alive: the memory behind it is no array's.
        array = np.frombuffer(memory, np.uint8, size)
        weakref.finalize(array, self._idle.append, memory).atexit = False
        return array.view(dtype).reshape(shape)

    def prepare(self, num_bytes: int, count: int = MOST_IDLE) -> None:
        """Makes that many buffers with all their pages; each in a thread of its own, which this doesn't wait for."""
        for _ in range(count if num_bytes >= SMALLEST else 0):
            args = num_bytes, self._idle
            threading.Thread(target=_make, args=args, name="host pages", daemon=True).start()

    def forget(self) -> None:
        """Gives back what is idle, and keeps nothing of what is still in use or being made."""
        with self._lock:
            self._forget(len(self._idle))
            self._idle = []  # what comes later comes to the list that was

    def _take(self, size: int) -> mmap.mmap:
        with self._lock:  # others only append, at any moment
            # A CPU array may be this memory itself, for ever: there no buffer is larger than what it is for.
            most = size if self.pins is None else math.inf
            fitting = [(len(memory), i) for i, memory in enumerate(self._idle) if size <= len(memory) <= most]
            memory = self._idle.pop(min(fitting)[1]) if fitting else None
            self._forget(len(self._idle) - MOST_IDLE)
        if memory is None:
            memory = _mapped(size)
        if self.pins is not None:
            self.pins.pin(memory)
        return memory

    def _forget(self, count: int) -> None:
        for _ in range(count):
            memory = self._idle.pop(0)
            if self.pins is not None:
                self.pins.unpin(memory)


def _make(size: int, idle: list[mmap.mmap]) -> None:
    memory = _mapped(size)
    ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(memory)), 0, size)  # leaves the interpreter's lock
    idle.append(memory)


def _mapped(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
