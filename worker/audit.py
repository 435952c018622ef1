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
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import msgspec

from rlv3 import console
from shadow.evaluation.replayed import Replayed, write_replay
from shadow.recording import OUTPUTS, Reading, Replay, load_snapshot, parts_of, restored
from shadow.records import (
    COMPARISONS,
    DECISIONS,
    Comparison,
    Decision,
    LedgerRow,
    Output,
    RunRow,
    encode,
)
from shadow.store import decode_record
from worker.errors import CheckFailed

_EXAMPLES = 5
_PILE = 4_096
_SOURCE_IDS = ("trace_id", "correlation_id", "v3_trace_id", "v3_correlation_id")
_TRACED_LATER = ("pair", "unpaired", "bar", "outcome")
"""Kinds whose rows did not always name the ids of their source."""
_RECOMPUTED = (
    "minute", "conflated", "counting", "lost", "order", "swap", "crash", "replay", "kill",
)  # fmt: skip
"""All reasons but stop."""


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
        comparison.recorded(reader.outputs, comparison.waiting)
    comparison.recorded(reader.outputs, None)
    result = comparison.result(replay.folded - replay.before, reader.lost)
    begin = snapshot.cursors | snapshot.ends
    return (
        begin,
        reader.ends,
        result._replace(damaged=(*sorted(reader.damaged), *comparison.unreadable)),
    )


class _Comparing:
    """Matches computed and recorded records, whichever comes first.

    By their bytes, as long as these agree, since that costs least; what finds no equal waits, and
    is matched by its id when much has piled up, and at the end.
    """

    def __init__(self, runs: set[str]) -> None:
        self.runs = runs
        self._computed: dict[tuple[str, str], bytes] = {}
        self._recorded: dict[tuple[str, str], bytes] = {}
        self._computed_bytes: Counter[tuple[str, bytes]] = Counter()
        self._recorded_bytes: Counter[tuple[str, bytes]] = Counter()
        self.equal: Counter[str] = Counter()
        self.different: Counter[str] = Counter()
        self.conflated = 0
        self.examples: list[str] = []
        self.unreadable: list[str] = []

    @property
    def waiting(self) -> int:
        """Computed records that nothing recorded is equal to, so far."""
        return len(self._computed_bytes)

    def computed(self, outputs: Sequence[Output]) -> None:
        """Take what the pipeline just put out."""
        for name, payload, _, _ in outputs:
            if name in OUTPUTS and self._counts(name, payload):
                self._match((name, _timeless(name, payload)), self._recorded_bytes,
                            self._computed_bytes)  # fmt: skip
        self._settle(_PILE)

    def recorded(self, payloads: Iterator[tuple[str, bytes]], count: int | None) -> None:
        """Take that many recorded records, or all that are left."""
        for name, payload in payloads if count is None else islice(payloads, count):
            row = _special(name, payload)
            if isinstance(row, LedgerRow) and row.reason == "conflated":
                self.conflated += len(row.entry_ids)
            if isinstance(row, RunRow) and row.run_id not in self.runs:
                raise CheckFailed(
                    f"expected the recording's runs to follow each other, found that "
                    f"{row.run_id} began on its own; record it anew"
                )
            if self._counts(name, payload):
                self._match((name, _timeless(name, payload)), self._computed_bytes,
                            self._recorded_bytes)  # fmt: skip
        self._settle(_PILE)

    @staticmethod
    def _counts(name: str, payload: bytes) -> bool:
        """Return False for a ledger row that a second fold does not write."""
        row = _special(name, payload)
        return not isinstance(row, LedgerRow) or row.reason in _RECOMPUTED

    def _match(
        self,
        item: tuple[str, bytes],
        others: Counter[tuple[str, bytes]],
        own: Counter[tuple[str, bytes]],
    ) -> None:
        if item not in others:
            own[item] += 1
            return
        others[item] -= 1
        if not others[item]:
            del others[item]
        self.equal[_kind(*item)] += 1

    def _settle(self, pile: int) -> None:
        """Match by id what found no equal, when more than a pile of it waits."""
        if max(len(self._computed_bytes), len(self._recorded_bytes)) <= pile:
            return
        for waiting, own, others in (
            (self._computed_bytes, self._computed, self._recorded),
            (self._recorded_bytes, self._recorded, self._computed),
        ):
            for name, payload in waiting.elements():
                try:
                    key, content = _comparable(decode_record(name, payload))
                except ValueError as error:
                    self.unreadable.append(f"{name} {payload[:80]!r}: {error}")
                    continue
                self._match_by_id(key, content, others, own)
            waiting.clear()

    def result(self, entries: int, lost: int) -> Audit:
        """Return the outcome; what waits has no counterpart."""
        self._settle(-1)
        missing = Counter(kind for kind, _ in self._computed)
        unexpected = Counter(kind for kind, _ in self._recorded)
        for what, waiting in (
            ("not recorded", self._computed),
            ("not computed", self._recorded),
        ):
            for (kind, identity), content in waiting.items():
                if len(self.examples) == 2 * _EXAMPLES:
                    break
                self.examples.append(f"{kind} {identity} {what}: {content[:300].decode()}")
        return Audit(
            entries, self.equal, self.different, missing, unexpected, self.conflated, lost,
            self.examples,
        )  # fmt: skip

    def _match_by_id(
        self,
        key: tuple[str, str],
        content: bytes,
        others: dict[tuple[str, str], bytes],
        own: dict[tuple[str, str], bytes],
    ) -> None:
        other = others.pop(key, None)
        if other is None:
            own[key] = content
        elif other == content or _same_but_ids(key[0], other, content):
            self.equal[key[0]] += 1
        else:
            self.different[key[0]] += 1
            if len(self.examples) < _EXAMPLES:
                self.examples.append(f"{key[0]} {key[1]}: {_first_difference(other, content)}")


