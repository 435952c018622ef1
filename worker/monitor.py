"""What is known of worker, collector and verdict at this moment? Read from Redis once a second.

However many clients ask the HTTP process, Redis sees one small read a second from it, and the
worker sees nothing at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgspec
import redis.exceptions
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from rlv3.errors import PolicyError
from rlv3.policy import Policy, shipped_policy
from worker.address import open_client, quiet, shown
from worker.keys import Keys
from worker.logs import Log
from worker.status import EDGES_S, FORMAT, STALE_S, Histogram, Status, decode

LOOK_S = 1.0
TIMEOUT_S = 2.0
RECENT = 50
"""Newest decisions that are shown."""
RATE_S = 10.0
"""Rates are over this time."""
LATENCY_S = 60.0
"""Quantiles of latencies are over this time."""
SILENT_S = 900.0
"""Without a decision for this long, RL v2 is called silent."""
_AWAY = (redis.exceptions.RedisError, OSError)


class RecentDecision(msgspec.Struct, frozen=True):
    """A decision as a dashboard lists it: some fields of `rl_v3.decision`."""

    timestamp: str
    symbol: str
    action: int
    action_name: str
    kind: str
    confidence: float
    value: float
    trace_id: str
    decision_id: str
    target_position: float
    warm: bool
    shadow_mode: bool


_FROM_JSON = msgspec.json.Decoder(RecentDecision).decode
_FROM_MSGPACK = msgspec.msgpack.Decoder(RecentDecision).decode


class View(NamedTuple):
    """Everything that is shown, as of one look."""

    redis: str = "not asked yet"
    """Why Redis does not serve us; empty when it does."""
    status: Status | None = None
    """What the worker last showed; stays when it goes."""
    status_error: str = ""
    """Why there is no status, where there is something that cannot be read."""
    age_s: float | None = None
    """Of the status, by Redis's clock."""
    fenced: int = 0
    """Workers that were fenced, ever."""
    collector_lag_s: Mapping[str, float] = {}
    """Our stream -> how far the durable position is behind its end."""
    verdict: Mapping[str, Any] | None = None
    """The collector's verdict; None where it keeps none."""
    recent: tuple[RecentDecision, ...] = ()
    """Newest first."""
    rates: Mapping[str, float] = {}
    """ticks, events and decisions per second."""
    latency_ms: Mapping[str, float] = {}
    """p50 and p99 from an entry's id to its commit."""

    @property
    def up(self) -> bool:
        """Whether a worker showed itself lately."""
        fresh = self.age_s is not None and self.age_s <= STALE_S
        return not self.redis and fresh and self.status is not None and self.state != "stopped"

    @property
    def state(self) -> str:
        """ready, behind, stalled or stopped as shown; `gone` without a fresh status."""
        if self.status is None:
            return "gone"
        if self.status.state == "stopped":
            return "stopped"
        return self.status.state if self.age_s is not None and self.age_s <= STALE_S else "gone"

    @property
    def reason(self) -> str:
        """Why the worker is not ready, as one sentence; empty when it is."""
        status, age = self.status, self.age_s
        if self.redis:
            return f"Redis does not answer: {self.redis}"
        if self.status_error:
            return self.status_error
        if status is None or age is None:
            return "no worker has shown itself yet"
        match self.state:
            case "stopped":
                return f"the worker was stopped {age:.0f} s ago"
            case "gone":
                return f"the worker has not shown itself for {age:.0f} s"
            case "stalled":
                trouble = status.trouble or "the step does not end"
                return (
                    f"no progress for {status.progress_age_s + age:.0f} s in step {status.step}: "
                    f"{trouble}"
                )
            case "behind":
                return f"the worker is {status.lag_s:.0f} s behind its streams"
        return ""

    @property
    def silence_s(self) -> float | None:
        """Seconds since RL v2's last decision, or since the worker's start; None without v2."""
        status = self.status
        if status is None or status.rl_v2 == "off":
            return None
        return max(0.0, time.time() - max([status.started_s, *status.v2_heard.values()]))


