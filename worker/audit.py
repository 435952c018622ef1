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
from pathlib import Path
from typing import NamedTuple

import msgspec

from rlv3 import console
from shadow.recording import OUTPUTS, Reading, Replay, load_snapshot, parts_of, restored
from shadow.records import Comparison, Decision, LedgerRow, Output, RunRow, encode
from shadow.store import decode_record
from worker.errors import CheckFailed

_EXAMPLES = 5
_RECOMPUTED = ("minute", "conflated", "lost", "order", "swap", "crash", "replay")  # all but stop


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
    damaged: tuple[str, ...] = ()
    """What is not as it was recorded, by its checksum, or cannot be read at all."""

    @property
    def ok(self) -> bool:
        """True when every record agrees and nothing is damaged."""
        return not (self.different or self.missing or self.unexpected or self.damaged)


def audit(recording: Path, tables_dir: Path | None = None) -> Audit:
    """Run a recording again and compare every decision and comparison.

    Args:
        recording: directory that `record` wrote.
        tables_dir: RL v2's tables, where the worker did not use the shipped ones.
    Raises:
        DataError: the recording is missing, incomplete or damaged.
        PolicyError: its artifact cannot be used.
    """
    found = []
    end: dict[str, str] | None = None
    for part in parts_of(recording):
        begin, next_end, result = _audit_part(part, tables_dir)
        if end is not None and begin != end:
            result = result._replace(damaged=(*result.damaged, f"there is a gap before {part}"))
        found.append(result)
        end = next_end
    whole = found[0]
    for one in found[1:]:
        whole = Audit(
            whole.entries + one.entries,
            whole.equal + one.equal,
            whole.different + one.different,
            whole.missing + one.missing,
            whole.unexpected + one.unexpected,
            whole.conflated + one.conflated,
            whole.lost + one.lost,
            whole.examples + one.examples,
            whole.damaged + one.damaged,
        )
    return whole._replace(examples=whole.examples[: 2 * _EXAMPLES])


def _audit_part(
    recording: Path, tables_dir: Path | None
) -> tuple[dict[str, str], dict[str, str], Audit]:
    """Audit one recording; returns where it begins and ends, too."""
    snapshot = load_snapshot(recording)
    reader = Reading(recording, snapshot)
    pipeline = restored(recording, snapshot, tables_dir)
    replay = Replay(reader, pipeline)
    comparison = _Comparing(replay.runs)
    for commit in replay.commits():
        comparison.computed(commit.outputs)
        comparison.recorded(reader.outputs, len(comparison.waiting_computed))
    comparison.recorded(reader.outputs, None)
    result = comparison.result(replay.folded - replay.before, reader.lost)
    begin = snapshot.cursors | snapshot.ends
    return begin, reader.ends, result._replace(damaged=tuple(sorted(reader.damaged)))


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
    for what in found.damaged:
        console.out.print(f"  damaged: {what}", markup=False, highlight=False, soft_wrap=True)
    for example in found.examples:
        console.out.print(f"  {example}", markup=False, highlight=False, soft_wrap=True)
    if not found.ok:
        wrong = found.different + found.missing + found.unexpected
        raise CheckFailed(
            f"expected every decision and comparison again, found {wrong.total():,} that differ"
            + (f" and {len(found.damaged):,} damages" if found.damaged else "")
        )
