"""Against arch, statsmodels, scipy, plain loops and hand-worked numbers; swaps mirror."""

from __future__ import annotations

import math

import numpy as np
import pytest
from arch.bootstrap import StationaryBootstrap, optimal_block_length
from scipy import stats
from statsmodels.api import OLS

from rlv3.metrics import (
    block_length,
    integrated_autocorrelation,
    psr,
    stationary_block_length,
)
from shadow.statistics import inference
from shadow.statistics.inference import (
    METRICS,
    batches_fixed,
    batches_sequential,
    bootstrap_means,
    compare,
    drawdown,
    estimate,
    ewc_test,
    expected_shortfall,
    few_group_test,
    fixed_z,
    interval,
    lo_factor,
    lo_sharpe,
    long_run_variance,
    min_track_record,
    minimum_detectable_effect,
    newey_west_lag,
    power,
    sharpe,
    sharpe_difference,
    sortino,
    stationary_indices,
)
from shadow.statistics.sequential import Plan, critical_z

Floats = np.ndarray


def autoregression(n: int, ar: float, seed: int, runs: int | None = None) -> Floats:
    rng = np.random.default_rng(seed)
    y = rng.normal(size=n if runs is None else (n, runs))
    for t in range(1, n):
        y[t] += ar * y[t - 1]
    return y.T


def test_ewc_test_is_the_papers_sum() -> None:
    y = autoregression(200, 0.3, 0) + 0.2
    n, nu = 200, 13  # 0.4 * 200^(2/3) = 13.68
    t = np.arange(1, n + 1)
    projections = [
        math.sqrt(2 / n) * (y * np.cos(math.pi * j * (t - 0.5) / n)).sum() for j in range(1, nu + 1)
    ]
    omega = math.sqrt(np.mean(np.square(projections)))
    found = ewc_test(y)
    assert found.dof == nu
    assert found.statistic == pytest.approx(math.sqrt(n) * y.mean() / omega, rel=1e-12)
    assert found.p == pytest.approx(2 * stats.t.sf(abs(found.statistic), nu))
    half = stats.t.ppf(0.975, nu) * omega / math.sqrt(n)
    assert (found.low, found.high) == pytest.approx((y.mean() - half, y.mean() + half))


def test_ewc_test_rejects_as_often_as_it_says() -> None:
    runs = autoregression(1_000, 0.5, 1, runs=1_000)
    share = np.mean([ewc_test(y).p < 0.05 for y in runs])
    # 5 % and a little: the paper's own size distortion; a plain t-test rejects 26 %
    assert 0.03 <= share <= 0.075
    assert np.mean(stats.ttest_1samp(runs, 0.0, axis=1).pvalue < 0.05) > 0.2


def test_few_group_test_is_a_t_test_on_group_means() -> None:
    y = autoregression(125, 0.5, 2) + 0.3
    expected = stats.ttest_1samp(y[5:].reshape(12, 10).mean(axis=1), 0.0)
    found = few_group_test(y, groups=12)
    assert found.statistic == pytest.approx(expected.statistic)
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))


@pytest.mark.parametrize("test", [ewc_test, few_group_test])
def test_series_without_variation_is_what_it_is(test: type) -> None:
    still = test(np.zeros(100))
    assert (still.estimate, still.statistic, still.p, still.low, still.high) == (0, 0, 1, 0, 0)
    assert test(np.full(128, 0.25)).p == 0.0


@pytest.mark.parametrize("test", [ewc_test, few_group_test])
def test_tests_mirror(test: type) -> None:
    y = autoregression(500, 0.3, 3) + 0.1
    one, two = test(y), test(-y)
    assert (one.estimate, one.statistic, one.low) == (-two.estimate, -two.statistic, -two.high)
    assert (one.p, one.se) == (two.p, two.se)


@pytest.mark.parametrize("lag", [0, 1, 5, 41])
def test_long_run_variance_is_statsmodels(lag: int) -> None:
    y = autoregression(1_000, 0.4, 4) + 3.0
    hac = OLS(y, np.ones(1_000)).fit(cov_type="HAC", cov_kwds={"maxlags": lag})
    expected = float(hac.cov_params().item()) * 1_000
    assert long_run_variance(y, lag) == pytest.approx(expected, rel=1e-10)


