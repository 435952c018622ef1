"""Which numbers does the verdict rest on? Batch means of the per-bar differences, costs inside.

For every bar and symbol, net = gross - fee - slippage, in account currency, costs in the bar of the
fill. A batch is a window (k B, (k + 1) B] of the wall clock, B bars long; its value is the sum over
all bars of all symbols, divided by B and by the reference capital, which is the same for ever: one
fixed notional, no compounding. A bar without a tick has no row and adds exactly 0.

A row belongs to the window of its bar. The watermark is the newest bar end seen; a window closes
once the watermark is `GRACE_BARS` past its end. A symbol that is silent closes its last bar at its
next tick, so its row may come later than that: it is then booked into the oldest window that is
still open, when its profit became known, and counted. So nothing that has closed ever changes, and
no profit is lost. Windows in which fewer than half of the minutes have any bar are discarded; how
many, and how much profit they held, is said.

Sums run in (time, symbol) order, so the batches that a collector closes one by one and those that
are formed from a whole store agree in every bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from shadow.records import BarRow

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

GRACE_BARS = 2
MIN_COVERAGE = 0.5
"""Share of a window's minutes that must have a bar of some symbol."""
PLAYERS = ("v3", "v2", "follow_signal", "flat")
SERIES = (
    "difference", "beats_signal", "beats_flat", "late", "v3", "v2", "v3_late", "v2_late",
    "v3_cost", "v2_cost", "v3_turnover", "v2_turnover",
)  # fmt: skip
"""What is summed per bar: net v3 - v2, v3 - follow_signal, v3 - flat, v3 - v2 with every fill one
tick later, net per policy (also late), costs and turnover."""


