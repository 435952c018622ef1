"""Do the two policies decide alike, did their behaviour drift, does confidence mean anything?

A confusion matrix is float64[..., K, K] of counts, rows the first policy, columns the second.
Decisions in a row are alike, so that counts prove less than they seem to: intervals resample
batches, and tests take `tau`, how many decisions are worth one independent decision
(`rlv3.metrics.integrated_autocorrelation`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special

from shadow.statistics.inference import LEVEL, Estimate, bootstrap_means, interval

DRAWS = 999
BINS = 15
POINTS = 200  # at most so many points in a reliability curve
FEW = 5.0  # expected counts below this make the chi-square distribution doubtful
PERMUTATIONS = 9_999

Floats = NDArray[np.float64]


def observed_agreement(confusion: ArrayLike) -> Floats:
    """Return the share of equal decisions; 1 where there are none."""
    counts, n = _counts(confusion)
    return np.divide(_equal(counts), n, out=np.ones_like(n), where=n > 0.0)


def kappa(confusion: ArrayLike) -> Floats:
    """Return Cohen's (p_o - p_e) / (1 - p_e), p_e = sum p(k+) p(+k).

    1 where both policies only ever took one and the same class: nobody disagreed.

    Source: Cohen, Educational and Psychological Measurement 20 (1960).
    """
    counts, n = _counts(confusion)
    return _corrected(n * _equal(counts), _chance(counts), n * n)


def chance_agreement(confusion: ArrayLike) -> Floats:
    """Return kappa's p_e; 1 exactly where both policies only ever took one and the same class."""
    counts, n = _counts(confusion)
    return np.divide(_chance(counts), n * n, out=np.ones_like(n), where=n > 0.0)


def weighted_kappa(confusion: ArrayLike) -> Floats:
    """Return kappa with the weights 1 - (i - j)^2 / (K - 1)^2, for classes in order.

    Source: Cohen, Psychological Bulletin 70 (1968).
    """
    counts, n = _counts(confusion)
    at = np.arange(counts.shape[-1])
    full = max(len(at) - 1, 1) ** 2
    weights = full - (at[:, None] - at) ** 2
    chance = counts.sum(axis=-1)[..., :, None] * counts.sum(axis=-2)[..., None, :]
    agreed = (weights * counts).sum(axis=(-2, -1))
    return _corrected(n * agreed, (weights * chance).sum(axis=(-2, -1)), n * (full * n))


def ac1(confusion: ArrayLike) -> Floats:
    """Return Gwet's (p_o - p_e) / (1 - p_e), p_e = sum pi (1 - pi) / (K - 1).

    pi is the mean of both policies' shares of a class, K the number of classes offered. Unlike
    kappa it does not fall when one class prevails.

    Source: Gwet, British Journal of Mathematical and Statistical Psychology 61 (2008).
    """
    counts, n = _counts(confusion)
    both = counts.sum(axis=-1) + counts.sum(axis=-2)
    chance = (both * (2.0 * n[..., None] - both)).sum(axis=-1)
    scale = 4.0 * max(counts.shape[-1] - 1, 1) * n
    return _corrected(scale * _equal(counts), chance, scale * n)


COEFFICIENTS: Mapping[str, Callable[[Floats], Floats]] = {
    "agreement": observed_agreement,
    "kappa": kappa,
    "ac1": ac1,
}


def _counts(confusion: ArrayLike) -> tuple[Floats, Floats]:
    """Return matrices and their sums, which stay whole numbers: equal is exactly equal then."""
    counts = np.asarray(confusion, dtype=np.float64)
    if counts.ndim < 2 or counts.shape[-1] != counts.shape[-2]:
        raise ValueError(f"expected square confusion matrices, found shape {counts.shape}")
    return counts, counts.sum(axis=(-2, -1))


def _equal(counts: Floats) -> Floats:
    return np.trace(counts, axis1=-2, axis2=-1)


def _chance(counts: Floats) -> Floats:
    return (counts.sum(axis=-1) * counts.sum(axis=-2)).sum(axis=-1)


