"""What does a policy's action mean as a target exposure, the common currency of the comparison?

RL v2 says how much to trust a signal (a weight), not a side; RL v3 says what to do with a position.
Both become a signed fraction of equity: what the arm wants to hold after the decision.

v2   direction = side of the signal it judged where confidence * weight >= tau, else flat
     size      = 10 % of equity times the size multiplier, between 5 % and 20 %
v3   LONG, SHORT enter from flat; REDUCE halves; CLOSE, EMERGENCY_FLATTEN go flat; HOLD keeps

Leverage is logged and plays no part: RL v3 has none. Strategy and model are names without an
implementation anywhere, so no strategy turns a side round.
"""

from __future__ import annotations

from typing import NamedTuple

from rlv3.events import Action
from rlv3.portfolio import Costs

DEFAULT_TAU = 0.60
"""Effective confidence from which a signal is followed: production's default threshold."""
BASE_FRACTION = 0.10
"""Size of a multiplier of 1: the fraction of equity that RL v3 enters with."""
MIN_FRACTION, MAX_FRACTION = 0.05, 0.20
ASSUMED_MULTIPLIER = 1.0


class V2Target(NamedTuple):
    """A decision of RL v2 as a target exposure."""

    direction: int
    """-1, 0 or +1."""
    effective_confidence: float
    size_fraction: float
    """Size that `direction` is taken with, also where it is 0."""
    target: float
    """direction * size_fraction."""
    multiplier_assumed: bool
    """There was no sizing decision; a multiplier of 1 was taken."""


def v2_target(
    base_direction: int,
    signal_confidence: float,
    weight: float,
    size_multiplier: float | None,
    tau: float = DEFAULT_TAU,
) -> V2Target:
    """Map a v2 decision to a target exposure.

    Args:
        base_direction: side of the signal that v2 judged: -1, 0 or +1.
        signal_confidence: 0..1.
        weight: of the meta action, 0.5..1.5.
        size_multiplier: of the sizing action; None where v2 has not sized.
        tau: effective confidence from which the signal is followed.
    """
    assumed = size_multiplier is None
    multiplier = ASSUMED_MULTIPLIER if size_multiplier is None else size_multiplier
    effective = min(max(signal_confidence * weight, 0.0), 1.0)
    direction = base_direction if effective >= tau else 0
    size = min(max(BASE_FRACTION * multiplier, MIN_FRACTION), MAX_FRACTION)
    return V2Target(direction, effective, size, direction * size, assumed)


_V3_DIRECTION: tuple[int | None, ...] = (None, 1, -1, None, 0, 0)  # by action index


def v3_direction(action: int) -> int | None:
    """Return the side a v3 action asks for; None where it abstains (HOLD and REDUCE)."""
    return _V3_DIRECTION[action]


def v3_target(action: int, exposure: float, costs: Costs) -> float:
    """Return the exposure in force after a v3 action.

    Args:
        exposure: in force before, as a signed fraction of equity.
        costs: its `entry_fraction` and `on_opposite` decide what LONG and SHORT do.
    """
    if action in (Action.LONG, Action.SHORT):
        want = costs.entry_fraction if action == Action.LONG else -costs.entry_fraction
        reverses = exposure * want < 0.0 and costs.on_opposite == "reverse"
        return want if exposure == 0.0 or reverses else exposure
    if action == Action.REDUCE:
        return exposure / 2
    if action in (Action.CLOSE, Action.EMERGENCY_FLATTEN):
        return 0.0
    return exposure
