"""What is a step worth? The seed's named terms, and the plain net return.

`net_return` is the default: the log return of equity, so the sum over an episode is what the
account earned after all costs. The seed's reward pays for surviving and for agreeing with a regime;
it is kept because the seed documents it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from rlv3.features import regime_of

HIGH_VOLATILITY = 0.03  # per step, from which a position is penalised
SANE_REWARDS = frozenset({"net_return"})
"""Rewards that pay for net profit alone, by `rlv3 audit-reward`; see tests/rlv3/test_audit.py."""
IDLE = 1e-4  # a change of profit below this counts as idle (production's overtrading term)


class RewardWeights(NamedTuple):
    """Weights of the named terms; production's two extra ones are off."""

    pnl: float = 100.0
    drawdown: float = 50.0
    position: float = 10.0
    regime: float = 2.0
    survival: float = 0.1
    overtrading: float = 0.0
    tp_accuracy: float = 0.0


SEED_WEIGHTS = RewardWeights()


def reward_terms(
    pnl_delta: float,
    drawdown: float,
    position_size: float,
    regime_alignment: float,
    volatility: float = 0.0,
    tp_accuracy: float = 0.0,
    weights: RewardWeights = SEED_WEIGHTS,
) -> dict[str, float]:
    """Return the weighted terms of the seed's reward by name; penalties are negative.

    Args:
        pnl_delta: change of equity in this step, as a fraction.
        drawdown: fall from the peak of equity, 0 to 1.
        position_size: fraction of equity, unsigned.
        regime_alignment: -1 to 1, see `regime_alignment`.
        volatility: standard deviation of returns per step.
        tp_accuracy: share of take-profit targets that were met, 0 to 1.
    """
    return {
        "pnl": weights.pnl * pnl_delta,
        "drawdown": -weights.drawdown * drawdown**2,
        "position": -weights.position * position_size**2 if volatility > HIGH_VOLATILITY else 0.0,
        "regime": weights.regime * regime_alignment,
        "survival": weights.survival,
        "overtrading": -weights.overtrading if abs(pnl_delta) < IDLE else 0.0,
        "tp_accuracy": weights.tp_accuracy * tp_accuracy,
    }


def compute_reward(
    pnl_delta: float,
    drawdown: float,
    position_size: float,
    regime_alignment: float,
    volatility: float = 0.0,
    tp_accuracy: float = 0.0,
    weights: RewardWeights = SEED_WEIGHTS,
) -> float:
    """Return the seed's reward: the sum of `reward_terms`."""
    terms = reward_terms(
        pnl_delta, drawdown, position_size, regime_alignment, volatility, tp_accuracy, weights
    )
    return math.fsum(terms.values())


def regime_alignment(side: int, raw: list[float]) -> float:
    """Return how well a position fits the regime of a raw feature row, -1 to 1.

    With the trend in TREND and BREAKOUT, against it in MEAN_REVERSION; 0 when flat, in a RANGE or
    where the regime is not known.
    """
    sign = {"TREND": 1.0, "BREAKOUT": 1.0, "MEAN_REVERSION": -1.0}.get(regime_of(raw) or "", 0.0)
    return side * sign * raw[14]


def net_return(equity: float, equity_before: float) -> float:
    """Return the log return of equity; an equity of nothing or less counts as a millionth."""
    floor = 1e-6 * equity_before
    return math.log(max(equity, floor) / equity_before)
