"""What would risk limits have said to v3's decision? An annotation, and an arm that obeys it.

The guard keeps an account of its own, "v3 as it would have traded": it carries out v3's actions,
except those that the limits veto. Only what opens or turns a position can be vetoed; what reduces
one never is. v3 itself neither sees the guard's account nor its vetoes, and no verdict rests on it.

Every symbol has its own account with the reference capital, so every limit is one account's.
"""

from __future__ import annotations

import tomllib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from rlv3.errors import ConfigError
from rlv3.events import Action
from rlv3.portfolio import Costs
from shadow.arms import Arm, Order

DAY_US = 86_400_000_000
REASONS = ("kill_switch", "daily_loss", "gross_exposure", "leverage")
"""Why an entry is vetoed; the first that holds is given."""
_CLEAR = frozenset({"", "0", "false", "no", "off", "none", "inactive"})


@dataclass(frozen=True, slots=True)
class RiskLimits:
    """Limits of one account, from a TOML file; a limit that is None does not bind."""

    max_gross_exposure: float | None = None
    """Notional after an entry, as a fraction of the reference capital."""
    max_leverage: float | None = None
    """Notional after an entry, as a multiple of equity."""
    max_daily_loss: float | None = None
    """Fall of equity since 00:00 UTC, as a fraction of the equity then, at which entries end."""
    kill_switch: str | None = None
    """Key on the source whose value vetoes every entry, unless it is absent or says off."""

    def __post_init__(self) -> None:
        for name in ("max_gross_exposure", "max_leverage", "max_daily_loss"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0.0:
                raise ConfigError(f"{name} must be a number > 0, was {value!r}")
            object.__setattr__(self, name, float(value))
        key = self.kill_switch
        if key is not None and (not isinstance(key, str) or not key):
            raise ConfigError(f"kill_switch must be the name of a key, was {key!r}")

    @classmethod
    def load(cls, path: Path) -> RiskLimits:
        """Read limits from a TOML file.

        Raises:
            ConfigError: the file is missing, not TOML, empty of limits or has an unknown one.
        """
        try:
            values = tomllib.loads(path.read_text())
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(
                f"expected a TOML file of limits at {path}, found: {error}"
            ) from error
        return cls.restore(values, str(path))

    @classmethod
    def restore(cls, values: dict[str, Any], where: str = "the recording") -> RiskLimits:
        """Return the limits of plain values, as `dump` gives them."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown or not values:
            found = ", ".join(unknown) or "none"
            raise ConfigError(f"expected limits among {', '.join(known)} in {where}, found {found}")
        return cls(**values)

    def dump(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


class Ruling(NamedTuple):
    """What the limits say."""

    allowed: bool
    reason: str | None
    """Why not: kill_switch, daily_loss, gross_exposure or leverage; None when allowed."""

    def on(self, action: int) -> Ruling:
        """Apply this ruling on entries to an action."""
        return self if action in (Action.LONG, Action.SHORT) else ALLOWED


ALLOWED = Ruling(True, None)


def engaged(value: bytes | None) -> bool:
    """Return whether a kill switch's value stops trading: anything but absent or a word for off."""
    return value is not None and value.decode(errors="replace").strip().lower() not in _CLEAR


class RiskGuard:
    """One symbol's guarded account, and what its limits must remember of the day."""

    __slots__ = ("_day", "_day_equity", "arm", "limits")

    def __init__(self, limits: RiskLimits, initial_balance: float, costs: Costs) -> None:
        self.limits = limits
        self.arm = Arm(initial_balance, costs)
        self._day = -1
        self._day_equity = 0.0

    def on_price(self, ts_us: int, price: float, half_spread: float) -> bool:
        """Mark the account at a price and fill what is due; return True when state changed."""
        arm = self.arm
        day = ts_us // DAY_US
        begun = day > self._day
        if begun:  # with the equity that the day before left
            self._day, self._day_equity = day, arm.account.equity
        held = arm.account.quantity != 0.0
        return arm.on_price(ts_us, price, half_spread) or begun or held

    def entry(self, *, killed: bool) -> Ruling:
        """Say whether an entry would be allowed now; nothing but an entry is ever vetoed."""
        limits, account = self.limits, self.arm.account
        if killed and limits.kill_switch is not None:
            return Ruling(False, "kill_switch")
        equity = account.equity
        if (
            limits.max_daily_loss is not None
            and self._day >= 0
            and equity <= self._day_equity * (1.0 - limits.max_daily_loss)
        ):
            return Ruling(False, "daily_loss")
        notional = account.costs.entry_fraction * equity
        if (
            limits.max_gross_exposure is not None
            and notional > limits.max_gross_exposure * account.initial
        ):
            return Ruling(False, "gross_exposure")
        if limits.max_leverage is not None and notional > limits.max_leverage * equity:
            return Ruling(False, "leverage")
        return ALLOWED

    def step(
        self, action: int, ruling: Ruling, due_us: int, ts_us: int, price: float, half_spread: float
    ) -> None:
        """Carry out v3's step, unless it is an entry that was vetoed."""
        self.arm.account.end_step()
        if action != Action.HOLD and ruling.on(action).allowed:
            self.arm.place(Order(due_us, action, 0.0), ts_us, price, half_spread)

    def flatten(self) -> None:
        """Close at the next price: another policy decides from here on."""
        self.arm.order = Order(0, None, 0.0)

    def dump(self) -> tuple[Any, ...]:
        """Return what must survive a restart."""
        return self.arm.dump(), self.arm.dump_tick(), self._day, self._day_equity

    def load(self, values: Any, mark: float) -> None:
        """Restore a dump."""
        arm, tick, self._day, self._day_equity = values
        self.arm.load(arm, tick, mark)
