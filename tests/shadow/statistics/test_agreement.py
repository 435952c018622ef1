"""Coefficients by hand and against statsmodels; nulls that hold; scores that mean what they say."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import ArrayLike
from scipy import stats
from statsmodels.stats.inter_rater import cohens_kappa

from shadow.statistics.agreement import (
    Floats,
    ac1,
    agreement,
    asymmetry,
    calibration,
    drift,
    js_divergence,
    kappa,
    observed_agreement,
    psi,
    reliability,
    weighted_kappa,
)


def test_coefficients_by_hand() -> None:
    table = [[20, 5], [10, 15]]
    # p_o = 35/50 = 0.7; p_e = 0.5 * 0.6 + 0.5 * 0.4 = 0.5
    assert observed_agreement(table) == pytest.approx(0.7)
    assert kappa(table) == pytest.approx(0.4)
    # pi = 0.55 and 0.45; p_e = 2 * 0.55 * 0.45 = 0.495
    assert ac1(table) == pytest.approx((0.7 - 0.495) / 0.505)


def test_prevalence_fools_kappa_and_not_ac1() -> None:
    # 118 of 125 equal, 0.944; p_e = 0.984 * 0.96 + 0.016 * 0.04 = 0.94528
    table = [[118, 5], [2, 0]]
    assert kappa(table) == pytest.approx((0.944 - 0.94528) / 0.05472)
    # pi = 0.972; p_e = 2 * 0.972 * 0.028 = 0.054432
    assert ac1(table) == pytest.approx((0.944 - 0.054432) / 0.945568)


def test_kappas_are_statsmodels() -> None:
    table = np.random.default_rng(0).integers(0, 40, size=(5, 5))
    assert kappa(table) == pytest.approx(cohens_kappa(table).kappa)
    assert weighted_kappa(table) == pytest.approx(cohens_kappa(table, wt="quadratic").kappa)


def test_equal_policies_agree_fully_even_in_one_class() -> None:
    one_class = np.zeros((5, 5))
    one_class[2, 2] = 1_000
    for table in (one_class, np.diag([5.0, 0, 3, 1, 9]), np.zeros((5, 5))):
        assert [float(f(table)) for f in (kappa, weighted_kappa, ac1)] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("coefficient", [observed_agreement, kappa, weighted_kappa, ac1])
def test_equal_decisions_agree_exactly(coefficient: Callable[[ArrayLike], Floats]) -> None:
    rng = np.random.default_rng(1)
    counts = rng.integers(0, 100_000, (500, 5))  # shares of these do not add up to 1 in floats
    assert set(coefficient(counts[:, :, None] * np.eye(5)).tolist()) == {1.0}


def test_swapped_policies_agree_as_much() -> None:
    table = np.random.default_rng(1).integers(0, 40, size=(5, 5))
    for coefficient in (kappa, weighted_kappa, ac1):
        assert coefficient(table) == coefficient(table.T)


def test_agreement_intervals_cover_the_truth_and_widen_with_runs_of_decisions() -> None:
    rng = np.random.default_rng(2)
    shares = np.array([[0.4, 0.1], [0.2, 0.3]])
    truth = (0.7 - (0.5 * 0.6 + 0.5 * 0.4)) / 0.5
    hits = 0
    for _ in range(200):
        tables = rng.multinomial(60, shares.ravel(), size=100).reshape(100, 2, 2)
        found = agreement(tables, rng=rng, draws=199)["kappa"]
        hits += found.low <= truth <= found.high
    assert 0.89 <= hits / 200 <= 0.99
    runs = np.repeat(rng.multinomial(60, shares.ravel(), size=10).reshape(10, 2, 2), 10, axis=0)
    short = agreement(runs, rng=rng, draws=999)["ac1"]
    long = agreement(runs, rng=rng, draws=999, length=10.0)["ac1"]
    assert long.high - long.low > 1.5 * (short.high - short.low)
    assert short.value == float(ac1(runs.sum(axis=0)))


def test_wrong_shapes_are_rejected() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="square"):
        kappa([[1, 2, 3], [4, 5, 6]])
    with pytest.raises(ValueError, match=r"\[batches, K, K\]"):
        agreement(np.zeros((0, 2, 2)), rng=rng)
    with pytest.raises(ValueError, match="two rows"):
        drift([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="at least one decision"):
        drift([0, 0], [1, 2])
    with pytest.raises(ValueError, match="within the totals"):
        asymmetry([3], [2], rng=rng)
    with pytest.raises(ValueError, match="between 0 and 1"):
        calibration([1.2], [1])
    with pytest.raises(ValueError, match="0 or 1"):
        calibration([0.2], [0.5])


def test_psi_by_hand() -> None:
    # half a count each: 39.5 + 0.5 and 9.5 + 0.5 of 50; 19.5 + 0.5 and 29.5 + 0.5 of 50
    # (0.8 - 0.4) ln(0.8 / 0.4) + (0.2 - 0.6) ln(0.2 / 0.6) = 0.4 ln 2 + 0.4 ln 3
    assert psi([39.5, 9.5], [19.5, 29.5]) == pytest.approx(0.4 * math.log(6))
    assert psi([3, 0, 4], [3, 0, 4]) == 0.0
    assert psi([3, 4], [5, 9]) == pytest.approx(psi([5, 9], [3, 4]), rel=1e-12)
    # a class that neither side takes says nothing
    assert psi([3, 0, 4], [5, 0, 9]) == psi([3, 4], [5, 9])


@pytest.mark.parametrize("tau", [1, 5])
def test_psi_null_rejects_as_often_as_it_says(tau: int) -> None:
    rng = np.random.default_rng(3)
    shares = [0.5, 0.3, 0.15, 0.05]
    before = tau * rng.multinomial(400, shares, size=1_000)  # each draw repeated tau times
    after = tau * rng.multinomial(250, shares, size=1_000)
    found = [drift(a, b, tau_before=tau, tau_after=tau).p
             for a, b in zip(before, after, strict=True)]  # fmt: skip
    assert 0.03 <= np.mean(np.array(found) < 0.05) <= 0.07


def test_drift_of_one_class_cannot_be_told() -> None:
    assert drift([10, 0], [20, 0]).p == 1.0


def test_js_divergence_in_bits() -> None:
    assert js_divergence([1, 0], [0, 7]) == pytest.approx(1.0)
    assert js_divergence([2, 3], [4, 6]) == 0.0
    # H(3/4, 1/4) - (H(1, 0) + H(1/2, 1/2)) / 2 = 0.811278 - 0.5
    assert js_divergence([1, 0], [1, 1]) == pytest.approx(0.311278, abs=1e-6)


def test_calibration_by_hand() -> None:
    found = calibration([0.2, 0.2, 0.8, 0.8], [0, 1, 1, 1], bins=2)
    # gaps 0.2 - 0.5 and 0.8 - 1; squared scores 0.04, 0.64, 0.04, 0.04
    assert found.ece_raw == pytest.approx(0.25)
    assert found.brier == pytest.approx(0.19)
    # squared gaps 0.09 - 0.25 and 0.04 - 0: negative together
    assert found.ece == 0.0


def test_perfect_score_has_no_debiased_error() -> None:
    rng = np.random.default_rng(4)
    s = rng.random(20_000)
    found = [calibration(s, rng.random(20_000) < s) for _ in range(20)]
    raw = np.mean([f.ece_raw for f in found])
    squared = np.mean([f.ece**2 for f in found])
    assert raw > 0.006
    assert squared < 0.5 * raw**2


def test_score_that_is_too_high_by_a_tenth_is_found_out() -> None:
    rng = np.random.default_rng(5)
    truth = rng.uniform(0.2, 0.8, size=20_000)
    found = calibration(truth + 0.1, rng.random(20_000) < truth)
    assert found.ece == pytest.approx(0.1, abs=0.012)


def test_equal_scores_share_a_bin_in_whatever_order_they_come() -> None:
    rng = np.random.default_rng(6)
    s = rng.choice([0.1, 0.4, 0.9], size=300)
    y = (rng.random(300) < s).astype(float)
    order = rng.permutation(300)
    one, two = calibration(s, y, bins=10), calibration(s[order], y[order], bins=10)
    assert one.ece == pytest.approx(two.ece, rel=1e-12)
    assert one.ece_raw == pytest.approx(two.ece_raw, rel=1e-12)


def test_reliability_pools_adjacent_violators() -> None:
    found = reliability([0.1, 0.2, 0.3], [1, 0, 1], rng=np.random.default_rng(7), draws=99)
    assert found.score.tolist() == [0.1, 0.2, 0.3]
    assert found.frequency.tolist() == [0.5, 0.5, 1.0]
    assert found.n.tolist() == [1, 1, 1]


def test_reliability_band_holds_a_calibrated_score_and_not_a_false_one() -> None:
    rng = np.random.default_rng(8)
    s = rng.uniform(0.2, 0.8, size=5_000)
    good = reliability(s, rng.random(5_000) < s, rng=rng, draws=199)
    assert len(good.score) == 200
    inside = (good.low <= good.frequency) & (good.frequency <= good.high)
    assert inside.mean() > 0.85
    bad = reliability(s, rng.random(5_000) < 0.5, rng=rng, draws=199)
    assert ((bad.low <= bad.frequency) & (bad.frequency <= bad.high)).mean() < 0.5
    assert (np.diff(bad.frequency) >= 0.0).all()


def test_asymmetry_is_pearsons() -> None:
    unmatched, total = np.array([30, 55, 41]), np.array([1_000, 1_100, 1_050])
    expected = stats.chi2_contingency(np.stack([unmatched, total - unmatched]), correction=False)
    rng = np.random.default_rng(9)
    assert asymmetry(unmatched, total, rng=rng) == pytest.approx(expected.pvalue)
    halved = stats.chi2.sf(expected.statistic / 2.0, 2)
    assert asymmetry(unmatched, total, rng=rng, tau=2.0) == pytest.approx(halved)


def test_asymmetry_of_few_unmatched_is_counted_out() -> None:
    # 3 unmatched, all among the 10 of 30: C(10, 3) / C(30, 3) = 120 / 4060; as extreme on the
    # other side is only 3 in the 20, where chi-square is smaller
    p = asymmetry([3, 0], [10, 20], rng=np.random.default_rng(10))
    assert p == pytest.approx(120 / 4060, abs=0.006)


def test_asymmetry_of_nothing_is_none() -> None:
    rng = np.random.default_rng(11)
    assert asymmetry([0, 0], [10, 20], rng=rng) == 1.0
    assert asymmetry([10, 20], [10, 20], rng=rng) == 1.0
    assert asymmetry([3, 0], [10, 0], rng=rng) == 1.0
    assert asymmetry([0, 0], [0, 0], rng=rng) == 1.0
