"""The demo conversion on a tiny model: the dense logits stay, routing matters, the cache holds whole folders only."""

import dataclasses
import json
import os
import time

import jax
import numpy as np
import pytest
from tiny_gguf import FFN, HIDDEN, write_gguf

from jmoe.checkpoints import demo_model
from jmoe.checkpoints.demo_calibration import ffn_inputs
from jmoe.checkpoints.demo_download import DemoModelError
from jmoe.checkpoints.demo_gguf import DenseGguf
from jmoe.checkpoints.demo_moe import attention_arrays, balanced_routers, moe_config
from jmoe.checkpoints.load_model import load_model
from jmoe.models.model import Model, reference_forward
from jmoe.models.router import choose_experts

logits_of = jax.jit(lambda model, tokens: reference_forward(model, tokens)[0])


def silent(fraction, message):
    pass


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    write_gguf(folder / "tiny.gguf")
    demo_model.convert_demo_model(folder / "tiny.gguf", folder / "model", silent)
    return DenseGguf(folder / "tiny.gguf"), folder / "model"


def token_ids(dense, length=40) -> np.ndarray:
    return np.random.default_rng(5).integers(0, dense.vocab_size, (1, length))


def dense_logits(dense) -> np.ndarray:
    """The dense model as a mixture of one expert, by the reference that transformers has checked."""
    config = dataclasses.replace(
        moe_config(dense, dense.tokenizer()), num_experts=1, num_experts_per_tok=1, expert_ffn_size=FFN
    )
    routers = [np.zeros((HIDDEN, 1), np.float32)] * dense.num_layers
    attention = {path: np.asarray(array) for path, array in attention_arrays(dense, routers).items()}
    experts = {
        f"layers.{layer}.{name}_proj": dense.tensor(f"blk.{layer}.ffn_{name}").T[None]
        for layer in range(dense.num_layers)
        for name in ("gate", "up", "down")
    }
    return np.asarray(logits_of(Model.from_arrays(config, attention, experts), token_ids(dense)))


def test_logits_stay_within_a_thousandth(converted):
    dense, folder = converted
    expected = dense_logits(dense)
    got = np.asarray(logits_of(load_model(folder), token_ids(dense)))
    assert np.abs(expected).max() > 3
    np.testing.assert_allclose(got, expected, atol=1e-3)


def test_swapping_two_experts_is_noticed_unless_they_are_copies(converted):
    dense, folder = converted
    model = load_model(folder)
    attention, experts = model.arrays_by_path()
    honest = np.asarray(logits_of(model, token_ids(dense)))

    def error(first, second):
        order = np.arange(8)
        order[[first, second]] = second, first
        swapped = {path: array[order] if ".0." in path else array for path, array in experts.items()}
        return np.abs(logits_of(Model.from_arrays(model.config, attention, swapped), token_ids(dense)) - honest).max()

    assert min(error(0, 1), error(3, 4), error(2, 7)) > 0.1
    assert error(0, 4) < 1e-3


def test_calibration_forward_is_the_model(converted):
    """What the last FFN reads in numpy is what it reads in the reference."""
    dense, folder = converted
    model, ids, seen = load_model(folder), token_ids(dense), []
    *_, last = ffn_inputs(dense, ids[0].tolist(), lambda: None)
    layer = model.attention.layers[-1]
    honest = layer.route
    layer.route = lambda x: (seen.append(np.asarray(x)), honest(x))[1]
    reference_forward(model, ids)
    np.testing.assert_allclose(last, seen[0], atol=1e-3)


def test_routers_take_one_copy_of_each_slice_and_balance_the_copies():
    rng = np.random.default_rng(1)
    mean = 3 * rng.normal(size=(1, 96))  # a mean larger than the spread, as real hidden states have
    inputs = [(mean + rng.normal(size=(2000, 96))).astype(np.float32) for _ in range(2)]
    routers = balanced_routers(x[:1000] for x in inputs)
    for x, router in zip(inputs, routers, strict=True):
        topk_idx, topk_weights = choose_experts(x[1000:] @ router, 4, True)
        np.testing.assert_array_equal(np.sort(np.asarray(topk_idx) % 4, axis=1), np.tile(np.arange(4), (1000, 1)))
        np.testing.assert_allclose(topk_weights, 0.25, atol=1e-4)
        share = np.bincount(np.asarray(topk_idx).ravel(), minlength=8) / topk_idx.size
        np.testing.assert_allclose(share, 0.125, atol=0.02)  # 1000 tokens: standard deviation 0.004 of each part


