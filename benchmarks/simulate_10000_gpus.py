"""Simulates 10,000 GPUs for 1,000 decode iterations: scaled-moe-317b on cells of 64 A800-class GPUs.

Growing sequences, Zipf routing, stragglers, and exchanges whose slowdown was measured on the message-level network.
Run: python benchmarks/simulate_10000_gpus.py [--iterations 1000] [--gpus 10000]
"""

import argparse
import time

import numpy as np

from jmoe.planner.decode_model import DecodeModel
from jmoe.planner.exchange_times import ExchangeTimes
from jmoe.planner.hardware import load_catalogue
from jmoe.planner.model_shape import load_model_shape
from jmoe.planner.network_options import NetworkOptions
from jmoe.planner.performance import Roofline
from jmoe.planner.routing import Routing, count_rows, draw_topk
from jmoe.planner.simulator import simulate
from jmoe.planner.stragglers import Stragglers
from jmoe.planner.workload import Workload
from jmoe.schedule import build_schedule
from jmoe.sharding.placement import ExpertPlacement

REPLICAS, ATTENTION_TENSOR, NODES, EXPERT_TENSOR, ROWS, MICRO_BATCHES = 8, 4, 32, 1, 128, 3
CELL_GPUS = REPLICAS * ATTENTION_TENSOR + NODES * EXPERT_TENSOR


def measured_exchange(model, routing: Routing, placement: ExpertPlacement) -> ExchangeTimes:
    """One rank's messages of a few drawn routings through the network: 2 leaves' worth of ports a spine plane."""
    rng = np.random.default_rng(1)
    popularity = routing.popularity(model.num_moe_layers, model.num_experts)
    replica = np.repeat(np.arange(REPLICAS), ROWS)
    draws = []
    for layer in range(0, model.num_moe_layers, 12):
        topk_idx = draw_topk(rng, popularity[layer], len(replica), model.num_experts_per_tok)
        rows, _ = count_rows(rng, topk_idx, replica, placement, REPLICAS)
        draws.append(rows * model.hidden_size * 2 // ATTENTION_TENSOR)
    options = NetworkOptions(endpoints_per_leaf=8, routing="adaptive")
    return ExchangeTimes.measured(options, model.hidden_size * 2, np.stack(draws), repeats=24)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=1000)
    parser.add_argument("--gpus", type=int, default=10_000)
    args = parser.parse_args()
    start = time.perf_counter()
    model, gpu = load_model_shape("scaled-moe-317b"), load_catalogue()["a800"]
    routing = Routing("zipf", zipf_exponent=0.3)
    placement = ExpertPlacement.balanced(model.num_experts, NODES)
    decode = DecodeModel(
        stage_times=Roofline(model, gpu, gpu),
        workload=Workload.lognormal(571, 159, 0.6),
        attention=REPLICAS,
        expert=NODES,
        rows=ROWS,
        num_experts_per_tok=model.num_experts_per_tok,
        placement=placement,
        exchange=measured_exchange(model, routing, placement),
        num_cells=-(-args.gpus // CELL_GPUS),
        attention_tensor=ATTENTION_TENSOR,
        expert_tensor=EXPERT_TENSOR,
        routing=routing,
        attention_stragglers=Stragglers(slow_fraction=0.001, slow_factor=1.1, hiccup_probability=1e-6, hiccup_s=1e-3),
        expert_stragglers=Stragglers(slow_fraction=0.001, slow_factor=1.1, hiccup_probability=1e-6, hiccup_s=1e-3),
    )
    prepared = time.perf_counter()
    schedule = build_schedule(model.num_moe_layers, MICRO_BATCHES, "one")
    report = simulate(schedule, decode, args.iterations, record_iterations=min(8, args.iterations))
    done = time.perf_counter()
    print(f"GPUs {report.num_gpus}, cells {decode.num_cells}, iterations {report.num_iterations}")
    print(f"network measured in {prepared - start:.1f} s, simulated in {done - prepared:.1f} s")
    print(f"simulated time {report.total_s:.1f} s, {report.tokens_per_s:,.0f} tokens/s")
    print(f"{report.tokens_per_s_per_gpu:.1f} tokens/s/GPU")
    for percentile, seconds in report.tpot_percentiles((50, 90, 99, 99.9)).items():
        print(f"TPOT p{percentile:g}: {seconds * 1e3:.2f} ms")
    for lane, share in report.lane_utilisation.items():
        print(f"lane {lane}: {share:.1%} busy")
    for kind, share in report.time_share.items():
        print(f"critical path, {kind}: {share:.1%}")


if __name__ == "__main__":
    main()
