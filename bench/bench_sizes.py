"""How much memory of Redis and how much disk does the shadow take? python bench/bench_sizes.py

A worker and a collector follow simulated bars on a private Redis; what they leave there and in the
store is weighed, and the runbook's tables of retention and sizing are computed from it.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from pathlib import Path

import redis

from rlv3.market import simulate
from shadow.history import entries
from shadow.rl_v2 import QTables
from worker import logs
from worker.artifact import load_policy
from worker.bus import Bus
from worker.collector import collect
from worker.config import load_config
from worker.embedded import RedisServer
from worker.keys import Keys
from worker.service import Worker

KEYS = Keys()
DAY_S = 86_400


async def follow(url: str, store: Path, wanted: int) -> None:
    """Run worker and collector until so many entries were decided and stored."""
    config = load_config(
        {"redis_url": url, "start": "oldest", "max_event_age": "off", "conflate_after": "off"}, {}
    )
    bus = Bus(config.source_url, config.sink_url, KEYS, config.inputs)
    log = logs.configure("ERROR")
    worker = Worker(config, bus, load_policy(config), QTables.load(None), log)
    stop = asyncio.Event()
    running = asyncio.create_task(worker.run())
    collecting = asyncio.create_task(collect(url, "quantum", store, stop=stop))
    while sum(worker.pipeline.counts.values()) < wanted:  # noqa: ASYNC110 - counts have no event
        await asyncio.sleep(0.1)
    worker.stop()
    await running
    stop.set()
    await collecting
    await bus.close()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--symbols", type=int, default=10)
    parser.add_argument("--bars", type=int, default=240)
    options = parser.parse_args()
    bars = [
        simulate("regime_switching", options.bars, seed=n, symbol=f"S{n:02}USDT")
        for n in range(options.symbols)
    ]
    history = list(entries(bars, stream=KEYS.stream, ticks_per_bar=8))
    with (
        RedisServer.start() as server,
        redis.Redis.from_url(server.url) as link,
        tempfile.TemporaryDirectory() as place,
    ):
        with link.pipeline(transaction=False) as batch:
            for entry in history:
                batch.xadd(entry.stream, dict(entry.fields), id=entry.entry_id)
            batch.execute()
        asyncio.run(follow(server.url, Path(place), len(history)))
        report(link, Path(place), options.symbols, options.bars, len(history))


def report(link: redis.Redis, store: Path, symbols: int, bars: int, events: int) -> None:
    """Print bytes per entry, and what that makes in a day."""

    def weigh(key: str) -> int:
        return int(link.memory_usage(key, samples=0) or 0)

    decision = weigh(KEYS.decisions) / link.xlen(KEYS.decisions)
    rows = link.xlen(KEYS.comparisons)
    comparison = weigh(KEYS.comparisons) / rows
    state = [weigh(key.decode()) for key in link.scan_iter(f"{KEYS.own}state:?*")]
    files = {
        name: sum(path.stat().st_size for path in (store / name).rglob("*.parquet"))
        for name in sorted(path.name for path in store.iterdir() if path.is_dir())
    }
    disk_bar = sum(size for name, size in files.items() if name != "decisions") / (symbols * bars)
    disk_decision = files.get("decisions", 0) / events
    per_bar = rows / (symbols * bars)
    print(f"{events:,} events, {symbols} symbols, {bars} bars each, Redis {version(link)}\n")
    print("| what | bytes |\n|---|---|")
    print(f"| a decision in Redis | {decision:,.0f} |")
    print(f"| a comparison in Redis | {comparison:,.0f} |")
    print(f"| comparisons per symbol and bar | {per_bar:.2f} rows |")
    print(f"| state of a symbol in Redis | {sum(state) / len(state):,.0f} |")
    print(f"| a decision in the store | {disk_decision:,.0f} |")
    print(f"| comparisons of a symbol's bar in the store | {disk_bar:,.0f} |\n")
    print("| symbols | ticks/s | Redis, MB | 50,000 decisions last | store, MB a day |\n"
          "|---|---|---|---|---|")  # fmt: skip
    for n, rate in ((10, 5), (30, 27), (200, 200), (200, 2_000)):
        memory = 50_000 * (decision + comparison) + n * sum(state) / len(state)
        daily = rate * DAY_S * disk_decision + n * (DAY_S / 60) * disk_bar
        hours = 50_000 / rate / 3_600
        lasts = f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"
        print(f"| {n} | {rate:,} | {memory / 1e6:,.0f} | {lasts} | {daily / 1e6:,.0f} |")


def version(link: redis.Redis) -> str:
    """Return the server's version."""
    return str(link.info("server")["redis_version"])


if __name__ == "__main__":
    main()
