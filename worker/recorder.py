"""What exactly did the worker see and answer? A starting state, and every raw entry after it.

A recording is a directory: `snapshot.msgpack`, `artifacts/<digest>.safetensors` and one table of
raw entries per stream, in the segments of `shadow.segments`. With every flush it notes a cut: input
cursors and last outputs that were committed together and are all recorded. Audits end at the cut.

What is kept for a while only lies in parts, `part-<ms>`: each is a recording with a starting state
of its own, and ends exactly where the next one begins. The oldest part goes as a whole.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgspec
import structlog
from redis.asyncio import Redis

from rlv3.errors import DataError, OutOfMemory, UserError
from shadow.recording import (
    CUT,
    OUTPUTS,
    PART,
    SNAPSHOT,
    Cut,
    Snapshot,
    cursors_of,
    load_snapshot,
    raw_lines,
    raw_table,
)
from shadow.records import COMPARISONS, ORIGIN, RunRow, parse_id
from shadow.segments import (
    SegmentWriter,
    make_directory,
    write_durably,
)
from shadow.store import decode_record
from worker.address import AWAY, connected
from worker.bus import STATES
from worker.keys import Keys
from worker.tail import (
    COUNT,
    Backoff,
    copy_artifact,
    missed,
    stop_on_signals,
    stream_info,
)

FLUSH_S = 1.0
FLUSH_BYTES = 32 << 20
_PARTS = 4
"""What is kept, in parts; so that dropping one drops no more than a quarter of it."""
_LOOKS = 5
"""So often a state is read a few symbols at a time before it is read all at once."""
_POLL_S = 0.1
_TIDY_S = 60.0

log = structlog.get_logger()
Reply = list[tuple[bytes, list[Any]]]


class Keep(NamedTuple):
    """What is kept of a recording; None for no limit."""

    hours: float | None = None
    gb: float | None = None

    def part_is_full(self, age_s: float, size: int) -> bool:
        """Return True when another part should begin."""
        return (self.hours is not None and age_s >= self.hours * 3_600 / _PARTS) or (
            self.gb is not None and size >= self.gb * 1e9 / _PARTS
        )


async def take_snapshot(link: Redis, keys: Keys) -> Snapshot | None:
    """Read the worker's whole state as one commit left it; None while it has not committed yet.

    A few symbols at a time, so that Redis is not held; all at once where commits overtake every
    such look, as they do beside a busy worker with many symbols.
    """
    for _ in range(_LOOKS):
        snapshot, symbols = await _look(link, keys, ())
        if not _is_complete(snapshot, keys):
            return None
        for first in range(0, len(symbols), STATES):
            few = symbols[first : first + STATES]
            async with link.pipeline(transaction=False) as batch:
                for symbol in few:
                    batch.hgetall(keys.state(symbol))
                snapshot.cells.update(_cells(few, await batch.execute()))
        if await link.hget(keys.meta, "cursors") == snapshot.meta["cursors"]:
            return snapshot  # every commit changes them
    known: list[str] = []
    while True:
        snapshot, symbols = await _look(link, keys, known)
        if not _is_complete(snapshot, keys):
            return None
        if symbols == known:
            return snapshot
        known = symbols


async def _look(link: Redis, keys: Keys, known: Sequence[str]) -> tuple[Snapshot, list[str]]:
    """Return all symbols, and a snapshot with the cells of those known; read at one moment."""
    async with link.pipeline(transaction=True) as batch:
        batch.hgetall(keys.meta)
        batch.smembers(keys.symbols)
        for stream in (keys.decisions, keys.comparisons):
            batch.xrevrange(stream, count=1)
        for symbol in known:
            batch.hgetall(keys.state(symbol))
        meta, symbols, decision, comparison, *stored = await batch.execute()
    snapshot = Snapshot(
        prefix=keys.prefix,
        meta={name.decode(): value for name, value in meta.items()},
        cells=_cells(known, stored),
        ends={keys.decisions: _newest(decision), keys.comparisons: _newest(comparison)},
    )
    return snapshot, sorted(symbol.decode() for symbol in symbols)


def _cells(
    symbols: Sequence[str], stored: Sequence[Mapping[bytes, bytes]]
) -> dict[str, dict[str, bytes]]:
    return {
        symbol: {name.decode(): cell for name, cell in cells.items()}
        for symbol, cells in zip(symbols, stored, strict=True)
    }


def _is_complete(snapshot: Snapshot, keys: Keys) -> bool:
    if not {"cursors", "frozen", "policy"} <= set(snapshot.meta):
        return False
    if snapshot.meta.get("warming") == b"1":
        return False  # states may be missing
    cursors = snapshot.cursors
    return all(keys.stream(name) in cursors for name in snapshot.inputs)


class Recorder:
    """Copies input entries, decisions and comparisons into a recording."""

    def __init__(
        self,
        source: Redis,
        sink: Redis,
        keys: Keys,
        snapshot: Snapshot,
        writer: SegmentWriter,
        keep: Keep | None = None,
    ) -> None:
        self.source = source
        self.sink = sink
        self.keys = keys
        self.writer = writer
        self.inputs = self._start([keys.stream(name) for name in snapshot.inputs], snapshot.cursors)
        self.outputs = self._start([keys.stream(name) for name in OUTPUTS], snapshot.ends)
        self._changed_at: float | None = None
        self._keep = keep
        self._begun_at = time.monotonic()
        self._sized_at = time.monotonic()
        self._size = _size(writer.directory)
        self._policies = {snapshot.policy}
        self._redis = Backoff("REDIS")
        self._disk = Backoff("RECORDING")

    def _start(self, streams: Sequence[str], first: Mapping[str, str]) -> dict[str, str]:
        cursors = {}
        for stream in streams:
            progress = self.writer.progress(stream)
            recorded = progress.id != ORIGIN
            cursors[stream] = progress.id if recorded else first.get(stream, ORIGIN)
            if cursors[stream] == ORIGIN:
                progress.counts.setdefault("ordinal", 0)
        return cursors

    async def run(self, stop: asyncio.Event) -> Snapshot | None:
        """Record until asked to stop, then take what is there and return.

        Returns:
            None; or, when the part is full, the state with which the next one begins: this one has
            everything before it, and no more.
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
                if self._is_full() and (following := await self._end(stop)) is not None:
                    return following
                if idle:
                    await _pause(stop)
            await self._drain()
            return None
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
            taken = self._take(self.inputs, await _read(self.source, self.inputs))
            found = await _read(self.sink, self.outputs)
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
            for _, flat in entries:
                values = iter(flat)
                payload = dict(zip(values, values, strict=True)).get(b"payload", b"")
                if b"action_table" not in payload:  # nothing but a run's row has one
                    continue
                try:
                    row = decode_record(COMPARISONS, payload)
                except ValueError:
                    continue  # somebody else's, or a later version's; recorded all the same
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
            for first, last, line in raw_lines(found):
                self.writer.advance(stream, first)
                parsed = self.writer.advance(stream, last) if last != first else parse_id(first)
                self.writer.add(table, parsed, line)
                cursors[stream] = last
            counts = self.writer.progress(stream).counts
            counts["entries"] = counts.get("entries", 0) + len(found)
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
            self.writer.pending_bytes >= FLUSH_BYTES
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
        groups = self.writer.position.groups
        log.info("RECORDER_STOPPED", **{k: g.counts.get("entries", 0) for k, g in groups.items()})

    # -- parts ------------------------------------------------------------------------------------

    def _is_full(self) -> bool:
        now = time.monotonic()
        if self._keep is None or now - self._sized_at < FLUSH_S:
            return False
        self._sized_at = now
        self._size = _size(self.writer.directory)
        return self._keep.part_is_full(now - self._begun_at, self._size)

    async def _end(self, stop: asyncio.Event) -> Snapshot | None:
        """End this part exactly at a state of the worker; None when that did not work now."""
        try:
            following = await take_snapshot(self.sink, self.keys)
            if following is None:
                return None
            cut = Cut(following.cursors, following.ends)
            while not await self._read_to(cut):
                await asyncio.to_thread(self.writer.flush)
                self._changed_at = None
            await asyncio.to_thread(self.writer.flush)
        except AWAY as error:
            await self._redis.failed(error, stop)
            return None
        except OSError as error:
            await self._disk.failed(error, stop)
            return None
        return following

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"expected {self.writer.directory} to take the last {self.writer.pending} entries, "
            f"found: {error}"
        )

    async def _tidy(self) -> None:
        while True:
            try:
                # of a finished day as well: one file of hours at full rate would be too much
                await asyncio.to_thread(self.writer.merge_small)
            except (OSError, DataError, OutOfMemory) as error:
                log.warning("SEGMENTS_NOT_MERGED", error=str(error))
            await asyncio.sleep(_TIDY_S)


