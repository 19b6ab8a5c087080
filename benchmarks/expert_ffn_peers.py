"""The expert FFN by what a GPU machine has beside jmoe: torch's grouped products, a cuBLAS loop, and jax's own.

Each peer gives, per rotating input, a thunk that launches the whole FFN, and where it has one, a thunk of the grouped
products alone on rows that are already permuted. torch's run in a CUDA graph, jax's inside one program.
"""

import contextlib
import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from expert_ffn_cases import Inputs

FP8_MAX = 448.0


def torch_or_none() -> Any:
    """torch with CUDA, or None."""
    try:
        import torch
    except ImportError:
        return None
    return torch if torch.cuda.is_available() else None


def graph_seconds(torch: Any, thunks: Sequence[Callable[[], Any]], around=None, repeats: int = 9) -> float:
    """Seconds of one call: a CUDA graph of all thunks once, replayed four at a time, median of `repeats`."""
    with around() if around is not None else contextlib.nullcontext():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(2):
                for thunk in thunks:
                    thunk()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = [thunk() for thunk in thunks]
        graph.replay()
        times = []
        for _ in range(repeats):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(4):
                graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3 / 4 / len(thunks))
        del kept, graph
    return statistics.median(times)


class TorchPeers:
    """Tensors shared with jax (no copy but the gate and up weights joined, as torch wants them)."""

    inputs: list[tuple[Any, Any, Any, np.ndarray]]

    def __init__(self, torch: Any, inputs: list[Inputs], weights: tuple[jax.Array, ...]):
        self.torch = torch
        gate, up, self.down = (torch.from_dlpack(w) for w in weights)
        self.gate_up = torch.cat([gate, up], dim=2)
        self.experts = torch.arange(len(gate), device="cuda", dtype=torch.int32)
        take = torch.from_dlpack
        self.inputs = [(take(i.rows), take(i.local_idx), take(i.topk_weights), i.host_idx) for i in inputs]

    def permute(self, rows, idx):
        flat = idx.reshape(-1)
        order = self.torch.argsort(flat, stable=True)
        ends = (flat[:, None] == self.experts).sum(0).cumsum(0).to(self.torch.int32)
        token = self.torch.div(order, idx.shape[1], rounding_mode="floor")
        return order, token, ends, rows.index_select(0, token)

    def unpermute(self, rows, y, shares, order, token):
        out = self.torch.zeros(rows.shape, dtype=self.torch.float32, device="cuda")
        return out.index_add_(0, token, y.float() * shares.reshape(-1)[order][:, None])

    def swiglu(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return self.torch.nn.functional.silu(gate) * up

    def grouped(self, rows, idx, shares, _host):
        """torch's grouped_mm."""
        order, token, ends, permuted = self.permute(rows, idx)
        hidden = self.swiglu(self.torch._grouped_mm(permuted, self.gate_up, offs=ends))
        return self.unpermute(rows, self.torch._grouped_mm(hidden, self.down, offs=ends), shares, order, token)

    def grouped_products(self, rows, idx, _shares, _host):
        _, _, ends, permuted = self.permute(rows, idx)
        hidden = self.swiglu(self.torch._grouped_mm(permuted, self.gate_up, offs=ends))

        def thunk():
            self.torch._grouped_mm(permuted, self.gate_up, offs=ends)
            return self.torch._grouped_mm(hidden, self.down, offs=ends)

        return thunk

    def loop(self, rows, idx, shares, host):
        """cuBLAS, an expert at a time; the sizes are the host's, which a server doesn't have."""
        order, token, _, permuted = self.permute(rows, idx)
        y = self.torch.empty(permuted.shape, dtype=permuted.dtype, device="cuda")
        self.loop_into(y, permuted, host)
        return self.unpermute(rows, y, shares, order, token)

    def loop_into(self, y, permuted, host):
        ends = np.cumsum(np.bincount(host.reshape(-1), minlength=len(self.down)))
        for expert, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            if end > start:
                hidden = self.swiglu(self.torch.mm(permuted[start:end], self.gate_up[expert]))
                self.torch.mm(hidden, self.down[expert], out=y[start:end])

    def thunks(self) -> dict[str, tuple[list, list | None]]:
        """Name to (whole FFN, products only), bf16."""
        whole, products, loop = [], [], []
        for i in self.inputs:
            whole.append(functools.partial(self.grouped, *i))
            products.append(self.grouped_products(*i))
            loop.append(functools.partial(self.loop, *i))
        return {"torch.grouped_mm": (whole, products), "torch.mm loop": (loop, None)}


class TorchScaledPeers(TorchPeers):
    """fp8 with a scale a row and a scale an output column, which is what torch's kernel takes."""

    def __init__(self, torch: Any, inputs: list[Inputs], weights: tuple[jax.Array, ...]):
        super().__init__(torch, inputs, weights)
        self.gate_up = self.columns(self.gate_up)
        self.down = self.columns(self.down)

    def columns(self, w):
        """[E, in, out] -> values whose `in` is contiguous, and scales [E, out]."""
        values = self.torch.empty((w.shape[0], w.shape[2], w.shape[1]), dtype=self.torch.float8_e4m3fn, device="cuda")
        scales = self.torch.empty((w.shape[0], w.shape[2]), device="cuda")
        for e in range(len(w)):
            values[e], scales[e] = self.rowwise(w[e].T)
        return values.transpose(1, 2), scales

    def rowwise(self, x):
        x = x.float()
        scales = x.abs().amax(1).clamp(min=1e-12) / FP8_MAX
        return (x / scales[:, None]).to(self.torch.float8_e4m3fn), scales

    def product(self, x, scales, w, ends):
        return self.torch._scaled_grouped_mm(
            x, w[0], scales, w[1], offs=ends, out_dtype=self.torch.bfloat16, use_fast_accum=True
        )

    def grouped(self, rows, idx, shares, _host):
        values, scales = self.rowwise(rows)
        order, token, ends, permuted = self.permute(values.view(self.torch.uint8), idx)
        permuted = permuted.view(self.torch.float8_e4m3fn)
        hidden = self.swiglu(self.product(permuted, scales[token], self.gate_up, ends))
        y = self.product(*self.rowwise(hidden), self.down, ends)
        return self.unpermute(rows, y, shares, order, token)

    def grouped_products(self, rows, idx, _shares, _host):
        _, _, ends, permuted = self.permute(rows, idx)
        x = self.rowwise(permuted)
        hidden = self.rowwise(self.swiglu(self.product(*x, self.gate_up, ends)))

        def thunk():
            self.product(*x, self.gate_up, ends)
            return self.product(*hidden, self.down, ends)

        return thunk

    def thunks(self) -> dict[str, tuple[list, list | None]]:
        whole = [functools.partial(self.grouped, *i) for i in self.inputs]
        return {"torch._scaled_grouped_mm": (whole, [self.grouped_products(*i) for i in self.inputs])}


def _jax_ffn(product: Callable[..., Any], rows, local_idx, topk_weights, gate, up, down):
    """argsort, `product` thrice, and a sum in the rows' own order."""
    k, flat = local_idx.shape[1], local_idx.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    sizes = jnp.sum(flat[:, None] == jnp.arange(len(gate)), axis=0, dtype=jnp.int32)
    permuted = rows[order // k]
    hidden = (jax.nn.silu(product(permuted, gate, sizes)) * product(permuted, up, sizes)).astype(rows.dtype)
    y = product(hidden, down, sizes)[jnp.argsort(order)].reshape(*local_idx.shape, -1)
    return jnp.sum(y.astype(jnp.float32) * topk_weights[:, :, None], axis=1)


def _ragged_dot(x, w, sizes):
    return jax.lax.ragged_dot(x, w, sizes, preferred_element_type=jnp.float32)


def _mosaic_ragged_dot(block_m: int, x, w, sizes):
    from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot

    return ragged_dot(
        x, w, group_sizes=sizes, block_m=block_m, block_n=128, block_k=64, max_concurrent_steps=4, grid_block_n=4
    )


def jax_peers(tokens: int) -> dict[str, Callable]:
    """Name to a traceable FFN of (rows, local_idx, topk_weights, gate_proj, up_proj, down_proj)."""
    found = {}
    if tokens <= 512:  # dense over every expert: at 4,096 rows it takes seconds, and its temporaries tens of GB
        found["jax.ragged_dot"] = functools.partial(_jax_ffn, _ragged_dot)
    block_m = 64 if tokens <= 512 else 128
    found[f"ragged_dot_mgpu {block_m}"] = functools.partial(_jax_ffn, functools.partial(_mosaic_ragged_dot, block_m))
    return found
