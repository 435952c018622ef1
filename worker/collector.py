"""How do decisions and comparisons get from the bus into the store, each exactly once?

    XREAD from the store's position -> append -> flush (fsync, position) -> publish the position

The worker trims its streams up to the published position and no further, so what is read again
after a crash is still there. A full disk or an absent Redis only stops the position from moving.
After a flush the verdict's statistics are brought up to date.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import structlog
from redis.asyncio import Redis

from rlv3.errors import DataError, OutOfMemory, UserError
from shadow.evaluation.streaming import Keeper
from shadow.records import ORIGIN, parse_id
from shadow.store import StoreWriter
from worker.address import AWAY, connected
from worker.keys import Keys
from worker.tail import (
    Backoff,
    Reply,
    copy_artifact,
    missed,
    read,
    stop_on_signals,
    stream_info,
)

FLUSH_S = 1.0
FLUSH_ROWS = 16_384
_BLOCK_MS = 250
_TIDY_S = 60.0

log = structlog.get_logger()


class Collector:
    """Follows both of our streams into a store."""

    def __init__(
        self, link: Redis, keys: Keys, store: StoreWriter, *, flush_s: float, flush_rows: int
    ) -> None:
        self.link = link
        self.keys = keys
        self.store = store
        self.flush_s = flush_s
        self.flush_rows = flush_rows
        self.streams = (keys.decisions, keys.comparisons)
        self.cursors = {stream: store.position.get(stream, ORIGIN) for stream in self.streams}
        for stream, cursor in self.cursors.items():
            if cursor == ORIGIN:
                store.counts(stream).setdefault("ordinal", 0)
        self._changed_at: float | None = None  # when the oldest row in memory was read
        self._published: dict[str, str] = {}
        self._redis = Backoff("REDIS")
        self._disk = Backoff("STORE")
        self._absent: set[str] = set()
        self._keeper = Keeper(store.directory)
        self._verdict: bytes | None = None  # not published yet
        self._complaint = ""
        store.observer = self._keeper.observe

    async def run(self, stop: asyncio.Event) -> None:
        """Collect until asked to stop, then take what is there and return.

        Raises:
            UserError: the store cannot take the last rows; they stay on the bus.
        """
        tidying = asyncio.create_task(self._tidy())
        try:
            await self._keep_statistics()
            await self._publish()
            while not stop.is_set():
                if not self._disk.failures:
                    await self._follow(stop)
                if self._due():
                    await self._flush(stop)
            await self._drain()
        finally:
            tidying.cancel()
            await asyncio.gather(tidying, return_exceptions=True)

    async def _follow(self, stop: asyncio.Event) -> None:
        try:
            await self._look_for_losses()
            self._take(await read(self.link, self.cursors, self._block_ms()))
        except AWAY as error:
            await self._redis.failed(error, stop)
        else:
            self._redis.succeeded()

    def _block_ms(self) -> int:
        if self._changed_at is None:
            return _BLOCK_MS
        left_s = self._changed_at + self.flush_s - time.monotonic()
        return min(max(int(left_s * 1_000), 1), _BLOCK_MS)

    def _take(self, reply: Reply) -> int:
        taken = 0
        for name, found in reply:
            stream = name.decode()
            for raw_id, fields in found:
                entry_id = raw_id.decode()
                table = self.store.append(stream, entry_id, fields.get(b"payload", b""))
                self.cursors[stream] = entry_id
                if table == "rejected":
                    log.warning("ENTRY_REJECTED", stream=stream, entry_id=entry_id)
            counts = self.store.counts(stream)
            if "ordinal" in counts:
                counts["ordinal"] += len(found)
            taken += len(found)
        if taken and self._changed_at is None:
            self._changed_at = time.monotonic()
        return taken

    async def _look_for_losses(self) -> None:
        for stream in self.streams:
            info = await stream_info(self.link, stream)
            if info is None:
                continue
            counts = self.store.counts(stream)
            lost = missed(info, self.cursors[stream], counts)
            if lost is not None:
                counts["lost"] = counts.get("lost", 0) + lost.entries
                log.error("ENTRIES_DROPPED", stream=stream, entries=lost.entries, exact=lost.exact)

    def _due(self) -> bool:
        if self._changed_at is None:
            return False
        return (
            self.store.pending >= self.flush_rows
            or time.monotonic() - self._changed_at >= self.flush_s
        )

    async def _flush(self, stop: asyncio.Event) -> None:
        try:
            await asyncio.to_thread(self.store.flush)
        except OSError as error:
            await self._disk.failed(error, stop)
            return
        self._disk.succeeded()
        self._changed_at = None
        await self._keep_statistics()
        await self._publish()

    async def _keep_statistics(self) -> None:
        """Bring the verdict's statistics up to date with what is durable; it may wait a while."""
        try:
            content = await asyncio.to_thread(self._refresh_statistics)
        except (OSError, DataError, OutOfMemory) as error:
            if str(error) != self._complaint:
                log.warning("STATISTICS_NOT_KEPT", error=str(error))
            self._complaint = str(error)
            return
        self._complaint = ""
        self._verdict = content or self._verdict

    def _refresh_statistics(self) -> bytes | None:
        if self.store.position:
            self._keeper.refresh()
        return self._keeper.save()

    async def _publish(self) -> None:
        """Tell the worker how far it may trim; what fails is made good by the next time."""
        position = self.store.position
        try:
            if position != self._published and position:
                await self.link.hset(self.keys.collected, mapping=dict(position.items()))
                self._published = position
            await self._copy_artifacts()
            if self._verdict is not None:
                await self.link.set(self.keys.verdict, self._verdict)
                self._verdict = None
        except AWAY as error:
            log.warning("POSITION_NOT_PUBLISHED", error=str(error))

    async def _copy_artifacts(self) -> None:
        for digest in sorted(self.store.policies):
            try:
                copied = await copy_artifact(self.link, self.keys, digest, self.store.directory)
            except OSError as error:
                log.warning("ARTIFACT_NOT_COPIED", digest=digest, error=str(error))
                continue
            if copied:
                self.store.policies.discard(digest)
            elif digest not in self._absent:
                self._absent.add(digest)
                log.warning("ARTIFACT_ABSENT", digest=digest)

    async def _drain(self) -> None:
        """Take what was on the streams when we were asked to stop, and make it durable."""
        try:
            ends = {}
            for stream in self.streams:
                info = await stream_info(self.link, stream)
                ends[stream] = ORIGIN if info is None else info["last-generated-id"].decode()
            while any(parse_id(self.cursors[name]) < parse_id(ends[name]) for name in ends):
                if not self._take(await read(self.link, self.cursors)):
                    break
                if self.store.pending >= self.flush_rows:
                    await asyncio.to_thread(self.store.flush)
            await self._look_for_losses()
        except AWAY as error:
            log.warning("DRAIN_CUT_SHORT", error=str(error))
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            await asyncio.to_thread(self.store.flush)
        except OSError as error:
            raise self._unwritable(error) from error
        await self._keep_statistics()
        await self._publish()
        log.info("COLLECTOR_STOPPED", **self.store.position)

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"expected {self.store.directory} to take the last {self.store.pending} rows, found: "
            f"{error}; they stay on the bus after {self.store.position}"
        )

    async def _tidy(self) -> None:
        """Merge segments now and then, beside everything else."""
        while True:
            try:
                merged = await asyncio.to_thread(self.store.tidy)
            except (OSError, DataError, OutOfMemory) as error:
                log.warning("SEGMENTS_NOT_MERGED", error=str(error))
            else:
                if merged:
                    log.info("SEGMENTS_MERGED", segments=merged)
            await asyncio.sleep(_TIDY_S)


async def collect(
    redis_url: str,
    prefix: str,
    store: Path,
    *,
    flush_s: float = FLUSH_S,
    flush_rows: int = FLUSH_ROWS,
    stop: asyncio.Event | None = None,
) -> None:
    """Collect until SIGTERM (or `stop`).

    Raises:
        RedisUnavailable: Redis does not answer at start.
        DataError: the store is in use or damaged.
        OutOfMemory: for the rows in hand; they stay on the bus, and a new process has more.
        UserError: the disk refuses the last rows.
    """
    stop = stop or stop_on_signals()
    writer = StoreWriter(store)
    try:
        async with connected(redis_url) as link:
            log.info("COLLECTOR_STARTED", store=str(store), **writer.position)
            collector = Collector(
                link, Keys(prefix), writer, flush_s=flush_s, flush_rows=flush_rows
            )
            await collector.run(stop)
    finally:
        writer.close()
