"""RawTensors: the bytes of tensors, however they are cut among threads."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from jmoe.checkpoints import raw_tensors
from jmoe.checkpoints.raw_tensors import RawTensors

TENSORS = {name: np.random.default_rng(i).standard_normal((7, 5), np.float32) for i, name in enumerate("abc")}


@pytest.fixture
def path(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("chunk", [16, 100, 140, 1 << 20])  # bytes; a tensor has 140
def test_tensors_are_read_in_chunks(path, monkeypatch, chunk):
    monkeypatch.setattr(raw_tensors, "CHUNK", chunk)
    sizes, read = [], RawTensors._read_all
    monkeypatch.setattr(RawTensors, "_read_all", lambda s, jobs: sizes.extend(len(j[3]) for j in jobs) or read(s, jobs))
    out = np.zeros((2, 7, 5), np.float32)
    RawTensors().read_into([(path, "c"), (path, "a")], out)
    np.testing.assert_array_equal(out, [TENSORS["c"], TENSORS["a"]])
    assert len(sizes) == 2 * -(-140 // chunk) and sum(sizes) == 280 and max(sizes) <= chunk


def test_one_small_tensor_is_read_without_threads(path, monkeypatch):
    raw = RawTensors()
    monkeypatch.setattr(raw._pool, "map", lambda *args: pytest.fail("started threads"))
    out = np.zeros((1, 7, 5), np.float32)
    raw.read_into([(path, "b")], out)
    np.testing.assert_array_equal(out[0], TENSORS["b"])


def test_a_file_that_ends_early_is_refused(path):
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"expected 8 more bytes of \w, got the file's end"):
        for name in "abc":
            RawTensors().read_into([(path, name)], np.zeros((1, 7, 5), np.float32))
