"""The comparison store: which rows of our two streams does an analyst find, and in which columns?

A directory of Parquet segments (see `shadow.segments`), one table per kind of record. The columns
are those of the structs in `shadow.records` plus `stream_id`; a bar's arms are flattened into
`v3_exposure`, `v3_gross` … `flat_ruined`. Whatever cannot be read as a record of this program is
parked in `rejected` with the reason, never dropped.
"""

from __future__ import annotations

import hashlib
import types
import typing
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path

import duckdb
import msgspec

from rlv3.errors import DataError
from shadow.records import (
    ARMS,
    COMPARISONS,
    DECISIONS,
    SCHEMA_VERSION,
    ArmBar,
    BarRow,
    Comparison,
    Decision,
    LedgerRow,
    OutcomeRow,
    PairRow,
    RunRow,
    StreamId,
    UnpairedRow,
    V2Row,
    decode_comparison,
    decode_decision,
    encode,
)
from shadow.segments import (
    SegmentWriter,
    Table,
    group_of,
    read_position,
    relation,
    valid_segments,
    within_memory,
)

RECORDS: dict[str, type[msgspec.Struct]] = {
    "decisions": Decision,
    "v2_decisions": V2Row,
    "pairs": PairRow,
    "unpaired": UnpairedRow,
    "bars": BarRow,
    "outcomes": OutcomeRow,
    "ledger": LedgerRow,
    "runs": RunRow,
}
"""Table -> the record its rows are."""

_TABLE_OF = {record: table for table, record in RECORDS.items()}
_TYPES = {str: "VARCHAR", int: "BIGINT", float: "DOUBLE", bool: "BOOLEAN"}
_REMEMBERED = 1 << 15  # newest ids per table, to recognise what a restored Redis sends again
_KEPT_BYTES = 65_536  # of a rejected payload; its size and hash are kept as well
_MAX_BYTES = 8 << 20  # a longer line is more than DuckDB reads in one go

_decode_msgpack_decision = msgspec.msgpack.Decoder(Decision).decode
_decode_msgpack_comparison = msgspec.msgpack.Decoder(Comparison).decode


