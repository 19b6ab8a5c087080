"""The optimal attention:FFN ratio of arXiv 2601.21351 against a simulation: `python benchmarks/planner_ratio.py`.

The paper's latency coefficients (DeepSeek-V3 on Ascend 910C) are not public text that we could read; its closed form
and its claim are: the rule agrees with the best ratio of a simulation within 10 %. Here the coefficients come from this
planner's roofline of DeepSeek-V3 (fp8 weights and cache) on a few GPU kinds, for an FFN instance of 8 to 64 GPUs, and
the workloads include the paper's (prompt 100, output 500, 256 slots).
"""

import argparse

import numpy as np

from jmoe.planner.hardware import load_catalogue
from jmoe.planner.model_shape import load_model_shape
from jmoe.planner.optimal_ratio import BundleTimes, barrier_throughput, optimal_ratio, simulate_bundle
from jmoe.planner.performance import Precision, Roofline

WORKLOADS = ((100, 500, 256), (200, 300, 128), (2000, 500, 64), (500, 50, 256), (4000, 1000, 32))
INSTANCES = (("h800", 32), ("h200", 16), ("h20", 32), ("gb200", 16))


def bundle_times(kind: str, ffn_gpus: int, slots: int) -> BundleTimes:
    """Linear fits of the roofline: attention per KV token on one GPU, FFN per row on ffn_gpus GPUs together."""
    model = load_model_shape("deepseek-v3")
    gpu = load_catalogue()[kind]
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


def main() -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    args = parser.parse_args()
    print(
        f"{'GPU':<6} {'FFN GPUs':>8} {'prompt':>6} {'output':>6} {'slots':>5} {'simulated':>9} {'mean-field':>10} "
        f"{'error':>6} {'loss':>6} {'barrier':>7} {'error':>6} {'loss':>6}"
    )
    errors: dict[str, list[float]] = {"mean-field": [], "barrier-aware": []}
    losses: dict[str, list[float]] = {"mean-field": [], "barrier-aware": []}
    for kind, ffn_gpus in INSTANCES:
        for prompt, output, slots in WORKLOADS:
            times = bundle_times(kind, ffn_gpus, slots)
            # Geometric outputs: a slot at a random step holds its prompt and an age that is geometric as well.
            mean, variance = prompt + output - 1, prompt * (prompt - 1) + output * (output - 1)
            rule = optimal_ratio(times, slots, mean)
            ratios = np.arange(1, min(192, max(16, int(2 * rule) + 4)) + 1)
            found = simulate_bundle(times, slots, prompt, output, len(ratios), args.steps)
            best = int(found.argmax()) + 1
            text = f"{kind:<6} {ffn_gpus:>8} {prompt:>6} {output:>6} {slots:>5} {best:>9}"
            barrier = int(ratios[barrier_throughput(times, slots, mean, variance, ratios).argmax()])
            for name, value in (("mean-field", rule), ("barrier-aware", barrier)):
                near = min(len(ratios), max(1, round(value)))
                errors[name].append(abs(near - best) / best)
                losses[name].append(float(1 - found[near - 1] / found.max()))
                shown = f"{value:>10.2f}" if name == "mean-field" else f"{value:>7}"
                text += f" {shown} {near / best - 1:>+6.0%} {losses[name][-1]:>6.1%}"
            print(text)
    for name, values in errors.items():
        within = sum(error <= 0.10 for error in values)
        print(f"{name}: {within} of {len(values)} within 10 %, at most {max(losses[name]):.1%} of the throughput lost")
    return errors["mean-field"]


if __name__ == "__main__":
    main()
