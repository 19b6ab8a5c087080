"""What a decode step of vLLM took in spring 2024, less the roofline: `python benchmarks/planner_vllm_2024.py`.

Two public tables of its maintainers, `benchmark_latency.py` at its defaults (32 prompt tokens, 128 answer tokens), the
models of the headline comparison on 4 and 8 GPUs. Neither has anything to do with MegaScale-Infer. The step is the
latency over 128; the prefill, one step of 128, counts as one of them.

- Mixtral 8x22B on A100 80GB: vllm-project/vllm pull request 4002 (April 2024), tuned kernels ("with config").
- DBRX on H100: pull request 3692 (March 2024), tuned kernels ("this PR").

The mean of what is left, step_host_us of benchmarks/planner_headline.toml, is the price of going through the host every
step: scheduler, input preparation, sampling, answers. The maintainers' own figure for it in the same summer is "5-13 ms
of GPU bubble" (issue 6854). Constants: jmoe/planner/hardware.toml.
"""

import argparse
import dataclasses

import numpy as np

from jmoe.planner.baselines import Engine
from jmoe.planner.deployment import Problem
from jmoe.planner.hardware import load_catalogue
from jmoe.planner.model_shape import load_model_shape
from jmoe.planner.workload import Workload

ANSWER = 128
# Seconds by (GPUs, batch).
MEASURED = {
    ("mixtral-8x22b", "a100"): {
        (4, 8): 5.4268, (4, 16): 6.1079, (4, 32): 6.8939, (8, 8): 3.7084, (8, 16): 4.0473, (8, 32): 4.3907,
    },
    ("dbrx", "h100"): {
        (4, 8): 3.2546, (4, 16): 3.6656, (4, 32): 3.9788, (4, 64): 4.4461,
        (8, 8): 2.3051, (8, 16): 2.5643, (8, 32): 2.7667, (8, 64): 3.3473,
    },
}  # fmt: skip


def main() -> list[float]:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    kinds = load_catalogue()
    # The A100 SXM of those tables is an A800 whose NVLink is not cut.
    gpus = {"a100": dataclasses.replace(kinds["a800"], scale_up_gb_s=300), "h100": kinds["h100"]}
    left = []
    print(f"{'model':<14} {'GPUs':>4} {'':<5} {'batch':>5} {'measured ms':>11} {'roofline':>8} {'left':>6}")
    for (model, kind), table in MEASURED.items():
        problem = Problem(load_model_shape(model), kinds, {"h100": 8}, Workload((32,), (ANSWER,)))
        for (ranks, batch), seconds in table.items():
            step = float(Engine(problem, gpus[kind], "tensor", ranks).step(np.array([batch]))[0])
            left.append(seconds / ANSWER - step)
            print(
                f"{model:<14} {ranks:>4} {kind:<5} {batch:>5} {seconds / ANSWER * 1e3:>11.1f} {step * 1e3:>8.1f} "
                f"{left[-1] * 1e3:>6.1f}"
            )
    mean, spread = np.mean(left) * 1e3, np.std(left) * 1e3
    print(f"left a step: mean {mean:.1f} ms, spread {spread:.1f} ms, {len(left)} rows (issue 6854: 5 to 13 ms)")
    return left


if __name__ == "__main__":
    main()
