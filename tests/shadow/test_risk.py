"""Risk limits: which actions of v3 a guarded account would have been refused, and why."""

from pathlib import Path

import pytest

from rlv3.errors import ConfigError
from rlv3.events import Action
from rlv3.portfolio import Account
from shadow.risk import ALLOWED, DAY_US, RiskGuard, RiskLimits, Ruling, engaged


def guard(**limits: float | str) -> RiskGuard:
    return RiskGuard(RiskLimits(**limits))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "stops"),
    [
        (None, False), (b"", False), (b"0", False), (b"False", False), (b" off ", False),
        (b"1", True), (b"true", True), (b"ON", True), (b"whatever", True), (b"\xff", True),
    ],
)  # fmt: skip
def test_kill_switch_is_engaged_unless_absent_or_off(value: bytes | None, stops: bool) -> None:
    assert engaged(value) is stops


def test_entries_are_vetoed_while_killed_and_exits_never() -> None:
    limits = guard(kill_switch="quantum:kill")
    account = Account()
    account.mark = 100.0
    for action in Action:
        expected = action not in (Action.LONG, Action.SHORT)
        assert limits.rule(action, account, killed=True).allowed is expected
        assert limits.rule(action, account, killed=False) == ALLOWED
    assert limits.rule(Action.LONG, account, killed=True) == Ruling(False, "kill_switch")


def test_kill_switch_that_is_not_configured_vetoes_nothing() -> None:
    assert guard(max_leverage=1.0).rule(Action.LONG, Account(), killed=True) == ALLOWED


def test_daily_loss_binds_at_its_bound_and_ends_with_the_day() -> None:
    limits = guard(max_daily_loss=0.02)
    account = Account(10_000.0)
    assert limits.mark(5 * DAY_US + 1, 10_000.0)
    assert not limits.mark(5 * DAY_US + 2, 9_000.0)  # the same day goes on from its first equity
    account.balance = 9_800.01
    assert limits.rule(Action.SHORT, account, killed=False) == ALLOWED
    account.balance = 9_800.0  # 10,000 x (1 - 0.02)
    assert limits.rule(Action.SHORT, account, killed=False) == Ruling(False, "daily_loss")
    assert limits.rule(Action.CLOSE, account, killed=False) == ALLOWED
    assert limits.mark(6 * DAY_US, 9_800.0)
    assert limits.rule(Action.SHORT, account, killed=False) == ALLOWED


def test_gross_exposure_is_measured_against_the_reference_capital() -> None:
    account = Account(10_000.0)
    account.balance = 12_000.0  # an entry is 10 % of equity = 1,200 = 12 % of the capital
    assert guard(max_gross_exposure=0.12).rule(Action.LONG, account, killed=False) == ALLOWED
    found = guard(max_gross_exposure=0.11).rule(Action.LONG, account, killed=False)
    assert found == Ruling(False, "gross_exposure")


def test_leverage_is_measured_against_equity() -> None:
    account = Account(10_000.0)
    assert guard(max_leverage=0.10).rule(Action.LONG, account, killed=False) == ALLOWED
    found = guard(max_leverage=0.09).rule(Action.LONG, account, killed=False)
    assert found == Ruling(False, "leverage")


def test_guard_survives_a_restart() -> None:
    before = guard(max_daily_loss=0.1)
    before.mark(3 * DAY_US, 5_000.0)
    after = guard(max_daily_loss=0.1)
    after.load(before.dump())
    account = Account(10_000.0)
    account.balance = 4_500.0
    assert after.rule(Action.LONG, account, killed=False) == Ruling(False, "daily_loss")


def test_limits_come_from_a_file_and_survive_a_dump(tmp_path: Path) -> None:
    file = tmp_path / "limits.toml"
    file.write_text('max_gross_exposure = 1\nmax_daily_loss = 0.03\nkill_switch = "quantum:kill"\n')
    limits = RiskLimits.load(file)
    assert limits == RiskLimits(1.0, None, 0.03, "quantum:kill")
    assert RiskLimits.restore(limits.dump()) == limits


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_drawdown = 1", "max_drawdown"),
        ("", "found none"),
        ("max_leverage = 0", "max_leverage must be a number > 0, was 0"),
        ("max_leverage = true", "max_leverage must be a number > 0, was True"),
        ("max_daily_loss = nan", "max_daily_loss must be a number > 0, was nan"),
        ("kill_switch = 3", "kill_switch must be the name of a key, was 3"),
        ("max_leverage", "expected a TOML file of limits"),
    ],
)
def test_limits_that_make_no_sense_are_refused(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "limits.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=words):
        RiskLimits.load(file)
