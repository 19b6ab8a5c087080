"""RolePair: both roles in one process as two programs (transport "push"), with the tokens of one program for both."""

import dataclasses
import functools

import jax
import pytest
from cell_driver import generate
from small_models import AWKWARD, random_model, random_prompts, reference_tokens, source_of

import jmoe.cell_runtime as cell_runtime
from jmoe.cell_config import CellConfig
from jmoe.errors import ExchangeTimeoutError, SequenceMismatchError
from jmoe.role_pair import RolePair
from jmoe.role_programs import ExpertRole
from jmoe.sharding.mesh_config import MeshConfig

MAX_TOKENS = 6
ODD = dataclasses.replace(AWKWARD, num_layers=2, dense_layers=())
EVEN = dataclasses.replace(ODD, num_heads=8, num_kv_heads=2)
MESHES = {
    "2:1, m = 3": (ODD, MeshConfig(2, 1, 3, transport="push")),
    "1:4, m = 2": (ODD, MeshConfig(1, 4, 2, transport="push")),
    "attention tensor 2, lockstep": (
        EVEN, MeshConfig(1, 1, 2, attention_tensor=2, transport="push", directions="both"),
    ),
}  # fmt: skip


def pair_of(config, mesh: MeshConfig) -> RolePair:
    lanes = mesh.attention * mesh.num_micro_batches
    cell = CellConfig(
        config, mesh.resolve(config.num_experts), rows=-(-3 // lanes), chunk_len=8, num_steps=4, page_len=4,
        num_pages=120, max_len=64,
    )  # fmt: skip
    pair = RolePair(cell, jax.devices())
    pair.load(source_of(random_model(config)), lambda _: None)
    return pair


@pytest.mark.parametrize("name", MESHES)
def test_tokens_equal_the_reference(name):
    """As `test_tokens_equal.py` has them for the one program of "ppermute": both are equal bit for bit."""
    config, mesh = MESHES[name]
    prompts = random_prompts(config, (5, 11, 8))
    pair = pair_of(config, mesh)
    said = pair.compile(("prefill", False), ("decode", False))
    assert "attention: compiled 2 of 2" in said and "expert: compiled 2 of 2" in said
    assert generate(pair.run, pair.cell, prompts, MAX_TOKENS)[0] == reference_tokens(config, prompts, MAX_TOKENS)
    pair.close()


@pytest.mark.parametrize(("tensor", "dtype"), [(1, "bfloat16"), (2, "float32")])
def test_sums_are_rounded_where_no_other_rank_adds_to_them(monkeypatch, tensor, dtype):
    partial_sums, found = ExpertRole.partial_sums, set()

    def watched(*arguments, **options):
        sums = partial_sums(*arguments, **options)
        found.add(str(sums.dtype))
        return sums

    monkeypatch.setattr(ExpertRole, "partial_sums", watched)
    config = dataclasses.replace(EVEN, dtype="bfloat16", num_layers=1)
    pair = pair_of(config, MeshConfig(1, 1, 1, expert_tensor=tensor, transport="push"))
    pair.compile(("decode", False))
    pair.close()
    assert found == {dtype}


@pytest.fixture
def small_pair(monkeypatch):
    """A cell whose waits are short."""
    monkeypatch.setattr(cell_runtime, "Mailboxes", functools.partial(cell_runtime.Mailboxes, deadline_s=0.3))
    pair = pair_of(ODD, MeshConfig(1, 1, 1, transport="push"))
    yield pair
    pair.close()


def test_a_role_out_of_step_and_a_role_that_is_gone_are_typed_errors(small_pair):
    pair, prompts = small_pair, random_prompts(ODD)[:1]
    pair.compile(("prefill", False))
    pair.set_sequence(1, 12345)
    with pytest.raises(SequenceMismatchError, match=r"expected an exchange with sequence number \d+, got \d+"):
        generate(pair.run, pair.cell, prompts, 1)
    pair.attention.adopt(pair.attention._attention, {})  # an empty state: the sequence starts again
    with pytest.raises(
        ExchangeTimeoutError, match="attention device 0: expected message 0 of a peer, got none in time"
    ):
        generate(pair.attention.run, pair.cell, prompts, 1)


def test_calls_in_flight_come_back_in_order(small_pair):
    """The second call starts before the first is waited for."""
    pair, prompts = small_pair, random_prompts(ODD)[:1]
    calls = []

    def run(key, inputs):
        calls.append(inputs.copy())
        return pair.run(key, inputs)

    generate(run, pair.cell, prompts, 1)
    under_way = [pair.submit(("prefill", False), inputs) for inputs in calls[:2] * 2]
    tokens = [pair.collect(call)["tokens"].tolist() for call in under_way]
    half = len(tokens) // 2
    assert half >= 1 and tokens[:half] == tokens[half:]
