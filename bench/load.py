"""What does the bus carry while the worker is measured? Ticks and signals in production's envelope.

Prices are random walks, symbols come in turn, and every `SIGNAL_EVERY`-th entry is a signal, which
RL v2's reference answers, so that pairing, arms and comparisons have their share. Before the
measured entries come `warm_up`'s: one tick per symbol and bar, until every symbol is warm.

    python bench/load.py URL RATE SECONDS SYMBOLS

appends ticks at a rate, each with an XADD of its own and an id that Redis gives (in tens where one
by one would be too slow), and prints how many and the p99 of an XADD as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgpack
import numpy as np
import redis

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from shadow.records import Entry
from worker.keys import Keys

START_MS = 1_700_000_040_000
TICK, SIGNAL = "market.tick", "signal.generated"
TICK_MS = 2.0
"""Event time between entries: the bars of 500 entries a second."""
SIGNAL_EVERY = 200
WARM_BARS = 33
BAR_MS = 60_000


ONE_BY_ONE = 4_000
"""Entries a second up to which every entry is an XADD of its own."""


def warm_up(symbols: int, *, form: str = "json", until_ms: int = START_MS) -> Iterator[Entry]:
    """Yield what makes every symbol warm, just before `until_ms`, where `entries` begins."""
    return entries(
        WARM_BARS * symbols,
        symbols,
        form=form,
        tick_ms=BAR_MS / symbols,
        signal_every=0,
        start_ms=until_ms - WARM_BARS * BAR_MS,
    )


def entries(
    n: int,
    symbols: int,
    *,
    form: str = "json",
    tick_ms: float = TICK_MS,
    signal_every: int = SIGNAL_EVERY,
    start_ms: int = START_MS,
) -> Iterator[Entry]:
    """Yield entries in the defined order, ids equal to event time.

    Args:
        n: how many, signals included.
        symbols: how many symbols, in turn.
        form: json or msgpack payloads.
        tick_ms: event time from one to the next.
        signal_every: one in so many is a signal; 0 for none.
        start_ms: event time of the first.
    """
    pack = msgpack.packb if form == "msgpack" else _json
    rng = np.random.default_rng(start_ms)
    logs = np.log(100.0) + np.zeros(symbols)
    moves = rng.normal(0.0, 2e-4, n)
    volumes = rng.exponential(1.0, n)
    keys, last = Keys(), ""
    for i in range(n):
        ms = start_ms + int(i * tick_ms)
        place = i % symbols
        logs[place] += moves[i]
        body: dict[str, object] = {
            "symbol": f"SYM{place:03d}USDT",
            "price": round(float(np.exp(logs[place])), 4),
            "timestamp": ms / 1000,
        }
        name = TICK
        if signal_every and i % signal_every == signal_every - 1:
            name = SIGNAL
            body |= {"side": "BUY" if moves[i] > 0.0 else "SELL", "confidence": 0.8}
        else:
            body["volume"] = round(float(volumes[i]), 4)
        fields = {
            b"event_type": name.encode(),
            b"payload": pack(body),
            b"trace_id": b"",
            b"correlation_id": f"bench-{i}".encode(),
            b"timestamp": b"2023-11-14T22:14:00.000000",
            b"source": b"bench",
        }
        head, seq = str(ms), 0
        if last.startswith(f"{head}-"):
            seq = int(last.partition("-")[2]) + 1
        last = f"{head}-{seq}"
        yield Entry(keys.stream(name), name, last, fields)


def _json(body: dict[str, object]) -> bytes:
    return json.dumps(body).encode()


def produce(url: str, rate: int, seconds: float, symbols: int) -> None:
    """Append ticks at a rate and print what that took."""
    made = entries(int(rate * seconds), symbols, signal_every=0)
    size = 1 if rate <= ONE_BY_ONE else 10
    took: list[float] = []
    sent = 0
    with redis.Redis.from_url(url) as link:
        link.ping()
        began = time.perf_counter()
        chunk: list[dict[bytes, bytes]] = []
        for entry in made:
            now = {**json.loads(entry.fields[b"payload"]), "timestamp": time.time()}
            chunk.append({**entry.fields, b"payload": _json(now)})
            if len(chunk) < size:
                continue
            ahead = began + sent / rate - time.perf_counter()
            if ahead > 0.0:
                time.sleep(ahead)
            start = time.perf_counter()
            with link.pipeline(transaction=False) as pipe:
                for fields in chunk:
                    pipe.xadd(entry.stream, fields)  # type: ignore[arg-type]
                pipe.execute()
            took.append((time.perf_counter() - start) * 1e3)
            sent += len(chunk)
            chunk = []
    p99 = sorted(took)[int(0.99 * len(took))]
    print(json.dumps({"sent": sent, "p99_ms": p99, "seconds": time.perf_counter() - began}))


if __name__ == "__main__":
    produce(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
