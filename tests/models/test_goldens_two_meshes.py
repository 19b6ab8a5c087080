"""The goldens through both meshes: checkpoint files, role by role, to 64 greedy tokens equal to transformers'."""

import pathlib

import jax
import pytest
from cell_driver import generate
from safetensors.numpy import load_file

from jmoe.cell_config import CellConfig
from jmoe.cell_runtime import CellRuntime
from jmoe.checkpoints.load import CheckpointReader
from jmoe.sharding.mesh_config import MeshConfig

GOLDENS = pathlib.Path(__file__).parent.parent / "goldens"
MESHES = {
    "mixtral_window": MeshConfig(1, 4, 2),  # 6 experts over 4 nodes
    "mixtral_tied": MeshConfig(1, 2, 2, attention_tensor=2, expert_tensor=2),
    "qwen3_moe_mlp_only": MeshConfig(2, 3, 1),
    "qwen3_moe_sparse_step": MeshConfig(1, 2, 3, attention_tensor=3),
    "dbrx": MeshConfig(2, 1, 2, attention_tensor=2),
}


@pytest.mark.parametrize("name", MESHES)
def test_64_greedy_tokens(name):
    golden = load_file(GOLDENS / name / "golden.safetensors")
    reader = CheckpointReader(GOLDENS / name)
    mesh = MESHES[name].resolve(reader.config.num_experts)
    cell = CellConfig(reader.config, mesh, rows=1, chunk_len=8, num_steps=8, page_len=8, num_pages=40, max_len=80)
    runtime = CellRuntime(cell, jax.devices(), "inline")
    runtime.load(reader, lambda _: None)
    prompt = golden["prompt"].tolist()
    # Beside a shorter request, which shares the meshes but must not touch its tokens.
    tokens, _ = generate(runtime.run, cell, [prompt[:3], prompt], len(golden["tokens"]))
    assert tokens[1] == golden["tokens"].tolist()
