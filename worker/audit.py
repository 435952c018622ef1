"""Does a recording, run again from its starting state, give every decision and comparison again?

Everything must be equal, byte for byte, except `latency_ms`. What depends on the world is taken
from the recording's ledger: decisions left out under load are left out again, entries that the
worker lost are lost again, entries folded out of order are folded in that order. Its counters say
where each of these happened. Ledger rows about stops are not compared.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import msgspec

from rlv3 import console
from rlv3.errors import DataError
from rlv3.policy import Policy
from shadow.pipeline import OUTCOMES, Pipeline
from shadow.records import Commit, Comparison, Decision, Entry, LedgerRow, Output, RunRow, encode
from shadow.rl_v2 import QTables
from shadow.segments import START, parse_id, read_position, relation, valid_segments
from shadow.store import COMPARISONS, decode_record
from shadow.symbol import StateError
from worker.errors import CheckFailed
from worker.keys import Keys
from worker.recorder import CUT, OUTPUTS, Cut, Snapshot, load_snapshot, raw_table

_BATCH = 64
_EXAMPLES = 5
_RECOMPUTED = ("minute", "conflated", "lost", "order", "swap", "crash", "replay")  # all but stop
_MARKING = ("conflated", "lost", "order", "swap", "crash")
_NOTED = tuple(
    reason.encode() for reason in _MARKING
)  # in the payload of every row that the fold needs


class Audit(NamedTuple):
    """What came of a comparison."""

    entries: int
    """Folded."""
    equal: Counter[str]
    """Kind -> records that agree in every field but latency_ms."""
    different: Counter[str]
    missing: Counter[str]
    """Computed now, absent from the recording."""
    unexpected: Counter[str]
    """Recorded, not computed now."""
    conflated: int
    """Decisions left out under load, as the ledger says."""
    lost: int
    """Entries that the recorder itself missed."""
    examples: list[str]

    @property
    def ok(self) -> bool:
        """True when every record agrees."""
        return not (self.different or self.missing or self.unexpected)


class _Mark(NamedTuple):
    """Something that the entries alone do not tell, and where it happened."""

    row: LedgerRow
    folded: int
    """Entries folded since the first start when the row was written."""
    conflate: bool = False
    """Of an order row: some of its entries were left out under load."""

    @property
    def ids(self) -> list[tuple[str, str]]:
        """The row's (stream, entry id)."""
        pairs = (text.rpartition("|") for text in self.row.entry_ids)
        return [(stream, entry_id) for stream, _, entry_id in pairs]

    @property
    def first(self) -> int:
        """Entries folded before those of an order row."""
        return self.folded - len(self.row.entry_ids)


def audit(recording: Path, tables_dir: Path | None = None) -> Audit:
    """Run a recording again and compare every decision and comparison.

    Args:
        recording: directory that `record` wrote.
        tables_dir: RL v2's tables, where the worker did not use the shipped ones.
    Raises:
        DataError: the recording is missing, incomplete or damaged.
        PolicyError: its artifact cannot be used.
    """
    snapshot = load_snapshot(recording)
    reader = _Reading(recording, snapshot)
    pipeline = _restored(recording, snapshot, tables_dir)
    replay = _Replay(reader, pipeline)
    comparison = _Comparing(replay.runs)
    for commit in replay.commits():
        comparison.computed(commit.outputs)
        comparison.recorded(reader.outputs, len(comparison.waiting_computed))
    comparison.recorded(reader.outputs, None)
    return comparison.result(replay.folded - replay.before, reader.lost)


