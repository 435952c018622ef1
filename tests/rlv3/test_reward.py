"""Rewards by hand."""

from __future__ import annotations

import math

import pytest

from rlv3.features import UNKNOWN
from rlv3.reward import (
    RewardWeights,
    compute_reward,
    net_return,
    regime_alignment,
    reward_terms,
)


def test_the_seeds_formula() -> None:
    # 0.01 * 100 - 0.2**2 * 50 - 10 * 0.1**2 + 0.5 * 2 + 0.1
    reward = compute_reward(0.01, 0.2, 0.1, 0.5, volatility=0.05)
    assert reward == pytest.approx(1.0 - 2.0 - 0.1 + 1.0 + 0.1)


def test_terms_are_named_and_productions_extras_are_off() -> None:
    terms = reward_terms(0.0, 0.0, 0.1, 0.0, volatility=0.02, tp_accuracy=1.0)
    assert terms == {
        "pnl": 0.0, "drawdown": 0.0, "position": 0.0, "regime": 0.0, "survival": 0.1,
        "overtrading": 0.0, "tp_accuracy": 0.0,
    }  # fmt: skip
    on = RewardWeights(overtrading=0.5, tp_accuracy=5.0)
    assert compute_reward(0.0, 0.0, 0.0, 0.0, tp_accuracy=0.4, weights=on) == pytest.approx(
        0.1 - 0.5 + 2.0
    )
    assert reward_terms(2e-4, 0.0, 0.0, 0.0, weights=on)["overtrading"] == 0.0


def test_position_is_penalised_in_high_volatility_only() -> None:
    calm, wild = (reward_terms(0.0, 0.0, 0.2, 0.0, volatility=v)["position"] for v in (0.03, 0.031))
    assert calm == 0.0
    assert wild == pytest.approx(-0.4)


def test_alignment_with_the_regime() -> None:
    def raw(regime: int | None, trend: float) -> list[float]:
        row = list(UNKNOWN)
        row[14] = trend
        if regime is not None:
            row[10 + regime] = 1.0
        return row

    assert regime_alignment(1, raw(0, 0.8)) == 0.8
    assert regime_alignment(-1, raw(0, 0.8)) == -0.8
    assert regime_alignment(1, raw(2, 0.3)) == 0.3
    assert regime_alignment(1, raw(3, 0.4)) == -0.4
    assert regime_alignment(1, raw(1, 0.4)) == 0.0
    assert regime_alignment(1, raw(None, 0.4)) == 0.0
    assert regime_alignment(0, raw(0, 0.8)) == 0.0


def test_net_return_is_the_log_return_of_equity() -> None:
    assert net_return(10_100.0, 10_000.0) == pytest.approx(math.log(1.01))
    assert net_return(10_000.0, 10_000.0) == 0.0
    assert net_return(-5.0, 10_000.0) == pytest.approx(math.log(1e-6))
