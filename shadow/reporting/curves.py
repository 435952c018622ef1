"""How did the portfolios move? Equity and drawdown on a common grid, short enough to be drawn."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import numpy as np

from shadow.evaluation.bars import Bars, Traded, drawdown, equity
from shadow.evaluation.batches import Floats, Ints

BUCKETS = 300
"""Points of a drawn curve; longer series keep the lowest, highest and last value per bucket."""


class Band(msgspec.Struct, frozen=True):
    """A curve: the last, lowest and highest value per point."""

    last: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


class Curves(msgspec.Struct, frozen=True):
    """Portfolio curves on a common grid, per arm; bucketed when long."""

    time_us: tuple[int, ...]
    """End of the bar (or of the bucket's last bar); the first is the start of the first bar."""
    bucketed: bool
    equity: dict[str, Band]
    drawdown: dict[str, Band]
    difference: Band
    """Net profit of v3 minus that of v2."""


def curves(bars: Bars, traded: Mapping[str, Traded], bar_us: int) -> Curves:
    """Draw every arm, and v3 minus v2.

    Args:
        bar_us: length of a bar.
    """
    times = np.concatenate([bars.grid[:1] - bar_us, bars.grid])
    starts = _buckets(len(times))
    values = {name: equity(bars, arm.net)[: len(times)] for name, arm in traded.items()}
    difference = equity(bars, traded["v3"].net - traded["v2"].net) - bars.total_capital
    return Curves(
        time_us=tuple(times[_ends(starts, len(times))].tolist()),
        bucketed=len(starts) < len(times),
        equity={name: _band(curve, starts, 4) for name, curve in values.items()},
        drawdown={name: _band(drawdown(curve), starts, 8) for name, curve in values.items()},
        difference=_band(difference[: len(times)], starts, 4),
    )


def _buckets(n: int) -> Ints:
    """Return where each bucket of a series of n points starts; the first point stands alone."""
    if n <= BUCKETS:
        return np.arange(n)
    inner = 1 + np.arange(BUCKETS - 1) * (n - 1) // (BUCKETS - 1)
    return np.concatenate([[0], inner])


def _ends(starts: Ints, n: int) -> Ints:
    return np.append(starts[1:], n)[: len(starts)] - 1


def _band(values: Floats, starts: Ints, digits: int) -> Band:
    if len(values) == 0:
        return Band((), (), ())
    low, high = np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)
    last = values[_ends(starts, len(values))]
    return Band(*(tuple(np.round(part, digits).tolist()) for part in (last, low, high)))