def test_newey_west_lag_by_hand() -> None:
    assert newey_west_lag(1_000) == 42  # 1.3 * 31.62 = 41.1
    assert newey_west_lag(2) == 1


def plain_block_length(y: Floats, cut: int, factor: float) -> float:
    """The paper's formula, with autocovariances weighted up to twice the cut."""
    n = len(y)
    c = y - y.mean()
    m = 2 * max(cut, 1)
    g = spectrum = 0.0
    for k in range(-m, m + 1):
        weight = 1.0 if abs(k) <= m / 2 else 2.0 * (1.0 - abs(k) / m)
        covariance = c[abs(k) :] @ c[: n - abs(k)] / n
        g += weight * abs(k) * covariance
        spectrum += weight * covariance
    return float((2 * g**2 / (factor * spectrum**2)) ** (1 / 3) * n ** (1 / 3))


@pytest.mark.parametrize("ar", [-0.3, 0.0, 0.3, 0.8])
@pytest.mark.parametrize("n", [300, 5_000])
def test_block_lengths_are_the_papers_and_archs(ar: float, n: int) -> None:
    y = autoregression(n, ar, 5)
    c = y - y.mean()
    rho = np.array([c[k:] @ c[: n - k] for k in range(80)]) / (c @ c)
    small = np.abs(rho) < 2 * math.sqrt(math.log10(n) / n)
    cut = next(m for m in range(70) if small[m + 1 : m + 6].all())  # the paper's m-hat
    assert stationary_block_length(y) == pytest.approx(max(1.0, plain_block_length(y, cut, 2)))
    assert block_length(y) == math.ceil(max(1.0, plain_block_length(y, cut, 4 / 3)))
    # arch cuts at the first lag that is insignificant, which is one later than the paper's
    peer = optimal_block_length(y).iloc[0]
    assert peer["stationary"] == pytest.approx(plain_block_length(y, max(cut + 1, 1), 2))
    assert peer["circular"] == pytest.approx(plain_block_length(y, max(cut + 1, 1), 4 / 3))
    assert stationary_block_length(y) == pytest.approx(max(1.0, peer["stationary"]), rel=0.4)


def test_integrated_autocorrelation_of_an_autoregression() -> None:
    # (1 + 0.6) / (1 - 0.6) = 4
    assert integrated_autocorrelation(autoregression(100_000, 0.6, 6)) == pytest.approx(4, rel=0.1)
    assert integrated_autocorrelation(autoregression(100_000, 0.0, 6)) == pytest.approx(1, rel=0.1)
    assert integrated_autocorrelation(np.ones(50)) == 1.0


def stationary_variance(y: Floats, length: float) -> float:
    """The exact variance of the bootstrap mean: Politis and Romano (1994), lemma 1."""
    n = len(y)
    c = y - y.mean()
    around = np.array([c @ np.roll(c, -k) / n for k in range(n)])
    k = np.arange(1, n)
    weights = (1 - k / n) * (1 - 1 / length) ** k
    return float(around[0] + 2 * (weights * around[1:]).sum()) / n


@pytest.mark.parametrize("length", [1.0, 4.5, 30.0])
def test_bootstrap_of_means_has_the_exact_variance(length: float) -> None:
    y = autoregression(150, 0.5, 7)
    rng = np.random.default_rng(8)
    by_sums = bootstrap_means(y[:, None], length, 40_000, rng)[:, 0]
    by_indices = y[stationary_indices(150, length, 20_000, rng)].mean(axis=1)
    expected = stationary_variance(y, length)
    # the variance of 20,000 draws is off by 1 % (one standard error)
    assert by_sums.var() == pytest.approx(expected, rel=0.04)
    assert by_indices.var() == pytest.approx(expected, rel=0.04)
    assert by_sums.mean() == pytest.approx(y.mean(), abs=0.005)


def test_bootstrap_interval_is_archs() -> None:
    y = autoregression(400, 0.4, 9) + 0.5
    peer = StationaryBootstrap(8, y, seed=10).conf_int(
        lambda x: x.mean() / x.std(), reps=4_000, method="percentile"
    )
    ours = estimate(y, sharpe, rng=np.random.default_rng(11), length=8.0, draws=3_999)
    width = float(peer[1, 0] - peer[0, 0])
    assert ours.value == pytest.approx(y.mean() / y.std())
    assert ours.low == pytest.approx(float(peer[0, 0]), abs=0.06 * width)
    assert ours.high == pytest.approx(float(peer[1, 0]), abs=0.06 * width)


