"""The ordinary consumer that the worker is compared with: XREADGROUP, XADD, XACK, XAUTOCLAIM.

Library defaults throughout, written as the client's own examples are: a consumer group, an output
per entry, an acknowledgement after it, and XAUTOCLAIM for what a dead consumer left. It keeps its
state (a number and a checksum for each symbol) in Redis, written before each output, as it must.
"""

from __future__ import annotations

import json
import os
import time

import redis

from shadow.records import Entry
from tests.chaos.oracle import KEYS, Ledger, Verdict, compare
from tests.chaos.programs import Forked, wait_until
from tests.chaos.stage import Stage
from tests.chaos.workload import TICK, checksum

GROUP = "quantum:group:naive:market.tick"
STATE = "quantum:naive:state"
OUTPUT = "quantum:stream:naive.decision"
IDLE_MS = 200
"""After which another consumer's entries are claimed."""
QUIET_S = 0.6
COMPARED = (1, 2, 3, 4, 16, 18)
"""Faults that it plays, too."""


def consume(url: str) -> None:
    """Consume ticks until killed; a supervisor starts it again when it fails."""
    link = redis.Redis.from_url(url)
    name = f"consumer-{os.getpid()}"
    tick = KEYS.stream(TICK)
    try:
        link.xgroup_create(tick, GROUP, "0", mkstream=True)
    except redis.ResponseError as error:
        if "BUSYGROUP" not in str(error):
            raise
    while True:
        claimed = link.xautoclaim(tick, GROUP, name, min_idle_time=IDLE_MS, count=10)[1]
        for entry_id, fields in claimed:
            _handle(link, entry_id, fields)
        for _, entries in link.xreadgroup(GROUP, name, {tick: ">"}, count=10, block=100) or ():
            for entry_id, fields in entries:
                _handle(link, entry_id, fields)


def _handle(link: redis.Redis, entry_id: bytes, fields: dict[bytes, bytes]) -> None:
    symbol, price = _read(fields.get(b"payload", b""))
    if symbol:
        before = json.loads(link.hget(STATE, symbol) or '{"n": -1, "sum": 0}')
        state = {"n": before["n"] + 1, "sum": checksum(before["sum"], price)}
        link.hset(STATE, symbol, json.dumps(state))
        row = {"decision_id": entry_id.decode(), "symbol": symbol, **state}
        link.xadd(OUTPUT, {"payload": json.dumps(row)})
    link.xack(KEYS.stream(TICK), GROUP, entry_id)


def _read(payload: bytes) -> tuple[str, float]:
    """Return symbol and price; no symbol for what cannot be decoded."""
    try:
        tick = json.loads(payload)
        return str(tick["symbol"]), float(tick["price"])
    except (ValueError, KeyError, TypeError):
        return "", 0.0


# -- the same faults, on the same stage -----------------------------------------------------------


def play_naive(stage: Stage, number: int) -> Verdict:
    """Play a fault against it; whoever fails is started again, as a supervisor does."""
    {1: _kill, 2: _freeze, 3: _lose_replies, 4: _kill_redis, 16: _fill, 18: _trim}[number](stage)
    wait_until(stage.producer.done)
    _supervise(stage, QUIET_S)
    return _judge(stage)


def _begin(stage: Stage) -> Forked:
    stage.producer.start()
    consumer = stage.naive()
    _until(stage, stage.rng.randint(1, len(stage.history) // 3))
    return consumer


def _until(stage: Stage, n: int) -> None:
    """Wait until so much was put out, starting it again when it fails."""
    wait_until(lambda: _alive(stage) and stage.link.xlen(OUTPUT) >= n)


def _some_more(stage: Stage) -> None:
    now = stage.link.xlen(OUTPUT)
    left = sum(entry.event_type == TICK for entry in stage.history) - now
    if left > 40:
        _until(stage, now + stage.rng.randint(1, left // 4))


def _alive(stage: Stage) -> bool:
    if not stage.programs[-1].running:
        stage.naive()
    return True


def _supervise(stage: Stage, quiet_s: float) -> None:
    """Keep it running until nothing has come out for a while."""
    newest, since = -1, time.monotonic()
    while time.monotonic() - since < quiet_s:
        _alive(stage)
        if (length := stage.link.xlen(OUTPUT)) != newest:
            newest, since = length, time.monotonic()
        time.sleep(0.01)


def _kill(stage: Stage) -> None:
    consumer = _begin(stage)
    for _ in range(stage.rng.randint(2, 4)):
        moment = stage.rng.choice(("XADD", "HSET", "XACK", "any"))
        if moment == "any":
            time.sleep(stage.rng.random() * 0.03)
            consumer.kill()
        else:
            trap = stage.proxy.set_trap("reply", stage.rng.randint(1, 20), mark=f"{moment}\r\n")
            wait_until(lambda trap=trap: trap.sprung.is_set() or stage.producer.done())
            consumer.kill()
            trap.release(forward=False)
        consumer = stage.naive()
        _some_more(stage)


def _freeze(stage: Stage) -> None:
    zombie = _begin(stage)
    zombie.freeze()
    time.sleep(IDLE_MS / 1_000)
    stage.naive()
    _some_more(stage)
    zombie.thaw()


def _lose_replies(stage: Stage) -> None:
    _begin(stage)
    for _ in range(stage.rng.randint(3, 8)):
        stage.proxy.lose_replies = 1
        _some_more(stage)


def _kill_redis(stage: Stage) -> None:
    _begin(stage)
    for _ in range(stage.rng.randint(1, 2)):
        stage.server.kill()
        time.sleep(stage.rng.random() * 0.1)
        stage.server.restart()
        _some_more(stage)


def _fill(stage: Stage) -> None:
    _begin(stage)
    for _ in range(2):
        used = int(stage.link.info("memory")["used_memory"])
        stage.link.config_set("maxmemory", max(1, used + stage.rng.randint(-50_000, 50_000)))
        time.sleep(0.05 + stage.rng.random() * 0.2)
        stage.link.config_set("maxmemory", 0)
        _some_more(stage)


def _trim(stage: Stage) -> None:
    consumer = _begin(stage)
    for _ in range(stage.rng.randint(1, 3)):
        consumer.kill()
        stage.produce_more()
        stage.trim()
        consumer = stage.naive()
        time.sleep(stage.rng.random() * 0.1)


def _judge(stage: Stage) -> Verdict:
    expected = [row for entry in stage.history if (row := _expected(entry)) is not None]
    found = [json.loads(fields[b"payload"]) for _, fields in stage.link.xrange(OUTPUT)]
    return compare(Ledger(expected, []), Ledger(found, []))._replace(problems=())


def _expected(entry: Entry) -> dict[str, object] | None:
    if entry.event_type != TICK or b'"n"' not in entry.fields[b"payload"]:
        return None
    tick = json.loads(entry.fields[b"payload"])
    return {
        "decision_id": entry.entry_id,
        "symbol": tick["symbol"],
        "n": tick["n"],
        "sum": tick["sum"],
    }
