"""Killed, cut off, started twice, live or late: the output is that of one undisturbed run."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shadow.records import (
    BarRow,
    Comparison,
    Decision,
    Output,
    decode_comparison,
    decode_decision,
    encode,
)
from shadow.store import RECORDS, StoreReader
from tests.chaos.oracle import undisturbed
from tests.chaos.workload import market
from worker.embedded import RedisServer

MINUTE_MS = 60_000
TABLES = {record: table for table, record in RECORDS.items()}


# -- what should have come out --------------------------------------------------------------------


def rows_of(outputs: Sequence[Output]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return table -> id -> columns, as the store must hold them."""
    tables: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in RECORDS}
    for output in outputs:
        record: Decision | Comparison
        if output.event_type == "rl_v3.decision":
            record = decode_decision(output.payload)
            identity = record.decision_id
        else:
            record = decode_comparison(output.payload)
            identity = record.record_id
        columns = json.loads(encode(record))
        columns.pop("latency_ms", None)
        if isinstance(record, BarRow):
            for arm, values in columns.pop("arms").items():
                columns |= {f"{arm}_{name}": value for name, value in values.items()}
        if not isinstance(record, Decision):
            del columns["kind"]
        assert identity not in tables[TABLES[type(record)]], f"{identity} came twice"
        tables[TABLES[type(record)]][identity] = columns
    return tables


