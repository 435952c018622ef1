"""What does the worker do on a Redis of its own, and what does it cost? All from bus to bus.

Every part starts a private Redis on a free port and the real programs; only the producer is made
up (`bench/load.py`). Figures are printed as they come, misses included.

    throughput  events per second from a preloaded backlog; CPU of worker and Redis, AOF, scripts
    steps       where the time of an event goes: read, fold and its steps, commit
    peers       the same backlog through today's loop and through FastStream (extra `bench`)
    latency     from a tick's XADD to its decision's at 500, 2,000 and 10,000 events a second
    bus         what a producer and another consumer group notice
    recovery    kill -9 to the first new decision, SIGTERM to exit
    start       exec to the first decision without and with state; memory at 200 symbols
    audit       how fast a recording is proved
    memory      over a million events at 30, 200 and 1,000 symbols: minutes, so only when named
    held        how long a script, and the longest command of other programs, holds Redis
    pauses      how often the machine itself stops a program that waits for nothing

    python bench/bench_worker.py [PART ...] [--events N] [--symbols N ...] [--form json|msgpack ...]
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import importlib.util
import json
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import redis

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from bench import load  # noqa: E402
from rlv3.features import MarketState  # noqa: E402
from rlv3.policy import Policy, shipped_policy  # noqa: E402
from shadow import codec  # noqa: E402
from shadow.pipeline import Pipeline, Settings  # noqa: E402
from shadow.records import Entry, decode_decision, encode  # noqa: E402
from shadow.rl_v2 import QTables  # noqa: E402
from worker.bus import Bus  # noqa: E402
from worker.embedded import RedisServer, leashed  # noqa: E402
from worker.keys import INPUTS, Keys  # noqa: E402

KEYS = Keys()
PATIENCE_S = 120.0
SLOWLOG = 10_000
CALM = {
    "appendfsync": "everysec",
    "auto-aof-rewrite-percentage": "0",
    "slowlog-log-slower-than": "1000",
    "slowlog-max-len": str(SLOWLOG),
}
ESSENTIAL = (
    "throughput", "steps", "peers", "latency", "bus", "recovery", "start", "held", "pauses",
)  # fmt: skip
RATES = (500, 2_000, 10_000)
PAIRS = 5
PEER_ROUNDS = 5
WINDOW_S = 3.0
DRAIN_LOOK_S = 0.02
PAUSES_S = 6.0
OTHERS_S = 4.0
HELD_LOG = 200_000
PEER_OUTPUT = KEYS.stream("peer.decision")
TICKS = b"n:market.tick:decided"


# -- programs and their figures -------------------------------------------------------------------


def cpu_s(pid: int) -> float:
    """Return the CPU seconds a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss_mb(pid: int) -> float:
    """Return the resident memory of a process in MB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def pid_of(server: RedisServer) -> int:
    """Return the process of a running server."""
    assert server.process is not None
    return server.process.pid


@contextmanager
def bench_redis() -> Iterator[tuple[RedisServer, redis.Redis]]:
    """Run a private Redis with an append-only file, synced every second as production's is."""
    with (
        RedisServer.start(appendonly=True, options=CALM) as server,
        redis.Redis.from_url(server.url) as link,
    ):
        yield server, link


