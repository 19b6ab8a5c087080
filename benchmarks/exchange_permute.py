"""What XLA's own collectives take for the same exchange: lax.ppermute and lax.all_to_all, one process a device.

`ppermute` is jmoe's portable transport without its message: a permute a round, every attention device with every expert
device, each message as large as the worst case. `all_to_all` moves a part of that size between any two devices.
"""

import concurrent.futures
import functools
import json
import statistics
import time
from typing import Any

HOPS = 32


def main(
    rank: int, sizes: tuple[int, int], coordinator: str, cases: list[dict[str, Any]], names: list[str], platform: str
) -> None:
    """Measures every case over `sizes` = (M, N) devices and prints a JSON line each (rank 0)."""
    import jax

    if platform == "cpu":
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 1)
    if sum(sizes) > 1:
        local = [rank % _local_gpus()] if platform == "gpu" else None
        jax.distributed.initialize(coordinator, sum(sizes), rank, local_device_ids=local)
    runs = [(name, case) for case in cases for name in names if name == "ppermute" or case["pattern"] == "two_way"]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:  # one after another: ranks must compile in one order
        programs = list(pool.map(lambda run: _compile(*run, sizes), runs))
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


def _compile(name: str, case: dict[str, Any], sizes: tuple[int, int]) -> tuple[Any, Any]:
    """A jitted loop of HOPS hops over the joint mesh, and its input: an array a round."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from jmoe.sharding.mesh_config import MeshConfig
    from jmoe.sharding.rounds import build_rounds

    devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
    rounds = build_rounds(MeshConfig(*sizes, num_micro_batches=3)).pairs
    words = case["tokens"] * (case["row_bytes"] + case["column_bytes"]) // 4

    def hop(i: int, x: list[Any]) -> list[Any]:
        if name == "all_to_all":
            return [jax.lax.all_to_all(part, "d", 0, 0, tiled=True) for part in x]
        sent = []
        for part, out in zip(x, rounds, strict=True):
            back = [(e, a) for a, e in out]
            pairs = {"two_way": [*out, *back], "one_way": out, "half_rtt": back if i % 2 else out}[case["pattern"]]
            sent.append(jax.lax.ppermute(part, "d", pairs))
        return sent

    def run(x: list[Any]) -> list[Any]:
        def turn(_: Any, x: list[Any]) -> list[Any]:
            return functools.reduce(lambda x, i: hop(i, x), range(8), x)

        return jax.lax.fori_loop(0, HOPS // 8, turn, x)

    mesh = Mesh(np.array(devices), ("d",))
    spec = PartitionSpec("d")
    # An all_to_all has a part for every device, its own and those of its own role among them.
    shapes = [len(devices) * words * len(devices)] if name == "all_to_all" else [len(devices) * words] * len(rounds)
    place = NamedSharding(mesh, spec)
    x = jax.jit(lambda: [jnp.ones((size,), jnp.int32) for size in shapes], out_shardings=place)()
    program = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(spec,), out_specs=spec, check_vma=False))
    return program.lower(x).compile(), x
