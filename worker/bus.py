"""How do entries come off Redis in one order, and how does a commit reach it exactly once?

The only import of redis on the worker's path. The rules:
- Reading writes nothing: `MULTI TIME XREAD EXEC` from our own cursors, no consumer group.
- An entry is released when its id is below the server's TIME in ms and not beyond the last id of
  any stream that COUNT cut; the order is (id, stream rank). So live, catch-up and replay agree.
- One script writes everything that belongs together (`commit.lua`). It is safe to run the same
  commit again after a lost reply, so the client itself never retries anything.
- Every method raises `BusError` when Redis is away or refuses; the caller waits and calls again.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import time
from bisect import bisect
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from itertools import chain
from typing import Any, NamedTuple

import msgpack
import msgspec
from hiredis import pack_command
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    NoScriptError,
    RedisError,
    ResponseError,
)

from shadow.records import (
    COMPARISONS,
    DECISIONS,
    ORIGIN,
    REPLAY,
    SCHEMA_VERSION,
    Commit,
    Entry,
    StreamId,
    parse_id,
)
from shadow.risk import engaged
from worker.address import open_pool, quiet, shown
from worker.errors import CheckFailed, Fenced, RedisUnavailable
from worker.keys import Keys
from worker.losses import Loss, Losses, StreamInfo

SOURCE = "rl-v3-shadow"
"""The envelope's source, and the service name of the bus."""
MIN_VERSION = (6, 2)
BLOCK_MS = 1_000
"""Longest idle wait."""
SOCKET_TIMEOUT_S = 3.0
"""Of every reply; well above the longest idle wait."""
CONNECT_TIMEOUT_S = 2.0
AHEAD_MS = 1_000
"""An id further ahead of TIME than this is an incident: a clock step or a producer's own id."""
HELD_SLEEP_S = 0.001
LOSS_CHECK_S = 0.02
ENVELOPE = 2 * 6
"""Names and values of an entry as the bus's own client writes it."""
KEPT = 10_000
"""The newest of each of our streams stay for its other readers (a recorder), collected or not."""
TRIM_LIMIT = 2_000
"""Entries removed per stream and call: about half a millisecond of Redis."""
HEARTBEAT_TTL_S = 10
FEW = 16
"""One entry in so many is put among the others; more are sorted with them."""
PAGE = 500
"""Entries of history asked for at a time."""
STATES = 8
"""Symbols' states asked for at a time: a full one has some 200 cells."""
SINK_LOOK_S = 0.25
"""How often the sink is asked for replays where the source is another server."""
REPLAYS_MAX = 2 * KEPT
"""Replays kept; `dlq replay` lets no more than half as many wait."""


class BusError(Exception):
    """Redis is away or refuses a command; wait, then call again.

    Attributes:
        url: of which server, without a password.
        said: by it or by the client.
    """

    def __init__(self, url: str, said: object) -> None:
        super().__init__(f"{url}: {said}")
        self.url = url
        self.said = str(said)


class StateLost(Exception):
    """Our meta hash vanished while we ran (eviction, FLUSHALL), or is an older one (a promoted
    replica, a power cut): start again from what is there."""


class Batch(NamedTuple):
    """Entries released in order."""

    entries: list[Entry]
    lag_ms: float
    """TIME minus the id of the oldest entry that is not folded yet; 0 when there is none."""
    ahead: int
    """The last so many have ids more than 1 s ahead of TIME: released as read."""
    lost: dict[str, Loss]
    """Event type -> what was trimmed before we read it, found now; the entries lie behind it."""
    killed: bool
    """Whether the kill switch was engaged when the reading was sent; False where none is read."""


class _Reply(NamedTuple):
    """What Redis answered to one reading."""

    time: list[bytes]
    """TIME: seconds, microseconds."""
    streams: Any
    """Of XREAD: key and rows of every stream that has entries, None for none; or an error."""
    infos: list[Any]
    """XINFO STREAM of every stream, where asked for; an error for one that is absent."""
    switch: Any
    """The kill switch's key, where there is one."""
    at: float
    """When we got to it, by our monotonic clock: sent ahead, it may have come a fold earlier."""


class Start(NamedTuple):
    """What `acquire` found."""

    epoch: int
    seq: int
    """Commits so far; 0 means that nothing was ever committed."""
    gap: str
    """Why this is not an ordinary start, or empty."""
    added: list[str]
    """Input streams that had no cursor yet."""
    absent: list[str]
    """Input streams that do not exist now."""
    cells: dict[str, dict[str, bytes]]
    """symbol -> cell -> bytes; "" is the pipeline's own."""
    counts: dict[tuple[str, str], int]
    policy: str
    """Digest of the artifact in force, or empty."""
    frozen: str
    """What the last owner froze for its run (JSON), or empty."""
    unclean: bool
    """The last owner did not stop in order: it was killed, it died, or it still lives."""
    suspect: tuple[str, int]
    """What was in hand alone when it ended, and how often it was so; see `Bus.suspect`."""