def _corrected(agreed: Floats, chance: Floats, most: Floats) -> Floats:
    """Return (agreed - chance) / (most - chance); 1 or 0 where chance is all there can be."""
    room = most - chance
    full = room <= 1e-12 * most
    return np.where(full, np.where(agreed >= most * (1.0 - 1e-12), 1.0, 0.0),
                    (agreed - chance) / np.where(full, 1.0, room))  # fmt: skip


def agreement(
    confusions: ArrayLike,
    *,
    rng: np.random.Generator,
    coefficients: Mapping[str, Callable[[Floats], Floats]] = COEFFICIENTS,
    length: float = 1.0,
    draws: int = DRAWS,
    level: float = LEVEL,
) -> dict[str, Estimate]:
    """Return coefficients of all batches together, with intervals from resampled batches.

    Args:
        confusions: float64[batches, K, K], a confusion matrix per batch.
        length: mean block length in batches.
    Raises:
        ValueError: the matrices are not square, or there is no batch.
    """
    table = np.asarray(confusions, dtype=np.float64)
    if table.ndim != 3 or table.shape[1] != table.shape[2] or not len(table):
        raise ValueError(f"expected confusion matrices [batches, K, K], found {table.shape}")
    means = bootstrap_means(table.reshape(len(table), -1), length, draws, rng)
    samples = means.reshape(draws, *table.shape[1:])
    pooled = table.sum(axis=0)
    return {
        name: interval(float(coefficient(pooled)), coefficient(samples), level=level)
        for name, coefficient in coefficients.items()
    }


class Drift(NamedTuple):
    """How far two distributions of counts are apart."""

    psi: float
    p: float
    """Chance of at least this PSI between two samples of one distribution."""
    js_bits: float
    """Jensen-Shannon divergence (not its root), 0 to 1 bit."""


def drift(
    before: ArrayLike, after: ArrayLike, *, tau_before: float = 1.0, tau_after: float = 1.0
) -> Drift:
    """Compare two distributions over K classes.

    PSI = sum (p - q) ln(p / q), with half a count added to every class that occurs at all. If
    nothing changed, PSI / (1/n + 1/m) has a chi-square distribution with K - 1 degrees of
    freedom; n and m are the counts divided by `tau`.

    Args:
        before: counts[K]; `after` too.
    Raises:
        ValueError: the shapes differ, or one of them is empty.
    Source: Yurdakul, Statistical Properties of Population Stability Index (2018); Lin, IEEE
        Transactions on Information Theory 37 (1991).
    """
    a, b = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"expected two rows of counts, found shapes {a.shape} and {b.shape}")
    if a.sum() <= 0.0 or b.sum() <= 0.0:
        raise ValueError("expected at least one decision on either side, found none")
    index = psi(a, b)
    dof = int((a + b > 0.0).sum()) - 1
    spread = tau_before / a.sum() + tau_after / b.sum()
    p = float(special.chdtrc(dof, index / spread)) if dof > 0 else 1.0
    return Drift(index, p, js_divergence(a, b))


def psi(before: ArrayLike, after: ArrayLike) -> float:
    """Return the population stability index of two rows of counts (see `drift`)."""
    a, b = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    seen = a + b > 0.0
    p, q = a[seen] + 0.5, b[seen] + 0.5
    p, q = p / p.sum(), q / q.sum()
    return float(((p - q) * np.log(p / q)).sum())


def js_divergence(before: ArrayLike, after: ArrayLike) -> float:
    """Return the Jensen-Shannon divergence of two rows of counts in bits."""
    a, b = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    p, q = a / a.sum(), b / b.sum()
    middle = (p + q) / 2.0
    halves = [np.where(x > 0.0, x * np.log2(np.where(x > 0.0, x, 1.0) / np.where(
        middle > 0.0, middle, 1.0)), 0.0).sum() for x in (p, q)]  # fmt: skip
    return max(0.0, float(halves[0] + halves[1]) / 2.0)