def test_bootstrap_interval_covers_as_often_as_it_says() -> None:
    runs = autoregression(400, 0.4, 12, runs=300)
    rng = np.random.default_rng(13)
    hits = 0
    for y in runs:
        found = estimate(y, inference.mean, rng=rng, draws=399)
        hits += found.low <= 0.0 <= found.high
    assert 0.88 <= hits / 300 <= 0.98


def test_interval_ends_are_order_statistics() -> None:
    draws = np.random.default_rng(14).permutation(np.arange(1.0, 2_000.0))
    assert interval(900.0, draws) == (900.0, 50.0, 1_950.0)
    # the basic interval reflects at the value: 1800 - 1950, 1800 - 50
    assert interval(900.0, draws, method="basic") == (900.0, -150.0, 1_750.0)
    with pytest.raises(ValueError, match="percentile or basic"):
        interval(0.0, draws, method="bca")


def test_metrics_by_hand() -> None:
    r = np.array([0.01, -0.03, 0.02, -0.01, 0.01])
    # running sums 1, -2, 0, -1, 0 %: from the peak of 1 to -2
    assert drawdown(r) == pytest.approx(0.03)
    assert drawdown(np.array([-0.02, -0.01, 0.01])) == pytest.approx(0.03)  # the capital is a peak
    assert drawdown(np.array([0.01, 0.01])) == 0.0
    assert expected_shortfall(r) == pytest.approx(0.03)
    assert expected_shortfall(np.arange(40.0)) == pytest.approx(-0.5)  # the worst two: 0 and 1
    # mean 0; with 0.01 more per step: mean 0.01, squares 4, 4, 9, 0, 4 = 21e-4 / 5 - 1e-4
    assert sharpe(r + 0.01) == pytest.approx(0.01 / math.sqrt(3.2e-4))
    assert sortino(r + 0.01) == pytest.approx(0.01 / math.sqrt(4e-4 / 5))


def test_metrics_work_along_the_last_axis() -> None:
    table = np.random.default_rng(15).normal(size=(3, 4, 50))
    for metric in METRICS.values():
        whole = metric(table)
        assert whole.shape == (3, 4)
        assert whole[1, 2] == pytest.approx(float(metric(table[1, 2])), rel=1e-12)


def test_compare_mirrors_when_the_policies_swap() -> None:
    rng = np.random.default_rng(16)
    one, two = rng.normal(0.1, 1.0, size=(2, 300))
    ours = compare(one, two, rng=np.random.default_rng(17), draws=199)
    theirs = compare(two, one, rng=np.random.default_rng(17), draws=199)
    for name, found in ours.items():
        other = theirs[name]
        assert found.first == other.second
        value, low, high = found.difference
        assert (-value, -high, -low) == other.difference


def test_compare_of_a_policy_with_itself_is_exactly_nothing() -> None:
    y = np.random.default_rng(18).normal(size=200)
    for found in compare(y, y, rng=np.random.default_rng(19), draws=199).values():
        assert found.difference == (0.0, 0.0, 0.0)
        assert found.ratio == (1.0, 1.0, 1.0)


def test_ratio_of_turnovers() -> None:
    rng = np.random.default_rng(20)
    turnover = rng.random((2, 500)) * np.array([[3.0], [1.0]])
    found = compare(*turnover, {"turnover": inference.mean}, rng=rng, draws=199)["turnover"].ratio
    assert found.value == pytest.approx(turnover[0].mean() / turnover[1].mean())
    assert found.low < 3.0 < found.high
    never = compare(turnover[0], np.zeros(500), {"turnover": inference.mean}, rng=rng, draws=99)
    assert never["turnover"].ratio == (math.inf, math.inf, math.inf)


