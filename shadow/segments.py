"""Append-only Parquet segments on disk: what is durable, and from which stream id do we go on?

Rules, on which every reader and writer of a store or recording relies:

- A segment is `<table>/day=YYYY-MM-DD/<first>_<last>.parquet`. The ids are those of the whole flush
  it was part of; the day is the UTC day of its rows' ids, and no segment crosses a day.
- `position.json` is written after all segments of a flush. Only what ends at or before the position
  of its group is part of the store; a segment beyond it is what an interrupted flush left behind.
- Merged segments cover the ids of their sources. A segment whose ids lie within those of another
  one of the same table and day is superseded.
- Everything gets its name by an atomic rename after an fsync, and one process writes at a time.

A group is a stream that has a position of its own; several tables may share it. Rows enter as JSON
lines and DuckDB turns them into typed columns; doubles survive bit for bit.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import duckdb
import msgspec

from rlv3.errors import DataError, OutOfMemory
from shadow.records import MAX_ID_MS, ORIGIN, StreamId, parse_id

_POSITION = "position.json"
_FORMAT = 1
_MERGE_AT = 64  # small segments of one table and day that are worth one merge
_SMALL = 4 << 20  # bytes; larger segments wait for the end of the day
_GRACE_S = 60.0  # a reader that listed the sources of a merge may still open them for so long
_MAX_OBJECT = 16 << 20  # bytes of a JSON line; DuckDB's default
_MEMORY_LIMIT = "512MB"


class Table(NamedTuple):
    """One table: where it lives, what its JSON lines hold and which columns they become."""

    name: str
    """Directory under the store, for example `bars` or `entries/market.tick`."""
    group: str
    """The stream its rows come from."""
    json: Mapping[str, str]
    """Field of a JSON line -> DuckDB type it is read as."""
    columns: Mapping[str, tuple[str, str]]
    """Column -> (DuckDB type, SQL expression over the JSON fields)."""
    row_group: int = 16_384
    """Rows that are in memory together when segments are merged (a decision is about 1 KiB)."""


class Segment(NamedTuple):
    """One Parquet file and the ids it covers."""

    path: Path
    first: StreamId
    last: StreamId


class Progress(msgspec.Struct):
    """How far a group is durable, and what was counted on the way."""

    stream: str
    """Full stream key."""
    id: str = ORIGIN
    rows: int = 0
    """Rows in the store."""
    counts: dict[str, int] = {}
    """Whatever its writer counts: entries lost, repeated, rejected …"""


class Position(msgspec.Struct):
    """Content of `position.json`."""

    format: int = _FORMAT
    groups: dict[str, Progress] = {}
    notes: dict[str, str] = {}
    """Small texts that must change together with the position."""


def day_of(entry_id: StreamId) -> str:
    """Return the UTC day of an entry id as YYYY-MM-DD."""
    return _day(min(entry_id[0], MAX_ID_MS) // 86_400_000)


@lru_cache(maxsize=64)
def _day(number: int) -> str:
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(days=number)).date().isoformat()


def read_position(directory: Path) -> Position | None:
    """Read how far a store is durable; None when nothing was ever flushed.

    Raises:
        DataError: the file is not a position of this program.
    """
    path = directory / _POSITION
    try:
        position = msgspec.json.decode(path.read_bytes(), type=Position)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise DataError(f"{path} is not readable as a store position: {error}") from error
    if position.format != _FORMAT:
        raise DataError(f"{path} has format {position.format}, expected {_FORMAT}")
    return position


def list_segments(directory: Path, table: str) -> dict[str, list[Segment]]:
    """Return all segment files of a table per day, in id order, whether valid or not."""
    days: dict[str, list[Segment]] = {}
    for folder in sorted((directory / table).glob("day=*")):
        found = [_segment(path) for path in folder.glob("*.parquet")]
        found.sort(key=lambda segment: (segment.first, segment.last))
        days[folder.name.removeprefix("day=")] = found
    return days


def valid_segments(directory: Path, table: Table, position: Position) -> list[Segment]:
    """Return the segments that are part of the store: durable and not superseded, in id order."""
    progress = position.groups.get(table.group)
    if progress is None:
        return []
    end = parse_id(progress.id)
    valid = []
    for segments in list_segments(directory, table.name).values():
        durable = [segment for segment in segments if segment.last <= end]
        valid += _outermost(durable)
    return valid


def relation(table: Table, files: Iterable[Path]) -> str:
    """Return SQL that yields the table's rows from these files, typed even when there is none.

    Where the newest file has every column, no typed row set is needed beside the files; DuckDB
    would read ten times as much through the union.
    """
    paths = list(files)
    names = ", ".join(map(_quote, paths))
    rows = f"FROM read_parquet([{names}], union_by_name = true, hive_partitioning = false)"
    if paths and _columns(paths[-1]) >= set(table.columns):
        return f"SELECT {', '.join(map(_quoted_name, table.columns))} {rows}"
    types = ", ".join(f'NULL::{kind} AS "{name}"' for name, (kind, _) in table.columns.items())
    empty = f"SELECT {types} WHERE false"
    return f"{empty} UNION ALL BY NAME SELECT * {rows}" if paths else empty


@lru_cache(maxsize=4096)
def _columns(path: Path) -> frozenset[str]:
    """Return the columns of a segment, none where it cannot be read: its reader will say so."""
    try:
        with duckdb.connect() as connection:
            found = connection.execute(f"DESCRIBE SELECT * FROM read_parquet({_quote(path)})")
            return frozenset(row[0] for row in found.fetchall())
    except duckdb.Error:
        return frozenset()


@contextmanager
def within_memory(what: str) -> Iterator[None]:
    """Tell a want of memory from damaged data: DuckDB's error is of one family for both.

    Args:
        what: was to be done, an infinitive without `to`.
    Raises:
        OutOfMemory: DuckDB had not enough.
    """
    try:
        yield
    except duckdb.OutOfMemoryException as error:
        found = str(error).partition("\n")[0]
        raise OutOfMemory(f"expected memory enough to {what}, found: {found}") from error


def _quoted_name(name: str) -> str:
    return f'"{name}"'


class SegmentWriter:
    """The only writer of a directory of segments.

    `add` and `advance` collect in memory, `flush` makes everything durable or raises `OSError` and
    keeps it for the next try. `merge_small` and `compact` touch only what is durable, so they may
    run in another thread beside `flush`.

    Raises:
        DataError: another process writes here, or the directory cannot be used.
    """

    def __init__(self, directory: str | Path, tables: Sequence[Table]) -> None:
        self.directory = Path(directory)
        self.tables = {table.name: table for table in tables}
        self._lock = _lock(self.directory)
        self._duckdb = duckdb.connect(
            ":memory:", config={"threads": 1, "memory_limit": _MEMORY_LIMIT}
        )
        self.position = read_position(self.directory) or Position()
        self._last = {name: parse_id(group.id) for name, group in self.position.groups.items()}
        self._first: dict[str, StreamId] = {}  # of the rows and advances since the last flush
        self._rows: dict[tuple[str, str], list[bytes]] = {}
        self._bytes = 0
        self._orphans: set[Path] = set()  # written by a flush that then failed
        self._merging = threading.Lock()
        self._closed = False
        self._retired: deque[tuple[float, Path]] = deque()
        self._sweep()

    @property
    def pending(self) -> int:
        """Rows that are not durable yet."""
        return sum(map(len, self._rows.values()))

    @property
    def pending_bytes(self) -> int:
        """Memory that these rows take."""
        return self._bytes

    def progress(self, stream: str) -> Progress:
        """Return the progress of a stream's group, which starts at 0-0.

        Raises:
            DataError: the group belongs to another stream key.
        """
        group = group_of(stream)
        progress = self.position.groups.setdefault(group, Progress(stream=stream))
        if progress.stream != stream:
            raise DataError(
                f"{self.directory} holds {progress.stream}, it cannot take {stream} as well"
            )
        return progress

    def advance(self, stream: str, entry_id: str) -> StreamId:
        """Note that the entry is taken: the next flush makes it part of the position.

        Raises:
            ValueError: ids must grow.
        """
        group, parsed = group_of(stream), parse_id(entry_id)
        self.progress(stream)
        if parsed <= self._last.get(group, (0, 0)):
            raise ValueError(f"ids of {stream} must grow, got {entry_id} after {self._last[group]}")
        self._first.setdefault(group, parsed)
        self._last[group] = parsed
        return parsed

    def add(self, table: str, entry_id: StreamId, line: bytes) -> None:
        """Add one JSON line to a table; its stream was advanced to this id just before."""
        self._rows.setdefault((table, day_of(entry_id)), []).append(line)
        self._bytes += len(line)

    def flush(self) -> dict[str, str]:
        """Make everything that was added durable.

        Returns:
            Stream key -> id up to which its rows are durable.

        Raises:
            OSError: the disk refuses; nothing is lost, call again.
            OutOfMemory: so many rows at once need more; nothing is lost, call again.
        """
        written = {self._write(table, day, lines) for (table, day), lines in self._rows.items()}
        self._commit()
        self._rows.clear()
        self._bytes = 0
        self._first.clear()
        for orphan in self._orphans - written:
            orphan.unlink(missing_ok=True)
        self._orphans.clear()
        self._delete_retired(time.monotonic())
        return {group.stream: group.id for group in self.position.groups.values()}

    def compact(self, day: str) -> int:
        """Merge every table's segments of a day into one; return how many segments went away.

        A day that some stream has not left yet is not touched.
        """
        return sum(
            self._merge(table, day, segments)
            for table, segments in self._durable(day)
            if day_of(self._end(table)) > day
        )

    def tidy(self) -> int:
        """Merge what has piled up and finished days; return how many segments went away."""
        return self.merge_small() + sum(map(self.compact, self.finished_days()))

    def merge_small(self) -> int:
        """Merge the newest small segments where many have piled up; return how many went away."""
        merged = 0
        for table, segments in self._durable(None):
            tail: list[Segment] = []
            for segment in reversed(segments):
                if segment.path.stat().st_size > _SMALL:
                    break
                tail.append(segment)
            if len(tail) >= _MERGE_AT:
                day = tail[0].path.parent.name.removeprefix("day=")
                merged += self._merge(table, day, tail[::-1])
        return merged

    def finished_days(self) -> list[str]:
        """Return the days that have something left to compact."""
        return sorted(
            {
                day
                for table in self.tables.values()
                for day, segments in list_segments(self.directory, table.name).items()
                if len(_outermost(segments)) > 1 and day_of(self._end(table)) > day
            }
        )

    def close(self) -> None:
        """Delete superseded segments and let the next writer in; does not flush.

        A merge that another thread has begun is waited for.
        """
        with self._merging:
            self._closed = True
            self._delete_retired(float("inf"))
            self._duckdb.close()
            os.close(self._lock)

    def _write(self, table: str, day: str, lines: list[bytes]) -> Path:
        spec = self.tables[table]
        first, last = self._first[spec.group], self._last[spec.group]
        path = self.directory / table / f"day={day}" / f"{_text(first)}_{_text(last)}.parquet"
        _make_directory(path.parent, self.directory)
        source = path.with_name(f".{path.name}.ndjson.tmp")
        try:
            with source.open("wb") as file:
                file.writelines(lines)
            fields = ", ".join(f"'{name}': '{kind}'" for name, kind in spec.json.items())
            columns = ", ".join(f'{sql} AS "{name}"' for name, (_, sql) in spec.columns.items())
            self._copy(
                f"SELECT {columns} FROM read_json({_quote(source)}, "
                f"format = 'newline_delimited', columns = {{{fields}}}, "
                f"maximum_object_size = {max(_MAX_OBJECT, *map(len, lines)) + 1})",
                path,
                spec.row_group,
            )
        finally:
            source.unlink(missing_ok=True)
        self._orphans.add(path)
        return path

    def _copy(self, query: str, path: Path, row_group: int) -> None:
        """Write a query's rows to a file that appears whole and durable, or not at all."""
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            with within_memory(f"write {path}"), self._duckdb.cursor() as cursor:
                cursor.execute(
                    f"COPY ({query}) TO {_quote(temporary)} "
                    "(FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 1, "  # 3 costs twice that
                    f"ROW_GROUP_SIZE {row_group})"
                )
            sync(temporary)
            os.replace(temporary, path)
        except duckdb.IOException as error:
            raise OSError(str(error)) from error
        except duckdb.Error as error:
            raise DataError(f"cannot write {path}: {error}") from error
        finally:
            temporary.unlink(missing_ok=True)
        sync(path.parent)

    def _commit(self) -> None:
        """Write the position, the step that makes the new segments part of the store."""
        groups = {
            name: msgspec.structs.replace(progress, id=_text(self._last.get(name, (0, 0))))
            for name, progress in self.position.groups.items()
        }
        for (table, _), lines in self._rows.items():
            groups[self.tables[table].group].rows += len(lines)
        position = msgspec.structs.replace(self.position, groups=groups)
        write_durably(self.directory / _POSITION, msgspec.json.encode(position))
        self.position = position

    def _durable(self, day: str | None) -> Iterator[tuple[Table, list[Segment]]]:
        """Yield each table's durable segments, one day at a time."""
        for table in self.tables.values():
            for found, segments in list_segments(self.directory, table.name).items():
                if day is None or found == day:
                    end = self._end(table)
                    yield table, _outermost([item for item in segments if item.last <= end])

    def _end(self, table: Table) -> StreamId:
        progress = self.position.groups.get(table.group)
        return parse_id(progress.id) if progress else (0, 0)

    def _merge(self, table: Table, day: str, segments: list[Segment]) -> int:
        if len(segments) < 2:
            return 0
        first, last = segments[0].first, max(segment.last for segment in segments)
        path = self.directory / table.name / f"day={day}" / f"{_text(first)}_{_text(last)}.parquet"
        rows = relation(table, [segment.path for segment in segments])
        with self._merging:
            if self._closed:
                return 0
            self._copy(rows, path, table.row_group)
        deadline = time.monotonic() + _GRACE_S
        sources = [segment.path for segment in segments if segment.path != path]
        self._retired.extend((deadline, source) for source in sources)
        return len(sources)

    def _delete_retired(self, now: float) -> None:
        while self._retired and self._retired[0][0] <= now:
            self._retired.popleft()[1].unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Delete what an interrupted flush or merge left behind."""
        for leftover in self.directory.rglob(".*.tmp"):
            leftover.unlink()
        for table in self.tables.values():
            end = self._end(table)
            for segments in list_segments(self.directory, table.name).values():
                keep = set(_outermost([segment for segment in segments if segment.last <= end]))
                for segment in segments:
                    if segment not in keep:
                        segment.path.unlink()


def group_of(stream: str) -> str:
    """Return the logical name at the end of a stream key."""
    return stream.rpartition(":")[2]


def make_directory(directory: Path) -> None:
    """Make a directory and those above it.

    Raises:
        DataError: it cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot write to {directory}: {error.strerror}") from error


