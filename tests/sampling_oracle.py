"""Sampling by the book, one row at a time in numpy; only the noise is drawn as the device draws it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Parameters:
    """One request's sampling parameters, under their column names."""

    temperature: float = 0.0
    seed: int = 0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def columns(self) -> dict[str, float]:
        return dataclasses.asdict(self)


def penalized(logits: np.ndarray, prompt, output, p: Parameters) -> np.ndarray:
    """`[V]` logits after the penalties for the token ids of `prompt` and `output`."""
    logits = logits.astype(np.float64)
    for token in {*prompt, *output}:
        logits[token] *= 1 / p.repetition_penalty if logits[token] > 0 else p.repetition_penalty
    for token in set(output):
        logits[token] -= p.presence_penalty + p.frequency_penalty * list(output).count(token)
    return logits


def probabilities(logits: np.ndarray, p: Parameters) -> np.ndarray:
    """`[V]` float64: what a token is drawn from, after temperature, min-p, top-k and top-p."""
    tempered = logits / p.temperature
    probs = np.exp(tempered - tempered.max())
    probs[probs < p.min_p] = 0  # the best one's is 1 here
    order = np.argsort(-probs, kind="stable")
    probs[order[p.top_k or len(order) :]] = 0
    probs /= probs.sum()
    before = np.cumsum(probs[order]) - probs[order]
    if p.top_p < 1:
        probs[order[before >= p.top_p]] = 0
    return probs / probs.sum()


def noise(seed: int, num_output: int, vocab_size: int) -> np.ndarray:
    """The Gumbel noise of a request's token number num_output: of nothing else."""
    key = jax.random.fold_in(jax.random.key(jnp.int32(seed)), num_output)
    return np.asarray(jax.random.gumbel(key, (vocab_size,), jnp.float32))


def next_token(logits: np.ndarray, prompt, output, p: Parameters) -> int:
    """The token that a request says after `output`."""
    logits = penalized(logits, prompt, output, p)
    if p.temperature == 0:
        return int(logits.argmax())
    with np.errstate(divide="ignore"):
        return int((np.log(probabilities(logits, p)) + noise(p.seed, len(output), len(logits))).argmax())
