"""What exactly did the worker see and answer? A starting state, and every raw entry after it.

A recording is a directory: `snapshot.msgpack`, `artifacts/<digest>.safetensors` and one table of
raw entries per stream, in the segments of `shadow.segments`. With every flush it notes a cut: input
cursors and last outputs that were committed together and are all recorded. Audits end at the cut.
"""

from __future__ import annotations

import asyncio
import json
import time
from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import structlog
from redis.asyncio import Redis

from rlv3.errors import DataError, UserError
from shadow.recording import (
    CUT,
    OUTPUTS,
    SNAPSHOT,
    Cut,
    Snapshot,
    cursors_of,
    load_snapshot,
    raw_table,
)
from shadow.records import RunRow
from shadow.segments import (
    START,
    SegmentWriter,
    make_directory,
    parse_id,
    write_durably,
)
from shadow.store import COMPARISONS, decode_record
from worker.keys import Keys
from worker.tail import (
    AWAY,
    Backoff,
    Reply,
    connected,
    copy_artifact,
    missed,
    read,
    stop_on_signals,
    stream_info,
)

FLUSH_S = 1.0
FLUSH_ROWS = 16_384
FLUSH_BYTES = 64 << 20
_BATCH = 500  # entries of each stream in one read; production's largest are a few KiB
_POLL_S = 0.1
_TIDY_S = 60.0

log = structlog.get_logger()


async def take_snapshot(link: Redis, keys: Keys) -> Snapshot | None:
    """Read the worker's whole state at one moment; None while it has not committed yet."""
    symbols: list[bytes] = []
    while True:
        async with link.pipeline(transaction=True) as batch:
            batch.hgetall(keys.meta)
            batch.smembers(keys.symbols)
            for stream in (keys.decisions, keys.comparisons):
                batch.xrevrange(stream, count=1)
            for symbol in symbols:
                batch.hgetall(keys.state(symbol.decode()))
            meta, found, decision, comparison, *cells = await batch.execute()
        if set(found) == set(symbols):
            break
        symbols = sorted(found)
    snapshot = Snapshot(
        prefix=keys.prefix,
        meta={name.decode(): value for name, value in meta.items()},
        cells={
            symbol.decode(): {name.decode(): cell for name, cell in stored.items()}
            for symbol, stored in zip(symbols, cells, strict=True)
        },
        ends={keys.decisions: _newest(decision), keys.comparisons: _newest(comparison)},
    )
    return snapshot if _is_complete(snapshot, keys) else None


def _is_complete(snapshot: Snapshot, keys: Keys) -> bool:
    if not {"cursors", "frozen", "policy"} <= set(snapshot.meta):
        return False
    cursors = snapshot.cursors
    return all(keys.stream(name) in cursors for name in snapshot.inputs)