@contextmanager
def program(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program that does not outlive us; its log is shown when it fails."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(leashed(*command), stdout=log, stderr=log, cwd=HERE.parent)
        try:
            yield process
        finally:
            failed = process.poll()
            process.kill()
            process.wait()
            if failed:
                log.seek(0)
                print(log.read().decode(errors="replace")[-2_000:])


def worker(url: str, *flags: str) -> Any:
    """Run the daemon with defaults, from the oldest entry, without conflation."""
    fixed = ("--start", "oldest", "--conflate-after", "off", "--max-event-age", "off")
    command = (sys.executable, "-m", "worker.cli", "run", "--redis-url", url, *fixed, *flags)
    return program(*command)


def publish(link: redis.Redis, entries: Iterable[Entry]) -> int:
    """Append entries under their own ids; returns how many of them are ticks."""
    ticks, waiting = 0, iter(entries)
    while chunk := list(islice(waiting, 2_000)):
        with link.pipeline(transaction=False) as pipe:
            for entry in chunk:
                pipe.xadd(entry.stream, dict(entry.fields), id=entry.entry_id)  # type: ignore[arg-type]
                ticks += entry.event_type == load.TICK
            pipe.execute()
    return ticks


def until(
    process: subprocess.Popen[bytes], condition: Callable[[], object], look_s: float = 0.005
) -> None:
    """Wait for a condition while a program runs; every look costs Redis and the processor time."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if process.poll() is not None:
            raise SystemExit(f"expected {process.args!r} to run, found exit {process.returncode}")
        if time.monotonic() > deadline:
            raise SystemExit(f"waited {PATIENCE_S:.0f} s in vain for {process.args!r}")
        time.sleep(look_s)


def decided(link: redis.Redis) -> int:
    """Return how many ticks the worker has decided."""
    return int(link.hget(KEYS.meta, TICKS) or 0)  # type: ignore[arg-type]


def slow_ms(link: redis.Redis) -> tuple[list[float], list[float]]:
    """Return how long those scripts, and those other commands, took that took over 1 ms."""
    scripts, others = [], []
    for item in link.slowlog_get(SLOWLOG):  # type: ignore[union-attr]
        kind = scripts if item["command"].startswith(b"EVAL") else others
        kind.append(item["duration"] / 1e3)
    return scripts, others


def quantile(values: list[float], q: float) -> float:
    """Return a quantile of measurements."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


# -- throughput -----------------------------------------------------------------------------------


def drain(
    process: subprocess.Popen[bytes],
    server: RedisServer,
    count: Callable[[], int],
    total: int,
) -> dict[str, float]:
    """Time a consumer from its first thousand outputs to the last; returns figures per event."""
    until(process, lambda: count() >= min(1_000, total // 10), DRAIN_LOOK_S)
    first, began = count(), time.perf_counter()
    used = cpu_s(process.pid), cpu_s(pid_of(server))
    until(process, lambda: count() >= total, DRAIN_LOOK_S)
    took, n = time.perf_counter() - began, total - first
    now = cpu_s(process.pid), cpu_s(pid_of(server))
    return {
        "rate": n / took,
        "worker": (now[0] - used[0]) / n * 1e6,
        "redis": (now[1] - used[1]) / n * 1e6,
    }


def throughput(args: argparse.Namespace) -> None:
    """Fold a preloaded backlog."""
    for symbols in args.symbols:
        for form in args.form:
            with bench_redis() as (server, link):
                publish(link, load.warm_up(symbols, form=form))
                warm = symbols * load.WARM_BARS
                ticks = publish(link, load.entries(args.events, symbols, form=form))
                link.config_resetstat()
                aof = link.info("persistence")["aof_current_size"]
                with worker(server.url, "--codec", form) as process:
                    found = drain(process, server, lambda: decided(link), warm + ticks)
                    memory = rss_mb(process.pid)
                aof = link.info("persistence")["aof_current_size"] - aof
                slow, others = slow_ms(link)
                script = link.info("commandstats")["cmdstat_evalsha"]["usec_per_call"]
            print(
                f"throughput {symbols:>5} symbols {form:<8}{found['rate']:>9,.0f} events/s   CPU "
                f"worker {found['worker']:.1f} Redis {found['redis']:.1f} µs/event   AOF "
                f"{aof / (warm + ticks):,.0f} B/tick   scripts {script:.0f} µs on average, "
                f"{len(slow)} over 1 ms (longest {max(slow, default=0.0):.1f} ms), other commands "
                f"{len(others)} (longest {max(others, default=0.0):.1f} ms)   "
                f"{memory:.0f} MB"
            )


def peers(args: argparse.Namespace) -> None:
    """Consume the same backlog as others do, and as we do."""
    if importlib.util.find_spec("faststream") is None or importlib.util.find_spec("torch") is None:
        print("peers      not run: pip install '.[bench]'")
        return
    symbols = 30
    script = str(HERE / "worker_peers.py")
    rates: dict[str, list[float]] = {"loop": [], "faststream": [], "worker": []}
    for _ in range(PEER_ROUNDS):  # in turn, so that a slow minute hits all alike
        for name in ("loop", "faststream"):
            with bench_redis() as (server, link):
                ticks = publish(link, load.entries(args.events // 10, symbols, signal_every=0))
                with program(sys.executable, script, name, server.url) as process:
                    found = drain(process, server, lambda: link.xlen(PEER_OUTPUT), ticks)
            rates[name].append(found["rate"])
        with bench_redis() as (server, link):
            publish(link, load.warm_up(symbols))
            ticks = publish(link, load.entries(args.events, symbols)) + symbols * load.WARM_BARS
            with worker(server.url) as process:
                found = drain(process, server, lambda: decided(link), ticks)
        rates["worker"].append(found["rate"])
    print(f"peers      worker      {statistics.median(rates['worker']):>9,.0f} events/s")
    for name in ("loop", "faststream"):
        ratios = [ours / rate for ours, rate in zip(rates["worker"], rates[name], strict=True)]
        shown = ", ".join(f"{ratio:.1f}" for ratio in ratios)
        print(
            f"peers      {name:<12}{statistics.median(rates[name]):>9,.0f} events/s   "
            f"worker {statistics.median(ratios):.1f} times as many ({shown})"
        )


# -- steps ----------------------------------------------------------------------------------------


def fold(pipeline: Pipeline, entries: list[Entry]) -> list[Any]:
    """Fold entries in the worker's batches; returns the commits."""
    commits = []
    while entries:
        commits.append(pipeline.run(entries[:256], now_ms=float(entries[0].id_ms)))
        entries = entries[commits[-1].taken :]
    return commits


def warm_pipeline(policy: Policy, symbols: int) -> Pipeline:
    """Return a pipeline whose symbols are warm."""
    settings = Settings(max_event_age_s=None)
    pipeline = Pipeline(policy, QTables.load(None), settings, INPUTS)
    pipeline.begin({KEYS.stream(name): "0-0" for name in INPUTS})
    fold(pipeline, list(load.warm_up(symbols)))
    return pipeline


async def _read_and_commit(url: str, entries: list[Entry], policy: Policy) -> tuple[float, float]:
    """Return seconds of reading and of committing the backlog, one after the other."""
    bus = Bus(url, url, KEYS, INPUTS)
    await bus.connect()
    await bus.acquire(start="oldest", on_gap="resume-oldest", owner="bench")
    pipeline = warm_pipeline(policy, 30)
    reading = committing = 0.0
    folded = 0
    while folded < len(entries):
        began = time.perf_counter()
        batch = await bus.read(256)
        reading += time.perf_counter() - began
        waiting = batch.entries
        while waiting:
            commit = pipeline.run(waiting, now_ms=0.0)
            began = time.perf_counter()
            await bus.commit(commit)
            committing += time.perf_counter() - began
            waiting = waiting[commit.taken :]
            folded += commit.taken
    await bus.close()
    return reading, committing


def steps(args: argparse.Namespace) -> None:
    """Time the parts of an event's path, each alone on the same events."""
    symbols, n = 30, min(args.events, 10_000)
    policy = Policy.load(shipped_policy())
    entries = list(load.entries(n, symbols))
    ticks = [event for entry in entries if (event := codec.decode(entry)) and hasattr(event, "bid")]
    pipeline = warm_pipeline(policy, symbols)
    commits = fold(pipeline, entries)
    outputs = [output for commit in commits for output in commit.outputs]
    structs = [decode_decision(o.payload) for o in outputs if o.event_type == "rl_v3.decision"]
    rows, masks = [[0.01] * 18] * 64, [(True,) * 6] * 64
    bus = Bus("redis://unused", "redis://unused", KEYS, INPUTS)

    def update_markets() -> None:
        markets: dict[str, MarketState] = {}
        for tick in ticks:
            market = markets.setdefault(tick.symbol, MarketState())
            market.on_tick(tick.ts_us, tick.price, tick.volume, tick.bid, tick.ask, tick.side)
            market.open_features(tick.ts_us)

    def infer() -> None:
        for _ in range(0, n, 64):
            policy.decide(policy.normaliser.apply(rows, [0] * 64), masks)

    works: dict[str, Callable[[], object]] = {
        "fold": lambda: fold(warm, entries),
        "decode": lambda: [codec.decode(entry) for entry in entries],
        "market, observe": update_markets,
        "policy": infer,
        "encode": lambda: [encode(struct) for struct in structs],
        "lay out commits": lambda: [bus._script_arguments(commit, {}, ()) for commit in commits],
    }
    taken: dict[str, list[float]] = {name: [] for name in works}
    gc.collect()
    gc.freeze()
    for _ in range(args.rounds):
        warm = warm_pipeline(policy, symbols)
        for name, work in works.items():
            began = time.perf_counter()
            work()
            taken[name].append(time.perf_counter() - began)
    with bench_redis() as (server, link):
        publish(link, entries)
        reading, committing = asyncio.run(_read_and_commit(server.url, entries, policy))
    spent = {name: min(times) / n * 1e6 for name, times in taken.items()}
    layout = spent.pop("lay out commits")
    rest = 2 * spent["fold"] - sum(spent.values())
    shown = {"read": reading / n * 1e6, **spent, "fold's rest": rest, "lay out commits": layout}
    shown["commit, waited for"] = committing / n * 1e6
    for name, micros in shown.items():
        print(f"steps      {name:<22}{micros:>7.2f} µs/event")


# -- latency --------------------------------------------------------------------------------------


def producer(url: str, rate: int, seconds: float, symbols: int) -> Any:
    """Run `bench/load.py` as a program."""
    script = str(HERE / "load.py")
    command = leashed(sys.executable, script, url, str(rate), str(seconds), str(symbols))
    return subprocess.Popen(command, stdout=subprocess.PIPE, cwd=HERE.parent)


@contextmanager
def live_worker(link: redis.Redis, server: RedisServer, symbols: int) -> Iterator[Any]:
    """Run a worker whose symbols are warm and which has caught up."""
    publish(link, load.warm_up(symbols, until_ms=int(time.time() * 1_000)))
    with worker(server.url) as process:
        until(process, lambda: decided(link) >= symbols * load.WARM_BARS)
        time.sleep(0.5)
        yield process


def latency(_: argparse.Namespace) -> None:
    """Measure between the two entries' ids, which Redis gives in whole milliseconds."""
    for rate in RATES:
        with bench_redis() as (server, link), live_worker(link, server, 30) as process:
            before = decided(link)
            made = producer(server.url, rate, WINDOW_S, 30)
            sent = json.loads(made.communicate()[0])["sent"]
            until(process, lambda sent=sent, before=before: decided(link) >= before + sent)
            delays = []
            for entry_id, fields in link.xrevrange(KEYS.decisions, count=sent):
                source = decode_decision(fields[b"payload"]).source_entry_id
                delays.append(float(_ms(entry_id.decode()) - _ms(source)))
            print(
                f"latency    {rate:>6,} events/s   p50 {quantile(delays, 0.5):.0f} "
                f"p99 {quantile(delays, 0.99):.0f} max {max(delays):.0f} ms   "
                f"({sent / WINDOW_S:,.0f} sent/s)"
            )


def _ms(entry_id: str) -> int:
    return int(entry_id.partition("-")[0])


# -- what others notice ---------------------------------------------------------------------------


class _Group:
    """Another program's consumer group on the same ticks; keeps its greatest lag."""

    def __init__(self, url: str) -> None:
        self.lag = 0
        self._url = url
        self._end = threading.Event()
        self._threads = [threading.Thread(target=f, daemon=True) for f in (self._read, self._look)]

    def __enter__(self) -> _Group:
        with redis.Redis.from_url(self._url) as link:
            link.xgroup_create(KEYS.stream(load.TICK), "other", "$", mkstream=True)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()

    def _read(self) -> None:
        stream = KEYS.stream(load.TICK)
        with redis.Redis.from_url(self._url) as link:
            while not self._end.is_set():
                found: Any = link.xreadgroup("other", "one", {stream: ">"}, count=100, block=50)
                for _, entries in found or ():
                    link.xack(stream, "other", *(entry_id for entry_id, _ in entries))

    def _look(self) -> None:
        with redis.Redis.from_url(self._url) as link:
            while not self._end.wait(0.02):
                groups: Any = link.xinfo_groups(KEYS.stream(load.TICK))
                self.lag = max(self.lag, groups[0].get("lag") or 0)


def bus(_: argparse.Namespace) -> None:
    """Run a producer with the worker frozen (A) and awake (B), in pairs."""
    rate, changes, lags = 2_000, [], {"A": 0, "B": 0}
    with (
        bench_redis() as (server, link),
        live_worker(link, server, 30) as process,
        _Group(server.url) as group,
    ):
        p99 = {}
        for pair in range(PAIRS):
            for side, how in (("A", signal.SIGSTOP), ("B", signal.SIGCONT)):
                process.send_signal(how)
                if side == "B":
                    until(process, lambda: decided(link) >= link.xlen(KEYS.stream(load.TICK)))
                group.lag = 0
                made = producer(server.url, rate, WINDOW_S, 30)
                p99[side] = json.loads(made.communicate()[0])["p99_ms"]
                lags[side] = max(lags[side], group.lag)
            changes.append((p99["B"] - p99["A"], p99["B"] / p99["A"] - 1.0))
            print(f"bus        pair {pair + 1}: XADD p99 {p99['A']:.3f} -> {p99['B']:.3f} ms")
    more, share = (statistics.median(values) for values in zip(*changes, strict=True))
    print(
        f"bus        median change of a producer's XADD p99 {more:+.3f} ms ({share:+.0%}); "
        f"greatest lag of another group {lags['A']} without, {lags['B']} with the worker"
    )


# -- recovery -------------------------------------------------------------------------------------


def recovery(_: argparse.Namespace) -> None:
    """Kill and start again under 500 ticks a second of 200 symbols; then stop in order."""
    symbols, taken = 200, []
    with bench_redis() as (server, link):
        with live_worker(link, server, symbols) as process:
            made = producer(server.url, 500, 30.0, symbols)
            time.sleep(1.0)
        for _round in range(3):  # whoever ran was killed as its block ended
            killed_ms = time.time() * 1_000
            newest = link.xrevrange(KEYS.decisions, count=1)[0][0]
            with worker(server.url) as process:
                until(process, lambda n=newest: link.xrevrange(KEYS.decisions, count=1)[0][0] != n)
                (first, _fields), *_rest = link.xrange(
                    KEYS.decisions, f"({newest.decode()}", "+", 1
                )
                taken.append((_ms(first.decode()) - killed_ms) / 1e3)
                time.sleep(1.0)
        stops = []
        for _round in range(3):
            with worker(server.url) as process:
                newest = link.xrevrange(KEYS.decisions, count=1)[0][0]
                until(process, lambda n=newest: link.xrevrange(KEYS.decisions, count=1)[0][0] != n)
                began = time.perf_counter()
                process.terminate()
                process.wait(PATIENCE_S)
                stops.append(time.perf_counter() - began)
                if process.returncode:
                    raise SystemExit(f"expected exit 0 after SIGTERM, found {process.returncode}")
        made.kill()
    print(f"recovery   kill -9 to the first new decision, {symbols} symbols: {_seconds(taken)}")
    print(f"recovery   SIGTERM to exit: {_seconds(stops)}")


def _seconds(values: list[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values) + " s"


def start(args: argparse.Namespace) -> None:
    """Start with a tick waiting, after one start that warms the disk; then watch memory.

    The clock runs from just before the program is executed to the id that Redis gives its decision.
    """
    for symbols in (0, 200):
        with bench_redis() as (server, link):
            if symbols:
                _leave_state(link, server, symbols)
            taken = []
            for n in range(1 + args.rounds):
                if not symbols:
                    link.flushall()
                _append_tick(link, n)
                took = _first_decision(link, server)
                taken += [took] if n else []
            print(
                f"start      exec to the first decision, state of {symbols:>3} symbols: "
                f"{_seconds(taken)}, median {statistics.median(taken):.2f} s"
            )
            if symbols:
                print(f"start      {_memory_after(link, server, args.start_events, symbols)}")


def _leave_state(link: redis.Redis, server: RedisServer, symbols: int) -> None:
    publish(link, load.warm_up(symbols))
    with worker(server.url) as process:
        until(process, lambda: decided(link) >= symbols * load.WARM_BARS)
        process.terminate()
        process.wait(PATIENCE_S)


def _append_tick(link: redis.Redis, n: int) -> None:
    body = {"symbol": "SYM000USDT", "price": 100.0 + n, "timestamp": time.time()}
    link.xadd(KEYS.stream(load.TICK), {"payload": json.dumps(body)})


def _first_decision(link: redis.Redis, server: RedisServer) -> float:
    """Return the seconds of a start; the worker stops in order then."""

    def newest() -> str:
        found: Any = link.xrevrange(KEYS.decisions, count=1)
        return found[0][0].decode() if found else "0-0"

    before, began_ms = newest(), time.time() * 1_000
    with worker(server.url) as process:
        until(process, lambda: newest() != before)
        found: Any = link.xrange(KEYS.decisions, f"({before}", "+", 1)
        process.terminate()
        process.wait(PATIENCE_S)
    return (_ms(found[0][0].decode()) - began_ms) / 1e3


def _memory_after(link: redis.Redis, server: RedisServer, events: int, symbols: int) -> str:
    with worker(server.url) as process:
        rows = load.entries(events, symbols, start_ms=int(time.time() * 1_000) + 1_000)
        begun, sent, waiting = decided(link), 0, iter(rows)
        while chunk := list(islice(waiting, 10_000)):
            sent += publish(link, chunk)
            until(process, lambda goal=begun + sent: decided(link) >= goal)
            link.xtrim(KEYS.stream(load.TICK), maxlen=1_000)
        return (
            f"resident memory of {symbols} symbols after {events:,} events: "
            f"{rss_mb(process.pid):.1f} MB"
        )


def audit(args: argparse.Namespace) -> None:
    """Record a stream, then fold the recording again and compare every decision."""
    symbols, n = 30, args.events
    with tempfile.TemporaryDirectory() as place, bench_redis() as (server, link):
        out = Path(place) / "recording"
        publish(link, load.warm_up(symbols))
        warm = symbols * load.WARM_BARS
        record = (sys.executable, "-m", "worker.cli", "record", "--redis-url", server.url)
        with worker(server.url) as process, program(*record, "--out", str(out)) as recorder:
            until(recorder, (out / "snapshot.msgpack").exists)
            ticks = warm
            waiting = iter(load.entries(n, symbols))
            while chunk := list(islice(waiting, 5_000)):
                ticks += publish(link, chunk)
                until(process, lambda ticks=ticks: decided(link) >= ticks)
            process.terminate()
            process.wait(PATIENCE_S)
            recorder.terminate()
            recorder.wait(PATIENCE_S)
        command = (sys.executable, "-m", "worker.cli", "audit", "--recording", str(out))
        began = time.perf_counter()
        done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, check=False)
        took = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"expected the audit to pass, found exit {done.returncode}: {done.stderr}")
    print(done.stdout.strip())
    print(
        f"audit      {n / took:,.0f} events/s, start of the program included: "
        f"{n / took / 500:.0f} times 500 events/s"
    )


def memory(args: argparse.Namespace) -> None:
    """Watch resident memory while events stream through a bounded input."""
    for symbols in (30, 200, 1_000):
        with bench_redis() as (server, link), worker(server.url) as process:
            ticks, seen = publish(link, load.warm_up(symbols)), []
            waiting = iter(load.entries(args.memory_events, symbols))
            marks = [args.memory_events * share // 10 for share in (1, 4, 7, 10)]
            sent = 0
            while chunk := list(islice(waiting, 10_000)):
                ticks += publish(link, chunk)
                sent += len(chunk)
                until(process, lambda ticks=ticks: decided(link) >= ticks)
                link.xtrim(KEYS.stream(load.TICK), maxlen=1_000)
                if sent >= marks[len(seen)]:
                    seen.append(rss_mb(process.pid))
            shown = " ".join(f"{value:.1f}" for value in seen)
            print(
                f"memory     {symbols:>5} symbols   {shown} MB after 10, 40, 70 and 100 % of "
                f"{sent:,} events"
            )


class _Held:
    """While it is entered: how long every command of everybody held Redis.

    What a transaction or a pipeline holds in a row stands there command by command.
    """

    def __init__(self, link: redis.Redis) -> None:
        self._link = link
        self.ms: list[tuple[bytes, float]] = []
        """Command, shortened, and milliseconds, in order."""

    def __enter__(self) -> _Held:
        self._link.config_set("slowlog-max-len", HELD_LOG)
        self._link.config_set("slowlog-log-slower-than", 0)
        self._link.slowlog_reset()
        return self

    def __exit__(self, *_: object) -> None:
        found: Any = self._link.slowlog_get(HELD_LOG)
        self.ms = [(item["command"], item["duration"] / 1e3) for item in reversed(found)]

    def of(self, start: bytes) -> list[float]:
        """Return the milliseconds of the commands that begin so."""
        return [ms for command, ms in self.ms if command.startswith(start)]


def held(args: argparse.Namespace) -> None:
    """Time each script and reading in runs that are the same, then what other programs ask.

    What stops the machine for a moment hits another script each time: a script's own time is its
    median over the runs.
    """
    scripts, readings = [], []
    for _ in range(args.rounds):
        with bench_redis() as (server, link):
            publish(link, load.warm_up(30))
            ticks = publish(link, load.entries(args.events, 30)) + 30 * load.WARM_BARS
            with _Held(link) as found, worker(server.url) as process:
                drain(process, server, lambda: decided(link), ticks)
            shas = [command.split()[1] for command, _ in found.ms if command[:8] == b"EVALSHA "]
            scripts.append(found.of(b"EVALSHA " + statistics.mode(shas)))
            readings.append(found.of(b"XREAD "))
    for what, runs in (("scripts of a drain", scripts), ("readings of a drain", readings)):
        same = list(zip(*runs, strict=False))  # what is beyond the shortest came after the drain
        assert max(map(len, runs)) - len(same) < 10, "expected runs that are the same"
        own = [statistics.median(times) for times in same]
        over = ", ".join(str(sum(ms > 1.0 for ms in run)) for run in runs)
        print(
            f"held       {what}: {len(own):,}, each one's median of {len(runs)} runs at most "
            f"{max(own):.2f} ms; over 1 ms in each run: {over}"
        )
    _others_hold(args)


def _others_hold(args: argparse.Namespace) -> None:
    """Let worker and collector meet 200 symbols' state and a backlog that nobody has collected."""
    symbols = 200
    with bench_redis() as (server, link), tempfile.TemporaryDirectory() as folder:

        def longest(*command: str) -> tuple[float, str]:
            with _Held(link) as found:
                words = (sys.executable, "-m", "worker.cli", *command, "--redis-url", server.url)
                with program(*words) as process:
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(OTHERS_S)
                    process.terminate()
                    process.wait(PATIENCE_S)
            looks = (b"SLOWLOG", b"CONFIG")
            return max(
                (ms, command.split()[0].decode())
                for command, ms in found.ms
                if not command.startswith(looks)
            )

        publish(link, load.warm_up(symbols))
        times = {"run, first": [longest("run")]}
        ticks = publish(link, load.entries(args.events, symbols))
        with worker(server.url) as process:
            until(process, lambda: decided(link) >= ticks, DRAIN_LOOK_S)
            process.terminate()
            process.wait(PATIENCE_S)
        times["run, again"] = [longest("run") for _ in range(3)]
        times["collect"] = [longest("collect", "--store", f"{folder}/{n}") for n in range(3)]
        times["uninstall"] = [longest("uninstall", "--dry-run") for _ in range(3)]
        for name, found in times.items():
            ms, what = statistics.median_low(found)
            print(f"held       {name}: longest command {ms:.2f} ms, {what}")


def _stopped_ms(seconds: float) -> list[float]:
    """Look at the clock for so long; returns how long it was kept from that, in ms."""
    gaps, last = [], time.perf_counter()
    end = last + seconds
    while last < end:
        now = time.perf_counter()
        if now - last > 5e-4:
            gaps.append((now - last) * 1e3)
        last = now
    return gaps


def pauses(_: argparse.Namespace) -> None:
    """Watch programs that only look at the clock, one for each core: what stops them stops all."""
    cores = os.cpu_count() or 1
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        found = [gap for gaps in pool.map(_stopped_ms, [PAUSES_S] * cores) for gap in gaps]
    print(
        f"pauses     {len(found) / PAUSES_S / cores:.1f} a second and core over 0.5 ms "
        f"(longest {max(found, default=0.0):.1f} ms) of programs that wait for nothing"
    )


PARTS = {
    part.__name__: part
    for part in (
        throughput,
        steps,
        peers,
        latency,
        bus,
        recovery,
        start,
        audit,
        memory,
        held,
        pauses,
    )
}


def main() -> None:
    """Measure and print."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--events", type=int, default=40_000)
    parser.add_argument("--symbols", type=int, nargs="+", default=[1, 30, 500])
    parser.add_argument("--form", nargs="+", choices=("json", "msgpack"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--start-events", type=int, default=100_000)
    parser.add_argument("--memory-events", type=int, default=1_000_000)
    args = parser.parse_args()
    args.form = args.form or ["json", "msgpack"]
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        parser.error(f"expected parts of {', '.join(PARTS)}, found {', '.join(sorted(unknown))}")
    for name in args.parts or ESSENTIAL:
        PARTS[name](args)


if __name__ == "__main__":
    main()
