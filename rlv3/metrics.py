"""What does a return series prove? Sharpe and Sortino with block-bootstrap intervals, and more.

Conventions
  * `returns` are simple returns per step, float64[T]. Ratios are annualised with the number of
    steps in a year of 365 days; the deflated Sharpe ratio takes and gives ratios per step.
  * A series without variation has no Sharpe ratio: 0, so that a flat account can be compared.
  * Intervals are 95 %, percentile method. The circular block bootstrap keeps the dependence of
    neighbouring steps; its block length is Politis and White's (2004), as corrected by Patton,
    Politis and White (2009).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

YEAR_SECONDS = 365 * 24 * 3600
LEVEL = 0.95
DRAWS = 2_000
EULER_GAMMA = 0.5772156649015329
_CHUNK = 2_000_000  # block sums held at a time

Floats = NDArray[np.float64]


class Interval(NamedTuple):
    """A 95 % interval."""

    low: float
    high: float


def steps_per_year(step_seconds: int) -> float:
    """Return how many steps a year of 365 days has."""
    return YEAR_SECONDS / step_seconds


def sharpe(returns: ArrayLike, per_year: float = 1.0) -> float:
    """Return mean / standard deviation (ddof 0) of the returns, annualised."""
    values = np.asarray(returns, dtype=np.float64)
    return float(sharpe_from_moments(values.mean(), (values**2).mean()) * math.sqrt(per_year))


def sortino(returns: ArrayLike, per_year: float = 1.0) -> float:
    """Return mean / root mean square of the negative returns, annualised."""
    values = np.asarray(returns, dtype=np.float64)
    down = (np.minimum(values, 0.0) ** 2).mean()
    return float(sortino_from_moments(values.mean(), down) * math.sqrt(per_year))


def sharpe_from_moments(mean: ArrayLike, square: ArrayLike) -> Floats:
    """Return the Sharpe ratio per step from the means of the returns and of their squares."""
    mean = np.asarray(mean)
    square = np.asarray(square)
    variance = square - mean**2
    known = variance > 1e-12 * square  # what is left of a constant after rounding is no variance
    return np.where(known, mean / np.sqrt(np.where(known, variance, 1.0)), 0.0)


def sortino_from_moments(mean: ArrayLike, down: ArrayLike) -> Floats:
    """Return the Sortino ratio per step from the means of returns and of squared losses."""
    mean = np.asarray(mean)
    down = np.asarray(down)
    return np.where(down > 0.0, mean / np.sqrt(np.where(down > 0.0, down, 1.0)), 0.0)


def max_drawdown(equity: ArrayLike) -> float:
    """Return the largest fall of equity from its peak, as a fraction of the peak."""
    values = np.asarray(equity, dtype=np.float64)
    return float((1.0 - values / np.maximum.accumulate(values)).max())


class _Dependence(NamedTuple):
    """Flat-top estimates for a series: variance, spectrum at 0, and its slope G."""

    variance: float
    spectrum: float
    slope: float


def _dependence(values: Floats) -> _Dependence | None:
    """Return sum w(k/m) R(k) and G = sum w(k/m) |k| R(k); None where nothing can be estimated.

    w is a flat-top window, m twice the lag from which autocorrelations are insignificant.
    """
    n = len(values)
    centred = values - values.mean()
    variance = float(centred @ centred) / n
    if n < 8 or variance == 0.0:
        return None
    run = max(5, int(math.sqrt(math.log10(n))))
    lags = min(n - 1, math.ceil(math.sqrt(n)) + run)
    covariance = np.array([centred[k:] @ centred[: n - k] / n for k in range(lags + 1)])
    small = np.abs(covariance[1:] / variance) < 2.0 * math.sqrt(math.log10(n) / n)
    last = next((k for k in range(lags - run + 1) if small[k : k + run].all()), lags - run)
    m = min(2 * max(last, 1), lags)
    k = np.arange(1, m + 1)
    window = np.clip(2.0 * (1.0 - k / m), 0.0, 1.0)  # 1 up to m/2, then down to 0
    slope = 2.0 * float((window * k * covariance[1 : m + 1]).sum())
    spectrum = variance + 2.0 * float((window * covariance[1 : m + 1]).sum())
    return _Dependence(variance, spectrum, slope)


def integrated_autocorrelation(returns: ArrayLike) -> float:
    """Return tau = 1 + 2 sum rho(k): one independent return is worth so many of these.

    At least 1 / T, should the estimate be negative; 1 where nothing can be estimated. The lags
    are weighted as for the block length.
    """
    values = np.asarray(returns, dtype=np.float64)
    found = _dependence(values)
    if found is None:
        return 1.0
    return max(found.spectrum / found.variance, 1.0 / len(values))


def block_length(returns: ArrayLike) -> int:
    """Return the block length of a circular block bootstrap of the mean.

    b = (2 G^2 / D)^(1/3) T^(1/3), G = sum w(k/m) |k| R(k), D = 4/3 (sum w(k/m) R(k))^2, with a
    flat-top window w and m twice the lag from which autocorrelations are insignificant.

    Source: Politis and White, Econometric Reviews 23 (2004); Patton et al., 28 (2009).
    """
    return math.ceil(_block_length(returns, 4.0 / 3.0))


def stationary_block_length(returns: ArrayLike) -> float:
    """Return the mean block length of a stationary bootstrap of the mean: D = 2 (...)^2.

    Source: as `block_length`.
    """
    return _block_length(returns, 2.0)


def _block_length(returns: ArrayLike, factor: float) -> float:
    values = np.asarray(returns, dtype=np.float64)
    n = len(values)
    found = _dependence(values)
    if found is None or found.spectrum <= 0.0:
        return 1.0
    d = factor * found.spectrum**2
    length = (2.0 * found.slope**2 / d) ** (1 / 3) * n ** (1 / 3)
    return float(min(max(length, 1.0), math.ceil(min(3.0 * math.sqrt(n), n / 3.0))))


def _block_means(columns: Floats, length: int, draws: int, rng: np.random.Generator) -> Floats:
    """Return float64[draws, C], means of bootstrap samples of the rows of float64[T, C].

    A block's sum is a difference of cumulative sums, so a sample costs T / length additions.
    """
    n = len(columns)
    blocks = math.ceil(n / length)
    rest = n - (blocks - 1) * length  # the last block is cut, so that samples have T rows
    wrapped = np.concatenate([columns, columns[:length]])
    sums = np.concatenate([np.zeros((1, columns.shape[1])), wrapped.cumsum(axis=0)])
    means = np.empty((draws, columns.shape[1]))
    at_once = max(1, _CHUNK // blocks)
    for first in range(0, draws, at_once):
        size = min(at_once, draws - first)
        starts = rng.integers(n, size=(size, blocks))
        full = (sums[starts[:, :-1] + length] - sums[starts[:, :-1]]).sum(axis=1)
        last = sums[starts[:, -1] + rest] - sums[starts[:, -1]]
        means[first : first + size] = (full + last) / n
    return means


def ratio_intervals(
    returns: ArrayLike, per_year: float, *, draws: int = DRAWS, seed: int = 0
) -> tuple[Interval, Interval]:
    """Return the 95 % block-bootstrap intervals of the annualised Sharpe and Sortino ratios."""
    values = np.asarray(returns, dtype=np.float64)
    columns = np.stack([values, values**2, np.minimum(values, 0.0) ** 2], axis=1)
    rng = np.random.default_rng(seed)
    length = max(block_length(values), math.ceil(len(values) ** (1 / 3)))  # squares persist longer
    means = _block_means(columns, length, draws, rng)
    scale = math.sqrt(per_year)
    return (
        _percentiles(sharpe_from_moments(means[:, 0], means[:, 1]) * scale),
        _percentiles(sortino_from_moments(means[:, 0], means[:, 2]) * scale),
    )


def _percentiles(draws: Floats) -> Interval:
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high))


def interquartile_mean(scores: ArrayLike) -> float:
    """Return the mean without the lowest and the highest quarter (both rounded down)."""
    values = np.sort(np.asarray(scores, dtype=np.float64), axis=-1)
    cut = values.shape[-1] // 4
    return float(values[..., cut : values.shape[-1] - cut].mean(axis=-1))


def interquartile_interval(
    scores: Sequence[float], *, draws: int = DRAWS, seed: int = 0
) -> Interval:
    """Return the 95 % bootstrap interval of the interquartile mean; runs are resampled.

    Source: Agarwal et al., NeurIPS 2021 (arXiv:2108.13264).
    """
    values = np.asarray(scores, dtype=np.float64)
    rng = np.random.default_rng(seed)
    picks = np.sort(values[rng.integers(len(values), size=(draws, len(values)))], axis=1)
    cut = len(values) // 4
    return _percentiles(picks[:, cut : len(values) - cut].mean(axis=1))


def probabilistic_sharpe(returns: ArrayLike, benchmark: float = 0.0) -> float:
    """Return the probability that the Sharpe ratio per step exceeds a benchmark.

    Raises:
        ValueError: fewer than 3 returns.
    """
    values = np.asarray(returns, dtype=np.float64)
    if len(values) < 3:
        raise ValueError(f"expected at least 3 returns, found {len(values)}")
    centred = values - values.mean()
    spread = float(np.sqrt((centred**2).mean()))
    if spread == 0.0:
        return 0.0 if benchmark > 0.0 else 0.5
    skew = float((centred**3).mean()) / spread**3
    kurtosis = float((centred**4).mean()) / spread**4
    return psr(sharpe(values), benchmark, len(values), skew, kurtosis)


def psr(ratio: float, benchmark: float, n: int, skew: float, kurtosis: float) -> float:
    """Return Phi((SR - SR*) sqrt(n - 1) / sqrt(1 - skew SR + (kurtosis - 1)/4 SR^2)).

    Args:
        kurtosis: raw, 3 for a normal distribution.
    Source: Bailey and Lopez de Prado, Journal of Risk 15 (2012).
    """
    variance = 1.0 - skew * ratio + (kurtosis - 1.0) / 4.0 * ratio**2
    if variance <= 0.0:  # no sample has such moments at a ratio worth testing
        return 0.0 if ratio < benchmark else 1.0
    return NormalDist().cdf((ratio - benchmark) * math.sqrt(n - 1) / math.sqrt(variance))


def luckiest_sharpe(variance: float, trials: int) -> float:
    """Return the Sharpe ratio that the best of so many worthless trials is expected to show.

    SR* = sqrt(V) ((1 - g) Phi^-1(1 - 1/N) + g Phi^-1(1 - 1/(N e))), g Euler's constant; 0 for one
    trial, which nobody chose.

    Args:
        variance: of the trials' Sharpe ratios.
    """
    if trials < 2:
        return 0.0
    normal = NormalDist()
    return math.sqrt(variance) * (
        (1.0 - EULER_GAMMA) * normal.inv_cdf(1.0 - 1.0 / trials)
        + EULER_GAMMA * normal.inv_cdf(1.0 - 1.0 / (trials * math.e))
    )


def deflated_sharpe(returns: ArrayLike, trials: int, variance: float) -> float:
    """Return the probability that the Sharpe ratio is better than luck, after so many trials.

    Args:
        trials: configurations that were tried, this one included.
        variance: of the Sharpe ratios per step over the trials.
    Source: Bailey and Lopez de Prado, Journal of Portfolio Management 40 (2014).
    """
    return probabilistic_sharpe(returns, luckiest_sharpe(variance, trials))
