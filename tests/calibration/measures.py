"""How often is the verdict wrong, how often does it find what is there? Shares of runs."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from rlv3.metrics import integrated_autocorrelation
from shadow.statistics.multiplicity import benjamini_hochberg, e_benjamini_hochberg
from shadow.statistics.sequential import (
    BURN_IN,
    Looks,
    Plan,
    batch_means,
    log_e_value,
    looks,
    strict_sequence,
)
from tests.calibration.processes import PROCESSES, Linear, Trades, equal_models, simulate

LENGTH = 60  # bars of a batch
AT_ONCE = 500  # runs held at a time
LOOKS = range(500, 5_001, 100)  # trades at which the peer's gate tests
PILOT = 1_440  # trades from which the batch length is taken, and which are not used again
STRICT_SDS = 6.0

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def bound(level: float, runs: int) -> float:
    """Return the share that a test of exactly this level exceeds in 5 % of such simulations."""
    return level + 1.645 * math.sqrt(level * (1.0 - level) / runs)


def superior(seen: Looks) -> Bools:
    """Return, per run, whether any look found the mean above 0."""
    return (seen.ready & (seen.low > 0.0)).any(axis=-1)


def inferior(seen: Looks) -> Bools:
    """Return, per run, whether any look found the mean below 0."""
    return (seen.ready & (seen.high < 0.0)).any(axis=-1)


class Errors(NamedTuple):
    """Shares of runs of two equal policies, a look at every batch."""

    superior: float
    inferior: float
    either: float
    naive: float
    """Any look at which |t| exceeds the two-sided 5 % point of a t-test."""
    correlated: float
    """Runs that end with a warning that batches are too short."""
    strict: float
    """Any look at which the strict sequence misses the true mean."""
    strict_width: float
    """Median width of the strict sequence at the end, as a multiple of the asymptotic one."""
    clipped: float


def false_verdicts(name: str, runs: int, batches: int, plan: Plan, seed: int) -> Errors:
    """Simulate a process of `PROCESSES` and count false verdicts."""
    rng = np.random.default_rng([seed, list(PROCESSES).index(name), batches])
    found: list[Floats] = []
    clipped: list[float] = []
    for size in _portions(runs):
        y = simulate(PROCESSES[name](size), batches, LENGTH, rng)
        seen = looks(y, plan)
        up, down = superior(seen), inferior(seen)
        t = np.abs(seen.mean) * np.sqrt(seen.n) / np.where(seen.sd > 0.0, seen.sd, np.inf)
        naive = (seen.ready & (t > stats.t.isf(0.025, np.maximum(seen.n - 1, 1)))).any(axis=-1)
        strict = strict_sequence(y, STRICT_SDS * float(y.std()), plan.alpha)
        missed = ((strict.low > 0.0) | (strict.high < 0.0)).any(axis=-1)
        wide = (strict.high - strict.low)[:, -1] / (seen.high - seen.low)[:, -1]
        clipped.append(strict.clipped * size)
        found.append(
            np.stack([up, down, up | down, naive, seen.correlated[:, -1], missed, wide], axis=1)
        )
    every = np.concatenate(found)
    shares = every[:, :6].mean(axis=0).tolist()
    return Errors(*shares, float(np.median(every[:, 6])), sum(clipped) / runs)


def _portions(runs: int) -> list[int]:
    return [min(AT_ONCE, runs - start) for start in range(0, runs, AT_ONCE)]


class Found(NamedTuple):
    """What became of a planted edge."""

    share: float
    """Runs in which the lower end was above 0 at some look."""
    stop: float
    """Median of the first such look among them, as a share of the horizon."""
    fixed: float
    """Runs that a single two-sided 5 % t-test at the horizon finds."""


def planted_edge(z: float, runs: int, batches: int, plan: Plan, seed: int) -> Found:
    """Plant a mean whose z at the horizon is expected to be `z`, on AR(1) 0.1 GARCH bars."""
    rng = np.random.default_rng([seed, round(10 * z), batches])
    ar = 0.1
    sd = 1.0 / (1.0 - ar) / math.sqrt(LENGTH)  # long-run, of a batch
    hits: list[Bools] = []
    stops: list[float] = []
    fixed: list[Bools] = []
    for size in _portions(runs):
        y = simulate(Linear(size, ar=ar), batches, LENGTH, rng) + z * sd / math.sqrt(batches)
        seen = looks(y, plan)
        above = seen.ready & (seen.low > 0.0)
        hit = above.any(axis=-1)
        hits.append(hit)
        stops += ((above.argmax(axis=-1) + 1)[hit] / batches).tolist()
        t = seen.mean[:, -1] * math.sqrt(batches) / seen.sd[:, -1]
        fixed.append(t > stats.t.isf(0.025, batches - 1))
    return Found(
        float(np.concatenate(hits).mean()),
        float(np.median(stops)) if stops else math.nan,
        float(np.concatenate(fixed).mean()),
    )


class Gates(NamedTuple):
    """Shares of runs of two equal models in which a gate prefers the challenger at some look."""

    significant: float
    """The peer: any of its three tests."""
    approved: float
    """The peer: and its other criteria, and its score."""
    ours: float


def equal_models_benchmark(runs: int, seed: int, *, ar: float, correlation: float) -> Gates:
    """Compare the peer's gate with the confidence sequence on 5,000 trades of equal models.

    Ours looks after every batch: a trade is a batch where trades are independent; otherwise a
    batch has 12 tau trades, tau from a pilot of the same run.
    """
    rng = np.random.default_rng([seed, round(10 * ar), round(10 * correlation)])
    significant: list[Bools] = []
    approved: list[Bools] = []
    ours: list[Bools] = []
    for size in _portions(runs):
        pilot = equal_models(size, PILOT, rng, ar=ar, correlation=correlation)
        trades = equal_models(size, LOOKS[-1], rng, ar=ar, correlation=correlation)
        found = peer_gate(trades)
        significant.append(found[0])
        approved.append(found[1])
        difference = trades.challenger - trades.champion
        lengths = np.ones(size, dtype=np.int64)
        if ar:
            before = pilot.challenger - pilot.champion
            lengths[:] = [math.ceil(12.0 * integrated_autocorrelation(d)) for d in before]
        better = np.zeros(size, dtype=np.bool_)
        for length in np.unique(lengths):
            y = batch_means(difference[lengths == length], int(length))
            better[lengths == length] = superior(looks(y, Plan(horizon=y.shape[-1] // 2)))
        ours.append(better)
    return Gates(
        float(np.concatenate(significant).mean()),
        float(np.concatenate(approved).mean()),
        float(np.concatenate(ours).mean()),
    )


def peer_gate(trades: Trades) -> tuple[Bools, Bools]:
    """Return, per run, whether the peer's gate was ever significant, and ever approved.

    Three one-sided tests at each look, any of which suffices: Welch's t at 5 %, the lower end of
    the 95 % iid bootstrap interval of the difference (here its normal limit), and Jobson-Korkie
    at 5 % with the correlation taken as 0. Approval also needs a Sharpe ratio not below the
    champion's, a drawdown of at most 1.2 of its, at least half the trades won, and 70 points for
    p-value, Sharpe ratio, wins, drawdown and steadiness of wins.
    """
    ever = np.zeros((2, len(trades.champion)), dtype=np.bool_)
    champion, challenger = (_Track(pnl) for pnl in trades)
    for n in LOOKS:
        a, b = champion.after(n), challenger.after(n)
        difference = b.mean - a.mean
        se = np.sqrt((a.sd**2 + b.sd**2) / (n - 1))  # ddof 1, as in Welch's t
        dof = (n - 1) * (a.sd**2 + b.sd**2) ** 2 / (a.sd**4 + b.sd**4)
        p = stats.t.sf(difference / se, dof)
        bootstrap = difference > 1.959964 * np.sqrt((a.sd**2 + b.sd**2) / n)
        korkie = stats.norm.sf((b.sharpe - a.sharpe) / math.sqrt(2.0 / n)) < 0.05
        significant = (p < 0.05) | bootstrap | korkie
        gain = np.where(a.sharpe > 0.0, (b.sharpe - a.sharpe) / np.abs(a.sharpe), 0.0)
        points = np.select([p < 0.01, p < 0.05, bootstrap], [30.0, 20.0, 15.0], 0.0)
        points += (100.0 * gain).clip(0.0, 25.0)
        points += (400.0 * (b.won - a.won)).clip(0.0, 20.0)
        points += (30.0 * (1.0 - b.drawdown / a.drawdown)).clip(0.0, 15.0)
        points += np.select([b.unsteady < 0.05, b.unsteady < 0.07], [10.0, 5.0], 0.0)
        fit = (b.sharpe >= a.sharpe) & (b.drawdown <= 1.2 * a.drawdown) & (b.won >= 0.5)
        ever |= np.stack([significant, significant & fit & (points >= 70.0)])
    return ever[0], ever[1]


class _State(NamedTuple):
    mean: Floats
    sd: Floats
    sharpe: Floats
    won: Floats
    drawdown: Floats
    unsteady: Floats


class _Track:
    """Running totals of a model's trades."""

    def __init__(self, pnl: Floats) -> None:
        self.pnl = pnl
        paid = pnl.cumsum(axis=1)
        self.wins = (pnl > 0.0).cumsum(axis=1)
        self.falls = np.maximum.accumulate(np.maximum.accumulate(paid, axis=1) - paid, axis=1)
        padded = np.pad(self.wins, ((0, 0), (1, 0)))
        self.rates = (padded[:, 100:] - padded[:, :-100]) / 100.0  # of every hundred trades

    def after(self, n: int) -> _State:
        seen = self.pnl[:, :n]
        mean, sd = seen.mean(axis=1), seen.std(axis=1)
        return _State(
            mean, sd, mean / sd, self.wins[:, n - 1] / n, self.falls[:, n - 1],
            self.rates[:, : n - 99].std(axis=1),
        )  # fmt: skip