class Calibration(NamedTuple):
    """Does a score say how often the outcome happens?"""

    n: int
    ece: float
    """Root of the debiased mean squared gap between score and frequency (0 if negative)."""
    ece_raw: float
    """Mean absolute gap, which is above 0 for a perfect score too."""
    brier: float


def calibration(scores: ArrayLike, outcomes: ArrayLike, *, bins: int = BINS) -> Calibration:
    """Measure the calibration of scores in bins of equal mass.

    Equal scores share a bin. The squared gap of a bin is debiased by subtracting the variance of
    its frequency, f (1 - f) / (m - 1); bins of one sample are left out of that estimate.

    Args:
        scores: float64[n] in [0, 1]; `outcomes` 0 or 1. Samples must not overlap in time.
    Raises:
        ValueError: shapes differ, or values are out of range, or there are none.
    Source: Ferro and Fricker, QJRMS 138 (2012); Kumar, Liang and Ma, NeurIPS 2019; Roelofs et
        al., AISTATS 2022; Brier, Monthly Weather Review 78 (1950).
    """
    s, y = _scored(scores, outcomes)
    mass, score, frequency = _binned(s, y, bins)
    return Calibration(
        len(s),
        float(_debiased(mass, score, frequency)),
        float((mass * np.abs(score - frequency)).sum()) / len(s),
        float(((s - y) ** 2).mean()),
    )


def _debiased(mass: Floats, score: Floats, frequency: Floats) -> Floats:
    gap = score - frequency
    many = mass > 1
    bias = np.where(many, frequency * (1.0 - frequency) / np.maximum(mass - 1, 1), gap**2)
    total = np.maximum((mass * many).sum(axis=-1), 1.0)
    return np.sqrt(np.maximum((mass * (gap**2 - bias)).sum(axis=-1) / total, 0.0))


def calibration_intervals(
    scores: ArrayLike,
    outcomes: ArrayLike,
    *,
    rng: np.random.Generator,
    bins: int = BINS,
    draws: int = DRAWS,
    level: float = LEVEL,
) -> dict[str, Estimate]:
    """Return the outcomes' `rate`, `ece` and `brier` as `calibration` does, with intervals.

    Bins are resampled: how many samples each has, and how many of them come true. Rate and Brier
    score are means of independent samples, their intervals are the normal ones.
    """
    s, y = _scored(scores, outcomes)
    mass, score, frequency = _binned(s, y, bins)
    masses = rng.multinomial(len(s), mass / len(s), size=draws)
    hits = rng.binomial(masses, frequency)
    again = _debiased(masses.astype(np.float64), score, hits / np.maximum(masses, 1))
    found = {"ece": interval(float(_debiased(mass, score, frequency)), again, level=level)}
    z = float(-special.ndtri((1.0 - level) / 2.0))
    for name, values in (("rate", y), ("brier", (s - y) ** 2)):
        value, half = float(values.mean()), z * float(values.std()) / len(s) ** 0.5
        found[name] = Estimate(value, max(0.0, value - half), min(1.0, value + half))
    return found


class Reliability(NamedTuple):
    """An isotonic reliability curve; arrays of one length, in order of the score."""

    score: Floats
    frequency: Floats
    """Isotonic estimate of how often the outcome happens at that score."""
    low: Floats
    """95 % of the curves of a calibrated score lie between these, at each point."""
    high: Floats
    n: Floats


