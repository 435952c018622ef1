"""Is drift seen when features change, and not when an hour is just an hour?"""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlv3.features import FEATURES, N_FEATURES, Normaliser, feature_matrix
from rlv3.market import simulate
from rlv3.policy import QUANTILE_LEVELS, Policy, shipped_policy
from shadow.drift import DRIFTED, LEVELS, MOST, PRIOR, SHARES, Window

INDEX = {feature.name: i for i, feature in enumerate(FEATURES)}
RSI = INDEX["rsi"]
MINUTE_US = 60_000_000
QUANTILES = {"rsi": list(QUANTILE_LEVELS)}  # uniform on 0..1


def window(quantiles: dict[str, list[float]] = QUANTILES) -> Window:
    return Window(Normaliser.identity(), quantiles)


def row(rsi: float) -> list[float]:
    obs = [0.0] * 64
    obs[RSI] = rsi
    return obs


def test_psi_of_a_feature_that_stands_still_is_the_closed_form() -> None:
    live = window()
    for n in range(60):
        live.add(n * MINUTE_US, row(0.3), 0)
    shares = [PRIOR * q / (60 + PRIOR) for q in SHARES]
    shares[2] += 60 / (60 + PRIOR)  # 0.25 < 0.3 <= 0.5
    wanted = sum((p - q) * math.log(p / q) for p, q in zip(shares, SHARES, strict=True))
    found = live.compare()["rsi"]
    assert found.psi == pytest.approx(wanted)
    assert found.live == (0.3,) * 5
    assert found.training == LEVELS


def test_psi_of_training_itself_is_zero() -> None:
    live = window()
    for n in range(60):
        live.add(n * MINUTE_US, row((n + 0.5) / 60), 0)
    assert live.compare()["rsi"].psi == pytest.approx(0.0, abs=1e-3)


def test_values_are_compared_before_normalisation() -> None:
    scaled = Normaliser(np.full(N_FEATURES, 0.5), np.full(N_FEATURES, 0.1))
    live = Window(scaled, QUANTILES)
    live.add(0, row(-2.0), 0)
    assert live.compare()["rsi"].live == pytest.approx((0.3,) * 5)


def test_bars_older_than_an_hour_and_missing_values_are_left_out() -> None:
    live = window()
    live.add(0, row(0.1), 0)
    live.add(60 * MINUTE_US, row(0.9), 0)
    live.add(61 * MINUTE_US, row(0.0), 1 << RSI)
    assert live.compare()["rsi"].live == (0.9,) * 5
    assert live.missing()["rsi"] == 0.5
    assert live.missing()["macd"] == 0.0


def test_more_bars_than_the_window_holds_replace_the_oldest() -> None:
    live = window()
    for n in range(MOST + 10):
        live.add(MINUTE_US, row(0.1 if n < MOST else 0.9), 0)
    assert live.added == MOST + 10
    assert live.compare()["rsi"].live[-1] == 0.1
    assert live.compare()["rsi"].psi < _psi_of_all(0.1)


def _psi_of_all(value: float) -> float:
    live = window()
    for _ in range(MOST):
        live.add(MINUTE_US, row(value), 0)
    return live.compare()["rsi"].psi


def test_nothing_is_compared_where_training_or_life_has_nothing() -> None:
    assert window({}).compare() == {}
    assert window().compare() == {}
    assert window().missing() == {}


def hours(change: dict[str, float], symbols: int, bars: int) -> list[float]:
    """Return the largest psi after some bars, for twenty draws of training's own worlds."""
    policy = Policy.load(shipped_policy())
    worlds = policy.metadata["training"]["markets"]
    found = []
    for draw in range(20):
        live = Window(policy.normaliser, policy.metadata["quantiles"])
        for symbol in range(symbols):
            seed = 1_000 + 50 * draw + symbol
            series = simulate(worlds[seed % len(worlds)], 160, seed=seed)
            raw, missing = feature_matrix(series.end_us, series.close, series.volume)
            for name, factor in change.items():
                raw[160 - bars :, INDEX[name]] *= factor
            obs = policy.normaliser.apply(raw, missing.tolist())
            for i in range(100, 160):
                live.add(int(series.end_us[i]), obs[i].tolist(), int(missing[i]))
        found.append(max(drift.psi for drift in live.compare().values()))
    return found


@pytest.mark.parametrize("symbols", [1, 3])
def test_an_hour_like_training_is_no_drift(symbols: int) -> None:
    assert max(hours({}, symbols, bars=0)) < DRIFTED


def test_a_feature_that_stands_still_is_seen_with_three_symbols_not_with_one() -> None:
    found = []
    for symbols in (1, 3):
        live = window()
        for n in range(60 * symbols):
            live.add(n // symbols * MINUTE_US, row(0.5), 0)
        found.append(live.compare()["rsi"].psi)
    assert found[0] == pytest.approx(1.1, abs=0.005)
    assert found[1] > DRIFTED


@pytest.mark.parametrize("name", ["price_change_1m", "volatility", "macd"])
def test_a_changed_unit_is_drift_within_an_hour(name: str) -> None:
    assert min(hours({name: 100.0}, symbols=3, bars=50)) > DRIFTED
