"""Closed forms, integrals and Lambert's function; streaming is offline; negation mirrors."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, special

from shadow.statistics.sequential import (
    Evidence,
    Looks,
    Plan,
    batch_length,
    batch_means,
    critical_z,
    log_e_value,
    log_e_value_one_sided,
    looks,
    radius,
    radius_one_sided,
    strict_sequence,
    tuning,
)

PLAN = Plan(horizon=100)
SWAPPED = {
    "low": "high", "high": "low", "lower": "upper", "upper": "lower", "log_e_above": "log_e_below",
    "log_e_below": "log_e_above", "p_above": "p_below", "p_below": "p_above",
}  # fmt: skip
SAME = {"n", "nonzero", "sd", "log_e", "p", "lag1", "lag1_limit", "correlated", "ready"}
SIGNED = {"mean", "low", "high", "lower", "upper"}

batches = st.lists(
    st.one_of(st.just(0.0), st.floats(-1e3, 1e3, allow_subnormal=False)), min_size=1, max_size=60
)


def streamed(values: list[float] | np.ndarray, plan: Plan = PLAN) -> Evidence:
    evidence = Evidence()
    for value in values:
        evidence = evidence.update(float(value), plan)
    return evidence


@pytest.mark.parametrize("alpha", [1e-10, 0.001, 0.025, 0.05, 0.1, 0.5, 0.99])
def test_tuning_is_lambert_w(alpha: float) -> None:
    exact = -special.lambertw(-(alpha**2) / math.e, -1).real - 1.0
    assert tuning(alpha, 1.0) == pytest.approx(exact, rel=1e-12)
    assert tuning(alpha, 720.0) == pytest.approx(exact / 720.0, rel=1e-12)


def test_tuning_is_near_the_usual_approximation() -> None:
    # -2 ln 0.05 = 5.991465, ln 6.991465 = 1.944690, together 7.936155; exactly it is 8.212
    approximation = -2 * math.log(0.05) + math.log(1 - 2 * math.log(0.05))
    assert approximation == pytest.approx(7.936155, abs=1e-6)
    assert tuning(0.05, 1.0) == pytest.approx(8.212, abs=5e-4)


def test_tuning_makes_the_sequence_tightest_at_the_horizon() -> None:
    best = tuning(0.05, 100)
    widths = [float(radius(100, 1.0, best * factor, 0.05)) for factor in (0.9, 1.0, 1.1)]
    assert widths[1] < widths[0]
    assert widths[1] < widths[2]


def test_critical_z_is_flat_after_half_the_horizon() -> None:
    at = np.array([10, 25, 50, 100, 200, 400])
    expected = [3.82, 3.25, 3.08, 3.04, 3.06, 3.13]
    assert critical_z(at, tuning(0.05, 100), 0.05) == pytest.approx(expected, abs=0.005)


def test_radius_by_hand() -> None:
    # n = 4, rho2 = 1/4: v = 1; sqrt(2 * 2 / (4 * 1) ln(sqrt(2) / 0.05)) = sqrt(ln 28.2843)
    assert radius(4, 3.0, 0.25, 0.05) == pytest.approx(3.0 * math.sqrt(3.342306), rel=1e-6)
    # one-sided: ln(1 + sqrt(2) / 0.1) = ln 15.14214
    assert radius_one_sided(4, 3.0, 0.25, 0.05) == pytest.approx(
        3.0 * math.sqrt(math.log(15.142136)), rel=1e-7
    )


@pytest.mark.parametrize("n", [1, 20, 500])
@pytest.mark.parametrize("z", [-4.0, -0.5, 0.0, 2.0, 6.0])
def test_e_values_are_mixtures_of_likelihood_ratios(n: int, z: float) -> None:
    rho2 = PLAN.rho2

    def ratio(mu: float) -> float:  # of N(mu, 1) to N(0, 1) after n values, weighted by N(0, rho2)
        weight = math.exp(-mu * mu / (2 * rho2)) / math.sqrt(2 * math.pi * rho2)
        return weight * math.exp(mu * math.sqrt(n) * z - n * mu * mu / 2)

    reach = 12 * math.sqrt(rho2)
    peak = math.sqrt(n) * z / (n + 1 / rho2)  # where the mixture has its mass
    both = integrate.quad(ratio, -reach, reach, points=[peak], epsabs=0, epsrel=1e-11, limit=500)[0]
    above = integrate.quad(
        ratio, 0.0, reach, points=[peak] if peak > 0 else None, epsabs=0, epsrel=1e-11, limit=500
    )[0]
    assert float(log_e_value(n, z, rho2)) == pytest.approx(math.log(both), abs=1e-8)
    assert float(log_e_value_one_sided(n, z, rho2)) == pytest.approx(math.log(2 * above), abs=1e-8)


def test_e_value_reaches_its_level_where_the_interval_leaves_zero() -> None:
    n = np.arange(1, 2_000)
    at = log_e_value(n, critical_z(n, PLAN.rho2, 0.05), PLAN.rho2)
    assert at == pytest.approx(np.full(len(n), math.log(20)), rel=1e-12)


def test_one_sided_interval_is_a_little_wider_than_its_e_value() -> None:
    n = np.arange(1, 2_000)
    z = np.sqrt(n) * radius_one_sided(n, 1.0, PLAN.rho2, 0.025)
    at = log_e_value_one_sided(n, z, PLAN.rho2)
    assert (at >= math.log(40)).all()
    assert (at <= math.log(40) + 0.05).all()


def test_one_sided_e_value_far_below_zero_is_exact() -> None:
    z = np.linspace(-300.0, 40.0, 3_401)
    v = 720 * PLAN.rho2
    expected = (
        math.log(2) + v / (1 + v) * z**2 / 2 - math.log1p(v) / 2
        + special.log_ndtr(z * math.sqrt(v / (1 + v)))
    )  # fmt: skip
    assert log_e_value_one_sided(720, z, PLAN.rho2) == pytest.approx(expected, rel=1e-9, abs=1e-10)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_streaming_equals_offline_and_two_passes(offset: float) -> None:
    y = np.random.default_rng(0).standard_t(3, size=500) + offset
    y[::7] = 0.0
    seen = looks(y, PLAN)
    evidence = Evidence()
    for k, value in enumerate(y):
        evidence = evidence.update(value, PLAN)
        assert tuple(evidence.look(PLAN)) == tuple(field[k] for field in seen)
        if k < 1:
            continue
        part = y[: k + 1]
        centred = part - part.mean()
        assert evidence.mean == pytest.approx(part.mean(), rel=1e-12, abs=1e-12)
        assert seen.sd[k] == pytest.approx(part.std(ddof=1), rel=1e-12)
        lag1 = centred[1:] @ centred[:-1] / (centred @ centred)
        assert seen.lag1[k] == pytest.approx(lag1, abs=1e-12)
        assert seen.nonzero[k] == np.count_nonzero(part)


def test_bounds_follow_from_mean_and_deviation() -> None:
    y = np.random.default_rng(1).normal(size=300)
    seen = looks(y, PLAN)
    for k in (1, 40, 299):
        part = y[: k + 1]
        half = radius(k + 1, part.std(ddof=1), PLAN.rho2, 0.05)
        assert seen.low[k] == pytest.approx(part.mean() - half, rel=1e-12)
        assert seen.high[k] == pytest.approx(part.mean() + half, rel=1e-12)
        one = radius_one_sided(k + 1, part.std(ddof=1), PLAN.rho2, 0.025)
        assert seen.lower[k] == pytest.approx(part.mean() - one, rel=1e-12)
    assert seen.low[0] == -math.inf
    assert seen.high[0] == math.inf


def test_interval_excludes_zero_exactly_when_the_e_value_says_so() -> None:
    y = np.random.default_rng(2).normal(0.3, 1.0, size=(200, 150))
    seen = looks(y, PLAN)
    out = (seen.low > 0.0) | (seen.high < 0.0)
    assert out.any()
    assert (out & seen.ready == (seen.log_e > math.log(20)) & seen.ready).all()


@given(batches)
@settings(max_examples=100, deadline=None)
def test_negated_batches_mirror_every_statistic(values: list[float]) -> None:
    one, two = looks(values, PLAN), looks([-value for value in values], PLAN)
    for name in Looks._fields:
        ours = getattr(one, name)
        theirs = getattr(two, SWAPPED.get(name, name))
        assert (ours == (-theirs if name in SIGNED else theirs)).all(), name
    assert set(SWAPPED) | SAME | SIGNED == set(Looks._fields)


@given(batches, st.integers(1, 60))
@settings(max_examples=100, deadline=None)
def test_later_batches_change_no_earlier_look(values: list[float], cut: int) -> None:
    cut = min(cut, len(values))
    whole, part = looks(values, PLAN), looks(values[:cut], PLAN)
    for name in Looks._fields:
        assert (getattr(whole, name)[:cut] == getattr(part, name)).all(), name
    strict, prefix = strict_sequence(values, 10.0, 0.05), strict_sequence(values[:cut], 10.0, 0.05)
    assert (strict.low[:cut] == prefix.low).all()
    assert (strict.high[:cut] == prefix.high).all()


def test_burn_in_needs_enough_batches_that_are_not_zero() -> None:
    y = np.where(np.arange(60) % 2 == 0, 1.0, 0.0) * np.linspace(1.0, 2.0, 60)
    ready = looks(y, PLAN).ready
    # the 20th batch that is not zero is number 39
    assert not ready[:38].any()
    assert ready[38:].all()


def test_batches_that_do_not_vary_are_never_ready() -> None:
    seen = looks(np.full(50, 0.1), PLAN)
    assert not seen.ready.any()
    assert (seen.p == 1.0).all()


def test_equal_policies_have_no_evidence_at_all() -> None:
    last = streamed(np.zeros(300)).look(PLAN)
    assert not last.ready
    assert (last.mean, last.low, last.high) == (0.0, 0.0, 0.0)
    assert (last.p, last.p_above, last.p_below, last.log_e) == (1.0, 1.0, 1.0, 0.0)
    assert not last.correlated


def test_p_is_the_running_minimum_after_burn_in() -> None:
    y = np.random.default_rng(3).normal(0.4, 1.0, size=200)
    seen = looks(y, PLAN)
    assert (np.diff(seen.p) <= 0.0).all()
    assert (seen.p[:19] == 1.0).all()
    best = seen.log_e[19:].max()
    assert seen.p[-1] == pytest.approx(math.exp(-best))
    assert seen.p_above[-1] < seen.p[-1] < 0.05
    assert seen.p_below[-1] > 0.5


@pytest.mark.parametrize(("ar", "share"), [(0.0, (0.0, 0.1)), (0.4, (0.95, 1.0))])
def test_correlated_batches_are_noticed(ar: float, share: tuple[float, float]) -> None:
    rng = np.random.default_rng(4)
    y = rng.normal(size=(300, 300))
    y *= np.exp(np.sin(np.arange(300) / 15.0))  # volatility that comes and goes is no correlation
    for k in range(1, 300):
        y[:, k] += ar * y[:, k - 1]
    assert share[0] <= looks(y, PLAN).correlated[:, -1].mean() <= share[1]


def test_correlation_limit_of_even_volatility_is_two_over_root_n() -> None:
    seen = looks(np.random.default_rng(5).normal(size=4_000), PLAN)
    assert seen.lag1_limit[-1] == pytest.approx(2.0 / math.sqrt(4_000), rel=0.05)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_batches_that_are_no_numbers_are_rejected(value: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        Evidence().update(value, PLAN)
    with pytest.raises(ValueError, match="finite"):
        looks([1.0, value], PLAN)
    with pytest.raises(ValueError, match="finite"):
        strict_sequence([1.0, value], 1.0, 0.05)


def test_look_without_batches_is_rejected() -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        Evidence().look(PLAN)


@pytest.mark.parametrize("wrong", [{"alpha": 0.0}, {"alpha": 1.0}, {"horizon": 0}, {"burn_in": 1}])
def test_plans_out_of_range_are_rejected(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Plan(**wrong)  # type: ignore[arg-type]


def plain_strict(y: list[float], b: float, alpha: float) -> list[tuple[float, float]]:
    """The sequence in the notation of its paper, one value after the other, on [0, 1]."""
    found = []
    mu, variance = 0.5, 0.25
    weights = weighted = paid = total = squares = 0.0
    for t, value in enumerate(y, start=1):
        x = (min(max(value, -b), b) + b) / (2 * b)
        bet = min(math.sqrt(2 * math.log(2 / alpha) / (variance * t * math.log(1 + t))), 0.5)
        psi = (-math.log(1 - bet) - bet) / 4
        weights += bet
        weighted += bet * x
        paid += 4 * (x - mu) ** 2 * psi
        total += x
        mu = (0.5 + total) / (t + 1)
        squares += (x - mu) ** 2
        variance = (0.25 + squares) / (t + 1)
        half = (math.log(2 / alpha) + paid) / weights
        low, high = weighted / weights - half, weighted / weights + half
        found.append((max(low, 0.0) * 2 * b - b, min(high, 1.0) * 2 * b - b))
    return found


def test_strict_sequence_is_the_papers() -> None:
    y = np.random.default_rng(6).standard_t(3, size=400) + 0.2
    strict = strict_sequence(y, 3.0, 0.05)
    expected = np.array(plain_strict(y.tolist(), 3.0, 0.05))
    assert strict.low == pytest.approx(expected[:, 0], abs=1e-12)
    assert strict.high == pytest.approx(expected[:, 1], abs=1e-12)
    assert strict.clipped == np.mean(np.abs(y) > 3.0) > 0.0


@given(batches)
@settings(max_examples=50, deadline=None)
def test_strict_sequence_mirrors(values: list[float]) -> None:
    one = strict_sequence(values, 10.0, 0.05)
    two = strict_sequence([-value for value in values], 10.0, 0.05)
    assert (one.low == -two.high).all()
    assert (one.high == -two.low).all()
    assert one.clipped == two.clipped


def test_strict_sequence_covers_skewed_coins_from_the_first_toss_on() -> None:
    # +1 with chance 0.9: at small n this is what the asymptotic sequence cannot promise
    rng = np.random.default_rng(7)
    y = np.where(rng.random((1_000, 500)) < 0.9, 1.0, -1.0)
    strict = strict_sequence(y, 1.0, 0.05)
    missed = ((strict.low > 0.8) | (strict.high < 0.8)).any(axis=1)
    assert missed.mean() <= 0.05
    assert (strict.high - strict.low)[:, -1].max() < 0.4


def test_strict_sequence_without_a_bound_is_rejected() -> None:
    with pytest.raises(ValueError, match="positive bound"):
        strict_sequence([1.0], 0.0, 0.05)


def test_batch_means_drop_the_incomplete_last_batch() -> None:
    assert batch_means([1.0, 3.0, 5.0, 7.0, 100.0], 2).tolist() == [2.0, 6.0]
    assert batch_means([1.0], 2).tolist() == []
    with pytest.raises(ValueError, match="at least 1 bar"):
        batch_means([1.0], 0)


@pytest.mark.parametrize(
    ("holding", "bars"), [(5.0, 60), (30.0, 60), (31.0, 240), (200.0, 1440), (721.0, 2880)]
)
def test_batch_length_covers_twice_the_holding_time(holding: float, bars: int) -> None:
    noise = np.random.default_rng(8).normal(size=1_440)
    assert batch_length(noise, holding) == bars


def test_batch_length_covers_the_autocorrelation() -> None:
    y = np.random.default_rng(9).normal(size=5_000)
    for t in range(1, len(y)):
        y[t] += 0.8 * y[t - 1]
    # tau = (1 + 0.8) / (1 - 0.8) = 9, 12 tau = 108 bars
    assert batch_length(y, 1.0) == 240
