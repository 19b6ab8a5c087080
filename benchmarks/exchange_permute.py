"""What XLA's own collectives take for the same exchange: lax.ppermute and lax.all_to_all, one process a GPU."""

import concurrent.futures
import functools
import json
import statistics
import time
from typing import Any

HOPS = 32


def main(rank: int, num_ranks: int, coordinator: str, cases: list[dict[str, Any]], names: list[str]) -> None:
    """Measures every case and prints a JSON line each (rank 0)."""
    import jax

    if num_ranks > 1:
        local = [rank % _local_gpus()]
        jax.distributed.initialize(coordinator, num_ranks, rank, local_device_ids=local)
    runs = [(name, case) for case in cases for name in names if name == "ppermute" or case["pattern"] == "two_way"]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:  # one after another: ranks must compile in one order
        programs = list(pool.map(lambda run: _compile(*run), runs))
    for (name, case), (program, x) in zip(runs, programs, strict=True):
        times = []
        for _ in range(6):
            begin = time.perf_counter()
            jax.block_until_ready(program(x))
            times.append((time.perf_counter() - begin) / HOPS)
        if rank == 0:
            print(json.dumps({"who": name, **case, "us": statistics.median(times[1:]) * 1e6}), flush=True)


def _local_gpus() -> int:
    import glob

    return max(1, len(glob.glob("/dev/nvidia[0-9]*")))


def _compile(name: str, case: dict[str, Any]) -> tuple[Any, Any]:
    """A jitted loop of HOPS hops over the joint mesh, and its input."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    devices = jax.devices()
    half, words = len(devices) // 2, case["rows"] * (case["row_bytes"] + case["column_bytes"]) // 4
    out = [(i, i + half) for i in range(half)]
    back = [(e, a) for a, e in out]

    def hop(i: int, x: Any) -> Any:
        if name == "all_to_all":
            return jax.lax.all_to_all(x, "d", 0, 0, tiled=True)
        pairs = {"two_way": out + back, "one_way": out, "half_rtt": back if i % 2 else out}[case["pattern"]]
        return jax.lax.ppermute(x, "d", pairs)

    def run(x: Any) -> Any:
        def turn(_: Any, x: Any) -> Any:
            return functools.reduce(lambda x, i: hop(i, x), range(8), x)

        return jax.lax.fori_loop(0, HOPS // 8, turn, x)

    mesh = Mesh(np.array(devices), ("d",))
    spec = PartitionSpec("d")
    words *= len(devices) if name == "all_to_all" else 1  # a part for every device, its own among them
    place = NamedSharding(mesh, spec)
    x = jax.jit(lambda: jnp.ones((len(devices) * words,), jnp.int32), out_shardings=place)()
    program = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    return program.lower(x).compile(), x