class Monitor:
    """Keeps the newest `View`, and the policy that predicts.

    Attributes:
        view: as of the last look.
        policy: the artifact in force, or the one that was named; the shipped one until known.
        looks: how many were taken.
    """

    def __init__(self, url: str, keys: Keys, pinned: Path | None, log: Log) -> None:
        self.view = View()
        self.policy = Policy.load(pinned or shipped_policy())
        self.looks = 0
        self._pinned = pinned is not None
        self._refused = ""
        self._keys = keys
        self._log = log
        self._place = shown(url)
        self._link = open_client(
            url,
            protocol=2,
            socket_timeout=TIMEOUT_S,
            socket_connect_timeout=TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
            **quiet(),
        )
        self._history: deque[tuple[float, Status]] = deque()

    async def run(self) -> None:
        """Look every second, for ever."""
        while True:
            begun = time.monotonic()
            await self.look()
            await asyncio.sleep(max(0.0, LOOK_S - (time.monotonic() - begun)))

    def note_end(self, looking: asyncio.Task[None]) -> None:
        """Say that `run` ended by an error, which is a defect of ours: the view is an old one."""
        if not looking.cancelled() and (error := looking.exception()) is not None:
            self.view = self.view._replace(redis=f"nobody looks any more: {error!r}")
            self.looks += 1
            self._log.error("TASK_FAILED", msg=f"{looking.get_coro()}: {error!r}")

    async def close(self) -> None:
        """Drop the connection."""
        await self._link.aclose()

    async def look(self) -> None:
        """Read everything once; what Redis does not tell stays as it was."""
        before = self.view
        try:
            self.view = await self._read()
            if self.view.up and self.view.status is not None:
                await self._follow(self.view.status.policy.digest)
        except _AWAY as error:
            self.view = before._replace(redis=f"{self._place}: {error}", rates={}, latency_ms={})
        self.looks += 1
        if bool(before.redis) != bool(self.view.redis):
            if self.view.redis:
                self._log.warning("REDIS_LOST", msg=f"trying again for ever: {self.view.redis}")
            else:
                event = "REDIS_CONNECTED" if self.looks == 1 else "REDIS_RETURNED"
                self._log.info(event, msg=f"reads from {self._place}")

    async def _read(self) -> View:
        keys = self._keys
        ours = (keys.decisions, keys.comparisons)
        async with self._link.pipeline(transaction=False) as pipe:
            pipe.time()
            pipe.hmget(keys.status, "at_ms", "body")
            pipe.hget(keys.meta, "fenced")
            pipe.hmget(keys.collected, *ours)
            for stream, count in zip(ours, (RECENT, 1), strict=True):
                pipe.xrevrange(stream, count=count)
                pipe.xrange(stream, count=1)
            pipe.get(keys.verdict)
            (
                (seconds, micros),
                (at_ms, body),
                fenced,
                collected,
                *ends,
                verdict,
            ) = await pipe.execute()
        now_ms = int(seconds) * 1_000 + int(micros) / 1_000
        status, error = _status(body)
        age_s = None if at_ms is None else max(0.0, (now_ms - float(at_ms)) / 1_000)
        if status is not None and at_ms is not None:
            self._remember(float(at_ms), status)
        return View(
            redis="",
            status=status,
            status_error=error,
            age_s=age_s,
            fenced=int(fenced or 0),
            collector_lag_s={
                stream: _behind_s(durable, last, first)
                for stream, durable, last, first in zip(
                    ours, collected, ends[::2], ends[1::2], strict=True
                )
            },
            verdict=_verdict(verdict),
            recent=tuple(_decisions(ends[0])),
            rates=self._rates(),
            latency_ms=self._latency(),
        )

    # -- over time --------------------------------------------------------------------------------

    def _remember(self, at_ms: float, status: Status) -> None:
        history = self._history
        if history:
            last_ms, last = history[-1]
            if last.started_s != status.started_s or at_ms < last_ms:
                history.clear()  # another process counts anew; a clock that was set back as well
        if not history or history[-1][0] != at_ms:
            history.append((at_ms, status))
        while history[0][0] < at_ms - LATENCY_S * 1_000:
            history.popleft()

    def _rates(self) -> dict[str, float]:
        found = self._since(RATE_S)
        if found is None:
            return {}
        seconds, then, now = found
        return {
            "ticks": (_read_of(now, "market.tick") - _read_of(then, "market.tick")) / seconds,
            "events": (_read_of(now) - _read_of(then)) / seconds,
            "decisions": (now.decisions - then.decisions) / seconds,
        }

    def _latency(self) -> dict[str, float]:
        found = self._since(LATENCY_S)
        if found is None:
            return {}
        _, then, now = found
        counts = [
            b - a
            for a, b in zip(then.latency["total"].counts, now.latency["total"].counts, strict=True)
        ]
        if not sum(counts):
            return {}
        return {f"p{q * 100:.0f}": 1_000 * quantile(counts, q) for q in (0.50, 0.99)}

    def _since(self, seconds: float) -> tuple[float, Status, Status] | None:
        if len(self._history) < 2:
            return None
        last_ms, now = self._history[-1]
        first_ms, then = next(
            (at_ms, status) for at_ms, status in self._history if at_ms >= last_ms - seconds * 1_000
        )
        return ((last_ms - first_ms) / 1_000, then, now) if last_ms > first_ms else None

    # -- who predicts -----------------------------------------------------------------------------

    async def _follow(self, digest: str) -> None:
        """Predict with the artifact that the worker has in force."""
        if self._pinned or digest in (self.policy.digest, self._refused):
            return
        source = cast("bytes | None", await self._link.get(self._keys.artifact(digest)))
        try:
            if source is None or hashlib.sha256(source).hexdigest() != digest:
                raise PolicyError(f"expected the artifact {digest} under our keys, found another")
            self.policy = await asyncio.to_thread(Policy, source, "the artifact in force")
        except PolicyError as error:
            self._refused = digest
            self._log.error("POLICY_REFUSED", msg=f"{error}; predictions stay with the former one")
        else:
            self._log.info("POLICY_FOLLOWED", msg="predicts as the worker does", policy=digest)


