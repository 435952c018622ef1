"""Any question about a store, in DuckDB's SQL: its tables, and views that answer in one line.

Tables are `decisions`, `v2_decisions`, `pairs`, `unpaired`, `bars`, `outcomes`, `ledger`, `runs`
and `rejected` (docs/contracts.md has their columns). They are views of the store's files, which no
INSERT, UPDATE or DELETE changes; tables that a query makes live in memory until the end.
"""

from __future__ import annotations

import csv
import io
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import duckdb
import msgspec
from rich.table import Table
from rich.text import Text

from rlv3 import console
from rlv3.errors import DataError
from shadow.records import ARMS
from shadow.store import StoreReader

SHOWN = 200  # rows of a table on a terminal
PROMPT = "shadow> "
MORE = "   ...> "

_ARM_ROWS = " UNION ALL ".join(
    f"SELECT run_id, symbol, event_ts_us, event_time, '{arm}' AS arm, regime, warm, "
    f"{arm}_exposure AS exposure, {arm}_gross AS gross, {arm}_fee AS fee, "
    f"{arm}_slippage AS slippage, {arm}_turnover AS turnover, {arm}_equity AS equity, "
    f"{arm}_gross - {arm}_fee - {arm}_slippage AS net, "
    f"{arm}_gross_late - {arm}_fee - {arm}_slippage AS net_late FROM bars"
    for arm in ARMS
)

VIEWS: dict[str, tuple[str, str]] = {
    "arm_bars": ("One row per bar and arm; net is after all costs.", _ARM_ROWS),
    "differences": (
        "One row per bar: what v3 earned more than v2, as a fraction of the capital.",
        "SELECT run_id, symbol, event_ts_us, event_time, regime, warm, v3_exposure, v2_exposure, "
        "(v3_gross - v3_fee - v3_slippage) - (v2_gross - v2_fee - v2_slippage) AS d, "
        "(v3_gross_late - v3_fee - v3_slippage) - (v2_gross_late - v2_fee - v2_slippage) "
        "AS d_late FROM bars",
    ),
    "steps": (
        "One row per step: the decision together with the bar it closed.",
        "SELECT d.*, b.open, b.high, b.low, b.close, b.volume, b.regime, b.v3_exposure, "
        "b.v2_exposure, b.obs, b.missing_mask FROM decisions AS d "
        "JOIN bars AS b ON b.step_decision_id = d.decision_id WHERE d.kind = 'step'",
    ),
    "matched": (
        "One row per pair: v2's decision and the v3 decision it was compared with.",
        "SELECT p.*, v.strategy, v.model, v.weight, v.size_multiplier, v.leverage, "
        "v.base_direction, v.signal_confidence, v.effective_confidence, v.moves_arm "
        "FROM pairs AS p LEFT JOIN v2_decisions AS v "
        "ON v.decision_id = p.v2_decision_id AND v.run_id = p.run_id",
    ),
    "coverage": (
        "One row per symbol and day: bars, those without history, with a hole, without a tick.",
        "SELECT run_id, symbol, event_time::DATE AS day, count(*) AS bars, "
        "count(*) FILTER (NOT warm) AS cold, count(*) FILTER (gap) AS gaps, "
        "sum(empty_after)::BIGINT AS empty FROM bars GROUP BY ALL",
    ),
}
"""Name -> meaning, query."""


def connect(store: str | Path) -> duckdb.DuckDBPyConnection:
    """Return a connection on a store with all tables and views.

    Raises:
        DataError: there is no store, or a segment of it is damaged.
    """
    connection = StoreReader(store).connect()
    for name, (meaning, query) in VIEWS.items():
        connection.execute(f"CREATE VIEW {name} AS {query}")
        connection.execute(f"COMMENT ON VIEW {name} IS '{meaning.replace(chr(39), chr(39) * 2)}'")
    return connection


def run(store: str | Path, command: str | None, form: str) -> None:
    """Answer one query, or every query that is typed or piped in.

    Args:
        form: table, csv or json.
    Raises:
        DataError: no store, or DuckDB refuses a query that was not typed by a person.
    """
    with connect(store) as connection:
        if command is not None:
            answer(connection, command, form)
        elif sys.stdin.isatty():
            _converse(connection, form)
        else:
            answer(connection, sys.stdin.read(), form)


def answer(connection: duckdb.DuckDBPyConnection, query: str, form: str) -> None:
    """Print what a query gives.

    Raises:
        DataError: DuckDB refuses it.
    """
    try:
        found = connection.execute(query)
        if found.description is None:
            return
        names = [column[0] for column in found.description]
        _print(names, _rows(found), form)
    except duckdb.Error as error:
        raise DataError(f"expected a query that DuckDB understands, found: {error}") from error


def _rows(found: duckdb.DuckDBPyConnection) -> Iterator[tuple[Any, ...]]:
    while rows := found.fetchmany(10_000):
        yield from rows


def _print(names: Sequence[str], rows: Iterator[tuple[Any, ...]], form: str) -> None:
    if form == "table":
        table = Table(*names)
        for row in itertools.islice(rows, SHOWN):
            table.add_row(*map(_cell, row))
        console.out.print(table)
        if next(rows, None) is not None:
            console.out.print(f"the first {SHOWN} rows; --csv prints all", highlight=False)
        return
    if form == "csv":
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(names)
        for row in rows:
            writer.writerow(row)
            sys.stdout.write(buffer.getvalue())
            buffer.seek(0)
            buffer.truncate()
        sys.stdout.write(buffer.getvalue())
        return
    for row in rows:
        line = msgspec.json.encode(dict(zip(names, row, strict=True)), enc_hook=str)
        sys.stdout.write(line.decode() + "\n")


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:,.6g}" if isinstance(value, float) else str(value)


def _converse(connection: duckdb.DuckDBPyConnection, form: str) -> None:
    """Answer a person until Ctrl-D; what DuckDB refuses is said, and the next query awaited."""
    import readline  # noqa: F401, gives `input` its history

    for name, (meaning, _) in VIEWS.items():
        console.err.print(f"{name:<12} {meaning}", highlight=False)
    console.err.print("SHOW TABLES; lists all, DESCRIBE bars; its columns, Ctrl-D ends")
    text = ""
    while True:
        try:
            text += input(MORE if text else PROMPT) + "\n"
        except EOFError:
            return
        except KeyboardInterrupt:
            text = ""
            console.err.print()
            continue
        if text.strip().endswith(";"):
            try:
                answer(connection, text, form)
            except DataError as error:
                console.err.print(Text.assemble(("error:", "red"), f" {error}"), soft_wrap=True)
            text = ""
        elif not text.strip():
            text = ""
