"""The account: hand-worked trades, masks and cool-down, and an independent exact ledger."""

from __future__ import annotations

from decimal import Decimal, localcontext

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlv3.events import Action
from rlv3.portfolio import FLAT, HOLD_ONLY, IN_POSITION, Account, Costs

FREE = Costs(fee_rate=0.0)


def test_long_round_trip_by_hand() -> None:
    account = Account(10_000.0)
    account.act(Action.LONG, 100.0, 1e-4)
    # 10 % of 10,000 is 1,000: 10 units; fee 0.4, half-spread 0.1
    assert account.quantity == 10.0
    assert (account.fees_paid, account.slippage_paid) == pytest.approx((0.4, 0.1), abs=1e-12)
    assert account.balance == pytest.approx(9_999.5, abs=1e-9)
    account.mark_to(110.0)
    assert account.unrealised == pytest.approx(100.0, abs=1e-9)
    assert account.equity == pytest.approx(10_099.5, abs=1e-9)
    assert account.balance == pytest.approx(9_999.5, abs=1e-9)  # nothing is realised yet
    account.mark_to(110.0)
    assert account.equity == pytest.approx(10_099.5, abs=1e-9)  # marking twice earns nothing
    account.act(Action.REDUCE, 110.0, 1e-4)
    # 5 units sold at 110: profit 50; notional 550: fee 0.22, half-spread 0.055
    assert account.quantity == 5.0
    assert account.realised == pytest.approx(50.0, abs=1e-9)
    assert account.balance == pytest.approx(9_999.5 + 50.0 - 0.275, abs=1e-9)
    account.act(Action.CLOSE, 120.0, 1e-4)
    # 5 units at 120: profit 100; notional 600: fee 0.24, half-spread 0.06
    assert (account.quantity, account.entry_price) == (0.0, 0.0)
    assert account.balance == account.equity == pytest.approx(10_148.925, abs=1e-9)
    assert account.turnover == pytest.approx(1_000.0 + 550.0 + 600.0, abs=1e-9)


def test_short_earns_when_the_price_falls() -> None:
    account = Account(10_000.0, FREE)
    account.act(Action.SHORT, 100.0, 0.0)
    assert account.quantity == -10.0
    account.mark_to(90.0)
    assert account.unrealised == 100.0
    assert account.features() == pytest.approx((900 / 10_100, -1.0, 1.01, 0.01))
    account.act(Action.EMERGENCY_FLATTEN, 95.0, 0.0)
    assert account.balance == 10_050.0


def test_profit_of_a_held_position_is_counted_once() -> None:
    account = Account(10_000.0, FREE)
    account.act(Action.LONG, 100.0, 0.0)
    for _ in range(100):
        account.mark_to(101.0)
    assert account.equity == pytest.approx(10_010.0, abs=1e-9)


def test_opposite_action_is_ignored_or_reverses() -> None:
    ignoring, reversing = (
        Account(10_000.0, FREE),
        Account(10_000.0, Costs(0.0, on_opposite="reverse")),
    )
    for account in (ignoring, reversing):
        account.act(Action.LONG, 100.0, 0.0)
        account.act(Action.LONG, 100.0, 0.0)  # no adding
        account.act(Action.SHORT, 110.0, 0.0)
    assert ignoring.quantity == 10.0
    # 100 realised, then short 10 % of 10,100 at 110
    assert reversing.balance == pytest.approx(10_100.0, abs=1e-9)
    assert reversing.quantity == pytest.approx(-1_010 / 110, rel=1e-12)
    assert reversing.entry_price == 110.0


def test_reducing_leaves_no_dust() -> None:
    account = Account(10_000.0, FREE)
    account.act(Action.LONG, 100.0, 0.0)
    notionals = []
    while account.quantity:
        account.act(Action.REDUCE, 100.0, 0.0)
        notionals.append(account.quantity * 100.0)
    # 1,000 halves to 15.625; its half, 7.8125, is below 10: closed
    assert notionals == [500.0, 250.0, 125.0, 62.5, 31.25, 15.625, 0.0]


