"""The whole product on one screen: real processes on a real Redis, fed with a few hours of bars.

    publisher (here) -> Redis -> worker -> Redis -> collector -> store -> report
                          |                  |
                          +---- recorder ----+----> recording -> audit

Ticks and signals are appended under ids equal to their event time, all of them past, as fast as
`--seconds` asks for; decisions are read back as any consumer would read them. The demo ends well
only when there is a decision for every tick and signal and the audit finds every decision again.
"""

from __future__ import annotations

import asyncio
import secrets
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, NamedTuple

import typer
from redis.asyncio import Redis
from rich.live import Live
from rich.table import Table

from rlv3 import console
from rlv3.errors import ConfigError, DataError
from rlv3.features import STEP_SECONDS
from rlv3.market import Bars, read_bars, simulate
from rlv3.policy import Policy, shipped_policy
from shadow.backtest import check_steps
from shadow.demo_store import SYMBOLS, WORLD
from shadow.history import STREAMS, entries
from shadow.recording import SNAPSHOT
from shadow.records import (
    ARMS,
    ORIGIN,
    BarRow,
    Entry,
    PairRow,
    UnpairedRow,
    decode_comparison,
    decode_decision,
)
from worker.address import AWAY, connected
from worker.embedded import RedisServer, leashed
from worker.errors import CheckFailed
from worker.keys import Keys
from worker.tail import read

BARS = 240
MIN_BARS = 120
TICKS_PER_BAR = 8
MAX_RATE = 400  # entries a second: what a shared laptop core follows without a queue
TAIL_S = 5  # the newest entry is at least this old when the replay starts
PATIENCE_S = 30.0  # without a new decision before the demo gives up waiting
LINE_S = 3.0  # between two lines of a log
REPORTED = (0, 10, 20, 30)  # exit codes of a report, by verdict
CAPITAL = 10_000.0  # of every account


class Plan(NamedTuple):
    """What is published, and for how long."""

    history: list[Entry]
    bars: int
    symbols: int
    seconds: float

    def __str__(self) -> str:
        start, end = (
            f"{datetime.fromtimestamp(entry.id_ms // 1_000, UTC):%Y-%m-%d %H:%M}"
            for entry in (self.history[0], self.history[-1])
        )
        return (
            f"{len(self.history):,} ticks and signals of {self.symbols} symbols, {self.bars:,} "
            f"bars from {start} to {end} UTC, in {self.seconds:g} s"
        )


@dataclass(slots=True)
class Board:
    """Everything the live table shows, kept by the publisher and by the reader."""

    plan: Plan
    published: int = 0
    waiting: dict[tuple[str, str], float] = field(default_factory=dict)
    """Entries without a decision yet -> when they were appended; oldest first."""
    decided: Counter[str] = field(default_factory=Counter)
    """step and advisory decisions."""
    doubled: int = 0
    """Decisions on an entry that had one, or that nobody published."""
    actions: Counter[str] = field(default_factory=Counter)
    pairs: int = 0
    unpaired: int = 0
    bars: int = 0
    equity: dict[tuple[str, str], float] = field(default_factory=dict)
    """(symbol, arm) -> account currency at its last closed bar."""
    latency_s: deque[float] = field(default_factory=lambda: deque(maxlen=5_000))
    """From XADD to the decision in a reader's hands."""
    progressed: float = field(default_factory=time.monotonic)
    done: asyncio.Event = field(default_factory=asyncio.Event)

    def publish(self, entry: Entry) -> None:
        """Note that an entry is being appended."""
        self.published += 1
        self.progressed = time.monotonic()
        self.waiting[entry.stream, entry.entry_id] = self.progressed

    def decide(self, payload: bytes) -> None:
        """Take in one `rl_v3.decision`."""
        decision = decode_decision(payload)
        now = self.progressed = time.monotonic()
        since = self.waiting.pop((decision.source_stream, decision.source_entry_id), None)
        if since is None:
            self.doubled += 1
            return
        self.latency_s.append(now - since)
        self.decided[decision.kind] += 1
        if decision.kind == "step":
            self.actions[decision.action_name] += 1
        if self.finished:
            self.done.set()

    def compare(self, payload: bytes) -> None:
        """Take in one `rl_v3.comparison`."""
        match decode_comparison(payload):
            case BarRow(symbol=symbol, arms=arms):
                self.bars += 1
                self.equity.update({(symbol, arm): bar.equity for arm, bar in arms.items()})
            case PairRow():
                self.pairs += 1
            case UnpairedRow():
                self.unpaired += 1

    @property
    def finished(self) -> bool:
        """True when everything was published and decided."""
        return self.published == len(self.plan.history) and not self.waiting

    def figures(self) -> dict[str, str]:
        """Return the rows of the table, name -> text."""
        oldest = next(iter(self.waiting.values()), None)
        lag_ms = 0.0 if oldest is None else (time.monotonic() - oldest) * 1e3
        ordered = sorted(self.latency_s) or [0.0]
        p50, p99 = (ordered[int(q * (len(ordered) - 1))] * 1e3 for q in (0.50, 0.99))
        done = self.published / len(self.plan.history)
        return {
            "replay": f"{done:.0%} of {self.plan.bars} bars, {self.plan.symbols} symbols",
            "ticks and signals": f"{self.published:,}",
            "decisions": f"{self.decided.total():,} ({self.decided['step']:,} steps)",
            "actions of the steps": ", ".join(
                f"{name} {n:,}" for name, n in self.actions.most_common()
            ),
            "pairs": f"{self.pairs:,}, unpaired {self.unpaired:,}",
            "latency": f"p50 {p50:.1f} ms, p99 {p99:.1f} ms from append to decision read",
            "lag": f"{lag_ms:.0f} ms, {len(self.waiting):,} waiting",
            **{f"equity {arm}": self._equity(arm) for arm in ARMS},
        }

    def _equity(self, arm: str) -> str:
        held = [value for (_, name), value in self.equity.items() if name == arm]
        if not held:
            return "-"
        total, start = sum(held), CAPITAL * len(held)
        return f"{total:,.2f} ({total / start - 1.0:+.3%})"

    def table(self) -> Table:
        """Return the live table."""
        table = Table(title="RL v3 in the shadow of RL v2", show_header=False, min_width=72)
        for name, text in self.figures().items():
            table.add_row(name, text)
        return table

    def line(self) -> str:
        """Return one plain line for a log."""
        shown = self.figures()
        names = ("replay", "ticks and signals", "decisions", "pairs", "lag", "equity v3")
        return "  ".join(f"{name}: {shown[name]}" for name in names)


