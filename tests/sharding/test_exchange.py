"""The exchange on CPU devices: who gets what, the check of sequence numbers, and that no role loses an exchange."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from permutes import expected_permutes, permutes_of
from small_models import AWKWARD

from jmoe.cell_config import CellConfig
from jmoe.lowering import lower_program, on_each_device
from jmoe.schedule import build_schedule
from jmoe.sharding.exchange import SEQUENCE_MASK, Box, Chain, Exchange
from jmoe.sharding.mesh_config import MeshConfig
from jmoe.sharding.meshes import joint_mesh

MESHES = {
    "1 and 1": MeshConfig(1, 1),
    "2 and 3": MeshConfig(2, 3),
    "3 and 2": MeshConfig(3, 2),
    "1 and 4": MeshConfig(1, 4),
    "attention tensor 2": MeshConfig(2, 3, attention_tensor=2),
    "expert tensor 2": MeshConfig(3, 2, expert_tensor=2),
    "tensor 3 and 2": MeshConfig(1, 2, attention_tensor=3, expert_tensor=2),
    "tensor 2 and 4": MeshConfig(2, 1, attention_tensor=2, expert_tensor=4),
}
WAYS = {"dispatch": (True, False), "combine": (False, True), "both": (True, True)}  # (dispatch, combine)
WALK = ((True, False), (True, False), (False, True), (True, True), (False, True))
CAPACITY, HIDDEN, CHOICES = 5, 36, 2


def exchange_of(mesh: MeshConfig, dtype="float32") -> Exchange:
    return Exchange.of(mesh, HIDDEN, CAPACITY, CHOICES, dtype)


def random_boxes(exchange: Exchange, seed: int) -> Box:
    """A different full box on every device."""
    rng = np.random.default_rng(seed)
    n, r, f = exchange.mesh.num_devices, exchange.rounds.num_rounds, exchange.format
    return Box(
        hidden=jnp.asarray(rng.normal(size=(n, r, f.capacity, f.width)), f.dtype),
        topk_weights=jnp.asarray(rng.normal(size=(n, r, f.capacity, CHOICES)), jnp.float32),
        local_idx=jnp.asarray(rng.integers(-1, 2**31 - 1, (n, r, f.capacity, CHOICES)), jnp.int32),
        slot=jnp.asarray(rng.integers(0, 2**31 - 1, (n, r, f.capacity)), jnp.int32),
        num_rows=jnp.asarray(rng.integers(0, f.capacity + 1, (n, r)), jnp.int32),
    )


def run(exchange: Exchange, ways, sequences):
    """A chain of exchanges of random boxes: what was sent, what arrived, each device's fault, and the next number."""

    def program(boxes, sequence):
        chain, arrived = Chain.start(sequence), []
        for way, box in zip(ways, boxes, strict=True):
            dispatch, combine = WAYS[way]
            got, chain = exchange(box, chain, dispatch=dispatch, combine=combine)
            arrived.append(got)
        return arrived, chain.fault(), chain.sequence

    mesh = joint_mesh(exchange.mesh, jax.devices())
    sent = [random_boxes(exchange, seed) for seed in range(len(ways))]
    arrived, fault, sequence = jax.jit(on_each_device(program, mesh))(sent, jnp.asarray(sequences, jnp.int32))
    return sent, arrived, np.asarray(fault), np.asarray(sequence)


def expected_arrivals(exchange: Exchange, sent: Box, way: str) -> dict[str, np.ndarray]:
    dispatch, combine = WAYS[way]
    names = (f.name for f in dataclasses.fields(Box) if getattr(sent, f.name) is not None)
    fields = {name: np.asarray(getattr(sent, name)) for name in names}
    want = {name: np.zeros_like(array) for name, array in fields.items()}
    for r, pairs in enumerate(exchange.rounds.pairs):
        for a, e in pairs:
            for sender, receiver in [(a, e)] * dispatch + [(e, a)] * combine:
                for name, array in fields.items():
                    if dispatch or name in ("hidden", "num_rows"):
                        want[name][receiver, r] = array[sender, r]
    return want


@pytest.mark.parametrize("name", MESHES)
def test_every_box_arrives_at_its_partner_and_nowhere_else(name):
    dtype = ("float32", "bfloat16")[list(MESHES).index(name) % 2]
    exchange = exchange_of(MESHES[name], dtype)
    sent, arrived, fault, sequence = run(exchange, WAYS, [41] * exchange.mesh.num_devices)
    for way, box, got in zip(WAYS, sent, arrived, strict=True):
        for field, array in expected_arrivals(exchange, box, way).items():
            assert getattr(got, field).dtype == array.dtype
            np.testing.assert_array_equal(getattr(got, field), array, err_msg=f"{way} {field}")
    assert (fault == -1).all() and (sequence == 41 + len(WAYS)).all()


def test_numbers_wrap_far_from_the_sign():
    exchange = exchange_of(MeshConfig(2, 3))
    _, _, fault, sequence = run(exchange, WAYS, [SEQUENCE_MASK - 1] * 5)
    assert (fault == -1).all() and (sequence == 1).all()


