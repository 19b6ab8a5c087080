"""TensorFiles: lazy slices, and clear refusals of folders that are not what they say."""

import json
import pathlib

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jmoe.checkpoints.safetensors_reader import MAX_OPEN, TensorFiles

A = np.arange(24, dtype=np.float32).reshape(4, 6)
B = (np.arange(5) / 4).astype(ml_dtypes.bfloat16)


def sharded(folder, files=("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")):
    save_file({"a": A}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": B}, folder / "model-00002-of-00002.safetensors")
    index = {"weight_map": dict(zip("ab", files, strict=True))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_single_file_and_slices(tmp_path):
    save_file({"a": A, "b": B}, tmp_path / "model.safetensors")
    files = TensorFiles(tmp_path)
    assert "a" in files
    assert "c" not in files
    assert files.shape("a") == (4, 6)
    np.testing.assert_array_equal(files.read("a", (slice(1, 3), slice(2, 5))), A[1:3, 2:5])
    assert files.read("b", (slice(None),)).dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(files.read("b", (slice(1, 3),)), B[1:3])


def test_shards_open_only_when_read(tmp_path):
    files = TensorFiles(sharded(tmp_path))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    np.testing.assert_array_equal(files.read("a", (slice(None), slice(None))), A)
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002"):
        files.read("b", (slice(None),))
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002"):
        files.open_all()


def test_few_files_are_open_at_once(tmp_path):
    weight_map = {f"t{n}": f"model-{n}.safetensors" for n in range(9)}
    for n, (name, file) in enumerate(weight_map.items()):
        save_file({name: A + n}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    files = TensorFiles(tmp_path)
    for n in (0, 1, 0, 2, 3, 4, 5, 6, 7, 8, 0):
        np.testing.assert_array_equal(files.read(f"t{n}", (slice(None), slice(None))), A + n)
        mapped = pathlib.Path("/proc/self/maps")
        if mapped.exists():
            assert len({file for file in weight_map.values() if file in mapped.read_text()}) <= MAX_OPEN


def test_reads_again_after_close(tmp_path):
    files = TensorFiles(sharded(tmp_path))
    first = files.read("a", (slice(None), slice(None)))
    files.close()
    np.testing.assert_array_equal(first, A)  # a copy, not a view of the mapping
    np.testing.assert_array_equal(files.read("a", (slice(None), slice(None))), A)


@pytest.mark.parametrize(
    "file", ["../model-00001-of-00002.safetensors", "/x.safetensors", "C:\\x.safetensors", "a/b.safetensors", "x", 3]
)
def test_index_can_not_leave_its_folder(tmp_path, file):
    with pytest.raises(ValueError, match="expected a bare"):
        TensorFiles(sharded(tmp_path, (file, "model-00002-of-00002.safetensors")))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": ["a"]}'])
def test_broken_index(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="expected JSON with a weight_map"):
        TensorFiles(tmp_path)


HEADER = (2).to_bytes(8, "little")


@pytest.mark.parametrize("content", [b"", b"abc", (1 << 62).to_bytes(8, "little") + b"{}", HEADER + b"{}x"])
def test_broken_file(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="expected a safetensors file"):
        TensorFiles(tmp_path)


def test_truncated_file(tmp_path):
    save_file({"a": A}, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="expected a safetensors file"):
        TensorFiles(tmp_path)


def test_missing_folder_and_tensor(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        TensorFiles(tmp_path)
    save_file({"a": A}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="expected a tensor named c, got none"):
        TensorFiles(tmp_path).shape("c")
    with pytest.raises(ValueError, match="reading a"):
        TensorFiles(tmp_path).read("a", (slice(0, 9), slice(0, 1)))


def test_index_that_names_the_wrong_shard(tmp_path):
    files = TensorFiles(sharded(tmp_path, ("model-00002-of-00002.safetensors",) * 2))
    with pytest.raises(ValueError, match="expected a tensor named a"):
        files.read("a", (slice(None), slice(None)))
