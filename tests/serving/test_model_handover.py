"""A live model in a folder that lives as long as its context, and no longer than its process."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from jmoe.checkpoints.hf_names import name_maps
from jmoe.checkpoints.load import CheckpointReader
from jmoe.config import ModelConfig
from jmoe.serving import model_handover
from jmoe.serving.model_handover import handed_over, remove_left_over

CONFIG = ModelConfig("mixtral", 31, 24, 2, 3, 3, 8, 6, 3, 16, dtype="float32", max_position=64)


class NumpyModel:
    """The two halves as plain arrays: all that a handover asks for."""

    def __init__(self):
        attention, experts = name_maps(CONFIG)
        rng = np.random.default_rng(0)
        self.config = CONFIG
        self.halves = (
            {path: rng.normal(size=piece.shape).astype(np.float32) for path, piece in attention.items()},
            {
                path: rng.normal(size=(len(pieces), *pieces[0].shape)).astype(np.float32)
                for path, pieces in experts.items()
            },
        )

    def arrays_by_path(self):
        return self.halves


@pytest.fixture
def roots(monkeypatch, tmp_path):
    """Stands for /dev/shm and the temporary folder."""
    shared, temporary = tmp_path / "shm", tmp_path / "tmp"
    shared.mkdir()
    temporary.mkdir()
    monkeypatch.setattr(model_handover, "_SHARED_MEMORY", shared)
    monkeypatch.setattr(model_handover.tempfile, "gettempdir", lambda: str(temporary))
    return shared, temporary


def test_both_halves_arrive_bit_for_bit_and_the_folder_goes(roots):
    model = NumpyModel()
    with handed_over(model) as folder:
        assert folder.parent == roots[0]
        assert folder.stat().st_mode & 0o077 == 0, "no other user may read the weights"
        reader = CheckpointReader(folder, CONFIG)
        for role, half in zip(("attention", "expert"), model.halves, strict=True):
            for path, array in half.items():
                np.testing.assert_array_equal(reader.read(role, path), array)
        reader.files.close()
        weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        split = {file: {".experts." in n for n, f in weight_map.items() if f == file} for file in weight_map.values()}
        assert sorted(map(list, split.values())) == [[False], [True]], "each shard holds one role"
    assert list(roots[0].iterdir()) == []


def test_the_folder_goes_when_loading_fails(roots):
    with pytest.raises(RuntimeError, match="load failed"), handed_over(NumpyModel()):
        raise RuntimeError("load failed")
    assert list(roots[0].iterdir()) == []


def test_without_room_in_shared_memory_the_temporary_folder_takes_it(roots, monkeypatch):
    free = {roots[0]: 1000, roots[1]: 10**12}
    monkeypatch.setattr(model_handover.shutil, "disk_usage", lambda root: type("U", (), {"free": free[root]}))
    with handed_over(NumpyModel()) as folder:
        assert folder.parent == roots[1]
    free[roots[1]] = 1000
    with pytest.raises(OSError, match=r"expected room for 0.0 GiB, got .*shm has 0.0, .*tmp has 0.0"):
        handed_over(NumpyModel()).__enter__()
    assert list(roots[0].iterdir()) == list(roots[1].iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_a_live_one_keeps_its_own(roots):
    script = (
        "import os, pathlib, signal, sys\n"
        "from jmoe.serving import model_handover as h\n"
        "folder = h._new_folder([pathlib.Path(sys.argv[1])], 1)\n"
        "(folder / 'weights').write_text('x')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(roots[0])], timeout=60, check=False)
    (left_over,) = roots[0].iterdir()
    mine = model_handover._new_folder([roots[0]], 1)
    pid_used_again = roots[0] / f"jmoe-handover-{os.getpid()}.1-abc"
    unrelated = roots[0] / "jmoe-handover-notes"
    pid_used_again.mkdir()
    unrelated.mkdir()
    remove_left_over(roots[0])
    assert sorted(roots[0].iterdir()) == sorted([mine, unrelated])
    assert not left_over.exists()


def test_no_jax_is_needed():
    script = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['jax', 'jaxlib', 'flax', 'orbax']))\n"
        f"sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})\n"
        "from test_model_handover import NumpyModel, handed_over\n"
        "with handed_over(NumpyModel()) as folder: print(len(list(folder.iterdir())))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 3