def duckdb_type(kind: object) -> str:
    """Return the DuckDB type of a record's field type."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        (kind,) = (item for item in arguments if item is not type(None))
        return duckdb_type(kind)
    if origin is tuple:
        return duckdb_type(arguments[0]) + "[]"
    if origin is dict:
        return f"MAP({duckdb_type(arguments[0])}, {duckdb_type(arguments[1])})"
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        fields = ", ".join(f"{name} {duckdb_type(item)}" for name, item in _fields(kind).items())
        return f"STRUCT({fields})"
    return _TYPES[typing.cast("type", kind)]


def _fields(record: type[msgspec.Struct]) -> dict[str, object]:
    hints = typing.get_type_hints(record)
    return {name: hints[name] for name in record.__struct_fields__}


def _table(name: str, record: type[msgspec.Struct]) -> Table:
    group = DECISIONS if record is Decision else COMPARISONS
    json = {"stream_id": "VARCHAR"}
    columns = {"stream_id": ("VARCHAR", "stream_id")}
    for field, kind in _fields(record).items():
        if field != "arms":
            json[field] = duckdb_type(kind)
            columns[field] = (json[field], f'"{field}"')
            continue
        arm = duckdb_type(ArmBar)
        json[field] = f"STRUCT({', '.join(f'{name} {arm}' for name in ARMS)})"
        for arm in ARMS:
            for item, item_kind in _fields(ArmBar).items():
                columns[f"{arm}_{item}"] = (duckdb_type(item_kind), f"arms.{arm}.{item}")
    return Table(name, group, json, columns)


class _Rejected(msgspec.Struct):
    """An entry of our streams that is no record of this program."""

    stream_id: str
    stream: str
    reason: str
    payload: str
    size: int
    sha256: str


def _rejected_table(name: str, group: str) -> Table:
    json = {field: duckdb_type(kind) for field, kind in _fields(_Rejected).items()}
    columns = {field: (kind, field) for field, kind in json.items()}
    columns["payload"] = ("BLOB", "from_base64(payload)")
    return Table(name, group, json, columns)


TABLES = {name: _table(name, record) for name, record in RECORDS.items()}
"""Every table an analyst sees, except `rejected`."""
REJECTED = {
    DECISIONS: _rejected_table("rejected/decisions", DECISIONS),
    COMPARISONS: _rejected_table("rejected/comparisons", COMPARISONS),
}


_INTEGER_FIELDS = {
    record: [name for name, kind in _fields(record).items() if "BIGINT" in duckdb_type(kind)]
    for record in RECORDS.values()
}


class StoreWriter:
    """Appends entries of `rl_v3.decision` and `rl_v3.comparison` to a store.

    Attributes:
        policies: digests of the policies whose records were appended; the caller takes out those
            whose artifact it has copied.
        observer: is told every record that goes to a table, in the order of its stream.

    Raises:
        DataError: another process writes here, or the directory is no store.
    """

    def __init__(self, directory: str | Path) -> None:
        self.segments = SegmentWriter(directory, [*TABLES.values(), *REJECTED.values()])
        self.policies: set[str] = set()
        self.observer: Callable[[Decision | Comparison], None] | None = None
        self._remembered = {
            name: dict.fromkeys(self._newest_ids(table)) for name, table in TABLES.items()
        }

    @property
    def directory(self) -> Path:
        """Where the store is."""
        return self.segments.directory

    @property
    def position(self) -> dict[str, str]:
        """Stream key -> id up to which its entries are durable."""
        return {group.stream: group.id for group in self.segments.position.groups.values()}

    @property
    def pending(self) -> int:
        """Rows that are not durable yet."""
        return self.segments.pending

    def append(self, stream: str, entry_id: str, payload: bytes) -> str:
        """Take one entry: a JSON or msgpack payload of one of our two streams, in id order.

        Returns:
            The table its row went to: `rejected` for what cannot be read, `repeated` for a record
            that the store has already (a Redis that lost its last second sends it again).

        Raises:
            ValueError: ids must grow, or the stream is none of ours.
        """
        group = group_of(stream)
        if group not in REJECTED:
            raise ValueError(f"expected a stream of {DECISIONS} or {COMPARISONS}, got {stream}")
        parsed = self.segments.advance(stream, entry_id)
        try:
            record = decode_record(group, payload)
            line = _line(entry_id, record)
        except ValueError as error:
            self._reject(stream, parsed, entry_id, payload, str(error))
            return "rejected"
        table = _TABLE_OF[type(record)]
        if self._is_repeated(table, _identity(record)):
            _add_one(self.counts(stream), "repeated")
            return "repeated"
        self.policies.add(_policy(record))
        self.segments.add(table, parsed, line)
        if self.observer is not None:
            self.observer(record)
        return table

    def counts(self, stream: str) -> dict[str, int]:
        """Return a stream's counters, to be changed in place; durable with the position."""
        return self.segments.progress(stream).counts

    def flush(self) -> dict[str, str]:
        """Make all appended entries durable; return stream key -> durable id.

        Raises:
            OSError: the disk refuses; nothing is lost, call again.
        """
        return self.segments.flush()

    def compact(self, day: str) -> int:
        """Merge a finished UTC day (YYYY-MM-DD) into one segment per table."""
        return self.segments.compact(day)

    def tidy(self) -> int:
        """Merge what has piled up and finished days; may run in a thread beside `flush`.

        Returns:
            How many segments were merged away.
        """
        return self.segments.tidy()

    def close(self) -> None:
        """Let the next writer in; does not flush."""
        self.segments.close()

    def _reject(
        self, stream: str, parsed: StreamId, entry_id: str, payload: bytes, reason: str
    ) -> None:
        row = _Rejected(
            stream_id=entry_id,
            stream=stream,
            reason=reason,
            payload=b64encode(payload[:_KEPT_BYTES]).decode(),
            size=len(payload),
            sha256=hashlib.sha256(payload).hexdigest(),
        )
        self.segments.add(REJECTED[group_of(stream)].name, parsed, encode(row) + b"\n")
        _add_one(self.counts(stream), "rejected")

    def _is_repeated(self, table: str, identity: str) -> bool:
        remembered = self._remembered[table]
        if identity in remembered:
            return True
        remembered[identity] = None
        if len(remembered) > _REMEMBERED:
            del remembered[next(iter(remembered))]
        return False

    def _newest_ids(self, table: Table) -> list[str]:
        column = "decision_id" if table.group == DECISIONS else "record_id"
        segments = valid_segments(self.directory, table, self.segments.position)
        ids: list[str] = []
        for segment in reversed(segments):
            query = f"SELECT {column} FROM ({relation(table, [segment.path])})"
            try:
                with within_memory(f"read {segment.path}"), duckdb.connect() as connection:
                    rows = connection.execute(query).fetchall()
            except duckdb.Error as error:
                raise DataError(f"segment {segment.path} is damaged: {error}") from error
            ids[:0] = [identity for (identity,) in rows]
            if len(ids) >= _REMEMBERED:
                break
        return ids[-_REMEMBERED:]


