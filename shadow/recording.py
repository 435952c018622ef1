"""What did a worker see, and what does it answer when it sees it again? Recordings, without Redis.

A recording is a directory: `snapshot.msgpack` (the worker's state right after one of its commits),
`artifacts/<digest>.safetensors`, and one table of raw entries per stream, in the segments of
`shadow.segments`. With every flush the recorder notes a cut: input cursors and last outputs that
were committed together and are all there. `Reading` yields what lies before the cut, `Replay` folds
it again as the worker did: what depended on the world is taken from the recording's ledger.
"""

from __future__ import annotations

import json
import zlib
from base64 import b64encode
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple, cast

import duckdb
import msgpack
import msgspec

from rlv3.errors import DataError, UserError
from rlv3.policy import Policy
from shadow.pipeline import OUTCOMES, Pipeline, Settings
from shadow.records import COMPARISONS, DECISIONS, ORIGIN, Commit, Entry, LedgerRow, parse_id
from shadow.rl_v2 import QTables
from shadow.segments import (
    Table,
    day_of,
    read_position,
    relation,
    valid_segments,
    within_memory,
)
from shadow.store import decode_record
from shadow.symbol import StateError

OUTPUTS = (DECISIONS, COMPARISONS)
SNAPSHOT = "snapshot.msgpack"
CUT = "cut"
PART = "part-"
RawEntry = Sequence[Any]
"""Id, then names and values of the fields, alternating: as Redis sends them."""
_CHUNK = 32
_CHUNK_BYTES = 1 << 20
_BATCH = 64
_MARKING = ("conflated", "counting", "lost", "order", "swap", "crash", "kill")
_NOTED = tuple(
    reason.encode() for reason in _MARKING
)  # in the payload of every row that the fold needs


class ReplayError(UserError):
    """A recording does not fit itself: it must be made anew; the program stops."""

    exit_code = 4


class Snapshot(msgspec.Struct):
    """The worker's state right after one of its commits."""

    prefix: str
    meta: dict[str, bytes]
    cells: dict[str, dict[str, bytes]]
    ends: dict[str, str]
    """Last id of each of our streams then."""

    @property
    def cursors(self) -> dict[str, str]:
        """Full input stream key -> id of the last entry folded."""
        return cursors_of(self.meta["cursors"])

    @property
    def frozen(self) -> dict[str, Any]:
        """What the worker froze for its run: `settings` of the pipeline, `inputs`, `tables`."""
        return cast("dict[str, Any]", json.loads(self.meta["frozen"]))

    @property
    def inputs(self) -> list[str]:
        """Logical input names in rank order."""
        return list(self.frozen["inputs"])

    @property
    def settings(self) -> Settings:
        """The pipeline's settings."""
        return Settings.restore(self.frozen["settings"])

    @property
    def policy(self) -> str:
        """Digest of the artifact in force."""
        return self.meta["policy"].decode()

    @property
    def counts(self) -> dict[tuple[str, str], int]:
        """(event type, outcome) -> entries since the first start."""
        counts = {}
        for name, value in self.meta.items():
            if name.startswith("n:"):
                event_type, _, outcome = name[2:].rpartition(":")
                counts[event_type, outcome] = int(value)
        return counts


class Cut(msgspec.Struct):
    """Input cursors and our last outputs, committed together."""

    cursors: dict[str, str]
    ends: dict[str, str]


def raw_table(event_type: str) -> Table:
    """Return the table of a stream's raw entries: a row holds some that follow each other.

    `entries` is msgpack: `[[id, [name, value, …]], …]`, all of them binary; `crc` is its CRC-32.
    """
    kinds = {"first_id": "VARCHAR", "last_id": "VARCHAR", "n": "INTEGER", "crc": "UINTEGER"}
    return Table(
        f"entries/{event_type}",
        event_type,
        {**kinds, "entries": "VARCHAR"},
        {
            **{name: (kind, name) for name, kind in kinds.items()},
            "entries": ("BLOB", "from_base64(entries)"),
        },
        row_group=2_048,  # the smallest; a row is tens of KiB
    )


