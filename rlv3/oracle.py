"""What is the most an account could have earned on a series, had it known every price?

The optimum is exact for the environment's own rules: orders fill at the open that follows a row,
one action per row, entries of a fixed fraction of equity, fee and half-spread on every fill, no
entry while features are cold, an open position counted at the last mark.

Why it needs no account in its state. A position's profit is linear in its size, and its size is a
fraction of the equity it was opened with; so a trade from row t to row u multiplies equity by
1 + f * g(t, u), whatever that equity was, and log equity adds up over trades:

    V(t) = max( V(t+1),  max over side and u > t of  log(1 + f * g_side(t, u)) + V(u+1) )
    g_long(t, u)  = (p[u] - p[t]) / p[t] - c[t] - c[u] * p[u] / p[t]
    g_short(t, u) = (p[t] - p[u]) / p[t] - c[t] - c[u] * p[u] / p[t]        c = fee + half-spread

V(T) = 0, and a position still open at the end pays no exit. The two actions that are left out are
never better, because V falls with t (waiting is always allowed). REDUCE at row a of a trade that
ends at u earns the mean of "close at a" and "hold until u"; if closing is worth more, CLOSE at a
earns more and is flat sooner, else HOLD earns more. EMERGENCY_FLATTEN is CLOSE with a cool-down.
So size levels and cool-downs need no state of their own. The test searches all six actions.

Not in the formula: the dust and ruin rules (an account that is ruined before its optimum pays), and
`on_opposite="reverse"`, which is refused.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlv3.errors import ConfigError
from rlv3.events import Action
from rlv3.features import feature_matrix
from rlv3.market import Bars
from rlv3.portfolio import DEFAULT_COSTS, Costs

HALF_SPREAD = 1e-4
_REGIME_MISSING = 1 << 10
_QUOTE_MISSING = 1 << 16


class Optimum(NamedTuple):
    """The best that was possible on a series, and how."""

    net_profit: float
    """In account currency: equity at the end minus the initial balance."""
    log_growth: float
    """Sum of the environment's `net_return` rewards on the way."""
    actions: NDArray[np.int64]
    """One action per step, from the first warm row on: HOLD, LONG, SHORT or CLOSE."""
    first: int
    """The first warm row, where the environment starts."""


def optimal_actions(
    bars: Bars,
    costs: Costs = DEFAULT_COSTS,
    *,
    half_spread: float = HALF_SPREAD,
    initial: float = 10_000.0,
) -> Optimum:
    """Return the optimum of a series by dynamic programming; O(T^2) time, O(T) memory.

    Args:
        half_spread: charged where no quote is known, as a fraction.
    Raises:
        ConfigError: `on_opposite="reverse"`.
    """
    if costs.on_opposite != "ignore":
        raise ConfigError(f"on_opposite must be ignore here, was {costs.on_opposite!r}")
    raw, missing = feature_matrix(
        bars.end_us, bars.close, bars.volume, bars.spread, bars.step_seconds
    )
    cold = missing & _REGIME_MISSING != 0
    quoted = missing & _QUOTE_MISSING == 0
    rows = np.flatnonzero(~cold[:-2])
    if not len(rows):
        return Optimum(0.0, 0.0, np.zeros(0, dtype=np.int64), len(bars.close))
    first = int(rows[0])
    cost = costs.fee_rate + np.where(quoted, raw[:, 16] / 2, half_spread)
    price = bars.open[first + 1 :]
    growth, actions = _best(price, cost[first:-2], ~cold[first:-2], costs.entry_fraction)
    return Optimum(initial * math.expm1(growth), growth, actions, first)


def optimal_net_profit(
    bars: Bars,
    costs: Costs = DEFAULT_COSTS,
    *,
    half_spread: float = HALF_SPREAD,
    initial: float = 10_000.0,
) -> float:
    """Return the optimal net profit of a series (see `optimal_actions`)."""
    return optimal_actions(bars, costs, half_spread=half_spread, initial=initial).net_profit


def _best(
    price: NDArray[np.float64],
    cost: NDArray[np.float64],
    may_enter: NDArray[np.bool_],
    fraction: float,
) -> tuple[float, NDArray[np.int64]]:
    """Return the best log growth and its actions.

    Args:
        price: float64[T + 1], fill price of every step and the last mark.
        cost: float64[T], fee plus half-spread of a fill at every step.
        may_enter: bool[T].
        fraction: of equity, of an entry.
    """
    n = len(cost)
    paid = np.append(cost, 0.0) * price  # exit costs per unit; none at the last mark
    value = np.zeros(n + 2)  # flat before the action of step t
    exit_value = value[1:]  # after a close at step u the next action is step u + 1's
    choice = np.zeros((n, 2), dtype=np.int64)  # side, exit
    for t in range(n - 1, -1, -1):
        value[t] = value[t + 1]
        if not may_enter[t]:
            continue
        later = price[t + 1 :]
        for side in (1, -1):
            gain = (side * (later - price[t]) - paid[t + 1 :]) / price[t] - cost[t]
            worth = np.log1p(fraction * np.maximum(gain, -0.99 / fraction)) + exit_value[t + 1 :]
            best = int(worth.argmax())
            if worth[best] > value[t]:
                value[t] = worth[best]
                choice[t] = side, t + 1 + best
    return float(value[0]), _walk(choice)


def _walk(choice: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the actions that the chosen trades are made of."""
    n = len(choice)
    actions = np.zeros(n, dtype=np.int64)
    t = 0
    while t < n:
        side, exit_ = choice[t]
        if side == 0:
            t += 1
            continue
        actions[t] = Action.LONG if side > 0 else Action.SHORT
        if exit_ < n:
            actions[exit_] = Action.CLOSE
        t = int(exit_) + 1
    return actions
