"""One look at a date fixed in advance: tests, bootstrap intervals, Sharpe ratios, power.

Series are per bar or per batch, in time order. Nothing here may be looked at daily and acted on:
that is what `shadow.statistics.sequential` is for. Tests and intervals allow for autocorrelation,
except where the docstring says that they assume independence. Swapping two policies, or negating a
difference, mirrors every answer bit for bit under the same seed; quantiles are therefore order
statistics.

Sharpe, Sortino, probabilistic and deflated Sharpe ratios and the block length are `rlv3.metrics`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import fft, special

from rlv3.metrics import (
    block_length,
    sharpe_from_moments,
    sortino_from_moments,
    stationary_block_length,
)
from shadow.statistics.sequential import Plan, critical_z

LEVEL = 0.95
DRAWS = 1_999  # 2.5 % of 2,000 is a whole number: the interval's ends are the 50th draws
POWER = 0.8
TAIL = 0.05
_CHUNK = 2_000_000  # resampled values held at a time

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]
"""Reduces the last axis, which is time."""


class Estimate(NamedTuple):
    """A value and its interval."""

    value: float
    low: float
    high: float


class TTest(NamedTuple):
    """A two-sided t-test that a mean is 0, and the interval of that mean."""

    estimate: float
    se: float
    statistic: float
    dof: float
    p: float
    low: float
    high: float


def ewc_test(values: ArrayLike, *, level: float = LEVEL) -> TTest:
    """Test a mean with the equal-weighted cosine estimate of the long-run variance.

    nu = 0.4 T^(2/3) projections sqrt(2/T) sum y[t] cos(pi j (t - 1/2) / T), whose mean square
    estimates the long-run variance; the statistic has a t distribution with nu degrees of freedom.

    Raises:
        ValueError: fewer than 8 values.
    Source: Lazarus, Lewis, Stock and Watson, JBES 36 (2018), eq. 3-5 and 10.
    """
    series = _series(values, 8)
    n = len(series)
    nu = max(1, math.floor(0.4 * n ** (2.0 / 3.0)))
    projections = fft.dct(series - series.mean(), type=2)[1 : nu + 1] / math.sqrt(2.0 * n)
    variance = float((projections**2).mean())
    return _t_test(float(series.mean()), math.sqrt(variance / n), nu, level)


def few_group_test(values: ArrayLike, *, groups: int = 12, level: float = LEVEL) -> TTest:
    """Test a mean by a plain t-test on the means of a few contiguous groups.

    Conservative at levels up to 5 % even where the groups' variances differ: a sanity check.

    Args:
        groups: equally long; values left over at the start are not used.
    Raises:
        ValueError: fewer values than groups, or fewer than 2 groups.
    Source: Ibragimov and Müller, JBES 28 (2010).
    """
    if groups < 2:
        raise ValueError(f"expected at least 2 groups, found {groups}")
    series = _series(values, groups)
    size = len(series) // groups
    means = series[len(series) - groups * size :].reshape(groups, size).mean(axis=1)
    se = float(means.std(ddof=1)) / math.sqrt(groups)
    return _t_test(float(means.mean()), se, groups - 1, level)


def _series(values: ArrayLike, least: int) -> Floats:
    series = np.asarray(values, dtype=np.float64)
    if series.ndim != 1 or len(series) < least:
        raise ValueError(f"expected a series of at least {least} values, found {series.shape}")
    if not np.isfinite(series).all():
        raise ValueError("expected finite values, found nan or inf")
    return series


def _t_test(estimate: float, se: float, dof: float, level: float) -> TTest:
    if se == 0.0:  # a series without variation is what it is
        statistic = math.copysign(math.inf, estimate) if estimate else 0.0
        return TTest(estimate, se, statistic, dof, float(estimate == 0.0), estimate, estimate)
    statistic = estimate / se
    half = float(-special.stdtrit(dof, (1.0 - level) / 2.0)) * se
    p = float(2.0 * special.stdtr(dof, -abs(statistic)))
    return TTest(estimate, se, statistic, dof, p, estimate - half, estimate + half)


def newey_west_lag(n: int) -> int:
    """Return 1.3 sqrt(T), rounded up and below T.

    Source: Lazarus, Lewis, Stock and Watson, JBES 36 (2018); it wants fixed-b critical values, or
    a studentised bootstrap, not the normal ones.
    """
    return min(math.ceil(1.3 * math.sqrt(n)), n - 1)


def long_run_variance(values: ArrayLike, lag: int) -> float:
    """Return R(0) + 2 sum (1 - k / (lag + 1)) R(k), the HAC variance of sqrt(T) times the mean.

    The Bartlett weights make it the mean square of moving sums over lag + 1 values, which costs
    O(T) and is never negative.

    Source: Newey and West, Econometrica 55 (1987).
    """
    series = _series(values, 1)
    n = len(series)
    sums = np.concatenate([np.zeros(1), (series - series.mean()).cumsum()])
    ends = np.arange(n + lag)
    windows = sums[np.minimum(ends + 1, n)] - sums[np.maximum(ends - lag, 0)]
    return float(np.einsum("i,i", windows, windows)) / ((lag + 1) * n)


def stationary_indices(
    n: int, length: float, draws: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Return int64[draws, n]: samples made of blocks of geometric length, wrapping at the end.

    Args:
        length: mean block length, at least 1.
    Source: Politis and Romano, JASA 89 (1994).
    """
    at = np.arange(n)
    begins = rng.random((draws, n)) < 1.0 / length
    begins[:, 0] = True
    since = np.maximum.accumulate(np.where(begins, at, 0), axis=1)
    starts = rng.integers(n, size=(draws, n))
    return (np.take_along_axis(starts, since, axis=1) + at - since) % n


