"""Rounds: at most one partner a device and round, every meeting once, in as few rounds as promised."""

import collections
import itertools
import math

import numpy as np
import pytest

from jmoe.sharding.mesh_config import MeshConfig
from jmoe.sharding.rounds import build_rounds

SIZES = [(m, n, a, e) for m, n in itertools.product(range(1, 6), repeat=2) for a, e in ((1, 1), (2, 1), (1, 3), (2, 2))]
SIZES += [(m, n, a, e) for m, n in ((1, 1), (2, 3), (3, 2)) for a, e in ((2, 4), (4, 2), (3, 2), (4, 6), (6, 4))]
SIZES += [(16, 31, 1, 1), (31, 16, 1, 2)]


@pytest.fixture(params=SIZES, ids=str)
def mesh(request):
    attention, expert, attention_tensor, expert_tensor = request.param
    return MeshConfig(attention, expert, attention_tensor=attention_tensor, expert_tensor=expert_tensor)


def test_one_partner_a_round_each_from_the_other_role(mesh):
    for pairs in build_rounds(mesh).pairs:
        assert pairs, "a round in which nobody meets is a permute for nothing"
        met = [device for pair in pairs for device in pair]
        assert len(set(met)) == len(met)
        assert all(mesh.role(a) == "attention" and mesh.role(e) == "expert" for a, e in pairs)


def test_every_replica_node_and_slice_meet_once_on_the_ranks_that_hold_the_slice(mesh):
    rounds = build_rounds(mesh)
    meetings = collections.Counter()
    for r, pairs in enumerate(rounds.pairs):
        for a, e in pairs:
            replica, attention_rank = divmod(a, mesh.attention_tensor)
            node, expert_rank = divmod(e - mesh.num_attention_devices, mesh.expert_tensor)
            s = int(rounds.slice_idx[a, r])
            assert s == rounds.slice_idx[e, r]
            assert (s % mesh.attention_tensor, s % mesh.expert_tensor) == (attention_rank, expert_rank)
            meetings[replica, node, s] += 1
    every = itertools.product(range(mesh.attention), range(mesh.expert), range(mesh.num_slices))
    assert meetings == dict.fromkeys(every, 1)


def test_tables_say_what_the_pairs_say(mesh):
    rounds = build_rounds(mesh)
    peer = np.full((mesh.num_devices, rounds.num_rounds), -1)
    for r, pairs in enumerate(rounds.pairs):
        for a, e in pairs:
            peer[a, r] = (e - mesh.num_attention_devices) // mesh.expert_tensor
            peer[e, r] = a // mesh.attention_tensor
    np.testing.assert_array_equal(rounds.peer, peer)


def test_round_of_is_the_inverse_of_peer_and_slice(mesh):
    rounds = build_rounds(mesh)
    for device in range(mesh.num_devices):
        attention = mesh.role(device) == "attention"
        size, peers = (mesh.attention_tensor, mesh.expert) if attention else (mesh.expert_tensor, mesh.attention)
        rank = (device if attention else device - mesh.num_attention_devices) % size
        found = set()
        for peer, j in itertools.product(range(peers), range(mesh.num_slices // size)):
            r = int(rounds.round_of[device, peer, j])
            assert (rounds.peer[device, r], rounds.slice_idx[device, r]) == (peer, j * size + rank)
            found.add(r)
        assert found == set(np.flatnonzero(rounds.peer[device] >= 0))


def test_number_of_rounds(mesh):
    rounds, sizes = build_rounds(mesh), (mesh.attention_tensor, mesh.expert_tensor)
    assert rounds.num_slices == math.lcm(*sizes)
    assert rounds.num_rounds == max(mesh.attention, mesh.expert) * math.lcm(*sizes) // min(sizes)
    assert rounds.num_rounds == len(rounds.pairs) == rounds.peer.shape[1] == rounds.slice_idx.shape[1]
