"""In which markets does the difference arise? Groups of bars that were known before the bar began.

Slices are exploratory. Every slice is judged on the same batches as the whole: its value in a batch
is the sum over its bars, divided by the length of the batch and the whole capital, so the slices of
one kind add up to the effect.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from shadow.evaluation.bars import Bars
from shadow.evaluation.batches import Assigned, Batches, Floats, Ints

VOLATILITY = ("low", "middle", "high", "not known")
"""Groups of volatility; the last, -1, until a day of a symbol is known."""
_WINDOW = 60  # bars in a volatility
_LOOK_BACK_DAYS = 7


class Slice(NamedTuple):
    """One group of bars and its difference per batch."""

    kind: str
    name: str
    bars: int
    values: Floats
    """[batch] as `Batches.values`."""


def slices(
    bars: Bars, difference: Floats, volatility: Ints, found: Batches, assigned: Assigned
) -> Iterator[Slice]:
    """Yield every slice by symbol, regime, hour of the day and volatility.

    Args:
        difference: net v3 - v2 of each bar, in account currency.
    """
    frame = found.frame
    place = np.searchsorted(found.window, assigned.window)
    inside = np.minimum(place, max(len(found.window) - 1, 0))
    use = np.zeros(len(place), np.bool_)
    if len(found.window):
        use = found.window[inside] == assigned.window
    hour = (bars.ts_us - 1) // 3_600_000_000 % 24
    kinds: tuple[tuple[str, Ints, tuple[str, ...]], ...] = (
        ("symbol", bars.symbol, bars.symbols),
        ("regime", bars.regime, bars.regimes),
        ("volatility", np.where(volatility < 0, len(VOLATILITY) - 1, volatility), VOLATILITY),
        ("hour", hour, tuple(f"{number:02d}:00" for number in range(24))),
    )
    scale = frame.bars * frame.capital
    k = len(found.window)
    for kind, group, names in kinds:
        cells = group[use] * k + inside[use]
        sums = np.bincount(cells, difference[use], len(names) * k).reshape(len(names), k)
        rows = np.bincount(group[use], minlength=len(names))
        for number, name in enumerate(names):
            if rows[number]:
                yield Slice(kind, name, int(rows[number]), sums[number] / scale)


def volatility_groups(bars: Bars) -> Ints:
    """Return the tercile of each bar's volatility, from what was known before the bar began.

    Volatility is the standard deviation of the symbol's last 60 bar returns up to the bar before;
    the terciles are those of the same symbol's seven days before the day of the bar.
    """
    groups = np.full(len(bars.ts_us), -1, np.int64)
    day = (bars.ts_us - 1) // 86_400_000_000
    bounds = np.append(
        np.flatnonzero(np.diff(bars.symbol[bars.by_symbol], prepend=-1)), len(groups)
    )
    for begin, end in pairwise(bounds):
        rows = bars.by_symbol[begin:end]
        groups[rows] = _terciles(_volatility(bars.close[rows]), day[rows])
    return groups


def _volatility(close: Floats) -> Floats:
    """Return the standard deviation of the last returns before each bar; NaN without enough."""
    found = np.full(len(close), np.nan)
    if len(close) < _WINDOW + 2:
        return found
    change = close[1:] / close[:-1] - 1.0
    sums = np.concatenate([[0.0], np.cumsum(change)])
    squares = np.concatenate([[0.0], np.cumsum(change**2)])
    mean = (sums[_WINDOW:] - sums[:-_WINDOW]) / _WINDOW
    mean_square = (squares[_WINDOW:] - squares[:-_WINDOW]) / _WINDOW
    spread = np.sqrt(np.maximum(mean_square - mean**2, 0.0))
    found[_WINDOW + 1 :] = spread[:-1]  # returns up to the bar before
    return found


def _terciles(volatility: Floats, day: Ints) -> Ints:
    groups = np.full(len(volatility), -1, np.int64)
    for today in np.unique(day):
        earlier = volatility[(day < today) & (day >= today - _LOOK_BACK_DAYS)]
        earlier = earlier[~np.isnan(earlier)]
        if len(earlier) < _WINDOW:
            continue
        now = (day == today) & ~np.isnan(volatility)
        groups[now] = np.searchsorted(np.quantile(earlier, [1 / 3, 2 / 3]), volatility[now])
    return groups