def reliability(
    scores: ArrayLike,
    outcomes: ArrayLike,
    *,
    rng: np.random.Generator,
    draws: int = DRAWS,
    level: float = LEVEL,
) -> Reliability:
    """Return the CORP reliability curve and its consistency band.

    Isotonic regression of the outcomes on the scores. The band shows where the curve would lie if
    every score were the true probability: outcomes are drawn from the scores and fitted again.
    More than 200 different scores are grouped into 200 points of equal mass first.

    Args:
        scores: float64[n] in [0, 1]; `outcomes` 0 or 1. Samples must not overlap in time.
    Source: Dimitriadis, Gneiting and Jordan, PNAS 118 (2021).
    """
    s, y = _scored(scores, outcomes)
    bins = len(s) if len(np.unique(s)) <= POINTS else POINTS
    mass, score, frequency = _binned(s, y, bins)
    drawn = rng.binomial(mass.astype(np.int64), score.clip(0.0, 1.0), size=(draws, len(mass)))
    curves = np.sort([_isotonic(hits / mass, mass) for hits in drawn], axis=0)
    k = max(0, int((1.0 - level) / 2.0 * (draws + 1) + 1e-9) - 1)
    return Reliability(score, _isotonic(frequency, mass), curves[k], curves[draws - 1 - k], mass)


def _isotonic(values: Floats, weights: Floats) -> Floats:
    return np.asarray(optimize.isotonic_regression(values, weights=weights).x)


def _scored(scores: ArrayLike, outcomes: ArrayLike) -> tuple[Floats, Floats]:
    s, y = np.asarray(scores, dtype=np.float64), np.asarray(outcomes, dtype=np.float64)
    if s.shape != y.shape or s.ndim != 1 or not len(s):
        raise ValueError(f"expected a score per outcome, found shapes {s.shape} and {y.shape}")
    if not ((s >= 0.0) & (s <= 1.0)).all():
        raise ValueError("expected scores between 0 and 1")
    if not ((y == 0.0) | (y == 1.0)).all():
        raise ValueError("expected outcomes that are 0 or 1")
    return s, y


def _binned(s: Floats, y: Floats, bins: int) -> tuple[Floats, Floats, Floats]:
    """Return samples, mean score and mean outcome of bins of equal mass; equal scores share one."""
    rank = np.searchsorted(np.sort(s), s, side="left")
    bin_of = rank * min(bins, len(s)) // len(s)
    mass = np.bincount(bin_of).astype(np.float64)
    used = mass > 0.0
    score = np.bincount(bin_of, weights=s)[used] / mass[used]
    return mass[used], score, np.bincount(bin_of, weights=y)[used] / mass[used]


def asymmetry(
    unmatched: ArrayLike, total: ArrayLike, *, rng: np.random.Generator, tau: float = 1.0
) -> float:
    """Return the p-value of "the same share of decisions is unmatched in every stratum".

    Pearson's chi-square of the 2 x S table, divided by `tau`. Where an expected count is below 5
    and decisions are independent (tau 1), the chance is counted over random tables with the same
    margins instead.

    Args:
        unmatched: counts[S], of `total` counts[S]: strata are symbols, regimes or volatility
            terciles.
    Raises:
        ValueError: shapes differ, or there are more unmatched than decisions.
    """
    missing, n = np.asarray(unmatched, dtype=np.float64), np.asarray(total, dtype=np.float64)
    if missing.shape != n.shape or missing.ndim != 1 or (missing > n).any() or (missing < 0).any():
        raise ValueError("expected counts of unmatched decisions within the totals of each stratum")
    missing, n = missing[n > 0.0], n[n > 0.0]
    rate = missing.sum() / max(n.sum(), 1.0)
    if len(n) < 2 or rate in (0.0, 1.0):
        return 1.0
    statistic = _pearson(missing, n, rate)
    if min(rate, 1.0 - rate) * n.min() >= FEW or tau != 1.0:
        return float(special.chdtrc(len(n) - 1, statistic / tau))
    random = rng.multivariate_hypergeometric(
        n.astype(np.int64), int(missing.sum()), size=PERMUTATIONS
    )
    as_extreme = _pearson(random.astype(np.float64), n, rate) >= statistic * (1.0 - 1e-12)
    return (1.0 + float(as_extreme.sum())) / (PERMUTATIONS + 1.0)


def _pearson(missing: Floats, n: Floats, rate: float) -> Floats:
    return ((missing - n * rate) ** 2 / (n * rate * (1.0 - rate))).sum(axis=-1)
