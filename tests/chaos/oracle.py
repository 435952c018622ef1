"""What should have come out? The producer's log folded offline, once, compared with what is there.

The reference is the product's own fold in this process: no Redis, no faults. `latency_ms` and the
envelope's timestamp are the only values that a second fold may change.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import redis

from rlv3.policy import Policy
from shadow.pipeline import Pipeline
from shadow.records import Commit, Entry, Output
from shadow.rl_v2 import QTables
from worker.config import load_config
from worker.keys import Keys
from worker.service import settings_of

Row = dict[str, Any]
KEYS = Keys()
OURS = ("rl_v3.decision", "rl_v3.comparison")


def pipeline_for(policy: Path) -> Pipeline:
    """Return the fold that a worker with default settings runs."""
    config = load_config({"max_event_age": "off"}, {})
    return Pipeline(_policy(policy), _tables(), settings_of(config), config.inputs)


@cache
def _policy(path: Path) -> Policy:
    return Policy.load(path)


@cache
def _tables() -> QTables:
    return QTables.load(None)


def fold(pipeline: Pipeline, history: Sequence[Entry]) -> list[Output]:
    """Fold a history to its end."""
    outputs: list[Output] = []
    waiting = list(history)
    while waiting:
        commit: Commit = pipeline.run(waiting[:64], now_ms=0.0)
        outputs += commit.outputs
        del waiting[: commit.taken]
    return outputs


def undisturbed(
    history: Sequence[Entry], policy: Path, *, counted: bool = False
) -> tuple[list[Output], dict[str, int]]:
    """Fold the history in this process, once, from 0-0 to an orderly stop.

    Args:
        counted: losses are counted, as they are from Redis 7 on.
    """
    pipeline = pipeline_for(policy)
    if counted:
        pipeline.count_losses(pipeline.inputs)
    start = pipeline.begin({KEYS.stream(name): "0-0" for name in pipeline.inputs})
    outputs = [*start.outputs, *fold(pipeline, history), *pipeline.stop().outputs]
    return outputs, named(pipeline.counts)


def swapped(
    history: Sequence[Entry], n: int, former: Path, heir: Path
) -> tuple[list[Output], dict[str, int], str]:
    """Fold the first n entries with one policy and the rest with another; returns its run, too."""
    pipeline = pipeline_for(former)
    cursors = {KEYS.stream(name): "0-0" for name in pipeline.inputs}
    outputs = [*pipeline.begin(cursors).outputs, *fold(pipeline, history[:n])]
    cursors |= {entry.stream: entry.entry_id for entry in history[:n]}
    outputs += pipeline.begin(cursors, _policy(heir)).outputs
    outputs += fold(pipeline, history[n:])
    return outputs, named(pipeline.counts), pipeline.run_id


def named(counts: dict[tuple[str, str], int]) -> dict[str, int]:
    """Return counters as the meta hash spells them."""
    return {f"{name}:{what}": n for (name, what), n in counts.items()}


class Ledger(NamedTuple):
    """Rows of both of our streams, in their order."""

    decisions: list[Row]
    comparisons: list[Row]

    @classmethod
    def expected(cls, outputs: Iterable[Output]) -> Ledger:
        """Read what the reference produced."""
        rows: dict[str, list[Row]] = {name: [] for name in OURS}
        for output in outputs:
            if output.event_type in rows:
                rows[output.event_type].append(_plain(json.loads(output.payload)))
        return cls(*(_counted(rows[name]) for name in OURS))

    @classmethod
    def found(cls, link: redis.Redis) -> Ledger:
        """Read what is on the bus."""
        return cls(
            *(
                _counted(
                    [
                        _plain(json.loads(fields[b"payload"]))
                        for _, fields in link.xrange(KEYS.stream(name))
                    ]
                )
                for name in OURS
            )
        )


def _plain(row: Row) -> Row:
    row.pop("latency_ms", None)
    if "counts" in row:  # the reference is not told whether the server counts
        row["counts"] = {
            name: {what: n for what, n in counts.items() if (what, n) != ("lost", 0)}
            for name, counts in row["counts"].items()
        }
    return row


def _counted(rows: list[Row]) -> list[Row]:
    """Leave out the ledger of stops, losses, clocks and deaths: the reference knows of none."""
    return [row for row in rows if row.get("reason") not in ("stop", "lost", "order", "crash")]


class Verdict(NamedTuple):
    """What a fault did to the promise; all zero when it holds."""

    lost: int = 0
    """Rows that are missing without having been counted."""
    doubled: int = 0
    disordered: int = 0
    """Rows of a symbol that came after a later one."""
    unequal: int = 0
    """Rows with another value, or that nobody expects."""
    problems: tuple[str, ...] = ()
    """Whatever else was promised and not kept."""

    @property
    def kept(self) -> bool:
        """True when the promise held."""
        return not (self.lost or self.doubled or self.disordered or self.unequal or self.problems)

    def __add__(self, other: object) -> Verdict:
        """Add two verdicts."""
        assert isinstance(other, Verdict)
        return Verdict(*(one + two for one, two in zip(self, other, strict=True)))


def compare(expected: Ledger, found: Ledger) -> Verdict:
    """Compare rows by identity: one each, per-symbol order, every value."""
    return _compare(expected.decisions, found.decisions) + _compare(
        expected.comparisons, found.comparisons
    )


def _compare(expected: Sequence[Row], found: Sequence[Row]) -> Verdict:
    wanted = {identity(row): (place, row) for place, row in enumerate(expected)}
    assert len(wanted) == len(expected), "the reference is not allowed to repeat itself"
    seen: set[str] = set()
    newest: dict[str, int] = {}
    doubled = disordered = unequal = 0
    first_difference: tuple[str, ...] = ()
    for row in found:
        name = identity(row)
        if name in seen:
            doubled += 1
            first_difference = first_difference or (f"twice: {json.dumps(row)[:300]}",)
            continue
        seen.add(name)
        place, reference = wanted.get(name, (-1, None))
        if reference is None or row != reference:
            unequal += 1
            first_difference = first_difference or (_difference(reference, row),)
        if reference is not None:
            disordered += place < newest.get(row["symbol"], -1)
            newest[row["symbol"]] = max(place, newest.get(row["symbol"], -1))
    return Verdict(len(wanted.keys() - seen), doubled, disordered, unequal, first_difference)


def _difference(reference: Row | None, row: Row) -> str:
    if reference is None:
        return f"nobody expects {json.dumps(row)[:300]}"
    names = [name for name in row if row[name] != reference.get(name)]
    shown = {name: (row[name], reference.get(name)) for name in names[:3]}
    return f"{identity(row)} differs in {len(names)} values: {shown}"


def identity(row: Row) -> str:
    """Return what makes a row unique."""
    return str(row["record_id"] if "record_id" in row else row["decision_id"])