class Recorder:
    """Copies input entries, decisions and comparisons into a recording."""

    def __init__(
        self, source: Redis, sink: Redis, keys: Keys, snapshot: Snapshot, writer: SegmentWriter
    ) -> None:
        self.source = source
        self.sink = sink
        self.keys = keys
        self.writer = writer
        self.inputs = self._start([keys.stream(name) for name in snapshot.inputs], snapshot.cursors)
        self.outputs = self._start([keys.stream(name) for name in OUTPUTS], snapshot.ends)
        self._changed_at: float | None = None
        self._policies = {snapshot.policy}
        self._redis = Backoff("REDIS")
        self._disk = Backoff("RECORDING")

    def _start(self, streams: Sequence[str], first: Mapping[str, str]) -> dict[str, str]:
        cursors = {}
        for stream in streams:
            progress = self.writer.progress(stream)
            recorded = progress.id != START
            cursors[stream] = progress.id if recorded else first.get(stream, START)
            if cursors[stream] == START:
                progress.counts.setdefault("ordinal", 0)
        return cursors

    async def run(self, stop: asyncio.Event) -> None:
        """Record until asked to stop, then take what is there and return.

        Raises:
            UserError: the disk refuses the last entries.
        """
        tidying = asyncio.create_task(self._tidy())
        try:
            while not stop.is_set():
                if self._disk.failures:
                    await self._flush(stop)
                    continue
                idle = await self._follow(stop)
                if self._due():
                    await self._flush(stop)
                if idle:
                    await _pause(stop)
            await self._drain()
        finally:
            tidying.cancel()
            await asyncio.gather(tidying, return_exceptions=True)

    async def _follow(self, stop: asyncio.Event) -> bool:
        """Read up to the worker's last commit; return True when there was nothing to read."""
        before = self.writer.pending
        try:
            await self._look_for_losses()
            await self._read_to(await self._cut())
        except AWAY as error:
            await self._redis.failed(error, stop)
            return False
        self._redis.succeeded()
        return self.writer.pending == before

    async def _read_to(self, cut: Cut) -> bool:
        """Read until everything up to a cut is taken; False when a flush is due before that."""
        while not self._due():
            taken = self._take(self.inputs, await read(self.source, self.inputs, _BATCH))
            found = await read(self.sink, self.outputs, _BATCH)
            await self._copy_artifacts(found)
            taken += self._take(self.outputs, found)
            # what a cut names may have been trimmed; when nothing is left to read, it is reached
            if not taken or (
                _reached(self.inputs, cut.cursors) and _reached(self.outputs, cut.ends)
            ):
                self._note(cut)
                return True
        return False

    async def _cut(self) -> Cut:
        async with self.sink.pipeline(transaction=True) as batch:
            batch.hmget(self.keys.meta, ["cursors", "policy"])
            for stream in self.outputs:
                batch.xrevrange(stream, count=1)
            (cursors, policy), *newest = await batch.execute()
        if policy is not None:
            await self._copy_artifact(policy.decode())
        return Cut(
            cursors={} if cursors is None else cursors_of(cursors),
            ends=dict(zip(self.outputs, map(_newest, newest), strict=True)),
        )

    async def _copy_artifacts(self, found: Reply) -> None:
        """Copy the artifact of every run that begins, also of one that was soon replaced."""
        for name, entries in found:
            if name.decode() != self.keys.comparisons:
                continue
            for _, fields in entries:
                payload = fields.get(b"payload", b"")
                if b"action_table" in payload:  # nothing but a run's row has one
                    row = decode_record(COMPARISONS, payload)
                    if isinstance(row, RunRow):
                        await self._copy_artifact(row.policy_digest)

    async def _copy_artifact(self, digest: str) -> None:
        if digest not in self._policies:
            if not await copy_artifact(self.sink, self.keys, digest, self.writer.directory):
                log.warning("ARTIFACT_ABSENT", digest=digest)
            self._policies.add(digest)

    def _note(self, cut: Cut) -> None:
        text = json.dumps({"cursors": cut.cursors, "ends": cut.ends}, sort_keys=True)
        if self.writer.position.notes.get(CUT) != text:
            self.writer.position.notes[CUT] = text
            self._changed_at = self._changed_at or time.monotonic()

    def _take(self, cursors: dict[str, str], reply: Reply) -> int:
        taken = 0
        for name, found in reply:
            stream = name.decode()
            table = f"entries/{stream.rpartition(':')[2]}"
            for raw_id, fields in found:
                entry_id = raw_id.decode()
                parsed = self.writer.advance(stream, entry_id)
                self.writer.add(table, parsed, _raw_line(entry_id, fields))
                cursors[stream] = entry_id
            counts = self.writer.progress(stream).counts
            if "ordinal" in counts:
                counts["ordinal"] += len(found)
            taken += len(found)
        if taken and self._changed_at is None:
            self._changed_at = time.monotonic()
        return taken

    async def _look_for_losses(self) -> None:
        for link, cursors in ((self.source, self.inputs), (self.sink, self.outputs)):
            for stream, cursor in cursors.items():
                info = await stream_info(link, stream)
                if info is None:
                    continue
                counts = self.writer.progress(stream).counts
                lost = missed(info, cursor, counts)
                if lost is not None:
                    counts["lost"] = counts.get("lost", 0) + lost.entries
                    log.error(
                        "ENTRIES_DROPPED", stream=stream, entries=lost.entries, exact=lost.exact
                    )

    def _due(self) -> bool:
        return self._changed_at is not None and (
            self.writer.pending >= FLUSH_ROWS
            or self.writer.pending_bytes >= FLUSH_BYTES
            or time.monotonic() - self._changed_at >= FLUSH_S
        )

    async def _flush(self, stop: asyncio.Event) -> None:
        try:
            await asyncio.to_thread(self.writer.flush)
        except OSError as error:
            await self._disk.failed(error, stop)
            return
        self._disk.succeeded()
        self._changed_at = None

    async def _drain(self) -> None:
        """Take what was committed when we were asked to stop, and make it durable."""
        try:
            cut = await self._cut()
            while not await self._read_to(cut):
                await asyncio.to_thread(self.writer.flush)
                self._changed_at = None
        except AWAY as error:
            log.warning("DRAIN_CUT_SHORT", error=str(error))
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            await asyncio.to_thread(self.writer.flush)
        except OSError as error:
            raise self._unwritable(error) from error
        rows = {name: group.rows for name, group in self.writer.position.groups.items()}
        log.info("RECORDER_STOPPED", **rows)

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"expected {self.writer.directory} to take the last {self.writer.pending} entries, "
            f"found: {error}"
        )

    async def _tidy(self) -> None:
        while True:
            try:
                await asyncio.to_thread(self.writer.tidy)
            except (OSError, DataError) as error:
                log.warning("SEGMENTS_NOT_MERGED", error=str(error))
            await asyncio.sleep(_TIDY_S)