def _special(name: str, payload: bytes) -> Decision | Comparison | None:
    """Return a row about streams or runs; None for all others, which are not looked into."""
    if name != COMPARISONS:
        return None
    if payload[:1] == b"{" and not payload.startswith((b'{"kind":"ledger"', b'{"kind":"run"')):
        return None
    try:
        return decode_record(name, payload)
    except ValueError:
        return None


def _timeless(name: str, payload: bytes) -> bytes:
    """Return a record without what a second fold may change: a decision's `latency_ms`."""
    if payload[:1] != b"{":
        try:
            payload = encode(decode_record(name, payload))  # from msgpack
        except ValueError:
            return payload  # damaged: equal to nothing
    if name != DECISIONS:
        return payload
    head, name_of_it, tail = payload.rpartition(b',"latency_ms":')
    _, comma, rest = tail.partition(b",")
    return head + name_of_it + b"0.0" + (comma + rest or b"}")


def _kind(name: str, payload: bytes) -> str:
    if name == DECISIONS:
        return "decision"
    kind = payload.split(b'"', 4)[3].decode()
    return "v2" if kind == "decision" else kind


def _comparable(record: Decision | Comparison) -> tuple[tuple[str, str], bytes]:
    if isinstance(record, Decision):
        plain = msgspec.structs.replace(record, latency_ms=0.0)
        return ("decision", record.decision_id), encode(plain)
    kind = str(type(record).__struct_config__.tag)
    return ("v2" if kind == "decision" else kind, record.record_id), encode(record)


def _same_but_ids(kind: str, one: bytes, other: bytes) -> bool:
    """Return True when only one of the two has ids of its source: earlier versions kept none."""
    if kind not in _TRACED_LATER:
        return False
    left, right = json.loads(one), json.loads(other)
    return all(
        value == right[name] or (name in _SOURCE_IDS and "" in (value, right[name]))
        for name, value in left.items()
    )


def _first_difference(one: bytes, other: bytes) -> str:
    left, right = json.loads(one), json.loads(other)
    for name in left:
        if left[name] != right.get(name):
            return f"{name} is {left[name]!r} in one, {right.get(name)!r} in the other"
    return "the same values, encoded differently"


def leave(found: Audit, store: Path) -> None:
    """Leave the result in a store, for its reports.

    Raises:
        DataError: the store cannot be written.
    """
    write_replay(
        store,
        Replayed(
            entries=found.entries,
            equal=found.equal.total(),
            differences=(found.different + found.missing + found.unexpected).total(),
            lost=found.lost,
        ),
    )


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
