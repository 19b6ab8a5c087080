"""Where a colocated decode step's time goes: each stage timed alone, and how many experts the router really drew."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.cell_runtime import CellRuntime
from jmoe.colocated import Colocated
from jmoe.decode_batch import decode_batch
from jmoe.decode_loop import DeviceState
from jmoe.decoder_layer import decoder_layer
from jmoe.layer_program import run_layer
from jmoe.models.attention import AttentionHalf
from jmoe.models.experts import ExpertHalf
from jmoe.models.model import take_from
from jmoe.role_programs import AttentionRole, ExpertRole
from jmoe.rows import Rows
from jmoe.sharding.shared_devices import SharedDevices
from jmoe.step_inputs import StepLayout


@dataclasses.dataclass(frozen=True, slots=True)
class ColocatedTimes:
    """Seconds of one stage of one micro-batch: attention up to the router, experts of one layer; the head a step."""

    attention_s: float
    experts_s: float
    head_s: float


class ColocatedTimer:
    """Times the stages of a colocated cell's decode step on loaded weights.

    A stage runs for every MoE layer in a chain of data inside one call, so that weights come from memory and not from a
    cache; a call of one layer is taken off, which leaves the launch out.

    Args:
      runtime: with role "colocated" and weights loaded.
      context: tokens that each row's pages hold.
      repeats: timed calls; the median counts.
      around: makes a context manager that the device work stands in (a lock, where several programs share a GPU).
    """

    def __init__(self, runtime: CellRuntime, context: int, repeats: int = 5, around: Callable[[], Any] | None = None):
        self.runtime = runtime
        self.cell = runtime.cell
        self._repeats = repeats
        self._around = around or nullcontext
        self._batch = decode_batch(self.cell, context).array
        self._layout = StepLayout.of(self.cell, "decode")

    def stages(self) -> ColocatedTimes:
        """Every stage; the programs compile side by side."""
        many = len(self.cell.model.moe_layers)
        counts = {"attention": (1, many), "experts": (1, many), "head": (1, 5)}
        functions = {
            (name, n): functools.partial(getattr(self, f"_{name}"), n) for name, ns in counts.items() for n in ns
        }
        calls = self._compile(functions)
        found = {}
        for name, (few, more) in counts.items():
            if few == more:  # a model of one MoE layer has no slope: the launch stays in
                found[f"{name}_s"] = self._median_s(calls[name, few])
                continue
            seconds = self._median_s(calls[name, more]) - self._median_s(calls[name, few])
            found[f"{name}_s"] = max(seconds, 1e-9) / (more - few)  # positive: on a noisy host a short stage drowns
        return ColocatedTimes(**found)

    def compile_active_experts(self, num_steps: int) -> Callable[[], np.ndarray]:
        """Compiles a decode that counts experts which got a row, in steps as decode takes them.

        Returns:
          What runs it: `[num_steps, MoE layers]`, the mean over devices.
        """
        call = self._compile({"active": functools.partial(self._active, num_steps)})["active"]

        def run() -> np.ndarray:
            with self._around():
                counts = jax.block_until_ready(call())
            return np.mean([np.asarray(shard.data)[0] for shard in counts.addressable_shards], axis=0)

        return run

    def fill_pages(self) -> None:
        """Random keys and values into every page: zeros draw less power and run faster than what a server reads."""

        def fill(params, experts, state: DeviceState, inputs):
            del params, experts
            pages = state.pages or []
            drawn = jax.random.normal(jax.random.key(0), pages[0][0].shape, pages[0][0].dtype)
            # One draw, rolled by pages: a draw for each of them would take half a minute to compile.
            pages = [tuple(jnp.roll(drawn, 2 * n + i, axis=0) for i in range(2)) for n in range(len(pages))]
            return dataclasses.replace(state, pages=pages), inputs.max()

        self._compile({"fill": fill})["fill"]()

    def _compile(self, functions: dict[Any, Callable]) -> dict[Any, Callable[[], Any]]:
        with ThreadPoolExecutor(len(functions)) as pool:
            compiled = pool.map(lambda function: self.runtime.measure(function, self._batch), functions.values())
            return dict(zip(functions, compiled, strict=True))

    def _median_s(self, call: Callable[[], Any]) -> float:
        times = []
        with self._around():
            jax.block_until_ready(call())
            for _ in range(self._repeats):
                start = time.perf_counter()
                jax.block_until_ready(call())
                times.append(time.perf_counter() - start)
        return statistics.median(times)

    def _role(self, params) -> AttentionRole:
        return AttentionRole(self.cell, AttentionHalf(self.cell.model, take_from(params)), None)

    def _experts_role(self, experts) -> ExpertRole:
        return ExpertRole(self.cell, ExpertHalf(self.cell.model, take_from(experts)), None)

    def _modules(self, role: AttentionRole, count: int):
        return [(j, role.half.layers[layer]) for j, layer in enumerate(self.cell.model.moe_layers[:count])]

    def _attention(self, count: int, params, experts, state: DeviceState, inputs):
        role, rows, pages = self._role(params), Rows.unpack(inputs[0], self._layout), list(state.pages or [])
        x = role.embed(rows)
        for j, module in self._modules(role, count):
            layer = self.cell.model.moe_layers[j]
            x, pages[layer], chosen = run_layer(decoder_layer, self.cell, module, x, None, pages[layer], rows, ())
            assert chosen is not None
            x = jax.lax.optimization_barrier(x + chosen.topk_weights[:, :1].astype(x.dtype))
        return dataclasses.replace(state, pages=pages), x

    def _experts(self, count: int, params, experts, state: DeviceState, inputs):
        role, expert = self._role(params), self._experts_role(experts)
        x, rows = role.embed(Rows.unpack(inputs[0], self._layout)), Rows.unpack(inputs[0], self._layout)
        devices = SharedDevices.of(self.cell.mesh, self.cell.model.hidden_size)
        unknown = (inputs.max() < -1).astype(jnp.int32)  # 0, but only at run time
        for j in range(count):
            topk_idx = jnp.asarray(_drawn(self.cell.model, len(x), j)) + unknown
            weights = jnp.full(topk_idx.shape, 1 / topk_idx.shape[1]) + unknown
            sent = devices.dispatch(x, topk_idx, weights, rows.valid.reshape(-1), rows.positions.reshape(-1))
            sums = devices.combine(expert.partial_sums(j, *sent), x.dtype)
            x = jax.lax.optimization_barrier(x + sums.astype(x.dtype))
        return state, x

    def _head(self, count: int, params, experts, state: DeviceState, inputs):
        role = self._role(params)
        x = role.embed(Rows.unpack(inputs[0], self._layout))
        for _ in range(count):
            x = jax.lax.optimization_barrier(x + role.greedy_tokens(x)[:, None].astype(x.dtype))
        return state, x

    def _active(self, num_steps: int, params, experts, state: DeviceState, inputs):
        role, seen = self._role(params), []
        devices = SharedDevices.of(self.cell.mesh, self.cell.model.hidden_size)
        cast = Colocated(role, self._experts_role(experts), devices, watch=seen.append)
        num_experts = self.cell.model.num_experts

        def step(k, carry):
            rows, pages, counts = carry
            seen.clear()
            lanes, pages = cast.walk(rows, pages)
            now = [jnp.zeros(num_experts, bool).at[chosen.topk_idx.reshape(-1)].set(True).sum() for chosen in seen]
            heads = [role.greedy_tokens(role.last_hidden(*pair)) for pair in zip(lanes, rows, strict=True)]
            rows = [row.advance(token_ids) for row, token_ids in zip(rows, heads, strict=True)]
            return rows, pages, counts.at[k].set(jnp.stack(now).reshape(-1, len(rows)).mean(axis=1))

        rows = [Rows.unpack(packed, self._layout) for packed in inputs]
        counts = jnp.zeros((num_steps, len(self.cell.model.moe_layers)))
        _, pages, counts = jax.lax.fori_loop(0, num_steps, step, (rows, list(state.pages or []), counts))
        return dataclasses.replace(state, pages=pages), counts


def _drawn(model, tokens: int, seed: int) -> np.ndarray:
    """Uniform random routing: `[tokens, k]` int32."""
    order = np.argsort(np.random.default_rng(seed).random((tokens, model.num_experts)), axis=1)
    return order[:, : model.num_experts_per_tok].astype(np.int32)
