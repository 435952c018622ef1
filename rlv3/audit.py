"""Does a reward pay for what it should? Scripted policies, their reward against their net profit.

A reward is worth training on if policies that earn more are rewarded more. The audit plays
policies that nobody has to train, on the same series, through the same environment and costs:

    hold          never trades
    always_long   enters once and stays; always_short likewise
    churn         enters and closes in turn: nothing but costs
    random        any valid action, by chance
    trend         the side of the 15-bar return
    aligned       the side that the seed's regime term pays for
    oracle        the optimum, known by hindsight (see `oracle`)

A reward is sane when doing nothing is worth nothing, no policy is rewarded above the oracle, and
reward and net profit rank all episodes alike (Spearman's correlation of at least 0.9).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer
from numpy.typing import ArrayLike, NDArray
from rich.table import Table

from rlv3 import console
from rlv3.config import RLv3Config
from rlv3.errors import ConfigError
from rlv3.events import Action
from rlv3.extras import require
from rlv3.features import N_FEATURES, WARM_BARS, Normaliser
from rlv3.market import DEFAULT_WORLD, WORLDS, Bars, read_bars, simulate
from rlv3.oracle import optimal_actions
from rlv3.policy import Policy
from rlv3.portfolio import Costs
from rlv3.reward import regime_alignment

SANE_CORRELATION = 0.9
IDLE_REWARD = 1e-9  # per step, the most that doing nothing may be worth
FAILED = 4
SCRIPTS = (
    "hold", "always_long", "always_short", "churn", "random", "trend", "aligned", "oracle",
)  # fmt: skip

Decide = Callable[[NDArray[np.float32], dict[str, Any], int], int]
"""Observation, info and number of the step to an action."""


@dataclass(frozen=True, slots=True)
class Episode:
    """One policy on one series."""

    reward: float
    net_profit: float
    """Equity at the end minus the initial balance."""
    exposed: float
    """Share of steps that ended with a position."""
    trades: int
    """Positions entered."""
    steps: int


@dataclass(frozen=True, slots=True)
class Audit:
    """What a reward is worth training on."""

    reward: str
    policies: dict[str, Episode]
    """Means over the series."""
    correlation: float
    """Spearman's, of reward and net profit over all episodes of all policies."""
    idle_reward: float
    """What a step of `hold` is worth."""
    best_rewarded: str
    sane: bool

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def play(
    bars: Bars, decide: Decide, config: RLv3Config, *, normaliser: Normaliser | None = None
) -> Episode:
    """Trade a series once, from its first warm bar to its end, and sum up."""
    require("gymnasium", "train")
    from rlv3.env import TradingEnvV3

    config = replace(config, max_steps_per_episode=len(bars.close))
    env = TradingEnvV3(config, bars, normaliser=normaliser, random_start=False)
    obs, info = env.reset(seed=0)
    total, exposed, trades, t, ended = 0.0, 0, 0, 0, False
    while not ended:
        side = info["position_side"]
        obs, reward, terminated, truncated, info = env.step(decide(obs, info, t))
        total += reward
        exposed += info["position_side"] != 0
        trades += info["position_side"] not in (0, side)
        t += 1
        ended = terminated or truncated
    account = env.account
    return Episode(total, account.equity - account.initial, exposed / t, trades, t)


def trained(policy: Policy) -> Decide:
    """Return an artifact as a script: its most probable valid action."""

    def decide(obs: NDArray[np.float32], info: dict[str, Any], t: int) -> int:
        del t
        return int(policy.decide(obs[None], [info["action_mask"]])[0][0])

    return decide


def towards(side: int, held: int) -> int:
    """Return the action that leads from the held side to a wanted one; 0 means flat."""
    if side == held:
        return Action.HOLD
    if held:
        return Action.CLOSE
    return Action.LONG if side > 0 else Action.SHORT


def script(name: str, best: NDArray[np.int64], rng: np.random.Generator) -> Decide:
    """Return a scripted policy by name; its observations are raw features.

    Args:
        best: the optimal actions of the series.
    """

    def decide(obs: NDArray[np.float32], info: dict[str, Any], t: int) -> int:
        held = info["position_side"]
        match name:
            case "oracle":
                return int(best[t])
            case "random":
                return int(rng.choice(np.flatnonzero(info["action_mask"])))
            case "hold":
                side = 0
            case "always_long":
                side = 1
            case "always_short":
                side = -1
            case "churn":
                side = 0 if held else 1
            case "trend":
                side = int(np.sign(obs[2]))
            case _:  # aligned
                side = int(np.sign(regime_alignment(1, obs[:N_FEATURES].tolist()))) or held
        return towards(side, held)

    return decide


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Return Spearman's rank correlation, ties at their mean rank; 0 where one does not vary."""
    a, b = _ranks(np.asarray(x, dtype=np.float64)), _ranks(np.asarray(y, dtype=np.float64))
    if a.std() == 0.0 or b.std() == 0.0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(sizes)
    return (ends - (sizes - 1) / 2)[group]


