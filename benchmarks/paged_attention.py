"""Decode attention over pages against its floor and its peers, on the GPU at hand.

    python benchmarks/paged_attention.py                                    # everything, minutes on an H100
    python benchmarks/paged_attention.py --cases 32x1024,64xmix --page-lens 16 --no-peers
    python benchmarks/paged_attention.py --kv-dtypes float8_e4m3fn

48 query heads, 8 KV heads, head size 128; "32x1024" is 32 rows of lengths uniform in [512, 1024], "64xmix" 64 of
lengths uniform in 1 to 16k, one of them 128k. Pages are scattered over a pool; three page tables in turn, so that
nothing is left in L2. Floor: keys and values of the rows' own tokens, queries and results, over the read bandwidth of
the same run; "%3.11" is against 3.11 TB/s. Time: from one kernel's start to the next's, by JAX's profiler, and of the
kernel alone. Error: relative, against float64, three rows. "same": two calls gave the same bits. The dense peers attend
as many tokens, every row as long as the mean.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from device_profile import calls_of, profile
from device_time import relative_error, where
from expert_ffn_peers import graph_seconds, torch_or_none

from jmoe.pallas_kernels.paged_attention import paged_attention

Q, G, H = 48, 8, 128
POOL_BYTES = 2.2e9  # larger calls meet a page twice, 2 GB apart
CASES = "32x1024,128x1024,256x1024,32x4096,128x4096,256x4096,32x16384,128x16384,256x16384,64xmix"
KNOWN_BANDWIDTH = 3.11e12  # of the H100 whose peers' figures are kept


def lengths_of(case: str) -> np.ndarray:
    rows, context = case.split("x", 1)
    rng = np.random.default_rng(0)
    if context != "mix":
        return rng.integers(int(context) // 2, int(context) + 1, int(rows)).astype(np.int32)
    lengths = rng.integers(1, 16385, int(rows)).astype(np.int32)
    lengths[int(rows) // 2] = 131072
    return lengths


def tables_of(lengths: np.ndarray, page_len: int, num_pages: int, count: int) -> list[np.ndarray]:
    """Page tables of the same rows over different pages, as far as there are so many."""
    order = np.random.default_rng(1).permutation(num_pages).astype(np.int32)
    used = -(-lengths // page_len)
    tables, at = [], 0
    for _ in range(count):
        table = np.zeros((len(lengths), used.max()), np.int32)
        for row, n in enumerate(used):
            table[row, :n] = order[(at + np.arange(n)) % num_pages]
            at += n
        tables.append(table)
    return tables


def arguments_of(lengths: np.ndarray, page_len: int, dtype: str) -> list[tuple[Any, ...]]:
    """q, k_pages, v_pages, page_table, start_pos, three times with other tables."""
    page_bytes = 2 * page_len * G * H * jnp.dtype(dtype).itemsize
    num_pages = int(min(3 * (-(-lengths // page_len)).sum(), POOL_BYTES // page_bytes))
    keys = [jax.random.key(seed, impl="rbg") for seed in range(3)]
    q = 2 * jax.random.normal(keys[0], (len(lengths), 1, Q, H), jnp.bfloat16)
    pages = [jax.random.normal(key, (num_pages, page_len, G, H), jnp.bfloat16).astype(dtype) for key in keys[1:]]
    tables = tables_of(lengths, page_len, num_pages, 3)
    return [(q, *pages, jnp.asarray(table), jnp.asarray(lengths - 1)) for table in tables]


def truth(arguments: tuple[Any, ...], rows: list[int]) -> np.ndarray:
    q, k_pages, v_pages, table, start_pos = arguments
    found = []
    for row in rows:
        length = int(start_pos[row]) + 1
        used = table[row, : -(-length // k_pages.shape[1])]
        k, v = (
            np.asarray(p[used].astype(jnp.float32), np.float64).reshape(-1, G, H)[:length] for p in (k_pages, v_pages)
        )
        mine = np.asarray(q[row, 0].astype(jnp.float32), np.float64).reshape(G, Q // G, H)
        scores = np.einsum("gqh,sgh->gqs", mine, k) / np.sqrt(H)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        found.append(np.einsum("gqs,sgh->gqh", weights / weights.sum(-1, keepdims=True), v).reshape(Q, H))
    return np.stack(found)


def num_bytes(lengths: np.ndarray, dtype: str) -> float:
    return 2.0 * G * H * jnp.dtype(dtype).itemsize * float(lengths.sum()) + 4.0 * len(lengths) * Q * H


def ours(case: str, page_len: int, dtype: str, bandwidth: float, around: Any) -> str:
    lengths = lengths_of(case)
    inputs = arguments_of(lengths, page_len, dtype)
    function = jax.jit(functools.partial(paged_attention, implementation="pallas"))
    measured = profile(calls_of(function, inputs, 9), 9, repeats=5, around=around)
    out, again = (np.asarray(measured.outputs[i][:, 0].astype(jnp.float32)) for i in (0, 3))
    rows = sorted({0, len(lengths) // 2, len(lengths) - 1})
    floor = num_bytes(lengths, dtype) / bandwidth
    known = num_bytes(lengths, dtype) / KNOWN_BANDWIDTH
    seconds, kernel = measured.seconds, max(measured.kernels.values())
    error = relative_error(out[rows], truth(inputs[0], rows))
    return (
        f"{case:10s} {dtype:13s} page {page_len:2d} floor {floor * 1e6:7.1f} us | took {seconds * 1e6:7.1f} us "
        f"= {100 * floor / seconds:5.1f} % ({100 * known / seconds:5.1f} %3.11), kernel {kernel * 1e6:7.1f} us "
        f"| error {error:.2e} same {np.array_equal(out, again)}"
    )


def peers(case: str, page_len: int, bandwidth: float, around: Any) -> Iterator[str]:
    lengths = lengths_of(case)
    floor = num_bytes(lengths, "bfloat16") / bandwidth
    forms = {"jax pallas paged": _jax_paged, "jax cuDNN, dense": _cudnn, "torch SDPA, dense": _torch}
    for name, form in forms.items():
        try:
            if num_bytes(lengths, "bfloat16") > POOL_BYTES / 2:
                raise ValueError("larger than the pool")
            seconds = form(lengths, page_len, around)
            yield f"{case:10s} {name:22s} took {seconds * 1e6:7.1f} us = {100 * floor / seconds:5.1f} %"
        except Exception as error:
            yield f"{case:10s} {name:22s} not measured: {str(error).splitlines()[0][:100]}"


def _jax_paged(lengths: np.ndarray, page_len: int, around: Any) -> float:
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention as peer

    inputs = arguments_of(lengths, page_len, "bfloat16")
    k, v = (jnp.moveaxis(pages, 2, 0) for pages in inputs[0][1:3])
    width = 8 * 16  # pages a compute block times its splits, which must divide the table
    given = []
    for q, _, _, table, start_pos in inputs:
        table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % width)))
        given.append((q[:, 0], k, v, table, start_pos + 1))
    return profile(calls_of(peer, given, 6), 6, repeats=3, around=around).seconds


def _dense(lengths: np.ndarray) -> list[tuple[jax.Array, ...]]:
    shape = (len(lengths), int(lengths.mean()), G, H)
    keys = [jax.random.key(seed, impl="rbg") for seed in range(6)]
    q = jax.random.normal(keys[0], (len(lengths), 1, Q, H), jnp.bfloat16)
    return [(q, *(jax.random.normal(keys[i + j], shape, jnp.bfloat16) for j in (0, 1))) for i in (1, 3)]


def _cudnn(lengths: np.ndarray, page_len: int, around: Any) -> float:
    def attend(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")

    return profile(calls_of(attend, _dense(lengths), 6), 6, repeats=3, around=around).seconds


def _torch(lengths: np.ndarray, page_len: int, around: Any) -> float:
    torch = torch_or_none()
    if torch is None:
        raise ValueError("no torch with CUDA")
    attend = torch.nn.functional.scaled_dot_product_attention
    tensors = [[torch.from_dlpack(a).transpose(1, 2) for a in one] for one in _dense(lengths)]
    return graph_seconds(torch, [lambda one=one: attend(*one, enable_gqa=True) for one in tensors], around, repeats=3)


def lines(args: argparse.Namespace, around: Any) -> Iterator[str]:
    yield where()
    big = [(jnp.full((1 << 28,), i, jnp.float32),) for i in range(2)]
    bandwidth = 4 * (1 << 28) / profile(calls_of(jnp.sum, big, 4), 4, around=around).seconds
    del big
    yield f"reads {bandwidth / 1e12:.2f} TB/s"
    for case in args.cases.split(","):
        for dtype in args.kv_dtypes.split(","):
            for page_len in args.page_lens:
                yield ours(case, page_len, dtype, bandwidth, around)
        if not args.no_peers:
            yield from peers(case, args.page_lens[0], bandwidth, around)


def main(argv: list[str] | None = None, around: Callable[[], Any] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=CASES)
    parser.add_argument("--page-lens", type=lambda text: [int(n) for n in text.split(",")], default=[16, 64])
    parser.add_argument("--kv-dtypes", default="bfloat16")
    parser.add_argument("--no-peers", action="store_true")
    for line in lines(parser.parse_args(argv), around):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
