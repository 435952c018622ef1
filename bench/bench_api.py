"""Do clients of the HTTP process slow the worker down? Its latency with and without them.

A private Redis, a worker and an HTTP process, ticks at a fixed rate. Two phases make a pair: nobody
asks; 50 clients, of which 20 watch the stream and 30 ask a route each half second. Pairs alternate
in their order, so that whatever else goes on meets both alike, and each gives one ratio of the two
99th percentiles; the figure is the median of these. With --flood come pairs in which the 50 ask as
fast as they are answered (most are told to wait). The clients run only while nothing else wants to,
since in truth they are other machines; the HTTP process lowers its priority itself.

    python bench/bench_api.py [--rate 2000] [--seconds 6] [--pairs 8] [--flood]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import NamedTuple

import redis

from shadow.records import decode_decision
from worker.embedded import RedisServer, leashed
from worker.keys import Keys

CLIENTS, WATCHING = 50, 20
SYMBOLS = 50
START_S = 2.5
PATHS = (
    "/healthz", "/readyz", "/metrics", "/api/v1/rl/v3/status", "/api/v1/rl-v3/dashboard/full",
)  # fmt: skip
PREDICT = json.dumps({"rsi": 55.0, "price_change_1m": 0.001, "regime": "TREND"})


async def client(port: int, number: int, phase: str, answered: list[int]) -> None:
    """One client, from an address of its own."""
    rng = random.Random(number)
    while True:
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", port, local_addr=(f"127.0.1.{number + 1}", 0)
        )
        try:
            if phase != "flood" and number < WATCHING:
                writer.write(b"GET /api/v1/rl/v3/stream HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
                while await reader.read(65_536):
                    pass
            while True:
                if rng.random() < 0.2:
                    head = (
                        "POST /api/v1/rl/v3/predict HTTP/1.1\r\nHost: 127.0.0.1\r\n"
                        f"Content-Type: application/json\r\nContent-Length: {len(PREDICT)}"
                        f"\r\n\r\n{PREDICT}"
                    )
                else:
                    head = f"GET {rng.choice(PATHS)} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
                writer.write(head.encode())
                answer = await reader.readuntil(b"\r\n\r\n")
                length = int(answer.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
                await reader.readexactly(length)
                answered.append(int(answer.split(b" ")[1]))
                if phase != "flood":
                    await asyncio.sleep(0.5)
        except (OSError, asyncio.IncompleteReadError, ValueError):
            await asyncio.sleep(0.1)
        finally:
            writer.close()


def ask(port: int, phase: str, seconds: float, results: multiprocessing.Queue[int]) -> None:
    """Run all clients for a while; put how many answers there were, and how many refusals."""
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))  # in truth they are elsewhere
    answered: list[int] = []

    async def all_of_them() -> None:
        tasks = [asyncio.create_task(client(port, n, phase, answered)) for n in range(CLIENTS)]
        await asyncio.sleep(seconds)
        for task in tasks:
            task.cancel()

    asyncio.run(all_of_them())
    results.put(sum(code == 200 for code in answered))
    results.put(sum(code == 429 for code in answered))


def publish(url: str, rate: float, stop: Event) -> None:
    """Append ticks evenly until told to stop."""
    link, key = redis.Redis.from_url(url), Keys().stream("market.tick")
    begun, n = time.time(), 0
    while not stop.is_set():
        now = time.time()
        with link.pipeline(transaction=False) as batch:
            while n < (now - begun) * rate:
                body = {"symbol": f"S{n % SYMBOLS}USDT", "price": 100.0 + n % 97 / 100, "qty": 1.0,
                        "timestamp": now}  # fmt: skip
                batch.xadd(key, {"payload": json.dumps(body)}, maxlen=20_000)
                n += 1
            batch.execute()
        time.sleep(0.002)


def latencies(link: redis.Redis, first: int, last: int) -> list[float]:
    """Return the latency in ms of each decision committed between two times in ms.

    From a tick's time, taken just before its XADD, to Redis's clock at the decision's.
    """
    rows = link.xrange(Keys().decisions, first, last)
    return [
        float(entry_id.partition(b"-")[0]) + 0.5 - _ms(decode_decision(fields[b"payload"]).event_ts)
        for entry_id, fields in rows
    ]


def _ms(stamp: str) -> float:
    return datetime.fromisoformat(stamp).timestamp() * 1e3


def quantile(values: list[float], q: float) -> float:
    """Return a quantile of measurements."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def cpu_s(pid: int) -> float:
    """Return the CPU seconds a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss_bytes(pid: int) -> int:
    """Return the resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Phase(NamedTuple):
    """What was measured in one phase."""

    decisions: int
    p50: float
    p99: float
    answers: float = 0.0
    """A second."""
    refused: float = 0.0
    cpu: float = 0.0
    """Of the HTTP process, a share of one core."""


