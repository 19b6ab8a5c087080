"""M2N under load: 128 KB to each of 8, 16 and 32 receivers at 200 Gb/s, simulated and against published figures.

First the time from a sender's start to its last arrival while as many senders as receivers send at once (starts within
1 us of each other, exponential), on several networks. Then the tail of posts in batches of 8 through a host thread,
fitted at 8 receivers, and how much the prediction depends on the one thing that the fit can't tell.
Run: python benchmarks/simulate_m2n_tail.py [--repeats 20]
"""

import argparse

import numpy as np

from jmoe.planner.m2n_tail import fit_stall_period, line_rate_s, middle_stall_probability, transfer_quantile_s
from jmoe.planner.network import Network
from jmoe.planner.network_messages import many_to_many
from jmoe.planner.network_options import NetworkOptions

MESSAGE, GBPS = 128 * 1024, 200.0
PUBLISHED_P99 = {8: 1090e-6, 16: 1220e-6, 32: 1760e-6}  # arXiv 2504.02263, NCCL
NETWORKS = {
    "one leaf, rotated": NetworkOptions(endpoints_per_leaf=64),
    "one leaf, incast": NetworkOptions(endpoints_per_leaf=64, posting="same"),
    "leaves of 8, ECMP": NetworkOptions(endpoints_per_leaf=8),
    "leaves of 8, ECMP, 8 queue pairs": NetworkOptions(endpoints_per_leaf=8, queue_pairs=8),
    "leaves of 8, adaptive": NetworkOptions(endpoints_per_leaf=8, routing="adaptive"),
    "leaves of 8, probed": NetworkOptions(endpoints_per_leaf=8, routing="probed", queue_pairs=4),
    "leaves of 8, adaptive, 2:1": NetworkOptions(endpoints_per_leaf=8, routing="adaptive", oversubscription=2.0),
}


def loaded_times(options: NetworkOptions, num_receivers: int, repeats: int) -> np.ndarray:
    """Seconds of every sender in every repeat."""
    rng = np.random.default_rng(num_receivers)
    ends, sizes = np.arange(num_receivers), np.full((num_receivers, num_receivers), MESSAGE)
    took = []
    for repeat in range(repeats):
        start = rng.exponential(1e-6, num_receivers)
        messages = many_to_many(sizes, ends, num_receivers + ends, start, options.posting)
        arrived = Network(options, 2 * num_receivers, repeat).run(messages).arrived_s
        took.append([arrived[messages.sender == sender].max() - start[sender] for sender in ends])
    return np.array(took).ravel()


def print_loaded(repeats: int) -> None:
    print(f"{'network':>34} {'receivers':>9} {'line rate us':>12} {'median us':>10} {'P99 us':>8} {'median/line':>11}")
    for name, options in NETWORKS.items():
        for num_receivers in PUBLISHED_P99:
            took = loaded_times(options, num_receivers, repeats)
            line = line_rate_s(num_receivers, MESSAGE, GBPS)
            median, p99 = np.quantile(took, (0.5, 0.99))
            print(
                f"{name:>34} {num_receivers:>9} {line * 1e6:>12.1f} {median * 1e6:>10.1f} {p99 * 1e6:>8.1f} "
                f"{median / line:>11.2f}"
            )


def print_tail() -> None:
    print()
    print("batches of 8, stall period fitted to P99 at 8 receivers")
    print(" stall p period us receivers  median us   P99 us published  error %")
    middle = middle_stall_probability()
    for p in (0.02, 0.03, middle, 0.06, 0.10, 0.15):
        batches = fit_stall_period(PUBLISHED_P99[8], 8, MESSAGE, GBPS, stall_probability=p)
        for num_receivers, published in PUBLISHED_P99.items():
            median, p99 = (transfer_quantile_s(batches, num_receivers, MESSAGE, GBPS, q) for q in (0.5, 0.99))
            mark = "  <- default" if p == middle else ""
            print(
                f"{p:>8.3f} {batches.stall_period_s * 1e6:>9.0f} {num_receivers:>9} {median * 1e6:>10.1f} "
                f"{p99 * 1e6:>8.0f} {published * 1e6:>9.0f} {100 * (p99 / published - 1):>8.1f}{mark}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=20)
    print_loaded(parser.parse_args().repeats)
    print_tail()


if __name__ == "__main__":
    main()
