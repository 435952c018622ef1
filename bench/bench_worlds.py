"""Does training find what is there, and nothing where nothing is?

Two worlds whose answer is known, five seeds each, 200,000 steps each, unseen series:
  planted_signal  net profit as a share of the optimum (dynamic programming with hindsight, same
                  actions and costs); at least 85 % in the median
  random_walk     share of steps with a position, at a fee; at most 5 % in at least 4 of 5 seeds

    python bench/bench_worlds.py [--steps N] [--seeds N] [--first-seed S] [--worlds NAME ...]

The recipe is `worlds`, the same for both worlds and every seed; its file says why. It was chosen on
seeds 0 to 7, so look at others too (--first-seed 100).
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

from rlv3.audit import play, trained
from rlv3.cli import RECIPES, read_config
from rlv3.config import RLv3Config
from rlv3.events import ACTION_TABLE
from rlv3.features import WARM_BARS
from rlv3.manager import RLv3Manager
from rlv3.market import simulate
from rlv3.oracle import optimal_net_profit

WORLDS = ("planted_signal", "random_walk")
RECIPE = read_config(RECIPES["worlds"])
SERIES = 10
BARS = 1_000
UNSEEN_SEED = 77_000


def measure(world: str, seed: int, steps: int) -> tuple[float, float, float]:
    """Train once; return profit as a share of the optimum, exposure and steps per second."""
    config = RLv3Config(seed=seed, **RECIPE)
    manager = RLv3Manager(config)
    started = time.perf_counter()
    manager.train(steps=steps, market=world)
    rate = steps / (time.perf_counter() - started)
    profit = best = 0.0
    exposed = []
    for series in np.random.SeedSequence(UNSEEN_SEED).spawn(SERIES):
        bars = simulate(world, BARS + WARM_BARS, seed=series)
        found = play(bars, trained(manager.policy), config, normaliser=manager.policy.normaliser)
        profit += found.net_profit
        exposed.append(found.exposed)
        best += optimal_net_profit(bars)
    return profit / best, float(np.mean(exposed)), rate


def best_constant(world: str) -> float:
    """Return what the best of the six constant actions earns, as a share of the optimum."""
    profits = np.zeros(len(ACTION_TABLE))
    best = 0.0
    for series in np.random.SeedSequence(UNSEEN_SEED).spawn(SERIES):
        bars = simulate(world, BARS + WARM_BARS, seed=series)
        best += optimal_net_profit(bars)
        for action in range(len(profits)):
            found = play(bars, lambda *_, action=action: action, RLv3Config())
            profits[action] += found.net_profit
    return float(profits.max()) / best


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--worlds", nargs="+", default=WORLDS, choices=WORLDS)
    given = parser.parse_args()
    for world in given.worlds:
        print(f"{world}: {given.steps:,} steps, {RECIPE}")
        print(f"  best constant policy: {best_constant(world):.1%} of the optimum")
        shares, exposures = [], []
        for seed in range(given.first_seed, given.first_seed + given.seeds):
            share, exposed, rate = measure(world, seed, given.steps)
            shares.append(share)
            exposures.append(exposed)
            print(
                f"  seed {seed}: {share:8.1%} of the optimum, in a position {exposed:6.1%} "
                f"of steps, {rate:,.0f} steps/s",
                flush=True,
            )
        if world == "planted_signal":
            print(f"  median {statistics.median(shares):.1%} of the optimum (bar: 85 %)")
        else:
            flat = sum(e < 0.05 for e in exposures)
            print(f"  flat (below 5 % of steps) in {flat} of {len(exposures)} seeds (bar: 4 of 5)")


if __name__ == "__main__":
    main()
