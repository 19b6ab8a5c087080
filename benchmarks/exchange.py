"""The M2N exchange between GPUs of one host, and what else moves the same bytes, in one run.

    python benchmarks/exchange.py                                   # 1 + 1 GPUs, 32 KiB to 64 MiB a pair
    python benchmarks/exchange.py --attention 1 --expert 3          # more GPUs of one host, in any ratio
    python benchmarks/exchange.py --attention 3 --expert 5 --platform cpu --sizes 32   # what CPU devices can run of it
    python benchmarks/exchange.py --sizes 128,2048 --who push,nccl  # KiB; a short run
    srun -n 2 python benchmarks/exchange.py --who nccl --coordinator HOST:PORT      # several hosts, M + N processes,
    srun -n 2 python benchmarks/exchange.py --who ppermute --coordinator HOST:PORT  # one family of peers a command

A line each: who, pattern, routing, bytes of hidden vectors that a pair needs, time of one hop, and bytes a second of
the busiest device, one way: a message's for each of its peers. `half_rtt` is half of a ping-pong, so it includes the
signal, its wait and a kernel's start; in `one_way` and `two_way` messages follow each other. Routed cases draw a top-k
on the device (uniform, or with Zipf(1) expert popularity), gather the rows of the first node of --nodes by index, and
carry expert ids and weights; plain rows carry nothing else. `sent/needed` is bytes moved over bytes of the rows that
the routing needs: a padded transport moves the worst case.

Peers that need NCCL's flags take them from the environment. NVLink multicast is never used.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any

from exchange_meeting import Guest, Host

TORCH = ("nccl", "nccl_all_to_all", "symm_mem")
XLA = ("ppermute", "all_to_all")
WHO = ("push", "push_processes", *TORCH, *XLA)
PATTERNS = ("one_way", "two_way", "half_rtt")
SIZES_KIB = (32, 128, 512, 2048, 8192, 65536)


def main() -> None:
    arguments = _parser().parse_args()
    if arguments.rank is None and "SLURM_PROCID" in os.environ and arguments.coordinator:
        arguments.rank, arguments.num_ranks = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    if arguments.rank is not None:
        _run_rank(arguments)
        return
    rows = []
    for group in _groups(_who(arguments)):
        rows += _spawn(arguments, group)
    print()
    for row in rows:
        print(_line(row, max(arguments.attention, arguments.expert)))


def _who(arguments: argparse.Namespace) -> list[str]:
    """The peers that are asked for; on CPU those that run there."""
    if arguments.who is not None:
        return arguments.who.split(",")
    return ["push", *XLA] if arguments.platform == "cpu" else list(WHO)


def _groups(who: list[str]) -> list[tuple[str, ...]]:
    """Peers that share their processes."""
    if unknown := sorted(set(who) - set(WHO)):
        raise SystemExit(f"--who: expected some of {','.join(WHO)}, got {','.join(unknown)}")
    groups = [tuple(w for w in family if w in who) for family in (("push",), ("push_processes",), TORCH, XLA)]
    return [group for group in groups if group]


def _spawn(arguments: argparse.Namespace, group: tuple[str, ...]) -> list[dict[str, Any]]:
    """Starts the processes of a group here, one a GPU (one for all with "push"); returns what they print."""
    num_ranks = 1 if group == ("push",) else arguments.attention + arguments.expert
    host = Host(num_ranks)
    command = [
        sys.executable, __file__, *sys.argv[1:], "--who", ",".join(group), "--num-ranks", str(num_ranks),
        "--coordinator", f"127.0.0.1:{_free_port()}", "--meeting", f"{host.address[0]}:{host.address[1]}",
    ]  # fmt: skip
    print(f"# {' '.join(group)}: {num_ranks} process(es)", flush=True)
    ranks = [
        subprocess.Popen([*command, "--rank", str(r)], stdout=subprocess.PIPE if r == 0 else None, text=True)
        for r in range(num_ranks)
    ]
    rows, end = [], time.monotonic() + arguments.timeout
    try:
        assert ranks[0].stdout is not None
        for line in ranks[0].stdout:
            print(line, end="", flush=True)
            if line.startswith("{"):
                rows.append(json.loads(line))
            if time.monotonic() > end:
                break
        for rank in ranks:
            rank.wait(max(1.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        print(f"# {' '.join(group)}: not done after {arguments.timeout:g} s", flush=True)
    finally:
        for rank in ranks:
            rank.kill()
    return rows


def _run_rank(arguments: argparse.Namespace) -> None:
    who = _who(arguments)
    groups = _groups(who)
    if len(groups) != 1:
        one_of = f"one of push, {','.join(TORCH)} or {','.join(XLA)}"
        raise SystemExit(f"--who: expected {one_of} a rank, got {','.join(who)}")
    [group] = groups
    cases = _cases(arguments)
    if group[0] in ("push", "push_processes"):
        _run_push(arguments, group[0], cases)
        return
    plain = [_payload(case, arguments) for case in cases]
    sizes = arguments.attention, arguments.expert
    if arguments.num_ranks != sum(sizes):
        raise SystemExit(f"expected as many ranks as --attention + --expert = {sum(sizes)}, got {arguments.num_ranks}")
    if group[0] in TORCH:
        import exchange_peers

        exchange_peers.main(arguments.rank, sizes, arguments.coordinator, plain, list(group))
    else:
        import exchange_permute

        exchange_permute.main(arguments.rank, sizes, arguments.coordinator, plain, list(group), arguments.platform)


def _run_push(arguments: argparse.Namespace, who: str, cases: list[Any]) -> None:
    """All devices in this process, or one of them."""
    import concurrent.futures

    from exchange_push import PushCase

    from jmoe.serving.executors.inline import start_jax
    from jmoe.sharding.mailboxes import Mailboxes
    from jmoe.sharding.mesh_config import MeshConfig

    mesh = MeshConfig(arguments.attention, arguments.expert, num_micro_batches=3)
    devices = list(enumerate(start_jax(arguments.platform, mesh.num_devices)[: mesh.num_devices]))
    if who == "push_processes":
        devices = [devices[arguments.rank]]
    guest = Guest(arguments.rank, _address(arguments.meeting))
    built = [PushCase(case, mesh, devices) for case in cases]
    with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        list(pool.map(PushCase.compile, built))
    mailboxes = Mailboxes(mesh, devices, max(case.slot_bytes for case in built), deadline_s=arguments.deadline)
    handles = guest.gather({str(i): handle.decode() for i, handle in mailboxes.handles().items()})
    mailboxes.connect({int(i): text.encode() for part in handles for i, text in part.items()})
    for case in built:
        found = case.measure(mailboxes, guest.gather)
        rows = guest.gather({"rows": case.rows_sent(), "wrong": found["wrong"]})
        wrong = [w for part in rows for w in part["wrong"]]
        if arguments.rank == 0:
            most = max(n for part in rows for n in part["rows"])
            row = {"who": who, **_payload(case.case, arguments, most), "us": found["us"], "least_us": found["least_us"]}
            print(json.dumps(row | {"sent_over_needed": 1.0, "wrong": wrong}), flush=True)
    guest.gather()
    mailboxes.close()


def _payload(case: Any, arguments: argparse.Namespace, rows: int | None = None) -> dict[str, Any]:
    """A case in plain numbers: the rows of a pair that are needed, and their bytes."""
    rows = rows if rows is not None else max(1, case.size // case.row_bytes)
    return {
        "pattern": case.pattern, "routing": case.routing, "size": case.size, "rows": rows,
        "row_bytes": case.row_bytes, "column_bytes": case.column_bytes, "tokens": case.tokens,
        # What a transport that pads to the worst case moves: every token's row, whoever needs it.
        "sent_over_needed": case.tokens / rows if set(_who(arguments)) & set(XLA) else 1.0,
    }  # fmt: skip


def _cases(arguments: argparse.Namespace) -> list[Any]:
    from exchange_push import Case

    return [
        Case(
            pattern,
            int(size) * 1024,
            routing,
            arguments.hidden,
            arguments.experts,
            arguments.top_k,
            arguments.nodes,
            arguments.dtype,
        )
        for routing in arguments.routing.split(",")
        for pattern in arguments.patterns.split(",")
        for size in arguments.sizes.split(",")
    ]


def _line(row: dict[str, Any], most_peers: int) -> str:
    moved = row["rows"] * row["row_bytes"] * most_peers
    text = f"{row['who']:16s} {row['pattern']:9s} {row['routing']:8s} {row['size'] // 1024:6d} KiB {row['us']:8.2f} us"
    text += f" {moved / row['us'] / 1e3:7.1f} GB/s  sent/needed {row['sent_over_needed']:.2f}"
    return text + ("".join(f"  WRONG: {w}" for w in row.get("wrong", ())))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attention", type=int, default=1, help="M, attention devices")
    parser.add_argument("--expert", type=int, default=1, help="N, expert devices")
    parser.add_argument("--platform", choices=["gpu", "cpu"], default="gpu")
    parser.add_argument("--who", help=f"some of {','.join(WHO)}; all that the platform can run if not given")
    parser.add_argument("--patterns", default=",".join(PATTERNS))
    parser.add_argument("--routing", default="rows,uniform,zipf")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES_KIB)), help="KiB of hidden vectors a pair")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--dtype", default="bfloat16", help="of rows: bfloat16, or float8_e4m3fn with a scale a row")
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--nodes", type=int, default=8, help="nodes that the experts stand on")
    parser.add_argument("--deadline", type=float, default=5.0, help="seconds that a kernel waits for its peer")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for each group of processes")
    parser.add_argument("--coordinator", help="HOST:PORT of rank 0 (torch, jax.distributed), for runs on several hosts")
    parser.add_argument("--rank", type=int, help="this process's rank; SLURM_PROCID if not given")
    parser.add_argument("--num-ranks", type=int, default=2)
    parser.add_argument("--meeting", default="127.0.0.1:0", help=argparse.SUPPRESS)
    return parser


def _address(text: str) -> tuple[str, int]:
    host, port = text.rsplit(":", 1)
    return host, int(port)


def _free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


if __name__ == "__main__":
    main()
