"""What did each arm earn, bar by bar? The bars of one run as arrays in one fixed order.

Bars are ordered by time and symbol, whatever segments they came from, so that sums over them give
equal bits for equal inputs. Money is in account currency.
"""

from __future__ import annotations

from typing import NamedTuple

import duckdb
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Bars(NamedTuple):
    """The run's bars in (time, symbol) order; all arrays have one element per bar."""

    order: Ints
    """Where each of them is among the rows of `report_bars`."""
    ts_us: Ints
    symbol: Ints
    """Index into `symbols`."""
    regime: Ints
    """Index into `regimes`."""
    warm: NDArray[np.bool_]
    capital: Floats
    open: Floats
    close: Floats
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
    def load(cls, db: duckdb.DuckDBPyConnection, run_id: str) -> Bars:
        """Read the bars of a run; `report_bars` of this cursor is a view of its rows from then on.

        Columns are read in the order in which they are stored, and put in order here: DuckDB would
        sort all of them again for every arm.
        """
        quoted = run_id.replace("'", "''")
        db.execute(
            f"""
            CREATE OR REPLACE TEMP VIEW report_bars AS
            SELECT *, coalesce(regime, 'unknown') AS regime_known, flat_equity AS capital
            FROM bars WHERE run_id = '{quoted}'
            """
        )
        symbols, symbol_code = _names(db, "symbol")
        regimes, regime_code = _names(db, "regime_known")
        data = db.execute(
            f"""
            SELECT event_ts_us, {symbol_code} AS symbol, {regime_code} AS regime, warm, capital,
                   open, close
            FROM report_bars
            """
        ).fetchnumpy()
        gap, restarted, empty, owed = db.execute(
            """
            SELECT count(*) FILTER (gap), count(*) FILTER (restarted),
                   coalesce(sum(empty_after), 0), count(*) FILTER (step_decision_id IS NULL)
            FROM report_bars
            """
        ).fetchall()[0]
        ts_us = np.asarray(data["event_ts_us"], np.int64)
        symbol = np.asarray(data["symbol"], np.int64)
        order = np.lexsort((symbol, ts_us))  # stable: a bar stored twice stays in stream order
        ts_us, symbol = ts_us[order], symbol[order]
        starts = np.flatnonzero(np.diff(ts_us, prepend=-1))
        cell = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(ts_us)))
        capital = np.asarray(data["capital"], np.float64)[order]
        by_symbol = np.argsort(symbol, kind="stable")
        bounds = np.searchsorted(symbol[by_symbol], np.arange(len(symbols) + 1))
        first = by_symbol[bounds[:-1]]
        return cls(
            order=order,
            ts_us=ts_us,
            symbol=symbol,
            regime=np.asarray(data["regime"], np.int64)[order],
            warm=np.asarray(data["warm"], np.bool_)[order],
            capital=capital,
            open=np.asarray(data["open"], np.float64)[order],
            close=np.asarray(data["close"], np.float64)[order],
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

    def per_symbol(self, values: Floats | NDArray[np.bool_]) -> Floats:
        """Sum a column per symbol."""
        return np.bincount(self.symbol, values, len(self.symbols)).astype(np.float64)

    def per_regime(self, values: Floats | NDArray[np.bool_]) -> Floats:
        """Sum a column per regime."""
        return np.bincount(self.regime, values, len(self.regimes)).astype(np.float64)


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


_MONEY = ("gross", "turnover", "fee", "slippage", "gross_late")
"""Columns that are fractions of the reference capital."""


class Traded(NamedTuple):
    """What one arm did, per bar, in account currency."""

    side: Ints
    """-1 short, 0 flat, 1 long, at the close."""
    exposure: Floats
    """Signed fraction of equity, at the close."""
    entered: NDArray[np.bool_]
    gross: Floats
    turnover: Floats
    fee: Floats
    slippage: Floats
    net: Floats
    net_late: Floats
    equity: Floats
    """As the account says, per symbol."""
    ruined: NDArray[np.bool_]
    """Per symbol."""

    @classmethod
    def load(cls, db: duckdb.DuckDBPyConnection, bars: Bars, arm: str) -> Traded:
        """Read one arm's columns, in the order of `bars`."""
        columns = ", ".join(f"{arm}_{item} AS {item}" for item in _ARM_COLUMNS)
        data = db.execute(f"SELECT {columns} FROM report_bars").fetchnumpy()
        value = {name: np.asarray(data.pop(name), np.float64)[bars.order] for name in _ARM_COLUMNS}
        for name in _MONEY:
            value[name] *= bars.capital
        costs = value["fee"] + value["slippage"]
        side = np.sign(value["exposure"]).astype(np.int64)
        return cls(
            side=side,
            exposure=value["exposure"],
            entered=_entries(side, bars),
            gross=value["gross"],
            turnover=value["turnover"],
            fee=value["fee"],
            slippage=value["slippage"],
            net=value["gross"] - costs,
            net_late=value["gross_late"] - costs,
            equity=value["equity"],
            ruined=bars.per_symbol(value["ruined"]) > 0.0,
        )


def _names(db: duckdb.DuckDBPyConnection, column: str) -> tuple[tuple[str, ...], str]:
    """Return a column's distinct values in order, and SQL for a row's index into them."""
    rows = db.execute(f"SELECT DISTINCT {column} FROM report_bars ORDER BY 1").fetchall()
    names = tuple(name for (name,) in rows)
    if not names:
        return names, "0"
    kind = f"report_{column}"
    quoted = ", ".join("'" + name.replace("'", "''") + "'" for name in names)
    db.execute(f"CREATE OR REPLACE TEMP TYPE {kind} AS ENUM ({quoted})")
    return names, f"enum_code({column}::{kind})"


def _entries(side: Ints, bars: Bars) -> NDArray[np.bool_]:
    """Return where a symbol holds a position that its bar before did not hold."""
    before = np.zeros_like(side)
    before[bars.by_symbol[1:]] = side[bars.by_symbol[:-1]]
    before[bars.first] = 0
    return (side != 0) & (side != before)


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
