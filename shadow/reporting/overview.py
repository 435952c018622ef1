"""What did the arms, the policies and production do? Sums and counts, without statistics.

Definitions, at bar closes:
    net       gross - fees - slippage, in account currency, summed over symbols
    equity    reference capital of all symbols + net so far; a symbol without a new bar keeps its
              last value, one without any bar its capital
    drawdown  fall of equity from its highest value so far, as a fraction of that value
    entries   bar closes with a position where the bar before had none, or the opposite one
    kappa     (p_o - p_e) / (1 - p_e); undefined when p_e is 1
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import duckdb
import msgspec
import numpy as np
from numpy.typing import NDArray

from rlv3.events import ACTION_TABLE
from shadow.evaluation.bars import Bars, Traded, drawdown, equity
from shadow.evaluation.batches import Batches, Ints
from shadow.evaluation.effect import Range, one_look
from shadow.evaluation.registration import ALPHA
from shadow.statistics.agreement import chance_agreement, kappa, observed_agreement


class Arm(msgspec.Struct, frozen=True):
    """One arm over all symbols; money in account currency."""

    name: str
    net_per_day: Range
    """Bps of the capital a day, with the 95 % interval of one look at the batches."""
    net: float
    gross: float
    fees: float
    slippage: float
    turnover: float
    """Traded notional."""
    max_drawdown: float
    """Fraction of the peak, at bar closes."""
    entries: int
    time_in_market: float | None
    """Share of bar closes with a position, over all symbols."""
    net_late: float
    """`net` had every fill come one tick later."""
    max_drawdown_late: float
    final_equity: float
    ruined: tuple[str, ...]
    """Symbols whose account was ruined."""


def arm(bars: Bars, name: str, traded: Traded, batches: Batches) -> Arm:
    """Sum one arm up."""
    net = float(traded.net.sum())
    v3 = batches.series("v3")
    values = {
        "v3": v3,
        "v2": batches.series("v2"),
        "follow_signal": v3 - batches.series("beats_signal"),
        "flat": v3 - batches.series("beats_flat"),
    }[name]
    return Arm(
        name=name,
        net_per_day=one_look(values * batches.bps_per_day, ALPHA),
        net=net,
        gross=traded.gross,
        fees=traded.fee,
        slippage=traded.slippage,
        turnover=float(traded.paid.turnover.sum()),
        max_drawdown=float(drawdown(equity(bars, traded.net)).max()),
        entries=int(traded.entered.sum()),
        time_in_market=float((traded.side != 0).mean()) if len(traded.side) else None,
        net_late=float(traded.paid.net_late.sum()),
        max_drawdown_late=float(drawdown(equity(bars, traded.paid.net_late)).max()),
        final_equity=bars.total_capital + net,
        ruined=tuple(np.asarray(bars.symbols)[traded.ruined].tolist()),
    )


class Agreement(msgspec.Struct, frozen=True):
    """How often two policies hold the same side."""

    table: tuple[tuple[int, int, int], ...]
    """Rows v3, columns v2; each short, flat, long."""
    n: int
    raw: float | None
    """Share on the diagonal (p_o); null without data."""
    expected: float | None
    """The same if both were independent (p_e)."""
    kappa: float | None
    """Null when undefined: no data, or p_e = 1."""
    opposite: float | None
    """Share with one long and the other short."""


def agreement(table: Sequence[Sequence[int]]) -> Agreement:
    """Describe a table of counts, rows v3 and columns v2, each short, flat, long."""
    n = sum(map(sum, table))
    rows = tuple((int(row[0]), int(row[1]), int(row[2])) for row in table)
    if n == 0:
        return Agreement(rows, 0, None, None, None, None)
    expected = float(chance_agreement(table))
    return Agreement(
        table=rows,
        n=n,
        raw=float(observed_agreement(table)),
        expected=expected,
        kappa=float(kappa(table)) if expected < 1.0 else None,
        opposite=(table[0][2] + table[2][0]) / n,
    )


def agreement_of(v3: Ints, v2: Ints, use: NDArray[np.bool_]) -> Agreement:
    """Compare the sides held in some of the bars."""
    cells = (v3[use] + 1) * 3 + v2[use] + 1
    return agreement(np.bincount(cells, minlength=9).reshape(3, 3).tolist())


class PairGroup(msgspec.Struct, frozen=True):
    """Pairs of one opponent made by one rule."""

    opponent: str
    rule: int
    pairs: int
    delta_ms: tuple[float, float, float, float, float]
    """v3's event time minus v2's: minimum, 5 %, 50 %, 95 %, maximum; quantiles in whole ones."""
    undirected: int
    """v2 gave no direction; not in the agreement."""
    cold: int
    """The symbol was cold; not in the agreement."""
    agreement: Agreement


def pairs(db: duckdb.DuckDBPyConnection) -> tuple[PairGroup, ...]:
    """Describe the pairs of a scope by opponent and rule."""
    rows = db.execute(
        """
        SELECT opponent, rule, sign(v3_target)::INT AS v3, sign(v2_exposure)::INT AS v2, warm,
               delta_us // 1000 AS delta_ms, count(*), min(delta_us), max(delta_us)
        FROM scoped_pairs GROUP BY 1, 2, 3, 4, 5, 6 ORDER BY 1, 2, 6, 3, 4, 5
        """
    ).fetchall()
    return tuple(
        _pair_group(opponent, rule, [row[2:] for row in group])
        for (opponent, rule), group in groupby(rows, key=lambda row: row[:2])
    )


def _pair_group(opponent: str, rule: int, rows: Sequence[tuple[Any, ...]]) -> PairGroup:
    """Describe pairs counted by side of v3, side of v2, warm and whole milliseconds apart."""
    table = [[0, 0, 0] for _ in range(3)]
    undirected = cold = 0
    for v3, v2, warm, _, n, _, _ in rows:
        if v2 is None:
            undirected += n
        elif not warm:
            cold += n
        else:
            table[v3 + 1][v2 + 1] += n
    counts = np.cumsum([row[4] for row in rows])
    low, middle, high = (
        float(rows[int(np.searchsorted(counts, max(q * counts[-1], 1.0)))][3])
        for q in (0.05, 0.5, 0.95)
    )
    least, most = min(row[5] for row in rows) / 1e3, max(row[6] for row in rows) / 1e3
    return PairGroup(
        opponent=opponent,
        rule=rule,
        pairs=int(counts[-1]),
        delta_ms=(least, low, middle, high, most),
        undirected=undirected,
        cold=cold,
        agreement=agreement(table),
    )


class ActionMix(msgspec.Struct, frozen=True):
    """What v3 chose, in the order of the action table."""

    actions: tuple[str, ...]
    steps: tuple[int, ...]
    advisory: tuple[int, ...]
    steps_cold: int
    """Steps decided while a market feature lacked history (entries are masked)."""
    advisory_cold: int


def actions(db: duckdb.DuckDBPyConnection) -> ActionMix:
    """Count what v3 chose."""
    rows = db.execute(
        """
        SELECT kind, action, count(*), count(*) FILTER (NOT warm) FROM scoped_decisions
        GROUP BY kind, action
        """
    ).fetchall()
    counts = {(kind, action): n for kind, action, n, _ in rows}
    cold = {kind: sum(row[3] for row in rows if row[0] == kind) for kind in ("step", "advisory")}
    indices = range(len(ACTION_TABLE))
    return ActionMix(
        actions=ACTION_TABLE,
        steps=tuple(counts.get(("step", action), 0) for action in indices),
        advisory=tuple(counts.get(("advisory", action), 0) for action in indices),
        steps_cold=cold["step"],
        advisory_cold=cold["advisory"],
    )


class V2Source(msgspec.Struct, frozen=True):
    """Decisions of RL v2 from one source."""

    opponent: str
    decisions: int
    long: int
    flat: int
    short: int
    undirected: int
    moves_arm: int
    """Decisions that the v2 arm follows."""
    multiplier_assumed: int
    """Decisions without a sizing of their own: multiplier 1."""


def v2_sources(db: duckdb.DuckDBPyConnection) -> tuple[V2Source, ...]:
    """Count what RL v2 decided, by source."""
    rows = db.execute(
        """
        SELECT opponent, count(*), count(*) FILTER (direction > 0),
               count(*) FILTER (direction = 0), count(*) FILTER (direction < 0),
               count(*) FILTER (direction IS NULL), count(*) FILTER (moves_arm),
               count(*) FILTER (multiplier_assumed)
        FROM scoped_v2_decisions GROUP BY opponent ORDER BY opponent
        """
    ).fetchall()
    return tuple(V2Source(*row) for row in rows)


class Outcomes(msgspec.Struct, frozen=True):
    """Real closes in production, recorded beside the simulation and part of no arm."""

    closes: int
    with_profit: int
    """Closes that state their profit or loss."""


def outcomes(db: duckdb.DuckDBPyConnection) -> Outcomes:
    """Count the real closes."""
    closes, known = db.execute(
        """
        SELECT count(*), count(*) FILTER (pnl_usd IS NOT NULL OR pnl_pct IS NOT NULL)
        FROM scoped_outcomes
        """
    ).fetchall()[0]
    return Outcomes(closes, known)