def quantile(counts: Sequence[int], q: float) -> float:
    """Return a quantile in seconds from the buckets of `EDGES_S`, linear inside a bucket."""
    wanted, low = q * sum(counts), 0.0
    for edge, count in zip(EDGES_S, counts, strict=False):
        if count and wanted <= count:
            return low + (edge - low) * wanted / count
        wanted -= count
        low = edge
    return EDGES_S[-1]


def total(histogram: Histogram) -> int:
    """Return how many values a histogram counted."""
    return sum(histogram.counts)


def _read_of(status: Status, event_type: str | None = None) -> int:
    chosen = status.events if event_type is None else {event_type: status.events.get(event_type)}
    return sum(sum(outcomes.values()) for outcomes in chosen.values() if outcomes)


def _status(body: bytes | None) -> tuple[Status | None, str]:
    if body is None:
        return None, ""
    try:
        status = decode(body)
    except msgspec.DecodeError as error:
        return None, f"expected a worker's status of format {FORMAT}, found another: {error}"
    if status.format != FORMAT:
        return None, f"expected a worker's status of format {FORMAT}, found {status.format}"
    return status, ""


def _decisions(entries: Sequence[tuple[bytes, Mapping[bytes, bytes]]]) -> Iterator[RecentDecision]:
    """Yield the decisions among the entries; what others append to the stream is passed over."""
    for _, fields in entries:
        payload = fields.get(b"payload", b"")
        with contextlib.suppress(msgspec.DecodeError):
            yield _FROM_JSON(payload) if payload.startswith(b"{") else _FROM_MSGPACK(payload)


def _verdict(body: bytes | None) -> Mapping[str, Any] | None:
    if body is None:
        return None
    try:
        found = msgspec.json.decode(body, type=dict[str, Any])
    except msgspec.DecodeError:
        return None
    return found if found.get("registration") else None


def _behind_s(durable: bytes | None, last: list[Any], first: list[Any]) -> float:
    """Return how much stream time is not durable yet: from the position to the newest entry."""
    if not last or durable == last[0][0]:
        return 0.0
    begin = first[0][0] if durable is None else max(durable, first[0][0], key=_id_ms)
    return max(0.0, (_id_ms(last[0][0]) - _id_ms(begin)) / 1_000)


def _id_ms(entry_id: bytes) -> int:
    return int(entry_id.partition(b"-")[0])
