"""Ratios by hand, intervals that cover what they claim, the published deflated Sharpe ratio."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlv3.metrics import (
    block_length,
    deflated_sharpe,
    interquartile_interval,
    interquartile_mean,
    luckiest_sharpe,
    max_drawdown,
    probabilistic_sharpe,
    psr,
    ratio_intervals,
    sharpe,
    sortino,
    steps_per_year,
)


def test_ratios_by_hand() -> None:
    returns = [0.03, -0.01, 0.02, 0.0]
    # mean 0.01; squares 9 + 1 + 4 + 0 = 14e-4, mean 3.5e-4, variance 2.5e-4
    assert sharpe(returns) == pytest.approx(0.01 / math.sqrt(2.5e-4))
    assert sharpe(returns, 4.0) == pytest.approx(2 * 0.01 / math.sqrt(2.5e-4))
    # one negative return of 1 %: mean square 0.25e-4
    assert sortino(returns) == pytest.approx(0.01 / math.sqrt(0.25e-4))
    assert steps_per_year(60) == 525_600


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e-7])
def test_a_series_without_variation_has_no_ratio(constant: float) -> None:
    returns = np.full(100, constant)
    assert sharpe(returns) == 0.0
    assert sortino(returns) == 0.0
    assert ratio_intervals(returns, 1.0) == ((0.0, 0.0), (0.0, 0.0))


def test_drawdown_by_hand() -> None:
    # the peak before the low of 90 is 120; the fall from 130 to 104 is 20 %
    assert max_drawdown([100.0, 120.0, 90.0, 130.0, 104.0]) == pytest.approx(0.25)
    assert max_drawdown([1.0, 2.0, 3.0]) == 0.0


def test_block_length_of_independent_and_of_persistent_returns() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=20_000)
    assert block_length(noise) <= 10
    persistent = np.empty(20_000)
    persistent[0] = noise[0]
    for t in range(1, 20_000):
        persistent[t] = 0.5 * persistent[t - 1] + noise[t]
    # AR(1), phi 0.5: G / g(0) = 2 phi / (1 - phi^2) = 4/3, b = (2 (4/3)^2 / (4/3))^(1/3) T^(1/3)
    expected = (8 / 3) ** (1 / 3) * 20_000 ** (1 / 3)
    assert block_length(persistent) == pytest.approx(expected, rel=0.3)


@pytest.mark.parametrize("phi", [0.0, 0.5])
def test_sharpe_interval_covers_the_truth_about_as_often_as_it_claims(phi: float) -> None:
    rng = np.random.default_rng(1)
    truth = 0.1
    runs, n = 120, 1_000
    covered = 0
    for _ in range(runs):
        noise = rng.normal(size=n + 50)
        series = np.empty(n + 50)
        series[0] = noise[0]
        for t in range(1, n + 50):
            series[t] = phi * series[t - 1] + math.sqrt(1 - phi**2) * noise[t]
        interval, _ = ratio_intervals(truth + series[50:], 1.0, draws=400)
        covered += interval.low <= truth <= interval.high
    assert 0.88 <= covered / runs <= 0.99


def test_interquartile_mean_by_hand() -> None:
    assert interquartile_mean([7.0]) == 7.0
    assert interquartile_mean([1.0, 2.0, 3.0]) == 2.0
    assert interquartile_mean([0.0, 4.0, 5.0, 1_000.0]) == 4.5  # one dropped at each end
    assert interquartile_mean([0.0, 4.0, 5.0, 6.0, 1_000.0]) == 5.0
    assert interquartile_interval([3.0, 3.0, 3.0]) == (3.0, 3.0)
    low, high = interquartile_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert 1.0 <= low < 3.0 < high <= 5.0


def test_deflated_sharpe_of_the_paper() -> None:
    # Bailey and Lopez de Prado (2014), numerical example: 100 trials whose annualised Sharpe
    # ratios have a variance of 1/2; the best shows 2.5 over 1,250 daily returns (250 a year) with
    # skewness -3 and kurtosis 10. They find SR* = 0.1132 a day and DSR = 0.9004.
    benchmark = luckiest_sharpe(0.5 / 250, 100)
    assert benchmark == pytest.approx(0.1132, abs=5e-5)
    assert psr(2.5 / math.sqrt(250), benchmark, 1_250, -3.0, 10.0) == pytest.approx(
        0.9004, abs=5e-5
    )


def test_deflated_sharpe_of_returns_by_hand() -> None:
    returns = np.array([1.0, -1.0] * 50) + 0.1
    # mean 0.1, deviation 1, skewness 0, kurtosis 1: z = 0.1 sqrt(99) / sqrt(1) = 0.99499
    assert probabilistic_sharpe(returns) == pytest.approx(0.840129, abs=1e-6)
    assert deflated_sharpe(returns, 1, 5.0) == probabilistic_sharpe(returns)
    # two trials: SR* = 0.1 (0.42278 Phi^-1(0.5) + 0.57722 Phi^-1(1 - 1/(2e)))
    #                 = 0.1 * 0.57722 * 0.90045 = 0.0519756
    assert luckiest_sharpe(0.01, 2) == pytest.approx(0.0519756, abs=1e-6)
    assert deflated_sharpe(returns, 2, 0.01) == pytest.approx(
        psr(0.1, luckiest_sharpe(0.01, 2), 100, 0.0, 1.0)
    )
    assert probabilistic_sharpe(np.zeros(10)) == 0.5
    with pytest.raises(ValueError, match="at least 3 returns, found 2"):
        probabilistic_sharpe([0.1, 0.2])
