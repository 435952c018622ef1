"""Can the data of a store be trusted? What became of every entry, and which identities hold.

The ledger counts entries since the worker's first start, so its checks cover the whole store; those
on bars cover the run that is reported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import duckdb
import msgspec
import numpy as np

from shadow.bars import ORDER, Bars, Traded
from shadow.pipeline import OUTCOMES


class Check(msgspec.Struct, frozen=True):
    """One question about the data and its answer."""

    name: str
    ok: bool
    found: str


class Stream(msgspec.Struct, frozen=True):
    """What became of the entries of one input stream, since the worker's first start."""

    stream: str
    read: int
    outcomes: dict[str, int]
    lost: int | None
    """Trimmed before they were read; null where the server cannot tell."""


class Health(msgspec.Struct, frozen=True):
    """Can the data be trusted?"""

    streams: tuple[Stream, ...]
    checks: tuple[Check, ...]
    gap_bars: int
    restarted_bars: int
    empty_bars: int
    cold_bars: int
    owed_steps: int
    collected: dict[str, dict[str, int]]
    """The collector's own counters per stream: repeated, rejected, lost …"""


def count(db: duckdb.DuckDBPyConnection, query: str, *values: object) -> int:
    """Return the only number a query gives."""
    return int(db.execute(query, list(values)).fetchall()[0][0])


def examine(
    db: duckdb.DuckDBPyConnection,
    bars: Bars,
    traded: Mapping[str, Traded],
    step_us: int,
    collected: Mapping[str, Mapping[str, int]],
) -> Health:
    """Check the data of a run whose bars are loaded.

    Args:
        db: the cursor on which `Bars.load` ran.
        step_us: length of a bar.
        collected: stream -> what the collector counted.
    """
    ledger = db.execute(f"SELECT counts FROM ledger ORDER BY {ORDER} DESC LIMIT 1").fetchall()
    counts: dict[str, dict[str, int]] = ledger[0][0] if ledger else {}
    checks = [
        *_ledger_checks(db, counts),
        _step_check(db),
        _v2_check(db),
        _hole_check(db, step_us),
        _equity_check(bars, traded),
        _incident_check(db),
        _collector_check(db, collected),
    ]
    return Health(
        streams=tuple(_stream(name, dict(counts[name])) for name in sorted(counts)),
        checks=tuple(checks),
        gap_bars=bars.gap_bars,
        restarted_bars=bars.restarted_bars,
        empty_bars=bars.empty_bars,
        cold_bars=int((~bars.warm).sum()),
        owed_steps=bars.owed_steps,
        collected={name: dict(values) for name, values in sorted(collected.items())},
    )


def _stream(name: str, counts: Mapping[str, int]) -> Stream:
    beside = ("read", "lost", "produced", "unread")
    known = {outcome: counts[outcome] for outcome in OUTCOMES if outcome in counts}
    other = {key: n for key, n in sorted(counts.items()) if key not in (*OUTCOMES, *beside)}
    outcomes = known | other
    return Stream(name, counts.get("read", sum(outcomes.values())), outcomes, counts.get("lost"))


def _ledger_checks(
    db: duckdb.DuckDBPyConnection, counts: Mapping[str, Mapping[str, int]]
) -> Iterator[Check]:
    if not counts:
        yield Check("the worker's ledger is in the store", False, "no ledger row")
        return
    streams = [_stream(name, values) for name, values in counts.items()]
    read = sum(stream.read for stream in streams)
    accounted = sum(sum(stream.outcomes.values()) for stream in streams)
    yield Check(
        "entries read = sum of their outcomes",
        all(stream.read == sum(stream.outcomes.values()) for stream in streams),
        f"{read:,} read, {accounted:,} accounted for",
    )
    decided = {stream.stream: stream.outcomes.get("decided", 0) for stream in streams}
    stored = dict(
        db.execute("SELECT source_event_type, count(*) FROM decisions GROUP BY 1").fetchall()
    )
    missing = sum(max(n - stored.get(stream, 0), 0) for stream, n in decided.items())
    yield Check(
        "every decision the ledger counts is in the store",
        missing == 0,
        f"{sum(decided.values()):,} counted by the last ledger row, {sum(stored.values()):,} in "
        f"the store" + (f", {missing:,} missing" if missing else ""),
    )
    conflated = sum(stream.outcomes.get("conflated", 0) for stream in streams)
    named = count(
        db, "SELECT coalesce(sum(len(entry_ids)), 0) FROM ledger WHERE reason = 'conflated'"
    )
    if conflated or named:
        yield Check(
            "every conflated entry is named in the ledger",
            named >= conflated,
            f"{conflated:,} counted, {named:,} named",
        )