def bootstrap_means(
    columns: ArrayLike, length: float, draws: int, rng: np.random.Generator
) -> Floats:
    """Return float64[draws, C], column means of stationary-bootstrap samples of float64[T, C].

    A block's sum is a difference of cumulative sums, so a sample costs T / length additions.
    """
    table = np.asarray(columns, dtype=np.float64)
    n = len(table)
    sums = np.concatenate([np.zeros((1, table.shape[1])), np.tile(table, (2, 1)).cumsum(axis=0)])
    expected = n / length
    blocks = math.ceil(expected + 4.0 * math.sqrt(expected)) + 4
    means = np.empty((draws, table.shape[1]))
    at_once = max(1, _CHUNK // (blocks * table.shape[1]))
    for first in range(0, draws, at_once):
        size = min(at_once, draws - first)
        lengths = rng.geometric(1.0 / length, size=(size, blocks))
        while (lengths.sum(axis=1) < n).any():  # rare: short blocks only
            lengths = np.hstack([lengths, rng.geometric(1.0 / length, size=(size, blocks))])
        ends = lengths.cumsum(axis=1)
        taken = np.minimum(ends, n) - np.minimum(ends - lengths, n)  # samples have T rows
        starts = rng.integers(n, size=lengths.shape)
        means[first : first + size] = (sums[starts + taken] - sums[starts]).sum(axis=1) / n
    return means


def interval(
    value: float, draws: ArrayLike, *, level: float = LEVEL, method: str = "percentile"
) -> Estimate:
    """Return a value with the interval that its bootstrap draws give.

    Args:
        method: "percentile", or "basic", which reflects the draws at the value.
    Raises:
        ValueError: no such method.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), ch. 13.
    """
    ordered = np.sort(np.asarray(draws, dtype=np.float64))
    k = max(0, math.floor((1.0 - level) / 2.0 * (len(ordered) + 1) + 1e-9) - 1)
    low, high = float(ordered[k]), float(ordered[len(ordered) - 1 - k])
    if method == "percentile":
        return Estimate(value, low, high)
    if method == "basic":
        return Estimate(value, value + (value - high), value + (value - low))
    raise ValueError(f"expected the method percentile or basic, found {method!r}")


def bootstrap_length(*series: ArrayLike) -> float:
    """Return the mean block length that serves several series of one length, and their squares.

    The longest of the automatic ones, at least T^(1/3): squares persist longer than values.
    """
    lengths = [stationary_block_length(values) for values in series]
    return max(*lengths, np.shape(series[0])[-1] ** (1.0 / 3.0))


def mean(returns: Floats) -> Floats:
    """Return the mean over time."""
    return returns.mean(axis=-1)


def sharpe(returns: Floats) -> Floats:
    """Return mean / standard deviation per step (0 without variation)."""
    return sharpe_from_moments(returns.mean(axis=-1), (returns**2).mean(axis=-1))


def sortino(returns: Floats) -> Floats:
    """Return mean / root mean square of the losses per step (0 without losses)."""
    down = (np.minimum(returns, 0.0) ** 2).mean(axis=-1)
    return sortino_from_moments(returns.mean(axis=-1), down)


def expected_shortfall(returns: Floats) -> Floats:
    """Return the mean loss of the worst 5 % of the steps (at least one): positive is a loss."""
    worst = max(1, math.ceil(TAIL * returns.shape[-1]))
    return -np.sort(np.partition(returns, worst - 1, axis=-1)[..., :worst], axis=-1).mean(axis=-1)


def drawdown(returns: Floats) -> Floats:
    """Return the largest fall of the running sum from its peak, as a fraction of the capital.

    The capital is fixed and nothing is compounded, so that returns add up.
    """
    paid = returns.cumsum(axis=-1)
    peak = np.maximum(np.maximum.accumulate(paid, axis=-1), 0.0)
    return (peak - paid).max(axis=-1)


METRICS: Mapping[str, Statistic] = {
    "mean": mean,
    "sharpe": sharpe,
    "sortino": sortino,
    "es95": expected_shortfall,
    "drawdown": drawdown,
}


class Compared(NamedTuple):
    """A statistic of two policies, its difference first - second, and its ratio first / second.

    The ratio has a meaning for what is never negative: shortfall, drawdown, turnover. It is 1
    where both are 0, and infinite where only the second is.
    """

    first: Estimate
    second: Estimate
    difference: Estimate
    ratio: Estimate


def compare(
    first: ArrayLike,
    second: ArrayLike,
    statistics: Mapping[str, Statistic] = METRICS,
    *,
    rng: np.random.Generator,
    length: float | None = None,
    draws: int = DRAWS,
    level: float = LEVEL,
) -> dict[str, Compared]:
    """Return statistics of two paired series with stationary-bootstrap percentile intervals.

    Each draw takes the same steps from both. The time is O(draws T) per statistic: give batch
    returns where bars are many.

    Args:
        first: float64[T]; `second` too.
        length: mean block length; default `bootstrap_length` of the two and their difference.
    Raises:
        ValueError: the lengths differ, or there are fewer than 2 steps.
    """
    one, two = _pair(first, second)
    if length is None:
        length = bootstrap_length(one, two, one - two)
    found: dict[str, list[Floats]] = {name: [] for name in statistics}
    for indices in _samples(len(one), length, draws, rng):
        sampled = np.stack([one[indices], two[indices]])
        for name, statistic in statistics.items():
            found[name].append(statistic(sampled))
    result = {}
    for name, statistic in statistics.items():
        a, b = np.concatenate(found[name], axis=1)
        x, y = float(statistic(one)), float(statistic(two))
        result[name] = Compared(
            interval(x, a, level=level),
            interval(y, b, level=level),
            interval(x - y, a - b, level=level),
            interval(float(_ratio(x, y)), _ratio(a, b), level=level),
        )
    return result


def estimate(
    values: ArrayLike,
    statistic: Statistic,
    *,
    rng: np.random.Generator,
    length: float | None = None,
    draws: int = DRAWS,
    level: float = LEVEL,
) -> Estimate:
    """Return a statistic of one series with its stationary-bootstrap percentile interval."""
    series = _series(values, 2)
    if length is None:
        length = bootstrap_length(series)
    samples = _samples(len(series), length, draws, rng)
    found = [statistic(series[indices]) for indices in samples]
    return interval(float(statistic(series)), np.concatenate(found), level=level)


def _samples(
    n: int, length: float, draws: int, rng: np.random.Generator
) -> Iterator[NDArray[np.int64]]:
    at_once = max(1, _CHUNK // n)
    for start in range(0, draws, at_once):
        yield stationary_indices(n, length, min(at_once, draws - start), rng)


def _pair(first: ArrayLike, second: ArrayLike) -> tuple[Floats, Floats]:
    one, two = _series(first, 2), _series(second, 2)
    if len(one) != len(two):
        raise ValueError(f"expected two series of one length, found {len(one)} and {len(two)}")
    return one, two


def _ratio(first: ArrayLike, second: ArrayLike) -> Floats:
    a, b = np.asarray(first), np.asarray(second)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(b == 0.0, np.where(a == 0.0, 1.0, np.copysign(np.inf, a)), a / b)


class SharpeDifference(NamedTuple):
    """Sharpe ratios per step of two policies, their difference, its interval and p-value."""

    first: float
    second: float
    difference: float
    se: float
    low: float
    high: float
    p: float


def sharpe_difference(
    first: ArrayLike,
    second: ArrayLike,
    *,
    rng: np.random.Generator,
    length: int | None = None,
    draws: int = DRAWS,
    level: float = LEVEL,
) -> SharpeDifference:
    """Compare two Sharpe ratios of paired series by a studentised circular block bootstrap.

    Delta = mu1 / s1 - mu2 / s2; its standard error comes from the delta method: the long-run
    variance of the influence g1(t) - g2(t), g = (c (r - mu) - mu (r^2 - c) / 2) / s^3, c the mean
    of r^2. In a bootstrap sample the blocks are independent, so block sums give that variance.
    The time is O(draws T / length): give batch returns where bars are many.

    Args:
        first: float64[T] returns; `second` too.
        length: block length; default `rlv3.metrics.block_length`, at least T^(1/3).
    Raises:
        ValueError: the lengths differ, or fewer than 2 blocks fit.
    Source: Ledoit and Wolf, Journal of Empirical Finance 15 (2008), sections 3.1 and 3.2.
    """
    one, two = _pair(first, second)
    n = len(one)
    if length is None:
        length = max(block_length(one), block_length(two), math.ceil(n ** (1.0 / 3.0)))
    blocks = n // length
    if blocks < 2:
        raise ValueError(f"expected at least 2 blocks of {length} steps, found {n} steps")
    ratios = [float(sharpe(one)), float(sharpe(two))]
    delta = ratios[0] - ratios[1]
    influence = _influence(one) - _influence(two)
    se = math.sqrt(long_run_variance(influence, newey_west_lag(n)) / n)
    if se == 0.0:
        return SharpeDifference(ratios[0], ratios[1], delta, se, delta, delta, float(delta == 0.0))
    sums = [_moment_sums(returns, length) for returns in (one, two)]
    found = []
    at_once = max(1, _CHUNK // (4 * blocks))
    for start in range(0, draws, at_once):
        starts = rng.integers(n, size=(min(at_once, draws - start), blocks))
        found.append(_studentised(sums, starts, length, delta))
    distances = np.sort(np.concatenate(found))
    k = math.floor((1.0 - level) * (draws + 1) + 1e-9)
    half = float(distances[draws - max(k, 1)]) * se
    p = (1 + int((distances >= abs(delta) / se).sum())) / (draws + 1)
    return SharpeDifference(ratios[0], ratios[1], delta, se, delta - half, delta + half, p)


def _influence(returns: Floats) -> Floats:
    mu, c = returns.mean(), (returns**2).mean()
    return (c * (returns - mu) - mu / 2.0 * (returns**2 - c)) / _variance(mu, c) ** 1.5


def _variance(mu: ArrayLike, c: ArrayLike) -> Floats:
    """Return c - mu^2; infinite without variation, whose ratio is 0 and has no influence."""
    variance = np.asarray(c) - np.asarray(mu) ** 2
    return np.where(variance > 1e-12 * np.asarray(c), variance, np.inf)


def _moment_sums(returns: Floats, length: int) -> Floats:
    wrapped = np.concatenate([returns, returns[:length]])
    moments = np.stack([wrapped, wrapped**2])
    return np.concatenate([np.zeros((2, 1)), moments.cumsum(axis=1)], axis=1)


def _studentised(
    sums: list[Floats], starts: NDArray[np.int64], length: int, delta: float
) -> Floats:
    """Return |Delta* - Delta| / se* of bootstrap samples; infinite where se* is 0."""
    steps = starts.shape[1] * length
    ratios, influences = [], []
    for moments in sums:
        block = moments[:, starts + length] - moments[:, starts]  # [2, draws, blocks]
        mu, c = block.sum(axis=2) / steps
        by_block = c[:, None] * (block[0] - length * mu[:, None])
        by_block = by_block - mu[:, None] / 2.0 * (block[1] - length * c[:, None])
        ratios.append(sharpe_from_moments(mu, c))
        influences.append(by_block / _variance(mu, c)[:, None] ** 1.5)
    of_blocks = influences[0] - influences[1]
    se = np.sqrt((of_blocks**2).sum(axis=1)) / steps
    away = np.abs(ratios[0] - ratios[1] - delta)
    return np.where(se > 0.0, away / np.where(se > 0.0, se, 1.0), np.inf)


def min_track_record(
    ratio: float, benchmark: float, skew: float, kurtosis: float, *, level: float = LEVEL
) -> float:
    """Return how many steps make a Sharpe ratio per step exceed a benchmark at this confidence.

    1 + (1 - skew SR + (kurtosis - 1)/4 SR^2) (z / (SR - SR*))^2; infinite if SR is not above SR*.
    Assumes independent returns.

    Args:
        kurtosis: raw, 3 for a normal distribution.
    Source: Bailey and Lopez de Prado, Journal of Risk 15 (2012).
    """
    if ratio <= benchmark:
        return math.inf
    variance = 1.0 - skew * ratio + (kurtosis - 1.0) / 4.0 * ratio**2
    return 1.0 + variance * (NormalDist().inv_cdf(level) / (ratio - benchmark)) ** 2


def lo_factor(steps: int, autocorrelations: ArrayLike) -> float:
    """Return eta(q) = q / sqrt(q + 2 sum (q - k) rho(k)): a ratio per step times it is one of q.

    Args:
        steps: q.
        autocorrelations: rho(1), rho(2) ...; those not given are 0, those from q on unused.
    Raises:
        ValueError: no stationary series has such autocorrelations.
    Source: Lo, Financial Analysts Journal 58 (2002), eq. 20.
    """
    rho = np.asarray(autocorrelations, dtype=np.float64)[: steps - 1]
    k = np.arange(1, len(rho) + 1)
    spread = steps + 2.0 * float(((steps - k) * rho).sum())
    if spread <= 0.0:
        raise ValueError(f"expected autocorrelations of a stationary series, found {rho}")
    return steps / math.sqrt(spread)


def lo_sharpe(returns: ArrayLike, per_year: float) -> float:
    """Return the annual Sharpe ratio with Lo's factor in place of sqrt(per_year).

    Autocorrelations are taken up to `newey_west_lag`, with Bartlett weights, so that the factor
    exists for every sample.
    """
    series = _series(returns, 2)
    centred = series - series.mean()
    power = float(np.einsum("i,i", centred, centred))
    if power == 0.0:
        return 0.0
    lag = newey_west_lag(len(series))
    k = np.arange(1, lag + 1)
    rho = np.array([np.einsum("i,i", centred[i:], centred[:-i]) for i in k]) / power
    return float(sharpe(series)) * lo_factor(round(per_year), (1.0 - k / (lag + 1)) * rho)


def fixed_z(alpha: float) -> float:
    """Return the two-sided critical value of one look; `sequential.critical_z` is for many."""
    return NormalDist().inv_cdf(1.0 - alpha / 2.0)


def power(effect: float, sd: float, n: float, critical: float) -> float:
    """Return the chance that |z| after n batches exceeds a critical value, on the effect's side.

    Args:
        effect: true mean of a batch; `sd` is the standard deviation of a batch.
    """
    if sd == 0.0:
        return float(effect != 0.0)
    return NormalDist().cdf(abs(effect) * math.sqrt(n) / sd - critical)


def minimum_detectable_effect(
    sd: float, n: float, critical: float, *, power: float = POWER
) -> float:
    """Return the smallest true mean of a batch that n batches show with this power."""
    return (critical + NormalDist().inv_cdf(power)) * sd / math.sqrt(n)


def batches_fixed(effect: float, sd: float, alpha: float, *, power: float = POWER) -> float:
    """Return how many batches one look needs, (z_crit + z_power)^2 (sd / effect)^2."""
    if effect == 0.0:
        return math.inf
    return ((fixed_z(alpha) + NormalDist().inv_cdf(power)) * sd / effect) ** 2


def batches_sequential(effect: float, sd: float, plan: Plan, *, power: float = POWER) -> float:
    """Return after how many batches the confidence sequence excludes 0 with this power.

    The chance is that of the look at this very batch; an earlier look may have decided already,
    so the number is on the safe side. It is at least the burn-in.
    """
    if effect == 0.0:
        return math.inf
    if sd == 0.0:
        return float(plan.burn_in)
    ratio, needed = abs(effect) / sd, NormalDist().inv_cdf(power)

    def missing(n: float) -> float:
        return float(critical_z(n, plan.rho2, plan.alpha)) + needed - ratio * math.sqrt(n)

    low, high = float(plan.burn_in), float(plan.burn_in)
    if missing(low) <= 0.0:
        return low
    while missing(high) > 0.0:
        high *= 2.0
    while high - low > 1e-9 * high:
        middle = (low + high) / 2.0
        low, high = (middle, high) if missing(middle) > 0.0 else (low, middle)
    return high
