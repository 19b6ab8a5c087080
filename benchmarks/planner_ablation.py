"""What micro-batches gain, from the closed forms alone: `python benchmarks/planner_ablation.py`.

MegaScale-Infer (arXiv 2504.02263, Figure 14) measured m from 1 to 2 at about 1.9x and m from 2 to 3 at 1.10x, 1.28x and
1.38x for Mixtral, DBRX and Scaled-MoE, whose T_c / T_f are 0.10, 0.28 and 0.38 (balanced stages). The same for the
schedules that this project builds.
"""

import argparse

from jmoe.planner.formulas import SCHEDULE_KINDS, total_time
from jmoe.planner.model_shape import load_model_shape

PUBLISHED = {"mixtral-8x22b": (0.10, 1.10), "dbrx": (0.28, 1.28), "scaled-moe-317b": (0.38, 1.38)}
NAMES = {"separate": "two exchange lanes", "one": "one direction each", "both": "lockstep"}


def gain(kind: str, num_layers: int, before: int, after: int, exchange: float) -> float:
    """Throughput at m = after over m = before, same micro-batch size, T_a = T_e = 1."""
    times = [float(total_time(kind, num_layers, m, 1.0, 1.0, exchange)) / m for m in (before, after)]
    return times[0] / times[1]


def main() -> list[tuple[str, str, float, float]]:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print(
        f"{'schedule':<20} {'model':<16} {'Tc/Tf':>5} {'1 to 2':>7} {'2 to 3':>7} {'paper':>6} {'error':>6} "
        f"{'3 to 4':>7}"
    )
    rows = []
    for kind in SCHEDULE_KINDS:
        for model, (exchange, published) in PUBLISHED.items():
            layers = load_model_shape(model).num_moe_layers
            first, second, third = (gain(kind, layers, m, m + 1, exchange) for m in (1, 2, 3))
            rows.append((kind, model, first, second))
            print(
                f"{NAMES[kind]:<20} {model:<16} {exchange:>5.2f} {first:>6.2f}x {second:>6.2f}x {published:>5.2f}x "
                f"{second / published - 1:>+6.1%} {third:>6.2f}x"
            )
    return rows


if __name__ == "__main__":
    main()
