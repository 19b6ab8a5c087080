"""Programs that come back from disk: the same tokens, without a compiler, in a second process and for both roles."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cell_driver import generate
from small_models import AWKWARD, random_prompts, source_of

from jmoe import compiled_programs
from jmoe.cell_config import CellConfig
from jmoe.cell_runtime import CellRuntime
from jmoe.compiled_programs import program_key
from jmoe.lowering import AbstractCell, lower_program
from jmoe.models.model import Model, array_specs
from jmoe.program_files import ProgramFiles
from jmoe.serving.executors.processes import ProcessesExecutor
from jmoe.serving.executors.protocol import ProgramKey
from jmoe.sharding.mesh_config import MeshConfig
from jmoe.sharding.meshes import joint_mesh
from jmoe.step_inputs import StepInputs

CONFIG = dataclasses.replace(AWKWARD, num_layers=1, dense_layers=(), dense_ffn_size=0)
CELL = CellConfig(
    CONFIG, MeshConfig(1, 1, num_micro_batches=1).resolve(6), rows=2, chunk_len=8, num_steps=3, num_pages=9, max_len=64
)
PROMPTS = random_prompts(CONFIG)[:2]
KEYS = [ProgramKey("prefill", False), ProgramKey("decode", False)]


@functools.cache
def model():
    """By numpy: flax's own start compiles array by array."""
    rng = np.random.default_rng(0)

    def arrays(specs):
        return {path: jnp.asarray(rng.normal(size=spec.shape), jnp.float32) for path, spec in specs.items()}

    return Model.from_arrays(CONFIG, *map(arrays, array_specs(CONFIG)))


def tokens_of(runtime):
    runtime.load(source_of(model()), lambda line: None)
    return generate(runtime.run, CELL, PROMPTS, 12)[0]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A folder with both programs of the inline role, what compiling said, and the tokens."""
    files = ProgramFiles(tmp_path_factory.mktemp("compiled"))
    runtime = CellRuntime(CELL, jax.devices(), "inline", files)
    return files, runtime.compile(*KEYS), tokens_of(runtime)


def test_a_second_start_compiles_nothing_and_makes_the_same_tokens(compiled, monkeypatch):
    files, said, tokens = compiled
    assert said.startswith("compiled 2 of 2 programs in ")
    assert len(list(files.folder.iterdir())) > 2, "what fills pages is kept too"
    monkeypatch.setattr("jmoe.cell_runtime.lower_program", lambda *args: pytest.fail("traced again"))
    monkeypatch.setattr("jmoe.kept_programs.save_program", lambda *args: pytest.fail("compiled again"))
    runtime = CellRuntime(CELL, jax.devices(), "inline", files)
    assert runtime.compile(*KEYS).startswith("2 compiled programs from the cache in ")
    assert tokens_of(runtime) == tokens
    assert tokens_of(runtime) == tokens, "a state that was given away is not used again"


def test_what_tracing_does_to_options_does_not_hide_a_program(tmp_path, monkeypatch):
    """A second start looks before it has traced anything, so that is when the first must have taken the name."""
    options = {"traced": False}
    monkeypatch.setattr(compiled_programs, "_config", lambda: dict(options))

    def trace(*args):
        options["traced"] = True
        return lower_program(*args)

    monkeypatch.setattr("jmoe.cell_runtime.lower_program", trace)
    for said in ("compiled 1 of 1 programs in ", "1 compiled programs from the cache in "):
        options["traced"] = False
        runtime = CellRuntime(CELL, jax.devices(), "inline", ProgramFiles(tmp_path))
        assert runtime.compile(KEYS[0]).startswith(said)


@pytest.mark.parametrize("damage", [lambda data: data[:-20], lambda data: None])
def test_a_damaged_or_foreign_program_is_compiled_again_with_a_warning(compiled, caplog, damage):
    files, _, tokens = compiled
    name = program_key(AbstractCell(CELL, joint_mesh(CELL.mesh, jax.devices()), "inline"), KEYS[1])
    path = files.folder / f"{name}.program"
    if (damaged := damage(path.read_bytes())) is None:
        files.write(name, b"not XLA's")  # whole, and yet no program
    else:
        path.write_bytes(damaged)
    runtime = CellRuntime(CELL, jax.devices(), "inline", files)
    said = runtime.compile(*KEYS)
    assert said.startswith("compiled 1 of 2 programs in ") and "; on disk: " in said
    assert f"{name}.program is compiled again" in caplog.text
    assert tokens_of(runtime) == tokens
    assert "; on disk: " not in runtime.compile(("prefill", True)), "of another program nothing was on disk"


def test_the_key_says_all_that_a_program_depends_on(monkeypatch):
    def key(cell=CELL, role="inline", program=KEYS[0], devices=slice(None)):
        mesh = joint_mesh(cell.mesh, jax.devices()[devices])
        return program_key(AbstractCell(cell, mesh, role), program)

    first = key()
    assert first == key()
    others = [key(role="attention"), key(role="expert"), key(program=KEYS[1]), key(program=("prefill", True))]
    others += [key(dataclasses.replace(CELL, rows=3)), key(devices=slice(1, None))]
    others.append(key(dataclasses.replace(CELL, model=dataclasses.replace(CONFIG, rope_theta=7.0))))
    for name, value in (
        ("_source_digest", lambda: "other"),
        ("_version", lambda name: "0"),
        ("_host_features", lambda: "sse2"),
        ("_config", dict),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(compiled_programs, name, value)
            others.append(key())
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/nowhere")
    assert len({first, key(), *others}) == 2 + len(others)


@pytest.mark.parametrize(
    ("role", "program"), [("attention", ("prefill", True)), ("expert", ("decode", False)), ("inline", ("decode", True))]
)
def test_a_program_returns_what_the_cell_says(role, program):
    mesh = joint_mesh(CELL.mesh, jax.devices())

    def shapes(tree):
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)

    lowered = lower_program(CELL, mesh, role, program)
    assert shapes(lowered.out_info) == shapes(AbstractCell(CELL, mesh, role).results(program))


def start_processes(folder):
    """Tokens of a cell of two worker processes, and what each said about its programs."""
    lines = []
    executor = ProcessesExecutor(CELL, model(), programs=KEYS, compile_cache=str(folder), progress=lines.append)

    def run(key, array):
        inputs = StepInputs(CELL, key[0])
        inputs.array[...] = array
        return {"tokens": executor.run(ProgramKey(*key), inputs).tokens}

    try:
        tokens = generate(run, CELL, PROMPTS, 6)[0]
    finally:
        executor.close()
    return tokens, sorted(line.partition(" in ")[0] for line in lines if " programs " in line)


def test_both_roles_find_their_programs_in_a_second_start(tmp_path):
    """JAX's own cache would be written by process 0 alone."""
    tokens, said = start_processes(tmp_path)
    kept = set(tmp_path.iterdir())
    assert said == [f"worker {i}: compiled 2 of 2 programs" for i in ("0 (attention)", "1 (expert)")]
    again, said = start_processes(tmp_path)
    assert said == [f"worker {i}: 2 compiled programs from the cache" for i in ("0 (attention)", "1 (expert)")]
    assert tokens == again and set(tmp_path.iterdir()) == kept