class Server(NamedTuple):
    """A Redis server that answered."""

    url: str
    version: tuple[int, ...]

    @property
    def tier(self) -> str:
        """ "7" where every guarantee holds, else "6.2"."""
        return "7" if self.counts else "6.2"

    @property
    def counts(self) -> bool:
        """Whether a stream says how many entries were ever added to it."""
        return self.version >= (7,)


class _Script:
    """A Lua script beside this module, run by its hash."""

    def __init__(self, name: str) -> None:
        self.text = files("worker").joinpath(name).read_bytes()
        self.sha = hashlib.sha1(self.text, usedforsecurity=False).hexdigest()


_ACQUIRE, _COMMIT, _TRIM, _PUBLISH, _SUSPECT = (
    _Script(f"{name}.lua") for name in ("acquire", "commit", "trim", "publish", "suspect")
)


class _Link:
    """One connection without retries; a command list is one round trip."""

    def __init__(self, url: str) -> None:
        self.url = shown(url)
        self._pool = open_pool(url, **_options())  # Sentinel's connections refer to it
        self._connection = self._pool.make_connection()  # type: ignore[no-untyped-call]
        self._timeout_s: float = self._connection.socket_timeout

    async def send(self, *commands: Sequence[Any]) -> list[Any]:
        """Send commands and return their replies; an error reply is returned, not raised."""
        packed = [pack_command(tuple(command)) for command in commands]
        link = self._connection
        try:
            if not link.is_connected:
                link.socket_timeout = self._timeout_s  # the library's own, while it logs in
                await link.connect()  # sending opens a connection as well, but asks no Sentinel
                link.socket_timeout = None  # it would be a task and many timers a round trip
            now = asyncio.get_running_loop().time
            replies: list[Any] = []
            async with asyncio.timeout(self._timeout_s) as limit:
                await link.send_packed_command(packed, check_health=False)
                for _ in commands:
                    if replies:
                        limit.reschedule(now() + self._timeout_s)
                    replies.append(await self._reply())
            return replies
        except TimeoutError as error:
            await self.close()
            raise BusError(self.url, f"no answer within {self._timeout_s:g} s") from error
        except (RedisError, OSError) as error:
            await self.close()
            raise BusError(self.url, error) from error

    async def call(self, *command: Any) -> Any:
        """Send one command and return its reply.

        Raises:
            BusError: the connection failed, or Redis answered with an error (its `__cause__`).
        """
        (reply,) = await self.send(command)
        return self._checked(reply)

    async def transaction(self, *commands: Sequence[Any]) -> list[Any]:
        """Run commands in MULTI/EXEC and return their replies; errors inside are returned."""
        replies = await self.send(("MULTI",), *commands, ("EXEC",))
        for reply in replies[:-1]:
            self._checked(reply)
        results: list[Any] = self._checked(replies[-1])
        return results

    async def script(self, script: _Script, keys: Sequence[str], args: Iterable[Any]) -> list[Any]:
        """Run a script by its hash, with its text where the server does not know it yet."""
        rest = (len(keys), *keys, *args)
        for command in (("EVALSHA", script.sha, *rest), ("EVAL", script.text, *rest)):
            (reply,) = await self.send(command)
            if not isinstance(reply, NoScriptError):
                break
        result: list[Any] = self._checked(reply)
        return result

    async def close(self) -> None:
        """Drop the connection; the next command opens a new one."""
        await self._connection.disconnect(nowait=True)

    async def _reply(self) -> Any:
        try:
            return await self._connection.read_response()
        except AuthenticationError:
            raise
        except ResponseError as error:
            return error

    def _checked(self, reply: Any) -> Any:
        if isinstance(reply, RedisError):
            raise BusError(self.url, reply) from reply
        return reply


def _options() -> dict[str, Any]:
    """Return connection settings that leave nothing to the library's defaults."""
    options: dict[str, Any] = {
        "socket_timeout": SOCKET_TIMEOUT_S,
        "socket_connect_timeout": CONNECT_TIMEOUT_S,
        "socket_keepalive": True,
        "retry": Retry(NoBackoff(), 0),
        "retry_on_error": [],
        "retry_on_timeout": False,
        "health_check_interval": 0,
        "decode_responses": False,
        "protocol": 2,
    }
    return options | quiet()


