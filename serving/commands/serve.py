"""`jmoe serve`: a checkpoint behind gRPC. No JAX on import."""

import argparse
import asyncio
import os
import sys
import threading

from jmoe.serving.commands.options import UsageError, add_cell_options, cell_sizes, choose_platform, mesh_config
from jmoe.serving.commands.worker_options import add_worker_options, process_options
from jmoe.serving.grpc_config import GrpcConfig
from jmoe.serving.grpc_server import LOADING_THREAD, run_grpc
from jmoe.serving.progress import Progress
from jmoe.serving.server import Server, serve


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `jmoe serve` to a parser."""
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face checkpoint folder")
    add_cell_options(parser)
    add_worker_options(parser)
    network = parser.add_argument_group("network")
    network.add_argument("--host", default="127.0.0.1", help="where to listen (default: this machine only)")
    network.add_argument("--port", type=int, default=50051, help="0 lets the system choose (default 50051)")
    network.add_argument("--tls-cert", metavar="FILE", help="PEM certificate chain")
    network.add_argument("--tls-key", metavar="FILE", help="PEM private key")
    network.add_argument("--grace-s", type=float, default=30.0, help="for running requests after SIGTERM (default 30)")
    network.add_argument("--max-waiting", type=int, default=256, help="requests that may wait for a slot (default 256)")
    network.add_argument(
        "--max-prefill-tokens", type=int, metavar="TOKENS",
        help="prompt tokens that may be computed between two decode calls (default: one prefill call)",
    )  # fmt: skip
    network.add_argument(
        "--programs", choices=("all", "greedy", "none"), default="all", help="what to compile before serving"
    )


def run(args: argparse.Namespace) -> int:
    """Serves until a signal (0) or a failure (raises)."""
    try:
        config = GrpcConfig(args.host, args.port, args.tls_cert, args.tls_key, grace_s=args.grace_s)
    except ValueError as error:
        raise UsageError(str(error)) from error
    mesh, sizes, processes = mesh_config(args), cell_sizes(args), process_options(args)
    choose_platform(args)
    if config.warning:
        print(config.warning, file=sys.stderr, flush=True)
    with Progress() as progress:

        def load() -> Server:
            return serve(
                args.model,
                mesh,
                executor=args.executor,
                programs=args.programs,
                max_waiting=args.max_waiting,
                max_prefill_tokens=args.max_prefill_tokens,
                progress=progress,
                sizes=sizes,
                processes=processes,
                compile_cache=args.compile_cache,
            )

        def say(line: str) -> None:
            progress.close()
            print(line, flush=True)

        code = asyncio.run(run_grpc(config, load, say))
    if any(thread.name == LOADING_THREAD and thread.is_alive() for thread in threading.enumerate()):
        # A compiler that runs in another thread can't be stopped, and would be torn down under its feet.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