def write_durably(path: Path, content: bytes) -> None:
    """Replace a file's content so that a crash leaves the old or the new one, whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def _lock(directory: Path) -> int:
    make_directory(directory)
    try:
        descriptor = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise DataError(f"cannot write to {directory}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise DataError(
            f"expected to be the only writer of {directory}, found it locked by another process"
        ) from error
    return descriptor


def _make_directory(directory: Path, root: Path) -> None:
    if directory.is_dir():
        return
    directory.mkdir(parents=True, exist_ok=True)
    while directory != root:
        directory = directory.parent
        sync(directory)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _segment(path: Path) -> Segment:
    first, _, last = path.stem.partition("_")
    try:
        return Segment(path, parse_id(first), parse_id(last))
    except ValueError as error:
        raise DataError(f"{path} is not named <first id>_<last id>.parquet") from error


def _outermost(segments: list[Segment]) -> list[Segment]:
    """Drop the segments whose ids lie within another one; in id order."""
    kept: list[Segment] = []
    for segment in sorted(segments, key=lambda item: (item.first, [-part for part in item.last])):
        if not kept or segment.last > kept[-1].last:
            kept.append(segment)
    return kept


def _text(entry_id: StreamId) -> str:
    return f"{entry_id[0]}-{entry_id[1]}"


def _quote(path: Path) -> str:
    return "'" + str(path).replace("'", "''") + "'"
