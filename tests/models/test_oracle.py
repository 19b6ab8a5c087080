"""The reference forward against transformers, live, on models that no golden holds. Needs the `oracle` extra."""

import dataclasses

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.oracle
torch = pytest.importorskip("torch", reason="the `oracle` extra is not installed: no torch")
pytest.importorskip("transformers", reason="the `oracle` extra is not installed: no transformers")

from transformers_cases import CASES, NUM_STEPS, build, greedy, prompt_of  # noqa: E402

from jmoe.checkpoints.load_model import load_model  # noqa: E402
from jmoe.checkpoints.save import save_hf  # noqa: E402
from jmoe.models.model import reference_forward  # noqa: E402

TOLERANCE = 1e-4
BY_NAME = {case.name: case for case in CASES}


def variant(name: str, **fields):
    """A case with another seed and other options than the golden of that name."""
    case = BY_NAME[name]
    return dataclasses.replace(case, seed=100, fields=case.fields | fields)


# transformers 5 fails on clip_qkv=None; 1e3 never bites.
_DBRX_ATTENTION = {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 1e3}
_DBRX_FFN = {"ffn_hidden_size": 20, "moe_num_experts": 6, "moe_top_k": 3, "moe_normalize_expert_weights": None}
VARIANTS = {
    "mixtral": variant("mixtral_window", sliding_window=None, num_local_experts=5),
    "mixtral_window": variant("mixtral_window", sliding_window=5),
    "mixtral_tied": variant("mixtral_tied", num_key_value_heads=4),
    "qwen3_window": variant("qwen3_moe_mlp_only", use_sliding_window=True, sliding_window=6, norm_topk_prob=False),
    "qwen3_both_kinds_of_dense": variant("qwen3_moe_sparse_step", mlp_only_layers=[1], norm_topk_prob=True),
    "qwen3_rope": variant("qwen3_moe_mlp_only", rope_parameters={"rope_theta": 1e6, "rope_type": "default"}),
    "dbrx": variant("dbrx"),
    "dbrx_unnormalised": variant("dbrx", ffn_config=_DBRX_FFN, attn_config=_DBRX_ATTENTION),
}


@pytest.fixture(scope="module", params=VARIANTS)
def live(request, tmp_path_factory):
    case = VARIANTS[request.param]
    model = build(case)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    prompt = prompt_of(case, length=9)
    logits, tokens = greedy(model, prompt, NUM_STEPS)
    return folder, torch.cat([prompt[0], tokens[:-1]])[None].numpy(), logits.numpy(), tokens.numpy()


def test_logits_and_64_greedy_tokens(live):
    folder, sequence, expected, tokens = live
    logits = jax.jit(lambda m, x: reference_forward(m, x)[0])(load_model(folder), sequence)[0]
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE, rtol=0)
    np.testing.assert_array_equal(np.argmax(logits[-NUM_STEPS:], axis=-1), tokens)


def test_transformers_reads_what_we_write(live, tmp_path):
    import transformers

    folder, sequence, expected, _ = live
    model = load_model(folder)
    save_hf(tmp_path, model.config, *model.arrays_by_path(), max_shard_bytes=100_000)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert back.dtype == torch.float32
    with torch.no_grad():
        logits = back(torch.tensor(sequence)).logits[0].numpy()
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE, rtol=0)