class _Reading:
    """The entries and outputs of a recording, up to its cut."""

    def __init__(self, recording: Path, snapshot: Snapshot) -> None:
        position = read_position(recording)
        if position is None or CUT not in position.notes:
            raise DataError(f"expected entries in {recording}, found nothing recorded yet")
        self.recording = recording
        self.position = position
        self.snapshot = snapshot
        cut = msgspec.json.decode(position.notes[CUT], type=Cut)
        self.keys = Keys(snapshot.prefix)
        self.ends = cut.cursors | cut.ends
        self.lost = sum(group.counts.get("lost", 0) for group in position.groups.values())
        self.outputs = self._outputs()

    def inputs(self, name: str) -> Iterator[Entry]:
        """Yield the entries of one input in id order."""
        stream = self.keys.stream(name)
        query = f"SELECT stream_id, names, contents FROM ({self._rows(name)}) ORDER BY ms, seq"
        for entry_id, fields, contents in self._fetch(query):
            yield Entry(stream, name, entry_id, dict(zip(fields, contents, strict=True)))

    def marks(self) -> list[_Mark]:
        """Return what the worker noted about its fold, in order."""
        found: list[_Mark] = []
        for name, payload in self._payloads(COMPARISONS):
            if not any(word in payload for word in _NOTED):
                continue
            row = decode_record(name, payload)
            if not isinstance(row, LedgerRow) or row.reason not in _MARKING:
                continue
            mark = _Mark(row, _folded(row))
            if row.reason == "order":  # one commit: what it left out lies within
                conflate = False
                while found and found[-1].row.reason == "conflated" and (
                    found[-1].folded > mark.first
                ):  # fmt: skip
                    found.pop()
                    conflate = True
                mark = mark._replace(conflate=conflate)
            found.append(mark)
        return found

    def _outputs(self) -> Iterator[Decision | Comparison]:
        """Yield decisions and comparisons, in the order of their streams, side by side."""
        pairs = zip_longest(*(self._payloads(name) for name in OUTPUTS))
        for pair in pairs:
            for item in pair:
                if item is not None:
                    yield decode_record(*item)

    def _payloads(self, name: str) -> Iterator[tuple[str, bytes]]:
        query = (
            "SELECT contents[list_position(names, 'payload'::BLOB)] "
            f"FROM ({self._rows(name)}) ORDER BY ms, seq"
        )
        for (payload,) in self._fetch(query):
            yield name, payload

    def _rows(self, name: str) -> str:
        table = raw_table(name)
        files = [item.path for item in valid_segments(self.recording, table, self.position)]
        ms, seq = parse_id(self.ends.get(self.keys.stream(name), START))
        return (
            "SELECT *, split_part(stream_id, '-', 1)::UBIGINT AS ms, "
            f"split_part(stream_id, '-', 2)::UBIGINT AS seq FROM ({relation(table, files)}) "
            f"WHERE (ms, seq) <= ({ms}, {seq})"
        )

    def _fetch(self, query: str) -> Iterator[tuple[Any, ...]]:
        try:
            with duckdb.connect(":memory:", config={"threads": 1}) as connection:
                found = connection.execute(query)
                while rows := found.fetchmany(1_000):
                    yield from rows
        except duckdb.Error as error:
            raise DataError(f"recording {self.recording} is damaged: {error}") from error


def _artifact(recording: Path, digest: str) -> Policy:
    return Policy.load(recording / "artifacts" / f"{digest}.safetensors")


def _restored(recording: Path, snapshot: Snapshot, tables_dir: Path | None) -> Pipeline:
    policy = _artifact(recording, snapshot.policy)
    settings = snapshot.settings
    tables = QTables.load(tables_dir) if settings.rl_v2 == "reference" else None
    digest, expected = None if tables is None else tables.digest, snapshot.frozen["tables"]
    if digest != expected:
        raise DataError(f"expected RL v2's tables {expected}, found {digest}; see --rl-v2-tables")
    pipeline = Pipeline(policy, tables, settings, snapshot.inputs)
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


class _Inputs:
    """The entries of all streams; by default in (id, rank) order.

    Entries of one stream are always folded in id order, so only the next one of each is held.
    """

    def __init__(self, reader: _Reading, marks: Sequence[_Mark]) -> None:
        self._streams = [reader.inputs(name) for name in reader.snapshot.inputs]
        self._keys = [reader.keys.stream(name) for name in reader.snapshot.inputs]
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


class _Replay:
    """Folds a recording again as the worker did."""

    def __init__(self, reader: _Reading, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._marks = reader.marks()
        self._inputs = _Inputs(reader, self._marks)
        self.runs = {pipeline.run_id} | {mark.row.run_id for mark in self._marks}
        self._recording = reader.recording
        self._cursors = dict(reader.snapshot.cursors)
        self._names = {reader.keys.stream(name): name for name in reader.snapshot.inputs}
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
            elif mark.row.reason == "crash":
                yield from self._fold_to(mark.first)
                (place,) = mark.ids
                yield from self._run(
                    [self._inputs.named(*place)],
                    False,
                    disordered=self._inputs.is_disordered(place),
                    crashed=1,
                )
            elif mark.row.reason == "order":
                if self.folded >= mark.folded:
                    continue  # it ended the process, and was left out just now
                yield from self._fold_to(mark.first)
                entries = [self._inputs.named(*place) for place in mark.ids]
                yield from self._run(entries, mark.conflate, disordered=True)
            else:
                # folding from the first entry left out up to where that was settled, under load
                # and in one go, leaves out the same ones
                yield from self._fold_to(mark.folded, before=mark.ids[0])
                yield from self._run(self._next(mark.folded - self.folded), True)
        yield from self._fold_to(None)
        yield self._pipeline.run([], now_ms=0.0)

    def _fold_to(
        self, folded: int | None, before: tuple[str, str] | None = None
    ) -> Iterator[Commit]:
        """Fold in the default order up to a number of entries, or up to an entry."""
        while entries := self._next(
            _BATCH if folded is None else min(_BATCH, folded - self.folded), before
        ):
            yield from self._run(entries, False)

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
        conflate: bool,
        *,
        disordered: bool = False,
        crashed: int = 0,
    ) -> Iterator[Commit]:
        while entries:
            commit = self._pipeline.run(
                entries,
                now_ms=0.0,
                conflate=conflate,
                ahead=len(entries) if disordered else 0,
                crashed=crashed,
            )
            entries = entries[commit.taken :]
            self.folded += commit.taken
            self._cursors |= commit.cursors
            yield commit

    def _swap(self, mark: _Mark) -> Commit:
        policy = _artifact(self._recording, mark.row.policy_digest)
        commit = self._pipeline.begin(self._cursors, policy)
        if self._pipeline.run_id != mark.row.run_id:
            raise CheckFailed(
                "expected the settings of the recording's start, found that run "
                f"{mark.row.run_id} began with others; record it anew"
            )
        return commit

    def _lose(self, mark: _Mark) -> None:
        (stream, after), (_, upto) = mark.ids
        name = self._names[stream]
        total = mark.row.counts.get(name, {}).get("lost")
        known = self._pipeline.lost.get(name, 0)
        entries = None if total is None or known is None else total - known
        self._cursors[stream] = upto
        self._pipeline.lose(name, entries, stream=stream, after=after, upto=upto)


