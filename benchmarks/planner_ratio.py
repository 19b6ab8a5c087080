"""The optimal attention:FFN ratio of arXiv 2601.21351 against a simulation: `python benchmarks/planner_ratio.py`.

The paper's latency coefficients (DeepSeek-V3 on Ascend 910C) are not public text that we could read; its closed form
and its claim are: the rule agrees with the best ratio of a simulation within 10 %. So it is put to its own test on this
planner's times for DeepSeek-V3 (fp8 weights and cache), an FFN instance of 16 or 32 GPUs, workloads with geometric
lengths, the paper's (prompt 100, output 500, 256 slots) among them, and its own device from public figures. The rules:

- mean-field: the paper's closed form, every worker at the mean load.
- Gaussian: its refinement, the fullest of r workers with normal loads.
- exact: the fullest of r workers with the loads' own distribution (`jmoe.planner.worker_load`).

The simulation averages steps that are many answers apart, with drawn requests; nothing of the rules is in it.
"""

import argparse

import numpy as np

from jmoe.planner.hardware import Catalogue, GpuKind, load_catalogue
from jmoe.planner.model_shape import load_model_shape
from jmoe.planner.optimal_ratio import BundleTimes, barrier_throughput, optimal_ratio, simulate_bundle
from jmoe.planner.performance import Precision, Roofline
from jmoe.planner.worker_load import barrier_throughput_exact, geometric_slot_load, worker_load

WORKLOADS = ((100, 500, 256), (200, 300, 128), (2000, 500, 64), (500, 50, 256), (4000, 1000, 32))
INSTANCES = (("h800", 32), ("h200", 16), ("h20", 32), ("gb200", 16), ("910c", 32))


def catalogue() -> Catalogue:
    """The planner's, and one die of an Ascend 910C: 376 TFLOPS bf16, twice that in int8, 64 GB at 1.6 TB/s, 196 GB/s of
    unified bus (arXiv 2506.12708); H100's shares, for want of others. Price and watts do not count here.
    """
    kinds = load_catalogue()
    h100 = kinds["h100"]
    die = GpuKind(
        "910c", price=1, watts=1, memory_gb=64, memory_gb_s=1600, bf16_tflops=376, scale_up_gb_s=196,
        scale_up_domain=768, gpus_per_host=16, nics_per_host=16, nic_gbps=200, matmul_fraction=h100.matmul_fraction,
        memory_fraction=h100.memory_fraction, kernels=h100.kernels, fp8_tflops=752,
    )  # fmt: skip
    return Catalogue(dict(kinds) | {"910c": die})


def bundle_times(kind: str, ffn_gpus: int, slots: int) -> BundleTimes:
    """Linear fits of the roofline: attention per KV token on one GPU, FFN per row on ffn_gpus GPUs together."""
    model = load_model_shape("deepseek-v3")
    gpu = catalogue()[kind]
    times = Roofline(model, gpu, gpu, Precision(1.0, 1.0, 1.0))
    tokens = np.array([500.0, 4000.0])
    attention = times.attention_s(slots, tokens, 1)
    slope = float((attention[1] - attention[0]) / (slots * (tokens[1] - tokens[0])))
    rows = np.array([4096.0, 65536.0])
    share = model.num_experts_per_tok / ffn_gpus
    ffn = times.expert_s(rows * share, model.num_experts / ffn_gpus, 1)
    ffn_slope = float((ffn[1] - ffn[0]) / (rows[1] - rows[0]))
    return BundleTimes(
        slope, float(attention[0]) - slope * slots * tokens[0], ffn_slope, float(ffn[0]) - ffn_slope * rows[0], 50e-6
    )


def best_ratios(times: BundleTimes, prompt: int, output: int, slots: int, steps: int) -> tuple[int, dict, dict]:
    """The simulation's best r, each rule's, and the share of the simulation's throughput that each rule gives up."""
    # Geometric outputs: a slot at a random step holds its prompt and an age that is geometric as well.
    mean, variance = prompt + output - 1, prompt * (prompt - 1) + output * (output - 1)
    rule = optimal_ratio(times, slots, mean)
    ratios = np.arange(1, min(192, max(16, int(2 * rule) + 4)) + 1)
    found = simulate_bundle(times, slots, prompt, output, len(ratios), steps, far_apart=True)
    load = worker_load(geometric_slot_load(prompt, output), slots)
    rules = {
        "mean-field": min(len(ratios), max(1, round(rule))),
        "Gaussian": int(ratios[barrier_throughput(times, slots, mean, variance, ratios).argmax()]),
        "exact": int(ratios[barrier_throughput_exact(times, load, slots, ratios).argmax()]),
    }
    lost = {name: float(1 - found[r - 1] / found.max()) for name, r in rules.items()}
    return int(ratios[found.argmax()]), rules, lost


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--gpus", nargs="+", choices=[kind for kind, _ in INSTANCES], help="some of the kinds only")
    args = parser.parse_args(argv)
    names = ("mean-field", "Gaussian", "exact")
    print(f"{'GPU':<6} {'FFN GPUs':>8} {'prompt':>6} {'output':>6} {'slots':>5} {'simulated':>9}", end="")
    print("".join(f" {name:>10} {'error':>6} {'loss':>6}" for name in names))
    errors: dict[str, list[float]] = {name: [] for name in names}
    losses: dict[str, list[float]] = {name: [] for name in names}
    wanted = [(kind, size) for kind, size in INSTANCES if not args.gpus or kind in args.gpus]
    for kind, ffn_gpus in wanted:
        for prompt, output, slots in WORKLOADS:
            best, rules, given_up = best_ratios(bundle_times(kind, ffn_gpus, slots), prompt, output, slots, args.steps)
            text = f"{kind:<6} {ffn_gpus:>8} {prompt:>6} {output:>6} {slots:>5} {best:>9}"
            for name in names:
                errors[name].append(abs(rules[name] - best) / best)
                losses[name].append(given_up[name])
                text += f" {rules[name]:>10} {rules[name] / best - 1:>+6.0%} {given_up[name]:>6.1%}"
            print(text)
    for name in names:
        within, lost = sum(error <= 0.10 for error in errors[name]), max(losses[name])
        print(f"{name}: {within} of {len(errors[name])} within 10 %, at most {lost:.1%} of throughput lost")
    return errors


if __name__ == "__main__":
    main()