def test_series_of_different_lengths_are_rejected() -> None:
    with pytest.raises(ValueError, match="one length"):
        compare([1.0, 2.0], [1.0, 2.0, 3.0], rng=np.random.default_rng(0))
    with pytest.raises(ValueError, match="finite"):
        ewc_test([math.nan] * 20)
    with pytest.raises(ValueError, match="at least 8"):
        ewc_test([1.0] * 7)


def gradient(mu1: float, mu2: float, c1: float, c2: float) -> Floats:
    s1, s2 = math.sqrt(c1 - mu1**2), math.sqrt(c2 - mu2**2)
    return np.array([c1 / s1**3, -c2 / s2**3, -mu1 / (2 * s1**3), mu2 / (2 * s2**3)])


def moments(one: Floats, two: Floats) -> Floats:
    return np.stack([one, two, one**2, two**2], axis=1)


def two_policies(n: int, seed: int) -> tuple[Floats, Floats]:
    rng = np.random.default_rng(seed)
    common = autoregression(n, 0.2, seed + 1)
    return common + rng.normal(0.2, 1.0, n), common + rng.standard_t(4, n) + 0.1


def test_sharpe_difference_has_the_delta_methods_standard_error() -> None:
    one, two = two_policies(600, 21)
    table = moments(one, two)
    centred = table - table.mean(axis=0)
    lag = newey_west_lag(600)
    psi = centred.T @ centred / 600
    for k in range(1, lag + 1):
        gamma = centred[k:].T @ centred[:-k] / 600
        psi += (1 - k / (lag + 1)) * (gamma + gamma.T)
    slope = gradient(*table.mean(axis=0))
    found = sharpe_difference(one, two, rng=np.random.default_rng(0), draws=99)
    assert found.se == pytest.approx(math.sqrt(slope @ psi @ slope / 600), rel=1e-9)
    ratios = [x.mean() / x.std() for x in (one, two)]
    assert found[:3] == pytest.approx((ratios[0], ratios[1], ratios[0] - ratios[1]))


def test_sharpe_difference_bootstraps_as_the_paper_does() -> None:
    one, two = two_policies(103, 22)
    length, draws = 10, 99
    found = sharpe_difference(one, two, rng=np.random.default_rng(1), length=length, draws=draws)
    starts = np.random.default_rng(1).integers(103, size=(draws, 10))
    distances = []
    for row in starts:  # blocks written out, wrapping at the end; matrices as in the paper
        picked = (row[:, None] + np.arange(length)) % 103
        table = moments(one[picked.ravel()], two[picked.ravel()])
        centre = table.mean(axis=0)
        zeta = (table - centre).reshape(10, length, 4).sum(axis=1) / math.sqrt(length)
        psi = zeta.T @ zeta / 10
        slope = gradient(*centre)
        a, b = (x[picked].mean() / x[picked].std() for x in (one, two))
        se = math.sqrt(slope @ psi @ slope / 100)
        distances.append(abs(a - b - found.difference) / se)
    ordered = sorted(distances)
    half = ordered[94] * found.se  # the 95th of 99: 5 % of 100 draws lie beyond
    assert (found.low, found.high) == pytest.approx(
        (found.difference - half, found.difference + half), rel=1e-9
    )
    beyond = sum(d >= abs(found.difference) / found.se for d in distances)
    assert found.p == pytest.approx((1 + beyond) / 100)


def test_sharpe_difference_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(23)
    hits = 0
    for seed in range(300):
        one, two = two_policies(300, 1_000 + 2 * seed)
        truth = 0.2 / math.sqrt(1 / 0.96 + 1) - 0.1 / math.sqrt(1 / 0.96 + 2)
        found = sharpe_difference(one, two, rng=rng, length=6, draws=199)
        hits += found.low <= truth <= found.high
    assert 0.91 <= hits / 300 <= 0.99


def test_sharpe_difference_mirrors_and_is_nothing_for_equal_series() -> None:
    one, two = two_policies(300, 24)
    ours = sharpe_difference(one, two, rng=np.random.default_rng(2), draws=199)
    theirs = sharpe_difference(two, one, rng=np.random.default_rng(2), draws=199)
    assert (ours.difference, ours.low, ours.high) == (
        -theirs.difference, -theirs.high, -theirs.low,
    )  # fmt: skip
    assert (ours.se, ours.p) == (theirs.se, theirs.p)
    same = sharpe_difference(one, one, rng=np.random.default_rng(3), draws=99)
    assert (same.difference, same.se, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 0.0, 1.0)