class _Comparing:
    """Matches computed and recorded records by their ids, whichever comes first."""

    def __init__(self, runs: set[str]) -> None:
        self.runs = runs
        self.waiting_computed: dict[tuple[str, str], bytes] = {}
        self.waiting_recorded: dict[tuple[str, str], bytes] = {}
        self.equal: Counter[str] = Counter()
        self.different: Counter[str] = Counter()
        self.conflated = 0
        self.examples: list[str] = []

    def computed(self, outputs: Sequence[Output]) -> None:
        """Take what the pipeline just put out."""
        for output in outputs:
            if output.event_type not in OUTPUTS:
                continue
            record = decode_record(output.event_type, output.payload)
            if not isinstance(record, LedgerRow) or record.reason in _RECOMPUTED:
                key, content = _comparable(record)
                self._match(key, content, self.waiting_recorded, self.waiting_computed)

    def recorded(self, outputs: Iterator[Decision | Comparison], count: int | None) -> None:
        """Take that many recorded records, or all that are left."""
        while count is None or count > 0:
            record = next(outputs, None)
            if record is None:
                return
            if isinstance(record, LedgerRow):
                if record.reason not in _RECOMPUTED:
                    continue
                if record.reason == "conflated":
                    self.conflated += len(record.entry_ids)
            if isinstance(record, RunRow) and record.run_id not in self.runs:
                raise CheckFailed(
                    f"expected the recording's runs to follow each other, found that "
                    f"{record.run_id} began on its own; record it anew"
                )
            key, content = _comparable(record)
            self._match(key, content, self.waiting_computed, self.waiting_recorded)
            if count is not None:
                count -= 1

    def result(self, entries: int, lost: int) -> Audit:
        """Return the outcome; what waits has no counterpart."""
        missing = Counter(kind for kind, _ in self.waiting_computed)
        unexpected = Counter(kind for kind, _ in self.waiting_recorded)
        for what, waiting in (
            ("not recorded", self.waiting_computed),
            ("not computed", self.waiting_recorded),
        ):
            for (kind, identity), content in waiting.items():
                if len(self.examples) == 2 * _EXAMPLES:
                    break
                self.examples.append(f"{kind} {identity} {what}: {content[:300].decode()}")
        return Audit(
            entries, self.equal, self.different, missing, unexpected, self.conflated, lost,
            self.examples,
        )  # fmt: skip

    def _match(
        self,
        key: tuple[str, str],
        content: bytes,
        others: dict[tuple[str, str], bytes],
        own: dict[tuple[str, str], bytes],
    ) -> None:
        other = others.pop(key, None)
        if other is None:
            own[key] = content
        elif other == content:
            self.equal[key[0]] += 1
        else:
            self.different[key[0]] += 1
            if len(self.examples) < _EXAMPLES:
                self.examples.append(f"{key[0]} {key[1]}: {_first_difference(other, content)}")


def _comparable(record: Decision | Comparison) -> tuple[tuple[str, str], bytes]:
    if isinstance(record, Decision):
        plain = msgspec.structs.replace(record, latency_ms=0.0)
        return ("decision", record.decision_id), encode(plain)
    kind = str(type(record).__struct_config__.tag)
    return ("v2" if kind == "decision" else kind, record.record_id), encode(record)


def _first_difference(one: bytes, other: bytes) -> str:
    left, right = json.loads(one), json.loads(other)
    for name in left:
        if left[name] != right.get(name):
            return f"{name} is {left[name]!r} in one, {right.get(name)!r} in the other"
    return "the same values, encoded differently"


def show(found: Audit) -> None:
    """Print the outcome.

    Raises:
        CheckFailed: something differs.
    """
    for name, counts in (
        ("equal", found.equal),
        ("different", found.different),
        ("not recorded", found.missing),
        ("not computed", found.unexpected),
    ):
        shown = ", ".join(f"{kind} {n:,}" for kind, n in sorted(counts.items()))
        console.out.print(f"{name}: {shown or 'none'}", highlight=False)
    console.out.print(
        f"entries folded: {found.entries:,}, conflated: {found.conflated:,}, "
        f"missed by the recorder: {found.lost:,}",
        highlight=False,
    )
    for example in found.examples:
        console.out.print(f"  {example}", markup=False, highlight=False, soft_wrap=True)
    if not found.ok:
        wrong = found.different + found.missing + found.unexpected
        raise CheckFailed(
            f"expected every decision and comparison again, found {wrong.total():,} that differ"
        )
