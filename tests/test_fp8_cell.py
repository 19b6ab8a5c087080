"""Float8 experts and float8 KV pages in whole cells: greedy tokens against the reference, across meshes."""

import dataclasses

import jax
import numpy as np
import pytest
from cell_driver import generate
from small_models import EVEN, random_model, random_prompts, reference_logits, reference_tokens

from jmoe.cell_config import CellConfig
from jmoe.cell_runtime import CellRuntime
from jmoe.sharding.mesh_config import MeshConfig
from jmoe.sharding.placement import ExpertPlacement

# Two blocks of 128 columns in the experts' width and in the hidden size; two layers, so that one hears the other.
FP8 = dataclasses.replace(
    EVEN, hidden_size=256, expert_ffn_size=256, num_layers=2, dense_layers=(), dense_ffn_size=0, expert_dtype="fp8"
)
MAX_TOKENS, PROMPTS = 6, random_prompts(FP8, (5, 11, 3))
MESHES = {
    "2x2": MeshConfig(2, 2, 1),
    "tensor 2 on both, replicas": MeshConfig(
        1, 2, 1, attention_tensor=2, expert_tensor=2, placement=ExpertPlacement(((5, 0, 3, 1), (1, 4, 2)))
    ),
}


def tokens_of(config, mesh, model=None, **sizes):
    lanes = mesh.attention * mesh.num_micro_batches
    sizes = {"chunk_len": 8, "num_steps": 4, "page_len": 4, "num_pages": 120, "max_len": 64} | sizes
    cell = CellConfig(config, mesh.resolve(config.num_experts), rows=-(-len(PROMPTS) // lanes), **sizes)
    runtime = CellRuntime(cell, jax.devices(), "inline")
    runtime.load(model or random_model(config), lambda _: None)
    said = runtime.compile(("prefill", False), ("decode", False))
    assert said.endswith("; kernels: expert_ffn xla, paged_attention xla")
    return generate(runtime.run, cell, PROMPTS, MAX_TOKENS)[0]


@pytest.mark.parametrize("name", MESHES)
def test_tokens_of_float8_experts_equal_the_reference(name):
    assert tokens_of(FP8, MESHES[name]) == reference_tokens(FP8, PROMPTS, MAX_TOKENS)


def test_the_reference_is_finite_and_its_experts_are_heard():
    logits = reference_logits(FP8, PROMPTS[0])
    assert np.isfinite(logits).all()
    plain = dataclasses.replace(FP8, expert_dtype="model")
    assert reference_tokens(FP8, PROMPTS, MAX_TOKENS) != reference_tokens(plain, PROMPTS, MAX_TOKENS)


def test_float8_pages_hold_float8_and_give_the_same_tokens_on_two_meshes():
    config = dataclasses.replace(EVEN, num_layers=1, dense_layers=(), dense_ffn_size=0)
    one = tokens_of(config, MeshConfig(1, 1, 1), kv_dtype="fp8")
    assert one == tokens_of(config, MeshConfig(1, 2, 1, attention_tensor=2), kv_dtype="fp8")
    cell = CellConfig(EVEN, MeshConfig(1, 1).resolve(6), max_len=16, num_pages=20, kv_dtype="fp8")
    runtime = CellRuntime(cell, jax.devices(), "inline")
    assert runtime._abstract.page_dtype.name == "float8_e4m3fn"


def test_tensor_shares_that_cut_a_block_are_refused():
    mesh = MeshConfig(1, 1, 1, expert_tensor=4)
    with pytest.raises(ValueError, match=r"expert_tensor: layers.0.gate_proj: .* whole blocks of 128, got 64 \(256"):
        tokens_of(FP8, mesh)


def test_unknown_choices_are_refused():
    for field, known in (("kv_dtype", "auto, fp8"), ("kernels", "auto, xla, pallas")):
        with pytest.raises(ValueError, match=f"CellConfig.{field}: expected one of {known}, got 'int4'"):
            CellConfig(EVEN, MeshConfig().resolve(6), max_len=16, num_pages=20, **{field: "int4"})
