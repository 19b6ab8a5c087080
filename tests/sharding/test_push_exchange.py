"""The push transport on CPU devices: the boxes of ppermute, order without a common call, numbers, bounded waits."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from push_roles import ROLES, Roles
from test_exchange import CAPACITY, CHOICES, HIDDEN, MESHES, WAYS, expected_arrivals, expected_fault, random_boxes

from jmoe.pallas_kernels.push_plan import SEQUENCE_MASK, TIMED_OUT, MailboxMap, Message, slots_for
from jmoe.sharding.exchange import Chain
from jmoe.sharding.mailboxes import Mailboxes, partners, table_shape
from jmoe.sharding.mesh_config import MeshConfig
from jmoe.sharding.push_exchange import PushExchange


def exchange_of(mesh: MeshConfig, dtype="float32") -> PushExchange:
    return PushExchange.of(mesh, HIDDEN, CAPACITY, CHOICES, dtype)


def in_order(ways):
    """Exchanges of the given ways, one box each."""

    def program(exchange, chain, boxes):
        arrived = []
        for way, box in zip(ways, boxes, strict=True):
            got, chain = exchange(box, chain, dispatch=WAYS[way][0], combine=WAYS[way][1])
            arrived.append(got)
        return arrived, chain.fault(), chain.sequence

    return program


def run(exchange, ways, sequences):
    sent = [random_boxes(exchange, seed) for seed in range(len(ways))]
    results = Roles(exchange).run(in_order(ways), sent, sequences)
    joined = jax.tree.map(lambda *parts: np.concatenate(parts), *(results[role] for role in ROLES))
    return sent, *joined


def assert_same_rows(got, want, num_attention):
    """Equal up to each round's row count, what stands beyond is undefined; ids and weights come to experts alone."""
    inside = np.arange(CAPACITY) < want["num_rows"][..., None]
    for name, array in want.items():
        mine = np.asarray(getattr(got, name))
        assert mine.dtype == array.dtype, name
        first = 0 if name in ("hidden", "num_rows") else num_attention
        heard = np.ones_like(inside[..., 0]) if name == "num_rows" else inside
        np.testing.assert_array_equal(mine[first:][heard[first:]], array[first:][heard[first:]], err_msg=name)


@pytest.mark.parametrize("name", ["1 and 1", "2 and 3", "tensor 3 and 2"])
def test_every_row_arrives_at_its_partner_as_with_ppermute(name):
    dtype = "bfloat16" if name.startswith("tensor") else "float32"
    exchange = exchange_of(MESHES[name], dtype)
    sent, arrived, fault, sequence = run(exchange, WAYS, [41] * exchange.mesh.num_devices)
    for way, box, got in zip(WAYS, sent, arrived, strict=True):
        want = expected_arrivals(exchange, box, way)
        assert_same_rows(got, want, exchange.mesh.num_attention_devices)
    assert (fault == -1).all() and (sequence == 41 + 2).all()  # two dispatches and two combines, numbered apart


def test_rows_are_gathered_by_index():
    exchange = exchange_of(MeshConfig(2, 3))
    n, r = exchange.mesh.num_devices, exchange.rounds.num_rounds
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(n, 11, exchange.format.width)).astype(np.float32)
    index = rng.integers(0, 11, (n, r, CAPACITY)).astype(np.int32)
    boxes = dataclasses.replace(random_boxes(exchange, 1), hidden=rows, row_index=index)
    gathered = dataclasses.replace(
        boxes, hidden=np.stack([a[i] for a, i in zip(rows, index, strict=True)]), row_index=None
    )
    results = Roles(exchange).run(in_order(["both"]), [boxes], [0] * n)
    got = jax.tree.map(lambda *parts: np.concatenate(parts), *(results[role][0][0] for role in ROLES))
    want = expected_arrivals(exchange, gathered, "both")
    assert_same_rows(got, want, 2)


def test_float8_rows_bring_their_scales_both_ways():
    exchange = dataclasses.replace(exchange_of(MeshConfig(1, 2), "float8_e4m3fn"), scaled=True)
    boxes, rng = random_boxes(exchange, 1), np.random.default_rng(2)
    scales = rng.normal(size=boxes.slot.shape).astype(np.float32)
    boxes = dataclasses.replace(boxes, row_scales=scales)
    results = Roles(exchange).run(in_order(["both"]), [boxes], [0] * 3)
    got = jax.tree.map(lambda *parts: np.concatenate(parts), *(results[role][0][0] for role in ROLES))
    plain = dataclasses.replace(boxes, hidden=np.asarray(boxes.hidden).view(np.uint8), row_scales=None)
    want = expected_arrivals(exchange, plain, "both")
    assert_same_rows(dataclasses.replace(got, hidden=got.hidden.view(np.uint8), row_scales=None), want, 1)
    for r, pairs in enumerate(exchange.rounds.pairs):
        for a, e in pairs:
            for sender, receiver in ((a, e), (e, a)):
                n = want["num_rows"][receiver, r]
                np.testing.assert_array_equal(got.row_scales[receiver, r, :n], scales[sender, r, :n])


