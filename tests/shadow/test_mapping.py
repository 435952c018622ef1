from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlv3.events import Action
from rlv3.portfolio import DEFAULT_COSTS, Account, Costs
from shadow.mapping import V2Target, v2_target, v3_direction, v3_target


@pytest.mark.parametrize(
    ("base", "confidence", "weight", "direction", "effective"),
    [
        (1, 0.7, 0.5, 0, 0.35),
        (1, 0.7, 0.75, 0, 0.525),
        (1, 0.7, 1.0, 1, 0.7),
        (1, 0.7, 1.25, 1, 0.875),
        (-1, 0.7, 1.5, -1, 1.0),  # 1.05 is clipped
        (-1, 0.6, 1.0, -1, 0.6),  # the threshold itself is enough
        (-1, 0.59, 1.0, 0, 0.59),
        (0, 1.0, 1.5, 0, 1.0),  # v2 has no side of its own
        (1, -0.2, 1.0, 0, 0.0),
    ],
)
def test_v2_follows_the_signal_from_the_threshold_on(
    base: int, confidence: float, weight: float, direction: int, effective: float
) -> None:
    mapped = v2_target(base, confidence, weight, 1.0)
    assert mapped.direction == direction
    assert mapped.effective_confidence == pytest.approx(effective, abs=1e-15)
    assert mapped.target == direction * 0.1


@pytest.mark.parametrize(
    ("multiplier", "size"),
    [(0.5, 0.05), (0.75, 0.075), (1.0, 0.10), (1.5, 0.15), (2.0, 0.20), (0.1, 0.05), (9.0, 0.20)],
)
def test_v2_size_is_a_tenth_times_the_multiplier_within_bounds(
    multiplier: float, size: float
) -> None:
    mapped = v2_target(-1, 0.9, 1.0, multiplier)
    assert mapped.size_fraction == pytest.approx(size, abs=1e-15)
    assert mapped.target == -mapped.size_fraction
    assert not mapped.multiplier_assumed


def test_v2_without_sizing_takes_a_multiplier_of_one_and_says_so() -> None:
    assert v2_target(1, 0.8, 1.0, None) == V2Target(1, 0.8, 0.1, 0.1, True)


def test_v2_threshold_is_a_setting() -> None:
    assert v2_target(1, 0.7, 1.0, 1.0, 0.75).direction == 0
    assert v2_target(1, 0.7, 0.5, 1.0, 0.0).direction == 1  # follow-signal


@pytest.mark.parametrize(
    ("action", "direction", "from_flat", "from_long", "from_short"),
    [
        (Action.HOLD, None, 0.0, 0.08, -0.08),
        (Action.LONG, 1, 0.1, 0.08, -0.08),
        (Action.SHORT, -1, -0.1, 0.08, -0.08),
        (Action.REDUCE, None, 0.0, 0.04, -0.04),
        (Action.CLOSE, 0, 0.0, 0.0, 0.0),
        (Action.EMERGENCY_FLATTEN, 0, 0.0, 0.0, 0.0),
    ],
)
def test_v3_actions_as_documented(
    action: Action, direction: int | None, from_flat: float, from_long: float, from_short: float
) -> None:
    assert v3_direction(action) == direction
    assert v3_target(action, 0.0, DEFAULT_COSTS) == from_flat
    assert v3_target(action, 0.08, DEFAULT_COSTS) == from_long
    assert v3_target(action, -0.08, DEFAULT_COSTS) == from_short


def test_v3_reverses_only_where_the_rules_say_so() -> None:
    costs = Costs(entry_fraction=0.2, on_opposite="reverse")
    assert v3_target(Action.LONG, -0.08, costs) == 0.2
    assert v3_target(Action.SHORT, 0.08, costs) == -0.2
    assert v3_target(Action.LONG, 0.08, costs) == 0.08


@given(st.lists(st.sampled_from(list(Action)), max_size=12), st.sampled_from(["ignore", "reverse"]))
def test_v3_target_is_what_the_account_holds(actions: list[Action], on_opposite: str) -> None:
    # at one price, without costs, dust rule or cool-down the account does what the mapping says
    costs = Costs(fee_rate=0.0, min_notional=0.0, flatten_cooldown_steps=0, on_opposite=on_opposite)
    account, target = Account(1_000.0, costs), 0.0
    for action in actions:
        account.act(action, 100.0, 0.0)
        target = v3_target(action, target, costs)
        assert account.exposure == pytest.approx(target, abs=1e-12)
