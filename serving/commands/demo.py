"""`jmoe demo`: a small real model on two meshes of CPU devices, from download to an answer. No JAX on import."""

import argparse
import os

from jmoe.serving.commands.options import add_compile_cache_option, add_sampling_options, sampling_params
from jmoe.serving.commands.print_stream import print_stream
from jmoe.serving.progress import Progress
from jmoe.serving.server import serve
from jmoe.serving.sizes import CellSizes
from jmoe.sharding.mesh_config import MeshConfig

QUESTION = "What is the capital of France?"
# One request at a time: a second micro-batch would stand idle, and the compile grows with layers times micro-batches
# (two cores, 30 layers: 95 s of a first start with two).
_MESH = MeshConfig(attention=1, expert=1, num_micro_batches=1)
_SIZES = CellSizes(rows=1, chunk_len=32, num_steps=4, max_len=512, dtype="float32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `jmoe demo` to a parser."""
    parser.add_argument("prompt", nargs="?", default=QUESTION, metavar="PROMPT", help=f"default: {QUESTION!r}")
    add_sampling_options(parser, max_tokens=100)
    add_compile_cache_option(parser)


def run(args: argparse.Namespace) -> int:
    """Fetches and converts the model if need be, serves it, streams the answer to stdout, ends with a clear line."""
    from jmoe.checkpoints.demo_model import ensure_demo_model  # numpy and gguf only when they are needed

    params = sampling_params(args)
    os.environ["JAX_PLATFORMS"] = "cpu"
    programs = "all" if params.needs_sampling else "greedy"
    with Progress() as progress:
        model = ensure_demo_model(progress.report)
        with serve(
            model,
            _MESH,
            executor="inline",
            programs=programs,
            progress=progress,
            sizes=_SIZES,
            compile_cache=args.compile_cache,
        ) as server:
            progress.close()
            with server.stream([{"role": "user", "content": args.prompt}], params) as outputs:
                summary = print_stream(outputs)
            cell = server.cell
            print(
                f"jmoe demo: {summary}; {cell.model.num_layers} layers of {cell.model.num_experts} experts, attention "
                f"on {_MESH.num_attention_devices} CPU device, experts on {_MESH.num_expert_devices}"
            )
    return 0