def rows_in(store: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Return table -> id -> columns as the store holds them; every id once."""
    reader = StoreReader(store)
    for name, group in reader.position.groups.items():
        for trouble in ("repeated", "rejected", "lost"):
            assert group.counts.get(trouble, 0) == 0, f"{name}: {trouble}"
    tables = {}
    with reader.connect() as connection:
        for table in RECORDS:
            identity = "decision_id" if table == "decisions" else "record_id"
            hidden = ["stream_id", "event_time"]
            hidden += ["event_ts_us", "latency_ms"] if table == "decisions" else []
            found = connection.execute(f"SELECT * EXCLUDE ({', '.join(hidden)}) FROM {table}")
            names = [column[0] for column in found.description]
            rows = [dict(zip(names, row, strict=True)) for row in found.fetchall()]
            tables[table] = {row[identity]: row for row in rows}
            assert len(tables[table]) == len(rows), f"{table} holds an id twice"
    return tables


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare tables of rows, naming the first difference."""
    for table, rows in expected.items():
        assert found[table].keys() == rows.keys(), table
        for identity, row in rows.items():
            assert found[table][identity] == row, f"{table} {identity}"


# -- live, catch-up, audit ------------------------------------------------------------------------


def sequence(bus: Any) -> list[list[dict[str, Any]]]:
    """Return the payloads of both of our streams in order, without what a replay changes."""
    streams = [bus.payloads("rl_v3.decision"), bus.payloads("rl_v3.comparison")]
    for decision in streams[0]:
        del decision["latency_ms"]
    return streams


def test_three_interleaved_streams_give_the_same_output_live_in_catch_up_and_in_audit(
    tier: str, bus: Any, second_server: RedisServer, open_bus: Any, start: Any, lively_policy: Path,
    tmp_path: Path, wait_until: Any,
) -> None:  # fmt: skip
    history = market(bars=60, ticks_per_bar=3)
    assert len({entry.stream for entry in history}) == 3
    options = (
        "--policy", lively_policy, "--start", "oldest", "--conflate-after", "off",
        "--max-event-age", "off",
    )  # fmt: skip

    live = start("run", "--redis-url", bus.url, *options)
    recording = tmp_path / "recording"
    recorder = start("record", "--redis-url", bus.url, "--out", recording)
    wait_until((recording / "snapshot.msgpack").exists, recorder.said)
    for i, entry in enumerate(history):
        bus.add([entry])
        if i % 7 == 0:
            time.sleep(0.002)
    bus.wait_for_counts(len(history))
    assert live.stop() == 0, live.said()
    assert recorder.stop() == 0, recorder.said()

    late = open_bus(second_server.url)
    late.add(history)
    catching_up = start("run", "--redis-url", late.url, *options)
    late.wait_for_counts(len(history))
    assert catching_up.stop() == 0, catching_up.said()

    expected = [
        [
            json.loads(o.payload)
            for o in undisturbed(history, lively_policy, counted=tier == "7")[0]
            if o.event_type == t
        ]
        for t in ("rl_v3.decision", "rl_v3.comparison")
    ]
    for decision in expected[0]:
        del decision["latency_ms"]
    assert sequence(late) == expected
    assert sequence(bus) == expected

    audit = start("audit", "--recording", recording)
    assert audit.wait() == 0, audit.said()
    assert f"entries folded: {len(history):,}" in audit.said()


# -- kill -9 --------------------------------------------------------------------------------------


def test_killed_at_random_moments_the_worker_neither_loses_nor_doubles_a_decision(
    bus: Any, start: Any, lively_policy: Path, tmp_path: Path, tier: str, wait_until: Any
) -> None:
    history = market(bars=500, ticks_per_bar=10)
    assert sum(entry.event_type == "market.tick" for entry in history) == 20_000
    rng = np.random.default_rng([9, int(tier[0])])
    store = tmp_path / "store"
    collector = start("collect", "--redis-url", bus.url, "--store", store)

    def publish() -> None:
        for i in range(0, len(history), 1_000):
            bus.add(history[i : i + 1_000])
            time.sleep(0.2)

    publisher = threading.Thread(target=publish)
    publisher.start()
    options = (
        "run", "--redis-url", bus.url, "--policy", lively_policy, "--start", "oldest",
        "--conflate-after", "off", "--max-event-age", "off",
    )  # fmt: skip
    for moment in np.sort(rng.integers(0, len(history) - 2_000, 7)):
        worker = start(*options)
        wait_until(lambda after=moment: sum(bus.counts().values()) >= after, worker.said)
        time.sleep(rng.uniform(0.0, 0.02))
        worker.kill()
    worker = start(*options)
    counts = bus.wait_for_counts(len(history))
    publisher.join()
    assert worker.stop() == 0, worker.said()
    assert collector.stop() == 0, collector.said()

    outputs, expected_counts = undisturbed(history, lively_policy, counted=tier == "7")
    assert counts == expected_counts
    expected = rows_of(outputs)
    assert len(expected["decisions"]) == sum(e.event_type != "rl_v2.decision" for e in history)
    assert {row["rule"] for row in expected["pairs"].values()} == {1, 2, 3, 4, 5}
    assert len(expected["bars"]) == 4 * 499
    assert_same(rows_in(store), expected)


# -- Redis goes away ------------------------------------------------------------------------------


def test_redis_away_for_seconds_costs_nothing(
    tier: str, durable_server: RedisServer, open_bus: Any, start: Any, lively_policy: Path,
    tmp_path: Path, wait_until: Any,
) -> None:  # fmt: skip
    bus = open_bus(durable_server.url)
    history = market(bars=60, ticks_per_bar=4)
    half = len(history) // 2
    store = tmp_path / "store"
    worker = start(
        "run", "--redis-url", bus.url, "--policy", lively_policy, "--start", "oldest",
        "--conflate-after", "off", "--max-event-age", "off",
    )  # fmt: skip
    collector = start("collect", "--redis-url", bus.url, "--store", store)
    bus.add(history[:half])
    bus.wait_for_counts(half // 2)
    wait_until(lambda: bus.link.exists(bus.keys.collected), collector.said)
    durable_server.kill()
    time.sleep(3.0)
    durable_server.restart()
    bus.add(history[half:])
    counts = bus.wait_for_counts(len(history))
    assert worker.stop() == 0, worker.said()
    assert collector.stop() == 0, collector.said()

    outputs, expected_counts = undisturbed(history, lively_policy, counted=tier == "7")
    assert counts == expected_counts
    assert_same(rows_in(store), rows_of(outputs))


# -- two workers ----------------------------------------------------------------------------------


def test_of_two_workers_the_first_is_fenced_and_says_so(
    tier: str, bus: Any, start: Any, lively_policy: Path, wait_until: Any
) -> None:
    history = market(bars=40, ticks_per_bar=2)
    options = (
        "run", "--redis-url", bus.url, "--policy", lively_policy, "--start", "oldest",
        "--conflate-after", "off", "--max-event-age", "off",
    )  # fmt: skip
    first = start(*options)
    bus.add(history[:100])
    bus.wait_for_counts(100)
    second = start(*options)
    wait_until(lambda: "WORKER_STARTED" in second.said(), second.said)
    bus.add(history[100:])
    assert first.wait() == 3, first.said()
    last = first.said().strip().splitlines()[-1]
    assert "another worker took over" in last
    assert "Traceback" not in first.said()
    counts = bus.wait_for_counts(len(history))
    assert second.stop() == 0, second.said()
    assert counts == undisturbed(history, lively_policy, counted=tier == "7")[1]
