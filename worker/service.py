"""How does the daemon live: start where the last one stopped, fold what arrives, drain, stop?

One loop, no queues between its steps:

    read -> pipeline.run -> commit        (until the entries read are folded)
    tend                                  (heartbeat, trimming: every few seconds)
    wait                                  (only when there was nothing to read)

While Redis applies a commit, the next one is folded; it is sent when the one before it is applied.
So the pipeline's memory is ahead of Redis by at most the commit on its way and the one in hand.
When Redis goes away that very commit is repeated until it is applied, so memory and Redis never
disagree. Whoever is behind asks for the next reading while the last commits of one are folded; the
answer is looked at when all of them are applied.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

from rlv3.errors import PolicyError
from rlv3.policy import Policy
from shadow.codec import envelope_ids
from shadow.pipeline import Pipeline, Settings
from shadow.records import (
    COMPARISONS,
    DECISIONS,
    Commit,
    Entry,
    decode_comparison,
    encode,
    encode_msgpack,
)
from shadow.risk import REASONS
from shadow.rl_v2 import QTables
from shadow.symbol import StateError
from worker.address import AWAY, connected, refused, shown
from worker.artifact import LOOK_S, ArtifactWatch, policy_at_start
from worker.bus import Batch, Bus, BusError, Start, StateLost
from worker.config import WorkerConfig
from worker.errors import CheckFailed, Fenced, RedisUnavailable
from worker.keys import Keys
from worker.logs import DeadLetterLines, Log, log_comparison
from worker.meter import Meter, rss_bytes
from worker.permission import harm
from worker.progress import Progress, Watchdog
from worker.spans import Applied, Interval, Spans, otlp, traced
from worker.status import FORMAT, PUBLISH_S, PolicyInfo, Status
from worker.status import encode as encode_status

READ_COUNT = 512
"""Entries asked of each stream at a time: below a millisecond of Redis; conflation sees as many."""
HISTORY = 10_000
"""Entries of klines, then of ticks, that warm up a first start: all that production retains."""
PART_BYTES = 32_768
"""Of a warm-up's cells in a commit, about: new symbols take Redis longer than known ones."""
BEAT_S = 3.0
TRIM_S = 1.0
TRIM_OUTPUTS = 1_500
"""Below what one call may trim, so that the streams stay bounded at any rate."""
HEARTBEAT_LINE_S = 60.0
BACKOFF_S = (0.05, 2.0)
"""First and longest pause while Redis is away."""
AWAY_LINE_S = 60.0
LATENCY_SAMPLES = 4_096
LATENCY_EVERY = 8
"""One in so many entries of a commit is a sample, its first always."""
TRIES = 2
"""An entry that was alone in hand so often when a worker died is not folded any more."""
ALONE = 128
"""At least so many entries are folded one at a time then: a commit on its way and one in hand."""
WARM_UP = "warm-up"
_NOTED_KINDS = tuple(
    f'{{"kind":"{kind}"'.encode() for kind in ("pair", "unpaired", "outcome", "bar", "decision")
)

T = TypeVar("T")


class _Stopped(Exception):
    """Asked to stop while Redis was away."""


def settings_of(config: WorkerConfig) -> Settings:
    """Return what the pipeline freezes for a run."""
    return Settings(
        latency_ms=config.latency_ms,
        rl_v2=config.rl_v2,
        tick_sources=config.tick_sources,
        max_event_age_s=config.max_event_age,
        max_events=config.max_batch,
        risk=config.risk_limits,
    )


async def run(config: WorkerConfig, log: Log) -> None:
    """Serve until SIGTERM or SIGINT; SIGHUP looks at the artifact at once.

    Raises:
        UserError: with the exit code of the design; one sentence.
    """
    tables = QTables.load(config.rl_v2_tables) if config.rl_v2 == "reference" else None
    spans = Spans(otlp(), log) if config.otel else None
    bus = Bus(
        config.source_url,
        config.sink_url,
        Keys(config.prefix),
        config.inputs,
        codec=config.codec,
        decisions_cap=config.decisions_cap,
        comparisons_cap=config.comparisons_cap,
        dlq_cap=config.dlq_cap,
        kill_switch=None if config.risk_limits is None else config.risk_limits.kill_switch,
    )
    try:
        policy = await policy_at_start(config, bus, log)
        worker = Worker(config, bus, policy, tables, log, spans)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, worker.stop)
        loop.add_signal_handler(signal.SIGHUP, worker.reload)
        await worker.run()
    finally:
        await bus.close()
        if spans is not None:
            await asyncio.to_thread(spans.close)