def test_flatten_stands_aside_for_fifteen_steps() -> None:
    account = Account(10_000.0)
    account.act(Action.LONG, 100.0, 0.0)
    assert account.valid_actions() == IN_POSITION
    account.end_step()
    account.act(Action.EMERGENCY_FLATTEN, 100.0, 0.0)
    for _ in range(15):
        assert account.valid_actions() == HOLD_ONLY
        assert account.valid_actions(use_masks=False) == (True, False, False, True, True, True)
        assert account.act(Action.LONG, 100.0, 0.0) == 0.0
        account.end_step()
    assert account.valid_actions() == FLAT
    assert account.act(Action.LONG, 100.0, 0.0) > 0.0


def test_masks() -> None:
    account = Account(10_000.0)
    assert account.valid_actions() == (True, True, True, False, False, False)
    assert account.valid_actions(cold=True) == HOLD_ONLY
    assert account.valid_actions(pending=True) == HOLD_ONLY
    assert account.valid_actions(use_masks=False) == (True,) * 6
    assert account.valid_actions(use_masks=False, cold=True) == (
        True,
        False,
        False,
        True,
        True,
        True,
    )
    account.act(Action.SHORT, 100.0, 0.0)
    assert account.valid_actions() == (True, False, False, True, True, True)
    assert account.valid_actions(cold=True) == IN_POSITION  # exits stay allowed
    assert account.valid_actions(pending=True) == HOLD_ONLY
    reversing = Account(10_000.0, Costs(on_opposite="reverse"))
    reversing.act(Action.SHORT, 100.0, 0.0)
    assert reversing.valid_actions() == (True, True, False, True, True, True)
    assert reversing.valid_actions(cold=True) == IN_POSITION


def test_ruin_closes_once_and_ends_trading() -> None:
    account = Account(10_000.0, FREE)
    account.act(Action.SHORT, 100.0, 0.0)
    account.mark_to(900.0)  # 10 units lose 800 each: equity 2,000, the ruin line
    assert account.ruined
    assert account.quantity == 0.0
    assert account.equity == 2_000.0
    assert account.valid_actions() == account.valid_actions(use_masks=False) == HOLD_ONLY
    assert account.act(Action.LONG, 900.0, 0.0) == 0.0
    assert account.rebalance(0.1, 900.0, 0.0) == 0.0


def test_drawdown_is_measured_from_the_peak() -> None:
    account = Account(10_000.0, FREE)
    account.act(Action.LONG, 100.0, 0.0)
    for price in (200.0, 90.0, 150.0):
        account.mark_to(price)
    # equity 11,000, then 9,900, then 10,500
    assert account.peak_equity == 11_000.0
    assert account.max_drawdown == pytest.approx(0.1, abs=1e-12)
    assert account.drawdown == pytest.approx(1 - 10.5 / 11, abs=1e-12)


def test_rebalance_reaches_its_target() -> None:
    account = Account(10_000.0, FREE)
    account.rebalance(0.2, 100.0, 0.0)
    assert account.exposure == pytest.approx(0.2, abs=1e-12)
    account.rebalance(-0.05, 50.0, 0.0)
    # 20 units lose 50 each: equity 9,000, target -450 at 50
    assert account.equity == 9_000.0
    assert account.quantity == pytest.approx(-9.0, abs=1e-12)
    account.rebalance(0.0, 50.0, 0.0)
    assert account.quantity == 0.0


@pytest.mark.parametrize("price", [0.0, -1.0, float("nan")])
def test_a_price_that_is_none_is_refused(price: float) -> None:
    with pytest.raises(ValueError, match="price must be > 0"):
        Account().trade(1.0, price, 0.0)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.floats(50.0, 200.0)), max_size=40), st.integers(0, 40)
)
def test_account_continues_from_its_values(steps: list[tuple[int, float]], cut: int) -> None:
    whole, first, second = Account(), Account(), Account()
    for account, part in ((whole, steps), (first, steps[:cut])):
        for action, price in part:
            account.mark_to(price)
            account.act(action, price, 1e-4)
    second.load(first.dump())
    for action, price in steps[cut:]:
        second.mark_to(price)
        second.act(action, price, 1e-4)
    assert second.dump() == whole.dump()


# -- an independent ledger in exact arithmetic -----------------------------------------------------

ZERO = Decimal(0)


