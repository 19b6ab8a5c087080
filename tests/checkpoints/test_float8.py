"""Block-scaled float8 checkpoints: read bit for bit, dequantised, quantised on load, saved, and refused."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jmoe.checkpoints.hf_config import hf_config
from jmoe.checkpoints.load import CheckpointReader
from jmoe.checkpoints.orbax_io import restore_orbax, role_mesh, save_orbax
from jmoe.checkpoints.quantized_experts import QuantizedExperts
from jmoe.checkpoints.random_weights import RandomWeights
from jmoe.checkpoints.save import save_hf
from jmoe.config import ModelConfig
from jmoe.models.model import array_specs
from jmoe.sharding.mesh_config import MeshConfig
from jmoe.weights_source import weights_source

CONFIG = ModelConfig(
    family="qwen3_moe", vocab_size=40, hidden_size=160, num_layers=1, num_heads=8, num_kv_heads=2, head_dim=20,
    num_experts=3, num_experts_per_tok=2, expert_ffn_size=256, qk_norm=True, dtype="float32", expert_dtype="fp8",
)  # fmt: skip
PLAIN = dataclasses.replace(CONFIG, expert_dtype="model")
EXPERT = "model.layers.0.mlp.experts.1.down_proj.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"


def blocks(weights):
    """Values and scales of `[out, in]` in numpy."""
    values = np.zeros(weights.shape, ml_dtypes.float8_e4m3fn)
    scales = np.zeros([-(-n // 128) for n in weights.shape], np.float32)
    for i, j in np.ndindex(*scales.shape):
        at = np.s_[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
        scales[i, j] = np.abs(weights[at]).max() * np.float32(1 / 448)
        values[at] = weights[at] * (1 / scales[i, j])
    return values, scales


def wide(values, scales):
    rows, columns = values.shape
    return values.astype(np.float32) * np.repeat(np.repeat(scales, 128, 0)[:rows], 128, 1)[:, :columns]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A checkpoint without float8, and its tensors."""
    folder = tmp_path_factory.mktemp("plain")
    halves = array_specs(PLAIN)
    rng = np.random.default_rng(0)
    save_hf(folder, PLAIN, *({p: rng.normal(size=s.shape).astype(np.float32) for p, s in h.items()} for h in halves))
    files = CheckpointReader(folder).files
    return folder, {name: files.read(name, ()) for name in files._file_of}


@pytest.fixture(scope="module")
def scaled(tmp_path_factory, plain):
    """The same, experts and attention projections in float8, as Qwen3's FP8 releases: scales in bfloat16."""
    folder, tensors = tmp_path_factory.mktemp("scaled"), {}
    for name, tensor in plain[1].items():
        tensors[name] = tensor
        if "_proj" in name:
            values, scales = blocks(tensor)
            scales = scales.astype(ml_dtypes.bfloat16)
            tensors |= {name: values, name + "_scale_inv": scales}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(hf_config(CONFIG)))
    return folder, tensors


def test_experts_stay_float8_and_attention_is_dequantised(scaled):
    folder, tensors = scaled
    reader = weights_source(folder, ModelConfig.from_hf(folder))
    values, scales = tensors[EXPERT], tensors[EXPERT + "_scale_inv"].astype(np.float32)
    got = reader.read_experts("layers.0.down_proj", [2, 1], (slice(None), slice(128, 256)))
    assert got.dtype == ml_dtypes.float8_e4m3fn
    np.testing.assert_array_equal(got[1].astype(np.float32), values[:, 128:].astype(np.float32))
    held = reader.read_experts("layers.0.down_scales", [2, 1], (slice(None), slice(1, 2)))
    assert held.dtype == np.float32
    np.testing.assert_array_equal(held[1], scales[:, 1:])
    query = wide(tensors[QUERY], tensors[QUERY + "_scale_inv"].astype(np.float32))
    np.testing.assert_array_equal(reader.read("attention", "layers.0.q_proj")[:, 5], query[5 * 20 : 6 * 20].T)
    router = reader.read("attention", "layers.0.router")
    np.testing.assert_array_equal(router, tensors["model.layers.0.mlp.gate.weight"].T)
    whole = weights_source(folder, PLAIN).read_experts("layers.0.down_proj", [1])
    np.testing.assert_array_equal(whole[0], wide(values, scales).T)


def test_experts_are_quantised_on_load(plain):
    folder, tensors = plain
    source = weights_source(folder, CONFIG)
    assert isinstance(source, QuantizedExperts)
    want, scales = blocks(tensors[EXPERT])
    index = (slice(None), slice(128, 256))
    values = source.read_experts("layers.0.down_proj", [0, 1], index)
    np.testing.assert_array_equal(values[1].astype(np.float32), want[:, 128:].astype(np.float32))
    np.testing.assert_array_equal(
        source.read_experts("layers.0.down_scales", [0, 1], (slice(None), slice(1, 2)))[1], scales[:, 1:]
    )
    with pytest.raises(ValueError, match=r"to be read before layers.0.up_scales"):
        source.read_experts("layers.0.up_scales", [0, 1])


def test_saved_and_read_back_in_both_forms(tmp_path):
    source = RandomWeights(CONFIG, 0)
    halves = [
        {p: source.read(r, p) for p in specs}
        for r, specs in zip(("attention", "expert"), array_specs(CONFIG), strict=True)
    ]
    assert np.isfinite(halves[1]["layers.0.up_proj"].astype(np.float32)).all()
    save_hf(tmp_path / "hf", CONFIG, *halves)
    reader = CheckpointReader(tmp_path / "hf")
    assert reader.config == CONFIG
    save_orbax(tmp_path / "orbax", CONFIG, *(jax.tree.map(jax.numpy.asarray, half) for half in halves))
    meshes = [role_mesh(MeshConfig(1, 1).resolve(3), jax.devices(), role) for role in ("attention", "expert")]
    restored = restore_orbax(tmp_path / "orbax", attention=meshes[0], experts=meshes[1])
    for path, array in halves[1].items():
        for got in (reader.read("expert", path), np.asarray(restored.experts[path])):
            assert got.dtype == array.dtype
            np.testing.assert_array_equal(got.view(np.uint8), np.ascontiguousarray(array).view(np.uint8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "awq"}, "quant_method: expected 'fp8' .* got 'awq'"),
        ({"weight_block_size": None}, r"weight_block_size: expected \[128, 128\] .* got None"),
        ({"weight_block_size": [64, 64]}, r"weight_block_size: expected .* got \[64, 64\]"),
        ({"activation_scheme": "static"}, "activation_scheme: expected 'dynamic' .* got 'static'"),
    ],
)
def test_other_quantisations_are_refused(change, message):
    config = hf_config(CONFIG)
    config["quantization_config"] = config["quantization_config"] | change
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(config)


def test_tensors_that_do_not_fit_are_refused(tmp_path, scaled):
    folder, tensors = scaled
    config = ModelConfig.from_hf(folder)
    for name, wrong, message in (
        (EXPERT + "_scale_inv", np.ones((1, 2), np.float32), r"expected shape \(2, 2\), got \(1, 2\)"),
        (EXPERT, np.ones((160, 256), np.float32), "expected float8_e4m3fn, got float32"),
    ):
        save_file(tensors | {name: wrong}, tmp_path / "model.safetensors")
        reader = CheckpointReader(tmp_path, config)
        with pytest.raises(ValueError, match=message):
            for path in ("layers.0.down_proj", "layers.0.down_scales"):
                reader.read_experts(path, [1])