class Slices(NamedTuple):
    """Shares of runs in which some slice of equal policies is called different at some look."""

    naive: float
    """Benjamini-Hochberg on t-tests."""
    e_values: float
    """e-BH."""


def peeking_at_slices(
    runs: int, seed: int, *, slices: int = 30, batches: int = 200, correlation: float = 0.5
) -> Slices:
    """Look at many correlated slices after every batch, at a false discovery rate of 10 %."""
    rng = np.random.default_rng([seed, slices, batches])
    plan = Plan(horizon=batches // 2)
    n = np.arange(1, batches + 1)
    ever = np.zeros((2, runs), dtype=np.bool_)
    for run in range(runs):
        y = math.sqrt(correlation) * rng.normal(size=batches)
        y = y + math.sqrt(1.0 - correlation) * rng.normal(size=(slices, batches))
        mean = y.cumsum(axis=1) / n
        variance = ((y**2).cumsum(axis=1) - n * mean**2)[:, BURN_IN:] / (n - 1)[BURN_IN:]
        z = mean[:, BURN_IN:] * np.sqrt(n[BURN_IN:] / variance)
        p = 2.0 * stats.t.sf(np.abs(z), n[BURN_IN:] - 1)
        logs = log_e_value(n[BURN_IN:], z, plan.rho2)
        ever[0, run] = any(benjamini_hochberg(column, 0.10).any() for column in p.T)
        ever[1, run] = any(e_benjamini_hochberg(column, 0.10).any() for column in logs.T)
    return Slices(*ever.mean(axis=1).tolist())