async def record(
    source_url: str,
    sink_url: str,
    prefix: str,
    out: Path,
    *,
    stop: asyncio.Event | None = None,
) -> None:
    """Record until SIGTERM (or `stop`); an existing recording is continued.

    Raises:
        RedisUnavailable: Redis does not answer at start.
        DataError: the directory is in use, or holds something else.
    """
    stop = stop or stop_on_signals()
    keys = Keys(prefix)
    async with connected(source_url) as source, connected(sink_url) as sink:
        snapshot = await _first_state(sink, keys, out, stop)
        if snapshot is None:
            return
        tables = [raw_table(name) for name in (*snapshot.inputs, *OUTPUTS)]
        writer = SegmentWriter(out, tables)
        try:
            log.info("RECORDER_STARTED", recording=str(out), inputs=snapshot.inputs)
            await Recorder(source, sink, keys, snapshot, writer).run(stop)
        finally:
            writer.close()


async def _first_state(sink: Redis, keys: Keys, out: Path, stop: asyncio.Event) -> Snapshot | None:
    """Return the recording's snapshot, taking it when the worker's state is there."""
    if (out / SNAPSHOT).exists():
        snapshot = load_snapshot(out)
        if snapshot.prefix != keys.prefix:
            raise DataError(
                f"expected a recording of prefix {keys.prefix} in {out}, found {snapshot.prefix}"
            )
        return snapshot
    make_directory(out)
    backoff = Backoff("REDIS")
    awaited = False
    while not stop.is_set():
        try:
            taken = await take_snapshot(sink, keys)
            if taken is not None and await copy_artifact(sink, keys, taken.policy, out):
                write_durably(out / SNAPSHOT, msgspec.msgpack.encode(taken))
                return taken
        except AWAY as error:
            await backoff.failed(error, stop)
            continue
        if not awaited:
            log.info("WORKER_AWAITED", meta=keys.meta)
            awaited = True
        await _pause(stop)
    return None


async def _pause(stop: asyncio.Event) -> None:
    try:
        await asyncio.wait_for(stop.wait(), _POLL_S)
    except TimeoutError:
        return


def _raw_line(entry_id: str, fields: Mapping[bytes, bytes]) -> bytes:
    row = {
        "stream_id": entry_id,
        "names": [b64encode(name).decode() for name in fields],
        "contents": [b64encode(content).decode() for content in fields.values()],
    }
    return msgspec.json.encode(row) + b"\n"


def _newest(reply: Sequence[tuple[bytes, object]]) -> str:
    return reply[0][0].decode() if reply else START


def _reached(cursors: Mapping[str, str], goal: Mapping[str, str]) -> bool:
    return all(
        parse_id(cursors[stream]) >= parse_id(entry_id)
        for stream, entry_id in goal.items()
        if stream in cursors
    )
