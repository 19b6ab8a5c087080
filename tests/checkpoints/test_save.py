"""save_hf: byte for byte the tensors that transformers wrote, in shards of one role each."""

import dataclasses
import json
import pathlib

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from jmoe.checkpoints.load import CheckpointReader
from jmoe.checkpoints.save import save_hf

GOLDENS = pathlib.Path(__file__).parent.parent / "goldens"
CASES = ("mixtral_window", "mixtral_tied", "qwen3_moe_mlp_only", "qwen3_moe_sparse_step", "dbrx")


def halves(reader):
    return tuple({path: reader.read(role, path) for path in reader.shapes(role)} for role in ("attention", "expert"))


def tensors_of(folder) -> dict[str, np.ndarray]:
    tensors = {}
    for file in folder.glob("model*.safetensors"):
        tensors |= load_file(file)
    return tensors


@pytest.mark.parametrize("name", CASES)
def test_same_names_and_values_as_transformers_wrote(name, tmp_path):
    reader = CheckpointReader(GOLDENS / name)
    save_hf(tmp_path, reader.config, *halves(reader), max_shard_bytes=90_000)
    theirs, ours = tensors_of(GOLDENS / name), tensors_of(tmp_path)
    assert ours.keys() == theirs.keys()
    for tensor in theirs:
        np.testing.assert_array_equal(ours[tensor], theirs[tensor], err_msg=tensor)
    assert CheckpointReader(tmp_path).config == reader.config


def test_a_shard_a_role_when_all_fits(tmp_path):
    reader = CheckpointReader(GOLDENS / "dbrx")
    (tmp_path / "model.safetensors").write_bytes(b"an older one, which transformers would read first")
    save_hf(tmp_path, reader.config, *halves(reader))
    held = [set(load_file(file)) for file in sorted(tmp_path.glob("*.safetensors"))]
    assert len(held) == 2
    assert not any("experts" in name for name in held[0])
    assert all("experts" in name for name in held[1])


def test_shards_stay_small(tmp_path):
    reader = CheckpointReader(GOLDENS / "dbrx")
    save_hf(tmp_path, reader.config, *halves(reader), max_shard_bytes=60_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(tmp_path).values())
    for file in tmp_path.glob("*.safetensors"):
        tensors = load_file(file)
        assert sum(t.nbytes for t in tensors.values()) <= 60_000
        assert all(index["weight_map"][name] == file.name for name in tensors)


def test_bfloat16_and_a_second_save_over_the_first(tmp_path):
    reader = CheckpointReader(GOLDENS / "mixtral_tied")
    attention, experts = halves(reader)
    save_hf(tmp_path, reader.config, attention, experts, max_shard_bytes=50_000)
    save_hf(tmp_path, dataclasses.replace(reader.config, dtype="bfloat16"), attention, experts)
    again = CheckpointReader(tmp_path)
    assert again.config.dtype == "bfloat16"
    got = again.read("expert", "layers.2.up_proj")
    np.testing.assert_array_equal(got, experts["layers.2.up_proj"].astype(ml_dtypes.bfloat16))


def test_refusals(tmp_path):
    reader = CheckpointReader(GOLDENS / "mixtral_tied")
    attention, experts = halves(reader)
    without = {path: array for path, array in attention.items() if path != "layers.1.router"}
    with pytest.raises(ValueError, match=r"layers\.1\.router, got no such"):
        save_hf(tmp_path, reader.config, without, experts)
    with pytest.raises(ValueError, match="which the config does not have"):
        save_hf(tmp_path, reader.config, attention, experts | {"layers.7.up_proj": np.zeros(1)})
    with pytest.raises(ValueError, match=r"final_norm: expected shape \(48,\), got \(47,\)"):
        save_hf(tmp_path, reader.config, attention | {"final_norm": np.zeros(47)}, experts)
    assert not list(tmp_path.iterdir())
