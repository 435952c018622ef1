"""The only profit-and-loss arithmetic: one account, one symbol, traded and marked at prices.

Used by the training environment and by every arm of the comparison, so that both mean the same by
equity. Fills happen at the given price; fee and half-spread are cash costs of the fill, which keeps
gross return, fee and slippage apart:

    balance   = initial + realised profit - fees - slippage
    equity    = balance + quantity * (mark - entry_price)
"""

from __future__ import annotations

from typing import Any, NamedTuple

from rlv3.events import Action


class Costs(NamedTuple):
    """What trading costs and when an account is ruined; frozen for a run, shown in the report."""

    fee_rate: float = 4e-4
    """Exchange fee per side, as a fraction of notional."""
    entry_fraction: float = 0.10
    """Notional of LONG and SHORT as a fraction of equity."""
    min_notional: float = 10.0
    """A reduced position below this closes instead (no dust)."""
    ruin_fraction: float = 0.2
    """At or below this fraction of the initial balance the position closes and trading ends."""
    flatten_cooldown_steps: int = 15
    """Steps without a new entry after EMERGENCY_FLATTEN."""
    on_opposite: str = "ignore"
    """ignore or reverse: what LONG does to a short position, and SHORT to a long one."""


DEFAULT_COSTS = Costs()

HOLD_ONLY = (True, False, False, False, False, False)
FLAT = (True, True, True, False, False, False)
IN_POSITION = (True, False, False, True, True, True)
IN_LONG = (True, False, True, True, True, True)  # on_opposite="reverse"
IN_SHORT = (True, True, False, True, True, True)
ANY = (True, True, True, True, True, True)
NO_ENTRY = (True, False, False, True, True, True)  # without masks, while cold or cooling down