def test_sharpe_difference_to_a_policy_that_does_nothing() -> None:
    one, _ = two_policies(300, 25)
    found = sharpe_difference(one, np.zeros(300), rng=np.random.default_rng(4), draws=199)
    assert found.second == 0.0
    assert found.low < found.first < found.high


def test_track_record_is_where_the_probability_reaches_its_level() -> None:
    # (1 + 2/4 * 0.01) (1.644854 / 0.1)^2 + 1 = 1.005 * 270.5543 + 1
    assert min_track_record(0.1, 0.0, 0.0, 3.0) == pytest.approx(272.907, abs=1e-3)
    n = min_track_record(0.08, 0.02, -0.7, 6.0)
    z = stats.norm.ppf(0.95)
    by_hand = 1 + (1 + 0.7 * 0.08 + 1.25 * 0.0064) * (z / 0.06) ** 2
    assert n == pytest.approx(by_hand)
    assert psr(0.08, 0.02, round(n), -0.7, 6.0) == pytest.approx(0.95, abs=1e-4)
    assert min_track_record(0.1, 0.1, 0.0, 3.0) == math.inf


def test_lo_factor_by_hand() -> None:
    assert lo_factor(12, []) == pytest.approx(math.sqrt(12))
    # q = 3: 3 / sqrt(3 + 2 (2 * 0.5 + 1 * 0.25))
    assert lo_factor(3, [0.5, 0.25, 0.125]) == pytest.approx(3 / math.sqrt(5.5))
    with pytest.raises(ValueError, match="stationary"):
        lo_factor(3, [-0.9, 0.0])


def test_lo_sharpe_takes_off_what_persistence_adds() -> None:
    y = autoregression(50_000, 0.5, 26) + 0.05
    naive = float(sharpe(y)) * math.sqrt(525_600)
    # tau = (1 + 0.5) / (1 - 0.5) = 3
    assert lo_sharpe(y, 525_600) == pytest.approx(naive / math.sqrt(3), rel=0.1)
    assert lo_sharpe(np.ones(10), 365.0) == 0.0


def test_time_to_decide_by_hand() -> None:
    # hourly batches; an annual ratio of 6 is 6 / sqrt(8760) per batch
    effect = 6.0 / math.sqrt(8_760)
    assert batches_fixed(effect, 1.0, 0.05) / 24 == pytest.approx((2.8016 / 6) ** 2 * 365, rel=1e-3)
    days = (3.8768 / 6) ** 2 * 365  # z 3.0351 at the horizon, and 0.8416
    tuned = Plan(horizon=round(24 * days))
    assert batches_sequential(effect, 1.0, tuned) / 24 == pytest.approx(days, rel=1e-3)
    assert batches_sequential(-effect, 1.0, tuned) == batches_sequential(effect, 1.0, tuned)


def test_time_to_decide_is_where_the_power_is() -> None:
    plan = Plan()
    for effect in (0.01, 0.1, 0.5):
        n = batches_sequential(effect, 2.0, plan)
        critical = float(critical_z(n, plan.rho2, plan.alpha))
        assert power(effect, 2.0, n, critical) == pytest.approx(0.8, abs=1e-6)
        assert minimum_detectable_effect(2.0, n, critical) == pytest.approx(effect, rel=1e-6)
        m = batches_fixed(effect, 2.0, 0.05)
        assert power(effect, 2.0, m, fixed_z(0.05)) == pytest.approx(0.8)
        assert m < n
    assert batches_sequential(100.0, 1.0, plan) == 20.0  # no verdict before burn-in
    assert batches_fixed(0.0, 1.0, 0.05) == batches_sequential(0.0, 1.0, plan) == math.inf


def test_detectable_effect_of_a_week_by_hand() -> None:
    # 3.8768 / sqrt(7 / 365) = 28.0 as an annual ratio
    plan = Plan(horizon=168)
    critical = float(critical_z(168, plan.rho2, 0.05))
    effect = minimum_detectable_effect(1.0, 168, critical) * math.sqrt(8_760)
    assert effect == pytest.approx(28.0, abs=0.05)
