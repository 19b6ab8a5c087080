"""The roofline by hand, and what travels and is held, against counting."""

import dataclasses

import numpy as np
import pytest

from jmoe.planner.collectives import collective_s
from jmoe.planner.hardware import load_catalogue
from jmoe.planner.model_shape import load_model_shape
from jmoe.planner.nccl_cost import nccl_all_reduce_s
from jmoe.planner.performance import (
    ExchangeModel,
    Memory,
    Precision,
    Roofline,
    balanced_replicas,
    distinct_nodes,
    drawn_excess,
    linear_constants,
)

KINDS = load_catalogue().plain_roofline()  # by hand; the knee has tests of its own
MIXTRAL = load_model_shape("mixtral-8x22b")
DEEPSEEK = load_model_shape("deepseek-v3")


def test_experts_by_hand():
    """8 rows: weights decide; 4096 rows of one expert: operations decide; sliced in two: half of either."""
    gpu = KINDS["a800"]
    times = Roofline(MIXTRAL, gpu, gpu)
    weights = 3 * 6144 * 16384 * 2
    small = 8 * (2 * 6144 + 3 * 16384) * 2
    assert times.expert_products_s(8, 1, 1) == pytest.approx((weights + small) / gpu.stream_bytes_s)
    assert times.expert_products_s(4096, 1, 1) == pytest.approx(weights * 4096 / gpu.product_flops_s(2))
    assert times.expert_products_s(4096, 1, 2) == pytest.approx(weights * 4096 / gpu.product_flops_s(2) / 2)


def test_the_knee():
    """Both parts equally long: sqrt(2) of either; one part alone: itself."""
    gpu = load_catalogue()["h100"]
    seconds = 1e-3
    num_bytes, operations = seconds * gpu.stream_bytes_s, seconds * gpu.product_flops_s(2)
    assert gpu.kernel_s(num_bytes, operations, 2) == pytest.approx(2**0.5 * seconds)
    assert gpu.kernel_s(num_bytes, 0, 2) == pytest.approx(seconds)
    assert gpu.kernel_s(0, operations, 2) == pytest.approx(seconds)
    softer = dataclasses.replace(gpu, kernels=dataclasses.replace(gpu.kernels, knee_power=3.0))
    assert softer.kernel_s(num_bytes, operations, 2) == pytest.approx(2 ** (1 / 3) * seconds)
    assert KINDS["h100"].kernel_s(num_bytes, operations, 2) == pytest.approx(seconds)


def test_only_experts_with_rows_are_read():
    rng = np.random.default_rng(0)
    drawn = np.mean([len(set(rng.integers(0, 32, 40))) for _ in range(4000)])
    gpu = KINDS["h100"]
    times = Roofline(DEEPSEEK, gpu, gpu)
    one = float(times.expert_products_s(1, 1, 1))
    assert float(times.expert_products_s(40, 32, 1)) == pytest.approx(drawn * one, rel=0.02)


def test_attention_grows_with_the_cache():
    gpu = KINDS["h20"]
    times = Roofline(MIXTRAL, gpu, gpu)
    longer = times.attention_s(64, 2000, 1) - times.attention_s(64, 1000, 1)
    assert longer == pytest.approx(64 * 1000 * 2048 * 2 / gpu.stream_bytes_s)
    # One KV head a rank at 8 ranks; two ranks share a head, and read it both, at 16.
    cache = [float(times.attention_s(64, 1e6, t) - times.attention_s(64, 0, t)) for t in (8, 16)]
    assert cache[0] == pytest.approx(cache[1])


def test_mla_in_its_absorbed_form_is_compute_bound():
    gpu = KINDS["h800"]
    times = Roofline(DEEPSEEK, gpu, gpu, Precision(1.0, 1.0, 1.0))
    longer = times.attention_s(64, 8000, 1) - times.attention_s(64, 4000, 1)
    assert longer == pytest.approx(64 * 4000 * 2 * 128 * (576 + 512) / gpu.product_flops_s(2))


def test_shared_experts_and_dense_layers_cost_time():
    gpu = KINDS["h800"]
    with_shared = Roofline(DEEPSEEK, gpu, gpu).attention_s(16, 1000, 1)
    without = Roofline(dataclasses.replace(DEEPSEEK, shared_ffn_size=0), gpu, gpu).attention_s(16, 1000, 1)
    assert with_shared - without == pytest.approx(3 * 7168 * 2048 * 2 / gpu.stream_bytes_s)
    assert Roofline(DEEPSEEK, gpu, gpu).dense_s(16, 1000, 1) > with_shared


def test_fp8_weights_halve_the_bytes_and_double_the_rate():
    gpu = KINDS["h100"]
    bf16, fp8 = (Roofline(MIXTRAL, gpu, gpu, Precision(weight_bytes=b)) for b in (2.0, 1.0))
    for rows in (1, 8192):
        assert bf16.expert_products_s(rows, 1, 1) / fp8.expert_products_s(rows, 1, 1) == pytest.approx(2, rel=0.01)


@pytest.mark.parametrize(("experts", "k", "nodes"), [(8, 2, 8), (8, 2, 4), (128, 8, 16), (256, 8, 32), (16, 4, 2)])
def test_distinct_nodes_against_draws(experts, k, nodes):
    rng = np.random.default_rng(0)
    owner = np.arange(experts) * nodes // experts
    drawn = np.mean([len(set(owner[rng.permutation(experts)[:k]])) for _ in range(3000)])
    assert distinct_nodes(experts, k, nodes) == pytest.approx(drawn, rel=0.03)