class Account:
    """A paper account of one symbol: balance, signed quantity, entry price, costs, drawdown.

    `balance` moves only by realised profit, fees, slippage and funding; `equity` adds the
    unrealised profit at the last mark.
    """

    __slots__ = (
        "balance", "cooldown", "costs", "entry_price", "fees_paid", "initial", "mark",
        "max_drawdown", "peak_equity", "quantity", "realised", "ruined", "slippage_paid",
        "turnover",
    )  # fmt: skip

    def __init__(self, initial: float = 10_000.0, costs: Costs = DEFAULT_COSTS) -> None:
        self.initial = initial
        self.costs = costs
        self.balance = initial
        self.quantity = 0.0
        self.entry_price = 0.0
        self.mark = 0.0
        self.realised = 0.0
        self.fees_paid = 0.0
        self.slippage_paid = 0.0
        self.turnover = 0.0  # traded notional
        self.peak_equity = initial
        self.max_drawdown = 0.0
        self.cooldown = 0
        self.ruined = False

    @property
    def unrealised(self) -> float:
        """Profit of the open position at the last mark."""
        return self.quantity * (self.mark - self.entry_price)

    @property
    def equity(self) -> float:
        """Balance plus unrealised profit."""
        return self.balance + self.quantity * (self.mark - self.entry_price)

    @property
    def exposure(self) -> float:
        """Signed notional at the last mark as a fraction of equity."""
        if self.quantity == 0.0:
            return 0.0
        equity = self.equity
        return self.quantity * self.mark / equity if equity > 0.0 else 0.0

    @property
    def side(self) -> int:
        """-1 short, 0 flat, +1 long."""
        return (self.quantity > 0.0) - (self.quantity < 0.0)

    @property
    def drawdown(self) -> float:
        """Fall of equity from its peak, as a fraction of the peak."""
        return 1.0 - self.equity / self.peak_equity

    def features(self) -> tuple[float, float, float, float]:
        """Return observation features 6 to 9: size, side, equity/balance, equity/balance - 1."""
        if self.quantity == 0.0:
            return 0.0, 0.0, 1.0, 0.0
        ratio = self.equity / self.balance if self.balance > 0.0 else 1.0
        return abs(self.exposure), float(self.side), ratio, ratio - 1.0

    def mark_to(self, price: float, half_spread: float = 0.0) -> None:
        """Value the position at a price; keep the peak and the drawdown; apply the ruin rule."""
        self.mark = price
        equity = self.equity
        if equity > self.peak_equity:
            self.peak_equity = equity
        else:
            drawdown = 1.0 - equity / self.peak_equity
            if drawdown > self.max_drawdown:
                self.max_drawdown = drawdown
        if equity <= self.costs.ruin_fraction * self.initial and not self.ruined:
            self.ruined = True
            self.trade(-self.quantity, price, half_spread)

    def trade(self, quantity: float, price: float, half_spread: float) -> float:
        """Trade a signed quantity at a price; return the traded notional.

        Realises profit on the part that reduces the position (average entry price), charges
        `fee_rate` and `half_spread` on the notional, and marks the account at the price.

        Raises:
            ValueError: the price is not positive.
        """
        if not price > 0.0:
            raise ValueError(f"price must be > 0, was {price}")
        self.mark = price
        if quantity == 0.0:
            return 0.0
        held = self.quantity
        new = held + quantity
        if held == 0.0 or (held > 0.0) == (quantity > 0.0):
            self.entry_price = (held * self.entry_price + quantity * price) / new
        else:
            closed = -held if abs(quantity) >= abs(held) else quantity
            profit = -closed * (price - self.entry_price)
            self.balance += profit
            self.realised += profit
            if new == 0.0:
                self.entry_price = 0.0
            elif (new > 0.0) != (held > 0.0):
                self.entry_price = price
        self.quantity = new
        notional = abs(quantity) * price
        fee = notional * self.costs.fee_rate
        slippage = notional * half_spread
        self.balance -= fee + slippage
        self.fees_paid += fee
        self.slippage_paid += slippage
        self.turnover += notional
        return notional

    def rebalance(self, target: float, price: float, half_spread: float) -> float:
        """Trade to a signed fraction of equity (arms that hold target exposures)."""
        self.mark = price
        if self.ruined:
            return 0.0
        if target == 0.0:
            return self.trade(-self.quantity, price, half_spread)
        return self.trade(target * self.equity / price - self.quantity, price, half_spread)

    def act(self, action: int, price: float, half_spread: float) -> float:
        """Carry out an action at a price; an action that does not apply does nothing."""
        self.mark = price
        side = self.side
        costs = self.costs
        if action in (Action.LONG, Action.SHORT):
            want = 1 if action == Action.LONG else -1
            barred = self.ruined or self.cooldown > 0
            if barred or side == want or (side and costs.on_opposite == "ignore"):
                return 0.0
            return self.rebalance(want * costs.entry_fraction, price, half_spread)
        if action == Action.REDUCE and side:
            half = self.quantity / 2
            if abs(half) * price < costs.min_notional:
                return self.trade(-self.quantity, price, half_spread)
            return self.trade(-half, price, half_spread)
        if action == Action.CLOSE:
            return self.trade(-self.quantity, price, half_spread)
        if action == Action.EMERGENCY_FLATTEN:
            self.cooldown = costs.flatten_cooldown_steps
            return self.trade(-self.quantity, price, half_spread)
        return 0.0

    def valid_actions(
        self, *, cold: bool = False, pending: bool = False, use_masks: bool = True
    ) -> tuple[bool, ...]:
        """Return which of the six actions would do something here.

        Flat: HOLD, LONG, SHORT. In a position: HOLD, REDUCE, CLOSE, EMERGENCY_FLATTEN. Cooling
        down, ruined, cold and flat, or with an order pending: HOLD. Without masks: all six, but
        nobody enters while cold or cooling down.
        """
        if pending or self.ruined:
            return HOLD_ONLY
        if not use_masks:
            return NO_ENTRY if cold or self.cooldown > 0 else ANY
        side = self.side
        if side == 0:
            return HOLD_ONLY if cold or self.cooldown > 0 else FLAT
        if self.costs.on_opposite == "ignore" or cold:
            return IN_POSITION
        return IN_LONG if side > 0 else IN_SHORT

    def end_step(self) -> None:
        """Count one decided step of the cool-down; call once per step, after the mask was read."""
        if self.cooldown > 0:
            self.cooldown -= 1

    def dump(self) -> tuple[Any, ...]:
        """Return the account as plain values."""
        return (
            self.balance, self.quantity, self.entry_price, self.mark, self.realised, self.fees_paid,
            self.slippage_paid, self.turnover, self.peak_equity, self.max_drawdown, self.cooldown,
            self.ruined,
        )  # fmt: skip

    def load(self, values: Any) -> None:
        """Restore a dump."""
        (
            self.balance, self.quantity, self.entry_price, self.mark, self.realised, self.fees_paid,
            self.slippage_paid, self.turnover, self.peak_equity, self.max_drawdown, self.cooldown,
            self.ruined,
        ) = values  # fmt: skip
