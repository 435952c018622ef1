"""What did each arm earn, bar by bar? The bars of one run as arrays in one fixed order.

Bars are ordered by time and symbol, whatever segments they came from, so that sums over them give
equal bits for equal inputs. Money is in account currency.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import duckdb
import numpy as np
from numpy.typing import NDArray

from shadow.evaluation.batches import Floats, Ints, Paid, pay

ORDER = (
    "split_part(stream_id, '-', 1)::HUGEINT * 1000000000 + split_part(stream_id, '-', 2)::HUGEINT"
)
"""Sorts stream ids by time and sequence number; as text `9-10` would come before `9-2`."""
_SCOPED = ("decisions", "v2_decisions", "pairs", "unpaired", "bars", "outcomes")


_Scalar = TypeVar("_Scalar", np.int64, np.float64)


class Scope(NamedTuple):
    """Which rows a report is about."""

    runs: tuple[str, ...]
    symbols: tuple[str, ...] | None = None
    """All for None."""
    since_us: int | None = None
    """Rows at or before it are left out: a bar that ends then began before it."""
    until_us: int | None = None
    """Rows after it are left out."""

    def install(self, db: duckdb.DuckDBPyConnection) -> None:
        """Make a view `scoped_<table>` of every table that has rows per symbol and time."""
        times = ["true"]
        if self.since_us is not None:
            times.append(f"event_ts_us > {self.since_us}")
        if self.until_us is not None:
            times.append(f"event_ts_us <= {self.until_us}")
        terms = [*times, f"run_id IN ({_texts(self.runs)})"]
        if self.symbols is not None:
            terms.append(f"symbol IN ({_texts(self.symbols)})")
        for table in _SCOPED:
            db.execute(
                f"CREATE OR REPLACE TEMP VIEW scoped_{table} AS "
                f"SELECT * FROM {table} WHERE {' AND '.join(terms)}"
            )
        # a filter keeps the order of the stream; of an `IN` DuckDB makes a join, which keeps none
        db.execute(
            "CREATE OR REPLACE TEMP VIEW bars_in_order AS "
            f"SELECT * FROM bars WHERE {' AND '.join(times)}"
        )


def _texts(values: Sequence[str]) -> str:
    return ", ".join("'" + value.replace("'", "''") + "'" for value in values) or "NULL"


class Bars(NamedTuple):
    """The run's bars in (time, symbol) order; all arrays have one element per bar."""

    ts_us: Ints
    symbol: Ints
    """Index into `symbols`."""
    regime: Ints
    """Index into `regimes`."""
    warm: NDArray[np.bool_]
    capital: Floats
    open: Floats
    close: Floats
    arrived: Ints
    """Place in the order of the stream, in which `bars_in_order` has its rows."""
    run: Ints
    """Number of the bar's run among those of the scope."""
    empty_after: Ints
    """Bars without a tick that follow, which have no row."""
    symbols: tuple[str, ...]
    regimes: tuple[str, ...]
    grid: Ints
    """Distinct times, ascending."""
    cell: Ints
    """Index of each bar into `grid`."""
    by_symbol: Ints
    """Indices of the bars in (symbol, time) order."""
    first: Ints
    """Index of every symbol's first bar."""
    last: Ints
    """Index of every symbol's last bar."""
    total_capital: float
    """Reference capital of all symbols together."""
    gap_bars: int
    """Bars in which entries were lost."""
    restarted_bars: int
    """Bars followed by a silence after which the symbol starts cold."""
    empty_bars: int
    """Bars without a tick, which have no row."""
    owed_steps: int
    """Bars whose step had to wait for a later tick."""

    @classmethod
    def load(cls, db: duckdb.DuckDBPyConnection) -> Bars:
        """Read the bars of the scope that was installed; `report_bars` is a view of their rows.

        Columns are read in the order in which they are stored, which is that of the stream; what
        is in the scope is chosen, and put in order, here: DuckDB would sort all of them again for
        every arm.
        """
        db.execute(
            """
            CREATE OR REPLACE TEMP VIEW report_bars AS
            SELECT * REPLACE (coalesce(regime, 'unknown') AS regime) FROM scoped_bars
            """
        )
        symbols, symbol_code = _names(db, "symbol")
        regimes, regime_code = _names(db, "regime")
        _, run_code = _names(db, "run_id")
        data = db.execute(
            f"""
            SELECT event_ts_us, {symbol_code} AS symbol, {regime_code} AS regime, warm,
                   flat_equity AS capital, open, close, {run_code} AS run, empty_after
            FROM bars_in_order
            """
        ).fetchnumpy()
        gap, restarted, empty, owed = db.execute(
            """
            SELECT count(*) FILTER (gap), count(*) FILTER (restarted),
                   coalesce(sum(empty_after), 0), count(*) FILTER (step_decision_id IS NULL)
            FROM report_bars
            """
        ).fetchall()[0]
        inside = np.flatnonzero(~_unknown(data["symbol"]) & ~_unknown(data["run"]))
        ts_us = np.asarray(data.pop("event_ts_us"), np.int64)[inside]
        symbol = np.asarray(data.pop("symbol"), np.int64)[inside]
        sort = np.lexsort((symbol, ts_us))  # stable: a bar stored twice stays in stream order
        order, ts_us, symbol = inside[sort], ts_us[sort], symbol[sort]
        starts = np.flatnonzero(np.diff(ts_us, prepend=-1))
        cell = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(ts_us)))
        capital = np.asarray(data.pop("capital"), np.float64)[order]
        by_symbol = np.argsort(symbol, kind="stable")
        bounds = np.searchsorted(symbol[by_symbol], np.arange(len(symbols) + 1))
        first = by_symbol[bounds[:-1]]
        return cls(
            ts_us=ts_us,
            symbol=symbol,
            regime=np.asarray(data.pop("regime"), np.int64)[order],
            warm=np.asarray(data.pop("warm"), np.bool_)[order],
            capital=capital,
            open=np.asarray(data.pop("open"), np.float64)[order],
            close=np.asarray(data.pop("close"), np.float64)[order],
            arrived=order,
            run=np.asarray(data.pop("run"), np.int64)[order],
            empty_after=np.asarray(data.pop("empty_after"), np.int64)[order],
            symbols=symbols,
            regimes=regimes,
            grid=ts_us[starts],
            cell=cell,
            by_symbol=by_symbol,
            first=first,
            last=by_symbol[bounds[1:] - 1],
            total_capital=float(capital[first].sum()),
            gap_bars=int(gap),
            restarted_bars=int(restarted),
            empty_bars=int(empty),
            owed_steps=int(owed),
        )

    def at(self, symbol: Ints, ts_us: Ints) -> Ints:
        """Return the newest bar of a symbol that had ended by a time, -1 where there is none."""
        most = int(max(self.ts_us.max(initial=0), ts_us.max(initial=0))) + 1
        keys = self.symbol[self.by_symbol] * most + self.ts_us[self.by_symbol]
        place = np.searchsorted(keys, symbol * most + ts_us, side="right") - 1
        found = self.by_symbol[np.maximum(place, 0)]
        return np.where((place >= 0) & (self.symbol[found] == symbol), found, -1)

    @property
    def place(self) -> Ints:
        """Index of every bar in `by_symbol`."""
        place = np.empty(len(self.by_symbol), np.int64)
        place[self.by_symbol] = np.arange(len(place))
        return place

    def before(self, values: NDArray[_Scalar]) -> NDArray[_Scalar]:
        """Return what each symbol's bar before had; 0 for its first."""
        found = np.zeros_like(values)
        found[self.by_symbol[1:]] = values[self.by_symbol[:-1]]
        found[self.first] = 0
        return found

    def stretches(self, key: Ints) -> tuple[Ints, Ints, NDArray[np.bool_]]:
        """Return first and last bar of every stretch of one symbol with one key, and whether the
        symbol's bars end with it."""
        order = self.by_symbol
        if not len(order):
            return order, order, np.zeros(0, np.bool_)
        symbol, values = self.symbol[order], key[order]
        begins = np.append(True, (np.diff(symbol) != 0) | (np.diff(values) != 0))
        starts = np.flatnonzero(begins)
        ends = np.append(starts[1:], len(order)) - 1
        return order[starts], order[ends], np.isin(order[ends], self.last)

    def per_symbol(self, values: Floats | NDArray[np.bool_]) -> Floats:
        """Sum a column per symbol."""
        return np.bincount(self.symbol, values, len(self.symbols)).astype(np.float64)


