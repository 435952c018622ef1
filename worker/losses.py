"""How many entries of a stream were trimmed before we read them?

From Redis 7 a stream numbers what is added to it (`entries-added`), so the number of the entry at
our cursor is known whenever nothing older is left, or nothing newer exists. It must equal what we
read since the start; what it exceeds that by was lost. On 6.2 only the fact can be seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from shadow.records import ORIGIN, parse_id


class Loss(NamedTuple):
    """A hole in a stream."""

    entries: int | None
    """None: some, on Redis 6.2."""
    after: str
    """Id of the last entry before the hole."""
    upto: str
    """Id from which reading goes on; the same where only later counting found the hole."""


class StreamInfo(NamedTuple):
    """What XINFO STREAM says."""

    last: str
    """Last generated id."""
    first: str | None
    """Id of the oldest entry still there."""
    length: int
    added: int | None
    """Entries ever added; None before Redis 7."""

    @classmethod
    def parse(cls, reply: Sequence[Any]) -> StreamInfo:
        """Read a reply of names and values."""
        values = dict(zip(reply[::2], reply[1::2], strict=True))
        first = values[b"first-entry"]
        return cls(
            last=values[b"last-generated-id"].decode(),
            first=first[0].decode() if first else None,
            length=values[b"length"],
            added=values.get(b"entries-added"),
        )

    def began_anew(self, cursor: str, time_ms: float) -> bool:
        """Return True when a stream's ids grow below a cursor in the future, so none is ever read.

        It was deleted, perhaps to be rid of ids in the future. Where the cursor is no later than
        TIME, a source only went back a little (a promoted replica): its next id lies behind it.
        """
        return parse_id(self.last) < parse_id(cursor) and parse_id(cursor)[0] > time_ms

    def resumed(self, cursor: str, *, latest: bool) -> str:
        """Return the cursor behind a hole: before the oldest entry left, or at the stream's end."""
        if not _passed(self, cursor) and parse_id(cursor) <= parse_id(self.last):
            return cursor
        return self.last if latest or self.first is None else _before(self.first)


class Losses:
    """Where counting began in each input stream, and what was lost since.

    Attributes:
        counts: (event type, outcome) -> entries folded, as committed.
    """

    def __init__(self, meta: Mapping[bytes, bytes], counts: Mapping[tuple[str, str], int]) -> None:
        self.counts = dict(counts)
        self._base = _named(meta, "base")
        self._lost = _named(meta, "lost")

    def begin(self, event_type: str, info: StreamInfo | None, cursor: str) -> None:
        """Count a stream from its cursor on, unless it is counted already."""
        number = _number(info, cursor)
        if event_type not in self._base and number is not None:
            self._base[event_type] = number - self._read(event_type)

    def check(self, event_type: str, info: StreamInfo | None, cursor: str) -> int | None:
        """Return how many entries were lost since the last check; None for an unknown number.

        Args:
            info: taken in the transaction that reads from `cursor`.
            cursor: id of the last entry folded and committed.
        """
        number = _number(info, cursor)
        if number is None:
            blind = info is not None and info.added is None and cursor != ORIGIN
            if not blind or info is None or not _passed(info, cursor):
                return 0
            return 0 if info.first is not None and _before(info.first) == cursor else None
        if event_type not in self._base:
            self.begin(event_type, info, cursor)
            return 0
        lost = self._lost.get(event_type, 0)
        missed = number - self._base[event_type] - self._read(event_type) - lost
        if missed > 0:
            self._lost[event_type] = lost + missed
        elif missed < 0:  # the stream was deleted and began anew
            self._base[event_type] += missed
        return max(0, missed)

    def fields(self) -> dict[str, str]:
        """Return what to keep in the meta hash."""
        kept = {f"base:{event_type}": str(n) for event_type, n in self._base.items()}
        return kept | {f"lost:{event_type}": str(n) for event_type, n in self._lost.items()}

    def totals(self) -> dict[str, int]:
        """Return event type -> entries lost since the first start, where any were."""
        return dict(self._lost)

    def _read(self, event_type: str) -> int:
        return sum(n for (name, _), n in self.counts.items() if name == event_type)


def _number(info: StreamInfo | None, cursor: str) -> int | None:
    """Return how many entries were added up to a cursor; None where that cannot be known."""
    if info is None:
        return 0 if cursor == ORIGIN else None
    if info.added is None:
        return None
    if info.last == cursor:
        return info.added
    return info.added - info.length if _passed(info, cursor) else None


def _passed(info: StreamInfo, cursor: str) -> bool:
    """Return True when nothing up to the cursor is left, but something newer was added."""
    if info.last == cursor:
        return False
    return info.first is None or parse_id(info.first) > parse_id(cursor)


def _before(entry_id: str) -> str:
    """Return the greatest id below one that is not 0-0."""
    ms, seq = parse_id(entry_id)
    return f"{ms}-{seq - 1}" if seq else f"{ms - 1}-{2**64 - 1}"


def _named(meta: Mapping[bytes, bytes], kind: str) -> dict[str, int]:
    prefix = f"{kind}:".encode()
    return {k[len(prefix) :].decode(): int(v) for k, v in meta.items() if k.startswith(prefix)}
