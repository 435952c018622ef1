"""Do clients of the HTTP process slow the worker down? Its latency with and without them.

A private Redis, a worker and an HTTP process, ticks at a fixed rate. Phases alternate: nobody asks;
50 clients, of which 20 watch the stream and 30 ask a route each half second; 50 that ask as fast as
they are answered (most are told to wait). Latency is that of each decision: commit time minus the
id of its entry. Rounds alternate so that other load on the machine meets all phases alike.

    python bench/bench_api.py [--rate 500] [--seconds 8] [--rounds 4]
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
from multiprocessing.synchronize import Event
from pathlib import Path

import redis

from worker.embedded import RedisServer, leashed
from worker.keys import Keys

CLIENTS, WATCHING = 50, 20
PATHS = (
    "/healthz", "/readyz", "/metrics", "/api/v1/rl/v3/status", "/api/v1/rl-v3/dashboard/full",
)  # fmt: skip
PREDICT = json.dumps({"rsi": 55.0, "price_change_1m": 0.001, "regime": "TREND"})
PHASES = ("quiet", "50 clients", "flood")


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
    os.nice(10)  # in truth they are other machines
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
                body = {"symbol": f"S{n % 50}USDT", "price": 100.0 + n % 97 / 100, "qty": 1.0,
                        "timestamp": now}  # fmt: skip
                batch.xadd(key, {"payload": json.dumps(body)}, maxlen=20_000)
                n += 1
            batch.execute()
        time.sleep(0.002)


def latencies(link: redis.Redis, first: int, last: int) -> list[float]:
    """Return the latency in ms of each decision committed between two times in ms."""
    rows = link.xrange(Keys().decisions, first, last)
    return sorted(json.loads(fields[b"payload"])["latency_ms"] for _, fields in rows)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rate", type=float, default=500.0)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=4)
    asked = parser.parse_args()
    context = multiprocessing.get_context("spawn")
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
        link = redis.Redis.from_url(server.url)
        stop = context.Event()
        publisher = context.Process(target=publish, args=(server.url, asked.rate, stop))
        publisher.start()
        time.sleep(5.0)
        found: dict[str, list[list[float]]] = {phase: [] for phase in PHASES}
        answers: dict[str, list[tuple[int, int]]] = {phase: [] for phase in PHASES}
        results: multiprocessing.Queue[int] = context.Queue()
        for _ in range(asked.rounds):
            for phase in PHASES:
                crowd = None
                if phase != "quiet":
                    crowd = context.Process(
                        target=ask, args=(port, phase, asked.seconds + 3.0, results)
                    )
                    crowd.start()
                    time.sleep(2.5)  # it starts, and connects
                begun = int(time.time() * 1_000)
                time.sleep(asked.seconds)
                found[phase].append(latencies(link, begun, int(time.time() * 1_000)))
                if crowd is not None:
                    answers[phase].append((results.get(), results.get()))
                    crowd.join()
        stop.set()
        publisher.join()
        rss = int(Path(f"/proc/{programs['api'].pid}/statm").read_text().split()[1]) * 4_096
        for program in programs.values():
            program.terminate()
            program.wait()
    print(f"{asked.rate:g} ticks/s, 50 symbols, {asked.rounds} rounds of {asked.seconds:g} s")
    print(f"{'':12} {'decisions':>9} {'p50 ms':>8} {'p99 ms':>8}  {'to quiet':>8}  answers/s (429)")
    quiet = None
    for phase in PHASES:
        p99 = statistics.median(values[int(0.99 * len(values))] for values in found[phase])
        p50 = statistics.median(values[len(values) // 2] for values in found[phase])
        quiet = quiet or p99
        total = sum(map(len, found[phase]))
        line = f"{phase:12} {total:9,} {p50:8.2f} {p99:8.2f}  {p99 / quiet - 1:+8.1%}"
        if answers[phase]:
            seconds = len(answers[phase]) * (asked.seconds + 3.0)
            good, refused = (sum(column) / seconds for column in zip(*answers[phase], strict=True))
            line += f"  {good:.0f} ({refused:.0f})"
        print(line)
    print(f"HTTP process after all of it: {rss / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
