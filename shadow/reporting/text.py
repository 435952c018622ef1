"""How are the values of a report written? The same way on the terminal and on the page."""

from __future__ import annotations

from datetime import UTC, datetime

from shadow.evaluation.effect import Range

LABELS = {"v3": "v3", "v2": "v2", "follow_signal": "follow-signal", "flat": "flat"}


def money(value: float) -> str:
    """Write a profit: signed, two decimals; an exact or rounded zero has no sign."""
    text = f"{value:+,.2f}"
    return "0.00" if text in ("+0.00", "-0.00") else text


def amount(value: float) -> str:
    """Write an amount of money that is not a profit."""
    return f"{value:,.0f}"


def percent(value: float | None, digits: int = 1) -> str:
    """Write a share of 1; a dash where there is none."""
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def kappa(value: float | None) -> str:
    """Write Cohen's kappa; without data, or when chance alone agrees always, it is undefined."""
    return "undefined" if value is None else f"{value:.3f}"


def moment(ts_us: int) -> str:
    """Write a time of the data, UTC, to the minute."""
    return f"{datetime.fromtimestamp(ts_us // 1_000_000, UTC):%Y-%m-%d %H:%M}"


def signed(value: float | None, digits: int | None = None) -> str:
    """Write a number with its sign, about three digits of it; a dash where there is none."""
    if value is None:
        return "–"
    digits = decimals(value) if digits is None else digits
    text = f"{value:+,.{digits}f}"
    return text.lstrip("+-") if not text.strip("+-0.,") else text


def plain(value: float | None, digits: int | None = None) -> str:
    """Write a number, about three digits of it; a dash where there is none."""
    if value is None:
        return "–"
    return f"{value:,.{decimals(value) if digits is None else digits}f}"


def decimals(value: float) -> int:
    """Return how many decimals show about three digits."""
    size = abs(value)
    return 0 if size >= 1_000.0 else 1 if size >= 10.0 else 2 if size >= 0.1 or not size else 3


def bounds(found: Range, digits: int | None = None) -> str:
    """Write an interval; a dash where there is none."""
    if found.low is None or found.high is None:
        return "–"
    digits = decimals(max(abs(found.low), abs(found.high))) if digits is None else digits
    return f"[{signed(found.low, digits)}, {signed(found.high, digits)}]"


def span(found: Range, digits: int | None = None) -> str:
    """Write an interval of something without a direction; a dash where there is none."""
    if found.low is None or found.high is None:
        return "–"
    digits = decimals(max(abs(found.low), abs(found.high))) if digits is None else digits
    return f"[{plain(found.low, digits)}, {plain(found.high, digits)}]"


def probability(value: float) -> str:
    """Write a p-value."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def evidence(value: float) -> str:
    """Write an e-value: how many times better the data fit an effect than none."""
    return f"{value:.3g}" if value < 1e4 else f"{value:.1e}"


def days(value: float | None) -> str:
    """Write a waiting time in days."""
    if value is None:
        return "not in sight"
    return f"{value:,.0f} days" if value >= 10.0 else f"{value:.1f} days"