def raw_lines(rows: Sequence[RawEntry]) -> Iterator[tuple[str, str, bytes]]:
    """Yield (first id, last id, JSON line) of rows of `raw_table` for entries as XREAD has them."""
    for first in range(0, len(rows), _CHUNK):
        yield from _raw_line(rows[first : first + _CHUNK])


def _raw_line(rows: Sequence[RawEntry]) -> Iterator[tuple[str, str, bytes]]:
    packed = msgpack.packb(rows)
    first, last = rows[0][0].decode(), rows[-1][0].decode()
    half = len(rows) // 2
    if half and (len(packed) > _CHUNK_BYTES or day_of(parse_id(first)) != day_of(parse_id(last))):
        yield from _raw_line(rows[:half])
        yield from _raw_line(rows[half:])
        return
    row = {
        "first_id": first,
        "last_id": last,
        "n": len(rows),
        "crc": zlib.crc32(packed),
        "entries": b64encode(packed).decode(),
    }
    yield first, last, msgspec.json.encode(row) + b"\n"


def parts_of(recording: Path) -> list[Path]:
    """Return the recordings that a directory consists of, oldest first.

    It is one itself, or holds `part-<ms>` of a recording that is kept for a while only.
    Raises:
        DataError: it is neither.
    """
    if (recording / SNAPSHOT).exists():
        return [recording]
    parts = [path for path in sorted(recording.glob(PART + "*")) if read_position(path)]
    if not parts:
        raise DataError(
            f"expected a recording of `rlv3-worker record` in {recording}, found no {SNAPSHOT}"
        )
    return parts


def load_snapshot(recording: Path) -> Snapshot:
    """Read a recording's starting state.

    Raises:
        DataError: there is none, or it is damaged.
    """
    path = recording / SNAPSHOT
    try:
        return msgspec.msgpack.decode(path.read_bytes(), type=Snapshot)
    except FileNotFoundError as error:
        raise DataError(
            f"expected a recording of `rlv3-worker record` in {recording}, found no {SNAPSHOT}"
        ) from error
    except (OSError, msgspec.DecodeError) as error:
        raise DataError(f"{path} is damaged: {error}") from error


def cursors_of(text: bytes) -> dict[str, str]:
    """Read the cursors field of meta; `seq` in it is the commit's number, no stream."""
    return {stream: entry_id for stream, entry_id in json.loads(text).items() if stream != "seq"}


class Mark(NamedTuple):
    """Something that the entries alone do not tell, and where it happened."""

    row: LedgerRow
    folded: int
    """Entries folded since the first start when the row was written."""
    left_out: frozenset[str] = frozenset()
    """Of a conflated row, and of an order row: entries that were left out under load."""

    @property
    def ids(self) -> list[tuple[str, str]]:
        """The row's (stream, entry id)."""
        pairs = (text.rpartition("|") for text in self.row.entry_ids)
        return [(stream, entry_id) for stream, _, entry_id in pairs]

    @property
    def first(self) -> int:
        """Entries folded before those of an order row."""
        return self.folded - len(self.row.entry_ids)


