"""What the push is measured against, through torch: NCCL send/recv and all_to_all, and symmetric memory.

One process a GPU. Times are of CUDA graphs of some hops, replayed; the host takes no part. A routed case gathers its
rows by index first and moves ids and weights behind them, with row counts known to the host beforehand, for which a
real router would have to wait: that favours the peers. Every attention device meets every expert device.
"""

import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

HOPS = 16


def main(
    rank: int, sizes: tuple[int, int], coordinator: str, cases: list[dict[str, Any]], names: list[str]
) -> None:
    """Measures every case over `sizes` = (M, N) GPUs with every peer named and prints a JSON line each (rank 0)."""
    import torch
    import torch.distributed as dist

    torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group(
        "nccl", init_method=f"tcp://{coordinator}", rank=rank, world_size=sum(sizes),
        device_id=torch.device("cuda", torch.cuda.current_device()),
    )  # fmt: skip
    makers = {"nccl": _nccl, "nccl_all_to_all": _all_to_all, "symm_mem": _symm_mem}
    for case in cases:
        for name in names:
            try:
                hop = makers[name](rank, sizes, case)
                found = _time(hop, case["pattern"]) if hop is not None else None
            except Exception as error:  # one peer that fails leaves the others their turn
                found = None
                print(f"{name} {case}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr, flush=True)
            if rank == 0 and found is not None:
                print(json.dumps({"who": name, **case, "us": found}), flush=True)
    dist.destroy_process_group()


def _peers(rank: int, sizes: tuple[int, int]) -> tuple[bool, list[int]]:
    """Whether this rank plays attention, and the ranks of the other role."""
    attention = rank < sizes[0]
    return attention, list(range(sizes[0], sum(sizes)) if attention else range(sizes[0]))


def _buffers(case: dict[str, Any], num_peers: int) -> tuple[Any, Any, Callable[[Any], Any]]:
    """(what is sent, where to, a gather of the rows before each send); a block of rows a peer."""
    import torch

    rows, width = case["rows"], case["row_bytes"] + case["column_bytes"]
    send = torch.randint(0, 127, (num_peers, rows, width), dtype=torch.uint8, device="cuda")
    receive = torch.empty_like(send)
    if case["routing"] == "rows":
        return send, receive, lambda out: None
    index = torch.cat([torch.randperm(rows, device="cuda") for _ in range(num_peers)])
    source = send[0].clone().view(torch.int32)
    flat = (num_peers * rows, width // 4)
    return send, receive, lambda out: torch.index_select(source, 0, index, out=out.view(torch.int32).view(flat))


def _nccl(rank: int, sizes: tuple[int, int], case: dict[str, Any]):
    import torch.distributed as dist

    attention, peers = _peers(rank, sizes)
    send, receive, gather = _buffers(case, len(peers))

    def move(sends: bool, receives: bool) -> None:
        if sends:
            gather(send)
        given = [(dist.isend, send)] * sends + [(dist.irecv, receive)] * receives
        moves = [(act, part, peer) for act, parts in given for part, peer in zip(parts, peers, strict=True)]
        for work in dist.batch_isend_irecv([dist.P2POp(*move) for move in moves]):
            work.wait()

    return _pattern(case["pattern"], lambda forward: move(attention == forward, attention != forward),
                    lambda: move(True, True))  # fmt: skip


def _all_to_all(rank: int, sizes: tuple[int, int], case: dict[str, Any]):
    import torch.distributed as dist

    attention, peers = _peers(rank, sizes)
    send, receive, gather = _buffers(case, len(peers))
    flat_send, flat_receive = (part.view(len(peers) * case["rows"], -1) for part in (send, receive))

    def exchange(sends: bool, receives: bool) -> None:
        outward, inward = [0] * sum(sizes), [0] * sum(sizes)
        for peer in peers:
            outward[peer], inward[peer] = case["rows"] * sends, case["rows"] * receives
        if sends:
            gather(send)
        given = flat_send[: len(flat_send) * sends]
        dist.all_to_all_single(flat_receive[: len(flat_receive) * receives], given, inward, outward)

    return _pattern(case["pattern"], lambda forward: exchange(attention == forward, attention != forward),
                    lambda: exchange(True, True))  # fmt: skip


def _symm_mem(rank: int, sizes: tuple[int, int], case: dict[str, Any]):
    """A copy into each peer's memory, then a signal, which it waits for."""
    import torch.distributed as dist
    import torch.distributed._symmetric_memory as symm_mem

    attention, peers = _peers(rank, sizes)
    send, _, gather = _buffers(case, len(peers))
    place = rank if attention else rank - sizes[0]  # among its role: its block in a peer's memory
    shape = (max(sizes), *send.shape[1:])
    mine = symm_mem.empty(shape, dtype=send.dtype, device=send.device)
    handle = symm_mem.rendezvous(mine, dist.group.WORLD.group_name)  # type: ignore[union-attr]
    theirs = [handle.get_buffer(peer, shape, send.dtype)[place] for peer in peers]

    def move(sends: bool, receives: bool) -> None:
        if sends:
            gather(send)
            for part, there, peer in zip(send, theirs, peers, strict=True):
                there.copy_(part)
                handle.put_signal(peer, 0)
        for peer in peers if receives else ():
            handle.wait_signal(peer, 0)

    return _pattern(case["pattern"], lambda forward: move(attention == forward, attention != forward),
                    lambda: move(True, True))  # fmt: skip


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
