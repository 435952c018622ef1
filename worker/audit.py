"""Does a recording, run again from its starting state, give every decision and comparison again?

Everything must be equal, byte for byte, except `latency_ms`. What depends on the wall clock is
taken from the recording: decisions that the ledger says were left out under load are left out
again, and ledger rows about stops and losses are not compared.
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
from shadow.pipeline import Pipeline
from shadow.records import Comparison, Decision, Entry, LedgerRow, Output, RunRow, encode
from shadow.rl_v2 import QTables
from shadow.segments import START, parse_id, read_position, relation, valid_segments
from shadow.store import COMPARISONS, decode_record
from shadow.symbol import StateError
from worker.errors import CheckFailed
from worker.keys import Keys
from worker.recorder import CUT, OUTPUTS, Cut, Snapshot, load_snapshot, raw_table

_BATCH = 64
_EXAMPLES = 5
_RECOMPUTED = ("minute", "conflated")  # ledger rows that depend on the entries alone


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


class _Conflation(NamedTuple):
    """Entries that the worker folded under load, between two points of its own counters."""

    first: tuple[str, str]
    """Stream and id of the first entry left out."""
    folded: int
    """Entries folded since the first start when those jobs were settled."""


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
    comparison = _Comparing(pipeline.run_id)
    entries = 0
    for batch, conflate in _batches(reader, pipeline):
        rest: Sequence[Entry] = batch
        while rest:
            commit = pipeline.run(rest, now_ms=0.0, conflate=conflate)
            comparison.computed(commit.outputs)
            rest = rest[commit.taken :]
            entries += commit.taken
        comparison.recorded(reader.outputs, len(comparison.waiting_computed))
    comparison.recorded(reader.outputs, None)
    return comparison.result(entries, reader.lost)


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

    def inputs(self) -> Iterator[Entry]:
        """Yield the input entries in (id, rank) order."""
        names = self.snapshot.inputs
        parts = [
            f"SELECT {rank} AS rank, ms, seq, stream_id, names, contents FROM ({self._rows(name)})"
            for rank, name in enumerate(names)
        ]
        query = " UNION ALL ".join(parts) + " ORDER BY ms, seq, rank"
        for rank, _, _, entry_id, fields, contents in self._fetch(query):
            name = names[rank]
            yield Entry(
                self.keys.stream(name), name, entry_id, dict(zip(fields, contents, strict=True))
            )

    def conflations(self) -> list[_Conflation]:
        """Return where the worker decided under load, in order."""
        found = []
        for name, payload in self._payloads(COMPARISONS):
            row = decode_record(name, payload) if b"conflated" in payload else None
            if isinstance(row, LedgerRow) and row.reason == "conflated":
                stream, _, entry_id = row.entry_ids[0].rpartition("|")
                folded = sum(sum(counts.values()) for counts in row.counts.values())
                found.append(_Conflation((stream, entry_id), folded))
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


def _restored(recording: Path, snapshot: Snapshot, tables_dir: Path | None) -> Pipeline:
    policy = Policy.load(recording / "artifacts" / f"{snapshot.policy}.safetensors")
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


def _batches(reader: _Reading, pipeline: Pipeline) -> Iterator[tuple[list[Entry], bool]]:
    """Cut the entries where the worker's load made a difference; elsewhere anywhere.

    A conflated ledger row names the entries that were left out and, by its counters, how many had
    been folded when that was settled. Folding from the first of them up to there, under conflation
    and in one go, leaves out the same ones.
    """
    pending = iter(reader.conflations())
    ahead = next(pending, None)
    folded = sum(pipeline.counts.values())
    batch: list[Entry] = []
    conflating = False
    for entry in reader.inputs():
        if ahead is not None and (entry.stream, entry.entry_id) == ahead.first:
            if batch:
                yield batch, False
            batch, conflating = [], True
        batch.append(entry)
        folded += 1
        if ahead is not None and conflating and folded == ahead.folded:
            yield batch, True
            batch, conflating, ahead = [], False, next(pending, None)
        elif not conflating and len(batch) == _BATCH:
            yield batch, False
            batch = []
    if batch:
        yield batch, conflating


class _Comparing:
    """Matches computed and recorded records by their ids, whichever comes first."""

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self.waiting_computed: dict[tuple[str, str], bytes] = {}
        self.waiting_recorded: dict[tuple[str, str], bytes] = {}
        self.equal: Counter[str] = Counter()
        self.different: Counter[str] = Counter()
        self.conflated = 0
        self.examples: list[str] = []

    def computed(self, outputs: Sequence[Output]) -> None:
        """Take what the pipeline just put out."""
        for output in outputs:
            if output.event_type in OUTPUTS:
                key, content = _comparable(decode_record(output.event_type, output.payload))
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
            if isinstance(record, RunRow) and record.run_id != self.run_id:
                raise CheckFailed(
                    f"expected one run in the recording, {self.run_id}, found that "
                    f"{record.run_id} began; record it anew"
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
