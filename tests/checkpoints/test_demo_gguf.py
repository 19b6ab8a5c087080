"""DenseGguf and the tokenizer: what is read is what was meant before llama.cpp's permutation and quantisation."""

import numpy as np
import pytest
from tiny_gguf import SPECIAL, TEMPLATE, TOKENS, write_gguf

from jmoe.checkpoints.demo_gguf import DenseGguf
from jmoe.checkpoints.demo_tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return path, write_gguf(path)


def test_sizes(written):
    dense = DenseGguf(written[0])
    sizes = dense.num_layers, dense.hidden_size, dense.ffn_size, dense.num_heads, dense.num_kv_heads, dense.head_dim
    assert sizes == (2, 64, 128, 4, 2, 16)
    assert (dense.rope_theta, dense.norm_eps, dense.max_position) == (100000.0, 1e-5, 256)
    assert dense.tie_word_embeddings


def test_rotary_rows_come_back_in_two_halves(written):
    dense, weights = DenseGguf(written[0]), written[1]
    for name in ("blk.1.attn_q", "blk.1.attn_k", "blk.0.ffn_norm"):
        np.testing.assert_array_equal(dense.tensor(name), weights[name])


@pytest.mark.parametrize(("name", "tolerance"), [("token_embd", 0.01), ("blk.0.ffn_down", 0.1), ("blk.1.attn_v", 0.1)])
def test_quantised_tensors_are_close_and_in_place(written, name, tolerance):
    got, meant = DenseGguf(written[0]).tensor(name), written[1][name]
    assert got.shape == meant.shape
    assert got.dtype == np.float32
    assert np.linalg.norm(got - meant) < tolerance * np.linalg.norm(meant)


def test_refusals(written, tmp_path):
    with pytest.raises(ValueError, match=r"expected a tensor blk\.9"):
        DenseGguf(written[0]).tensor("blk.9.attn_q")
    write_gguf(tmp_path / "other.gguf", architecture="qwen2")
    with pytest.raises(ValueError, match="expected the architecture 'llama', got 'qwen2'"):
        DenseGguf(tmp_path / "other.gguf")


def test_tokenizer(written):
    facts = DenseGguf(written[0]).tokenizer()
    assert facts.tokens == TOKENS
    assert facts.special == (0, 1, 2)
    assert (facts.bos_token_id, facts.eos_token_id, facts.pad_token_id) == (1, 2, 2)
    assert facts.chat_template == TEMPLATE
    tokenizer = build_tokenizer(facts)
    assert tokenizer.encode("hello hello").tokens == ["hello", "Ġhello"]
    assert tokenizer.encode("12").tokens == ["1", "2"]  # single digits, although "1 2" is a merge
    assert tokenizer.encode("<|im_start|>hello<|im_end|>").tokens == [SPECIAL[1], "hello", SPECIAL[2]]
    for text in ("hello, wörld! 漢字 🙂", "  two  spaces\n\n\ttab 1999", ""):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_unknown_pre_tokenizer_is_refused(tmp_path):
    write_gguf(tmp_path / "other.gguf", pre="llama-bpe")
    with pytest.raises(ValueError, match="expected the pre-tokenizer 'smollm', got 'llama-bpe'"):
        build_tokenizer(DenseGguf(tmp_path / "other.gguf").tokenizer())