def test_roles_need_not_call_together():
    """Each role sends what it has and waits for what it needs: m = 3, in their own orders; numbers still agree."""
    exchange = exchange_of(MeshConfig(2, 2, num_micro_batches=3))
    calls = {
        "attention": ["dispatch", "dispatch", "dispatch", "combine", "both", "combine", "combine"],
        "expert": ["dispatch", "both", "both", "both", "combine"],
    }
    boxes = [random_boxes(exchange, seed) for seed in range(4)]
    n = exchange.mesh.num_devices

    def program(exchange, chain, boxes):
        waiting, arrived = list(boxes), []
        for way in calls[exchange.role]:
            dispatch, combine = WAYS[way]
            sends, receives = (dispatch, combine) if exchange.role == "attention" else (combine, dispatch)
            box = waiting.pop(0) if sends else exchange.empty_box()
            got, chain = exchange(box, chain, dispatch=dispatch, combine=combine)
            arrived += [got] * receives
        return arrived, chain.fault(), chain.sequence

    roles = Roles(exchange)
    results = roles.run(program, boxes, [SEQUENCE_MASK - 1] * n)
    for role, way in (("attention", "combine"), ("expert", "dispatch")):
        arrived, fault, sequence = results[role]
        assert len(arrived) == 4 and (fault == -1).all() and (sequence == 2).all()  # after SEQUENCE_MASK comes 0
        own = roles.indices(role)
        for box, got in zip(boxes, arrived, strict=True):
            want = {k: v[own.start : own.stop] for k, v in expected_arrivals(exchange, box, way).items()}
            assert_same_rows(got, want, 2 if role == "attention" else 0)


@pytest.mark.parametrize("way", ["both", "combine"])
def test_a_device_out_of_step_is_found_by_itself_and_by_its_partners(way):
    exchange = exchange_of(MeshConfig(2, 2))
    dispatch, combine = WAYS[way]
    for planted in (0, 3) if way == "both" else (3,):
        numbers = [41] * 4
        numbers[planted] = 48
        fault = run(exchange, [way], numbers)[2]
        for device in range(4):
            assert fault[device].tolist() == expected_fault(device, planted, dispatch, combine), (planted, device)


def test_a_peer_that_never_comes_is_a_fault_and_later_waits_end_at_once():
    roles = Roles(exchange_of(MeshConfig(1, 1)), deadline_s=0.3)
    boxes = [random_boxes(roles.exchange, seed) for seed in range(40)]  # 40 waits of 0.3 s would be 12 s
    _, fault, _ = roles.run(in_order(["combine"] * 40), boxes, [7, 7], roles=("attention",))["attention"]
    assert fault.tolist() == [[7, TIMED_OUT]]


def test_a_sender_is_never_further_ahead_than_there_are_slots():
    """The n-th message waits until the (n - slots + 1)-th is being received: here nobody receives."""
    exchange = exchange_of(MeshConfig(1, 1, num_micro_batches=3))
    for num_messages, late in ((4, False), (5, True)):
        roles = Roles(exchange, deadline_s=0.3)
        boxes = [random_boxes(exchange, seed) for seed in range(num_messages)]
        _, fault, _ = roles.run(in_order(["dispatch"] * num_messages), boxes, [7, 7], roles=("attention",))["attention"]
        assert fault.tolist() == [[11, TIMED_OUT] if late else [-1, -1]]


def test_an_exchange_without_role_or_table_is_refused():
    exchange = exchange_of(MeshConfig(1, 1))
    for wrong in (exchange, exchange.playing("expert")):
        with pytest.raises(ValueError, match=r"expected a role .* and a mailbox table"):
            wrong(wrong.empty_box(), Chain.start(jnp.int32(0)), dispatch=True, combine=True)


def test_mailboxes_say_who_can_not_be_reached():
    mesh = MeshConfig(1, 1)
    mailboxes = Mailboxes(mesh, list(enumerate(jax.devices()[:2])), 1000)
    with pytest.raises(ValueError, match="expected connected mailboxes"):
        mailboxes.table(0)
    handles = mailboxes.handles()
    with pytest.raises(ValueError, match=r"expected a handle of device 1, got \[0\]"):
        mailboxes.connect({0: handles[0]})
    for change, message in (
        ({"host": "elsewhere"}, "on this host .* got 'elsewhere'"),
        ({"process": -1}, "in this process"),
        ({"slot_bytes": 512}, "slots of 1024 bytes at device 1, got 512"),
    ):
        other = json.dumps(json.loads(handles[1]) | change).encode()
        with pytest.raises(ValueError, match=message):
            mailboxes.connect({0: handles[0], 1: other})
    mailboxes.connect(handles)
    assert mailboxes.table(1).shape == table_shape(mesh)
    with pytest.raises(ValueError, match=r"expected one of \[0, 1\], got 2"):
        mailboxes.table(2)


def test_sizes():
    assert partners(MESHES["tensor 2 and 4"], 0) == [4, 6] and partners(MESHES["2 and 3"], 4) == [0, 1]
    assert [slots_for(m) for m in (1, 2, 3, 4, 7, 8)] == [4, 4, 4, 8, 8, 16]
    message = Message(10, 72, "bfloat16", (2, 2, 1))
    assert (message.row_vectors, message.rows_a_unit, message.max_units) == (9, 14, 1)
    assert message.column_starts == (1440, 1520, 1600) and message.num_bytes == 1648
    assert message.bytes_needed(3) == 3 * (144 + 20)
    with pytest.raises(ValueError, match="multiple of 16 bytes, got 36 of bfloat16"):
        Message(10, 36, "bfloat16").check()
    with pytest.raises(ValueError, match="power of two, at least 2, got 3"):
        MailboxMap(1, 3)