class Bus:
    """The source's streams and the sink's state, as one worker sees them.

    Attributes:
        cursors: full stream key -> id of the last entry committed.
        seq: number of commits.
        behind: the last reading was cut: more is waiting.
        servers: who answered, source first.
    """

    def __init__(
        self,
        source_url: str,
        sink_url: str,
        keys: Keys,
        inputs: Sequence[str],
        *,
        codec: str = "json",
        decisions_cap: int = 50_000,
        comparisons_cap: int = 50_000,
        dlq_cap: int = 10_000,
        kill_switch: str | None = None,
    ) -> None:
        self.keys = keys
        self.inputs = tuple(inputs)
        self.streams = tuple(keys.stream(event_type) for event_type in inputs)
        self.cursors: dict[str, str] = {}
        self.seq = 0
        self.epoch = 0
        self.servers: list[Server] = []
        self._one_server = source_url == sink_url
        self._source = _Link(source_url)
        self._sink = _Link(sink_url)
        self._side = _Link(sink_url)  # beside the path: what it sends delays no commit
        self._side_lock = asyncio.Lock()
        self._as_msgpack = codec == "msgpack"
        self._kill_switch = kill_switch
        self._caps = {
            DECISIONS: (keys.decisions, KEPT, decisions_cap),
            COMPARISONS: (keys.comparisons, KEPT, comparisons_cap),
        } | {f"dlq:{name}": (keys.dlq(name), dlq_cap, dlq_cap) for name in inputs}
        self._outputs = {name: key for name, (key, _, _) in self._caps.items()}
        self._caps[REPLAY] = (keys.replay, KEPT, REPLAYS_MAX)
        self._at_source = tuple(
            stream for stream in self.streams if self._one_server or stream != keys.replay
        )
        self._at_sink = tuple(stream for stream in self.streams if stream not in self._at_source)
        self._sink_at = -math.inf
        self._ranks = {key.encode(): rank for rank, key in enumerate(self.streams)}
        self._stored = ""  # the cursors field as the sink holds it
        self._written: dict[str, str] = {}  # fields of meta that are known to be there
        self._stored_symbols: set[str] = set()
        self._held = False
        self.behind = False
        self._asked: tuple[tuple[dict[str, str], int], asyncio.Task[_Reply]] | None = None
        self._on_gap = "fail"
        self._losses = Losses({}, {})
        self._checked_at = -math.inf
        self._time_ms = 0.0
        self._time_at = time.monotonic()

    # -- start ------------------------------------------------------------------------------------

    async def connect(self) -> None:
        """Check that both servers answer, let us in, and are of a kind we can work with.

        Raises:
            RedisUnavailable: one sentence with the URL, what was expected and what was found.
        """
        self.servers = []
        for link in (self._sink,) if self._one_server else (self._source, self._sink):
            try:
                self.servers.append(_accept(link.url, await link.call("HELLO")))
            except BusError as error:
                raise _refusal(error) from error

    async def acquire(self, *, start: str, on_gap: str, owner: str) -> Start:
        """Take the epoch and load what the last owner left; sets the cursors of a first start.

        Args:
            start: "new" (from each stream's last id) or "oldest".
            on_gap: "fail", "resume-oldest" or "resume-latest".
            owner: who we are, told to the worker that we fence.
        Raises:
            CheckFailed: state or cursors are missing and `on_gap` is "fail".
            RedisUnavailable: Redis does not answer or refuses.
        """
        await self._forget()
        try:
            infos = await self._stream_infos()
            return await self._acquire(infos, start=start, on_gap=on_gap, owner=owner)
        except BusError as error:
            raise _refusal(error) from error

    async def _acquire(
        self, infos: Mapping[str, StreamInfo | None], *, start: str, on_gap: str, owner: str
    ) -> Start:
        self._on_gap = on_gap
        newest = {stream: info.last if info else ORIGIN for stream, info in infos.items()}
        # a replay was asked for, whenever that was
        begun = {s: ORIGIN if s == self.keys.replay else last for s, last in newest.items()}
        oldest = dict.fromkeys(self.streams, ORIGIN)
        first = oldest if start == "oldest" else begun
        resumed = {"fail": None, "resume-oldest": oldest, "resume-latest": newest}[on_gap]
        keys = self.keys
        reply = await self._sink.script(
            _ACQUIRE,
            (keys.meta, keys.symbols, keys.decisions, keys.comparisons),
            (
                owner,
                SCHEMA_VERSION,
                _dump_cursors(first, 0),
                "" if resumed is None else _dump_cursors(resumed, 0),
                keys.state(""),
            ),
        )
        if reply[0] == b"GAP":
            raise CheckFailed(
                f"expected state and cursors to be complete in {self._sink.url}, found that "
                f"{reply[1].decode()}; choose --on-gap resume-oldest or resume-latest"
            )
        meta = _pairs(reply[4])
        self.epoch = int(reply[1])
        self._stored = meta[b"cursors"].decode()
        cursors = json.loads(self._stored)
        self.seq = cursors.pop("seq")
        self.cursors = cursors
        added = [stream for stream in self.streams if stream not in cursors]
        cursors.update({stream: first[stream] for stream in added})
        self._written = {}
        self._checked_at = -math.inf
        counts = _counts(meta)
        self._losses = Losses(meta, counts)
        for event_type, stream in zip(self.inputs, self.streams, strict=True):
            if self.seq == 0 or stream in added:
                self._losses.begin(event_type, infos[stream], cursors[stream])
        symbols = [symbol.decode() for symbol in reply[5]]
        self._stored_symbols = set(symbols)
        return Start(
            epoch=self.epoch,
            seq=self.seq,
            gap=reply[3].decode(),
            added=added,
            absent=[s for s, info in infos.items() if info is None and s != self.keys.replay],
            cells=await self._load_cells(symbols),
            counts=counts,
            policy=meta.get(b"policy", b"").decode(),
            frozen=meta.get(b"frozen", b"").decode(),
            unclean=reply[6] != b"",
            suspect=_suspect(meta),
        )

    async def _stream_infos(self) -> dict[str, StreamInfo | None]:
        """Return XINFO STREAM of every input; None where it is absent."""
        replies = await self._source.send(*_info_commands(self._at_source))
        infos = self._infos(self._at_source, replies)
        if self._at_sink:
            replies = await self._sink.send(*_info_commands(self._at_sink))
            infos |= self._infos(self._at_sink, replies)
        return infos

    def _infos(
        self, streams: Sequence[str], replies: Sequence[Any]
    ) -> dict[str, StreamInfo | None]:
        infos: dict[str, StreamInfo | None] = {}
        for stream, reply in zip(streams, replies, strict=True):
            if not isinstance(reply, RedisError):
                infos[stream] = StreamInfo.parse(reply)
            elif "no such key" in str(reply):
                infos[stream] = None
            else:
                link = self._source if stream in self._at_source else self._sink
                raise BusError(link.url, f"{stream}: {reply}") from reply
        return infos

    async def _load_cells(self, symbols: Sequence[str]) -> dict[str, dict[str, bytes]]:
        cells: dict[str, dict[str, bytes]] = {}
        for first in range(0, len(symbols), STATES):
            few = symbols[first : first + STATES]
            replies = await self._sink.send(
                *(("HGETALL", self.keys.state(symbol)) for symbol in few)
            )
            for symbol, reply in zip(few, replies, strict=True):
                if isinstance(reply, RedisError):
                    raise BusError(self._sink.url, reply) from reply
                cells[symbol] = {name.decode(): cell for name, cell in _pairs(reply).items()}
        return cells

    async def history(self, event_type: str, newest_id: str, count: int) -> list[Entry]:
        """Return up to `count` entries of an input up to and including an id, oldest first.

        In pages, so that no command holds Redis for long; Redis would look through a whole stream
        for what is before its first entry.
        """
        key = self.keys.stream(event_type)
        rows: list[Any] = []
        end, full = newest_id, newest_id != ORIGIN
        while full and len(rows) < count:
            size = min(PAGE, count - len(rows))
            page = await self._source.call("XREVRANGE", key, end, "-", "COUNT", size)
            rows += page
            full = len(page) == size
            end = f"({rows[-1][0].decode()}" if rows else ""
        return [_entry(key, event_type, row) for row in reversed(rows)]

    async def store_artifact(self, digest: str, source: bytes) -> None:
        """Keep the policy's bytes under our keys, so that recorder and audit find them."""
        key = self.keys.artifact(digest)
        if not await self._sink.call("EXISTS", key):
            await self._sink.call("SET", key, source)

    async def committed_artifact(self) -> bytes | None:
        """Return the bytes of the artifact in force; None where they are not kept, or damaged."""
        digest = await self._sink.call("HGET", self.keys.meta, "policy")
        if digest is None:
            return None
        source: bytes | None = await self._sink.call("GET", self.keys.artifact(digest.decode()))
        whole = source is not None and hashlib.sha256(source).hexdigest() == digest.decode()
        return source if whole else None

    # -- reading ----------------------------------------------------------------------------------

    async def read(self, count: int) -> Batch:
        """Return the entries after our cursors that are due, at most `count` of each stream.

        What is lost moves the cursors on in memory; the caller commits that with its ledger row.

        Raises:
            CheckFailed: entries were lost and `on_gap` is "fail".
        """
        # only who is behind can be overtaken by a producer's trimming, else a look now and then
        # finds what somebody trimmed
        check = self.behind or time.monotonic() - self._checked_at >= LOSS_CHECK_S
        asked = self._asked
        if asked is not None and asked[0] == (self.cursors, count):
            self._asked = None
            reply = await asked[1]
        else:
            await self._forget()
            reply = await self._ask(self.cursors, count, check=check)
        killed = False
        if self._kill_switch is not None:  # what is no string is not a clear "off" either
            killed = isinstance(reply.switch, RedisError) or engaged(reply.switch)
        self._time_ms = int(reply.time[0]) * 1000 + int(reply.time[1]) / 1000
        self._time_at = reply.at
        streams = reply.streams
        if isinstance(streams, RedisError):
            raise BusError(self._source.url, streams) from streams
        known = self._infos(self._at_source, reply.infos) if reply.infos else {}
        if self._at_sink and self._time_at - self._sink_at >= SINK_LOOK_S:
            replays, replay_infos = await self._read_sink(count)
            streams = [*(streams or ()), *replays]
            known |= replay_infos
        found = [
            (self._ranks[key], self.streams[self._ranks[key]], self.inputs[self._ranks[key]], rows)
            for key, rows in streams or ()
        ]
        self.behind = any(len(rows) >= count for _, _, _, rows in found)
        lost = self._lost(known) if known else {}
        if self._on_gap == "resume-latest":
            found = [item for item in found if item[2] not in lost]
        released, held, ahead = release(found, int(self._time_ms), count)
        self._held = held is not None
        oldest = min(
            [entry.id_ms for entry in released[:1]] + ([held] if held is not None else []),
            default=self._time_ms,
        )
        return Batch(released, max(0.0, self._time_ms - oldest), ahead, lost, killed)

    def ask(self, entries: Sequence[Entry], count: int) -> None:
        """Send the next reading now: what follows these entries, all of the last reading.

        `read` takes the answer if by then they are committed, and reads anew if not.
        """
        assert self._asked is None, "expected the answer to the last one to be read first"
        cursors = self.cursors | {entry.stream: entry.entry_id for entry in entries}
        task = asyncio.create_task(self._ask(cursors, count, check=True))
        self._asked = (cursors, count), task

    async def _ask(self, cursors: Mapping[str, str], count: int, *, check: bool) -> _Reply:
        replies = await self._source.transaction(
            ("TIME",),
            ("XREAD", "COUNT", count, "STREAMS", *self._at_source,
             *(cursors[stream] for stream in self._at_source)),
            *(_info_commands(self._at_source) if check else ()),
            *((("GET", self._kill_switch),) if self._kill_switch is not None else ()),
        )  # fmt: skip
        at = time.monotonic()
        switch = replies.pop() if self._kill_switch is not None else None
        return _Reply(replies[0], replies[1], replies[2:], switch, at)

    async def _forget(self) -> None:
        """Give up a reading that was sent ahead; its answer must not be taken for another one's."""
        asked, self._asked = self._asked, None
        if asked is not None:
            asked[1].cancel()
            await self._source.close()  # redis-py can lose a cancellation that meets a reply
            await asyncio.gather(asked[1], return_exceptions=True)  # nobody wants to know any more

    async def _read_sink(self, count: int) -> tuple[list[Any], dict[str, StreamInfo | None]]:
        """Read what has to wait for us at the sink: replays, when that is another server."""
        reply, *infos = await self._sink.transaction(
            ("XREAD", "COUNT", count, "STREAMS", *self._at_sink,
             *(self.cursors[stream] for stream in self._at_sink)),
            *_info_commands(self._at_sink),
        )  # fmt: skip
        if isinstance(reply, RedisError):
            raise BusError(self._sink.url, reply) from reply
        self._sink_at = time.monotonic() if not reply else -math.inf
        return reply or [], self._infos(self._at_sink, infos)

    def _lost(self, infos: Mapping[str, StreamInfo | None]) -> dict[str, Loss]:
        """Compare our counts with the server's; all that was read before is committed by now."""
        self._checked_at = time.monotonic()
        latest = self._on_gap == "resume-latest"
        found = {}
        for event_type, stream in zip(self.inputs, self.streams, strict=True):
            if stream not in infos:
                continue
            info, cursor = infos[stream], self.cursors[stream]
            anew = info is not None and info.began_anew(cursor, self._time_ms)
            missed = None if anew else self._losses.check(event_type, info, cursor)
            if missed == 0 or info is None:
                continue
            if self._on_gap == "fail":
                count = "some" if missed is None else missed
                what = (
                    "it began anew below that id"
                    if anew
                    else f"{count} entries were trimmed before they were read"
                )
                raise CheckFailed(
                    f"expected {stream} to hold what follows {cursor}, found that {what}; choose "
                    "--on-gap resume-oldest or resume-latest"
                )
            upto = info.resumed(cursor, latest=latest)
            skipped = self._losses.check(event_type, info, upto) if latest or anew else 0
            entries = None if missed is None or skipped is None else missed + skipped
            found[event_type] = Loss(entries, cursor, upto)
            self.cursors[stream] = upto
        return found

    async def wait(self) -> None:
        """Return when there may be something to read, within a second; costs nothing while idle."""
        if self._held:
            await asyncio.sleep(HELD_SLEEP_S)
            return
        await self._source.call(
            "XREAD", "COUNT", 1, "BLOCK", BLOCK_MS, "STREAMS", *self._at_source,
            *(self.cursors[stream] for stream in self._at_source),
        )  # fmt: skip

    @property
    def counted(self) -> list[str]:
        """Event types of which the server counts what it was given, and so we what we lost."""
        source, sink = self.servers[0], self.servers[-1]
        return [
            event_type
            for event_type, stream in zip(self.inputs, self.streams, strict=True)
            if (source if stream in self._at_source else sink).counts
        ]

    def lost_total(self) -> dict[str, int]:
        """Return event type -> entries trimmed before we read them, since the first start."""
        return self._losses.totals()

    def server_ms(self) -> float:
        """Return the source's TIME now, in milliseconds, carried on from the last read."""
        return self._time_ms + (time.monotonic() - self._time_at) * 1000

    # -- writing ----------------------------------------------------------------------------------

    async def commit(
        self,
        commit: Commit,
        *,
        meta: Mapping[str, str] | None = None,
        forget: Sequence[str] = (),
    ) -> str:
        """Write a commit exactly once, however often it is called after a `BusError`.

        Args:
            commit: what the pipeline folded.
            meta: fields of the meta hash (policy digest, run id) to keep with it.
            forget: symbols whose stored state is damaged and must go before anything new is kept.
        Returns:
            "OK", or "DUP" when an earlier call had been applied and only its reply was lost.
        Raises:
            Fenced: another worker owns the state.
            StateLost: our meta hash is gone, or an older one.
        """
        cursors = self.cursors | commit.cursors
        stored = _dump_cursors(cursors, self.seq + 1)
        fields = {**(meta or {}), **self._losses.fields()}
        fresh = {name: value for name, value in fields.items() if self._written.get(name) != value}
        keys, args = self._script_arguments(commit, fresh, forget)
        now = datetime.now(UTC).replace(tzinfo=None).isoformat(timespec="microseconds")
        status, *details = await self._sink.script(
            _COMMIT, keys, (self.epoch, self._stored, stored, now, SOURCE, *args)
        )
        self._check_owner(status, details)
        self.cursors, self.seq, self._stored = cursors, self.seq + 1, stored
        self._written |= fresh
        self._stored_symbols.update(symbol for symbol, cells in commit.cells.items() if cells)
        self._losses.counts |= commit.counts
        return str(status, "ascii")

    def _script_arguments(
        self, commit: Commit, meta: Mapping[str, str], forget: Sequence[str]
    ) -> tuple[list[str], list[bytes]]:
        """Lay out keys, body and payloads as `commit.lua` takes them."""
        keys = [self.keys.meta, self.keys.symbols]

        def place(key: str) -> int:
            keys.append(key)
            return len(keys)

        places: dict[str, int] = {}
        envelopes: list[str] = []
        payloads = []
        for event_type, payload, trace_id, correlation_id in commit.outputs:
            if event_type not in places:
                # a name that is not ours has no key: nothing else can ever be appended to
                places[event_type] = place(self._outputs[event_type])
            envelopes += (event_type, trace_id, correlation_id)
            payloads.append(_in_msgpack(event_type, payload) if self._as_msgpack else payload)
        prefix = self.keys.state("")
        states: list[Any] = []
        added: list[Any] = []
        for symbol, cells in commit.cells.items():
            if cells:
                at = place(prefix + symbol)
                states += (at, 2 * len(cells))
                for cell in cells.items():
                    states += cell
                if symbol not in self._stored_symbols:
                    added += (at, symbol)
        fields = list(chain.from_iterable(meta.items()))
        for (event_type, outcome), count in commit.counts.items():
            fields += (f"n:{event_type}:{outcome}", str(count))
        forgotten = [place(prefix + symbol) for symbol in forget]
        body = _pack((places, envelopes, forgotten, added, states, fields))
        return keys, [body, *payloads]

    async def suspect(self, place: str, tries: int) -> None:
        """Note what is in hand alone, and how often it was: should we die, it may be the cause.

        Written only while a worker starts after one that did not stop in order.

        Raises:
            Fenced: another worker owns the state; its note stays.
            StateLost: our meta hash is gone, or an older one.
        """
        note = json.dumps({"place": place, "tries": tries})
        status, *details = await self._sink.script(_SUSPECT, (self.keys.meta,), (self.epoch, note))
        self._check_owner(status, details)

    async def beat(self) -> None:
        """Renew the liveness key of production's convention.

        It says that a worker lives, not which: a fenced one may renew it until its next commit.
        """
        await self._sink.call("SETEX", self.keys.heartbeat, HEARTBEAT_TTL_S, repr(time.time()))

    async def publish(self, body: bytes) -> None:
        """Show a status, unless another worker owns the epoch; may run beside everything else."""
        keys = (self.keys.meta, self.keys.status)
        async with self._side_lock:
            await self._side.script(_PUBLISH, keys, (self.epoch, body))

    async def note_fenced(self) -> None:
        """Count in meta that a worker was fenced, for the one that goes on to show."""
        await self._sink.call("HINCRBY", self.keys.meta, "fenced", 1)

    async def trim(self) -> int:
        """Keep our streams bounded; returns how many uncollected entries that dropped.

        Raises:
            Fenced: another worker owns the state.
            StateLost: our meta hash is gone, or an older one.
        """
        keys = [self.keys.meta, self.keys.collected]
        args: list[Any] = [self.epoch, TRIM_LIMIT, self._stored]
        for name, (key, keep, cap) in self._caps.items():
            keys.append(key)
            args += (name, keep, cap)
        status, *details = await self._sink.script(_TRIM, keys, args)
        self._check_owner(status, details)
        return int(details[0])

    def _check_owner(self, status: bytes, details: Sequence[bytes]) -> None:
        if status == b"FENCED":
            owner, epoch = (value.decode() for value in details)
            raise Fenced(
                f"another worker took over: expected to own epoch {self.epoch} in "
                f"{self._sink.url}, found epoch {epoch} owned by {owner or 'nobody'}"
            )
        if status == b"BACK":
            raise StateLost(
                f"{self._sink.url} went back to an earlier state: expected to own epoch "
                f"{self.epoch}, found epoch {details[0].decode()}"
            )
        if status == b"CONFLICT":
            found = details[0].decode()
            if json.loads(found)["seq"] < self.seq:
                raise StateLost(
                    f"{self._sink.url} forgot commits that it had applied: expected number "
                    f"{self.seq}, found {found}"
                )
            raise Fenced(
                f"another worker wrote in our epoch {self.epoch} in {self._sink.url}: expected "
                f"cursors {self._stored}, found {found}"
            )
        if status == b"LOST":
            raise StateLost(f"{self.keys.meta} is gone from {self._sink.url}")

    async def drop(self) -> None:
        """Close the connections of the path; the next command opens new ones."""
        await self._forget()
        await self._source.close()
        await self._sink.close()

    async def close(self) -> None:
        """Close all connections."""
        await self.drop()
        await self._side.close()


