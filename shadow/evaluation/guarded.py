"""What would risk limits have made of v3? Its guarded account against its own, and every veto.

For the bars in which limits were in force; None where there are none. No gate and no verdict uses
any of it: limits are the operator's, and the comparison is about what the policy does by itself.
"""

from __future__ import annotations

import duckdb
import msgspec
import numpy as np

from rlv3.events import Action
from shadow.evaluation.bars import ORDER, Scope
from shadow.evaluation.batches import Floats
from shadow.risk import REASONS
from shadow.statistics.inference import drawdown


class Book(msgspec.Struct, frozen=True):
    """One account over those bars, all symbols, in account currency."""

    net: float
    fees: float
    slippage: float
    turnover: float
    max_drawdown: float
    """Fraction of the reference capital."""


class Vetoes(msgspec.Struct, frozen=True):
    """How many decisions a reason would not have allowed."""

    reason: str
    steps: int
    """Those would have been orders."""
    advisory: int


class Switch(msgspec.Struct, frozen=True):
    """A change of the kill switch."""

    at_us: int
    """The minute before which it was read."""
    engaged: bool


class Guarded(msgspec.Struct, frozen=True):
    """v3 as it would have traded, beside v3 as it did."""

    bars: int
    guarded: Book
    v3: Book
    entries: int
    """Steps of v3 that chose LONG or SHORT."""
    vetoes: tuple[Vetoes, ...]
    switches: tuple[Switch, ...]

    @property
    def vetoed(self) -> int:
        """Steps that would not have been carried out."""
        return sum(found.steps for found in self.vetoes)


def guard(db: duckdb.DuckDBPyConnection, scope: Scope) -> Guarded | None:
    """Summarise the bars of an installed scope in which limits were in force."""
    (bars,) = db.execute("SELECT count(guarded) FROM report_bars").fetchall()[0]
    if not bars:
        return None
    entries = db.execute(
        """
        SELECT count(*) FROM scoped_decisions
        WHERE risk_allowed IS NOT NULL AND kind = 'step' AND action IN ($1, $2)
        """,
        [Action.LONG, Action.SHORT],
    ).fetchall()[0][0]
    return Guarded(bars, *_books(db), entries, _vetoes(db), _switches(db, scope))


def _books(db: duckdb.DuckDBPyConnection) -> tuple[Book, Book]:
    data = db.execute(
        f"""
        SELECT event_ts_us, flat_equity AS capital,
               guarded.gross AS gross, guarded.fee AS fee, guarded.slippage AS slippage,
               guarded.turnover AS turnover, v3_gross, v3_fee, v3_slippage, v3_turnover
        FROM report_bars WHERE guarded IS NOT NULL
        ORDER BY event_ts_us, symbol, {ORDER}
        """
    ).fetchnumpy()
    capitals = db.execute(
        """
        SELECT max(flat_equity) FROM report_bars WHERE guarded IS NOT NULL
        GROUP BY symbol ORDER BY symbol
        """
    ).fetchall()
    total = sum(capital for (capital,) in capitals)
    starts = np.flatnonzero(np.diff(data["event_ts_us"], prepend=-1))

    def book(gross: str, fee: str, slippage: str, turnover: str) -> Book:
        amounts = [data["capital"] * data[name] for name in (gross, fee, slippage, turnover)]
        net: Floats = amounts[0] - amounts[1] - amounts[2]
        curve = np.add.reduceat(net, starts) / total
        return Book(
            net=float(net.sum()),
            fees=float(amounts[1].sum()),
            slippage=float(amounts[2].sum()),
            turnover=float(amounts[3].sum()),
            max_drawdown=float(drawdown(curve)),
        )

    return (
        book("gross", "fee", "slippage", "turnover"),
        book("v3_gross", "v3_fee", "v3_slippage", "v3_turnover"),
    )


def _vetoes(db: duckdb.DuckDBPyConnection) -> tuple[Vetoes, ...]:
    rows = db.execute(
        """
        SELECT risk_reason, count(*) FILTER (kind = 'step'), count(*) FILTER (kind <> 'step')
        FROM scoped_decisions WHERE risk_reason IS NOT NULL GROUP BY 1
        """
    ).fetchall()
    known = {reason: place for place, reason in enumerate(REASONS)}
    rows.sort(key=lambda row: (known.get(row[0], len(known)), row[0]))
    return tuple(Vetoes(*row) for row in rows)


def _switches(db: duckdb.DuckDBPyConnection, scope: Scope) -> tuple[Switch, ...]:
    rows = db.execute(
        f"""
        SELECT event_ts_us, entry_ids[1] LIKE '%|on' FROM ledger
        WHERE reason = 'kill' AND run_id IN (SELECT unnest($1))
          AND event_ts_us > $2 AND event_ts_us <= $3 ORDER BY {ORDER}
        """,
        [
            list(scope.runs),
            -1 if scope.since_us is None else scope.since_us,
            2**63 - 1 if scope.until_us is None else scope.until_us,
        ],
    ).fetchall()
    return tuple(Switch(*row) for row in rows)
