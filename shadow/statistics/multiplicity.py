"""Many questions at once: which slices may be called different, and what a new version costs."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray


def benjamini_hochberg(p_values: ArrayLike, level: float) -> NDArray[np.bool_]:
    """Return which hypotheses one look rejects at this false discovery rate.

    The j smallest p-values, for the largest j with p_(j) <= j level / M. For independent or
    positively dependent p-values at a date fixed in advance.

    Raises:
        ValueError: a p-value is not between 0 and 1.
    Source: Benjamini and Hochberg, JRSS B 57 (1995).
    """
    p = np.asarray(p_values, dtype=np.float64)
    if not ((p >= 0.0) & (p <= 1.0)).all():
        raise ValueError("expected p-values between 0 and 1")
    return _largest(-p, -level * np.arange(1, len(p) + 1) / max(len(p), 1))


def e_benjamini_hochberg(log_e_values: ArrayLike, level: float) -> NDArray[np.bool_]:
    """Return which hypotheses are rejected at this false discovery rate, whenever one looks.

    The j largest e-values, for the largest j with e_(j) >= M / (j level). Valid under any
    dependence, and at any stopping time if the e-values are those of that time (not their maxima).

    Args:
        log_e_values: natural logarithms.
    Raises:
        ValueError: a value is nan.
    Source: Wang and Ramdas, JRSS B 84 (2022), arXiv:2009.02824, section 2.
    """
    logs = np.asarray(log_e_values, dtype=np.float64)
    if np.isnan(logs).any():
        raise ValueError("expected log e-values, found nan")
    j = np.arange(1, len(logs) + 1)
    return _largest(logs, math.log(max(len(logs), 1) / level) - np.log(j))


def _largest(scores: NDArray[np.float64], bounds: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Reject the j highest scores, for the largest j whose score reaches the bound."""
    order = np.argsort(-scores, kind="stable")
    passed = np.flatnonzero(scores[order] >= bounds)
    rejected = np.zeros(len(scores), dtype=np.bool_)
    if len(passed):
        rejected[order[: passed[-1] + 1]] = True
    return rejected


def version_level(alpha: float, version: int) -> float:
    """Return the level left for the j-th version tested: alpha 6 / (pi^2 j^2), in all alpha.

    Args:
        version: 1 for the first.
    """
    if version < 1:
        raise ValueError(f"expected a version from 1 on, found {version}")
    return alpha * 6.0 / (math.pi**2 * version**2)