def release(
    found: Sequence[tuple[int, str, str, Sequence[Any]]], time_ms: int, count: int
) -> tuple[list[Entry], int | None, int]:
    """Choose and order the entries that no later reading can precede.

    Args:
        found: per stream that has entries: rank, key, event type, rows `[id, [field, value, …]]`.
        time_ms: the server's TIME, taken before the streams were read, in one transaction.
        count: the COUNT of the reading; a stream with that many rows may have more.
    Returns:
        released entries in (id, rank) order; the oldest held id in ms, or None; how many of the
        released ones are more than 1 s ahead of TIME (released as read: they would stall the rest).
    """
    lasts = [parse_id(rows[-1][0].decode()) for _, _, _, rows in found]
    cut = [last for last, (_, _, _, rows) in zip(lasts, found, strict=True) if len(rows) >= count]
    limit = min(cut, default=None)
    due: list[list[Entry]] = []
    ranks: dict[str, int] = {}
    held: int | None = None
    ahead = 0
    for last, (rank, key, event_type, rows) in zip(lasts, found, strict=True):
        ranks[key] = rank
        entries = [_entry(key, event_type, row) for row in rows]
        if last[0] >= time_ms or (limit is not None and last > limit):  # not all of them are due
            for i, entry in enumerate(entries):
                at = parse_id(entry.entry_id)
                if at[0] > time_ms + AHEAD_MS:
                    ahead += 1
                elif at[0] >= time_ms or (limit is not None and at > limit):
                    held = at[0] if held is None else min(held, at[0])
                    del entries[i:]
                    break
        due.append(entries)
    return _merged(due, ranks), held, ahead


