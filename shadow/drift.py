"""Do live features still look like those that the policy was trained on?

A window holds the observations of the newest closed bars. Per feature, the shares of its values
between the training quantiles are compared with what training had there, by the population
stability index (Siddiqi 2006, Credit Risk Scorecards, 6):

    psi = sum over bins of (p - q) ln(p / q)

Hours are short and features remember (an RSI spans 14 bars), so p is drawn to q by `PRIOR` bars: an
ordinary hour of one symbol stays below `DRIFTED`, a changed unit or a feature that stands still for
all symbols does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlv3.features import FEATURES, N_FEATURES, US, Normaliser
from rlv3.policy import QUANTILE_LEVELS

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Quantiles that cut the bins, and that are shown."""
SHARES = np.diff((0.0, *LEVELS, 1.0))
PRIOR = 30.0
DRIFTED = 1.5
"""A psi above this is no ordinary hour."""
HOUR_US = 3_600 * US
MOST = 2_048
"""Bars kept: an hour of 34 symbols, the newest minutes of more."""
_AT = [QUANTILE_LEVELS.index(level) for level in LEVELS]


class Drift(NamedTuple):
    """One feature, live against training."""

    psi: float
    live: tuple[float, ...]
    """Raw values at `LEVELS`."""
    training: tuple[float, ...]


class Window:
    """The newest closed bars of all symbols, at most an hour and `MOST` of them.

    Args:
        normaliser: turns observations back into raw values.
        quantiles: the artifact's training quantiles by feature name; where it has none, nothing
            is compared.
    """

    def __init__(self, normaliser: Normaliser, quantiles: Mapping[str, Sequence[float]]) -> None:
        self._normaliser = normaliser
        self._edges = {
            i: np.array([quantiles[feature.name][at] for at in _AT])
            for i, feature in enumerate(FEATURES)
            if feature.source in ("bar", "quote") and feature.name in quantiles
        }
        self._values = np.zeros((MOST, N_FEATURES))
        self._missing = np.zeros(MOST, dtype=np.int64)
        self._end_us = np.zeros(MOST, dtype=np.int64)
        self.added = 0

    def add(self, end_us: int, obs: Sequence[float], missing: int) -> None:
        """Take in the observation float32[64] of a closed bar and its missing-mask."""
        slot = self.added % MOST
        self._values[slot] = obs[:N_FEATURES]
        self._missing[slot] = missing
        self._end_us[slot] = end_us
        self.added += 1

    def missing(self) -> dict[str, float]:
        """Return feature name -> share of the bars where it was missing."""
        masks = self._missing[self._newest()]
        if len(masks) == 0:
            return {}
        return {f.name: float(((masks >> i) & 1).mean()) for i, f in enumerate(FEATURES)}

    def compare(self) -> dict[str, Drift]:
        """Return feature name -> drift, for features that training knew and that came lately."""
        newest = self._newest()
        values, masks = self._values[newest], self._missing[newest]
        found = {}
        for i, edges in self._edges.items():
            known = values[(masks >> i) & 1 == 0, i]
            if len(known) == 0:
                continue
            raw = known * self._normaliser.scale[i] + self._normaliser.mean[i]
            live = tuple(np.quantile(raw, LEVELS).tolist())
            found[FEATURES[i].name] = Drift(_psi(raw, edges), live, tuple(edges.tolist()))
        return found

    def _newest(self) -> NDArray[np.intp]:
        n = min(self.added, MOST)
        ends = self._end_us[:n]
        return np.flatnonzero(ends > (ends.max() - HOUR_US)) if n else np.arange(0)


def _psi(values: NDArray[np.float64], edges: NDArray[np.float64]) -> float:
    """Return the population stability index of values against bins that training cut."""
    counts = np.bincount(np.searchsorted(edges, values), minlength=len(SHARES))
    shares = (counts + PRIOR * SHARES) / (counts.sum() + PRIOR)
    return float(((shares - SHARES) * np.log(shares / SHARES)).sum())
