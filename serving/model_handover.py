"""A live model for workers in other processes: role-split safetensors in shared memory, removed afterwards.

The folder is an ordinary Hugging Face checkpoint whose shards hold one role each, so a worker reads it as any other
and touches its own role's files only. No JAX here: the arrays are only converted by numpy.
"""

import contextlib
import math
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from jmoe.config import ModelConfig

_PREFIX = "jmoe-handover-"
_SHARED_MEMORY = pathlib.Path("/dev/shm")
_HEADROOM = 1.05  # safetensors headers, config.json, what else is written meanwhile


class LiveModel(Protocol):
    """What a handover needs of a model (`jmoe.models.model.Model` is one)."""

    config: ModelConfig

    def arrays_by_path(self) -> tuple[Mapping[str, Any], Mapping[str, Any]]: ...


@contextlib.contextmanager
def handed_over(model: LiveModel) -> Iterator[pathlib.Path]:
    """A checkpoint folder that exists while the context does.

    Args:
      model: its weights are written in `model.config.dtype`.

    Yields:
      The folder: in shared memory where that has room, else in the temporary folder.

    Raises:
      OSError: neither has room, with the figures.
    """
    from jmoe.checkpoints.save import save_hf

    attention, experts = model.arrays_by_path()
    itemsize = 4 if model.config.dtype == "float32" else 2
    num_bytes = itemsize * sum(math.prod(a.shape) for half in (attention, experts) for a in half.values())
    roots = [root for root in (_SHARED_MEMORY, pathlib.Path(tempfile.gettempdir())) if root.is_dir()]
    for root in roots:
        remove_left_over(root)
    folder = _new_folder(roots, num_bytes)
    try:
        save_hf(folder, model.config, attention, experts)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_left_over(root: pathlib.Path) -> None:
    """Removes this user's handovers whose process is gone: one that was killed could not remove its own."""
    for folder in root.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError, ValueError):
            owner = folder.name.removeprefix(_PREFIX).rpartition("-")[0]
            pid = int(owner.partition(".")[0])
            if folder.stat().st_uid == os.getuid() and _process_mark(pid) != owner:
                shutil.rmtree(folder, ignore_errors=True)


def _new_folder(roots: list[pathlib.Path], num_bytes: int) -> pathlib.Path:
    """A private folder in the first place with room; its name says which process it belongs to."""
    free = {root: shutil.disk_usage(root).free for root in roots}
    for root in roots:
        if free[root] >= num_bytes * _HEADROOM:
            return pathlib.Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{_process_mark(os.getpid())}-", dir=root))
    places = ", ".join(f"{root} has {size / 2**30:.1f}" for root, size in free.items())
    raise OSError(f"model handover: expected room for {num_bytes / 2**30:.1f} GiB, got {places}")


def _process_mark(pid: int) -> str | None:
    """'pid.start-time' of a running process, so that a pid used again is not taken for it; None if there is none."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # another user's, but it runs
    try:
        started = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        started = "0"  # no /proc here
    return f"{pid}.{started}"