def _merged(parts: list[list[Entry]], ranks: Mapping[str, int]) -> list[Entry]:
    """Merge lists that are in order each; most entries are ticks, and few others look around.

    Args:
        ranks: stream -> rank, for entries of the same id.
    """

    def order(entry: Entry) -> tuple[StreamId, int]:
        return parse_id(entry.entry_id), ranks[entry.stream]

    parts.sort(key=len)
    merged = parts.pop() if parts else []
    if FEW * sum(map(len, parts)) > len(merged):
        return sorted(chain(merged, *parts), key=order)
    for part in parts:
        at = 0
        for entry in part:
            at = bisect(merged, order(entry), at, key=order)
            merged.insert(at, entry)
    return merged


def _entry(key: str, event_type: str, row: Any) -> Entry:
    entry_id, flat = row
    if len(flat) == ENVELOPE:  # a display is made at its size, which is three times as quick
        n1, v1, n2, v2, n3, v3, n4, v4, n5, v5, n6, v6 = flat
        fields = {n1: v1, n2: v2, n3: v3, n4: v4, n5: v5, n6: v6}
    else:
        fields = dict(zip(flat[::2], flat[1::2], strict=True))
    return Entry(key, event_type, entry_id.decode(), fields)


def _pairs(flat: Sequence[Any]) -> dict[Any, Any]:
    """Return a flat reply of names and values as a dictionary."""
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _info_commands(streams: Iterable[str]) -> list[tuple[str, ...]]:
    return [("XINFO", "STREAM", stream) for stream in streams]


