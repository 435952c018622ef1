"""Procedures by hand and against scipy; levels that add up."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from shadow.statistics.multiplicity import benjamini_hochberg, e_benjamini_hochberg, version_level


def test_benjamini_hochberg_by_hand() -> None:
    # bounds 0.02, 0.04, 0.06, 0.08, 0.10: the third passes, so the second does too
    p = [0.06, 0.5, 0.01, 0.05, 0.9]
    assert benjamini_hochberg(p, 0.10).tolist() == [True, False, True, True, False]


def test_benjamini_hochberg_is_scipys_and_statsmodels() -> None:
    rng = np.random.default_rng(0)
    for size in (1, 2, 30, 200):
        p = rng.random(size) ** 3
        ours = benjamini_hochberg(p, 0.10)
        assert (ours == (stats.false_discovery_control(p) <= 0.10)).all()
        assert (ours == multipletests(p, 0.10, method="fdr_bh")[0]).all()


def test_e_benjamini_hochberg_by_hand() -> None:
    # M / (j q) = 40, 20, 13.3, 10: the two largest e-values reach 40 and 20, the third not 13.3
    logs = np.log([13.0, 1.0, 21.0, 45.0])
    assert e_benjamini_hochberg(logs, 0.10).tolist() == [False, False, True, True]
    assert e_benjamini_hochberg(np.log([14.0, 14.0, 14.0, 1.0]), 0.10).tolist() == [
        True, True, True, False,
    ]  # fmt: skip


def test_one_e_value_needs_one_over_the_level() -> None:
    assert e_benjamini_hochberg([math.log(10.1)], 0.10).tolist() == [True]
    assert e_benjamini_hochberg([math.log(9.9)], 0.10).tolist() == [False]
    assert e_benjamini_hochberg([1e6, -1e6], 0.10).tolist() == [True, False]


def test_no_hypotheses_are_no_rejections() -> None:
    assert benjamini_hochberg([], 0.10).tolist() == []
    assert e_benjamini_hochberg([], 0.10).tolist() == []


def test_values_that_are_no_evidence_are_rejected() -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        benjamini_hochberg([0.1, math.nan], 0.10)
    with pytest.raises(ValueError, match="nan"):
        e_benjamini_hochberg([math.nan], 0.10)


def test_version_levels_add_up_to_alpha() -> None:
    assert version_level(0.05, 1) == pytest.approx(0.05 * 0.6079271)
    assert sum(version_level(0.05, j) for j in range(1, 20_000)) == pytest.approx(0.05, abs=2e-6)
    with pytest.raises(ValueError, match="from 1 on"):
        version_level(0.05, 0)
