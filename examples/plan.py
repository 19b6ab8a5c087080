"""Searches deployments in Python: the best, the second, and why another one loses. No GPU, no JAX.

    python examples/plan.py
"""

from jmoe.planner.deployment import Problem
from jmoe.planner.hardware import load_catalogue
from jmoe.planner.model_shape import load_model_shape
from jmoe.planner.search import search
from jmoe.planner.table import explain, find, rank


def main() -> None:
    problem = Problem(load_model_shape("dbrx"), load_catalogue(), {"h20": 16, "l40s": 16})
    table = search(problem)  # a pandas DataFrame of every configuration that was tried
    columns = ["attention", "expert", "num_micro_batches", "batch", "step_s", "tokens_s_per_price"]
    ranked = rank(table, "price")
    print(f"{len(table):,} configurations; the best three by throughput per price:")
    print(ranked[columns].head(3).to_string(index=False))
    other = find(table, attention=4, expert=4).iloc[0]
    print("four of each:", explain(other, problem, ranked.iloc[0], "price"))


if __name__ == "__main__":
    main()
