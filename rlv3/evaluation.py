"""How good is a policy? One deterministic pass per episode: the most probable valid action."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import gymnasium as gym
import numpy as np

from rlv3.config import RLv3Config
from rlv3.env import ENV_ID, TradingEnvV3, make_padded
from rlv3.errors import DataError
from rlv3.events import ACTION_TABLE, Action
from rlv3.features import WARM_BARS
from rlv3.market import Bars, simulate
from rlv3.policy import Policy


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a policy did; money is in account currency, summed over episodes."""

    mean_return: float
    """Mean of `returns`."""
    returns: list[float]
    """Sum of rewards per episode; in trading, the log return of equity after costs."""
    episodes: int
    steps: int
    action_mix: dict[str, float]
    """Share of steps per action."""
    net_profit: float | None = None
    """Equity at the end minus the balance at the start; None outside trading."""
    fees: float | None = None
    trades: int | None = None
    """Positions entered."""
    max_drawdown: float | None = None
    """Largest fall of equity from its peak in any episode, as a fraction."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def config_of(policy: Policy) -> RLv3Config:
    """Return the configuration a policy was trained with; the defaults where it is not known."""
    known = policy.metadata["training"].get("config") or {}
    names = RLv3Config.__dataclass_fields__.keys()
    config = RLv3Config(**{name: value for name, value in known.items() if name in names})
    return replace(config, step_seconds=policy.step_seconds, reward="net_return")


def evaluate_bars(policy: Policy, series: Sequence[Bars]) -> Evaluation:
    """Trade every series once, from its first warm bar to its end, with a fresh account each.

    Raises:
        DataError: bars of another length than the policy's step, or too few of them.
    """
    if not series:
        raise DataError("expected at least one series of bars, found none")
    config = config_of(policy)
    longest = max(len(bars.close) for bars in series)
    config = replace(config, max_steps_per_episode=longest)
    return _evaluate(
        policy,
        (
            TradingEnvV3(config, bars, normaliser=policy.normaliser, random_start=False)
            for bars in series
        ),
    )


def evaluate_market(
    policy: Policy, world: str, *, episodes: int, seed: int, n_bars: int = 1_000
) -> Evaluation:
    """Trade fresh synthetic series of `n_bars` bars after their warm-up."""
    seeds = np.random.SeedSequence(seed).spawn(episodes)
    bars = n_bars + WARM_BARS
    return evaluate_bars(
        policy,
        [simulate(world, bars, seed=s, step_seconds=policy.step_seconds) for s in seeds],
    )


def evaluate_env(policy: Policy, env_id: str, *, episodes: int, seed: int) -> Evaluation:
    """Run episodes of a Gymnasium environment.

    Raises:
        ConfigError: no such environment, or shapes that do not fit the policy.
    """
    env = make_padded(env_id)
    if env_id == ENV_ID:
        env = make_padded(env_id, normaliser=policy.normaliser)
    seeds = np.random.SeedSequence(seed).generate_state(episodes).tolist()
    result = _evaluate(policy, (env for _ in range(episodes)), seeds)
    env.close()
    return result


def _evaluate(
    policy: Policy, envs: Iterable[gym.Env[Any, Any]], seeds: Sequence[int] | None = None
) -> Evaluation:
    """Run one episode per environment and add up."""
    returns: list[float] = []
    actions: Counter[int] = Counter()
    profit, fees, drawdown, trading = 0.0, 0.0, 0.0, True
    for i, env in enumerate(envs):
        total = 0.0
        obs, info = env.reset(seed=None if seeds is None else seeds[i])
        ended = False
        while not ended:
            action = int(policy.decide(obs[None], [info["action_mask"]])[0][0])
            obs, reward, terminated, truncated, info = env.step(action)
            total += float(reward)
            actions[action] += 1
            ended = terminated or truncated
        returns.append(total)
        base = env.unwrapped
        if isinstance(base, TradingEnvV3):
            account = base.account
            profit += account.equity - account.initial
            fees += account.fees_paid + account.slippage_paid
            drawdown = max(drawdown, account.max_drawdown)
        else:
            trading = False
    steps = actions.total()
    return Evaluation(
        mean_return=math.fsum(returns) / len(returns),
        returns=returns,
        episodes=len(returns),
        steps=steps,
        action_mix={name: actions[i] / steps for i, name in enumerate(ACTION_TABLE)},
        net_profit=profit if trading else None,
        fees=fees if trading else None,
        trades=actions[Action.LONG] + actions[Action.SHORT] if trading else None,
        max_drawdown=drawdown if trading else None,
    )
