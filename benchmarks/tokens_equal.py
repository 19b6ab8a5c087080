"""Greedy tokens of `jmoe.serve` over any meshes against the float32 reference: are they the same?

    python benchmarks/tokens_equal.py --ratios 1:1                              # two GPUs
    python benchmarks/tokens_equal.py --ratios 1:3 3:1 2:2 --replicate 2        # four, two experts on two nodes each
    python benchmarks/tokens_equal.py --ratios 2:2 --tensor 2:1 --experts 8     # attention tensor parallel
    python benchmarks/tokens_equal.py --ratios 1:3 3:1 2:2 --platform cpu       # the same on CPU devices

A small random model (6 experts, which four nodes don't divide) is made, saved and served, each case in a process of its
own: some prompts at once, twice. On CPU, in float32, every token must be the reference's. On GPUs, in bf16, each choice
must be within 2^-6 of the reference's best logit behind the same tokens. Both times must agree bit for bit.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from jmoe.config import ModelConfig
from jmoe.sharding.mesh_config import MeshConfig
from jmoe.sharding.placement import ExpertPlacement

TOLERANCE = 2.0**-6  # of the reference's best logit: docs/numerics.md
PROMPT_LENS = (5, 19, 11, 8, 3, 26, 14)
MAX_LEN = 64
HEADER = f"{'M:N':>5} {'tensor':>6} {'executor':>9} {'transport':>9} {'experts a node':>16} {'tokens':>6} {'equal':>6} "
HEADER += f"{'allowed':>7} {'repeats':>7} {'s':>5}"


def model_of(args: argparse.Namespace) -> ModelConfig:
    """A dense layer between MoE layers, grouped heads; sizes that kernels for Hopper take."""
    return ModelConfig(
        "qwen3_moe", 1031, 256, 3, 8, 4, 64, args.experts, 3, 192, dense_layers=(1,), dense_ffn_size=256, qk_norm=True,
        dtype="float32" if args.platform == "cpu" else "bfloat16",
    )  # fmt: skip


def placement_of(args: argparse.Namespace, num_nodes: int) -> ExpertPlacement:
    """Balanced, with the first `--replicate` experts on one node more each."""
    nodes = [list(node) for node in ExpertPlacement.balanced(args.experts, num_nodes).nodes]
    if num_nodes > 1:
        for expert in range(min(args.replicate, args.experts)):
            home = next(n for n, node in enumerate(nodes) if expert in node)
            nodes[(home + 1) % num_nodes].append(expert)
    return ExpertPlacement.of(nodes)


def mesh_of(args: argparse.Namespace, ratio: str) -> MeshConfig:
    """The cell of a ratio "M:N"."""
    attention, expert, attention_tensor, expert_tensor = map(int, f"{ratio}:{args.tensor}".split(":"))
    return MeshConfig(
        attention, expert, args.micro_batches, attention_tensor=attention_tensor, expert_tensor=expert_tensor,
        placement=placement_of(args, expert), transport=args.transport,
    )  # fmt: skip


def save_model(folder: str, config: ModelConfig) -> None:
    """Saves a random model."""
    from flax import nnx

    from jmoe.checkpoints.save import save_hf
    from jmoe.models.model import Model

    model = Model(config, nnx.Rngs(0))
    # Residual branches of 0.3 of the stream, as trained models have them: at 1 a near tie in the router, which bf16
    # breaks either way, moves the logits by more than the tolerance, and the comparison would measure luck.
    for layer in model.attention.layers:
        layer.o_proj[...] = layer.o_proj[...] * 0.3
    for layer in model.experts.layers:
        layer.down_proj[...] = layer.down_proj[...] * 0.3
    save_hf(folder, config, *model.arrays_by_path())


def reference_of(folder: str) -> Callable[[list[int]], np.ndarray]:
    """tokens -> logits `[len(tokens), vocab]` of the saved model, in float32 on one device."""
    import jax
    import jax.numpy as jnp

    from jmoe.checkpoints.load import CheckpointReader
    from jmoe.models.model import Model, array_specs, reference_forward

    config = dataclasses.replace(ModelConfig.from_hf(folder), dtype="float32")
    reader = CheckpointReader(folder, config)
    parts = zip(("attention", "expert"), array_specs(config), strict=True)
    arrays = [{path: jnp.asarray(reader.read(role, path)) for path in specs} for role, specs in parts]
    model = Model.from_arrays(config, *arrays)
    forward = jax.jit(lambda tokens: reference_forward(model, tokens)[0])

    def logits(tokens: list[int]) -> np.ndarray:
        padded = np.zeros((1, MAX_LEN), np.int32)  # what stands behind changes nothing: attention is causal
        padded[0, : len(tokens)] = tokens
        return np.asarray(forward(padded))[0, : len(tokens)]

    return logits


def make(args: argparse.Namespace) -> None:
    """Saves the model that `--stage serve` and `check` read."""
    save_model(args.folder, model_of(args))
    print("RESULT true", flush=True)


def prompts_of(args: argparse.Namespace) -> list[list[int]]:
    rng, vocab_size = np.random.default_rng(0), model_of(args).vocab_size
    return [rng.integers(0, vocab_size, size=n).tolist() for n in PROMPT_LENS]


def serve(args: argparse.Namespace) -> None:
    """Serves one case, generates twice, prints both as JSON."""
    import jmoe
    from jmoe.serving.process_options import ProcessOptions

    mesh, prompts = mesh_of(args, args.ratios[0]), prompts_of(args)
    rows = -(-len(prompts) // (mesh.attention * mesh.num_micro_batches))
    apart = ProcessOptions(per=args.per) if args.executors[0] == "processes" else None
    with jmoe.serve(
        args.folder, mesh, executor=args.executors[0], processes=apart, rows=rows, chunk_len=16, num_steps=4,
        page_len=16, num_pages=1 + rows * mesh.num_micro_batches * (MAX_LEN // 16), max_len=MAX_LEN,
        compile_cache="off", progress=lambda line: print(line, file=sys.stderr, flush=True),
    ) as server:  # fmt: skip
        asked = jmoe.SamplingParams(max_tokens=args.num_tokens, ignore_eos=True)
        runs = [[list(done.token_ids) for done in server.generate(prompts, asked)] for _ in range(2)]
    print("RESULT " + json.dumps(runs), flush=True)


def check(args: argparse.Namespace) -> None:
    """Reads the cases' tokens; prints for each [equal to the reference's, within tolerance, all] choices as JSON."""
    reference = reference_of(args.folder)
    counts = []
    for runs in json.load(sys.stdin):
        equal = allowed = total = 0
        for prompt, tokens in zip(prompts_of(args), runs[0], strict=True):
            logits = reference(prompt + tokens)[len(prompt) - 1 : -1]
            best, chosen = logits.max(axis=1), logits[np.arange(len(tokens)), tokens]
            equal += int((logits.argmax(axis=1) == tokens).sum())
            allowed += int((chosen >= best - TOLERANCE * np.abs(best)).sum())
            total += len(tokens)
        counts.append([equal, allowed, total])
    print("RESULT " + json.dumps(counts), flush=True)


def main() -> int:
    """Every ratio with every executor, then the reference; 1 where a token is wrong or a case did not run."""
    args = _parser().parse_args()
    if args.stage:
        {"make": make, "serve": serve, "check": check}[args.stage](args)
        return 0
    cases = [(ratio, executor) for ratio in args.ratios for executor in args.executors]
    with tempfile.TemporaryDirectory() as folder:
        if not _child(args, folder, "make", platform="cpu"):
            return 1
        served = []
        for ratio, executor in cases:
            _log(f"{ratio}, {executor}")
            begin = time.perf_counter()
            runs = _child(args, folder, "serve", "--ratios", ratio, "--executors", executor)
            served.append((runs, time.perf_counter() - begin))
        ran = [runs for runs, _ in served if runs is not None]
        counts = iter(_child(args, folder, "check", platform="cpu", given=json.dumps(ran)) or [])
    print(HEADER)
    wrong = 0
    for (ratio, executor), (runs, took_s) in zip(cases, served, strict=True):
        equal, allowed, total = next(counts, (0, 0, 0)) if runs is not None else (0, 0, 0)
        repeats = runs is not None and runs[0] == runs[1]
        wrong += not (repeats and total and (equal if args.platform == "cpu" else allowed) == total)
        held = ",".join(str(len(node)) for node in mesh_of(args, ratio).placement.nodes)  # type: ignore[union-attr]
        print(
            f"{ratio:>5} {args.tensor:>6} {executor:>9} {args.transport:>9} {held:>16} {total:>6} {equal:>6} "
            f"{allowed:>7} {'yes' if repeats else 'NO':>7} {took_s:>5.0f}"
        )
    print(f"tokens_equal: {'FAILED, ' + str(wrong) + ' cases' if wrong else 'done'}")
    return int(bool(wrong))


def _child(args: argparse.Namespace, folder: str, stage: str, *more: str, platform: str = "", given: str = "") -> Any:
    """A stage in a process of its own, bounded; what its RESULT line says, None where there is none."""
    argv = [sys.executable, __file__, *sys.argv[1:], "--stage", stage, "--folder", folder, *more]
    platforms = {"cpu": "cpu", "gpu": "cuda,cpu"}[platform or args.platform]
    env = os.environ | {"JAX_PLATFORMS": platforms, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    try:
        done = subprocess.run(
            argv, input=given, stdout=subprocess.PIPE, text=True, timeout=args.timeout_s, env=env, check=False
        )
    except subprocess.TimeoutExpired:
        _log(f"{stage}: not done in {args.timeout_s:.0f} s")
        return None
    if done.returncode:
        _log(f"{stage}: exit code {done.returncode}")
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(lines[-1].removeprefix("RESULT ")) if lines else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratios", nargs="+", default=["1:1"], metavar="M:N", help="attention replicas : expert nodes")
    parser.add_argument("--tensor", default="1:1", metavar="A:E", help="tensor parallelism of the roles")
    parser.add_argument("--executors", nargs="+", default=["inline", "processes"], choices=["inline", "processes"])
    parser.add_argument("--per", choices=["role", "device"], default="role", help="processes: a worker for each")
    parser.add_argument("--transport", choices=["auto", "ppermute", "push"], default="auto")
    parser.add_argument("--micro-batches", type=int, default=3)
    parser.add_argument("--experts", type=int, default=6)
    parser.add_argument("--replicate", type=int, default=0, help="so many experts stand on a second node too")
    parser.add_argument("--num-tokens", type=int, default=24)
    parser.add_argument("--platform", choices=["gpu", "cpu"], default="gpu")
    parser.add_argument("--timeout-s", type=float, default=280)
    parser.add_argument("--stage", choices=["make", "serve", "check"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser


def _log(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