class Reading:
    """The entries and outputs of a recording, up to its cut."""

    def __init__(self, recording: Path, snapshot: Snapshot) -> None:
        position = read_position(recording)
        if position is None or CUT not in position.notes:
            raise DataError(f"expected entries in {recording}, found nothing recorded yet")
        self.recording = recording
        self.position = position
        self.snapshot = snapshot
        cut = msgspec.json.decode(position.notes[CUT], type=Cut)
        self.streams = {name: group.stream for name, group in position.groups.items()}
        """Logical name -> full key."""
        self.ends = cut.cursors | cut.ends
        self.lost = sum(group.counts.get("lost", 0) for group in position.groups.values())
        self.damaged: set[str] = set()
        """What does not have the checksum that it was recorded with, as far as it was read."""
        self.outputs = self._outputs()

    def inputs(self, name: str) -> Iterator[Entry]:
        """Yield the entries of one input in id order."""
        stream = self.streams[name]
        for entry_id, flat in self._entries(name):
            fields = dict(zip(flat[::2], flat[1::2], strict=True))
            yield Entry(stream, name, entry_id.decode(), fields)

    def marks(self) -> list[Mark]:
        """Return what the worker noted about its fold, in order."""
        found: list[Mark] = []
        for name, payload in self._payloads(COMPARISONS):
            if not any(word in payload for word in _NOTED):
                continue
            try:
                row = decode_record(name, payload)
            except ValueError:
                continue  # said where it is compared
            if not isinstance(row, LedgerRow) or row.reason not in _MARKING:
                continue
            mark = Mark(row, _folded(row))
            if row.reason == "conflated":
                mark = mark._replace(left_out=frozenset(row.entry_ids))
            if row.reason == "order":  # one commit: what it left out lies within
                while found and found[-1].row.reason == "conflated" and (
                    found[-1].folded > mark.first
                ):  # fmt: skip
                    mark = mark._replace(left_out=mark.left_out | found.pop().left_out)
            found.append(mark)
        return found

    def _outputs(self) -> Iterator[tuple[str, bytes]]:
        """Yield decisions and comparisons as recorded, each stream in its order, side by side."""
        for pair in zip_longest(*(self._payloads(name) for name in OUTPUTS)):
            yield from (item for item in pair if item is not None)

    def _payloads(self, name: str) -> Iterator[tuple[str, bytes]]:
        for _, flat in self._entries(name):
            yield name, dict(zip(flat[::2], flat[1::2], strict=True)).get(b"payload", b"")

    def _entries(self, name: str) -> Iterator[RawEntry]:
        """Yield the entries of a stream up to the cut, as XREAD had them."""
        table = raw_table(name)
        files = [item.path for item in valid_segments(self.recording, table, self.position)]
        end = parse_id(self.ends.get(self.streams[name], ORIGIN))
        query = (
            f"SELECT first_id, last_id, crc, entries FROM ({relation(table, files)}) ORDER BY "
            "split_part(first_id, '-', 1)::UBIGINT, split_part(first_id, '-', 2)::UBIGINT"
        )
        for first, last, crc, packed in self._fetch(query):
            if zlib.crc32(packed) != crc:
                self.damaged.add(f"entries {first} to {last} of {self.streams[name]}")
            try:
                rows = msgpack.unpackb(packed, raw=True)
                if parse_id(last) <= end:
                    yield from rows
                    continue
                for row in rows:
                    if parse_id(row[0].decode()) > end:
                        return
                    yield row
            except (ValueError, TypeError, msgpack.UnpackException) as error:
                raise DataError(
                    f"recording {self.recording} is damaged: entries {first} to {last} of "
                    f"{self.streams[name]}: {error}"
                ) from error

    def _fetch(self, query: str) -> Iterator[tuple[Any, ...]]:
        try:
            with (
                within_memory(f"read {self.recording}"),
                duckdb.connect(":memory:", config={"threads": 1}) as connection,
            ):
                found = connection.execute(query)
                while rows := found.fetchmany(64):
                    yield from rows
        except duckdb.Error as error:
            raise DataError(f"recording {self.recording} is damaged: {error}") from error


def _artifact(recording: Path, digest: str) -> Policy:
    return Policy.load(recording / "artifacts" / f"{digest}.safetensors")


