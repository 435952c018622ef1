"""Risk limits: which actions of v3 a guarded account would have been refused, and why."""

from pathlib import Path

import pytest

from rlv3.errors import ConfigError
from rlv3.events import Action
from rlv3.portfolio import DEFAULT_COSTS
from shadow.risk import ALLOWED, DAY_US, RiskGuard, RiskLimits, Ruling, engaged


def guard(**limits: float | str) -> RiskGuard:
    return RiskGuard(RiskLimits(**limits), 10_000.0, DEFAULT_COSTS)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "stops"),
    [
        (None, False), (b"", False), (b"0", False), (b"False", False), (b" off ", False),
        (b"1", True), (b"true", True), (b"ON", True), (b"whatever", True), (b"\xff", True),
    ],
)  # fmt: skip
def test_kill_switch_is_engaged_unless_absent_or_off(value: bytes | None, stops: bool) -> None:
    assert engaged(value) is stops


def test_entries_alone_are_vetoed() -> None:
    ruling = guard(kill_switch="quantum:kill").entry(killed=True)
    assert ruling == Ruling(False, "kill_switch")
    for action in Action:
        entry = action in (Action.LONG, Action.SHORT)
        assert ruling.on(action) == (ruling if entry else ALLOWED)


def test_kill_switch_that_is_not_configured_vetoes_nothing() -> None:
    assert guard(kill_switch="quantum:kill").entry(killed=False) == ALLOWED
    assert guard(max_leverage=1.0).entry(killed=True) == ALLOWED


def test_daily_loss_binds_at_its_bound_and_ends_with_the_day() -> None:
    limits = guard(max_daily_loss=0.02)
    account = limits.arm.account
    assert limits.on_price(5 * DAY_US + 1, 100.0, 0.0)  # begins the day, with 10,000
    assert not limits.on_price(5 * DAY_US + 2, 100.0, 0.0)
    account.balance = 9_800.01
    assert limits.entry(killed=False) == ALLOWED
    account.balance = 9_800.0  # 10,000 x (1 - 0.02)
    assert limits.entry(killed=False) == Ruling(False, "daily_loss")
    assert limits.on_price(6 * DAY_US, 100.0, 0.0)
    assert limits.entry(killed=False) == ALLOWED


def test_gross_exposure_is_measured_against_the_reference_capital() -> None:
    tight, wide = guard(max_gross_exposure=0.11), guard(max_gross_exposure=0.12)
    for limits in (tight, wide):  # an entry is 10 % of 12,000 = 12 % of the capital
        limits.arm.account.balance = 12_000.0
    assert wide.entry(killed=False) == ALLOWED
    assert tight.entry(killed=False) == Ruling(False, "gross_exposure")


def test_leverage_is_measured_against_equity() -> None:
    assert guard(max_leverage=0.10).entry(killed=False) == ALLOWED
    assert guard(max_leverage=0.09).entry(killed=False) == Ruling(False, "leverage")


def test_a_vetoed_step_leaves_the_account_alone_and_an_exit_never_does() -> None:
    limits = guard(kill_switch="quantum:kill")
    limits.on_price(1, 100.0, 0.0)
    limits.step(Action.LONG, limits.entry(killed=True), 1, 1, 100.0, 0.0)
    assert limits.arm.account.quantity == 0.0
    limits.step(Action.LONG, limits.entry(killed=False), 1, 1, 100.0, 0.0)
    assert limits.arm.account.quantity == 10.0  # 10 % of 10,000 at 100
    limits.step(Action.CLOSE, limits.entry(killed=True), 1, 1, 100.0, 0.0)
    assert limits.arm.account.quantity == 0.0


def test_guard_survives_a_restart() -> None:
    before = guard(max_daily_loss=0.1)
    before.on_price(3 * DAY_US, 100.0, 0.0)
    before.step(Action.SHORT, ALLOWED, 3 * DAY_US, 3 * DAY_US, 100.0, 0.0)
    after = guard(max_daily_loss=0.1)
    after.load(before.dump(), mark=100.0)
    assert after.dump() == before.dump()
    after.arm.account.balance = 8_990.0
    assert after.entry(killed=False) == Ruling(False, "daily_loss")


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
