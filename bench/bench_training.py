"""How fast is training, and one answer, beside Stable-Baselines3 and the machine's limit?

The seed's recipe on the trading environment with 64 features: 2,048 steps per update, minibatches
of 64, 10 epochs, 64-128-128 networks, rollouts included. Every candidate takes its turn in every
round, so that what else the machine does hits all alike; figures are medians over rounds, ratios
are medians of the rounds' ratios. Steps are environment steps.

    python bench/bench_training.py [--rounds N] [--updates N]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv

from rlv3.agent import PPOAgent
from rlv3.config import RLv3Config
from rlv3.env import TradingEnvV3
from rlv3.features import Normaliser
from rlv3.market import simulate
from rlv3.policy import Policy, shipped_policy
from rlv3.trainer import PPOTrainer
from rlv3.vector import replicate

RECIPE = RLv3Config()
BARS = simulate("regime_switching", 6_000, seed=1)
MACS = 50_048  # multiplications of one observation through both networks
# forward and weight gradients everywhere, input gradients but for the first layers
MACS_LEARN = 3 * MACS - 2 * 64 * 128
FLOP = 2 * (MACS + RECIPE.n_epochs * MACS_LEARN)  # per step: values and actions, then the epochs
OBS = {
    "price_change_1m": 0.001, "price_change_5m": 0.004, "price_change_15m": 0.008,
    "volatility": 0.0007, "rsi": 68.0, "macd": 0.12, "price": 100.0, "position_size": 0.0,
    "position_side": 0, "balance": 10_000.0, "equity": 10_000.0, "regime": "TREND",
    "trend_strength": 0.8, "volume_ratio": 1.2, "time_of_day": 0.5,
}  # fmt: skip


def env() -> TradingEnvV3:
    """Return the environment that all candidates train in."""
    return TradingEnvV3(RECIPE, BARS, normaliser=Normaliser.identity())


def ours(config: RLv3Config, threads: int) -> Callable[[int], float]:
    """Return a function that trains so many updates and returns the seconds."""
    torch.set_num_threads(threads)
    trainer = PPOTrainer(PPOAgent(config), replicate(env(), config.n_envs))

    def run(updates: int) -> float:
        torch.set_num_threads(threads)
        started = time.perf_counter()
        trainer.train(steps=updates * config.buffer_size)
        return time.perf_counter() - started

    return run


def theirs(n_envs: int, threads: int) -> Callable[[int], float]:
    """Return the same of Stable-Baselines3 with the same networks and recipe."""
    model = PPO(
        "MlpPolicy",
        DummyVecEnv([env] * n_envs),
        n_steps=RECIPE.buffer_size // n_envs,
        batch_size=RECIPE.batch_size,
        n_epochs=RECIPE.n_epochs,
        ent_coef=RECIPE.entropy_coef,
        policy_kwargs={
            "net_arch": {"pi": [128, 128], "vf": [128, 128]},
            "activation_fn": torch.nn.ReLU,
        },
        device="cpu",
        seed=0,
    )

    def run(updates: int) -> float:
        torch.set_num_threads(threads)
        started = time.perf_counter()
        model.learn(updates * RECIPE.buffer_size)
        return time.perf_counter() - started

    run.model = model  # type: ignore[attr-defined]
    return run


def matmul_flops() -> float:
    """Return the FLOP/s of large single-precision products on one thread."""
    torch.set_num_threads(1)
    a = torch.rand(768, 768)
    out = torch.empty_like(a)
    started = time.perf_counter()
    for _ in range(8):
        torch.mm(a, a, out=out)
    return 8 * 2 * 768**3 / (time.perf_counter() - started)


def p50(call: Callable[[], object], n: int = 500) -> float:
    """Return the median of one call in microseconds."""
    times = []
    for _ in range(n):
        started = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - started)
    return statistics.median(times) / 1_000


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=6, help="of ours; peers make one")
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    candidates: dict[str, tuple[Callable[[int], float], int]] = {}
    for n_envs in (1, 8, 32):
        candidates[f"rlv3 {n_envs} envs, {cores} threads"] = (
            ours(replace(RECIPE, n_envs=n_envs), cores),
            arguments.updates,
        )
    candidates["rlv3 8 envs, 1 thread"] = (ours(replace(RECIPE, n_envs=8), 1), arguments.updates)
    candidates["rlv3 1 env, torch"] = (ours(replace(RECIPE, backend="torch"), 1), 1)
    peers = {(n, t): theirs(n, t) for n in (1, 8) for t in sorted({1, cores})}
    for (n_envs, threads), run in peers.items():
        candidates[f"SB3 {n_envs} envs, {threads} threads"] = (run, 1)
    for run, _ in candidates.values():
        run(1)  # warm
    rates: dict[str, list[float]] = {name: [] for name in candidates}
    limits: list[float] = []
    for _ in range(arguments.rounds):
        limits.append(matmul_flops())
        for name, (run, updates) in candidates.items():
            rates[name].append(updates * RECIPE.buffer_size / run(updates))
    print(f"load average {os.getloadavg()[0]:.1f}, {cores} cores, medians of {arguments.rounds}")
    for name, found in rates.items():
        print(f"  {name:26s} {statistics.median(found):10,.0f} steps/s")

    def peer(n_envs: int, i: int) -> float:
        """Return the better of Stable-Baselines3's thread counts in a round."""
        return max(rates[f"SB3 {n_envs} envs, {t} threads"][i] for t in sorted({1, cores}))

    limit = statistics.median(limits)
    print(f"  one thread's limit: {limit / 1e9:,.0f} GFLOP/s in large products, "
          f"{limit / FLOP:,.0f} steps/s at {FLOP / 1e6:.2f} MFLOP a step")  # fmt: skip
    for name, found in rates.items():
        if not name.startswith("rlv3"):
            continue
        rounds = range(len(found))
        one = statistics.median(found[i] / peer(1, i) for i in rounds)
        eight = statistics.median(found[i] / peer(8, i) for i in rounds)
        share = statistics.median(found[i] * FLOP / limits[i] for i in rounds)
        print(f"  {name:26s} {one:5.1f} x SB3 1 env, {eight:5.1f} x SB3 8 envs, "
              f"{share:4.0%} of one thread's limit")  # fmt: skip
    answers(peers[1, 1].model, arguments.rounds)  # type: ignore[attr-defined]


def answers(model: PPO, rounds: int) -> None:
    """Print the medians of one answer, ours and Stable-Baselines3's in turn."""
    torch.set_num_threads(1)
    policy = Policy.load(shipped_policy())
    row = np.random.default_rng(0).normal(size=64).astype(np.float32)
    mask = (True, True, True, False, False, False)
    calls: dict[str, Callable[[], object]] = {
        "act": lambda: policy.act(row, mask),
        "decide, with value": lambda: policy.decide(row[None], [mask]),
        "predict(obs_dict)": lambda: policy.predict(OBS),
        "SB3 predict": lambda: model.predict(row, deterministic=True),
    }
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(max(rounds, 5)):
        for name, call in calls.items():
            found[name].append(p50(call))
    print("one answer, p50:")
    for name, times in found.items():
        ratio = statistics.median(
            peer / own for peer, own in zip(found["SB3 predict"], times, strict=True)
        )
        print(f"  {name:26s} {statistics.median(times):8.1f} us, {ratio:4.1f} x as fast as SB3")


if __name__ == "__main__":
    main()
