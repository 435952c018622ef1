"""What does the bus carry while things break? A seeded market, and a producer that outlives Redis.

Every tick carries its number within its symbol and a checksum over all of the symbol's prices so
far, so that any reader can tell a lost, doubled or swapped one.
"""

from __future__ import annotations

import json
import random
import threading
import time
import zlib
from collections.abc import Iterable, Sequence

import redis
from msgspec.structs import replace

from rlv3.market import simulate
from shadow.history import entries
from shadow.records import Entry, iso
from worker.keys import INPUTS, Keys

MINUTE_MS = 60_000
TICK = "market.tick"
SYMBOLS = ("AAAUSDT", "BBBUSDT", "CCCUSDT", "DDDUSDT")
POISON = (
    b"",
    b"{price: 1}",
    b'{"symbol": "AAAUSDT", "price": NaN}',
    b'{"symbol": "AAAUSDT", "price": "cheap"}',
    b'{"symbol": {"a": 1}, "price": 1.0}',
    b"\xdd\xff\xff\xff\xff",
)


def market(bars: int, ticks_per_bar: int, seed: int = 0, *, begin_ms: int = 0) -> list[Entry]:
    """Return ticks and signals of four symbols, all past, and a v2 decision about every signal.

    Args:
        begin_ms: event time of the first bar; 0 for one that ends the series just before now.
    """
    if not begin_ms:
        begin_ms = (int(time.time() * 1_000) // MINUTE_MS - bars - 1) * MINUTE_MS
    series = [
        simulate(
            "regime_switching", bars, seed=4 * seed + i, symbol=symbol, start_us=begin_ms * 1_000
        )
        for i, symbol in enumerate(SYMBOLS)
    ]
    public = list(entries(series, stream=Keys().stream, ticks_per_bar=ticks_per_bar))
    signals = [entry for entry in public if entry.event_type == "signal.generated"]
    return numbered(sorted([*public, *v2_decisions(signals)], key=in_order))


def numbered(history: Iterable[Entry]) -> list[Entry]:
    """Add number and checksum to every tick."""
    made = []
    numbers: dict[str, int] = {}
    sums: dict[str, int] = {}
    for entry in history:
        if entry.event_type == TICK:
            tick = json.loads(entry.fields[b"payload"])
            symbol = tick["symbol"]
            numbers[symbol] = tick["n"] = numbers.get(symbol, -1) + 1
            sums[symbol] = tick["sum"] = checksum(sums.get(symbol, 0), tick["price"])
            entry = replace(entry, fields={**entry.fields, b"payload": json.dumps(tick).encode()})
        made.append(entry)
    return made


def checksum(before: int, price: float) -> int:
    """Continue a symbol's checksum with a price."""
    return zlib.crc32(repr(price).encode(), before)


def poisoned(history: Sequence[Entry], rng: random.Random, n: int) -> list[Entry]:
    """Put n undecodable entries between the others."""
    made = list(history)
    for _ in range(n):
        at = rng.randrange(1, len(made))
        before = made[at - 1]
        ms, _, seq = before.entry_id.partition("-")
        entry_id = f"{ms}-{int(seq) + 500}"
        if at < len(made) and made[at].id_ms <= int(ms):
            continue  # no room for an id between these two
        fields = {b"payload": rng.choice(POISON)}
        made.insert(at, Entry(Keys().stream(TICK), TICK, entry_id, fields))
    return made


def in_order(entry: Entry) -> tuple[int, int, int]:
    """Sort key of the one defined order: (id, rank of the stream)."""
    ms, _, n = entry.entry_id.partition("-")
    return int(ms), int(n), INPUTS.index(entry.event_type)


def v2_decisions(signals: Sequence[Entry]) -> list[Entry]:
    """Return a decision three seconds after each signal, joinable by each rule in turn or by none.

    The last kind is about a symbol that nobody else knows.
    """
    made = []
    for i, signal in enumerate(signals):
        judged = json.loads(signal.fields[b"payload"])
        ts_us = signal.id_ms * 1_000
        payload: dict[str, object] = {
            "schema_version": 1,
            "decision_id": f"v2-{i}",
            "symbol": judged["symbol"],
            "timestamp": iso(ts_us + 3_000_000),
            "kind": "combined",
            "strategy": "dual_momentum",
            "model": "lstm",
            "weight": (0.5, 1.0, 1.5)[i % 3],
            "size_multiplier": 1.0,
            "leverage": 5,
            "signal_side": judged["side"],
            "signal_confidence": 0.7,
            "provenance": "q_table" if judged["symbol"] == "AAAUSDT" else "static_policy",
        }
        correlation = ""
        match i % 6:
            case 0:
                payload |= {
                    "source_stream": signal.stream, "source_entry_id": signal.entry_id,
                }  # fmt: skip
            case 1:
                payload["trace_id"] = judged["trace_id"]
            case 2:
                correlation = signal.fields[b"correlation_id"].decode()
            case 3:
                payload["event_ts"] = iso(ts_us)
            case 4:
                payload["event_ts"] = iso(ts_us - 10_000_000)
            case _:
                payload["symbol"] = "NOBODYUSDT"
        ms, _, n = signal.entry_id.partition("-")
        fields = {
            b"event_type": b"rl_v2.decision",
            b"payload": json.dumps(payload).encode(),
            b"trace_id": b"",
            b"correlation_id": correlation.encode(),
            b"timestamp": b"",
            b"source": b"rl_v2",
        }
        stream = Keys().stream("rl_v2.decision")
        made.append(Entry(stream, "rl_v2.decision", f"{int(ms) + 3_000}-{n}", fields))
    return made


def id_key(entry_id: str) -> tuple[int, int]:
    """Return an id as two numbers."""
    ms, _, seq = entry_id.partition("-")
    return int(ms), int(seq)


class Producer(threading.Thread):
    """Appends a history in its order, at a pace; what a failed Redis forgot, it appends again.

    Attributes:
        url: the server; may be changed, then call `rewind`.
        sent: entries that Redis has.
    """

    def __init__(
        self, url: str, history: Sequence[Entry], rng: random.Random, *, chunk: int, pause_s: float
    ) -> None:
        super().__init__(daemon=True)
        self.url = url
        self.history = history
        self.sent = 0
        self._rng = rng
        self._chunk = chunk
        self._pause_s = pause_s
        self.rewinding = False
        self._halted = False
        self._paused = False
        self._appending = threading.Lock()

    def rewind(self) -> None:
        """Look again at what Redis has, and continue from there, also after a pause."""
        self.rewinding = True
        self._paused = False

    def pause(self) -> None:
        """Append nothing until `rewind`: what a Redis lost must not be followed by newer ids."""
        self._paused = True
        with self._appending:
            return

    def halt(self) -> None:
        """Stop appending."""
        self._halted = True

    def done(self) -> bool:
        """Return True when Redis has everything."""
        return self.sent >= len(self.history) and not self.rewinding

    def run(self) -> None:
        """Append everything, until halted: Redis may lose something after the last entry."""
        url = self.url
        link = redis.Redis.from_url(url)
        while not self._halted:
            if self.done() or self._paused:
                time.sleep(0.005)
                continue
            try:
                if url != self.url:
                    url = self.url
                    link = redis.Redis.from_url(url)
                if self.rewinding:
                    self.sent = self._first_missing(link)
                    self.rewinding = False
                chunk = self.history[self.sent : self.sent + self._rng.randint(1, self._chunk)]
                with self._appending:
                    if self._paused:
                        continue
                    append(link, chunk)
                self.sent += len(chunk)
                time.sleep(self._rng.random() * self._pause_s)
            except redis.RedisError:
                self.rewinding = True
                time.sleep(0.02)
        link.close()

    def _first_missing(self, link: redis.Redis) -> int:
        newest: dict[str, tuple[int, int]] = {}
        for stream in {entry.stream for entry in self.history}:
            try:
                info = link.xinfo_stream(stream)
                newest[stream] = id_key(info["last-generated-id"].decode())
            except redis.ResponseError:  # no such stream
                newest[stream] = (0, 0)
        for i, entry in enumerate(self.history):
            if id_key(entry.entry_id) > newest[entry.stream]:
                return i
        return len(self.history)


def append(link: redis.Redis, chunk: Iterable[Entry]) -> None:
    """Append entries under their own ids; those that are there already stay as they are."""
    batch = link.pipeline(transaction=True)
    for entry in chunk:
        batch.xadd(entry.stream, dict(entry.fields), id=entry.entry_id)
    for reply in batch.execute(raise_on_error=False):
        if isinstance(reply, redis.RedisError) and "equal or smaller" not in str(reply):
            raise reply
