"""Cost of planning a step, in a fresh process: time and memory for a data set of any size.

python -m benchmarks.order             100 million samples in 10,000 shards
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np

from data.loading.order import TrainingPlan


def main() -> None:
    """Plan a step of a new epoch, then 100 more."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--shard-samples", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=1024)
    arguments = parser.parse_args()
    sizes = (arguments.shard_samples,) * arguments.shards
    plan = TrainingPlan(sizes, seed=0, shuffle_window=4_000_000, batch_size=arguments.batch_size)
    first, *others = [seconds(plan, step) for step in (12_345, *range(100))]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{sum(sizes):,} samples in {arguments.shards:,} shards, batches of {arguments.batch_size:,}")
    print(f"first step of an epoch  {1000 * first:.1f} ms")
    print(f"each other step         {1000 * float(np.median(others)):.2f} ms")
    print(f"memory of the process   {memory:.0f} MB")


def seconds(plan: TrainingPlan, step: int) -> float:
    """Measure the time that planning one step takes."""
    start = time.perf_counter()
    plan.samples(1, step)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
