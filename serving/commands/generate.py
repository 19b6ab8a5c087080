"""`jmoe generate`: one prompt, in this process or at a running server; the answer is streamed. No JAX on import."""

import argparse
import sys

from jmoe.serving.commands.options import (
    UsageError,
    add_cell_options,
    add_sampling_options,
    cell_sizes,
    choose_platform,
    mesh_config,
    sampling_params,
)
from jmoe.serving.commands.print_stream import print_stream
from jmoe.serving.commands.worker_options import add_worker_options, process_options
from jmoe.serving.grpc_client import Client
from jmoe.serving.progress import Progress
from jmoe.serving.prompts import Prompt
from jmoe.serving.server import serve

MAX_PROMPT_CHARS = 4 * 1024 * 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `jmoe generate` to a parser."""
    parser.add_argument(
        "words", nargs="+", metavar="[MODEL] PROMPT", help="with --address PROMPT only; '-' reads stdin"
    )
    parser.add_argument("--address", metavar="HOST:PORT", help="ask a running `jmoe serve` instead of loading MODEL")
    parser.add_argument(
        "--tls-ca", metavar="FILE", help="PEM file of the authority that signed the server's certificate"
    )
    parser.add_argument("--timeout-s", type=float, default=600.0, help="longest wait (default 600)")
    parser.add_argument("--chat", action="store_true", help="PROMPT is a user's message, through the chat template")
    add_sampling_options(parser)
    add_cell_options(parser)
    add_worker_options(parser)


def run(args: argparse.Namespace) -> int:
    """Streams the answer to stdout and ends with a line on stderr."""
    expected = 1 if args.address else 2
    if len(args.words) != expected:
        form = "PROMPT beside --address" if args.address else "MODEL PROMPT"
        raise UsageError(f"expected {form}, got {len(args.words)} words (quote the prompt)")
    text = sys.stdin.read(MAX_PROMPT_CHARS) if args.words[-1] == "-" else args.words[-1]
    prompt: Prompt = [{"role": "user", "content": text}] if args.chat else text
    params = sampling_params(args)
    if args.address:
        with (
            Client(args.address, tls_ca=args.tls_ca, timeout_s=args.timeout_s) as client,
            client.stream(prompt, params) as outputs,
        ):
            summary = print_stream(outputs)
    else:
        mesh, sizes, processes = mesh_config(args), cell_sizes(args, rows=1), process_options(args)
        choose_platform(args)
        programs = "all" if params.needs_sampling else "greedy"
        with (
            Progress() as progress,
            serve(
                args.words[0],
                mesh,
                executor=args.executor,
                programs=programs,
                progress=progress,
                sizes=sizes,
                processes=processes,
                compile_cache=args.compile_cache,
            ) as server,
        ):
            progress.close()
            with server.stream(prompt, params, timeout_s=args.timeout_s) as outputs:
                summary = print_stream(outputs)
    print(f"jmoe generate: {summary}", file=sys.stderr)
    return 0
