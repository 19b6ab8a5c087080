"""What the push is measured against, through torch: NCCL send/recv and all_to_all, and symmetric memory.

One process a GPU. Times are of CUDA graphs of some hops, replayed; the host takes no part. A routed case gathers its
rows by index first and moves ids and weights behind them, with row counts known to the host beforehand, for which a
real router would have to wait: that favours the peers.
"""

import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

HOPS = 16


def main(rank: int, num_ranks: int, coordinator: str, cases: list[dict[str, Any]], names: list[str]) -> None:
    """Measures every case with every peer named and prints a JSON line each (rank 0)."""
    import torch
    import torch.distributed as dist

    torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group(
        "nccl", init_method=f"tcp://{coordinator}", rank=rank, world_size=num_ranks,
        device_id=torch.device("cuda", torch.cuda.current_device()),
    )  # fmt: skip
    makers = {"nccl": _nccl, "nccl_all_to_all": _all_to_all, "symm_mem": _symm_mem}
    for case in cases:
        for name in names:
            try:
                hop = makers[name](rank, num_ranks, case)
                found = _time(hop, case["pattern"]) if hop is not None else None
            except Exception as error:  # one peer that fails leaves the others their turn
                found = None
                print(f"{name} {case}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr, flush=True)
            if rank == 0 and found is not None:
                print(json.dumps({"who": name, **case, "us": found}), flush=True)
    dist.destroy_process_group()


def _buffers(case: dict[str, Any]) -> tuple[Any, Any, Callable[[Any], Any]]:
    """(what is sent, where to, a gather of the rows before each send)."""
    import torch

    rows, width = case["rows"], case["row_bytes"]
    send = torch.randint(0, 127, (rows, width + case["column_bytes"]), dtype=torch.uint8, device="cuda")
    receive = torch.empty_like(send)
    if case["routing"] == "rows":
        return send, receive, lambda out: None
    index = torch.randperm(rows, device="cuda")
    source = send.clone().view(torch.int32)
    return send, receive, lambda out: torch.index_select(source, 0, index, out=out.view(torch.int32))


def _nccl(rank: int, num_ranks: int, case: dict[str, Any]):
    import torch.distributed as dist

    send, receive, gather = _buffers(case)
    other = (rank + num_ranks // 2) % num_ranks
    attention = rank < num_ranks // 2

    def one(forward: bool) -> None:
        if attention == forward:
            gather(send)
            dist.send(send, other)
        else:
            dist.recv(receive, other)

    def both() -> None:
        gather(send)
        work = dist.batch_isend_irecv([dist.P2POp(dist.isend, send, other), dist.P2POp(dist.irecv, receive, other)])
        for part in work:
            part.wait()

    return _pattern(case["pattern"], one, both)


def _all_to_all(rank: int, num_ranks: int, case: dict[str, Any]):
    import torch.distributed as dist

    send, receive, gather = _buffers(case)
    other, attention = (rank + num_ranks // 2) % num_ranks, rank < num_ranks // 2

    def exchange(sends: bool, receives: bool) -> None:
        outward, inward = [0] * num_ranks, [0] * num_ranks
        outward[other], inward[other] = len(send) * sends, len(send) * receives
        if sends:
            gather(send)
        dist.all_to_all_single(receive[: len(send) * receives], send[: len(send) * sends], inward, outward)

    return _pattern(case["pattern"], lambda forward: exchange(attention == forward, attention != forward),
                    lambda: exchange(True, True))  # fmt: skip


def _symm_mem(rank: int, num_ranks: int, case: dict[str, Any]):
    """A copy into the peer's memory, then a signal, which it waits for."""
    import torch.distributed as dist
    import torch.distributed._symmetric_memory as symm_mem

    send, _, gather = _buffers(case)
    other, attention = (rank + num_ranks // 2) % num_ranks, rank < num_ranks // 2
    mine = symm_mem.empty(send.numel(), dtype=send.dtype, device=send.device)
    handle = symm_mem.rendezvous(mine, dist.group.WORLD.group_name)  # type: ignore[union-attr]
    theirs = handle.get_buffer(other, send.shape, send.dtype)

    def put() -> None:
        gather(send)
        theirs.copy_(send)
        handle.put_signal(other, 0)

    def one(forward: bool) -> None:
        if attention == forward:
            put()
        else:
            handle.wait_signal(other, 0)

    def both() -> None:
        put()
        handle.wait_signal(other, 0)

    return _pattern(case["pattern"], one, both)


def _pattern(pattern: str, one: Callable[[bool], None], both: Callable[[], None]) -> Callable[[], None]:
    """One hop; a ping-pong's counts as two."""
    if pattern == "two_way":
        return both
    if pattern == "one_way":
        return lambda: one(True)

    def there_and_back() -> None:
        one(True)
        one(False)

    return there_and_back


def _time(hop: Callable[[], None], pattern: str) -> float:
    """The median of replays of a graph of HOPS hops, in us a hop."""
    import torch
    import torch.distributed as dist

    for _ in range(2):
        hop()
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(HOPS):
            hop()
    times = []
    for _ in range(8):
        dist.barrier()
        torch.cuda.synchronize()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / (2 * HOPS * (2 if pattern == "half_rtt" else 1)))
    return statistics.median(times[2:])