class Worker:
    """One process: its pipeline, its bus and its counters."""

    def __init__(
        self,
        config: WorkerConfig,
        bus: Bus,
        policy: Policy,
        tables: QTables | None,
        log: Log,
        spans: Spans | None = None,
    ) -> None:
        self.config = config
        self.bus = bus
        self.policy = policy
        self.tables = tables
        self.log = log
        self.settings = settings_of(config)
        self.pipeline = self._new_pipeline()
        self._owner = f"pid {os.getpid()} on {socket.gethostname()}"
        self._stopping = asyncio.Event()
        self._hangup = asyncio.Event()
        self._ended = False
        self._artifact = ArtifactWatch(config, policy)
        self._next: Policy | None = None
        self.progress = Progress()
        self._alone = 0  # entries that are still folded one at a time
        self._suspect = ("", 0)
        self._superseded: frozenset[str] | None = None  # of the reading in hand, once we are behind
        self.meter = Meter(policy)
        self.spans = spans
        self._reading: Interval | None = None  # the last one, until a commit's span has it
        self._dead_letters = DeadLetterLines(log)
        self._ahead = 0
        self._dropped = 0
        self._latencies: deque[float] = deque(maxlen=LATENCY_SAMPLES)
        self._outputs_since_trim = 0
        self._trimmed_at = self._beat_at = -math.inf
        self._line_at = time.monotonic()
        self._meta = {
            "policy": policy.digest,
            "frozen": _frozen(self.settings, tables, config.inputs),
            "warming": "",
        }

    def stop(self) -> None:
        """Finish the commit in hand and return from `run`."""
        self._stopping.set()

    def reload(self) -> None:
        """Look at the artifact now, whether its file seems changed or not."""
        self._hangup.set()

    async def run(self) -> None:
        """Start, serve and drain; start again should Redis lose our state under us."""
        await self.bus.connect()
        for server in self.bus.servers:
            self.log.info(
                "REDIS_CONNECTED",
                msg=f"Redis {'.'.join(map(str, server.version))} at {server.url}",
                tier=server.tier,
            )
        await self._look_at_permissions()
        beside = [asyncio.create_task(work()) for work in (self._watch_artifact, self._publish)]
        for task in beside:
            task.add_done_callback(self._note_end)
        try:
            with Watchdog(self.progress, self.log):
                await self._serve_on()
        except _Stopped as error:
            raise RedisUnavailable(
                f"stopped while Redis was away ({error.__cause__}); what was not committed is "
                "folded again at the next start"
            ) from error
        except Fenced:
            with contextlib.suppress(BusError):  # it is logged and exits 3 in any case
                await self.bus.note_fenced()
            raise
        finally:
            self._ended = True
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)

    def _note_end(self, task: asyncio.Task[None]) -> None:
        """Say that a task beside the loop ended by an error, which is a defect of ours."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self.log.error("TASK_FAILED", msg=f"{task.get_coro()}: {error!r}")

    async def _look_at_permissions(self) -> None:
        """Say loudly when Redis would not stop us from trading.

        Raises:
            CheckFailed: it would not, and the configuration requires that it does.
        """
        for url in self.config.servers.values():
            try:
                async with connected(url) as link:
                    found = await harm(link, self.bus.keys)
            except AWAY as error:
                raise refused(url, "to say what its user may do", error) from error
            if not found.commands:
                continue
            if self.config.require_acl:
                raise CheckFailed(f"--require-acl: {found.sentence(shown(url))}")
            self.log.warning(
                "USER_COULD_TRADE",
                msg=f"{found.sentence(shown(url))}; the worker never does, but Redis would let it",
                commands=len(found.commands),
                found_by=found.way,
            )

    async def _serve_on(self) -> None:
        start = self._start
        while not self._stopping.is_set():
            try:
                await start()
                await self._serve()
            except StateLost as error:
                self.log.error("STATE_LOST", msg=f"{error}; starting again from what is there")
            start = self._start_again

    async def _serve(self) -> None:
        while not self._stopping.is_set():
            if self._next is not None:
                await self._swap(self._next)
            begun = time.perf_counter()
            batch = await self._persist(self._read, "read")
            self._reading = begun, time.perf_counter()
            self.progress.lag_ms = batch.lag_ms
            self._lose(batch)
            killed = batch.killed != self.pipeline.killed
            if killed:
                self._kill(batch.killed)
            if batch.entries:
                await self._fold(batch)
            elif batch.lost or killed:
                await self._persist(self._committing(self.pipeline.run([], now_ms=0.0)))
            else:
                await self._until_stopped(self._persist(self.bus.wait, "wait"))
            await self._tend()
        self._meta["owner"] = ""
        await self._persist(self._committing(self.pipeline.stop()))
        self._log_heartbeat()
        with contextlib.suppress(BusError):  # readers see its age
            await self.bus.publish(self._status("stopped"))
        self.log.info("WORKER_STOPPED", msg="drained", commits=self.bus.seq)

    def _read(self) -> Awaitable[Batch]:
        return self.bus.read(self._read_count)

    @property
    def _read_count(self) -> int:
        return 1 if self._alone else READ_COUNT

    # -- start ------------------------------------------------------------------------------------

    async def _start(self) -> None:
        """Continue from what the last owner committed; on a first start, begin a run."""
        config = self.config
        start = await self.bus.acquire(
            start=config.start,
            on_gap=config.on_gap,
            owner=self._owner,
        )
        self._log_start(start)
        self._alone = max(ALONE, 2 * config.max_batch) if start.unclean else 0
        self._suspect = start.suspect
        self.pipeline = self._new_pipeline()
        self.pipeline.counts.update(start.counts)
        damaged = self._restore(start)
        self.pipeline.count_losses(self.bus.counted)
        try:
            await self.bus.store_artifact(self.policy.digest, self.policy.source)
            first = await self._first_commit(start, damaged)
        except BusError as error:
            raise RedisUnavailable(f"expected Redis to serve the start, found: {error}") from error
        if first is not None:
            await self._persist(self._committing(first, damaged))
        self.log.info(
            "WORKER_STARTED",
            msg="continues" if start.frozen else "first start",
            epoch=start.epoch,
            run_id=self.pipeline.run_id,
            policy=self.policy.digest,
            symbols=len(self.pipeline.symbols),
            cursors=dict(self.bus.cursors),
        )

    async def _start_again(self) -> None:
        """Start while running: Redis may be away in the middle of it for as long as it likes."""

        async def attempt() -> None:
            try:
                await self._start()
            except RedisUnavailable as error:
                if isinstance(error.__cause__, BusError):
                    raise error.__cause__ from None
                raise

        await self._persist(attempt, "start")

    def _restore(self, start: Start) -> list[str]:
        """Load the stored cells; returns the symbols whose damaged state must go.

        All of it must: a cell that nothing writes over soon would be found at every start.
        """
        own = []
        try:
            damaged = self.pipeline.restore(start.cells)
        except StateError as error:
            self.log.error("STATE_DAMAGED", msg=f"the pipeline's own state: {error}")
            own = [""]
            self.pipeline = self._new_pipeline()
            self.pipeline.counts.update(start.counts)
            self.pipeline.lost.update(self.bus.lost_total())
            damaged = self.pipeline.restore({k: v for k, v in start.cells.items() if k})
        for symbol in damaged:
            self.log.error("STATE_DAMAGED", msg="restarts cold and flat", symbol=symbol)
        return own + damaged

    async def _first_commit(self, start: Start, damaged: Sequence[str]) -> Commit | None:
        """Return what must be committed before the first entry is read, if anything."""
        rules = _rules(self._meta["frozen"])
        if start.seq and start.policy not in ("", self.policy.digest):
            self.log.warning(
                "POLICY_CHANGED",
                msg="another artifact than the committed one decides from here on: a new run",
                committed=start.policy,
                policy=self.policy.digest,
            )
        elif start.frozen and _rules(start.frozen) != rules:
            self.log.warning("SETTINGS_CHANGED", msg="other settings than committed: a new run")
        elif start.frozen and self.pipeline.run_id:
            return self.pipeline.run([], now_ms=0.0) if start.added or damaged else None
        commit = self.pipeline.begin(self.bus.cursors)
        if not start.cells:
            meta = {"warming": "1"}  # until the run begins, with a commit of its own
            for part in _in_parts(await self._warm_up()):
                await self._persist(partial(self.bus.commit, part, meta=meta))
        return commit

    async def _warm_up(self) -> Commit:
        """Fold retained candles, then ticks, up to the cursors: outside all counts."""
        entries: list[Entry] = []
        if self._alone and not await self._may_try(WARM_UP):
            self.log.error(
                "WARM_UP_SKIPPED", msg="workers died of it; every symbol starts cold", deaths=TRIES
            )
            return self.pipeline.warm_up(entries)
        for event_type in ("market.klines", "market.tick"):
            if event_type in self.config.inputs:
                newest = self.bus.cursors[self.bus.keys.stream(event_type)]
                entries += await self.bus.history(event_type, newest, HISTORY)
        commit = self.pipeline.warm_up(entries)
        if self._alone:
            await self._survived(WARM_UP)
        return commit

    # -- another policy ---------------------------------------------------------------------------

    async def _watch_artifact(self) -> None:
        """Look at the artifact's file every second and at SIGHUP, beside the loop."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._hangup.wait(), LOOK_S)
            asked = self._hangup.is_set()
            self._hangup.clear()
            if not self._artifact.changed() and not asked:
                continue
            try:
                self._next = await asyncio.to_thread(self._artifact.load)
            except PolicyError as error:
                self.log.error(
                    "POLICY_REFUSED",
                    msg=f"{error}; the one in force stays",
                    policy=self.policy.digest,
                )
            else:
                if asked and self._next is None:
                    self.log.info(
                        "POLICY_UNCHANGED", msg="is in force already", policy=self.policy.digest
                    )

    async def _swap(self, policy: Policy) -> None:
        """Let another policy decide from the next entry on: a new run, committed like any event."""
        former, self._next = self.policy, None
        await self._persist(lambda: self.bus.store_artifact(policy.digest, policy.source))
        self.policy = self._artifact.policy = policy
        self._meta["policy"] = policy.digest
        self.meter.follow(policy)
        await self._persist(self._committing(self.pipeline.begin(self.bus.cursors, policy)))
        self.log.info(
            "POLICY_SWAPPED",
            msg="another artifact decides from here on: a new run",
            former=former.digest,
            policy=policy.digest,
            run_id=self.pipeline.run_id,
        )

    def _new_pipeline(self) -> Pipeline:
        encoder = encode_msgpack if self.config.codec == "msgpack" else encode
        return Pipeline(self.policy, self.tables, self.settings, self.config.inputs, encoder)

    # -- the loop's steps -------------------------------------------------------------------------

    async def _fold(self, batch: Batch) -> None:
        """Fold the entries of one reading, a commit at a time."""
        if batch.ahead:
            self._ahead += batch.ahead
            self.log.warning(
                "CLOCK_AHEAD",
                msg="entry ids more than 1 s ahead of Redis's clock, folded as read",
                entries=batch.ahead,
            )
        entries, due = batch.entries, len(batch.entries) - batch.ahead
        at, asked = 0, self._alone or not self.bus.behind
        self._superseded = None
        under_way: asyncio.Task[None] | None = None
        try:
            while at < len(entries) and not self._stopping.is_set():
                crashed = 0
                if self._alone:
                    if under_way is not None:
                        await under_way
                    crashed = await self._in_hand(entries[at])
                begun = time.perf_counter()
                commit = self._run(entries, at, due, crashed)
                folding = begun, time.perf_counter()
                self.meter.took("fold", folding[1] - begun)
                if under_way is not None:
                    await under_way
                if self._alone and not crashed:
                    self._alone -= 1
                    await self._survived(entries[at].place)
                taken = entries[at : at + commit.taken]
                under_way = asyncio.create_task(self._apply(commit, taken, folding))
                at += commit.taken
                if not asked and len(entries) - at <= 2 * self.settings.max_events:
                    asked = True  # Redis answers while the last commits are folded
                    self.bus.ask(entries, self._read_count)
                await asyncio.sleep(0)  # a round of the loop sends it
        finally:
            if under_way is not None:
                await under_way

    def _run(self, entries: Sequence[Entry], at: int, due: int, crashed: int) -> Commit:
        """Fold one commit's worth; a bug ends the worker, its memory is not to be trusted.

        Args:
            entries: of one reading.
            at: where the commit begins.
            due: how many of them come before those with ids in the future.
            crashed: see `Pipeline.run`.
        """
        hand = entries[at : at + (1 if self._alone else self.settings.max_events)]
        lag_ms = self.progress.lag_ms = max(0.0, self.bus.server_ms() - hand[0].id_ms)
        after = self.config.conflate_after
        behind = after is not None and lag_ms > after
        try:
            if behind and self._superseded is None:
                self._superseded = self.pipeline.superseded(entries[at:due] or entries[at:])
            return self.pipeline.run(
                hand,
                now_ms=time.time() * 1000,
                leave_out=(self._superseded or ()) if behind else (),
                ahead=max(0, at + len(hand) - max(due, at)),
                crashed=crashed,
            )
        except Exception:  # whatever it was: named once with its entry, then raised again
            trace_id, correlation_id = envelope_ids(hand[0])
            self.log.exception(
                "FOLD_FAILED",
                msg="a bug: the state in memory is not to be trusted any more, so the worker "
                "ends; after some restarts the entry becomes a dead letter",
                first=hand[0].place,
                correlation_id=correlation_id,
                trace_id=trace_id,
            )
            raise

    async def _apply(self, commit: Commit, taken: list[Entry], folding: Interval) -> None:
        begun = time.perf_counter()
        await self._persist(self._committing(commit))
        if self.spans is not None:
            self.spans.put(self._applied(commit, folding, (begun, time.perf_counter())))
        self._note(commit, taken)

    def _applied(self, commit: Commit, folding: Interval, committing: Interval) -> Applied:
        reading, self._reading = self._reading, None
        return Applied(
            reading, folding, committing, commit.taken, len(commit.outputs),
            self.pipeline.run_id, self.bus.seq, traced(commit.outputs),
        )  # fmt: skip

    async def _in_hand(self, entry: Entry) -> int:
        """Note the only entry in hand; returns how many workers it ended, or 0 to fold it.

        After a worker that did not stop in order, entries are folded one at a time until what it
        can have had in hand is behind us, so that one that ends the process is known by name.
        """
        if await self._may_try(entry.place):
            return 0
        trace_id, correlation_id = envelope_ids(entry)
        self.log.error(
            "ENTRY_QUARANTINED",
            msg="workers died with this entry in hand: it becomes a dead letter",
            correlation_id=correlation_id,
            trace_id=trace_id,
            stream=entry.event_type,
            entry_id=entry.entry_id,
            deaths=TRIES + 1,
        )
        return TRIES + 1

    async def _may_try(self, place: str) -> bool:
        """Note what is about to be tried; False when it was often enough the last thing."""
        tries = self._tries(place)
        if tries >= TRIES:
            return False
        await self._persist(lambda: self.bus.suspect(place, tries + 1), "suspect")
        return True

    async def _survived(self, place: str) -> None:
        """Take the note back: whoever dies while the commit waits for Redis does not die of it."""
        await self._persist(lambda: self.bus.suspect(place, self._tries(place)), "suspect")

    def _tries(self, place: str) -> int:
        return self._suspect[1] if self._suspect[0] == place else 0

    def _committing(
        self, commit: Commit, forget: Sequence[str] = ()
    ) -> Callable[[], Awaitable[str]]:
        meta = {**self._meta, "run_id": self.pipeline.run_id}
        return lambda: self.bus.commit(commit, meta=meta, forget=forget)

    def _note(self, commit: Commit, taken: list[Entry]) -> None:
        """Keep the figures of an applied commit, and log what it compared."""
        now_ms = self.bus.server_ms()
        waits_ms = [now_ms - entry.id_ms for entry in taken[::LATENCY_EVERY]]
        self._latencies.extend(waits_ms)
        self._outputs_since_trim += len(commit.outputs)
        self.meter.committed(waits_ms)
        for output in commit.outputs:
            if output.event_type == DECISIONS:
                continue
            if output.event_type != COMPARISONS:
                self._dead_letters.note(output, time.monotonic())
            elif output.payload.startswith(_NOTED_KINDS):
                row = decode_comparison(output.payload)
                self.meter.compared(row)
                log_comparison(self.log, row)

    async def _tend(self) -> None:
        """Trim our streams, renew the heartbeat key, write the minute's line: what is due."""
        now = time.monotonic()
        if now - self._trimmed_at >= TRIM_S or self._outputs_since_trim >= TRIM_OUTPUTS:
            self._trimmed_at, self._outputs_since_trim = now, 0
            dropped = await self._persist(self.bus.trim, "trim")
            if dropped:
                self._dropped += dropped
                self.log.warning(
                    "OUTPUT_DROPPED",
                    msg="the hard cap removed entries that no collector had stored",
                    entries=dropped,
                )
        if now - self._beat_at >= BEAT_S:  # after trimming, which finds out when our state is gone
            self._beat_at = now
            await self._persist(self.bus.beat, "beat")
        if now - self._line_at >= HEARTBEAT_LINE_S:
            self._line_at = now
            self._log_heartbeat()

    # -- trouble ----------------------------------------------------------------------------------

    async def _persist(self, attempt: Callable[[], Awaitable[T]], step: str = "commit") -> T:
        """Repeat one step until Redis does it: at loss, once a minute and at return it is logged.

        Raises:
            _Stopped: asked to stop while Redis is away.
        """
        pause = BACKOFF_S[0]
        begun = time.perf_counter()
        lost_at = said_at = None
        self.progress.begin(step)
        while True:
            try:
                result = await attempt()
            except BusError as error:
                now = time.monotonic()
                self.progress.trouble = str(error)
                lost_at = lost_at or now
                if said_at is None or now - said_at >= AWAY_LINE_S:
                    said_at = now
                    self.log.warning(
                        "REDIS_LOST",
                        msg=f"waiting for Redis: {error}",
                        away_s=round(now - lost_at, 1),
                    )
                if self._stopping.is_set():
                    raise _Stopped from error
                await self.bus.drop()  # the other connection is as dead: do not find out later
                await self._until_stopped(asyncio.sleep(pause))
                pause = min(2 * pause, BACKOFF_S[1])
            else:
                self.progress.done()
                self.meter.took(step, time.perf_counter() - begun)
                if lost_at is not None:
                    away_s = round(time.monotonic() - lost_at, 1)
                    self.log.info("REDIS_RETURNED", msg="goes on where it stopped", away_s=away_s)
                return result

    async def _until_stopped(self, work: Awaitable[object]) -> None:
        """Await something that may be abandoned when we are asked to stop."""
        task = asyncio.ensure_future(work)
        stop = asyncio.ensure_future(self._stopping.wait())
        await asyncio.wait((task, stop), return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))
        elif task.exception() is not None:
            await task

    # -- log lines --------------------------------------------------------------------------------

    def _log_start(self, start: Start) -> None:
        if start.gap:
            self.log.error(
                "STATE_GAP", msg=f"{start.gap}; continues as --on-gap {self.config.on_gap} says"
            )
        for stream in start.absent:
            self.log.warning(
                "STREAM_ABSENT", msg=f"{stream} does not exist; it is read when it appears"
            )

    def _lose(self, batch: Batch) -> None:
        """Take what was lost into the next commit, together with the cursors that jump."""
        for event_type, loss in batch.lost.items():
            stream = self.bus.keys.stream(event_type)
            self.pipeline.lose(
                event_type, loss.entries, stream=stream, after=loss.after, upto=loss.upto
            )
            self.log.error(
                "ENTRIES_LOST",
                msg="the stream was trimmed before we read it, or began anew",
                stream=event_type,
                entries=_counted(loss.entries),
                after=loss.after,
                goes_on_after=loss.upto,
            )

    # -- what is shown ----------------------------------------------------------------------------

    async def _publish(self) -> None:
        """Show our status every second, beside the loop; while Redis is away it grows old."""
        while not self._ended:  # redis-py can lose a cancellation that meets a reply
            await asyncio.sleep(PUBLISH_S)
            if self.bus.epoch:
                with contextlib.suppress(BusError):  # the loop meets and logs the same
                    await self.bus.publish(self._status())

    def _status(self, state: str | None = None) -> bytes:
        pipeline, meter, policy = self.pipeline, self.meter, self.policy
        missing, drift = meter.features()
        shown = pipeline.snapshot()
        return encode_status(
            Status(
                format=FORMAT,
                started_s=meter.started_s,
                owner=self._owner,
                state=state or self.progress.state,
                step=self.progress.step,
                trouble=self.progress.trouble,
                progress_age_s=self.progress.age_s,
                commit_age_s=meter.commit_age_s,
                lag_s=self.progress.lag_ms / 1_000,
                epoch=self.bus.epoch,
                commits=self.bus.seq,
                run_id=pipeline.run_id,
                inputs=self.config.inputs,
                rl_v2=self.settings.rl_v2,
                policy=PolicyInfo(policy.digest, policy.trained_steps, pipeline.feature_version),
                events=self._totals(),
                lost=dict(pipeline.lost),
                ahead=self._ahead,
                dropped=self._dropped,
                actions=pipeline.actions,
                decisions=pipeline.decisions,
                pairs=pipeline.pairs,
                agreement=meter.agreement,
                unpaired=meter.unpaired,
                v2_heard=meter.v2_heard,
                latency=meter.latency,
                symbols=len(pipeline.symbols),
                warm=shown["warm"],
                capital=shown["equity"]["flat"],
                equity=shown["equity"],
                bars=meter.bars,
                missing=missing,
                drift=drift,
                rss_bytes=rss_bytes(),
                disagreements=meter.disagreements(),
                killed=None if self.settings.risk is None else pipeline.killed,
                vetoes={}
                if self.settings.risk is None
                else dict.fromkeys(REASONS, 0) | pipeline.vetoes,
                spans_dropped=None if self.spans is None else self.spans.dropped,
            )
        )

    def _totals(self) -> dict[str, dict[str, int]]:
        totals: dict[str, dict[str, int]] = {}
        for (event_type, outcome), count in sorted(self.pipeline.counts.items()):
            totals.setdefault(event_type, {})[outcome] = count
        return totals

    def _kill(self, engaged: bool) -> None:
        """Take the kill switch into the next commit, so that a replay finds it there."""
        self.pipeline.kill(engaged)
        self.log.warning(
            "KILL_SWITCH",
            msg="the risk limits' kill switch is "
            + ("engaged: entries would be vetoed" if engaged else "clear again"),
            engaged=engaged,
        )

    def _log_heartbeat(self) -> None:
        self.log.info("WORKER_HEARTBEAT", msg="alive", **self.figures())

    def figures(self) -> dict[str, Any]:
        """Return the minute's figures as plain values."""
        rss = rss_bytes()
        ordered = sorted(self._latencies)
        return {
            "events_total": self._totals(),
            "ready": self.progress.state == "ready",
            "state": self.progress.state,
            "lag_ms": round(self.progress.lag_ms, 1),
            "latency_ms_p50": _quantile(ordered, 0.50),
            "latency_ms_p99": _quantile(ordered, 0.99),
            "lost_total": {name: _counted(n) for name, n in self.pipeline.lost.items()},
            "ahead_total": self._ahead,
            "dropped_total": self._dropped,
            **({} if self.spans is None else {"spans_dropped_total": self.spans.dropped}),
            "commits": self.bus.seq,
            "rss_mb": None if rss is None else round(rss / 1e6, 1),
            **self.pipeline.snapshot(),
        }