class StoreReader:
    """Reads a store, also while a collector writes it: only what is durable, each row once.

    Raises:
        DataError: there is no store at this place, or nothing is in it yet.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        position = read_position(self.directory)
        if position is None:
            found = "no position file" if self.directory.is_dir() else "no such directory"
            raise DataError(
                f"expected a store written by `rlv3-worker collect` in {directory}, found {found}"
            )
        self.position = position

    def files(self, table: str) -> list[Path]:
        """Return a table's valid segments in id order."""
        return [item.path for item in valid_segments(self.directory, TABLES[table], self.position)]

    def connect(self) -> duckdb.DuckDBPyConnection:
        """Return a DuckDB connection with one view per table.

        Each view has the record's columns, `stream_id`, and `event_time` (TIMESTAMP, UTC); the view
        `decisions` also has `event_ts_us`. A view without any row is typed all the same.

        Raises:
            DataError: a segment is damaged.
        """
        connection = duckdb.connect(":memory:")
        connection.execute("SET parquet_metadata_cache = true")  # segments never change
        for name in TABLES:
            self._create_view(connection, name, _with_times(TABLES[name], self.files(name)))
        parked = " UNION ALL ".join(
            f"({relation(table, [s.path for s in self._valid(table)])})"
            for table in REJECTED.values()
        )
        self._create_view(connection, "rejected", parked)
        return connection

    def check(self) -> dict[str, int]:
        """Read every segment; return rows per table.

        Raises:
            DataError: a segment is damaged, or rows are missing.
        """
        rows: dict[str, int] = {}
        with self.connect() as connection:
            for name in (*TABLES, "rejected"):
                # hashing a row reads every value of it, so a damaged page cannot hide
                query = f"SELECT count(*), bit_xor(hash(item)) FROM {name} AS item"
                try:
                    with within_memory(f"read table {name} of {self.directory}"):
                        rows[name] = connection.execute(query).fetchall()[0][0]
                except duckdb.Error as error:
                    raise DataError(f"table {name} of {self.directory}: {error}") from error
        expected = sum(group.rows for group in self.position.groups.values())
        if sum(rows.values()) != expected:
            raise DataError(
                f"expected {expected} rows in {self.directory}, found {sum(rows.values())}"
            )
        return rows

    def _valid(self, table: Table) -> list[typing.Any]:
        return valid_segments(self.directory, table, self.position)

    def _create_view(self, connection: duckdb.DuckDBPyConnection, name: str, query: str) -> None:
        try:
            with within_memory(f"read table {name} of {self.directory}"):
                connection.execute(f"CREATE VIEW {name} AS {query}")
        except duckdb.Error as error:
            raise DataError(f"table {name} of {self.directory} is damaged: {error}") from error


def _with_times(table: Table, files: list[Path]) -> str:
    rows = relation(table, files)
    if table.group == DECISIONS:
        time = "TRY_CAST(event_ts AS TIMESTAMP)"
        rows = f"SELECT *, epoch_us({time}) AS event_ts_us FROM ({rows})"
    return f"SELECT *, make_timestamp(event_ts_us) AS event_time FROM ({rows})"


def decode_record(group: str, payload: bytes) -> Decision | Comparison:
    """Read a payload as a record.

    Raises:
        ValueError: it is none, or one of a later schema.
    """
    if len(payload) > _MAX_BYTES:
        raise ValueError(f"expected at most {_MAX_BYTES} bytes, found {len(payload)}")
    is_json = payload[:1] == b"{"
    if group == DECISIONS:
        decode = decode_decision if is_json else _decode_msgpack_decision
    else:
        decode = decode_comparison if is_json else _decode_msgpack_comparison
    record = decode(payload)
    if record.schema_version > SCHEMA_VERSION:
        raise ValueError(
            f"expected schema version {SCHEMA_VERSION} or older, found {record.schema_version}"
        )
    return record


def _line(entry_id: str, record: Decision | Comparison) -> bytes:
    """Return the record's JSON line.

    Raises:
        ValueError: an integer does not fit a 64-bit column.
    """
    for field in _INTEGER_FIELDS[type(record)]:
        _check_integers(getattr(record, field))
    return b'{"stream_id":"%b",%b\n' % (entry_id.encode(), encode(record)[1:])


def _check_integers(value: object) -> None:
    if isinstance(value, dict):
        for item in value.values():
            _check_integers(item)
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"expected a 64-bit integer, found {value}")


def _add_one(counts: dict[str, int], what: str) -> None:
    counts[what] = counts.get(what, 0) + 1


def _policy(record: Decision | Comparison) -> str:
    return record.model_sha256 if isinstance(record, Decision) else record.policy_digest


def _identity(record: Decision | Comparison) -> str:
    return record.decision_id if isinstance(record, Decision) else record.record_id