class Frame(NamedTuple):
    """What is counted, fixed before the first bar."""

    step_us: int
    """Length of a bar."""
    batch_us: int
    """Length of a batch."""
    capital: float
    """Reference capital of all symbols together, in account currency."""
    symbols: tuple[str, ...]
    """Sorted; rows of other symbols do not count."""
    first: int
    """Number of the first window."""
    end: int
    """Number of the window after the last one."""

    @classmethod
    def of(
        cls,
        symbols: tuple[str, ...],
        *,
        capital: float,
        step_us: int,
        batch_bars: int,
        start_us: int,
        end_us: int,
    ) -> Self:
        """Return the frame of the whole windows within [start, end]."""
        batch_us = batch_bars * step_us
        return cls(
            step_us=step_us,
            batch_us=batch_us,
            capital=capital,
            symbols=tuple(sorted(symbols)),
            first=-(-start_us // batch_us),
            end=end_us // batch_us,
        )

    @property
    def bars(self) -> int:
        """Bars in a batch."""
        return self.batch_us // self.step_us

    @property
    def per_day(self) -> float:
        """Bars in a day."""
        return 86_400e6 / self.step_us

    def window(self, ts_us: Ints) -> Ints:
        """Return the window of a bar by its end."""
        return (ts_us - 1) // self.batch_us

    def open_at(self, watermark_us: Ints) -> Ints:
        """Return the oldest window that is still open when bars up to the watermark were seen."""
        return (watermark_us - GRACE_BARS * self.step_us - 1) // self.batch_us


class Paid(NamedTuple):
    """What one arm earned and paid per bar, in account currency."""

    net: Floats
    net_late: Floats
    cost: Floats
    turnover: Floats


class Batches(NamedTuple):
    """The closed and complete batches of a frame, oldest first."""

    frame: Frame
    window: Ints
    values: Floats
    """[batch, series]: mean per bar as a fraction of the capital, columns as `SERIES`."""
    by_symbol: Floats
    """[batch, symbol]: the same of `difference`, for each symbol of the frame."""
    discarded: int
    """Closed windows with too few bars, including those without any."""
    discarded_profit: float
    """Difference within them, as a fraction of the capital."""
    late_rows: int
    """Rows that came after their window had closed."""
    repeated_rows: int
    """Rows of a bar that had been counted already (a run that began again); left out."""
    watermark_us: int
    """Newest bar end seen; 0 when there is none."""

    def series(self, name: str) -> Floats:
        """Return one column."""
        return self.values[:, SERIES.index(name)]

    @property
    def bps_per_day(self) -> float:
        """Turns a mean per bar into bps of the capital a day."""
        return 1e4 * self.frame.per_day

    def at(self, cost: float = 1.0, *, late: bool = False) -> Floats:
        """Return the difference with all costs multiplied, and every fill at once or a tick later.

        Exactly `difference` (or `late`) at cost 1.
        """
        base = self.series("late" if late else "difference")
        extra = self.series("v3_cost") - self.series("v2_cost")
        return base - (cost - 1.0) * extra

    def without(self, symbol: int) -> Floats:
        """Return the difference with one symbol left out, on the same capital."""
        return self.series("difference") - self.by_symbol[:, symbol]

    @property
    def days(self) -> float:
        """Length of all batches together."""
        return len(self.window) * self.frame.batch_us / 86_400e6


def pay(
    gross: Floats,
    gross_late: Floats,
    fee: Floats,
    slippage: Floats,
    turnover: Floats,
    capital: Floats,
) -> Paid:
    """Turn an arm's columns, which are fractions of an account's capital, into money."""
    cost = fee * capital + slippage * capital
    return Paid(
        net=gross * capital - cost,
        net_late=gross_late * capital - cost,
        cost=cost,
        turnover=turnover * capital,
    )


def series(paid: Mapping[str, Paid]) -> list[Floats]:
    """Return what is summed, one array per name in `SERIES`."""
    v3, v2 = paid["v3"], paid["v2"]
    return [
        v3.net - v2.net,
        v3.net - paid["follow_signal"].net,
        v3.net - paid["flat"].net,
        v3.net_late - v2.net_late,
        v3.net,
        v2.net,
        v3.net_late,
        v2.net_late,
        v3.cost,
        v2.cost,
        v3.turnover,
        v2.turnover,
    ]


class Rows(NamedTuple):
    """Bar rows in (time, symbol) order, one element per row."""

    ts_us: Ints
    symbol: Ints
    """Index into the frame's symbols; -1 for any other."""
    arrived: Ints
    """Rank in the order of the stream."""
    paid: Mapping[str, Paid]


class Assigned(NamedTuple):
    """Which window every row belongs to."""

    window: Ints
    """-1 for a row that does not count."""
    late: int
    repeated: int
    watermark_us: int


def assign(frame: Frame, ts_us: Ints, symbol: Ints, arrived: Ints) -> Assigned:
    """Say which window each row belongs to, from the order in which rows came."""
    order = np.argsort(arrived)
    known = order[symbol[order] >= 0]
    ts, who = ts_us[known], symbol[known]
    repeated = _not_new(ts, who)
    known, ts = known[~repeated], ts[~repeated]
    newest = np.maximum.accumulate(ts)
    before = np.concatenate([[0], newest[:-1]]) if len(ts) else ts
    own = frame.window(ts)
    taken = np.maximum(own, frame.open_at(before))
    counted = (own >= frame.first) & (taken < frame.end)
    window = np.full(len(ts_us), -1, np.int64)
    window[known[counted]] = taken[counted]
    return Assigned(
        window=window,
        late=int((taken[counted] > own[counted]).sum()),
        repeated=int(repeated.sum()),
        watermark_us=int(newest[-1]) if len(ts) else 0,
    )


def _not_new(ts: Ints, symbol: Ints) -> NDArray[np.bool_]:
    """Return which rows, in the order they came, do not go beyond their symbol's newest bar."""
    found = np.zeros(len(ts), np.bool_)
    for number in range(int(symbol.max(initial=-1)) + 1):
        rows = np.flatnonzero(symbol == number)
        newest = np.maximum.accumulate(ts[rows])
        found[rows[1:]] = ts[rows[1:]] <= newest[:-1]
    return found


def form(frame: Frame, rows: Rows) -> tuple[Batches, Assigned]:
    """Form all batches of a store at once."""
    assigned = assign(frame, rows.ts_us, rows.symbol, rows.arrived)
    watermark = assigned.watermark_us
    end = min(int(frame.open_at(np.asarray(watermark))), frame.end)
    n, width = max(end - frame.first, 0), len(frame.symbols)
    use = (assigned.window >= 0) & (assigned.window < end)
    place = assigned.window[use] - frame.first
    sums = np.empty((n, len(SERIES)))
    columns = series(rows.paid)
    for column, values in enumerate(columns):
        sums[:, column] = np.bincount(place, values[use], n)
    cells = place * width + rows.symbol[use]
    by_symbol = np.bincount(cells, columns[0][use], n * width).reshape(n, width)
    ts = rows.ts_us[use]
    on_time = frame.window(ts) == assigned.window[use]
    minutes, first = np.unique(ts[on_time], return_index=True)
    del minutes
    covered = np.bincount(place[on_time][first], minlength=n)
    complete = _is_complete(frame, covered)
    scale = frame.bars * frame.capital
    return Batches(
        frame=frame,
        window=frame.first + np.flatnonzero(complete),
        values=sums[complete] / scale,
        by_symbol=by_symbol[complete] / scale,
        discarded=n - int(complete.sum()),
        discarded_profit=_total(sums[~complete, 0] / frame.capital),
        late_rows=assigned.late,
        repeated_rows=assigned.repeated,
        watermark_us=watermark,
    ), assigned


def _is_complete(frame: Frame, covered: Ints) -> NDArray[np.bool_]:
    return covered >= MIN_COVERAGE * frame.bars


def _total(values: Floats) -> float:
    total = 0.0
    for value in values.tolist():  # one by one, as a collector meets them
        total += value
    return total


Columns = tuple[float, ...]
"""A row as numbers: per player gross, gross_late, fee, slippage, turnover; then the capital."""

COLUMN_NAMES = (
    *(
        f"{name}_{item}"
        for name in PLAYERS
        for item in ("gross", "gross_late", "fee", "slippage", "turnover")
    ),
    "flat_equity",
)
"""The same as columns of the store's table of bars."""


def columns_of(row: BarRow) -> Columns:
    """Return a row as numbers."""
    found: list[float] = []
    for name in PLAYERS:
        arm = row.arms[name]
        found += (arm.gross, arm.gross_late, arm.fee, arm.slippage, arm.turnover)
    return (*found, row.arms["flat"].equity)


class Batcher:
    """Forms the same batches from rows as they come, each row and each batch at constant cost."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self._number = {name: place for place, name in enumerate(frame.symbols)}
        self._newest: dict[int, int] = {}
        self._open: dict[int, list[tuple[int, int, Columns]]] = {}
        self._next = frame.first  # the oldest window that has not closed
        self._values = _Growing(len(SERIES))
        self._by_symbol = _Growing(len(frame.symbols))
        self._windows: list[int] = []
        self._discarded = self._late = self._repeated = self._watermark = 0
        self._discarded_profit = 0.0

    def add(self, symbol: str, ts_us: int, columns: Columns) -> bool:
        """Take one row; return whether it counts.

        Args:
            ts_us: end of the bar.
        """
        frame, number = self.frame, self._number.get(symbol)
        if number is None:
            return False
        if ts_us <= self._newest.get(number, -1):
            self._repeated += 1
            return False
        self._newest[number] = ts_us
        own = (ts_us - 1) // frame.batch_us
        window = max(own, self._open_at(self._watermark))
        counts = own >= frame.first and window < frame.end
        if counts:
            self._late += window > own
            self._open.setdefault(window, []).append((ts_us, number, columns))
        self._watermark = max(self._watermark, ts_us)
        self._close()
        return counts

    def __len__(self) -> int:
        """Return how many complete batches have closed."""
        return len(self._windows)

    def batches(self) -> Batches:
        """Return the batches so far."""
        return Batches(
            frame=self.frame,
            window=np.asarray(self._windows, np.int64),
            values=self._values.rows(),
            by_symbol=self._by_symbol.rows(),
            discarded=self._discarded,
            discarded_profit=self._discarded_profit,
            late_rows=self._late,
            repeated_rows=self._repeated,
            watermark_us=self._watermark,
        )

    def _open_at(self, watermark_us: int) -> int:
        return (watermark_us - GRACE_BARS * self.frame.step_us - 1) // self.frame.batch_us

    def _close(self) -> None:
        end = min(self._open_at(self._watermark), self.frame.end)
        while self._next < end:
            window, self._next = self._next, self._next + 1
            self._close_one(window, self._open.pop(window, []))

    def _close_one(self, window: int, rows: list[tuple[int, int, Columns]]) -> None:
        frame = self.frame
        rows.sort(key=lambda row: row[:2])
        start = window * frame.batch_us
        covered = len({ts_us for ts_us, _, _ in rows if ts_us > start})
        place = np.zeros(len(rows), np.int64)
        columns = series(_paid([row for _, _, row in rows]))
        sums = np.array([np.bincount(place, values, 1)[0] for values in columns])
        if not _is_complete(frame, np.asarray(covered)):
            self._discarded += 1
            self._discarded_profit += float(sums[0] / frame.capital)
            return
        symbols = np.array([number for _, number, _ in rows])
        scale = frame.bars * frame.capital
        self._windows.append(window)
        self._values.append(sums / scale)
        self._by_symbol.append(np.bincount(symbols, columns[0], len(frame.symbols)) / scale)


def _paid(rows: list[Columns]) -> dict[str, Paid]:
    table = np.array(rows, np.float64).reshape(-1, len(COLUMN_NAMES)).T
    found = {}
    for place, name in enumerate(PLAYERS):
        gross, gross_late, fee, slippage, turnover = table[5 * place : 5 * place + 5]
        found[name] = pay(gross, gross_late, fee, slippage, turnover, table[-1])
    return found


class _Growing:
    """Rows of one width that are appended to, and read without a copy."""

    def __init__(self, width: int) -> None:
        self._data = np.empty((64, width))
        self._n = 0

    def append(self, row: Floats) -> None:
        if self._n == len(self._data):
            self._data = np.concatenate([self._data, np.empty_like(self._data)])
        self._data[self._n] = row
        self._n += 1

    def rows(self) -> Floats:
        return self._data[: self._n]