def test_folder_is_an_ordinary_checkpoint(converted):
    _, folder = converted
    config = json.loads((folder / "config.json").read_text())
    assert (config["architectures"], config["tie_word_embeddings"]) == (["MixtralForCausalLM"], True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert (settings["bos_token"], settings["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert "im_start" in settings["chat_template"]
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and a list of the downloads made."""
    monkeypatch.setenv("JMOE_CACHE", str(tmp_path / "cache"))
    fetched = []

    def fetch(folder, progress):
        fetched.append(folder)
        write_gguf(folder / "tiny.gguf")
        return folder / "tiny.gguf"

    monkeypatch.setattr(demo_model, "fetch_demo_gguf", fetch)
    return tmp_path / "cache", fetched


def test_second_call_finds_the_cache(cache):
    parent, fetched = cache
    reports = []
    first = demo_model.ensure_demo_model(lambda *report: reports.append(report))
    assert first.parent == parent
    fractions = [fraction for fraction, message in reports if message.startswith("Building")]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    reports.clear()
    assert demo_model.ensure_demo_model(lambda *report: reports.append(report)) == first
    assert len(fetched) == 1
    assert not reports
    assert [path.name for path in parent.iterdir()] == [demo_model.NAME]


@pytest.mark.parametrize("damage", ["missing", "truncated", "no tokenizer"])
def test_damaged_folder_is_built_again(cache, damage):
    _, fetched = cache
    folder = demo_model.ensure_demo_model(silent)
    shard = sorted(folder.glob("*.safetensors"))[0]
    if damage == "missing":
        shard.unlink()
    elif damage == "truncated":
        os.truncate(shard, shard.stat().st_size - 1)
    else:
        (folder / "tokenizer.json").unlink()
    demo_model.ensure_demo_model(silent)
    assert len(fetched) == 2
    load_model(folder)


def test_failure_leaves_nothing_behind(cache, monkeypatch):
    parent, _ = cache

    def broken(*args, **kwargs):
        raise DemoModelError("no network")

    monkeypatch.setattr(demo_model, "fetch_demo_gguf", broken)
    with pytest.raises(DemoModelError, match="no network"):
        demo_model.ensure_demo_model(silent)
    monkeypatch.setattr(demo_model, "DISK_BYTES", 1 << 60)
    with pytest.raises(DemoModelError, match="set JMOE_CACHE"):
        demo_model.ensure_demo_model(silent)
    assert not list(parent.iterdir())


def test_another_process_was_faster(cache):
    """The folder appears while this process converts: its own result is dropped, and both are served."""
    parent, _ = cache

    def progress(fraction, message):
        if message.startswith("Reading") and not (parent / demo_model.NAME).exists():
            demo_model.convert_demo_model(next(parent.glob(".building-*/tiny.gguf")), parent / demo_model.NAME, silent)

    folder = demo_model.ensure_demo_model(progress)
    assert [path.name for path in parent.iterdir()] == [folder.name]
    load_model(folder)


def test_old_leftovers_are_removed(cache):
    parent, _ = cache
    for name, age_s in ((".building-old", 7200), (".building-new", 60)):
        (parent / name).mkdir(parents=True)
        os.utime(parent / name, (time.time() - age_s,) * 2)
    demo_model.ensure_demo_model(silent)
    assert {path.name for path in parent.iterdir()} == {demo_model.NAME, ".building-new"}


def test_cache_that_can_not_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JMOE_CACHE", str(tmp_path / "file"))
    with pytest.raises(DemoModelError, match="could not write the demo model"):
        demo_model.ensure_demo_model(silent)
