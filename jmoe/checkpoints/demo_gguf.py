"""DenseGguf: a dense Llama model in a GGUF file, tensor by tensor in Hugging Face's layout, and its tokenizer facts."""

import dataclasses
import pathlib
from typing import Any

import gguf
import numpy as np


@dataclasses.dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """What a GGUF file says of its byte-level BPE tokenizer.

    Attributes:
      tokens: by id.
      merges: in order of rank, as "left right".
      special: ids of control tokens (token_type 3).
      pre: name of the pre-tokenizer.
      chat_template: Jinja source.
    """

    tokens: list[str]
    merges: list[str]
    special: tuple[int, ...]
    pre: str
    chat_template: str
    bos_token_id: int
    eos_token_id: int
    pad_token_id: int


class DenseGguf:
    """Reads a GGUF file of architecture "llama"; tensors are dequantised to float32 when asked for, none is kept.

    Args:
      path: the file; memory-mapped.

    Raises:
      ValueError: another architecture.
    """

    def __init__(self, path: pathlib.Path):
        self._reader = gguf.GGUFReader(path)
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        architecture = self._field("general.architecture")
        if architecture != "llama":
            raise ValueError(f"{path}: expected the architecture 'llama', got {architecture!r}")
        self.num_layers: int = self._field("llama.block_count")
        self.hidden_size: int = self._field("llama.embedding_length")
        self.ffn_size: int = self._field("llama.feed_forward_length")
        self.num_heads: int = self._field("llama.attention.head_count")
        self.num_kv_heads: int = self._field("llama.attention.head_count_kv")
        self.head_dim: int = self._field("llama.rope.dimension_count")
        self.vocab_size: int = self._field("llama.vocab_size")
        self.max_position: int = self._field("llama.context_length")
        self.rope_theta: float = self._field("llama.rope.freq_base")
        # Stored as float32: 9.99999975e-06 is meant to be 1e-05.
        self.norm_eps = float(f"{self._field('llama.attention.layer_norm_rms_epsilon'):.6g}")
        self.tie_word_embeddings = "output.weight" not in self._tensors

    def tensor(self, name: str) -> np.ndarray:
        """One tensor as float32, `[out, in]` as torch's Linear keeps it, rotary pairs in Hugging Face's two halves.

        Args:
          name: without ".weight": "token_embd", "output_norm" or "blk.3.attn_q".

        Raises:
          ValueError: no such tensor.
        """
        if f"{name}.weight" not in self._tensors:
            raise ValueError(f"expected a tensor {name}.weight in the GGUF file, got none")
        stored = self._tensors[f"{name}.weight"]
        weight = np.asarray(gguf.dequantize(stored.data, stored.tensor_type), np.float32)
        if name.endswith(("attn_q", "attn_k")):
            # llama.cpp interleaves the two rotary halves of each head, rows (0, d/2, 1, d/2 + 1, ...); undo it.
            heads = self.num_heads if name.endswith("attn_q") else self.num_kv_heads
            weight = weight.reshape(heads, self.head_dim // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)
        return weight

    def tokenizer(self) -> TokenizerFacts:
        """The tokenizer's vocabulary, merges and special ids."""
        types = self._field("tokenizer.ggml.token_type")
        return TokenizerFacts(
            tokens=self._field("tokenizer.ggml.tokens"),
            merges=self._field("tokenizer.ggml.merges"),
            special=tuple(i for i, kind in enumerate(types) if int(kind) == gguf.TokenType.CONTROL),
            pre=self._field("tokenizer.ggml.pre"),
            chat_template=self._field("tokenizer.chat_template"),
            bos_token_id=self._field("tokenizer.ggml.bos_token_id"),
            eos_token_id=self._field("tokenizer.ggml.eos_token_id"),
            pad_token_id=self._field("tokenizer.ggml.padding_token_id"),
        )

    def _field(self, name: str) -> Any:
        field = self._reader.fields.get(name)
        if field is None:
            raise ValueError(f"expected the field {name} in the GGUF file, got none")
        return field.contents()