def _in_parts(commit: Commit) -> Iterator[Commit]:
    """Yield a commit that has nothing but cells, some symbols at a time."""
    cells: dict[str, dict[str, bytes]] = {}
    size = 0
    for symbol, changed in commit.cells.items():
        cells[symbol] = changed
        size += sum(map(len, changed.values()))
        if size >= PART_BYTES:
            yield commit._replace(cells=cells)
            cells, size = {}, 0
    if cells:
        yield commit._replace(cells=cells)


def _frozen(settings: Settings, tables: QTables | None, inputs: Sequence[str]) -> str:
    """Return what an audit needs to build this pipeline again, as JSON."""
    digest = None if tables is None else tables.digest
    return json.dumps({"settings": settings.dump(), "tables": digest, "inputs": list(inputs)})


def _rules(frozen: str) -> dict[str, Any]:
    """Return what makes a run another run: settings that change results, and RL v2's tables."""
    values: dict[str, Any] = json.loads(frozen)
    settings = {k: v for k, v in values["settings"].items() if k not in ("max_events", "max_bytes")}
    return {"settings": settings, "tables": values["tables"]}


def _counted(entries: int | None) -> int | str:
    return "unknown" if entries is None else entries


def _quantile(ordered: list[float], q: float) -> float | None:
    if not ordered:
        return None
    return round(ordered[min(len(ordered) - 1, int(q * len(ordered)))], 2)
