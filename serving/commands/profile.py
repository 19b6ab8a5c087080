"""`jmoe profile`: measure this host's GPUs for the planner. Starts JAX in this process."""

import argparse
import pathlib
import sys

from jmoe.config import ModelConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `jmoe profile` takes."""
    parser.add_argument("model", help="a folder with a Hugging Face config.json; weights are not needed")
    parser.add_argument("--gpu", required=True, help="the planner's name for these GPUs, e.g. h200")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("profile.json"))
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 64, 256], help="requests of one micro-batch")
    parser.add_argument("--context", type=int, nargs="+", default=[256, 1024, 4096], help="KV tokens of each request")
    parser.add_argument("--local-experts", type=int, nargs="+", help="experts of one node (default all, and a quarter)")
    parser.add_argument("--layers", type=int, default=4, help="layers that are timed together")


def run(args: argparse.Namespace) -> int:
    """Measures, writes the file and says where."""
    from jmoe.planner.model_shape import load_model_shape
    from jmoe.planner.profile_file import profile_to_json
    from jmoe.profiling import ProfileGrid, measure_profile
    from jmoe.serving.executors.create import detect_platform
    from jmoe.serving.executors.inline import start_jax

    model = ModelConfig.from_hf(args.model)
    experts = args.local_experts or sorted({max(1, model.num_experts // 4), model.num_experts})
    if bad := [e for e in experts if not 1 <= e <= model.num_experts]:
        raise ValueError(f"--local-experts: expected 1 to {model.num_experts} (the model's), got {bad}")
    if args.layers < 2:
        raise ValueError(f"--layers: expected at least 2, got {args.layers}")
    grid = ProfileGrid(sorted(set(args.rows)), sorted(set(args.context)), sorted(set(experts)), args.layers)
    start_jax(detect_platform(), 2)
    name = load_model_shape(args.model).name  # as `jmoe plan` will call it
    profile = measure_profile(model, name, args.gpu, grid, lambda line: print(line, file=sys.stderr, flush=True))
    args.out.write_text(profile_to_json(profile))
    print(f"jmoe profile: {profile.device}, {args.out} written; use it with `jmoe plan --profile {args.out}`")
    return 0