class Crew:
    """The real programs of the demo; none outlives it."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.running: dict[str, asyncio.subprocess.Process] = {}

    async def start(self, name: str, *arguments: str | Path) -> None:
        """Start `rlv3-worker NAME …` with its output in a log file."""
        with self._log(name).open("wb") as log:
            self.running[name] = await _launch("worker", name, *arguments, output=log)

    async def watch(self) -> None:
        """Wait for a program to end by itself, which none of them should.

        Raises:
            CheckFailed: naming the program, its exit code and its last words.
        """
        waits = {
            asyncio.create_task(process.wait()): name for name, process in self.running.items()
        }
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waits:
                task.cancel()
        name = waits[done.pop()]
        raise CheckFailed(f"expected {name} to keep running, found {self._last_words(name)}")

    async def stop(self, name: str) -> None:
        """Ask a program to drain and wait for it.

        Raises:
            CheckFailed: it did not end, or not with exit code 0.
        """
        process = self.running[name]
        process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), PATIENCE_S)
        except TimeoutError:
            raise CheckFailed(f"expected {name} to drain within {PATIENCE_S:.0f} s") from None
        if process.returncode != 0:
            raise CheckFailed(f"expected {name} to drain, found {self._last_words(name)}")
        del self.running[name]

    async def finish(
        self, package: str, name: str, *arguments: str | Path, expected: Sequence[int] = (0,)
    ) -> None:
        """Run a program to its end in front of the user.

        Raises:
            CheckFailed: it ended with an unexpected exit code.
        """
        process = self.running[name] = await _launch(package, name, *arguments, output=None)
        if await process.wait() not in expected:
            raise CheckFailed(f"expected {name} to succeed, found exit code {process.returncode}")
        del self.running[name]

    async def end(self) -> None:
        """Kill whatever still runs."""
        for process in self.running.values():
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        self.running.clear()

    def _log(self, name: str) -> Path:
        return self.out / f"{name}.log"

    def _last_words(self, name: str) -> str:
        lines = self._log(name).read_text(errors="replace").strip().splitlines()
        code = self.running[name].returncode
        return f"exit code {code}: {lines[-1] if lines else 'nothing'} (see {self._log(name)})"


async def _launch(
    package: str, name: str, *arguments: str | Path, output: IO[bytes] | None
) -> asyncio.subprocess.Process:
    """Start a command of `rlv3-worker` or `rlv3-shadow` that dies with this process."""
    return await asyncio.create_subprocess_exec(
        *leashed(sys.executable, "-m", f"{package}.cli", name, *map(str, arguments)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,  # Ctrl-C in a terminal is for us, who end the others in order
    )


async def replay(redis: Redis, recording: Path, board: Board) -> None:
    """Append the history evenly over the planned seconds, in order; wait for its decisions."""
    await _until_recorded(recording)
    history = board.plan.history
    begun = time.monotonic()
    while board.published < len(history):
        elapsed = time.monotonic() - begun
        due = min(int(len(history) * elapsed / board.plan.seconds) + 1, len(history))
        async with redis.pipeline(transaction=False) as batch:
            for entry in history[board.published : due]:
                board.publish(entry)
                fields: dict[Any, Any] = dict(entry.fields)
                batch.xadd(entry.stream, fields, id=entry.entry_id)
            await batch.execute()
        await asyncio.sleep(0.02)
    while time.monotonic() - board.progressed < PATIENCE_S:
        with suppress(TimeoutError):
            await asyncio.wait_for(board.done.wait(), 1.0)
            return


async def _until_recorded(recording: Path) -> None:
    """Wait until the worker has committed its start and the recorder has it: nothing escapes."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if (recording / SNAPSHOT).exists():
            return
        await asyncio.sleep(0.05)
    raise CheckFailed(
        f"expected worker and recorder to start within {PATIENCE_S:.0f} s, found no "
        f"{recording / SNAPSHOT}"
    )


