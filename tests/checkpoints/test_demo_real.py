"""The real demo model, downloaded (93 MB) and converted: it answers, and it is the dense model. Needs `oracle`."""

import numpy as np
import pytest

pytestmark = pytest.mark.oracle
torch = pytest.importorskip("torch", reason="the `oracle` extra is not installed: no torch")
transformers = pytest.importorskip("transformers", reason="the `oracle` extra is not installed: no transformers")

from jmoe.checkpoints.demo_download import fetch_demo_gguf  # noqa: E402
from jmoe.checkpoints.demo_gguf import DenseGguf  # noqa: E402
from jmoe.checkpoints.demo_model import convert_demo_model  # noqa: E402

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
TEXT = (
    "The theory of relativity usually encompasses two interrelated physics theories by Albert Einstein, published in "
    "1905 and 1915. def double(x): return 2 * x  # and so on"
)


def dense_llama(gguf: DenseGguf):
    """The GGUF model in transformers' Llama, weights straight from the file."""
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, rms_norm_eps=1e-5, max_position_embeddings=8192, tie_word_embeddings=True,
        rope_parameters={"rope_theta": 100000.0, "rope_type": "default"},
    )  # fmt: skip
    names = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    names |= {f"attn_{short}": f"self_attn.{short}_proj" for short in "qkv"} | {"attn_output": "self_attn.o_proj"}
    names |= {f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    state = {"model.embed_tokens.weight": "token_embd", "lm_head.weight": "token_embd",
             "model.norm.weight": "output_norm"}
    for layer in range(30):
        state |= {f"model.layers.{layer}.{theirs}.weight": f"blk.{layer}.{ours}" for ours, theirs in names.items()}
    model = transformers.LlamaForCausalLM(config).eval()
    model.load_state_dict({theirs: torch.from_numpy(gguf.tensor(ours).copy()) for theirs, ours in state.items()})
    return model


def test_the_demo_model_answers_as_the_dense_model_does(tmp_path):
    def silent(fraction, message):
        pass

    gguf = fetch_demo_gguf(tmp_path, silent)
    convert_demo_model(gguf, tmp_path / "model", silent)
    model = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.float32

    text = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(text, return_tensors="pt")["input_ids"]
    answer = model.generate(prompt, max_new_tokens=16, do_sample=False)
    assert tokenizer.decode(answer[0, prompt.shape[1] :]) == "The capital of France is Paris.<|im_end|>"

    ids = torch.cat([answer[0], torch.tensor(tokenizer(TEXT)["input_ids"])])[None]
    chosen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda gate, inputs, out: chosen.append(out[-1]))
    with torch.no_grad():
        logits = model(ids).logits.numpy()
        dense = dense_llama(DenseGguf(gguf))(ids).logits.numpy()
    np.testing.assert_allclose(logits, dense, atol=1e-3, rtol=0)

    topk_idx = torch.stack(chosen).numpy()
    np.testing.assert_array_equal(np.sort(topk_idx % 4, axis=-1), np.broadcast_to(np.arange(4), topk_idx.shape))
    share = np.bincount(topk_idx.ravel(), minlength=8) / topk_idx.size
    np.testing.assert_allclose(share, 0.125, atol=0.015)

    for layer in model.model.layers:  # experts 0 and 1 trade places
        for weight in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
            weight.data[[0, 1]] = weight.data[[1, 0]].clone()
    with torch.no_grad():
        swapped = model(ids).logits.numpy()
    assert np.mean(swapped.argmax(-1) != dense.argmax(-1)) > 0.5
