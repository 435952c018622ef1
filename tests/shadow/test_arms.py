from __future__ import annotations

import pytest

from rlv3.events import Action
from rlv3.portfolio import Costs
from shadow.arms import Arm, Order

COSTS = Costs(fee_rate=0.001)
S = 1_000_000


def test_order_waits_for_the_first_price_at_or_after_its_due_time() -> None:
    arm = Arm(1_000.0, COSTS)
    arm.on_price(0, 100.0, 0.0)
    arm.place(Order(5 * S, None, 0.5), 0, 100.0, 0.0)
    arm.on_price(4 * S, 110.0, 0.0)
    assert arm.account.quantity == 0.0
    arm.on_price(5 * S, 125.0, 0.0)
    # 0.5 * 1000 / 125 = 4 units; fee 0.001 * 500 = 0.5
    assert arm.account.quantity == 4.0
    assert arm.account.balance == 999.5
    assert arm.order is None


def test_order_due_at_the_last_price_fills_there() -> None:
    arm = Arm(1_000.0, COSTS)
    arm.on_price(7, 100.0, 0.0)
    arm.place(Order(7, None, -0.1), 7, 100.0, 0.0)
    assert arm.account.quantity == -1.0
    assert arm.order is None


def test_return_of_the_exposure_held_comes_before_the_fill() -> None:
    arm = Arm(1_000.0, COSTS)
    arm.on_price(0, 100.0, 0.0)
    arm.place(Order(0, None, 0.5), 0, 100.0, 0.0)  # +5 units, fee 0.5
    arm.place(Order(10, None, 0.0), 0, 100.0, 0.0)
    arm.on_price(10, 110.0, 0.0)  # earns 5 * 10, then closes: fee 0.001 * 550
    assert arm.account.quantity == 0.0
    assert arm.account.equity == pytest.approx(1_000 - 0.5 + 50 - 0.55, abs=1e-12)


def test_bar_row_separates_gross_fee_and_slippage() -> None:
    arm = Arm(1_000.0, COSTS)
    arm.on_price(0, 100.0, 0.01)
    arm.place(Order(0, None, 0.5), 0, 100.0, 0.01)  # notional 500: fee 0.5, slippage 5
    arm.on_price(1, 102.0, 0.01)  # +10
    row = arm.bar()
    assert row.gross == pytest.approx(0.010, abs=1e-12)
    assert row.fee == pytest.approx(0.0005, abs=1e-15)
    assert row.slippage == pytest.approx(0.005, abs=1e-15)
    assert row.turnover == pytest.approx(0.5, abs=1e-15)
    assert row.equity == pytest.approx(1_000 - 5.5 + 10, abs=1e-12)
    again = arm.bar()
    assert (again.gross, again.turnover, again.fee, again.slippage) == (0.0, 0.0, 0.0, 0.0)


def test_late_gross_fills_one_tick_later() -> None:
    arm = Arm(1_000.0, COSTS)
    arm.on_price(0, 100.0, 0.0)
    arm.place(Order(0, None, 0.5), 0, 100.0, 0.0)  # 5 units at 100
    arm.on_price(1, 101.0, 0.0)
    arm.on_price(2, 104.0, 0.0)
    row = arm.bar()
    # on time: 5 * 4 = 20; one tick later the 5 units are bought at 101: 5 * 3 = 15
    assert row.gross == pytest.approx(0.020, abs=1e-12)
    assert row.gross_late == pytest.approx(0.015, abs=1e-12)


def test_late_fill_of_the_last_tick_of_a_bar_counts_in_the_next_bar() -> None:
    arm = Arm(1_000.0, COSTS)
    arm.on_price(0, 100.0, 0.0)
    arm.place(Order(0, None, 0.5), 0, 100.0, 0.0)
    first = arm.bar()
    arm.on_price(1, 102.0, 0.0)
    second = arm.bar()
    assert first.gross_late == first.gross == 0.0
    assert second.gross == pytest.approx(0.010, abs=1e-12)
    assert second.gross_late == 0.0


def test_target_lapses_at_its_expiry() -> None:
    arm = Arm(1_000.0, COSTS)
    arm.on_price(0, 100.0, 0.0)
    arm.target = 0.5
    arm.place(Order(0, None, 0.5), 0, 100.0, 0.0)
    arm.expires_us = 10
    arm.on_price(9, 100.0, 0.0)
    assert arm.account.quantity == 5.0
    arm.on_price(10, 100.0, 0.0)
    assert arm.account.quantity == 0.0
    assert arm.target == 0.0


@pytest.mark.parametrize(
    ("held", "wanted", "allowed"),
    [
        (0.0, 0.1, 0.0),  # no entry
        (0.1, 0.2, 0.1),  # no adding
        (0.1, 0.05, 0.05),  # reducing is an exit
        (0.1, 0.0, 0.0),
        (0.1, -0.1, 0.0),  # a flip exits only
        (-0.1, -0.2, -0.1),
    ],
)
def test_cold_symbol_allows_exits_only(held: float, wanted: float, allowed: float) -> None:
    arm = Arm(1_000.0, COSTS)
    arm.target = held
    assert arm.allow(wanted, warm=False) == allowed
    assert arm.allow(wanted, warm=True) == wanted


def test_action_orders_go_through_the_account() -> None:
    arm = Arm(10_000.0, Costs())
    arm.on_price(0, 100.0, 0.0)
    arm.place(Order(0, Action.SHORT, 0.0), 0, 100.0, 0.0)
    assert arm.account.quantity == -10.0


def test_dump_and_load_continue_identically() -> None:
    one = Arm(1_000.0, COSTS)
    one.on_price(0, 100.0, 1e-4)
    one.place(Order(0, None, 0.5), 0, 100.0, 1e-4)
    one.place(Order(3, None, -0.5), 0, 100.0, 1e-4)
    one.on_price(1, 101.0, 1e-4)
    two = Arm(1_000.0, COSTS)
    two.load(one.dump(), one.dump_tick(), 101.0)
    for arm in (one, two):
        arm.on_price(2, 99.0, 1e-4)
        arm.on_price(3, 98.0, 1e-4)
        arm.on_price(4, 97.0, 1e-4)
    assert one.bar() == two.bar()
    assert one.account.dump() == two.account.dump()