class Ledger:
    """Cash and book value in 40-digit decimals: no entry price, no realised profit is kept.

    equity = cash + quantity * price, unrealised = quantity * price - book value.
    """

    def __init__(self, initial: float, costs: Costs) -> None:
        self.initial = Decimal(initial)
        self.cash = self.initial
        self.quantity = self.book = ZERO
        self.fee_rate = Decimal(costs.fee_rate)
        self.fraction = Decimal(costs.entry_fraction)
        self.reverse = costs.on_opposite == "reverse"
        self.cooldown = 0
        self.ruined = False

    def equity(self, price: Decimal) -> Decimal:
        return self.cash + self.quantity * price

    def fill(self, change: Decimal, price: Decimal, half: Decimal) -> None:
        if change == 0:
            return
        new = self.quantity + change
        if self.quantity * change >= 0:
            self.book += change * price
        elif self.quantity * new > 0:
            self.book = self.book * new / self.quantity
        else:
            self.book = new * price
        self.quantity = new
        self.cash -= change * price + abs(change) * price * (self.fee_rate + half)

    def mark(self, price: Decimal, half: Decimal) -> None:
        if not self.ruined and self.equity(price) * 5 <= self.initial:
            self.ruined = True
            self.fill(-self.quantity, price, half)

    def act(self, action: int, price: Decimal, half: Decimal) -> None:
        held = self.quantity
        if action in (1, 2):
            want = 3 - 2 * action
            free = not self.ruined and self.cooldown == 0
            if free and (held == 0 or (self.reverse and held * want < 0)):
                self.fill(want * self.fraction * self.equity(price) / price - held, price, half)
        elif action == 3:
            dust = abs(held) * price < 20
            self.fill(-held if dust else -held / 2, price, half)
        elif action == 4:
            self.fill(-held, price, half)
        elif action == 5:
            self.fill(-held, price, half)
            self.cooldown = 15


def random_prices(rng: np.random.Generator, n: int, wild: bool) -> list[float]:
    """Return prices around a level; wild ones jump by up to twenty times, which ruins shorts."""
    log = np.cumsum(rng.normal(0.0, rng.choice([1e-3, 1e-2]), n))
    if wild:
        log = rng.normal(0.0, 0.15, n) + (rng.random(n) < 0.005) * rng.uniform(1.0, 3.0, n)
    return (rng.choice([1e-3, 1.0, 5e4]) * np.exp(log)).tolist()


ACTION_SHARES = (0.24, 0.24, 0.24, 0.2, 0.06, 0.02)  # few flattens: each bars entries for 15 steps


def test_a_million_random_actions_agree_with_the_exact_ledger() -> None:
    rng = np.random.default_rng(20_240_607)
    initial, steps, worst, ruined, trades = 10_000.0, 1_000, 0.0, 0, 0
    with localcontext() as context:
        context.prec = 40
        for episode in range(1_000):
            costs = Costs(
                fee_rate=float(rng.choice([0.0, 4e-4, 2e-3])),
                on_opposite="reverse" if episode % 2 else "ignore",
            )
            account, ledger = Account(initial, costs), Ledger(initial, costs)
            prices = random_prices(rng, steps, wild=episode % 5 == 0)
            halves = rng.choice([0.0, 1e-4, 1.3e-3], steps).tolist()
            actions = rng.choice(6, steps, p=ACTION_SHARES).tolist()
            for price, half, action in zip(prices, halves, actions, strict=True):
                exact, exact_half = Decimal(price), Decimal(half)
                account.mark_to(price, half)
                ledger.mark(exact, exact_half)
                account.end_step()
                ledger.cooldown = max(ledger.cooldown - 1, 0)
                account.act(action, price, half)
                ledger.act(action, exact, exact_half)
                equity = ledger.equity(exact)
                unrealised = ledger.quantity * exact - ledger.book
                worst = max(
                    worst,
                    abs(account.equity - float(equity)),
                    abs(account.unrealised - float(unrealised)),
                    abs(account.balance - float(equity - unrealised)),
                )
            assert account.ruined == ledger.ruined
            ruined += account.ruined
            trades += account.turnover > 0.0
    assert worst <= 1e-9 * initial
    assert ruined >= 20
    assert trades == 1_000
