"""Is the mean of the batches above zero, however often one looks? Confidence sequences, e-values.

A batch is the mean of the per-bar difference d over a fixed number of bars; nothing here knows
more about the market. Every statistic mirrors: negated batches give the negated answer, bit for
bit. Numpy alone, since the daemon keeps these statistics up to date. `Evidence` takes one batch at
a time in constant time and space; `looks` gives what it would have said after every batch.

The sequences hold for independent batches and for martingale differences, asymptotically. For
batches of dependent bars that is a heuristic, which the calibration licenses (docs/evaluation.md)
and `Look.correlated` watches. `strict_sequence` is exact, for the mean of the clipped batches.

Sources: [AsympCS] Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas, Time-uniform central limit
theory and asymptotic confidence sequences, Annals of Statistics 52 (2024), arXiv:2103.06476.
[Betting] Waudby-Smith and Ramdas, Estimating means of bounded random variables by betting, JRSS B
86 (2024), arXiv:2010.09686. [mSPRT] Johari et al., Always valid inference, Operations Research 70
(2022).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlv3.metrics import integrated_autocorrelation

BURN_IN = 20  # batches, and batches that are not zero, before there is any verdict
ROUND_BARS = (60, 240, 1440)  # one hour, four hours, one day of one-minute bars

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
_F = TypeVar("_F", float, Floats)


@dataclass(frozen=True)
class Plan:
    """What is fixed before the first look. Raises ValueError for values out of range."""

    alpha: float = 0.05
    """Two-sided level; each one-sided statement has half of it."""
    horizon: int = 720
    """Batches at which the interval is tightest (N*)."""
    burn_in: int = BURN_IN
    """Batches, and batches that are not zero, before the first look."""

    def __post_init__(self) -> None:
        if not 0.0 < self.alpha < 1.0:
            raise ValueError(f"expected alpha between 0 and 1, found {self.alpha}")
        if self.horizon < 1:
            raise ValueError(f"expected a horizon of at least 1 batch, found {self.horizon}")
        if self.burn_in < 2:
            raise ValueError(f"expected a burn-in of at least 2 batches, found {self.burn_in}")

    @cached_property
    def rho2(self) -> float:
        """The tuning parameter; the same for both sides, as each has half of alpha."""
        return tuning(self.alpha, self.horizon)


class Look(NamedTuple):
    """What may be said after the last of `n` batches."""

    n: int
    nonzero: int
    mean: float
    sd: float
    """Sample standard deviation (ddof 1); 0 for a single batch."""
    low: float
    """Two-sided confidence sequence at 1 - alpha; infinite before the second batch."""
    high: float
    lower: float
    """One-sided lower bound at 1 - alpha/2, and the upper one."""
    upper: float
    log_e: float
    """Log e-value of "the mean is 0" now, and of "not above 0", "not below 0"; 0 before burn-in."""
    log_e_above: float
    log_e_below: float
    p: float
    """Always-valid p-values: of "the mean is 0", "not above 0", "not below 0"."""
    p_above: float
    p_below: float
    lag1: float
    """Correlation of neighbouring batches; 0 where it is unknown."""
    lag1_limit: float
    """What two standard errors allow it to be; 2/sqrt(n) if volatility is even."""
    correlated: bool
    """It lies outside: the batches are too short, no verdict stands on them."""
    ready: bool
    """Burn-in is over: enough batches, enough that are not zero, and they vary."""


class Looks(NamedTuple):
    """`Look` after every batch: each field an array [..., K], batches along the last axis."""

    n: NDArray[np.int64]
    nonzero: NDArray[np.int64]
    mean: Floats
    sd: Floats
    low: Floats
    high: Floats
    lower: Floats
    upper: Floats
    log_e: Floats
    log_e_above: Floats
    log_e_below: Floats
    p: Floats
    p_above: Floats
    p_below: Floats
    lag1: Floats
    lag1_limit: Floats
    correlated: Bools
    ready: Bools


@dataclass(frozen=True, slots=True)
class Evidence:
    """Sufficient statistics of the batches so far; `update` costs the same after any number."""

    n: int = 0
    mean: float = 0.0
    m2: float = 0.0
    """Sum of squared deviations from the mean."""
    nonzero: int = 0
    first: float = 0.0
    last: float = 0.0
    lag: float = 0.0
    """Sum of products of neighbouring deviations from the mean."""
    lag_squares: float = 0.0
    """Sum of the squares of those products, each about the mean at its own time."""
    peak: float = 0.0
    """Largest log e-value at any look so far (0 before burn-in): two-sided, above, below."""
    peak_above: float = 0.0
    peak_below: float = 0.0

    def update(self, batch: float, plan: Plan) -> Evidence:
        """Return the statistics with one more batch.

        Raises:
            ValueError: the batch is not a finite number.
        """
        batch = float(batch)
        if not math.isfinite(batch):
            raise ValueError(f"expected a finite batch mean, found {batch}")
        n = self.n + 1
        mean, m2 = _welford(n, self.mean, self.m2, batch)
        before = self.mean
        first = batch if n == 1 else self.first
        last = first if n == 1 else self.last
        lag, squares = 0.0, 0.0
        if n > 1:
            lag, square = _lag(n, self.lag, before, mean, first, last, batch)
            squares = self.lag_squares + square
        nonzero = self.nonzero + (batch != 0.0)
        logs = [float(log_e) for log_e in _log_e_values(n, nonzero, mean, m2, plan)]
        return Evidence(
            n, mean, m2, nonzero, first, batch, lag, squares,
            max(self.peak, logs[0]), max(self.peak_above, logs[1]), max(self.peak_below, logs[2]),
        )  # fmt: skip

    def look(self, plan: Plan) -> Look:
        """Return what may be said now.

        Raises:
            ValueError: there is no batch yet.
        """
        if self.n == 0:
            raise ValueError("expected at least one batch, found none")
        n, nonzero = np.asarray(self.n), np.asarray(self.nonzero)
        mean, m2 = np.asarray(self.mean), np.asarray(self.m2)
        logs = _log_e_values(n, nonzero, mean, m2, plan)
        peaks = [np.asarray(peak) for peak in (self.peak, self.peak_above, self.peak_below)]
        lags = np.asarray(self.lag), np.asarray(self.lag_squares)
        arrays = _looks(n, nonzero, mean, m2, lags, logs, peaks, plan)
        return Look._make(value.item() for value in arrays)


def looks(batches: ArrayLike, plan: Plan) -> Looks:
    """Return what `Evidence` says after every batch.

    Args:
        batches: float64[..., K], one run along the last axis.
    Raises:
        ValueError: a batch is not a finite number.
    """
    values = np.asarray(batches, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("expected finite batch means, found nan or inf")
    mean, m2 = np.empty_like(values), np.empty_like(values)
    lag, lag_squares = np.zeros_like(values), np.zeros_like(values)
    now = np.zeros(values.shape[:-1])
    total = np.zeros_like(now)
    for k in range(values.shape[-1]):
        before, value = now, values[..., k]
        now, total = _welford(k + 1, before, total, value)
        mean[..., k], m2[..., k] = now, total
        if k > 0:
            lag[..., k], square = _lag(
                k + 1, lag[..., k - 1], before, now, values[..., 0], values[..., k - 1], value
            )
            lag_squares[..., k] = lag_squares[..., k - 1] + square
    n = np.broadcast_to(np.arange(1, values.shape[-1] + 1), values.shape)
    nonzero = (values != 0.0).cumsum(axis=-1)
    logs = _log_e_values(n, nonzero, mean, m2, plan)
    peaks = [np.maximum.accumulate(log_e, axis=-1).clip(0.0) for log_e in logs]
    return _looks(n, nonzero, mean, m2, (lag, lag_squares), logs, peaks, plan)


def _welford(n: int, mean: _F, m2: _F, value: _F) -> tuple[_F, _F]:
    delta = value - mean
    after = mean + delta / n
    return after, m2 + delta * (value - after)


def _lag(n: int, lag: _F, before: _F, after: _F, first: _F, last: _F, value: _F) -> tuple[_F, _F]:
    # sum over i of (y[i] - mean)(y[i-1] - mean), moved from the mean before to the mean after
    shift = after - before
    moved = lag + shift * ((first - before) + (last - before)) + (n - 2) * (shift * shift)
    product = (value - after) * (last - after)
    return moved + product, product * product


def _ready(n: ArrayLike, nonzero: ArrayLike, m2: ArrayLike, plan: Plan) -> Bools:
    enough = (np.asarray(n) >= plan.burn_in) & (np.asarray(nonzero) >= plan.burn_in)
    return enough & (np.asarray(m2) > 0.0)


def _log_e_values(
    n: ArrayLike, nonzero: ArrayLike, mean: ArrayLike, m2: ArrayLike, plan: Plan
) -> tuple[Floats, Floats, Floats]:
    """Return log e-values two-sided, above and below; 0, which is no evidence, before burn-in."""
    n, mean = np.asarray(n), np.asarray(mean)
    ready = _ready(n, nonzero, m2, plan)
    variance = np.where(ready, m2 / np.maximum(n - 1, 1), 1.0)
    z = np.where(ready, np.sqrt(n) * mean / np.sqrt(variance), 0.0)
    return (
        np.where(ready, log_e_value(n, z, plan.rho2), 0.0),
        np.where(ready, log_e_value_one_sided(n, z, plan.rho2), 0.0),
        np.where(ready, log_e_value_one_sided(n, -z, plan.rho2), 0.0),
    )


def _looks(
    n: NDArray[np.int64],
    nonzero: NDArray[np.int64],
    mean: Floats,
    m2: Floats,
    lags: tuple[Floats, Floats],
    logs: tuple[Floats, Floats, Floats],
    peaks: list[Floats],
    plan: Plan,
) -> Looks:
    sd = np.sqrt(m2 / np.maximum(n - 1, 1))
    some = n > 1
    both = np.where(some, radius(n, sd, plan.rho2, plan.alpha), np.inf)
    one = np.where(some, radius_one_sided(n, sd, plan.rho2, plan.alpha / 2.0), np.inf)
    scale = np.where(m2 > 0.0, m2, np.inf)
    lag1, limit = lags[0] / scale, 2.0 * np.sqrt(lags[1]) / scale
    p, p_above, p_below = (np.exp(-peak) for peak in peaks)
    return Looks(
        n, nonzero, mean, sd, mean - both, mean + both, mean - one, mean + one,
        logs[0], logs[1], logs[2], p, p_above, p_below,
        lag1, limit, np.abs(lag1) > limit, _ready(n, nonzero, m2, plan),
    )  # fmt: skip


def tuning(alpha: float, horizon: float) -> float:
    """Return the rho^2 that makes the two-sided sequence tightest after so many batches.

    rho^2 = x / N* with x = -W(-alpha^2 / e) - 1, W the lower branch of Lambert's function, that is
    the root of x - ln(1 + x) = -2 ln(alpha). For a one-sided sequence give twice its level.

    Source: [AsympCS], appendix on the choice of rho (eq. 161 is the approximation that Newton's
    method starts from); it is the minimum of `radius` over rho at n = N*.
    """
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"expected alpha between 0 and 1, found {alpha}")
    goal = -2.0 * math.log(alpha)
    x = goal + math.log1p(goal)  # the usual approximation; Newton goes on from there
    for _ in range(100):
        step = (x - math.log1p(x) - goal) * (1.0 + x) / x
        x -= step
        if abs(step) <= 1e-15 * x:
            break
    return x / horizon


def radius(n: ArrayLike, sd: ArrayLike, rho2: float, alpha: float) -> Floats:
    """Return half the width of the two-sided asymptotic confidence sequence at 1 - alpha.

    sd sqrt(2 (n rho^2 + 1) / (n^2 rho^2) ln(sqrt(n rho^2 + 1) / alpha))

    Source: [AsympCS], Theorem 2.2, eq. 9.
    """
    n = np.asarray(n, dtype=np.float64)
    v = n * rho2
    return np.asarray(sd) * np.sqrt(2.0 * (v + 1.0) / (n * v) * np.log(np.sqrt(v + 1.0) / alpha))


def radius_one_sided(n: ArrayLike, sd: ArrayLike, rho2: float, alpha: float) -> Floats:
    """Return the distance from the mean to the one-sided bound at 1 - alpha.

    sd sqrt(2 (n rho^2 + 1) / (n^2 rho^2) ln(1 + sqrt(n rho^2 + 1) / (2 alpha)))

    Source: [AsympCS], appendix on one-sided sequences. It follows from the one-sided e-value with
    Phi(u) >= 1 - exp(-u^2 / 2), so it is a little wider than that e-value's own bound.
    """
    n = np.asarray(n, dtype=np.float64)
    v = n * rho2
    level = 1.0 + np.sqrt(v + 1.0) / (2.0 * alpha)
    return np.asarray(sd) * np.sqrt(2.0 * (v + 1.0) / (n * v) * np.log(level))


def critical_z(n: ArrayLike, rho2: float, alpha: float) -> Floats:
    """Return the z = sqrt(n) mean / sd beyond which the two-sided sequence excludes 0."""
    n = np.asarray(n, dtype=np.float64)
    return np.sqrt(n) * radius(n, 1.0, rho2, alpha)


def log_e_value(n: ArrayLike, z: ArrayLike, rho2: float) -> Floats:
    """Return the log e-value against "the mean is 0".

    E = (1 + v)^(-1/2) exp(v z^2 / (2 (1 + v))), v = n rho^2, z = sqrt(n) mean / sd. It reaches
    ln(1/alpha) exactly where `radius` excludes 0.

    Source: [mSPRT], normal mixture; [AsympCS].
    """
    v = np.asarray(n, dtype=np.float64) * rho2
    return v / (1.0 + v) * np.asarray(z) ** 2 / 2.0 - np.log1p(v) / 2.0


def log_e_value_one_sided(n: ArrayLike, z: ArrayLike, rho2: float) -> Floats:
    """Return the log e-value against "the mean is not above 0"; give -z for "not below 0".

    E = 2 (1 + v)^(-1/2) exp(v z^2 / (2 (1 + v))) Phi(z sqrt(v / (1 + v))), v = n rho^2: the
    mixture over the positive half of the normal distribution.

    Source: [AsympCS], appendix on one-sided sequences.
    """
    z = np.asarray(z)
    v = np.asarray(n, dtype=np.float64) * rho2
    log_phi = np.asarray(_log_ndtr(z * np.sqrt(v / (1.0 + v))), dtype=np.float64)
    return math.log(2.0) + log_e_value(n, z, rho2) + log_phi


def _log_normal_cdf(u: float) -> float:
    if u > 0.0:
        return math.log1p(-0.5 * math.erfc(u / math.sqrt(2.0)))
    if u > -30.0:
        return math.log(0.5 * math.erfc(-u / math.sqrt(2.0)))
    w = 1.0 / (u * u)  # erfc underflows: Mills' ratio, off by less than 945 w^5 = 2e-12
    tail = 1.0 - w * (1.0 - 3.0 * w * (1.0 - 5.0 * w * (1.0 - 7.0 * w)))
    return -0.5 * u * u - math.log(-u) - 0.5 * math.log(2.0 * math.pi) + math.log(tail)


_log_ndtr = np.frompyfunc(_log_normal_cdf, 1, 1)


class Strict(NamedTuple):
    """The strict sequence after every batch, and how much of the data had to be clipped."""

    low: Floats
    high: Floats
    clipped: float
    """Share of the batches outside the bound; the sequence is for the mean of the clipped ones."""


def strict_sequence(batches: ArrayLike, bound: float, alpha: float) -> Strict:
    """Return the predictable plug-in empirical-Bernstein sequence at 1 - alpha.

    With x = (y + b) / (2 b) for batches y clipped to +-b:

    sum(l x) / sum(l) +- (ln(2 / alpha) + sum((x[i] - m[i-1])^2 (-ln(1 - l) - l))) / sum(l),
    l[t] = min(sqrt(2 ln(2 / alpha) / (s2[t-1] t ln(1 + t))), 1/2),
    m[t] = (1/2 + sum(x)) / (t + 1), s2[t] = (1/4 + sum((x[i] - m[i])^2)) / (t + 1).

    It holds at every batch count at once, for any distribution whose clipped conditional mean
    given the past is constant. No running intersection is taken.

    Args:
        batches: float64[..., K].
        bound: b, fixed before the data are looked at.
    Raises:
        ValueError: the bound is not a positive number, or a batch is not finite.
    Source: [Betting], Theorem 2 and eq. 15 (prior mean 1/2, prior variance 1/4).
    """
    if not (math.isfinite(bound) and bound > 0.0):
        raise ValueError(f"expected a positive bound, found {bound}")
    values = np.asarray(batches, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("expected finite batch means, found nan or inf")
    x = values.clip(-bound, bound) / (2.0 * bound)  # x - 1/2: centred, so that it mirrors exactly
    t = np.arange(1, values.shape[-1] + 1)
    mean = x.cumsum(axis=-1) / (t + 1)
    variance = (0.25 + ((x - mean) ** 2).cumsum(axis=-1)) / (t + 1)
    before = np.concatenate([np.zeros_like(x[..., :1]), mean[..., :-1]], axis=-1)
    spread = np.concatenate([np.full_like(x[..., :1], 0.25), variance[..., :-1]], axis=-1)
    stake = math.log(2.0 / alpha)
    bet = np.minimum(np.sqrt(2.0 * stake / (spread * t * np.log1p(t))), 0.5)
    total = bet.cumsum(axis=-1)
    centre = (bet * x).cumsum(axis=-1) / total
    paid = ((x - before) ** 2 * (-np.log1p(-bet) - bet)).cumsum(axis=-1)
    half = (stake + paid) / total
    clipped = float((np.abs(values) > bound).mean()) if values.size else 0.0
    return Strict(
        np.maximum((centre - half) * (2.0 * bound), -bound),
        np.minimum((centre + half) * (2.0 * bound), bound),
        clipped,
    )


def batch_means(bars: ArrayLike, length: int) -> Floats:
    """Return the means of whole batches of so many bars; an incomplete last batch is left out.

    Args:
        bars: float64[..., T]; the first bar begins the first batch.
    """
    if length < 1:
        raise ValueError(f"expected batches of at least 1 bar, found {length}")
    values = np.asarray(bars, dtype=np.float64)
    whole = values.shape[-1] // length
    return values[..., : whole * length].reshape(*values.shape[:-1], whole, length).mean(axis=-1)


def batch_length(pilot: ArrayLike, holding_bars: float) -> int:
    """Return how many bars a batch needs, from a pilot that is not used again.

    The largest of 60 bars, twice the holding time that 90 % of the positions do not exceed, and
    12 times the integrated autocorrelation of the pilot; rounded up to an hour, four hours, or
    whole days of one-minute bars.

    Args:
        pilot: float64[T], per-bar differences.
        holding_bars: 90 % quantile of the holding times.
    """
    need = max(60.0, 2.0 * holding_bars, 12.0 * integrated_autocorrelation(pilot))
    day = ROUND_BARS[-1]
    return next((bars for bars in ROUND_BARS if bars >= need), math.ceil(need / day) * day)