async def read_back(redis: Redis, keys: Keys, board: Board) -> None:
    """Follow our own streams as any consumer of the bus would, for ever."""
    takers = {keys.decisions: board.decide, keys.comparisons: board.compare}
    cursors: dict[str, str] = dict.fromkeys(takers, ORIGIN)
    while True:
        for stream, found in await read(redis, cursors, 250):
            name = stream.decode()
            for entry_id, fields in found:
                takers[name](fields[b"payload"])
                cursors[name] = entry_id.decode()


async def show(board: Board) -> None:
    """Show the table to a person, or a line every few seconds to a log; until cancelled."""
    if not console.err.is_terminal:
        while True:
            await asyncio.sleep(LINE_S)
            console.err.print(board.line(), soft_wrap=True, highlight=False)
    with Live(board.table(), console=console.err, auto_refresh=False) as live:
        try:
            while True:
                await asyncio.sleep(0.25)
                live.update(board.table(), refresh=True)
        finally:
            live.update(board.table(), refresh=True)


def check(board: Board, dead_letters: int) -> None:
    """Refuse to end well unless every tick and signal has exactly one decision.

    Raises:
        CheckFailed: naming how many are missing, doubled or dead.
    """
    if board.finished and not board.doubled and not dead_letters:
        return
    raise CheckFailed(
        f"expected one decision for each of {len(board.plan.history):,} ticks and signals, found "
        f"{board.decided.total():,}, {board.doubled} of them too many, "
        f"{len(board.waiting):,} missing and {dead_letters} dead letters"
    )


def plan_history(data: Sequence[Bars], seconds: float, now_ms: int, keys: Keys) -> Plan:
    """Return what to publish: the newest bars of real series, or simulated ones up to now.

    Raises:
        DataError: a series is too short or reaches into the future.
    """
    ticks_per_bar = 2 if data else TICKS_PER_BAR
    if data:
        fitting = max(int(seconds * MAX_RATE / (ticks_per_bar * len(data))), MIN_BARS)
        bars = [_newest(series, fitting, now_ms) for series in data]
    else:
        bars = [
            _simulated(symbol, price, seed, now_ms)
            for seed, (symbol, price) in enumerate(SYMBOLS.items())
        ]
    history = list(entries(bars, stream=keys.stream, ticks_per_bar=ticks_per_bar))
    return Plan(history, max(len(series.end_us) for series in bars), len(bars), seconds)


def _newest(bars: Bars, fitting: int, now_ms: int) -> Bars:
    """Return the last bars that the demo has time for."""
    n = len(bars.end_us)
    if n < MIN_BARS:
        raise DataError(f"expected at least {MIN_BARS} bars of {bars.symbol}, found {n}")
    if bars.end_us[-1] > now_ms * 1_000:
        raise DataError(f"expected bars of {bars.symbol} up to now, found later ones")
    if n > fitting:
        _say(f"{bars.symbol}: the last {fitting:,} of {n:,} bars fit; --seconds makes more room")
    return bars.rows(max(n - fitting, 0), n)


