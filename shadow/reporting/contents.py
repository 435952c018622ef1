"""What does a store hold, whatever is asked: rows, versions, runs, files beside the tables?"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import duckdb
import msgspec

from rlv3.errors import DataError
from shadow.evaluation.bars import ORDER, count
from shadow.evaluation.registration import Registration, read_registrations
from shadow.evaluation.replayed import Replayed, read_replay
from shadow.store import TABLES, StoreReader

COLLECTED = ("repeated", "rejected", "lost")
"""Counters of the collector that a reader should see; its others are its own bookkeeping."""
_BEGINNINGS = ("runs", "bars", "ledger", "v2_decisions")


class Inputs(NamedTuple):
    """What a store knows beside its tables."""

    segments: tuple[tuple[str, int], ...] = ()
    """Path inside the store and rows, in name order."""
    collected: Mapping[str, Mapping[str, int]] = {}
    """Stream -> what the collector counted."""
    registrations: tuple[Registration, ...] = ()
    replay: Replayed | None = None
    directory: Path | None = None
    """Where artifacts are looked for."""


def read_inputs(reader: StoreReader, connection: duckdb.DuckDBPyConnection) -> Inputs:
    """Read what a store knows beside its tables.

    Raises:
        DataError: a registration or the result of an audit is damaged.
    """
    paths = [path for table in TABLES for path in reader.files(table)]
    segments: list[tuple[str, int]] = []
    if paths:
        found = connection.execute(
            "SELECT file_name, num_rows FROM parquet_file_metadata(?)", [list(map(str, paths))]
        ).fetchall()
        segments = sorted(
            (Path(name).relative_to(reader.directory).as_posix(), n) for name, n in found
        )
    collected = {
        name: {"rows": group.rows}
        | {what: group.counts[what] for what in COLLECTED if what in group.counts}
        for name, group in reader.position.groups.items()
    }
    return Inputs(
        tuple(segments),
        collected,
        read_registrations(reader.directory),
        read_replay(reader.directory),
        reader.directory,
    )


class Contents(NamedTuple):
    """What all tables hold, in one pass over each."""

    rows: dict[str, int]
    versions: dict[str, tuple[int, ...]]
    """Schema versions of the tables that have rows."""
    runs: tuple[str, ...]
    """Oldest first."""


def read_contents(db: duckdb.DuckDBPyConnection) -> Contents:
    """Read what all tables hold.

    Raises:
        DataError: no row of ours.
    """
    rows: dict[str, int] = {}
    versions: dict[str, tuple[int, ...]] = {}
    known: set[str] = set()
    for name in TABLES:
        found = db.execute(f"SELECT run_id, count(*) FROM {name} GROUP BY 1").fetchall()
        rows[name] = sum(n for _, n in found)
        if found:
            distinct = f"SELECT DISTINCT schema_version FROM {name} ORDER BY 1"
            versions[name] = tuple(version for (version,) in db.execute(distinct).fetchall())
        if name in _BEGINNINGS:
            known |= {run_id for run_id, _ in found}
    if not any(rows.values()):
        raise DataError(
            "expected a store with decisions or comparisons of `rlv3-worker collect`, "
            "found no row of either"
        )
    return Contents(rows, versions, tuple(_by_age(db, known)))


def _by_age(db: duckdb.DuckDBPyConnection, known: set[str]) -> list[str]:
    """Order runs by their first row; its own row is the first of a run, where it is there."""
    begins: dict[str, int] = {}
    for name in _BEGINNINGS:
        if missing := sorted(known - set(begins)):
            begins |= db.execute(
                f"SELECT run_id, min({ORDER}) FROM {name} "
                "WHERE run_id IN (SELECT unnest(?)) GROUP BY 1",
                [missing],
            ).fetchall()
    if not begins:  # decisions only
        begins |= db.execute("SELECT run_id, min(event_ts_us) FROM decisions GROUP BY 1").fetchall()
    return sorted(begins, key=lambda run_id: (begins[run_id], run_id))


class Provenance(msgspec.Struct, frozen=True):
    """Where the numbers come from."""

    report_version: int
    schema_versions: dict[str, tuple[int, ...]]
    rows: dict[str, int]
    """Rows per table, all runs."""
    rejected: int
    input_sha256: str
    """Over segment names and row counts."""
    segments: int


def provenance(
    db: duckdb.DuckDBPyConnection, contents: Contents, inputs: Inputs, report_version: int
) -> Provenance:
    """Say where the numbers come from."""
    lines = "".join(f"{name} {n}\n" for name, n in inputs.segments)
    lines += "".join(f"registration {item.id}\n" for item in inputs.registrations)
    return Provenance(
        report_version=report_version,
        schema_versions=contents.versions,
        rows=contents.rows,
        rejected=count(db, "SELECT count(*) FROM rejected"),
        input_sha256=hashlib.sha256(lines.encode()).hexdigest(),
        segments=len(inputs.segments),
    )