def count(db: duckdb.DuckDBPyConnection, query: str, *values: object) -> int:
    """Return the only number a query gives."""
    return int(db.execute(query, list(values)).fetchall()[0][0])


_ARM_COLUMNS = (
    "exposure",
    "gross",
    "turnover",
    "fee",
    "slippage",
    "gross_late",
    "equity",
    "ruined",
)


class Traded(NamedTuple):
    """What one arm did, per bar, in account currency."""

    side: Ints
    """-1 short, 0 flat, 1 long, at the close."""
    entered: NDArray[np.bool_]
    gross: float
    """Over all bars, as are `fee` and `slippage`."""
    fee: float
    slippage: float
    paid: Paid
    exposure: Floats
    """At the close, a fraction of the account's equity."""
    equity: Floats
    """As the account says, per symbol."""
    ruined: NDArray[np.bool_]
    """Per symbol."""

    @classmethod
    def load(cls, db: duckdb.DuckDBPyConnection, bars: Bars, arm: str) -> Traded:
        """Read one arm's columns, in the order of `bars`."""
        if arm == "flat":
            return cls._flat(bars)
        columns = ", ".join(f"{arm}_{item} AS {item}" for item in _ARM_COLUMNS)
        data = db.execute(f"SELECT event_ts_us, {columns} FROM bars_in_order").fetchnumpy()
        if not np.array_equal(np.asarray(data.pop("event_ts_us"))[bars.arrived], bars.ts_us):
            raise RuntimeError("expected the bars in the order of the stream, found another")
        value = {
            name: np.asarray(data.pop(name), np.float64)[bars.arrived] for name in _ARM_COLUMNS
        }
        side = np.sign(value["exposure"]).astype(np.int64)
        return cls(
            side=side,
            entered=_entries(side, bars),
            gross=float((value["gross"] * bars.capital).sum()),
            fee=float((value["fee"] * bars.capital).sum()),
            slippage=float((value["slippage"] * bars.capital).sum()),
            paid=pay(
                value["gross"],
                value["gross_late"],
                value["fee"],
                value["slippage"],
                value["turnover"],
                bars.capital,
            ),
            exposure=value["exposure"],
            equity=value["equity"],
            ruined=bars.per_symbol(value["ruined"]) > 0.0,
        )

    @classmethod
    def _flat(cls, bars: Bars) -> Traded:
        """Return the arm that holds its capital and does nothing, by definition."""
        nothing = np.zeros(len(bars.ts_us))
        return cls(
            side=np.zeros(len(nothing), np.int64),
            entered=np.zeros(len(nothing), np.bool_),
            gross=0.0,
            fee=0.0,
            slippage=0.0,
            paid=Paid(nothing, nothing, nothing, nothing),
            exposure=nothing,
            equity=bars.capital,
            ruined=np.zeros(len(bars.symbols), np.bool_),
        )

    @property
    def net(self) -> Floats:
        """Profit after fees and slippage."""
        return self.paid.net


