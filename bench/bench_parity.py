"""Is the compiled update torch's update? And how well does torch agree with itself?

Trains by the seed's recipe. Every update (320 gradient steps) is made from the same weights,
moments, rollout and minibatches in four ways: compiled, in torch, in torch with the hidden units in
another order (the same function, other roundings), and in torch with float64. Prints how far apart
losses and weights are, and in how many updates the weights differ by more than 1e-5.

Where a ReLU's input is 0 but for rounding, roundings decide whether a sample counts for that unit,
and Adam makes much of it: one isolated gradient moves a weight by up to 30 learning rates. Tanh has
no such edge.

    python bench/bench_parity.py [--updates N] [--activation relu|tanh] [--seed S]
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from itertools import combinations

import numpy as np
import torch
from torch import nn

from rlv3.agent import PPOAgent
from rlv3.buffer import Rollout
from rlv3.config import RLv3Config
from rlv3.env import TradingEnvV3
from rlv3.features import Normaliser
from rlv3.market import simulate
from rlv3.trainer import PPOTrainer, Update

LIMIT = 1e-5
BARS = simulate("regime_switching", 6_000, seed=1)
PAIRS = list(combinations(("compiled", "torch", "torch, reordered", "torch, float64"), 2))
Order = tuple[np.ndarray, np.ndarray]
"""Of the units of both hidden layers."""


def make(config: RLv3Config, backend: str) -> PPOTrainer:
    """Return a trainer."""
    config = replace(config, backend=backend)
    env = TradingEnvV3(config, BARS, normaliser=Normaliser.identity())
    return PPOTrainer(PPOAgent(config), env)


def halves(trainer: PPOTrainer) -> list[tuple[nn.Sequential, torch.optim.Adam]]:
    """Return networks and their optimisers."""
    agent = trainer.agent
    return [
        (agent.policy.network, trainer.policy_optimiser),
        (agent.value.network, trainer.value_optimiser),
    ]


def reordered(
    tensor: torch.Tensor, key: str, first: np.ndarray, second: np.ndarray
) -> torch.Tensor:
    """Return a layer's tensor with the hidden units in another order."""
    layer, part = key.split(".")
    rows = {"0": first, "2": second}.get(layer)
    columns = {"2": first, "4": second}.get(layer) if part == "weight" else None
    tensor = tensor if rows is None else tensor[rows]
    return tensor if columns is None else tensor[:, columns]


def take_over(source: PPOTrainer, target: PPOTrainer, orders: list[Order]) -> None:
    """Copy weights, moments and the state of the shuffling."""
    for (network, adam), (copy, its_adam), order in zip(
        halves(source), halves(target), orders, strict=True
    ):
        pairs = zip(network.named_parameters(), copy.parameters(), strict=True)
        for (key, parameter), its_parameter in pairs:
            its_parameter.data.copy_(reordered(parameter.data, key, *order))
            its_adam.state[its_parameter] = {
                name: value.clone()
                if name == "step"
                else reordered(value, key, *order).to(its_parameter.dtype, copy=True)
                for name, value in adam.state[parameter].items()
            }
    target.rng.bit_generator.state = source.rng.bit_generator.state


def weights(trainer: PPOTrainer, orders: list[Order]) -> np.ndarray:
    """Return all weights, the hidden units in their first order."""
    found = []
    for (network, _), order in zip(halves(trainer), orders, strict=True):
        back = (np.argsort(order[0]), np.argsort(order[1]))
        for key, parameter in network.named_parameters():
            found.append(reordered(parameter.detach(), key, *back).double().ravel())
    return torch.cat(found).numpy()


def wide(rollout: Rollout) -> Rollout:
    """Return the rollout in float64."""
    return Rollout(*(a.astype(np.float64) if a.dtype == np.float32 else a for a in rollout))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--updates", type=int, default=24)
    parser.add_argument("--activation", choices=("relu", "tanh"), default="relu")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    config = RLv3Config(activation=given.activation, seed=given.seed)
    rng = np.random.default_rng(given.seed)
    same = [(np.arange(config.hidden_dim),) * 2] * 2
    mixed = [(rng.permutation(config.hidden_dim), rng.permutation(config.hidden_dim)) for _ in same]
    ways = {
        "compiled": (make(config, "numba"), same),
        "torch": (make(config, "torch"), same),
        "torch, reordered": (make(config, "torch"), mixed),
        "torch, float64": (make(config, "torch"), same),
    }
    torch.set_num_threads(1)
    for network, _ in halves(ways["torch, float64"][0]):
        network.double()
    compiled = ways["compiled"][0]
    apart: dict[tuple[str, str], list[tuple[float, float]]] = {pair: [] for pair in PAIRS}
    for _ in range(given.updates):
        rollout = compiled.collect()
        for trainer, orders in ways.values():
            if trainer is not compiled:
                take_over(compiled, trainer, orders)
        said: dict[str, Update] = {}
        for name, (trainer, _) in ways.items():
            said[name] = trainer.learn(wide(rollout) if "float64" in name else rollout)
        after = {name: weights(*way) for name, way in ways.items()}
        for one, other in PAIRS:
            losses = np.abs(np.subtract(said[one][:4], said[other][:4])).max()
            apart[one, other].append((float(np.abs(after[one] - after[other]).max()), losses))
    print(f"{given.activation}, {given.updates} updates of 320 gradient steps from the same state")
    for (one, other), found in apart.items():
        moved, losses = np.array(found).T
        print(
            f"  {one + ' - ' + other:35s} weights apart by {np.median(moved):.0e} in the median, "
            f"{moved.max():.0e} at most, over {LIMIT:g} in {(moved > LIMIT).sum():2d}; "
            f"losses at most {losses.max():.0e}"
        )


if __name__ == "__main__":
    main()
