"""Which bars may be trained on, which choose a policy, and which may judge it?

Parts are cut by time, never at random, and the same instant cuts every symbol: two coins move
together, so one coin's Tuesday says something about the other's. After each cut an embargo passes
before the next part decides for the first time; the bars that warm up its features lie inside it.

    | train ............ | embargo | validation ........ | embargo | test ............ |
                         cut 1     first decision        cut 2     first decision

Normalisers are fitted on `train` alone. An artifact keeps the time of the last bar it was trained
on, and `check_unseen` refuses to judge a policy by earlier decisions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np

from rlv3.errors import ConfigError, DataError
from rlv3.features import US, WARM_BARS
from rlv3.market import Bars

DEFAULT_SPLIT = (0.7, 0.15, 0.15)
DEFAULT_EMBARGO = 60
"""Bars between the last bar of a part and the first decision of the next."""
PARTS = ("train", "validation", "test")


class Split(NamedTuple):
    """The parts of one or several series; a part that was not asked for is empty."""

    train: list[Bars]
    validation: list[Bars]
    test: list[Bars]


def parse_split(text: str) -> tuple[float, ...]:
    """Return the shares in a text like `70,15,15` or `0.8,0.2`: train, [validation,] test.

    Raises:
        ConfigError: other than two or three positive numbers that add up to 1 or to 100.
    """
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = []
    total = math.fsum(shares)
    whole = min((1.0, 100.0), key=lambda w: abs(w - total))
    positive = len(shares) in (2, 3) and all(share > 0.0 for share in shares)
    if not (positive and abs(total - whole) <= 1e-6 * whole):
        raise ConfigError(
            "expected a split of two or three positive shares that add up to 1 or 100, "
            f"such as 70,15,15, found {text!r}"
        )
    return tuple(share / whole for share in shares)


def split_by_time(
    series: Sequence[Bars],
    shares: Sequence[float] = DEFAULT_SPLIT,
    *,
    embargo: int = DEFAULT_EMBARGO,
) -> Split:
    """Cut series into parts by time.

    Args:
        series: of one step, oldest bar first; they may begin and end at different times.
        shares: of all bars, for train, validation and test; with two, there is no validation.
        embargo: bars between a part's last bar and the next part's first decision; at least
            `WARM_BARS`, so that no bar of one part warms up the next.
    Raises:
        ConfigError: an embargo that is too short.
        DataError: a part of a series that would be too short to trade.
    """
    if embargo < WARM_BARS:
        raise ConfigError(f"embargo must be >= {WARM_BARS} bars, was {embargo}")
    pool = np.sort(np.concatenate([bars.end_us for bars in series]))
    cuts = [
        int(pool[max(round(share * len(pool)) - 1, 0)]) for share in np.cumsum(shares)[:-1].tolist()
    ]
    edges = [-1, *cuts, int(pool[-1])]
    parts: list[list[Bars]] = []
    for k, (begin, end) in enumerate(itertools.pairwise(edges)):
        wait = embargo - WARM_BARS if k else 0
        parts.append([_part(bars, begin, end, wait, k, len(shares)) for bars in series])
    if len(shares) == 2:
        parts.insert(1, [])
    return Split(*parts)


def _part(bars: Bars, begin_us: int, end_us: int, wait: int, k: int, n_parts: int) -> Bars:
    """Return the bars that end after `begin_us` plus a wait, up to `end_us` inclusive."""
    begin_us += wait * bars.step_seconds * US
    first, stop = np.searchsorted(bars.end_us, [begin_us, end_us], side="right").tolist()
    if stop - first < WARM_BARS + 2:
        name = PARTS[k if n_parts == 3 else 2 * k]
        raise DataError(
            f"{bars.symbol}: expected at least {WARM_BARS + 2} bars in the {name} part after its "
            f"embargo, found {max(stop - first, 0)} of {len(bars.close)}"
        )
    return bars.rows(first, stop)


def window(bars: Bars, start: datetime | None = None, end: datetime | None = None) -> Bars:
    """Return the bars whose decisions and outcomes lie in [start, end].

    The `WARM_BARS` bars before `start` come along to warm up the features.

    Raises:
        DataError: too few bars are left to trade.
    """
    first = 0
    if start is not None:
        decided = int(np.searchsorted(bars.end_us, round(start.timestamp() * US), side="left"))
        first = max(decided - WARM_BARS + 1, 0)
    stop = len(bars.close)
    if end is not None:
        stop = int(np.searchsorted(bars.end_us, round(end.timestamp() * US), side="right"))
    if stop - first < WARM_BARS + 2:
        raise DataError(
            f"{bars.symbol}: expected at least {WARM_BARS + 2} bars between {start or 'its start'} "
            f"and {end or 'its end'}, found {max(stop - first, 0)}"
        )
    return bars.rows(first, stop)


def first_decision_us(series: Sequence[Bars]) -> int:
    """Return when the first bar ends that a policy decides on; the bars before it warm up."""
    return min(int(bars.end_us[min(WARM_BARS, len(bars.end_us)) - 1]) for bars in series)


def training_end(training: Mapping[str, Any]) -> datetime | None:
    """Return when the historical data of an artifact's training ended; None if it had none."""
    end = training.get("data_end")
    return None if end is None else datetime.fromisoformat(end)


def check_unseen(training: Mapping[str, Any], series: Sequence[Bars]) -> None:
    """Refuse to judge a policy by bars from before the end of its training data.

    Other symbols count too: markets move together. The bars that warm up a series' features are
    not decided on and may be older.

    Args:
        training: the `training` block of the artifact's metadata.
    Raises:
        DataError: the first decision on a series would be earlier than the training's end.
    """
    end = training_end(training)
    if end is None:
        return
    for bars in series:
        decided = int(bars.end_us[min(WARM_BARS, len(bars.end_us)) - 1])
        if decided < round(end.timestamp() * US):
            begin = datetime.fromtimestamp(decided / US, UTC)
            raise DataError(
                f"{bars.symbol}: expected data after {end.isoformat()}, where the policy's "
                f"training ended, found decisions from {begin.isoformat()} on; use a later "
                "window, or --allow-overlap for a result that proves nothing"
            )