async def record(
    source_url: str,
    sink_url: str,
    prefix: str,
    out: Path,
    *,
    keep: Keep | None = None,
    stop: asyncio.Event | None = None,
) -> None:
    """Record until SIGTERM (or `stop`); an existing recording is continued.

    Args:
        keep: what is kept; everything by default.
    Raises:
        RedisUnavailable: Redis does not answer at start.
        DataError: the directory is in use, or holds something else.
        UserError: the disk refuses the last entries, or another part.
    """
    stop = stop or stop_on_signals()
    keys = Keys(prefix)
    async with connected(source_url) as source, connected(sink_url) as sink:
        for link in (source, sink):
            link.set_response_callback("XREAD", _as_sent)
        directory = out if keep is None else _newest_part(out)
        snapshot = await _first_state(sink, keys, directory, stop)
        while snapshot is not None:
            tables = [raw_table(name) for name in (*snapshot.inputs, *OUTPUTS)]
            writer = SegmentWriter(directory, tables)
            try:
                log.info("RECORDER_STARTED", recording=str(directory), inputs=snapshot.inputs)
                recorder = Recorder(source, sink, keys, snapshot, writer, keep)
                snapshot = await recorder.run(stop)
            finally:
                writer.close()
            if snapshot is not None and keep is not None:
                try:
                    directory = await asyncio.to_thread(_begin_part, out, directory, snapshot)
                    await asyncio.to_thread(_drop_parts, out, keep)
                except OSError as error:
                    raise UserError(
                        f"expected {out} to take another part of the recording, found: {error}; "
                        "the next start continues the newest one"
                    ) from error