def restored(
    recording: Path,
    snapshot: Snapshot,
    tables_dir: Path | None = None,
    kind: type[Pipeline] = Pipeline,
) -> Pipeline:
    """Return a pipeline in a recording's starting state.

    Args:
        tables_dir: RL v2's tables, where the worker did not use the shipped ones.
        kind: the class to make.
    Raises:
        DataError: state or tables do not fit.
        PolicyError: its artifact cannot be used.
    """
    policy = _artifact(recording, snapshot.policy)
    settings = snapshot.settings
    tables = QTables.load(tables_dir) if settings.rl_v2 == "reference" else None
    digest, expected = None if tables is None else tables.digest, snapshot.frozen["tables"]
    if digest != expected:
        raise DataError(f"expected RL v2's tables {expected}, found {digest}; see --rl-v2-tables")
    pipeline = kind(policy, tables, settings, snapshot.inputs)
    pipeline.keeps_state = False  # nobody commits it
    pipeline.counts.update(snapshot.counts)
    try:
        damaged = pipeline.restore(snapshot.cells)
    except StateError as error:
        raise DataError(f"the recorded state in {recording} is damaged: {error}") from error
    if damaged:
        raise DataError(f"the recorded state of {', '.join(damaged)} in {recording} is damaged")
    return pipeline


def _folded(row: LedgerRow) -> int:
    """Return how many entries had been folded when a ledger row was written."""
    return sum(n for counts in row.counts.values() for key, n in counts.items() if key in OUTCOMES)


class Inputs:
    """The entries of all streams; by default in (id, rank) order.

    Entries of one stream are always folded in id order, so only the next one of each is held.
    """

    def __init__(self, reader: Reading, marks: Sequence[Mark]) -> None:
        self._streams = [reader.inputs(name) for name in reader.snapshot.inputs]
        self._keys = [reader.streams[name] for name in reader.snapshot.inputs]
        self._disordered = {
            place for mark in marks if mark.row.reason == "order" for place in mark.ids
        }
        self._holes: dict[str, list[tuple[tuple[int, int], tuple[int, int]]]] = {}
        for mark in marks:
            if mark.row.reason == "lost":
                (stream, after), (_, upto) = mark.ids
                self._holes.setdefault(stream, []).append((parse_id(after), parse_id(upto)))
        self._heads: list[tuple[tuple[int, int], Entry] | None] = [None] * len(self._streams)
        for rank in range(len(self._streams)):
            self._advance(rank)

    def head(self) -> tuple[int, Entry] | None:
        """Return rank and entry of what comes next by default; None when nothing does."""
        best: tuple[tuple[int, int], int, Entry] | None = None
        for rank, head in enumerate(self._heads):
            if head is None or (best is not None and head[0] >= best[0]):
                continue
            place, entry = head
            if (entry.stream, entry.entry_id) not in self._disordered:
                best = place, rank, entry
        return None if best is None else (best[1], best[2])

    def is_disordered(self, place: tuple[str, str]) -> bool:
        """Return True for an entry that was not folded in the default order."""
        return place in self._disordered

    def take(self, rank: int) -> None:
        """Go on to the next entry of a stream."""
        self._advance(rank)

    def named(self, stream: str, entry_id: str) -> Entry:
        """Take the next entry of a stream, which must have this id.

        Raises:
            DataError: the recording does not have it there.
        """
        rank = self._keys.index(stream)
        head = self._heads[rank]
        if head is None or head[1].entry_id != entry_id:
            found = "nothing" if head is None else head[1].entry_id
            raise DataError(f"expected entry {entry_id} of {stream} next, found {found}")
        self._advance(rank)
        return head[1]

    def _advance(self, rank: int) -> None:
        holes = self._holes.get(self._keys[rank], ())
        for entry in self._streams[rank]:
            place = parse_id(entry.entry_id)
            if not any(after < place <= upto for after, upto in holes):
                self._heads[rank] = place, entry
                return
        self._heads[rank] = None


