"""Measure the recorder: entries per second, memory and disk, and the audit's speed.

A worker decides a market on a private Redis while a recorder runs: that recording is audited. Then
its decisions and ticks are appended again and again under new ids, a million entries by default,
as fast as this machine can, and a recorder in a process of its own records them.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated

import psutil
import redis
import typer

from rlv3 import console
from shadow.records import Entry
from shadow.segments import read_position
from tests.chaos.workload import market
from worker import logs
from worker.artifact import load_policy
from worker.audit import audit
from worker.bus import Bus
from worker.config import WorkerConfig
from worker.embedded import RedisServer, leashed
from worker.keys import Keys
from worker.recorder import record
from worker.service import Worker

KEYS = Keys()
KEPT = 60_000
"""Entries that the private Redis keeps of each stream while the recorder is measured."""
app = typer.Typer(add_completion=False)


async def decide(server: RedisServer, history: list[Entry], out: Path) -> None:
    """Let a worker decide a history while a recorder runs."""
    config = WorkerConfig(
        source_url=server.url, sink_url=server.url, rl_v2="bus", start="oldest",
        max_event_age=None, conflate_after=None, decisions_cap=10_000_000,
    )  # fmt: skip
    bus = Bus(server.url, server.url, KEYS, config.inputs, decisions_cap=10_000_000)
    worker = Worker(config, bus, load_policy(config), None, logs.configure("ERROR"))
    stop = asyncio.Event()
    recording = asyncio.create_task(record(server.url, server.url, "quantum", out, stop=stop))
    working = asyncio.create_task(worker.run())
    while not (out / "snapshot.msgpack").exists():  # noqa: ASYNC110 - nobody could set an event
        await asyncio.sleep(0.01)
    await asyncio.to_thread(append, server.url, [(e.stream, dict(e.fields), e.entry_id)
                                                 for e in history])  # fmt: skip
    while sum(worker.pipeline.counts.values()) < len(history):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    worker.stop()
    await working
    stop.set()
    await recording
    await bus.close()


def append(url: str, rows: list[tuple[str, dict[bytes, bytes], str]]) -> None:
    """Append entries."""
    with redis.Redis.from_url(url) as link:
        for first in range(0, len(rows), 500):
            batch = link.pipeline(transaction=False)
            for stream, fields, entry_id in rows[first : first + 500]:
                batch.xadd(stream, fields, id=entry_id)
            batch.execute()


class Flood(threading.Thread):
    """Appends ticks and decisions by turns, no faster than the recorder reads."""

    def __init__(self, url: str, total: int) -> None:
        super().__init__(daemon=True)
        self.link = redis.Redis.from_url(url)
        self.total = total
        self.sent = 0
        self.recorded = 0

    def run(self) -> None:
        """Append it all."""
        streams = (KEYS.stream("market.tick"), KEYS.decisions)
        samples = [[f for _, f in self.link.xrange(s, count=4_000)] for s in streams]
        while self.sent < self.total:
            if self.sent - self.recorded > KEPT:
                time.sleep(0.005)
                continue
            batch = self.link.pipeline(transaction=False)
            for n in range(500):
                for stream, fields in zip(streams, samples, strict=True):
                    batch.xadd(stream, fields[(self.sent + n) % len(fields)], maxlen=2 * KEPT,
                               approximate=True)  # fmt: skip
            batch.execute()
            self.sent += 1_000


def recorded(out: Path) -> int:
    """Return how many entries are durable."""
    position = read_position(out)
    groups = {} if position is None else position.groups
    return sum(group.counts.get("entries", 0) for group in groups.values())


@app.command()
def bench(
    entries: Annotated[
        int, typer.Option(help="To record: half ticks, half decisions.")
    ] = 1_000_000,
) -> None:
    """Print what was measured."""
    with RedisServer.start() as server, tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "audited"
        history = market(100, 60)
        began = time.perf_counter()
        asyncio.run(decide(server, history, out))
        took = time.perf_counter() - began
        console.out.print(f"decided and recorded {len(history):,} events in {took:.1f} s")
        began, used = time.perf_counter(), time.process_time()
        found = audit(out)
        took, used = time.perf_counter() - began, time.process_time() - used
        console.out.print(
            f"audit: {found.entries / took:,.0f} events/s by the clock, "
            f"{found.entries / used:,.0f} per second of processor time, "
            f"{found.entries / took / 500:.0f} times 500 events/s; "
            f"{found.equal['decision']:,} decisions equal, {sum(found.different.values())} differ"
        )
        flood(server, Path(directory) / "flood", entries)


def flood(server: RedisServer, out: Path, entries: int) -> None:
    """Measure a recorder that is always behind."""
    command = [sys.executable, "-m", "worker.cli", "record", "--out", str(out),
               "--redis-url", server.url]  # fmt: skip
    recorder = subprocess.Popen(leashed(*command), stdout=subprocess.DEVNULL)
    process = psutil.Process(recorder.pid)
    while not (out / "snapshot.msgpack").exists():
        time.sleep(0.05)
    while process.children():  # the leash
        process = process.children()[0]
    flooding = Flood(server.url, entries)
    flooding.start()
    began, used = time.perf_counter(), sum(process.cpu_times()[:2])
    marks: list[float] = []
    while (done := recorded(out)) < entries:
        flooding.recorded = done
        if done >= len(marks) * entries // 10:
            marks.append(process.memory_info().rss / 1e6)
        time.sleep(0.02)
    took, used = time.perf_counter() - began, sum(process.cpu_times()[:2]) - used
    recorder.terminate()
    recorder.wait()
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    lost = sum(g.counts.get("lost", 0) for g in read_position(out).groups.values())
    console.out.print(
        f"record: {entries / took:,.0f} entries/s by the clock, {entries / used:,.0f} per second "
        f"of processor time (an event is two entries); {lost} missed; {size / entries:,.0f} bytes "
        f"of disk an entry; memory in MB along the way: {', '.join(f'{m:.0f}' for m in marks)}"
    )
    os.sync()


if __name__ == "__main__":
    console.run(app)
