"""decoder_layer: the few kernels of a decode step on Hopper against the op-by-op form, both against float32."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jmoe.cell_config import CellConfig
from jmoe.config import ModelConfig
from jmoe.decode_batch import decode_batch
from jmoe.decoder_layer import decoder_layer
from jmoe.models.attention import AttentionLayer
from jmoe.pallas_kernels.choice import has_hopper
from jmoe.rows import Rows
from jmoe.sharding.mesh_config import MeshConfig
from jmoe.step_inputs import StepLayout

QWEN3 = ModelConfig("qwen3_moe", 1024, 2048, 1, 32, 4, 128, 128, 8, 768, qk_norm=True, norm_eps=1e-6)
CONTEXT = 300


def layer_of(seed: int) -> AttentionLayer:
    """Random weights of the scale that they have in models; norm scales around 1."""

    def make(path, spec):
        key = jax.random.fold_in(jax.random.key(seed), sum(map(ord, path)))
        drawn = jax.random.normal(key, spec.shape, jnp.float32)
        values = drawn * spec.fan_in**-0.5 if spec.fan_in else spec.fill + 0.1 * drawn
        return nnx.Param(values.astype(jnp.bfloat16))

    return AttentionLayer(QWEN3, 0, make)


def outputs(cell: CellConfig, module: AttentionLayer, *arrays) -> dict[str, np.ndarray]:
    graph, params = nnx.split(module)

    @jax.jit
    def run(params, arrays):
        x, delta, kv, packed = arrays
        rows = Rows.unpack(packed, StepLayout.of(cell, "decode"))
        x, pages, chosen = decoder_layer(cell, nnx.merge(graph, params), x, delta, kv, rows)
        assert chosen is not None
        # Every expert's weight, 0 where it was not chosen: equal choices in another order are equal.
        dense = jnp.zeros((len(x), QWEN3.num_experts)).at[jnp.arange(len(x))[:, None], chosen.topk_idx]
        return {"x": x, "k": pages[0], "v": pages[1], "h": chosen.rows, "weights": dense.set(chosen.topk_weights)}

    with jax.default_matmul_precision("highest"):
        return {name: np.asarray(a, np.float64) for name, a in run(params, arrays).items()}


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [16, 128])
def test_few_kernels_are_as_exact_as_op_by_op(rows, monkeypatch):
    """Relative errors against float32, of everything that a layer hands on: at most a quarter more than op by op."""
    if not has_hopper():
        pytest.skip("needs a Hopper GPU")
    cell = CellConfig(
        QWEN3, MeshConfig.colocate(1).resolve(QWEN3.num_experts), rows=rows, num_steps=2, page_len=16,
        num_pages=1 + rows * 20, max_len=320,
    )  # fmt: skip
    keys = jax.random.split(jax.random.key(1), 4)
    page_shape = (cell.num_pages, cell.page_len, QWEN3.num_kv_heads, QWEN3.head_dim)
    draw = lambda key, *shape: jax.random.normal(key, shape, jnp.float32).astype(jnp.bfloat16)  # noqa: E731
    x, delta = draw(keys[0], rows, QWEN3.hidden_size), jax.random.normal(keys[1], (rows, QWEN3.hidden_size))
    kv = (draw(keys[2], *page_shape), draw(keys[3], *page_shape))
    packed = jnp.asarray(decode_batch(cell, CONTEXT).array[0, 0])
    module = layer_of(0)

    wide = jax.tree.map(lambda a: a.astype(jnp.float32), nnx.state(module))
    reference = nnx.merge(nnx.graphdef(module), wide)
    kv_wide = tuple(a.astype(jnp.float32) for a in kv)
    model = dataclasses.replace(QWEN3, dtype="float32")
    exact = dataclasses.replace(cell, model=model, kernels="xla")
    want = outputs(exact, reference, x.astype(jnp.float32), delta, kv_wide, packed)
    few, again = (outputs(cell, module, x, delta, kv, packed) for _ in range(2))
    with monkeypatch.context() as patch:
        patch.setattr("jmoe.decoder_layer._fits", lambda *arrays: False)
        plain = outputs(cell, module, x, delta, kv, packed)
    assert any((few[name] != plain[name]).any() for name in want), "expected two forms, got one"
    for name, values in want.items():
        error = {label: np.linalg.norm(got[name] - values) for label, got in (("few", few), ("plain", plain))}
        scale = np.linalg.norm(values)
        print(f"{name}: few {error['few'] / scale:.2e}, op by op {error['plain'] / scale:.2e}")
        assert np.isfinite(few[name]).all()
        assert error["few"] <= 1.25 * error["plain"], f"{name}: {error} of {scale}"
        assert error["few"] <= 0.05 * scale, f"{name}: {error} of {scale}"
        np.testing.assert_array_equal(few[name], again[name], err_msg=f"{name} differs from run to run")