def test_replicated_experts_do_not_add_copies_of_a_token():
    assert distinct_nodes(8, 2, 24) == pytest.approx(2.0)


def test_exchange_is_the_slower_side():
    """Eq. 6: with one expert a node a token goes to k nodes; the receiver gets its share of all replicas' rows."""
    a, e = KINDS["h20"], KINDS["l40s"]
    exchange = ExchangeModel(MIXTRAL, a, e)
    sent, received = exchange.bytes_a_gpu(100, 4, 8, 2, 1)
    assert sent == pytest.approx(100 * 2 * 6144 * 2 / 2)
    assert received == pytest.approx(100 * 4 * 2 / 8 * 6144 * 2)
    slower = max(sent / a.nic_bytes_s, received / e.nic_bytes_s)
    assert exchange.exchange_s(100, 4, 8, 2, 1) == pytest.approx(slower + 10e-6)
    inside = exchange.exchange_s(100, 4, 8, 2, 1, 1.0, True)
    assert inside == pytest.approx(max(sent / a.scale_up_bytes_s, received / e.scale_up_bytes_s) + 8e-6)
    busier = exchange.exchange_s(100, 4, 8, 2, 1, imbalance=2.0)
    assert busier == pytest.approx(2 * received / e.nic_bytes_s + 10e-6)


def test_padded_transport_moves_the_worst_case():
    exact, padded = (ExchangeModel(MIXTRAL, KINDS["h20"], KINDS["h20"], transport=t) for t in ("exact", "ppermute"))
    for side in (0, 1):
        ratio = padded.bytes_a_gpu(64, 4, 8, 1, 1)[side] / exact.bytes_a_gpu(64, 4, 8, 1, 1)[side]
        assert ratio == pytest.approx(8 / 2)


def test_collective_over_hosts_takes_the_nics_as_well():
    gpu = KINDS["a800"]
    data = 64e6
    assert collective_s(gpu, data, 1) == 0
    inside = collective_s(gpu, data, 8)
    assert inside == pytest.approx(12e-6 + 2 * 7 / 8 * data / gpu.scale_up_bytes_s)
    assert collective_s(gpu, data, 16) - inside == pytest.approx(22e-6 + data / 8 / gpu.nic_bytes_s)


def test_memory_is_the_papers_equation_8():
    """4 m b s h L / g + 2 P_a: two bytes, keys and values of h / g elements each."""
    memory = Memory(MIXTRAL)
    m, b, s, h, layers, g = 3, 100, 700, 6144, 56, 48 / 8
    assert m * b * s * memory.kv_token_bytes(1) == pytest.approx(4 * m * b * s * h * layers / g)
    free = KINDS["h20"].usable_bytes - 2 * MIXTRAL.attention_role_params
    assert memory.max_kv_tokens(KINDS["h20"], 1) == pytest.approx(free / memory.kv_token_bytes(1))
    assert memory.max_kv_tokens(KINDS["l40s"], 1, 1e12) < 0


def test_balanced_ratio_makes_both_stages_equal():
    gpu = KINDS["h100"]
    times = Roofline(MIXTRAL, gpu, gpu)
    k1, k2, k3, k4 = linear_constants(times, 650, (1, 1))
    replicas = balanced_replicas(k1, k3, MIXTRAL)
    rows = 3000.0
    attention = k1 * rows + k2
    experts = k3 * rows * replicas * 2 / 8 + k4
    assert attention - k2 == pytest.approx(experts - k4)
    assert balanced_replicas(k1, k3, MIXTRAL, 4) == pytest.approx(replicas / 2)


def test_bad_precision():
    with pytest.raises(ValueError, match="expected 1, 2 or 4 bytes"):
        Precision(weight_bytes=3.0)


def test_drawn_excess_against_draws():
    """Busiest node over the mean, tokens that draw k different experts evenly; one expert a node and four."""
    rng = np.random.default_rng(0)
    for experts, k, nodes, tokens in ((8, 2, 8, 300), (32, 4, 8, 200)):
        draws = np.argsort(rng.random((400, tokens, experts)), axis=2)[:, :, :k] // (experts // nodes)
        loads = np.stack([(draws == node).sum((1, 2)) for node in range(nodes)], 1)
        expected = loads.max(1).mean() / (tokens * k / nodes)
        assert drawn_excess(experts, k, experts // nodes, nodes, tokens) - 1 == pytest.approx(expected - 1, rel=0.1)
    assert drawn_excess(8, 2, 8, 1, 100) == 1


def test_nccl_costs_are_the_tuners():
    """By hand: 16 GPUs on two hosts, 4 MB, a ring with the LL128 protocol; peer kernels only inside a host."""
    kernels = dataclasses.replace(KINDS["a800"].kernels, nccl_costs=True)
    gpu = dataclasses.replace(KINDS["a800"], kernels=kernels)
    ring = 10.0 + 28 * 1.9 + 2 * 4.0 + 4e6 / (160e9 * 0.92 * 16 / 30) * 1e6
    assert collective_s(gpu, 4e6, 16) == pytest.approx(ring * 1e-6)
    assert collective_s(gpu, 4e6, 8) == pytest.approx(collective_s(KINDS["a800"], 4e6, 8))
    assert collective_s(gpu, 64e6, 8) > collective_s(KINDS["a800"], 64e6, 8)
    assert nccl_all_reduce_s(gpu, [8.0], 8) == pytest.approx(10.2e-6, rel=0.01)  # the LL ring's 3.6 + 14 x 0.47
    assert nccl_all_reduce_s(KINDS["l40s"], 64e6, 8) > nccl_all_reduce_s(gpu, 64e6, 8)