def _suspect(meta: Mapping[bytes, bytes]) -> tuple[str, int]:
    note = json.loads(meta.get(b"suspect", b"{}"))
    return note.get("place", ""), note.get("tries", 0)


def _counts(meta: Mapping[bytes, bytes]) -> dict[tuple[str, str], int]:
    counts: dict[tuple[str, str], int] = {}
    for name, value in meta.items():
        kind, _, rest = name.decode().partition(":")
        if kind == "n":
            event_type, _, outcome = rest.rpartition(":")
            counts[event_type, outcome] = int(value)
    return counts


def _dump_cursors(cursors: Mapping[str, str], seq: int) -> str:
    """Return the cursors field: one canonical text, compared as such by the script."""
    return _canonical({**cursors, "seq": seq}).decode()


_canonical = msgspec.json.Encoder(order="sorted").encode

# text and bytes alike as raw strings, which is what the server's Lua reads
_pack = msgpack.Packer(use_bin_type=False).pack


def _in_msgpack(event_type: str, payload: bytes) -> bytes:
    """Return a payload in msgpack, unless it is already or is a dead letter's."""
    if payload[:1] != b"{" or event_type.startswith("dlq:"):
        return payload  # operators read dead letters with redis-cli
    return msgspec.msgpack.encode(msgspec.json.decode(payload))


