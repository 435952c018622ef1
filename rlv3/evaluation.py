"""How good is a policy? One deterministic pass per episode: the most probable valid action.

In trading, a policy is compared with three that know nothing, on the same prices, through the same
environment and costs:
  flat           never trades
  buy_and_hold   LONG at the first step, kept to the end
  random         as many positions as the policy, held as long, in random order and of random side:
                 equal turnover without skill; several runs
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import groupby
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from rlv3.config import RLv3Config
from rlv3.env import ENV_ID, TradingEnvV3, make_padded
from rlv3.errors import DataError
from rlv3.events import ACTION_TABLE, Action
from rlv3.features import WARM_BARS
from rlv3.market import Bars, simulate
from rlv3.metrics import Interval, ratio_intervals, sharpe, sortino, steps_per_year
from rlv3.policy import Policy

_SIDE = 7  # of the observation: position_side, never scaled

Decide = Callable[[NDArray[np.float32], NDArray[np.bool_]], int]
"""An observation and its action mask to an action."""


@dataclass(frozen=True, slots=True)
class Curve:
    """What an account looked like during one pass over one series of S steps."""

    symbol: str
    time_us: NDArray[np.int64]  # [S+1]
    price: NDArray[np.float64]  # [S+1]
    equity: NDArray[np.float64]  # [S+1]
    exposure: NDArray[np.float64]  # [S], signed fraction of equity held through the step


@dataclass(frozen=True, slots=True)
class Baseline:
    """What a policy without knowledge did on the same prices; means over its runs."""

    net_profit: float
    sharpe: float
    max_drawdown: float
    turnover: float
    fees: float
    runs: int = 1


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
    """Equity at the end minus the balance at the start; None outside trading, as all below."""
    fees: float | None = None
    """Costs paid: exchange fees and half-spread."""
    half_spread: float | None = None
    """The part of `fees` that is half-spread."""
    trades: int | None = None
    """Positions entered."""
    max_drawdown: float | None = None
    """Largest fall of equity from its peak in any episode, as a fraction."""
    turnover: float | None = None
    """Traded notional as a multiple of the starting capital."""
    exposure: float | None = None
    """Mean absolute notional as a fraction of equity."""
    in_market: float | None = None
    """Share of steps with a position."""
    hit_rate: float | None = None
    """Share of closed positions that earned more than they cost; None without any."""
    sharpe: float | None = None
    """Annualised Sharpe ratio of the returns per step, after costs."""
    sharpe_interval: Interval | None = None
    """95 %, block bootstrap."""
    sortino: float | None = None
    sortino_interval: Interval | None = None
    baselines: dict[str, Baseline] = field(default_factory=dict)
    beats_random: float | None = None
    """Share of the random runs that earned less."""
    curves: list[Curve] = field(default_factory=list, compare=False, repr=False)
    """For plots; one per episode."""
    held: list[Curve] = field(default_factory=list, compare=False, repr=False)
    """The same of buy-and-hold, where baselines were asked for."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, without the curves."""
        plain = [f.name for f in fields(self) if f.compare]
        found = {name: getattr(self, name) for name in plain}
        found["baselines"] = {name: asdict(row) for name, row in self.baselines.items()}
        return found


@dataclass(slots=True)
class _Played:
    """What one decider did, over all episodes."""

    returns: list[float] = field(default_factory=list)
    actions: Counter[int] = field(default_factory=Counter)
    curves: list[Curve] = field(default_factory=list)
    closed: list[float] = field(default_factory=list)  # profit of every closed position
    sides: list[list[int]] = field(default_factory=list)  # per episode, held through each step
    fees: float = 0.0
    half_spread: float = 0.0
    turnover: float = 0.0
    drawdown: float = 0.0

    @property
    def net_profit(self) -> float:
        """Equity gained, over all episodes."""
        return math.fsum(curve.equity[-1] - curve.equity[0] for curve in self.curves)


def config_of(policy: Policy) -> RLv3Config:
    """Return the configuration a policy was trained with; the defaults where it is not known."""
    known = policy.metadata["training"].get("config") or {}
    names = RLv3Config.__dataclass_fields__.keys()
    config = RLv3Config(**{name: value for name, value in known.items() if name in names})
    return replace(config, step_seconds=policy.step_seconds, reward="net_return")


def decider(policy: Policy) -> Decide:
    """Return a policy's most probable valid action as a function."""
    return lambda obs, mask: int(policy.decide(obs[None], mask[None].tolist())[0][0])


def evaluate_bars(
    policy: Policy, series: Sequence[Bars], *, random_runs: int = 0, seed: int = 0
) -> Evaluation:
    """Trade every series once, from its first warm bar to its end, with a fresh account each.

    Ratios are those of the portfolio: the sum of the accounts, on one time axis.

    Args:
        random_runs: how often the random baseline is run; 0 leaves all baselines out.
        seed: of the random baseline.
    Raises:
        DataError: bars of another length than the policy's step, or too few of them.
    """
    if not series:
        raise DataError("expected at least one series of bars, found none")
    return _evaluate_series(policy, series, random_runs, seed, portfolio_returns)


