"""Cases of the prefill attention benchmark: rows of (positions before the call, new tokens), their inputs and truth."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

Q, G, H = 48, 8, 128


def _ragged(new: int, rows: int, seed: int) -> tuple[tuple[int, int], ...]:
    """Contexts uniform in 4k to 32k, the new tokens included."""
    return tuple((int(length) - new, new) for length in np.random.default_rng(seed).integers(4096, 32769, rows))


CASES: dict[str, tuple[tuple[int, int], ...]] = {
    "2k@4k": ((4096, 2048),),
    "8k@4k": ((4096, 8192),),
    "2k@32k": ((32768, 2048),),
    "8k@32k": ((32768, 8192),),
    "16 x 16 rows": _ragged(16, 16, 0),
    "32 x 16 rows": _ragged(32, 16, 1),
    "64 x 16 rows": _ragged(64, 16, 2),
    "1 x 16 rows": _ragged(1, 16, 3),
    "15 x 1 and 4k@4k": (*_ragged(1, 15, 4), (4096, 4096)),
    "tiny": ((40, 24), (0, 9), (100, 1)),
}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """One call's arrays, in the order of `ragged_paged_attention`."""

    q: jax.Array
    k_pages: jax.Array
    v_pages: jax.Array
    page_table: jax.Array
    query_offsets: jax.Array
    num_tokens: jax.Array
    start_pos: jax.Array

    def arguments(self) -> tuple[jax.Array, ...]:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))


def make_inputs(rows: tuple[tuple[int, int], ...], page_len: int, kv_dtype: str, seed: int) -> Inputs:
    """Normal random values in scattered pages."""
    rng = np.random.default_rng(seed)
    used = [-(-(before + new) // page_len) for before, new in rows]
    pages = 1 + rng.permutation(sum(used))
    table = np.zeros((len(rows), max(used)), np.int32)
    for row, count in enumerate(used):
        table[row, :count] = pages[sum(used[:row]) : sum(used[: row + 1])]
    start, num = (np.array(column, np.int32) for column in zip(*rows, strict=True))
    dtype = jnp.float8_e4m3fn if kv_dtype == "fp8" else jnp.bfloat16
    keys = [jax.random.key(3 * seed + i, impl="rbg") for i in range(3)]
    shape = (1 + sum(used), page_len, G, H)
    k, v = (jax.random.normal(key, shape, jnp.bfloat16).astype(dtype) for key in keys[:2])
    q = jax.random.normal(keys[2], (int(num.sum()), Q, H), jnp.bfloat16)
    lengths = (np.cumsum(num) - num, num, start)
    return Inputs(q, k, v, *(jnp.asarray(array, jnp.int32) for array in (table, *lengths)))


def num_flops(rows: tuple[tuple[int, int], ...]) -> float:
    """4 Q H for each query and position that it sees."""
    return sum(4.0 * Q * H * (new * before + new * (new + 1) / 2) for before, new in rows)


def num_bytes(rows: tuple[tuple[int, int], ...], kv_dtype: str) -> float:
    """Keys and values of each row once, queries and results."""
    width = 1 if kv_dtype == "fp8" else 2
    return sum((before + new) * G * H * 2.0 * width + new * Q * H * 4.0 for before, new in rows)


def truth(inputs: Inputs, samples: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(token, head, float64 result) of a sample: each row's first and last token among it, four heads each."""
    rng = np.random.default_rng(0)
    table, offsets, num, start = (np.asarray(a) for a in inputs.arguments()[3:])
    found: tuple[list[int], list[int], list[np.ndarray]] = ([], [], [])
    for row in range(min(len(num), 6)):
        length = int(start[row] + num[row])
        heads = np.append(rng.integers(0, Q, 3), Q - 1)
        index = np.unique(np.append(rng.integers(0, num[row], samples), [0, num[row] - 1]))
        own = table[row, : -(-length // inputs.k_pages.shape[1])]
        for head in heads:
            k, v = (_float64(pages[own, :, head // (Q // G)]) for pages in (inputs.k_pages, inputs.v_pages))
            for token, mine in zip(index, _float64(inputs.q[offsets[row] + index, head]), strict=True):
                seen = slice(0, int(start[row]) + int(token) + 1)
                scores = k[seen] @ mine / np.sqrt(H)
                weights = np.exp(scores - scores.max())
                found[0].append(int(offsets[row] + token))
                found[1].append(int(head))
                found[2].append(weights @ v[seen] / weights.sum())
    return np.array(found[0]), np.array(found[1]), np.array(found[2])


def _float64(array: jax.Array) -> np.ndarray:
    """`[..., H]` as rows on the host; only what is asked for leaves the device."""
    return np.asarray(array.astype(jnp.float32), np.float64).reshape(-1, H)