def _names(db: duckdb.DuckDBPyConnection, column: str) -> tuple[tuple[str, ...], str]:
    """Return a column's distinct values in order, and SQL for a row's index into them."""
    rows = db.execute(f"SELECT DISTINCT {column} FROM report_bars ORDER BY 1").fetchall()
    names = tuple(name for (name,) in rows)
    if not names:
        return names, "NULL::UTINYINT"
    db.execute(f"CREATE OR REPLACE TEMP TYPE report_{column} AS ENUM ({_texts(names)})")
    value = f"coalesce({column}, 'unknown')" if column == "regime" else column
    return names, f"enum_code(TRY_CAST({value} AS report_{column}))"


def _unknown(codes: NDArray[Any]) -> NDArray[np.bool_]:
    """Return where a row has none of the names."""
    return np.ma.getmaskarray(np.ma.asarray(codes))


def _entries(side: Ints, bars: Bars) -> NDArray[np.bool_]:
    """Return where a symbol holds a position that its bar before did not hold."""
    return (side != 0) & (side != bars.before(side))


def equity(bars: Bars, net: Floats) -> Floats:
    """Return the portfolio's equity at the start and at every time of the grid.

    Reference capital of all symbols plus `net` so far: a symbol without a new bar keeps its last
    value, one without any bar its capital.
    """
    gains = np.bincount(bars.cell, net, len(bars.grid))
    return bars.total_capital + np.concatenate([[0.0], np.cumsum(gains)])


def drawdown(values: Floats) -> Floats:
    """Return the fall of an equity curve from its peak so far, as a fraction of the peak."""
    peak = np.maximum.accumulate(values)
    return np.divide(peak - values, peak, out=np.zeros_like(peak), where=peak > 0.0)