def audit_reward(series: Sequence[Bars], config: RLv3Config, *, seed: int = 0) -> Audit:
    """Play every script on every series under `config.reward` and compare reward with profit.

    Raises:
        DataError: a series that is too short.
    """
    episodes: dict[str, list[Episode]] = {}
    costs = Costs(fee_rate=config.fee_bps * 1e-4)
    rng = np.random.default_rng(seed)
    for bars in series:
        optimum = optimal_actions(bars, costs, half_spread=config.half_spread_bps * 1e-4)
        for name in SCRIPTS:
            decide = script(name, optimum.actions, rng)
            episodes.setdefault(name, []).append(play(bars, decide, config))
    found = [episode for played in episodes.values() for episode in played]
    means = {name: _mean(played) for name, played in episodes.items()}
    correlation = spearman([e.reward for e in found], [e.net_profit for e in found])
    idle = means["hold"].reward / means["hold"].steps
    best = max(means, key=lambda name: means[name].reward)
    sane = best == "oracle" and abs(idle) <= IDLE_REWARD and correlation >= SANE_CORRELATION
    return Audit(config.reward, means, correlation, idle, best, sane)


def _mean(played: Sequence[Episode]) -> Episode:
    columns = np.array([(e.reward, e.net_profit, e.exposed, e.trades, e.steps) for e in played])
    reward, profit, exposed, trades, steps = columns.mean(axis=0).tolist()
    return Episode(reward, profit, exposed, round(trades), round(steps))


def verdict(audit: Audit) -> str:
    """Return what the audit found, in one sentence."""
    if audit.sane:
        return (
            f"{audit.reward} is sane: rank correlation with net profit {audit.correlation:+.2f}, "
            "doing nothing is worth nothing, nothing is rewarded above the optimum"
        )
    faults = []
    if abs(audit.idle_reward) > IDLE_REWARD:
        faults.append(f"doing nothing earns {audit.idle_reward:+.3g} a step")
    if audit.best_rewarded != "oracle":
        profit = audit.policies[audit.best_rewarded].net_profit
        faults.append(
            f"{audit.best_rewarded} is rewarded above the optimum at a net profit of {profit:+,.2f}"
        )
    if audit.correlation < SANE_CORRELATION:
        faults.append(f"rank correlation with net profit is {audit.correlation:+.2f}")
    return f"{audit.reward} is not sane: {'; '.join(faults)}"


def table(policies: Mapping[str, Episode]) -> Table:
    """Return the policies, most rewarded first."""
    shown = Table("policy", "reward", "net profit", "in a position", "trades")
    for name, mean in sorted(policies.items(), key=lambda item: -item[1].reward):
        shown.add_row(
            name, f"{mean.reward:+.4g}", f"{mean.net_profit:+,.2f}", f"{mean.exposed:.0%}",
            f"{mean.trades:,}",
        )  # fmt: skip
    return shown


def command(
    reward: Annotated[
        Literal["net_return", "seed"] | None, typer.Option(help="One of them; both if unset.")
    ] = None,
    data: Annotated[
        list[Path] | None, typer.Option(help="CSV or Parquet bars; a synthetic world if unset.")
    ] = None,
    market: Annotated[str, typer.Option(help=f"Synthetic world: {', '.join(WORLDS)}.")] = (
        DEFAULT_WORLD
    ),
    episodes: Annotated[int, typer.Option(min=1, help="Synthetic series of 1,000 bars.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Seeds series and chance.")] = 0,
    bar_stamp: Annotated[
        Literal["open", "close"], typer.Option(help="What the times in the files mean.")
    ] = "close",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check whether a reward pays for net profit, before anyone trains on it.

    Plays scripted policies (hold, always long, churn, random, the optimum ...) and compares their
    reward with what they earned. With --reward, exits with 4 where that reward is not sane.
    """
    if data:
        series = [read_bars(path, bar_stamp=bar_stamp) for path in data]
    else:
        seeds = np.random.SeedSequence(seed).spawn(episodes)
        series = [simulate(market, 1_000 + WARM_BARS, seed=s) for s in seeds]
    steps = {bars.step_seconds for bars in series}
    if len(steps) > 1:
        raise ConfigError(f"expected files of one bar size, found {sorted(steps)} seconds")
    audits = [
        audit_reward(series, RLv3Config(reward=name, step_seconds=min(steps)), seed=seed)
        for name in ([reward] if reward else ["net_return", "seed"])
    ]
    if as_json:
        typer.echo(json.dumps({audit.reward: audit.to_dict() for audit in audits}))
    for audit in () if as_json else audits:
        console.out.print(table(audit.policies))
        console.out.print(verdict(audit), soft_wrap=True, highlight=False)
    if reward and not audits[0].sane:
        raise typer.Exit(FAILED)