def evaluate_market(
    policy: Policy,
    world: str,
    *,
    episodes: int,
    seed: int,
    n_bars: int = 1_000,
    random_runs: int = 0,
) -> Evaluation:
    """Trade fresh synthetic series of `n_bars` bars after their warm-up.

    Every series is another history of one account, so ratios are those of all steps in a row.
    """
    seeds = np.random.SeedSequence(seed).spawn(episodes)
    bars = n_bars + WARM_BARS
    series = [simulate(world, bars, seed=s, step_seconds=policy.step_seconds) for s in seeds]
    return _evaluate_series(policy, series, random_runs, seed, chained_returns)


def evaluate_env(policy: Policy, env_id: str, *, episodes: int, seed: int) -> Evaluation:
    """Run episodes of a Gymnasium environment.

    Raises:
        ConfigError: no such environment, or shapes that do not fit the policy.
    """
    env = make_padded(env_id)
    if env_id == ENV_ID:
        env = make_padded(env_id, normaliser=policy.normaliser)
    seeds = np.random.SeedSequence(seed).generate_state(episodes).tolist()
    played = _Played()
    for one in seeds:
        _play(env, decider(policy), played, seed=one)
    env.close()
    return _summary(played, policy.step_seconds, chained_returns)


def portfolio_equity(
    curves: Sequence[Curve],
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return times and the sum of accounts; one that has no price yet holds its capital."""
    times = np.unique(np.concatenate([curve.time_us for curve in curves]))
    total = np.zeros(len(times))
    for curve in curves:
        newest = np.searchsorted(curve.time_us, times, side="right") - 1
        total += curve.equity[np.maximum(newest, 0)]
    return times, total


def portfolio_returns(curves: Sequence[Curve]) -> NDArray[np.float64]:
    """Return the returns per step of the sum of accounts."""
    _, total = portfolio_equity(curves)
    return np.diff(total) / total[:-1]


def chained_returns(curves: Sequence[Curve]) -> NDArray[np.float64]:
    """Return the returns per step of all curves in a row."""
    return np.concatenate([np.diff(c.equity) / c.equity[:-1] for c in curves])


Returns = Callable[[Sequence[Curve]], NDArray[np.float64]]


def _evaluate_series(
    policy: Policy, series: Sequence[Bars], random_runs: int, seed: int, returns_of: Returns
) -> Evaluation:
    config = config_of(policy)
    longest = max(len(bars.close) for bars in series)
    config = replace(config, max_steps_per_episode=longest)
    envs = [
        TradingEnvV3(config, bars, normaliser=policy.normaliser, random_start=False)
        for bars in series
    ]
    played = _Played()
    for env, bars in zip(envs, series, strict=True):
        _play(env, decider(policy), played, bars=bars)
    result = _summary(played, policy.step_seconds, returns_of)
    if not random_runs:
        return result
    held, randoms = _baselines(played, envs, series, random_runs, seed)
    baselines = {
        "flat": Baseline(0.0, 0.0, 0.0, 0.0, 0.0),
        "buy_and_hold": _baseline([held], policy.step_seconds, returns_of),
        "random": _baseline(randoms, policy.step_seconds, returns_of),
    }
    worse = sum(run.net_profit < played.net_profit for run in randoms) / len(randoms)
    return replace(result, baselines=baselines, beats_random=worse, held=held.curves)


def _play(
    env: gym.Env[Any, Any],
    decide: Decide,
    played: _Played,
    *,
    bars: Bars | None = None,
    seed: int | None = None,
) -> None:
    """Run one episode and add up."""
    obs, info = env.reset(seed=seed)
    base = env.unwrapped
    trading = base if isinstance(base, TradingEnvV3) else None
    first = trading.row if trading is not None else 0
    equity: list[float] = [info.get("equity", 0.0)]
    price: list[float] = [info.get("price", 0.0)]
    exposure: list[float] = []
    sides: list[int] = []
    total, ended, side, entered_with = 0.0, False, 0, 0.0
    while not ended:
        action = decide(obs, info["action_mask"])
        obs, reward, terminated, truncated, info = env.step(action)
        total += float(reward)
        played.actions[action] += 1
        ended = terminated or truncated
        if trading is None:
            continue
        equity.append(info["equity"])
        price.append(info["price"])
        now = info["position_side"]
        exposure.append(now * info["position_size"])
        sides.append(now)
        if now != side:
            if side:
                played.closed.append(equity[-1] - entered_with)
            entered_with, side = equity[-2], now
    played.returns.append(total)
    if trading is None:
        return
    account = trading.account
    played.fees += account.fees_paid + account.slippage_paid
    played.half_spread += account.slippage_paid
    played.turnover += account.turnover / account.initial
    played.drawdown = max(played.drawdown, account.max_drawdown)
    played.sides.append(sides)
    steps = len(equity)
    times = np.arange(steps, dtype=np.int64) if bars is None else bars.end_us[first:][:steps]
    played.curves.append(
        Curve(
            bars.symbol if bars else "", times, np.array(price), np.array(equity),
            np.array(exposure),
        )
    )  # fmt: skip


def _summary(played: _Played, step_seconds: int, returns_of: Returns) -> Evaluation:
    steps = played.actions.total()
    result = Evaluation(
        mean_return=math.fsum(played.returns) / len(played.returns),
        returns=played.returns,
        episodes=len(played.returns),
        steps=steps,
        action_mix={name: played.actions[i] / steps for i, name in enumerate(ACTION_TABLE)},
    )
    if not played.curves:
        return result
    returns, per_year = returns_of(played.curves), steps_per_year(step_seconds)
    sharpe_interval, sortino_interval = ratio_intervals(returns, per_year)
    exposure = np.abs(np.concatenate([curve.exposure for curve in played.curves]))
    hits = sum(profit > 0.0 for profit in played.closed)
    return replace(
        result,
        net_profit=played.net_profit,
        fees=played.fees,
        half_spread=played.half_spread,
        trades=_entries(played.sides),
        max_drawdown=played.drawdown,
        turnover=played.turnover,
        exposure=float(exposure.mean()),
        in_market=float((exposure > 0.0).mean()),
        hit_rate=hits / len(played.closed) if played.closed else None,
        sharpe=sharpe(returns, per_year),
        sharpe_interval=sharpe_interval,
        sortino=sortino(returns, per_year),
        sortino_interval=sortino_interval,
        curves=played.curves,
    )


def _entries(sides: Sequence[Sequence[int]]) -> int:
    """Return how many positions were entered."""
    return sum(
        now != before and now != 0
        for episode in sides
        for before, now in zip([0, *episode], episode, strict=False)
    )


# -- baselines -------------------------------------------------------------------------------------


def _baselines(
    played: _Played,
    envs: Sequence[gym.Env[Any, Any]],
    series: Sequence[Bars],
    random_runs: int,
    seed: int,
) -> tuple[_Played, list[_Played]]:
    """Return what buy-and-hold and the random runs did."""

    def run(plans: Iterable[Sequence[int]]) -> _Played:
        found = _Played()
        for env, bars, plan in zip(envs, series, plans, strict=True):
            _play(env, _follow(plan), found, bars=bars)
        return found

    rng = np.random.default_rng([seed, 3])
    held = run([1] * len(sides) for sides in played.sides)
    randoms = [run([shuffled(sides, rng) for sides in played.sides]) for _ in range(random_runs)]
    return held, randoms


def _baseline(runs: list[_Played], step_seconds: int, returns_of: Returns) -> Baseline:
    per_year = steps_per_year(step_seconds)
    figures = [
        (r.net_profit, sharpe(returns_of(r.curves), per_year), r.drawdown, r.turnover, r.fees)
        for r in runs
    ]
    profit, ratio, drawdown, turnover, fees = np.mean(figures, axis=0).tolist()
    return Baseline(profit, ratio, drawdown, turnover, fees, runs=len(runs))


def shuffled(sides: Sequence[int], rng: np.random.Generator) -> list[int]:
    """Return the same holding times and pauses in random order, every position of random side.

    >>> sorted(map(abs, shuffled([0, 1, 1, 0, -1], np.random.default_rng(0))))
    [0, 0, 1, 1, 1]
    """
    runs = [(side, len(list(group))) for side, group in groupby(sides)]
    holds = [length for side, length in runs if side]
    pauses = [length for side, length in runs if not side]
    rng.shuffle(holds)
    rng.shuffle(pauses)
    held, paused = iter(holds), iter(pauses)
    plan: list[int] = []
    for side, _ in runs:  # positions and pauses alternate as they did
        length, value = (next(held), 1 - 2 * int(rng.integers(2))) if side else (next(paused), 0)
        plan += [value] * length
    return plan


def _follow(plan: Sequence[int]) -> Decide:
    """Return the decider that holds the planned side through each step, as far as it may."""
    wanted = iter(plan)

    def decide(obs: NDArray[np.float32], mask: NDArray[np.bool_]) -> int:
        side, held = next(wanted, 0), int(obs[_SIDE])
        if held == side:
            return Action.HOLD
        if held:
            return Action.CLOSE
        enter = Action.LONG if side > 0 else Action.SHORT
        return enter if mask[enter] else Action.HOLD

    return decide
