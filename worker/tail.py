"""How does a reader of streams follow them, outlive an absent Redis, and notice what it missed?

Reading writes nothing: plain XREAD from ids that the reader keeps itself. What was trimmed before
it was read is counted against `entries-added`, exactly, from Redis 7; on 6.2 only that it happened.
"""

from __future__ import annotations

import asyncio
import hashlib
import signal
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import redis.exceptions
import structlog
from redis.asyncio import Redis

from shadow.records import ORIGIN, parse_id
from shadow.segments import write_durably
from worker.keys import Keys

COUNT = 256
"""Entries of each stream asked for at a time: less than a millisecond of Redis."""
_BACKOFF_S = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)

Reply = list[tuple[bytes, list[tuple[bytes, dict[bytes, bytes]]]]]
log = structlog.get_logger()


class Backoff:
    """Waits longer after each failure in a row, and says once that something is wrong."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.failures = 0

    async def failed(self, error: Exception, stop: asyncio.Event) -> None:
        """Wait, or return at once when asked to stop."""
        if not self.failures:
            log.warning(f"{self.what}_LOST", msg="trying again for ever", error=str(error))
        delay = _BACKOFF_S[min(self.failures, len(_BACKOFF_S) - 1)]
        self.failures += 1
        try:
            await asyncio.wait_for(stop.wait(), delay)
        except TimeoutError:
            return

    def succeeded(self) -> None:
        """Start again from the shortest wait."""
        if self.failures:
            log.info(f"{self.what}_RETURNED", failures=self.failures)
        self.failures = 0


def stop_on_signals() -> asyncio.Event:
    """Return an event that SIGTERM and SIGINT set."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop


async def read(link: Redis, cursors: Mapping[str, str], block_ms: int | None = None) -> Reply:
    """Return what follows the cursors, at most `COUNT` entries of each stream."""
    streams: dict[Any, Any] = dict(cursors)
    return cast("Reply", await link.xread(streams, count=COUNT, block=block_ms) or [])


async def stream_info(link: Redis, stream: str) -> dict[str, Any] | None:
    """Return XINFO STREAM; None when there is no such stream."""
    try:
        return await link.xinfo_stream(stream)
    except redis.exceptions.ResponseError as error:
        if "no such key" in str(error):
            return None
        raise


class Missed(NamedTuple):
    """What was trimmed from a stream before it was read."""

    entries: int
    exact: bool
    """False where only the fact is known: on Redis 6.2, or before the first look."""


def missed(info: Mapping[str, Any], cursor: str, counts: MutableMapping[str, int]) -> Missed | None:
    """Compare a reader's count with the server's; call it before every read.

    Args:
        info: XINFO STREAM.
        cursor: id of the last entry read.
        counts: `ordinal` is the server's number of that entry, which the caller raises by every
            entry it reads; absent while unknown (0 for a reader from 0-0). Corrected here.
    """
    first, added = info["first-entry"], info.get("entries-added")
    passed = first is not None and parse_id(first[0].decode()) > parse_id(cursor)
    if not isinstance(added, int):
        return Missed(1, exact=False) if passed and cursor != ORIGIN else None
    if info["last-generated-id"].decode() == cursor:
        ordinal = added
    elif passed:
        ordinal = added - int(info["length"])
    else:
        return None
    known = counts.get("ordinal")
    counts["ordinal"] = ordinal
    if known is None:
        return Missed(1, exact=False) if passed else None
    return Missed(ordinal - known, exact=True) if ordinal > known else None


async def copy_artifact(link: Redis, keys: Keys, digest: str, directory: Path) -> bool:
    """Copy a policy artifact into `artifacts/<digest>.safetensors`; False when it is not there.

    Raises:
        OSError: the disk refuses.
    """
    path = directory / "artifacts" / f"{digest}.safetensors"
    if path.is_file():
        return True
    content = cast("bytes | None", await link.get(keys.artifact(digest)))
    if content is None or hashlib.sha256(content).hexdigest() != digest:
        return False
    path.parent.mkdir(exist_ok=True)
    write_durably(path, content)
    return True