class Replay:
    """Folds a recording again as the worker did."""

    def __init__(self, reader: Reading, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._marks = reader.marks()
        self._inputs = Inputs(reader, self._marks)
        self.runs = {pipeline.run_id} | {mark.row.run_id for mark in self._marks}
        self._recording = reader.recording
        self._cursors = dict(reader.snapshot.cursors)
        self._names = {reader.streams[name]: name for name in reader.snapshot.inputs}
        self.before = self.folded = sum(pipeline.counts.values())

    def commits(self) -> Iterator[Commit]:
        """Yield what the pipeline answers, mark by mark."""
        for mark in self._marks:
            if mark.row.reason == "lost":
                yield from self._fold_to(mark.folded)
                self._lose(mark)
            elif mark.row.reason == "swap":
                yield from self._fold_to(mark.folded)
                yield self._swap(mark)
            elif mark.row.reason == "counting":
                yield from self._fold_to(mark.folded)
                self._pipeline.count_losses([name for name, _ in mark.ids])
            elif mark.row.reason == "kill":
                yield from self._fold_to(mark.folded)
                ((_, word),) = mark.ids
                self._pipeline.kill(word == "on")
            elif mark.row.reason == "crash":
                yield from self._fold_to(mark.first)
                (place,) = mark.ids
                yield from self._run(
                    [self._inputs.named(*place)],
                    disordered=self._inputs.is_disordered(place),
                    crashed=1,
                )
            elif mark.row.reason == "order":
                if self.folded >= mark.folded:
                    continue  # it ended the process, and was left out just now
                yield from self._fold_to(mark.first)
                entries = [self._inputs.named(*place) for place in mark.ids]
                yield from self._run(entries, mark.left_out, disordered=True)
            else:
                # what was left out is named in one row when it is folded in one go, from the first
                # of it up to where that was settled
                yield from self._fold_to(mark.folded, before=mark.ids[0])
                yield from self._run(self._next(mark.folded - self.folded), mark.left_out)
        yield from self._fold_to(None)
        yield self._pipeline.run([], now_ms=0.0)

    def _fold_to(
        self, folded: int | None, before: tuple[str, str] | None = None
    ) -> Iterator[Commit]:
        """Fold in the default order up to a number of entries, or up to an entry."""
        while entries := self._next(
            _BATCH if folded is None else min(_BATCH, folded - self.folded), before
        ):
            yield from self._run(entries)

    def _next(self, count: int, before: tuple[str, str] | None = None) -> list[Entry]:
        entries: list[Entry] = []
        while len(entries) < count and (head := self._inputs.head()) is not None:
            rank, entry = head
            if (entry.stream, entry.entry_id) == before:
                break
            entries.append(entry)
            self._inputs.take(rank)
        return entries

    def _run(
        self,
        entries: Sequence[Entry],
        left_out: frozenset[str] = frozenset(),
        *,
        disordered: bool = False,
        crashed: int = 0,
    ) -> Iterator[Commit]:
        while entries:
            commit = self._pipeline.run(
                entries,
                now_ms=0.0,
                leave_out=left_out,
                ahead=len(entries) if disordered else 0,
                crashed=crashed,
            )
            entries = entries[commit.taken :]
            self.folded += commit.taken
            self._cursors |= commit.cursors
            yield commit

    def _swap(self, mark: Mark) -> Commit:
        policy = _artifact(self._recording, mark.row.policy_digest)
        commit = self._pipeline.begin(self._cursors, policy)
        if self._pipeline.run_id != mark.row.run_id:
            raise ReplayError(
                "expected the settings of the recording's start, found that run "
                f"{mark.row.run_id} began with others; record it anew"
            )
        return commit

    def _lose(self, mark: Mark) -> None:
        (stream, after), (_, upto) = mark.ids
        name = self._names[stream]
        total = mark.row.counts.get(name, {}).get("lost")
        known = self._pipeline.lost.get(name, 0)
        entries = None if total is None or known is None else total - known
        self._cursors[stream] = upto
        self._pipeline.lose(name, entries, stream=stream, after=after, upto=upto)