def _step_check(db: duckdb.DuckDBPyConnection) -> Check:
    missing = count(
        db,
        """
        SELECT count(*) FROM report_bars ANTI JOIN decisions
        ON report_bars.step_decision_id = decisions.decision_id
        WHERE step_decision_id IS NOT NULL
        """,
    )
    found = "all there" if missing == 0 else f"{missing:,} missing"
    return Check("the step decision of every bar is in the store", missing == 0, found)


def _v2_check(db: duckdb.DuckDBPyConnection) -> Check:
    decided = count(db, "SELECT count(*) FROM v2_decisions")
    paired = count(db, "SELECT count(*) FROM pairs")
    alone = count(db, "SELECT count(*) FROM unpaired WHERE side = 'v2'")
    waiting = decided - paired - alone
    return Check(
        "RL v2's decisions = paired + unpaired + still open",
        waiting >= 0,
        f"{decided:,} = {paired:,} + {alone:,} + {waiting:,}",
    )


def _hole_check(db: duckdb.DuckDBPyConnection, step_us: int) -> Check:
    holes = count(
        db,
        """
        SELECT count(*) FROM (
            SELECT event_ts_us - lag(event_ts_us + ? * (1 + empty_after))
                OVER (PARTITION BY symbol ORDER BY event_ts_us) AS hole
            FROM report_bars
        ) WHERE hole <> 0
        """,
        step_us,
    )
    found = "none missing" if holes == 0 else f"bars are missing in {holes:,} places"
    return Check("bars follow each other without a hole", holes == 0, found)


def _equity_check(bars: Bars, traded: Mapping[str, Traded]) -> Check:
    """Compare every account's own equity with the profits of its bars."""
    worst = 0.0
    for arm in traded.values():
        start = arm.equity[bars.first] - arm.net[bars.first]
        difference = np.abs(arm.equity[bars.last] - start - bars.per_symbol(arm.net))
        worst = max(worst, float(difference.max(initial=0.0)))
    ok = worst <= 1e-9 * max(bars.total_capital, 1.0)
    found = "equal within rounding" if ok else f"differs by up to {worst:,.2f}"
    return Check("change of equity = sum of net profits, every account", ok, found)


def _incident_check(db: duckdb.DuckDBPyConnection) -> Check:
    found = db.execute(
        """
        SELECT reason, count(*) FROM ledger
        WHERE reason NOT IN ('minute', 'stop', 'conflated', 'swap')
        GROUP BY 1 ORDER BY 1
        """
    ).fetchall()
    text = ", ".join(f"{reason} {n:,}" for reason, n in found) or "none"
    return Check("no incident in the ledger", not found, text)


def _collector_check(
    db: duckdb.DuckDBPyConnection, collected: Mapping[str, Mapping[str, int]]
) -> Check:
    lost = sum(counts.get("lost", 0) for counts in collected.values())
    parked = count(db, "SELECT count(*) FROM rejected")
    return Check(
        "the collector lost nothing and could read everything",
        lost == 0 and parked == 0,
        f"{lost:,} entries trimmed before they were collected, {parked:,} unreadable",
    )
