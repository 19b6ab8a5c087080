"""A first and a second start of `jmoe.serve`, against the time of reading the same weights.

    python benchmarks/second_start.py                              # one GPU: 12 layers of Qwen3-30B-A3B, 16 GB
    python benchmarks/second_start.py --attention 1 --expert 1     # two GPUs, a worker a role
    python benchmarks/second_start.py --model tiny --layers 2 --platform cpu

A checkpoint of that size is written to a temporary folder, and a compile cache beside it is empty. Each start is a
process of its own, timed from outside: until the server takes requests, and until the first token. Reading the weights
is what threads take that read the checkpoint's files into memory used before. The files are in the page cache every
time: they were just written. "allowed s" is 1.5 x reading + 5 s.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
from decode_step import MODELS
from decode_step_colocated import LAYERS

from jmoe.checkpoints.hf_names import name_maps
from jmoe.checkpoints.save import save_hf
from jmoe.config import ModelConfig

CHUNK = 16 << 20  # bytes of one read
HEADER = f"{'start':>7} {'ready s':>8} {'token s':>8} {'reading s':>9} {'allowed s':>9} {'GB':>6}  programs"


def model_of(args: argparse.Namespace) -> ModelConfig:
    return dataclasses.replace(MODELS[args.model], num_layers=args.layers or LAYERS[args.model])


def make(config: ModelConfig, folder: pathlib.Path) -> None:
    """A checkpoint of the model's shapes: random values, the same for arrays of one shape."""
    dtype = np.dtype(np.float32 if config.dtype == "float32" else ml_dtypes.bfloat16)
    values = (np.random.default_rng(0).standard_normal(1 << 20) * 0.02).astype(dtype)
    made: dict[tuple[int, ...], np.ndarray] = {}

    def array(shape: tuple[int, ...]) -> np.ndarray:
        if shape not in made:  # matrices lie in memory as they are stored: the other way round
            stored = (*shape[:-2], shape[-1], shape[-2]) if len(shape) > 1 else shape
            made[shape] = np.resize(values, stored).swapaxes(-1, -2) if len(shape) > 1 else np.resize(values, stored)
        return made[shape]

    attention, experts = name_maps(config)
    save_hf(
        folder,
        config,
        {path: array(piece.shape) for path, piece in attention.items()},
        {path: array((len(pieces), *pieces[0].shape)) for path, pieces in experts.items()},
    )


def reading_s(folder: pathlib.Path) -> tuple[float, int]:
    """Seconds that threads take to read the checkpoint's tensors, the better of two, and the bytes."""
    files = sorted(folder.glob("*.safetensors"))
    parts = [(file, start) for file in files for start in range(0, file.stat().st_size, CHUNK)]
    threads = min(16, 2 * (os.cpu_count() or 1))
    memory = [bytearray(CHUNK) for _ in range(threads)]

    def read(thread: int) -> None:
        for file, start in parts[thread::threads]:
            with file.open("rb", buffering=0) as source:
                source.seek(start)
                source.readinto(memory[thread])

    times = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(2):
            start = time.perf_counter()
            list(pool.map(read, range(threads)))
            times.append(time.perf_counter() - start)
    return min(times), sum(file.stat().st_size for file in files)


def command(args: argparse.Namespace, folder: str, cache: str) -> list[str]:
    """Of one start, in a process that imports only what `jmoe.serve` needs."""
    micro_batches = 3 if args.expert else 1
    rows = max(1, args.batch // (micro_batches * (args.attention if args.expert else 1)))
    options = {
        "model": folder, "executor": args.executor, "rows": rows, "chunk_len": args.chunk_len, "max_len": args.max_len,
        "page_len": 16, "num_pages": 1 + rows * micro_batches * -(-args.max_len // 16), "compile_cache": cache,
    }  # fmt: skip
    ratio = [str(args.attention), str(args.expert)] if args.expert else []
    return [sys.executable, str(pathlib.Path(__file__).with_name("start_once.py")), json.dumps(options), *ratio]


def timed_start(args: argparse.Namespace, folder: str, cache: str) -> dict[str, Any]:
    """One start in a process of its own; seconds from outside, and what it said of its programs."""
    argv = command(args, folder, cache)
    env = os.environ | {"JAX_PLATFORMS": "cpu" if args.platform == "cpu" else "cuda,cpu"}
    begin, found = time.perf_counter(), {"programs": ""}
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        late = threading.Timer(args.timeout_s, process.kill)
        late.start()
        for line in process.stdout:
            at = time.perf_counter() - begin
            name, _, rest = line.rstrip().partition(" ")
            if name == "SAYS":
                print(f"  {at:6.1f} s  {rest}", flush=True)
                found["programs"] = rest if "programs" in rest else found["programs"]
            elif name in ("READY", "TOKEN"):
                found[name.lower() + "_s"] = at
        late.cancel()
    if process.returncode or "token_s" not in found:
        raise RuntimeError(f"expected a start that ends in a token, got exit code {process.returncode}")
    return found


def main() -> int:
    """Both starts, a table; 1 where the second takes more than it may."""
    args = _parser().parse_args()
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        folder, cache = pathlib.Path(scratch, "checkpoint"), str(pathlib.Path(scratch, "programs"))
        begin = time.perf_counter()
        make(model_of(args), folder)
        print(f"made a checkpoint in {time.perf_counter() - begin:.1f} s", flush=True)
        read_s, num_bytes = reading_s(folder)
        print(f"reading it takes {read_s:.2f} s, {num_bytes / read_s / 1e9:.2f} GB/s", flush=True)
        starts = {}
        for name in ("first", "second"):
            print(f"{name} start", flush=True)
            starts[name] = timed_start(args, str(folder), cache)
    allowed = 1.5 * read_s + 5
    print(HEADER)
    for name, found in starts.items():
        print(
            f"{name:>7} {found['ready_s']:>8.1f} {found['token_s']:>8.1f} {read_s:>9.2f} {allowed:>9.1f} "
            f"{num_bytes / 1e9:>6.1f}  {found['programs']}"
        )
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps({"reading_s": read_s, "bytes": num_bytes, **starts}, indent=1))
    late = starts["second"]["ready_s"] > allowed
    print("second_start: later than allowed" if late else "second_start: done")
    return int(late)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, default=0, help="0: what 80 GB hold")
    parser.add_argument("--attention", type=int, default=1, help="with --expert")
    parser.add_argument("--expert", type=int, default=0, help="0: both roles on one device")
    parser.add_argument("--executor", choices=["auto", "inline", "processes"], default="auto")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--chunk-len", type=int, default=512)
    parser.add_argument("--max-len", type=int, default=2048)
    parser.add_argument("--platform", choices=["gpu", "cpu"], default="gpu")
    parser.add_argument("--scratch", help="folder for the checkpoint (default: the system's)")
    parser.add_argument("--timeout-s", type=float, default=280)
    parser.add_argument("--json", help="also write every figure here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