class Stage:
    """The programs, and the ticks that come all the time."""

    def __init__(self, server: RedisServer, port: int, api: int, seconds: float) -> None:
        self.link = redis.Redis.from_url(server.url)
        self.port, self.api, self.seconds = port, api, seconds
        self.context = multiprocessing.get_context("spawn")

    def measure(self, phase: str) -> Phase:
        """Measure for a while, with or without clients."""
        answers, refused, crowd = 0.0, 0.0, None
        results: multiprocessing.Queue[int] = self.context.Queue()
        if phase != "quiet":
            long = self.seconds + START_S + 0.5
            crowd = self.context.Process(target=ask, args=(self.port, phase, long, results))
            crowd.start()
        time.sleep(START_S)  # clients start and connect; what was read before is forgotten
        begun, used = int(time.time() * 1_000), cpu_s(self.api)
        time.sleep(self.seconds)
        cpu = (cpu_s(self.api) - used) / self.seconds
        ended = int(time.time() * 1_000)
        if crowd is not None:
            answers, refused = (results.get() / long for _ in range(2))
            crowd.join()
        found = latencies(self.link, begun, ended)
        if not found:
            raise SystemExit("expected decisions while ticks come, found none")
        return Phase(len(found), quantile(found, 0.5), quantile(found, 0.99), answers, refused, cpu)


@contextmanager
def stage(rate: float, seconds: float) -> Iterator[Stage]:
    """Run everything."""
    with tempfile.TemporaryDirectory() as place, RedisServer.start() as server:
        logs = Path(place)
        programs = {}
        for name, *flags in (("run",), ("api", "--http", "127.0.0.1:0")):
            with (logs / name).open("w") as log:
                programs[name] = subprocess.Popen(
                    leashed(sys.executable, "-m", "worker.cli", name, "--redis-url", server.url,
                            *flags),
                    stdout=log,
                )  # fmt: skip
        while "API_LISTENS" not in (text := (logs / "api").read_text()):
            time.sleep(0.1)
        port = int(json.loads(text.splitlines()[0])["msg"].rpartition(":")[2])
        found = Stage(server, port, programs["api"].pid, seconds)
        stop = found.context.Event()
        publisher = found.context.Process(target=publish, args=(server.url, rate, stop))
        publisher.start()
        try:
            time.sleep(5.0)
            yield found
        finally:
            stop.set()
            publisher.join()
            for program in programs.values():
                program.terminate()
                program.wait()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rate", type=float, default=2_000.0)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--flood", action="store_true", help="pairs of the third kind, too")
    asked = parser.parse_args()
    print(
        f"{asked.rate:g} ticks/s, {SYMBOLS} symbols, {asked.pairs} pairs of phases of "
        f"{asked.seconds:g} s, load {os.getloadavg()[0]:.1f} at the start"
    )
    with stage(asked.rate, asked.seconds) as found:
        for crowd in ("50 clients", *(["flood"] if asked.flood else [])):
            pairs = []
            for number in range(asked.pairs):
                order = ("quiet", crowd) if number % 2 == 0 else (crowd, "quiet")
                pair = {phase: found.measure(phase) for phase in order}
                pairs.append((pair["quiet"], pair[crowd]))
                show(f"pair {number + 1}, {crowd}", *pairs[-1])
            conclude(crowd, pairs)
        rss = rss_bytes(found.api)
    print(f"HTTP process after all of it: {rss / 1e6:.0f} MB")


def show(name: str, quiet: Phase, crowd: Phase) -> None:
    """Print one pair."""
    print(
        f"{name}: p50 {quiet.p50:.2f} -> {crowd.p50:.2f} ms, p99 {quiet.p99:.2f} -> "
        f"{crowd.p99:.2f} ms ({crowd.p99 / quiet.p99 - 1:+.1%}), {quiet.decisions:,} and "
        f"{crowd.decisions:,} decisions, {crowd.answers:.0f} answers/s, "
        f"{crowd.refused:.0f} refusals/s, HTTP process {quiet.cpu:.0%} -> {crowd.cpu:.0%} of a core"
    )


def conclude(crowd: str, pairs: list[tuple[Phase, Phase]]) -> None:
    """Print the medians over pairs, and the middle half of what the pairs said."""
    ratios = [busy.p99 / quiet.p99 - 1 for quiet, busy in pairs]
    middle = [statistics.median(pair[side].p99 for pair in pairs) for side in (0, 1)]
    print(
        f"{crowd}: worker's p99 {middle[0]:.2f} -> {middle[1]:.2f} ms; median change over "
        f"{len(pairs)} pairs {statistics.median(ratios):+.1%} "
        f"(half of them {quantile(ratios, 0.25):+.1%} to {quantile(ratios, 0.75):+.1%})"
    )


if __name__ == "__main__":
    main()
