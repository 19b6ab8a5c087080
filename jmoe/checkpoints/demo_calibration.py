"""ffn_inputs: what each FFN of the dense model reads on a short text, so that the demo's routers can be balanced."""

from collections.abc import Callable, Iterator

import numpy as np

from jmoe.checkpoints.demo_gguf import DenseGguf

# Prose, a list, code, numbers and a dialogue: some 300 tokens, enough to centre a router on.
TEXT = """The river rises in the hills to the north and runs for ninety miles before it meets the sea. In spring the
farmers open the gates, and by June the fields on both banks are green. "How long have you lived here?" she asked.
"Since 1987," he said, "and my father before me."

1. Boil the water. 2. Add two spoons of salt. 3. Stir slowly for 15 minutes, then let it cool.

def area(width, height):
    # returns square metres
    return width * height if width > 0 else 0

Question: What is the capital of Italy, and why is it famous?
Answer: The capital of Italy is Rome. It is known for its history, its art and its food; millions of people visit every
year. The chemical symbol of gold is Au. Water is made of hydrogen and oxygen, and it freezes at zero degrees Celsius.
A good plan is simple: first understand the problem, then try the smallest step that could work, and look at the result.
Dear Ms. Okafor, thank you for your letter of 12 March. We are sorry that your order (no. 40-2281) arrived late. Please
find enclosed a cheque for $24.50. However, most economists believe that prices will not fall until the next election.
"""


def ffn_inputs(dense: DenseGguf, token_ids: list[int], step: Callable[[], None]) -> Iterator[np.ndarray]:
    """Runs the dense model in numpy: x + attention(norm(x)), x + down(silu(gate norm(x)) * up norm(x)), layer by layer.

    Args:
      dense: the model.
      token_ids: one sequence.
      step: called after each layer.

    Yields:
      For each layer the normalised input of its FFN, `[tokens, D]` float32. Only one layer's weights are in memory.
    """
    x = dense.tensor("token_embd")[token_ids]
    rotation = _rotation(dense, len(token_ids))
    for layer in range(dense.num_layers):
        name = f"blk.{layer}."
        h = _rms_norm(x, dense.tensor(name + "attn_norm"), dense.norm_eps)
        x = x + _attention(dense, name, h, rotation)
        h = _rms_norm(x, dense.tensor(name + "ffn_norm"), dense.norm_eps)
        yield h
        gate, up = h @ dense.tensor(name + "ffn_gate").T, h @ dense.tensor(name + "ffn_up").T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ dense.tensor(name + "ffn_down").T
        step()


def _rms_norm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + eps) * scale


def _rotation(dense: DenseGguf, length: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of the rotary angles, `[tokens, 1, H / 2]`."""
    half = dense.head_dim // 2
    angle = np.arange(length)[:, None, None] * dense.rope_theta ** (-np.arange(half) / half)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def _attention(dense: DenseGguf, name: str, h: np.ndarray, rotation: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    cos, sin = rotation

    def heads(which: str, count: int) -> np.ndarray:
        return (h @ dense.tensor(f"{name}attn_{which}").T).reshape(len(h), count, dense.head_dim)

    def rotate(y: np.ndarray) -> np.ndarray:
        a, b = np.split(y, 2, axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    group = dense.num_heads // dense.num_kv_heads
    q = rotate(heads("q", dense.num_heads))
    k = np.repeat(rotate(heads("k", dense.num_kv_heads)), group, axis=1)
    v = np.repeat(heads("v", dense.num_kv_heads), group, axis=1)
    scores = np.einsum("tnh,snh->nts", q, k) / np.float32(dense.head_dim**0.5)
    scores = np.where(np.tri(len(h), dtype=bool), scores, -np.inf)
    probs = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed = np.einsum("nts,snh->tnh", probs / probs.sum(axis=-1, keepdims=True), v)
    return mixed.reshape(len(h), -1) @ dense.tensor(name + "attn_output").T
