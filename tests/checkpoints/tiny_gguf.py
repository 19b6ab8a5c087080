"""A tiny dense Llama in a GGUF file, written the way llama.cpp's converter does, and a wheel around it."""

import pathlib
import zipfile

import gguf
import numpy as np

HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 64, 128, 2, 4, 2, 16
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ hello", "1 2"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def byte_characters() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in its order."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) for byte in plain] + [chr(256 + n) for n in range(len(others))]


TOKENS = SPECIAL + byte_characters() + [merge.replace(" ", "") for merge in MERGES]
TOKENS += [f"<unused{n}>" for n in range(-len(TOKENS) % 32)]


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    """The model in Hugging Face's layout, by llama.cpp's names."""
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return rng.normal(0, 1.5 * columns**-0.5, (rows, columns)).astype(np.float32)

    result = {"token_embd": matrix(len(TOKENS), HIDDEN) * 5}
    for layer in range(LAYERS):
        name = f"blk.{layer}."
        result[name + "attn_norm"] = 1 + 0.1 * rng.normal(size=HIDDEN).astype(np.float32)
        result[name + "ffn_norm"] = 1 + 0.1 * rng.normal(size=HIDDEN).astype(np.float32)
        result[name + "attn_q"] = matrix(HEADS * HEAD_DIM, HIDDEN)
        result[name + "attn_k"] = matrix(KV_HEADS * HEAD_DIM, HIDDEN)
        result[name + "attn_v"] = matrix(KV_HEADS * HEAD_DIM, HIDDEN)
        result[name + "attn_output"] = matrix(HIDDEN, HEADS * HEAD_DIM)
        result[name + "ffn_gate"] = matrix(FFN, HIDDEN)
        result[name + "ffn_up"] = matrix(FFN, HIDDEN)
        result[name + "ffn_down"] = matrix(HIDDEN, FFN)
    result["output_norm"] = 1 + 0.1 * rng.normal(size=HIDDEN).astype(np.float32)
    return result


def interleave_rotary_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's permutation of q and k rows, head by head."""
    return weight.reshape(heads, 2, HEAD_DIM // 2, HIDDEN).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: pathlib.Path, architecture: str = "llama", pre: str = "smollm") -> dict[str, np.ndarray]:
    """Writes the file; q, k and norms in float32, embeddings in Q8_0, the rest in Q4_1. Returns `weights()`."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in TOKENS])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    made = weights()
    for name, weight in made.items():
        if name.endswith(("attn_q", "attn_k")):
            weight = interleave_rotary_rows(weight, HEADS if name.endswith("q") else KV_HEADS)
        elif weight.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0 if name == "token_embd" else gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(f"{name}.weight", gguf.quantize(weight, kind), raw_dtype=kind)
            continue
        writer.add_tensor(f"{name}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return made


def write_wheel(folder: pathlib.Path, package: str, version: str, member: str, content: bytes) -> pathlib.Path:
    """A wheel that pip accepts, with one file in it."""
    name = package.replace("-", "_")
    wheel, info = folder / f"{name}-{version}-py3-none-any.whl", f"{name}-{version}.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        facts = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        archive.writestr(f"{info}/WHEEL", facts)
        archive.writestr(f"{info}/RECORD", "")
    return wheel