def _newest_part(out: Path) -> Path:
    """Return the part that is to be continued, or the first one."""
    if (out / SNAPSHOT).exists():
        raise DataError(
            f"expected a directory for parts of a recording, found a whole one in {out}; choose "
            "another, or keep everything"
        )
    parts = [path for path in sorted(out.glob(PART + "*")) if (path / SNAPSHOT).exists()]
    return parts[-1] if parts else _new_part(out)


def _new_part(out: Path) -> Path:
    return out / f"{PART}{time.time_ns() // 1_000_000:013d}"


def _begin_part(out: Path, former: Path, snapshot: Snapshot) -> Path:
    """Make the next part: its artifact, then the state with which it begins."""
    part = _new_part(out)
    name = f"artifacts/{snapshot.policy}.safetensors"
    try:
        (part / "artifacts").mkdir(parents=True)
        shutil.copy(former / name, part / name)
        write_durably(part / SNAPSHOT, msgspec.msgpack.encode(snapshot))
    except OSError:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return part


def _drop_parts(out: Path, keep: Keep) -> None:
    """Delete the oldest parts: those that end before what is kept, and what is too much."""
    parts = sorted(out.glob(PART + "*"))
    sizes = [_size(part) for part in parts]
    oldest = 0.0 if keep.hours is None else time.time() - keep.hours * 3_600
    while len(parts) > 1:
        ends_at = int(parts[1].name.removeprefix(PART)) / 1_000
        # the part that begins now needs room, too
        room = None if keep.gb is None else keep.gb * 1e9 * (1 - 1 / _PARTS)
        if ends_at >= oldest and (room is None or sum(sizes) <= room):
            return
        log.info("PART_DROPPED", part=str(parts[0]), bytes=sizes[0])
        shutil.rmtree(parts[0])
        del parts[0], sizes[0]


def _size(directory: Path) -> int:
    """Return the bytes of all files; those that go meanwhile do not count."""
    total = 0
    for path in directory.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def _as_sent(response: Any, **kwargs: Any) -> Any:  # noqa: ARG001 - the client's signature
    """Leave the reply of XREAD as it is: taking it apart would cost more than recording it."""
    return response


async def _read(link: Redis, cursors: Mapping[str, str]) -> Reply:
    """Return what follows the cursors: per stream its key and its entries, as XREAD has them."""
    streams: dict[Any, Any] = dict(cursors)
    return cast("Reply", await link.xread(streams, count=COUNT) or [])


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


def _newest(reply: Sequence[tuple[bytes, object]]) -> str:
    return reply[0][0].decode() if reply else ORIGIN


def _reached(cursors: Mapping[str, str], goal: Mapping[str, str]) -> bool:
    return all(
        parse_id(cursors[stream]) >= parse_id(entry_id)
        for stream, entry_id in goal.items()
        if stream in cursors
    )
