"""CheckpointReader: every slice equals the slice of the whole, of every family and layout, and reads its own bytes."""

import dataclasses
import pathlib

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jmoe.checkpoints.load import CheckpointReader
from jmoe.checkpoints.save import save_hf
from jmoe.config import ModelConfig
from jmoe.models.model import array_specs

GOLDENS = pathlib.Path(__file__).parent.parent / "goldens"
FAMILIES = ("mixtral_window", "qwen3_moe_sparse_step", "dbrx")


@pytest.fixture(params=FAMILIES)
def reader(request):
    return CheckpointReader(GOLDENS / request.param)


def stored(reader) -> dict[str, np.ndarray]:
    tensors = {}
    for file in reader.files.folder.glob("model*.safetensors"):
        tensors |= load_file(file)
    return tensors


def half(shape) -> tuple[slice, ...]:
    """The second half of each axis that has one."""
    return tuple(slice(size // 2, size) for size in shape)


def test_paths_and_shapes_are_those_of_the_modules(reader):
    for role, specs in zip(("attention", "expert"), array_specs(reader.config), strict=True):
        assert reader.shapes(role) == {path: spec.shape for path, spec in specs.items()}


def test_every_slice_is_the_slice_of_the_whole(reader):
    for role in ("attention", "expert"):
        for path, shape in reader.shapes(role).items():
            whole = reader.read(role, path)
            assert whole.shape == shape
            as_stored = whole.transpose(np.argsort(whole.strides, kind="stable")[::-1])
            assert as_stored.flags.c_contiguous or whole.flags.c_contiguous, "no gaps, whatever the order of the axes"
            np.testing.assert_array_equal(reader.read(role, path, half(shape)), whole[half(shape)])
            for axis in range(len(shape)):  # one axis cut at a time, as tensor ranks do
                index = [slice(None)] * len(shape)
                index[axis] = slice(1, shape[axis] // 2 + 1)
                np.testing.assert_array_equal(reader.read(role, path, tuple(index)), whole[tuple(index)])


def test_experts_in_the_order_of_a_placement(reader):
    ffn = reader.config.expert_ffn_size
    wide, back = np.s_[:, 5:ffn], np.s_[5:ffn, :]
    for name, cut in (("gate_proj", wide), ("up_proj", wide), ("down_proj", back)):
        whole = reader.read("expert", f"layers.1.{name}")
        np.testing.assert_array_equal(reader.read_experts(f"layers.1.{name}", [4, 0, 3]), whole[[4, 0, 3]])
        cut_here = reader.read_experts(f"layers.1.{name}", (2, 2), cut)
        np.testing.assert_array_equal(cut_here, whole[[2, 2]][(slice(None), *cut)])


def test_mixtral_against_its_files():
    reader = CheckpointReader(GOLDENS / "mixtral_window")
    t, layer = stored(reader), "model.layers.2."
    moe = layer + "block_sparse_moe."
    np.testing.assert_array_equal(reader.read("attention", "layers.2.router"), t[moe + "gate.weight"].T)
    q = t[layer + "self_attn.q_proj.weight"]
    np.testing.assert_array_equal(reader.read("attention", "layers.2.q_proj")[:, 7], q[7 * 16 : 8 * 16].T)
    o = t[layer + "self_attn.o_proj.weight"]
    np.testing.assert_array_equal(reader.read("attention", "layers.2.o_proj")[7], o[:, 7 * 16 : 8 * 16].T)
    for ours, theirs in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
        got = reader.read("expert", f"layers.2.{ours}")[5]
        np.testing.assert_array_equal(got, t[f"{moe}experts.5.{theirs}.weight"].T)


def test_dbrx_against_its_files():
    reader = CheckpointReader(GOLDENS / "dbrx")
    t, block = stored(reader), "transformer.blocks.1."
    fused, head = t[block + "norm_attn_norm.attn.Wqkv.weight"], 8
    np.testing.assert_array_equal(reader.read("attention", "layers.1.k_proj")[:, 1], fused[9 * head : 10 * head].T)
    np.testing.assert_array_equal(reader.read("attention", "layers.1.v_proj")[:, 0], fused[12 * head : 13 * head].T)
    for ours, theirs, order in (("gate_proj", "w1", -1), ("up_proj", "v1", -1), ("down_proj", "w2", 1)):
        rows = t[f"{block}ffn.experts.mlp.{theirs}"][3 * 20 : 4 * 20]
        np.testing.assert_array_equal(reader.read("expert", f"layers.1.{ours}")[3], rows.T if order < 0 else rows)


def test_layers_of_the_expert_half_count_moe_layers():
    reader = CheckpointReader(GOLDENS / "qwen3_moe_sparse_step")
    assert reader.config.moe_layers == (1, 3)
    theirs = stored(reader)["model.layers.3.mlp.experts.2.up_proj.weight"]
    np.testing.assert_array_equal(reader.read("expert", "layers.1.up_proj")[2], theirs.T)


@pytest.mark.parametrize("name", ["mixtral_window", "qwen3_moe_mlp_only"])
def test_fused_layout_reads_the_same(name, tmp_path):
    classic = CheckpointReader(GOLDENS / name)
    config, tensors, fused = classic.config, stored(classic), {}
    for layer in config.moe_layers:
        old = f"model.layers.{layer}." + ("block_sparse_moe." if config.family == "mixtral" else "mlp.")
        gate, up, down = ("w1", "w3", "w2") if config.family == "mixtral" else ("gate_proj", "up_proj", "down_proj")

        def stack(projection, old=old):
            return np.stack([tensors.pop(f"{old}experts.{e}.{projection}.weight") for e in range(6)])

        new = f"model.layers.{layer}.mlp."
        fused[new + "experts.gate_up_proj"] = np.concatenate([stack(gate), stack(up)], axis=1)
        fused[new + "experts.down_proj"] = stack(down)
        fused[new + "gate.weight"] = tensors.pop(old + "gate.weight")
    save_file(tensors | fused, tmp_path / "model.safetensors")
    reader = CheckpointReader(tmp_path, config)
    for role in ("attention", "expert"):
        for path in classic.shapes(role):
            np.testing.assert_array_equal(reader.read(role, path), classic.read(role, path))
    some = reader.read_experts("layers.0.up_proj", [5, 1], np.s_[:, 3:9])
    np.testing.assert_array_equal(some, classic.read("expert", "layers.0.up_proj")[[5, 1], :, 3:9])


def test_only_the_bytes_of_the_slice_are_read(monkeypatch):
    reader, touched = CheckpointReader(GOLDENS / "dbrx"), []
    honest = reader.files.read

    def counting(name, index):
        part = honest(name, index)
        touched.append((name, part.size))
        return part

    monkeypatch.setattr(reader.files, "read", counting)
    reader.read("attention", "layers.0.q_proj", (slice(None), slice(0, 2), slice(None)))
    reader.read_experts("layers.0.gate_proj", [5], np.s_[:, 0:10])
    assert [size for _, size in touched] == [2 * 8 * 64, 10 * 64]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_values_are_cast_to_the_config(dtype, tmp_path):
    source = CheckpointReader(GOLDENS / "mixtral_tied")
    tensors = {name: tensor.astype(dtype) for name, tensor in stored(source).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    for name, ours in (("float32", np.float32), ("bfloat16", ml_dtypes.bfloat16)):
        reader = CheckpointReader(tmp_path, dataclasses.replace(source.config, dtype=name))
        got = reader.read("attention", "embed")
        assert got.dtype == ours
        np.testing.assert_array_equal(got, tensors["model.embed_tokens.weight"].astype(ours))
        assert reader.read_experts("layers.0.down_proj", [1]).dtype == ours


def test_tied_embeddings_have_no_head():
    assert "lm_head" not in CheckpointReader(GOLDENS / "mixtral_tied").shapes("attention")


def test_refusals(reader, tmp_path):
    with pytest.raises(ValueError, match="attention half"):
        reader.read("attention", "layers.9.router")
    with pytest.raises(ValueError, match="expert half"):
        reader.read("expert", "layers.9.gate_proj")
    with pytest.raises(ValueError, match="expert ids of 0 to 5"):
        reader.read_experts("layers.0.gate_proj", [0, 6])
    everything = slice(None)
    for index in ((slice(0, 1),), (everything, slice(0, 999)), (slice(0, 4, 2), everything), (slice(3, 1), everything)):
        with pytest.raises(ValueError, match="expected"):
            reader.read("attention", "embed", index)


def test_missing_and_misshapen_tensors_are_named(tmp_path):
    good = CheckpointReader(GOLDENS / "mixtral_tied")
    tensors = stored(good)
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"expected a tensor named {name}"):
        CheckpointReader(tmp_path, good.config).read("expert", "layers.1.down_proj")
    save_file(tensors | {name: np.zeros((20, 48), np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"w2.weight: expected shape \(48, 20\), got \(20, 48\)"):
        CheckpointReader(tmp_path, good.config).read("expert", "layers.1.down_proj")


def test_config_of_the_folder_is_the_default(tmp_path):
    config = CheckpointReader(GOLDENS / "dbrx").config
    assert config == ModelConfig.from_hf(GOLDENS / "dbrx")
    attention = {p: np.zeros(s.shape, np.float32) for p, s in array_specs(config)[0].items()}
    experts = {p: np.zeros(s.shape, np.float32) for p, s in array_specs(config)[1].items()}
    save_hf(tmp_path, config, attention, experts)
    assert CheckpointReader(tmp_path).config == config