def expected_fault(device: int, planted: int, dispatch: bool, combine: bool) -> list[int]:
    """(expected, got) on a device of a 2:2 mesh where all numbers are 41 but for 48 on the planted device."""
    attention = device < 2
    if not (combine if attention else dispatch):
        return [-1, -1]  # receives nothing, so sees nothing
    if device == planted:
        return [48, 41]
    return [41, 48] if attention != (planted < 2) else [-1, -1]


@pytest.mark.parametrize("way", WAYS)
def test_a_device_out_of_step_is_found_by_itself_and_by_its_partners(way):
    """Who receives sees it: experts in a dispatch, attention in a combine, both in both; senders alone see nothing."""
    exchange = exchange_of(MeshConfig(2, 2))
    dispatch, combine = WAYS[way]
    for planted in range(4):
        numbers = np.full(4, 41)
        numbers[planted] = 48
        fault = run(exchange, [way], numbers)[2]
        for device in range(4):
            assert fault[device].tolist() == expected_fault(device, planted, dispatch, combine), (planted, device)


@pytest.mark.parametrize("number", [40, 42, 0, SEQUENCE_MASK, -1, -5])
@pytest.mark.parametrize("planted", [0, 1])
def test_any_wrong_number_is_a_fault(planted, number):
    exchange = exchange_of(MeshConfig(1, 1))
    numbers = [41, 41]
    numbers[planted] = number
    fault = run(exchange, ["both"], numbers)[2]
    assert fault[1 - planted].tolist() == [41, number]


def test_the_first_fault_of_a_chain_is_kept():
    exchange = exchange_of(MeshConfig(1, 1))
    assert run(exchange, ["both"] * 4, [7, 3])[2].tolist() == [[7, 3], [3, 7]]


def test_hidden_sizes_that_slices_do_not_share_evenly_are_refused():
    mesh = MeshConfig(1, 1, attention_tensor=3, expert_tensor=2)
    with pytest.raises(ValueError, match=r"multiple of 6 .* 3 and expert_tensor 2\), got 40"):
        Exchange.of(mesh, 40, CAPACITY, CHOICES, "float32")


# What XLA keeps: both roles' programs must hold the same permutes in the same order.


def one_role(exchange: Exchange, role: str, chained: bool = True) -> jax.stages.Lowered:
    """WALK: a program of one role that sends what it makes and drops what it does not need."""

    def program(hidden, sequence):
        chain, seen = Chain.start(sequence), jnp.float32(0)
        for dispatch, combine in WALK:
            sends = dispatch if role == "attention" else combine
            box = exchange.empty_box()
            if sends:
                box = dataclasses.replace(box, hidden=hidden + seen, num_rows=box.num_rows + 1)
            arrived, chain = exchange(box, chain, dispatch=dispatch, combine=combine)
            if (combine if role == "attention" else dispatch) and chained:
                seen = seen + arrived.hidden.sum()
            if not chained:
                chain = Chain.start(sequence)
        return seen, chain.sequence

    n, r, f = exchange.mesh.num_devices, exchange.rounds.num_rounds, exchange.format
    hidden = jax.ShapeDtypeStruct((n, r, f.capacity, f.width), f.dtype)
    mesh = joint_mesh(exchange.mesh, jax.devices())
    return jax.jit(on_each_device(program, mesh)).lower(hidden, jax.ShapeDtypeStruct((n,), jnp.int32))


@pytest.mark.parametrize("name", ["1 and 1", "2 and 3", "3 and 2", "tensor 3 and 2"])
def test_a_role_that_drops_results_keeps_every_exchange_in_order(name):
    exchange = exchange_of(MESHES[name])
    want = expected_permutes(exchange, WALK)
    assert permutes_of(one_role(exchange, "attention")) == want
    assert permutes_of(one_role(exchange, "expert")) == want


def test_without_the_number_from_one_to_the_next_xla_drops_exchanges():
    """Why there is a chain: sabotage of the test above."""
    assert permutes_of(one_role(exchange_of(MeshConfig(1, 1)), "attention", chained=False)) == []


@pytest.mark.parametrize(("num_micro_batches", "directions"), [(2, "one"), (4, "both")])
def test_whole_programs_of_both_roles_hold_the_same_permutes(num_micro_batches, directions):
    model = dataclasses.replace(AWKWARD, num_layers=1, dense_layers=())
    mesh = MeshConfig(2, 3, num_micro_batches, directions=directions).resolve(model.num_experts)
    cell = CellConfig(model, mesh, rows=2, page_len=4, num_pages=20, max_len=16)
    joint = joint_mesh(mesh, jax.devices())
    exchange = Exchange.of(mesh, model.hidden_size, cell.rows, model.num_experts_per_tok, model.dtype)
    schedule = build_schedule(1, num_micro_batches, directions)
    want = expected_permutes(exchange, [(bool(e.dispatch), bool(e.combine)) for e in schedule.exchanges])
    for role in ("attention", "expert"):
        assert permutes_of(lower_program(cell, joint, role, ("decode", False))) == want, role
