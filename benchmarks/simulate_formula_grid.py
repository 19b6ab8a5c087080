"""The closed forms of one pass against the simulator on a grid of constant times; every row is printed.

T_a = 1; T_e and T_c are in units of it. "full" says whether the pipeline is full: a compute or exchange lane never
waits in steady state (the period of a layer is m stages of the slowest lane).
Run: python benchmarks/simulate_formula_grid.py [--layers 8]
"""

import argparse
import itertools

from jmoe.planner.formulas import layer_period, total_time
from jmoe.planner.simulator import ConstantTimes, simulate
from jmoe.schedule import build_schedule

KINDS = {"separate": ("one", "separate"), "one": ("one", "chain"), "both": ("both", "chain")}
EXPERT = (0.3, 0.7, 0.9, 1.0, 1.3, 2.0)
EXCHANGE = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)


def is_full(kind: str, m: int, expert_s: float, exchange_s: float) -> bool:
    """Whether the slowest lane never waits once the pipeline runs."""
    chain = exchange_s * (2 if kind == "one" else 1)  # a chain carries two one-way exchanges a stage
    return float(layer_period(kind, m, 1.0, expert_s, exchange_s)) <= m * max(1.0, expert_s, chain) * (1 + 1e-9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    layers = parser.parse_args().layers
    print("schedule   m   T_e   T_c  full    formula  simulated  error %")
    worst, rows = 0.0, 0
    for kind, (directions, lanes) in KINDS.items():
        for m, expert_s, exchange_s in itertools.product(range(1, 7), EXPERT, EXCHANGE):
            schedule = build_schedule(layers, m, directions)
            simulated = simulate(schedule, ConstantTimes(1.0, expert_s, exchange_s), exchange_lanes=lanes).total_s
            formula = float(total_time(kind, layers, m, 1.0, expert_s, exchange_s))
            error = 100 * (simulated / formula - 1)
            worst, rows = max(worst, abs(error)), rows + 1
            full = "yes" if is_full(kind, m, expert_s, exchange_s) else "no"
            print(
                f"{kind:>9} {m:>2} {expert_s:>5g} {exchange_s:>5g} {full:>5} {formula:>10.4f} {simulated:>10.4f} "
                f"{error:>8.3f}"
            )
    print(f"{rows} rows, largest error {worst:.3f} % (bar: 0.5 %)")


if __name__ == "__main__":
    main()
