"""Does our PPO learn what the peers' PPOs learn, with their recipes, in as many steps?

Trains by the recipes that ship with the package and prints the mean of 100 deterministic episodes
of the policy as training ended, and of the one that validation kept, beside the published figures:

    .venv/bin/python bench/bench_peers.py                       CartPole-v1, both recipes (~6 min)
    .venv/bin/python bench/bench_peers.py --recipe acrobot-zoo --seeds 1
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from rlv3.cli import read_config
from rlv3.config import RLv3Config
from rlv3.evaluation import evaluate_env
from rlv3.manager import RLv3Manager
from rlv3.metrics import interquartile_interval, interquartile_mean
from rlv3.policy import Policy
from rlv3.runs import BEST, POLICY, Run
from rlv3.trainer import Update

EPISODES = 100
EVALUATION_SEED = 1_000


class Peer(NamedTuple):
    """What a recipe is held to."""

    env: str
    steps: int
    published: str
    floor: float
    seeds_above: int | None
    """So many seeds of five must reach the floor; None: the interquartile mean must."""


PEERS = {
    "cartpole-zoo": Peer("CartPole-v1", 100_000, "zoo 500.000 +- 0.000 (1 run)", 500.0, 4),
    "cleanrl": Peer("CartPole-v1", 500_000, "CleanRL 490.04 +- 6.12 (3 seeds)", 490.0, None),
    "acrobot-zoo": Peer("Acrobot-v1", 1_000_000, "zoo -73.506 +- 18.201 (1 run)", -75.0, None),
    "lunarlander-zoo": Peer("LunarLander-v3", 1_000_000, "zoo 242.119 (v2, 1 run)", 240.0, None),
}


def train(recipe: str, peer: Peer, seed: int) -> tuple[float, float, float]:
    """Return the mean return of the last policy, of the best by validation, and steps/s."""
    config = RLv3Config(**read_config(Path(recipe)) | {"seed": seed})
    manager = RLv3Manager(config)
    started = time.perf_counter()
    with TemporaryDirectory() as directory:
        folder = Path(directory)
        with Run(folder, manager, total=peer.steps, inputs={}, env_id=peer.env) as run:

            def record(done: int, update: Update, run: Run = run) -> None:
                run.update(done, update)

            run.finish(manager.train(steps=peer.steps, env_id=peer.env, on_update=record))
        seconds = time.perf_counter() - started
        last, best = (
            evaluate_env(
                Policy.load(folder / name), peer.env, episodes=EPISODES, seed=EVALUATION_SEED
            ).mean_return
            for name in (POLICY, BEST)
        )
    return last, best, peer.steps / seconds


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", choices=PEERS, action="append", help="CartPole's if unset")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    arguments = parser.parse_args()
    for recipe in arguments.recipe or ["cartpole-zoo", "cleanrl"]:
        peer = PEERS[recipe]
        print(f"{recipe}: {peer.env}, {peer.steps:,} steps, {EPISODES} deterministic episodes")
        scores = []
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
            last, best, speed = train(recipe, peer, seed)
            scores.append(last)
            print(
                f"  seed {seed}: {last:.2f} as training ended, {best:.2f} best by validation, "
                f"{speed:,.0f} steps/s",
                flush=True,
            )
        low, high = interquartile_interval(scores)
        middle = interquartile_mean(scores)
        reached = sum(score >= peer.floor for score in scores)
        passed = middle >= peer.floor
        if peer.seeds_above is not None:
            passed = reached >= peer.seeds_above * len(scores) / 5
        print(
            f"  interquartile mean {middle:.2f}, 95 % [{low:.2f}, {high:.2f}]; "
            f"{reached} of {len(scores)} reach {peer.floor:g}; published: {peer.published}; "
            f"{'reached' if passed else 'MISSED'}"
        )


if __name__ == "__main__":
    main()
