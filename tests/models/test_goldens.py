"""The reference forward against committed goldens of transformers: logits within 1e-4, 64 greedy tokens equal."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jmoe.checkpoints.load_model import load_model
from jmoe.models.model import KVCache, Model, reference_forward

GOLDENS = pathlib.Path(__file__).parent.parent / "goldens"
CASES = ("mixtral_window", "mixtral_tied", "qwen3_moe_mlp_only", "qwen3_moe_sparse_step", "dbrx")
TOLERANCE = 1e-4


def plain_forward(model: Model, tokens, cache=None):
    """reference_forward with the cache as plain lists, which any jit can return."""
    logits, after = reference_forward(model, tokens, KVCache(*cache) if cache else None)
    return logits, (list(after.keys), list(after.values))


forward = jax.jit(plain_forward)


def load(name: str):
    return load_model(GOLDENS / name), load_file(GOLDENS / name / "golden.safetensors")


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return load(request.param)


def whole_sequence(golden) -> np.ndarray:
    """The prompt and all greedy tokens but the last, `[1, 76]`: its logits choose each greedy token in turn."""
    return np.concatenate([golden["prompt"], golden["tokens"][:-1]])[None]


def error_of(model: Model, golden) -> float:
    logits, _ = forward(model, whole_sequence(golden))
    return float(np.abs(np.asarray(logits[0]) - golden["logits"]).max())


def test_goldens_are_all_tested():
    assert {path.name for path in GOLDENS.iterdir() if path.is_dir()} == set(CASES)


def test_logits_and_64_greedy_tokens(case):
    model, golden = case
    logits, _ = forward(model, whole_sequence(golden))
    np.testing.assert_allclose(logits[0], golden["logits"], atol=TOLERANCE, rtol=0)
    # Each position's best token is the golden one, given the golden ones before it: greedy decoding takes them all.
    np.testing.assert_array_equal(np.argmax(logits[0, len(golden["prompt"]) - 1 :], axis=-1), golden["tokens"])


@pytest.mark.parametrize("name", ["mixtral_window", "qwen3_moe_sparse_step"])
def test_prefill_then_cached_steps(name):
    model, golden = load(name)
    sequence, prompt = whole_sequence(golden), len(golden["prompt"])
    logits, cache = forward(model, sequence[:, :prompt])
    parts = [logits]
    for start, stop in ((prompt, prompt + 1), (prompt + 1, sequence.shape[1])):
        logits, cache = forward(model, sequence[:, start:stop], cache)
        parts.append(logits)
    assert cache[0][0].shape[1] == sequence.shape[1]
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1)[0], golden["logits"], atol=TOLERANCE, rtol=0)


def test_two_experts_swapped_is_noticed(case):
    model, golden = case
    attention, experts = model.arrays_by_path()
    for first, second in ((0, 1), (2, 5)):
        order = np.arange(model.config.num_experts)
        order[[first, second]] = order[[second, first]]
        for path in ("layers.0.gate_proj", "layers.0.up_proj", "layers.0.down_proj"):
            swapped = experts | {path: experts[path][order]}
            assert error_of(Model.from_arrays(model.config, attention, swapped), golden) > 100 * TOLERANCE


def sabotaged_error(monkeypatch, module, name: str, change) -> float:
    """Error of the windowed Mixtral when a function that the forward calls is wrapped; a fresh jit sees the wrapper."""
    model, golden = load("mixtral_window")
    honest = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **options: change(honest(*args, **options)))
    logits, _ = jax.jit(lambda m, x: plain_forward(m, x))(model, whole_sequence(golden))
    return float(np.abs(np.asarray(logits[0]) - golden["logits"]).max())


def test_ignored_topk_weight_is_noticed(monkeypatch):
    from jmoe.models import attention

    def last_counts_fully(chosen):
        topk_idx, topk_weights = chosen
        return topk_idx, topk_weights.at[:, -1].set(1.0)

    assert sabotaged_error(monkeypatch, attention, "choose_experts", last_counts_fully) > 100 * TOLERANCE


def test_one_dropped_row_is_noticed(monkeypatch):
    from jmoe.models import experts

    def drop_last(y):
        return y.at[-1].set(0.0)

    assert sabotaged_error(monkeypatch, experts, "expert_ffn", drop_last) > 100 * TOLERANCE


def test_sabotage_harness_alone_changes_nothing(monkeypatch):
    from jmoe.models import experts

    assert sabotaged_error(monkeypatch, experts, "expert_ffn", lambda y: y) < TOLERANCE
