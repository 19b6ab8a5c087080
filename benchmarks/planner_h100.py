"""The roofline against kernels and decode steps measured on one H100: `python benchmarks/planner_h100.py`.

Measured with CUDA-graph replay over rotating inputs on an H100 80GB HBM3, bf16, uniform random routing, best public
kernel per case (torch 2.11, vLLM, SGLang, DeepGEMM); decode steps are vLLM 0.26 on Qwen3-30B-A3B cut to 12 layers at
1,024 tokens of context. The two efficiency fractions and the stage overhead in hardware.toml are read off tables like
these, so this shows how far one pair of numbers carries, not an independent prediction.
"""

import argparse
import dataclasses

import numpy as np

from jmoe.planner.baselines import Engine
from jmoe.planner.deployment import Problem
from jmoe.planner.hardware import load_catalogue
from jmoe.planner.model_shape import load_model_shape
from jmoe.planner.performance import Roofline
from jmoe.planner.workload import Workload

# Whole expert FFN from a given top-k, and the products alone: ms by tokens.
FFN = {
    "qwen3-30b-a3b": {16: (0.271, 0.298), 128: (0.422, 0.450), 512: (0.466, 0.456), 4096: (0.852, 0.795)},
    "dbrx": {16: (2.080, 2.150), 128: (2.240, 2.163), 512: (3.013, 2.556), 4096: (11.320, 10.020)},
    "mixtral-8x22b": {16: (1.592, 1.620), 128: (1.715, 1.628), 512: (2.382, 1.932), 4096: (7.910, 8.005)},
}
# Paged decode attention, 48 query and 8 KV heads of 128, lengths uniform in [context / 2, context]: ms.
ATTENTION = {(32, 1024): 0.045, (128, 1024): 0.147, (256, 1024): 0.281, (128, 4096): 0.538, (128, 16384): 2.148}
STEPS = {16: 4.567, 128: 7.702}


def main() -> list[tuple[str, float, float]]:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    kinds = load_catalogue()
    plain = kinds.plain_roofline()["h100"]
    gpu = kinds["h100"]
    rows = []
    print(f"{'what':<44} {'measured ms':>16} {'roofline':>9} {'with the knee':>13} {'error':>6}")
    for model, cases in FFN.items():
        shape = load_model_shape(model)
        for tokens, (whole, products) in cases.items():
            pairs, experts = tokens * shape.num_experts_per_tok, shape.num_experts
            flat, knee = (float(Roofline(shape, g, g).expert_products_s(pairs, experts, 1)) * 1e3 for g in (plain, gpu))
            rows.append((f"{model} experts, {tokens} tokens", min(whole, products), knee))
            measured = f"{whole:.3f} ({products:.3f})"
            error = knee / min(whole, products) - 1
            print(f"{rows[-1][0]:<44} {measured:>16} {flat:>9.3f} {knee:>13.3f} {error:>+6.0%}")
    for (requests, context), measured in ATTENTION.items():
        tokens = requests * 0.75 * context
        knee = float(gpu.kernel_s(tokens * 2 * 8 * 128 * 2, tokens * 4 * 48 * 128, 2)) * 1e3
        rows.append((f"paged attention, {requests} requests x {context}", measured, knee))
        print(f"{rows[-1][0]:<44} {measured:>16.3f} {'':>9} {knee:>13.3f} {knee / measured - 1:>+6.0%}")
    cut = dataclasses.replace(load_model_shape("qwen3-30b-a3b"), num_layers=12)
    engine = Engine(Problem(cut, kinds, {"h100": 1}, Workload((1024,), (1,))), gpu, "tensor", 1)
    for batch, measured in STEPS.items():
        step = float(engine.step(np.array([batch]))[0]) * 1e3
        rows.append((f"whole decode step, batch {batch}", measured, step))
        print(f"{rows[-1][0]:<44} {measured:>16.3f} {'':>9} {step:>13.3f} {step / measured - 1:>+6.0%}")
    return rows


if __name__ == "__main__":
    main()
