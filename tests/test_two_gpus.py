"""Both executors and both transports on two GPUs, against a small random checkpoint in bf16 made here."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from cell_driver import generate, pages_of, slot_of
from small_models import AWKWARD, random_prompts

from jmoe.cell_config import CellConfig
from jmoe.config import ModelConfig
from jmoe.serving.executors.protocol import ProgramKey
from jmoe.sharding.mesh_config import MeshConfig
from jmoe.step_inputs import StepInputs

pytestmark = pytest.mark.gpu

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = dataclasses.replace(
    AWKWARD, vocab_size=1031, hidden_size=256, head_dim=64, expert_ffn_size=192, dense_ffn_size=256, dtype="bfloat16"
)
NUM_TOKENS = 24
TOLERANCE = 2.0**-6  # of the reference's best logit: docs/numerics.md
EXECUTORS = [(kind, transport) for kind in ("inline", "processes") for transport in ("ppermute", "push")]

REFERENCE = """
import json, sys
from tokens_equal import reference_of
folder, num_tokens = sys.argv[1], int(sys.argv[2])
reference, out = reference_of(folder), []
for prompt in json.load(sys.stdin):
    tokens, rows = list(prompt), []
    for _ in range(num_tokens):
        logits = reference(tokens)[-1]
        rows.append(logits.tolist())
        tokens.append(int(logits.argmax()))
    out.append({"tokens": tokens[len(prompt):], "logits": rows})
json.dump(out, sys.stdout)
"""

MAKE = """
import sys, json
from jmoe.config import ModelConfig
from tokens_equal import save_model
data = json.load(sys.stdin)
data["dense_layers"], data["eos_token_ids"] = tuple(data["dense_layers"]), tuple(data["eos_token_ids"])
save_model(sys.argv[1], ModelConfig(**data))
"""


def _python(code: str, *argv: str, given) -> str:
    """Runs code in a process of its own on the CPU, so that this process's GPUs stay free."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "benchmarks")))
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path + os.pathsep + os.environ.get("PYTHONPATH", "")}
    done = subprocess.run(
        [sys.executable, "-c", code, *argv],
        input=json.dumps(given), capture_output=True, text=True, timeout=300, env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    _python(MAKE, str(folder), given=dataclasses.asdict(CONFIG))
    assert sum(f.stat().st_size for f in folder.iterdir()) < 20e6
    return folder


@pytest.fixture(scope="module")
def reference(checkpoint):
    """Prompts, and the float32 reference's tokens and logits for each."""
    prompts = random_prompts(CONFIG)
    return prompts, json.loads(_python(REFERENCE, str(checkpoint), str(NUM_TOKENS), given=prompts))


@pytest.fixture(params=EXECUTORS, ids=" ".join)
def executor(request, checkpoint):
    config, (kind, transport) = ModelConfig.from_hf(checkpoint), request.param
    mesh = MeshConfig(1, 1, num_micro_batches=3, transport=transport).resolve(config.num_experts)
    cell = CellConfig(config, mesh, rows=3, chunk_len=8, num_steps=1, num_pages=64, max_len=64)
    if kind == "inline":
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the workers of the other executor need room too
        from jmoe.serving.executors.inline import InlineExecutor as Executor
    else:
        from jmoe.serving.executors.processes import ProcessesExecutor as Executor
    executor = Executor(cell, str(checkpoint), platform="gpu", progress=print)
    yield executor
    executor.close()


def _run(executor):
    def run(key, array):
        inputs = StepInputs(executor.cell, key[0])
        inputs.array[...] = array
        return dataclasses.asdict(executor.run(ProgramKey(*key), inputs))

    return run


def _within_tolerance(choice: int, logits: list[float]) -> bool:
    return logits[choice] >= max(logits) - TOLERANCE * abs(max(logits))


def test_choices_agree_with_the_reference_and_repeat(executor, reference):
    """Teacher-forced decode on the reference's tokens; then the same free run twice, bit for bit."""
    prompts, expected = reference
    run, cell = _run(executor), executor.cell
    forced, _ = generate(run, cell, prompts, 1)  # prefill
    for n, tokens in enumerate(forced):
        assert _within_tolerance(tokens[0], expected[n]["logits"][0])
    exact = 0
    for i in range(1, NUM_TOKENS):
        inputs = StepInputs(cell, "decode")
        for n, prompt in enumerate(prompts):
            r, m, row = slot_of(cell, n)
            at = (r, m, row)
            inputs["page_table"][at] = pages_of(cell, n)
            inputs["token_ids"][at] = expected[n]["tokens"][i - 1]
            inputs["start_pos"][at] = len(prompt) + i - 1
            inputs["num_prompt"][at] = len(prompt)
            inputs["num_tokens"][at] = inputs["sample"][at] = inputs["remaining"][at] = 1
        tokens = executor.run(ProgramKey("decode", False), inputs).tokens[0]
        for n in range(len(prompts)):
            choice = int(tokens[slot_of(cell, n)])
            assert _within_tolerance(choice, expected[n]["logits"][i]), f"prompt {n}, token {i}"
            exact += choice == expected[n]["tokens"][i]
    assert exact > 0.8 * len(prompts) * (NUM_TOKENS - 1)
    first, _ = generate(run, cell, prompts, NUM_TOKENS)
    second, _ = generate(run, cell, prompts, NUM_TOKENS)
    assert first == second
    assert np.unique(first[0]).size > 3
