"""The server that `serve_throughput.py` measures: `jmoe serve`'s parts over random weights, in a process of its own.

Before it serves it runs the same prompts with nothing but the executor: calls planned and filled beforehand, two in
flight, no text, no clients. That is the step time which serving is compared with.
"""

import argparse
import asyncio
import dataclasses
import json
import sys
import time

import numpy as np
import tokenizers
from decode_step import MODELS

from jmoe.cell_config import CellConfig
from jmoe.serving.admission import make_request
from jmoe.serving.engine_config import EngineConfig
from jmoe.serving.executors.create import create_executor
from jmoe.serving.executors.protocol import Executor, ProgramKey
from jmoe.serving.grpc_config import GrpcConfig
from jmoe.serving.grpc_server import run_grpc
from jmoe.serving.requests import SamplingParams
from jmoe.serving.scheduler import Call, Scheduler
from jmoe.serving.server import Server
from jmoe.serving.sizes import CellSizes
from jmoe.serving.step_batch import StepBatch
from jmoe.serving.text.tokenizer import Tokenizer
from jmoe.sharding.mesh_config import MeshConfig

MAX_WAITING = 1 << 20
GREEDY = [ProgramKey("prefill", False), ProgramKey("decode", False)]


def cell_of(args: argparse.Namespace) -> CellConfig:
    """The cell that the options describe."""
    model = MODELS[args.model]
    model = dataclasses.replace(model, num_layers=args.layers or model.num_layers)
    if args.colocated:
        mesh = MeshConfig.colocate(args.colocated, args.tensor, args.micro_batches)
    else:
        mesh = MeshConfig(args.attention, args.expert, args.micro_batches)
    lanes = mesh.attention * mesh.num_micro_batches
    if args.batch % lanes:
        raise ValueError(f"--batch: expected a multiple of {lanes} (replicas x micro-batches), got {args.batch}")
    sizes = CellSizes(
        rows=args.batch // lanes, chunk_len=args.chunk_len, num_steps=args.num_steps, page_len=args.page_len,
        num_pages=args.num_pages, max_len=args.max_len,
    )  # fmt: skip
    return sizes.resolve(model, mesh)


def tokenizer_of(vocab_size: int) -> Tokenizer:
    """A byte-level tokenizer with a word for every id: detokenizing costs what a real one's does."""
    vocab = {f"\u0120w{i}": i for i in range(vocab_size)}  # U+0120 stands for a space
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.decoder = tokenizers.decoders.ByteLevel()
    return Tokenizer(backend)


def prompts_of(vocab_size: int, lengths: list[int], seed: int) -> list[list[int]]:
    """Random prompts."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, size=length).tolist() for length in lengths]


def step_alone_s(executor: Executor, config: EngineConfig, prompts: list[list[int]], output_len: int) -> float:
    """Mean seconds of a decode step at full batch, with a host that only hands over what lies ready.

    Which calls come does not depend on the tokens, so all of them are planned beforehand.
    """
    cell, batch = executor.cell, StepBatch(executor.cell)
    scheduler = Scheduler(cell, config.prefill_streak(cell))
    for i, prompt in enumerate(prompts):
        params = SamplingParams(output_len, ignore_eos=True)
        scheduler.add(make_request(cell, prompt, params, f"alone-{i}", has_tokenizer=False))
    planned = []
    while (call := scheduler.schedule()) is not None:
        planned.append((call, batch.fill(call)))
        scheduler.update(call, _any_tokens(cell, call))
    ends = []
    for i, (call, inputs) in enumerate(planned):
        executor.submit(ProgramKey(call.kind, False), inputs)
        if i > 0:
            executor.collect()
            ends.append(time.perf_counter())
    executor.collect()
    ends.append(time.perf_counter())
    full = [call.kind == "decode" and len(call.work) == len(prompts) for call, _ in planned]
    spans = [ends[i] - ends[i - 1] for i in range(2, len(planned)) if full[i] and full[i - 1] and full[i - 2]]
    if not spans:
        raise ValueError(
            f"expected decode calls of all {len(prompts)} requests in a row, got none in {len(planned)} calls: the "
            "first ends before the last is prefilled; ask for more --steady-output-len or --max-prefill-tokens"
        )
    return sum(spans) / len(spans) / cell.num_steps


def _any_tokens(cell: CellConfig, call: Call) -> np.ndarray:
    num_steps, rows = (cell.num_steps, cell.rows) if call.kind == "decode" else (1, 1)
    tokens = np.full((num_steps, cell.mesh.attention, cell.mesh.num_micro_batches, rows), -1, np.int32)
    for work, place in zip(call.work, zip(*call.index(), strict=True), strict=True):
        tokens[(slice(0, work.num_samples), *place)] = 0
    return tokens


def main(args: argparse.Namespace) -> int:
    """Starts, measures the step alone, serves until SIGTERM. Facts go to stdout as lines "NAME JSON"."""
    cell = cell_of(args)
    config = EngineConfig(MAX_WAITING, args.max_prefill_tokens, args.calls_in_flight)

    def log(line: str) -> None:
        print(f"[{time.strftime('%H:%M:%S')}] {line}", file=sys.stderr, flush=True)

    def load() -> Server:
        start = time.perf_counter()
        executor = create_executor(
            "random:0", cell, args.executor, log, GREEDY, compile_cache=args.compile_cache
        )  # fmt: skip
        start_s = time.perf_counter() - start
        log("decode steps alone, without a server")
        prompts = prompts_of(cell.model.vocab_size, [args.input_len] * cell.num_slots, args.seed)
        step_s = step_alone_s(executor, config, prompts, args.steady_output_len)
        print("ALONE " + json.dumps({"step_s": step_s, "start_s": start_s}), flush=True)
        return Server(executor, tokenizer=tokenizer_of(cell.model.vocab_size), engine_config=config, name=args.model)

    grpc = GrpcConfig(port=0, max_calls=1 << 16, max_silence_s=3600.0)
    return asyncio.run(run_grpc(grpc, load, lambda line: print(f"SAYS {json.dumps(line)}", flush=True)))
