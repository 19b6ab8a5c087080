"""Gradients through dispatch, experts and combine equal the dense formula's, in one process and in one a role."""

import functools
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from permutes import expected_permutes, permutes_of
from two_role_gradient import CONFIG, LAYERS, Problem, attention_step, both_roles, dense_gradients, expert_step

from jmoe.lowering import on_each_device
from jmoe.sharding.exchange import Box, Chain, Exchange
from jmoe.sharding.mesh_config import MeshConfig
from jmoe.sharding.meshes import joint_mesh
from jmoe.sharding.placement import ExpertPlacement

REPLICATED = ExpertPlacement(((0, 1, 5), (2, 3, 0), (4, 5)))
MESHES = {
    "1 and 1": MeshConfig(1, 1),
    "2 and 3, two experts replicated": MeshConfig(2, 3, placement=REPLICATED),
    "3 and 2": MeshConfig(3, 2),
}
WORKER = pathlib.Path(__file__).with_name("gradient_worker.py")
WORKER_LIMIT_S = 150


def assert_gradients_equal(problem: Problem, x, topk_weights, experts):
    want_x, want_weights, want_experts = dense_gradients(problem)
    np.testing.assert_allclose(x, want_x, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(topk_weights, want_weights, rtol=1e-4, atol=1e-5)
    assert set(experts) == set(want_experts)
    for path, want in want_experts.items():
        np.testing.assert_allclose(experts[path], want, rtol=1e-4, atol=1e-5, err_msg=path)
    assert all(np.abs(want).max() > 0.1 for want in (want_x, want_weights, *want_experts.values()))


def inline_gradients(problem: Problem):
    """(x, topk_weights, expert weights) by one program that every device runs."""
    mesh = problem.cell.mesh
    idle = [np.zeros_like(a) for a in problem.held_by(0).values()]

    def step(topk_idx, valid, cotangent, x, topk_weights, params, order):
        function = functools.partial(both_roles, problem, topk_idx, valid)
        (_, order_out), pullback = jax.vjp(function, x, topk_weights, params, order)
        return pullback((cotangent, jnp.zeros_like(order_out)))

    def over_devices(array):  # expert devices hold zeros
        return np.concatenate([array, np.zeros((mesh.expert, *array.shape[1:]), array.dtype)])

    fields = ("topk_idx", "valid", "cotangent", "x", "topk_weights")
    held = [dict(zip(problem.experts, idle, strict=True))] * mesh.attention
    held += [problem.held_by(node) for node in range(mesh.expert)]
    params = jax.tree.map(lambda *parts: np.stack(parts), *held)
    order = np.zeros(mesh.num_devices, np.float32)
    program = jax.jit(on_each_device(step, joint_mesh(mesh, jax.devices())))
    x, weights, experts, _ = program(*(over_devices(getattr(problem, name)) for name in fields), params, order)
    m = mesh.attention
    by_node = [{path: a[m + node] for path, a in experts.items()} for node in range(mesh.expert)]
    return x[:m], weights[:m], problem.whole(by_node)


@pytest.mark.parametrize("name", MESHES)
def test_gradients_of_both_roles_in_one_program(name):
    problem = Problem.of(MESHES[name])
    assert_gradients_equal(problem, *inline_gradients(problem))


@pytest.mark.parametrize("role", ["attention", "expert"])
def test_each_roles_program_holds_every_exchange_forward_then_backward(role):
    """Forward the experts' last exchange brings them nothing, backward attention's: neither may go, nor move."""
    problem = Problem.of(MeshConfig(2, 3))
    mesh, order = problem.cell.mesh, np.float32(0)
    if role == "attention":
        fields = ("topk_idx", "valid", "cotangent", "x", "topk_weights")
        step, arguments = attention_step, (*(getattr(problem, name)[0] for name in fields), order)
    else:
        step, arguments = expert_step, (problem.held_by(0), order)
    everywhere = jax.tree.map(lambda a: np.stack([a] * mesh.num_devices), arguments)
    program = jax.jit(on_each_device(functools.partial(step, problem), joint_mesh(mesh, jax.devices())))
    walk = [(True, False), (False, True)] * (2 * LAYERS)  # the gradient of the last combine goes out like a dispatch
    assert permutes_of(program.lower(*everywhere)) == expected_permutes(problem.exchange, walk)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_gradients_of_two_processes_that_trace_one_role_each(tmp_path):
    mesh, port = MeshConfig(2, 3), str(free_port())
    workers = []
    try:
        for process_id in ("0", "1"):
            command = [sys.executable, "-P", str(WORKER), process_id, port, "2", "3", str(tmp_path)]
            with open(tmp_path / f"log.{process_id}", "wb") as log:
                workers.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))
        codes = [worker.wait(WORKER_LIMIT_S) for worker in workers]
        logs = "\n".join((tmp_path / f"log.{i}").read_text()[-3000:] for i in (0, 1))
        assert codes == [0, 0], logs
    finally:
        for worker in workers:
            worker.kill()
            worker.wait(10)
    problem = Problem.of(mesh)
    by_node = [{p: np.load(tmp_path / f"{p}.1.npy")[node] for p in problem.experts} for node in range(mesh.expert)]
    x, topk_weights = np.load(tmp_path / "x.0.npy"), np.load(tmp_path / "topk_weights.0.npy")
    assert_gradients_equal(problem, x, topk_weights, problem.whole(by_node))
    for process_id in (0, 1):
        assert not np.load(tmp_path / f"order.{process_id}.npy").any(), "the order is a zero that only gives an order"


@pytest.mark.parametrize(("dispatch", "combine"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("sizes", [MeshConfig(2, 3), MeshConfig(1, 2, attention_tensor=3, expert_tensor=2)], ids=str)
def test_the_gradient_of_an_exchange_is_the_exchange_turned_round(sizes, dispatch, combine):
    """Bit by bit: each partner gets back the cotangents of what it sent, and zeros for what it did not send."""
    exchange = Exchange.of(sizes, CONFIG.hidden_size, 4, 2, "float32")
    rng = np.random.default_rng(0)
    devices, rounds = sizes.num_devices, exchange.rounds.num_rounds
    hidden = rng.normal(size=(2, devices, rounds, 4, exchange.format.width)).astype(np.float32)
    weights = rng.normal(size=(2, devices, rounds, 4, 2)).astype(np.float32)

    def step(hidden, weights, dhidden, dweights):
        def function(hidden, weights, order):
            empty = exchange.empty_box()
            box = Box(hidden, weights, empty.local_idx, empty.slot, empty.num_rows)
            arrived, chain = exchange(box, Chain.start(jnp.int32(0), order), dispatch=dispatch, combine=combine)
            return arrived.hidden, arrived.topk_weights, chain.order

        _, pullback = jax.vjp(function, hidden, weights, jnp.float32(0))
        return pullback((dhidden, dweights, jnp.float32(0)))

    program = jax.jit(on_each_device(step, joint_mesh(sizes, jax.devices())))
    got = program(hidden[0], weights[0], hidden[1], weights[1])
    for gradient, cotangent, sent in ((got[0], hidden[1], True), (got[1], weights[1], dispatch)):
        want = np.zeros_like(cotangent)
        for r, pairs in enumerate(exchange.rounds.pairs):
            for a, e in pairs:
                if dispatch and sent:
                    want[a, r] = cotangent[e, r]
                if combine and sent:
                    want[e, r] = cotangent[a, r]
        np.testing.assert_array_equal(gradient, want)