def _simulated(symbol: str, price: float, seed: int, now_ms: int) -> Bars:
    """Return a simulated series whose last bar has just ended."""
    step_ms = STEP_SECONDS * 1_000
    start_ms = (now_ms // step_ms - BARS) * step_ms
    return simulate(
        WORLD, BARS, seed=seed, symbol=symbol, start_us=start_ms * 1_000, start_price=price
    )


async def demo(seconds: float, data: Sequence[Bars], redis_url: str | None, out: Path) -> None:
    """Run the whole demo.

    Raises:
        UserError: something did not go as promised; one sentence says what.
    """
    crew = Crew(out)
    try:
        with _private_redis() if redis_url is None else nullcontext(redis_url) as url:
            keys = Keys() if redis_url is None else Keys(f"rlv3demo-{secrets.token_hex(4)}")
            async with connected(url) as redis:
                now_s, _ = await redis.time()
                board = Board(plan_history(data, seconds, (now_s - TAIL_S) * 1_000, keys))
                _say(f"{board.plan}; files in {out}")
                try:
                    await play(crew, redis, url, keys, board)
                finally:
                    await crew.end()
                    if redis_url is not None:
                        await remove_keys(redis, keys)
        _say("audit: every decision computed again from the recording")
        await crew.finish(
            "worker", "audit", "--recording", out / "recording", "--store", out / "store"
        )
        await crew.finish(
            "shadow", "report", "--store", out / "store", "--out", out, expected=REPORTED
        )
    except AWAY as error:
        raise CheckFailed(f"expected Redis to stay with the demo, found: {error}") from error
    finally:
        await crew.end()


async def play(crew: Crew, redis: Redis, url: str, keys: Keys, board: Board) -> None:
    """Publish the history past the running programs, end them in order, check the decisions.

    Raises:
        CheckFailed: a program failed, or a decision is missing.
    """
    common = ("--redis-url", url, "--prefix", keys.prefix)
    await crew.start("collect", *common, "--store", crew.out / "store")
    recording = crew.out / "recording"
    await crew.start("record", *common, "--out", recording)
    await crew.start(
        "run", *common, "--policy", shipped_policy(), "--start", "oldest",
        "--conflate-after", "off", "--max-event-age", "off",
    )  # fmt: skip
    beside = (crew.watch(), read_back(redis, keys, board), show(board))
    tasks = [asyncio.create_task(work) for work in (replay(redis, recording, board), *beside)]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        done.pop().result()
    finally:
        await _end(tasks)
    for name in ("run", "collect", "record"):
        await crew.stop(name)
    check(board, sum([await redis.xlen(keys.dlq(name)) for name in STREAMS]))


async def _end(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Cancel until it is done: redis-py loses a cancellation that meets a reply."""
    while not all(task.done() for task in tasks):
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=0.1)
    await asyncio.gather(*tasks, return_exceptions=True)  # the first failure tells enough


async def remove_keys(redis: Redis, keys: Keys) -> None:
    """Delete every key of the demo from a Redis that is not ours."""
    async for key in redis.scan_iter(match=f"{keys.prefix}:*", count=1_000):
        await redis.unlink(key)


@contextmanager
def _private_redis() -> Iterator[str]:
    with RedisServer.start() as server:
        version = ".".join(map(str, server.binary.version))
        _say(f"private Redis {version} ({server.binary.path})")
        yield server.url


def _say(text: str) -> None:
    console.err.print(text, soft_wrap=True, highlight=False)


def command(
    seconds: float, data: Sequence[Path] | None, redis_url: str | None, out: Path | None
) -> None:
    """Run the demo from the command line.

    Args:
        seconds: how long the replay takes; start, audit and report are extra.
        data: files of real bars, one per symbol; none simulates.
        redis_url: a Redis to use under a random prefix, all of which is removed; None starts one.
        out: new directory for store, recording, logs and report; `out/demo-<time>` by default.
    """
    bars = [read_bars(path) for path in data or ()]
    policy = Policy.load(shipped_policy())
    policy.check_serving()
    check_steps(bars, policy)
    directory = out or Path("out") / f"demo-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    try:
        directory.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(
            f"expected --out to be a new directory, found {directory}: {error.strerror}"
        ) from error
    try:
        asyncio.run(_until_told(demo(seconds, bars, redis_url, directory)))
    except asyncio.CancelledError:
        raise typer.Exit(128 + signal.SIGTERM) from None


async def _until_told(work: Coroutine[Any, Any, None]) -> None:
    """Run the work; SIGTERM ends it as Ctrl-C does, with everything cleaned up."""
    task = asyncio.ensure_future(work)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    await task