def _accept(url: str, hello: Sequence[Any]) -> Server:
    """Check the kind and the version of a server."""
    facts = _pairs(hello)
    mode, text = facts[b"mode"].decode(), facts[b"version"].decode()
    if mode == "cluster":
        raise RedisUnavailable(
            f"expected a standalone Redis at {url}, found Redis Cluster: one commit writes keys of "
            "several slots, which a cluster refuses"
        )
    if mode != "standalone":
        raise RedisUnavailable(f"expected a standalone Redis at {url}, found a {mode}")
    version = tuple(int(part) for part in text.split(".")[:3])
    if version < MIN_VERSION:
        raise RedisUnavailable(f"expected Redis >= 6.2 at {url}, found {text}")
    return Server(url, version)


def _refusal(error: BusError) -> RedisUnavailable:
    """Say in one sentence what was expected of Redis at start and what it answered."""
    cause = error.__cause__
    text = error.said.rstrip(".")
    if isinstance(cause, AuthenticationError) or text.startswith(("NOAUTH", "WRONGPASS")):
        expected = "to accept our user and password"
    elif "NOPERM" in text or "no permission" in text.lower() or "can't" in text:
        expected = "to permit what the worker does (see the shipped ACL)"
    elif isinstance(cause, ResponseError):
        expected = "to serve the worker"
    else:
        expected = "to answer"
    return RedisUnavailable(f"expected Redis at {error.url} {expected}, found: {text}")
