"""One account per arm and symbol, on the same prices, costs and latency.

An arm either carries out actions (v3) or holds a target exposure (v2, follow_signal). Both go
through orders: an order placed at decision time fills at the first price at or after
`decision time + latency`. At every price an arm first earns the return of the exposure it held,
then due orders fill at that price.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from rlv3.portfolio import Account, Costs
from shadow.records import ArmBar


class Order(NamedTuple):
    """What is to be done at the first price at or after `due_us`."""

    due_us: int
    action: int | None
    """Carry out this action, or"""
    target: float
    """trade to this exposure (when `action` is None)."""


class Arm:
    """An account with its standing target, its pending order and the sums of the open bar.

    Attributes:
        target: exposure in force, as a signed fraction of equity: what the last decision wants.
        order: the pending order; a newer decision replaces it.
        expires_us: event time at which a target lapses to flat, None if it does not.
    """

    __slots__ = (
        "_fees", "_late_gain", "_late_price", "_late_quantity", "_slippage", "_turnover", "_value",
        "account", "expires_us", "order", "target",
    )  # fmt: skip

    def __init__(self, initial_balance: float, costs: Costs) -> None:
        self.account = Account(initial_balance, costs)
        self.target = 0.0
        self.order: Order | None = None
        self.expires_us: int | None = None
        self._late_quantity = self._late_price = self._late_gain = 0.0
        self._open_bar()

    def _open_bar(self) -> None:
        account = self.account
        self._fees = account.fees_paid
        self._slippage = account.slippage_paid
        self._turnover = account.turnover
        self._value = account.equity + account.fees_paid + account.slippage_paid
        self._late_gain = 0.0

    def on_price(self, ts_us: int, price: float, half_spread: float) -> bool:
        """Mark at a price, then fill what is due; return True when more than the mark changed."""
        account = self.account
        held = account.quantity
        if held == 0.0 and self.order is None and self._late_quantity == 0.0:
            account.mark = price
            return False
        changed = self._late_quantity != 0.0
        if changed:
            self._late_gain -= self._late_quantity * (price - self._late_price)
            self._late_quantity = 0.0
        account.mark_to(price, half_spread)
        if self.expires_us is not None and ts_us >= self.expires_us:
            self.expires_us = None
            self.target = 0.0
            self.order = Order(ts_us, None, 0.0)
        order = self.order
        if order is not None and ts_us >= order.due_us:
            self._fill(order, price, half_spread)
            changed = True
        if account.quantity != held:
            self._late_quantity = account.quantity - held
            self._late_price = price
            changed = True
        return changed

    def place(self, order: Order, ts_us: int, price: float, half_spread: float) -> None:
        """Place an order; it fills now when the last price is already at or after its due time."""
        self.order = order
        if price > 0.0 and ts_us >= order.due_us:
            held = self.account.quantity
            self._fill(order, price, half_spread)
            self._late_quantity += self.account.quantity - held
            self._late_price = price

    def _fill(self, order: Order, price: float, half_spread: float) -> None:
        self.order = None
        if order.action is not None:
            self.account.act(order.action, price, half_spread)
        else:
            self.account.rebalance(order.target, price, half_spread)

    def bar(self) -> ArmBar:
        """Return what happened in the bar that just closed, and begin the next one.

        To be called while the account is still marked at the bar's last price.
        """
        account = self.account
        capital = account.initial
        equity = account.equity
        fee = account.fees_paid - self._fees
        slippage = account.slippage_paid - self._slippage
        gross = equity + account.fees_paid + account.slippage_paid - self._value
        row = ArmBar(
            exposure=account.exposure,
            gross=gross / capital,
            turnover=(account.turnover - self._turnover) / capital,
            fee=fee / capital,
            slippage=slippage / capital,
            gross_late=(gross + self._late_gain) / capital,
            equity=equity,
            ruined=account.ruined,
        )
        self._open_bar()
        return row

    def allow(self, target: float, warm: bool) -> float:
        """Return the target an arm may take: nobody enters or adds while its symbol is cold."""
        if warm:
            return target
        held = self.target
        if target * held <= 0.0:
            return 0.0
        return target if abs(target) <= abs(held) else held

    def dump_tick(self) -> tuple[Any, ...]:
        """Return what a price changes, besides the mark itself."""
        account = self.account
        return account.peak_equity, account.max_drawdown, self._late_gain

    def dump(self) -> tuple[Any, ...]:
        """Return what orders, fills and bars change."""
        return (
            self.account.dump(), self.target, self.order, self.expires_us, self._late_quantity,
            self._late_price, self._fees, self._slippage, self._turnover, self._value,
        )  # fmt: skip

    def load(self, values: Any, tick: Any, mark: float) -> None:
        """Restore both dumps and the last price."""
        account, self.target, order, self.expires_us, self._late_quantity = values[:5]
        self._late_price, self._fees, self._slippage, self._turnover, self._value = values[5:]
        self.account.load(account)
        self.order = None if order is None else Order(*order)
        self.account.peak_equity, self.account.max_drawdown, self._late_gain = tick
        if mark > 0.0:
            self.account.mark = mark
