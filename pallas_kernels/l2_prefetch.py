"""Weights that a later kernel reads, asked into L2 by a small one that leaves the memory idle.

A decode layer has some ten kernels of 1 to 3 us that wait for each other and move next to nothing; in 10 us the memory
gives 30 MB. They ask for the first bytes of what comes next: nothing is computed, nothing is returned. Little pays: a
kernel ends when what it asked for is there, so that 24 MB made one of 2 us last 8, and what came next 6 us shorter.
"""

from collections.abc import Sequence

import jax
import numpy as np

from jmoe.pallas_kernels import simt
from jmoe.pallas_kernels.simt import Pointer

CHUNK = 16 * 1024  # bytes of one request
MAX_BYTES = 1 << 20  # of all targets of a kernel together: the router of Qwen3-30B-A3B is half of it


def bytes_of(arrays: Sequence[jax.Array]) -> list[int]:
    """How much of each array is asked for: the first ones whole, then evenly, MAX_BYTES in all, in whole 16 bytes."""
    sizes = [int(np.prod(a.shape)) * a.dtype.itemsize for a in arrays]
    left, wanted = MAX_BYTES, [0] * len(sizes)
    for rank, i in enumerate(sorted(range(len(sizes)), key=sizes.__getitem__)):  # what small ones leave, others take
        wanted[i] = min(sizes[i], left // (len(sizes) - rank)) // 16 * 16
        left -= wanted[i]
    return wanted


def l2_prefetch(targets: Sequence[Pointer], num_bytes: Sequence[int], num_blocks: int) -> None:
    """Inside a kernel of `num_blocks` blocks: each asks for its share, target after target."""
    with simt.when(simt.thread().equals(0)):
        for target, total in zip(targets, num_bytes, strict=True):
            chunks = -(-total // CHUNK)
            for first in range(0, chunks, num_blocks):
                chunk = simt.block() + first
                whole = total // CHUNK
                if first < whole:
                    with simt.when(chunk < whole):
                        target.skip(chunk, CHUNK).prefetch(CHUNK)
                if rest := total % CHUNK:
                    with simt.when(chunk.equals(whole)):
                        target.skip(chunk, CHUNK).prefetch(rest)
