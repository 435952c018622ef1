"""Every entry of our streams is in the store exactly once, whatever happens to the collector."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
import redis

from rlv3.errors import ConfigError, DataError, OutOfMemory
from shadow.evaluation.register import Terms, register
from shadow.evaluation.registration import Frozen
from shadow.evaluation.streaming import Keeper, read_state
from shadow.records import ArmBar, BarRow, LedgerRow, RunRow, UnpairedRow, encode
from shadow.store import StoreReader, StoreWriter
from tests.worker.conftest import until
from worker.collector import collect
from worker.embedded import RedisServer, leashed
from worker.errors import RedisUnavailable
from worker.keys import Keys
from worker.tail import Missed, missed

KEYS = Keys()
ARTIFACT = b"the bytes of a policy"
DIGEST = hashlib.sha256(ARTIFACT).hexdigest()
PROGRAM = """
import asyncio, sys
from pathlib import Path
from worker.collector import collect
asyncio.run(collect(sys.argv[1], "quantum", Path(sys.argv[2]), flush_s=0.05))
"""


@pytest.fixture
def link(server: RedisServer) -> Iterator[redis.Redis]:
    """A plain client of it."""
    with redis.Redis.from_url(server.url) as opened:
        yield opened


def unpaired(number: int) -> bytes:
    return encode(
        UnpairedRow(
            record_id=f"{number:08d}",
            run_id="run",
            symbol="BTCUSDT",
            event_ts_us=1_700_000_000_000_000 + number,
            side="v2",
            decision_id=f"{number}",
            reason="missing_v3",
            opponent=None,
            policy_digest=DIGEST,
        )
    )


def publish(client: redis.Redis, numbers: range, stream: str = KEYS.comparisons) -> list[str]:
    with client.pipeline(transaction=False) as batch:
        for number in numbers:
            batch.xadd(stream, {"event_type": "rl_v3.comparison", "payload": unpaired(number)})
        return [entry_id.decode() for entry_id in batch.execute()]


def stored(store: Path) -> list[str]:
    with StoreReader(store).connect() as connection:
        rows = connection.execute("SELECT record_id FROM unpaired ORDER BY event_ts_us").fetchall()
    return [row[0] for row in rows]


def expected(count: int) -> list[str]:
    return [f"{number:08d}" for number in range(count)]


def run_until(server: RedisServer, store: Path, condition: Callable[[], bool]) -> None:
    """Run a collector in this process until the condition holds, then stop it in order."""

    async def main() -> None:
        stop = asyncio.Event()
        running = asyncio.create_task(
            collect(server.url, "quantum", store, flush_s=0.02, stop=stop)
        )
        deadline = time.monotonic() + 20.0
        while not running.done() and not await asyncio.to_thread(condition):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        stop.set()
        await running

    asyncio.run(main())


@contextmanager
def collector(server: RedisServer, store: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A collector in a process of its own; killed at the end if it still runs."""
    command = leashed(sys.executable, "-c", PROGRAM, server.url, str(store))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            yield process
        finally:
            process.kill()


def published(client: redis.Redis, stream: str = KEYS.comparisons) -> str:
    return (client.hget(KEYS.collected, stream) or b"").decode()


def test_collector_stores_everything_and_publishes_how_far(
    redis_server: RedisServer, client: redis.Redis, tmp_path: Path
) -> None:
    client.set(KEYS.artifact(DIGEST), ARTIFACT)
    ids = publish(client, range(500))
    run_until(redis_server, tmp_path, lambda: published(client) == ids[-1])
    ids += publish(client, range(500, 700))
    run_until(redis_server, tmp_path, lambda: published(client) == ids[-1])
    assert stored(tmp_path) == expected(700)
    assert StoreReader(tmp_path).check()["unpaired"] == 700
    copied = tmp_path / "artifacts" / f"{DIGEST}.safetensors"
    assert copied.read_bytes() == ARTIFACT


def test_stop_takes_what_is_there(server: RedisServer, link: redis.Redis, tmp_path: Path) -> None:
    ids = publish(link, range(9_000))  # more than one read
    run_until(server, tmp_path, lambda: True)
    assert published(link) == ids[-1]
    assert stored(tmp_path) == expected(9_000)


def test_kill_at_random_moments_neither_loses_nor_repeats(
    server: RedisServer, link: redis.Redis, tmp_path: Path
) -> None:
    rng = random.Random(7)
    total = 0
    for _ in range(3):
        with collector(server, tmp_path) as process:
            before = published(link)
            end = time.monotonic() + 0.5 + rng.random() * 0.6
            while time.monotonic() < end:
                publish(link, range(total, total + 40))
                total += 40
                time.sleep(0.01)
            until(lambda: published(link) != before)  # noqa: B023
            time.sleep(rng.random() * 0.1)
            process.kill()
    (last,) = publish(link, range(total, total + 1))
    run_until(server, tmp_path, lambda: published(link) == last)
    assert stored(tmp_path) == expected(total + 1)
    assert StoreReader(tmp_path).check()["unpaired"] == total + 1


def test_sigterm_drains_and_exits_0(server: RedisServer, link: redis.Redis, tmp_path: Path) -> None:
    publish(link, range(10))
    with collector(server, tmp_path) as process:
        until(lambda: published(link) != "")
        publish(link, range(10, 20))
        process.terminate()
        assert process.wait(10) == 0
    assert stored(tmp_path) == expected(20)


def test_full_disk_stops_the_position_only(
    server: RedisServer, link: redis.Redis, tmp_path: Path
) -> None:
    first = publish(link, range(10))
    with collector(server, tmp_path) as process:
        until(lambda: published(link) == first[-1])
        # no file of the process may grow beyond 64 bytes: every write fails as on a full disk
        _, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (64, hard))
        later = publish(link, range(10, 500))
        time.sleep(0.6)
        assert process.poll() is None
        assert published(link) == first[-1]
        assert stored(tmp_path) == expected(10)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (hard, hard))
        until(lambda: published(link) == later[-1])
        process.terminate()
        assert process.wait(10) == 0
    assert stored(tmp_path) == expected(500)
    assert not list(tmp_path.rglob("*.tmp"))


def test_too_little_memory_is_no_damaged_store(
    server: RedisServer, link: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = publish(link, range(5))
    run_until(server, tmp_path, lambda: published(link) == first[-1])
    ids = publish(link, range(5, 10))
    with monkeypatch.context() as short:
        short.setattr("shadow.segments._MEMORY_LIMIT", "4MB")
        with pytest.raises(OutOfMemory, match=r"enough to write .*, found: Out of") as caught:
            run_until(server, tmp_path, lambda: published(link) == ids[-1])
    assert caught.value.exit_code == 1  # its unit starts it again
    assert published(link) == first[-1]  # the worker keeps what was not stored
    run_until(server, tmp_path, lambda: published(link) == ids[-1])
    assert stored(tmp_path) == expected(10)


def test_redis_going_away_is_waited_for(durable_server: RedisServer, tmp_path: Path) -> None:
    with redis.Redis.from_url(durable_server.url) as client:
        first = publish(client, range(50))
        with collector(durable_server, tmp_path) as process:
            until(lambda: published(client) == first[-1])
            durable_server.kill()
            time.sleep(0.4)
            durable_server.restart()
            later = publish(client, range(50, 100))
            until(lambda: published(client) == later[-1])
            process.terminate()
            assert process.wait(10) == 0
    assert stored(tmp_path) == expected(100)


def test_what_was_trimmed_unread_is_counted(
    redis_server: RedisServer, client: redis.Redis, tmp_path: Path, tier: str
) -> None:
    ids = publish(client, range(100))
    run_until(redis_server, tmp_path, lambda: published(client) == ids[-1])
    publish(client, range(100, 160))
    client.xtrim(KEYS.comparisons, maxlen=20, approximate=False)  # 40 go unread
    run_until(redis_server, tmp_path, lambda: len(stored(tmp_path)) == 120)
    writer = StoreWriter(tmp_path)
    counts = writer.counts(KEYS.comparisons)
    assert counts["lost"] == (40 if tier == "7" else 1)  # 6.2 knows only that it happened
    assert ("ordinal" in counts) is (tier == "7") or counts["ordinal"] == 120
    writer.close()
    ids = publish(client, range(160, 170))
    client.xtrim(KEYS.comparisons, maxlen=10, approximate=False)  # read ones: no loss
    run_until(redis_server, tmp_path, lambda: published(client) == ids[-1])
    writer = StoreWriter(tmp_path)
    assert writer.counts(KEYS.comparisons)["lost"] == (40 if tier == "7" else 2)
    writer.close()


def test_missed_counts_by_the_numbers_of_the_server() -> None:
    # 10 added, 4 of them left: 7-0 … 10-0; the reader stands at number 5
    info = {
        "first-entry": (b"7-0", {}),
        "entries-added": 10,
        "length": 4,
        "last-generated-id": b"10-0",
    }
    counts = {"ordinal": 5}
    assert missed(info, "5-0", counts) == Missed(1, exact=True)  # number 6
    assert counts == {"ordinal": 6}
    assert missed(info, "8-0", counts) is None  # in the middle: nothing to say
    assert missed(info, "10-0", {"ordinal": 9}) == Missed(1, exact=True)
    assert missed(info, "10-0", {"ordinal": 10}) is None
    reborn = {"ordinal": 50}  # the stream was deleted and began again
    assert missed(info, "10-0", reborn) is None
    assert reborn == {"ordinal": 10}


def test_a_backlog_is_read_a_few_hundred_entries_at_a_time(
    server: RedisServer, link: redis.Redis, tmp_path: Path
) -> None:
    """Whoever asks for thousands keeps everybody else waiting for milliseconds."""
    last = publish(link, range(1_000))[-1]
    link.config_set("slowlog-log-slower-than", 0)
    link.slowlog_reset()
    try:
        run_until(server, tmp_path, lambda: published(link) == last)
    finally:
        link.config_set("slowlog-log-slower-than", 10_000)
    asked = [item["command"] for item in link.slowlog_get(10_000)]
    readings = [command for command in asked if command.startswith(b"XREAD ")]
    assert len(readings) >= 4
    assert all(b" COUNT 256 " in command for command in readings)
    assert stored(tmp_path) == expected(1_000)


def test_unreadable_entries_are_parked_and_repeated_ones_dropped(
    server: RedisServer, link: redis.Redis, tmp_path: Path
) -> None:
    link.xadd(KEYS.decisions, {"nothing": "here"})
    link.xadd(KEYS.comparisons, {"payload": b"\xc1"})
    publish(link, range(3))
    ids = publish(link, range(3))
    run_until(server, tmp_path, lambda: published(link) == ids[-1])
    assert stored(tmp_path) == expected(3)
    assert StoreReader(tmp_path).check()["rejected"] == 2


def test_no_redis_at_start_is_one_sentence_and_exit_code_1(tmp_path: Path) -> None:
    with pytest.raises(RedisUnavailable, match=r"expected a Redis at 127\.0\.0\.1:1") as caught:
        asyncio.run(collect("redis://:secret@127.0.0.1:1/0", "quantum", tmp_path))
    assert caught.value.exit_code == 1
    assert "secret" not in str(caught.value)
    with pytest.raises(ConfigError, match="expected a Redis URL"):
        asyncio.run(collect("nonsense", "quantum", tmp_path))


def test_a_second_collector_is_refused(server: RedisServer, tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path)
    with pytest.raises(DataError, match="only writer"):
        asyncio.run(collect(server.url, "quantum", tmp_path))
    writer.close()


def test_a_ledger_row_keeps_its_counts(
    server: RedisServer, link: redis.Redis, tmp_path: Path
) -> None:
    row = LedgerRow(
        record_id="1",
        run_id="run",
        symbol="",
        event_ts_us=1,
        reason="minute",
        counts={"market.tick": {"decided": 5, "late": 1}},
        entry_ids=(),
        policy_digest=DIGEST,
    )
    last = link.xadd(KEYS.comparisons, {"payload": encode(row)}).decode()
    run_until(server, tmp_path, lambda: published(link) == last)
    with StoreReader(tmp_path).connect() as connection:
        counts = connection.execute("SELECT counts['market.tick']['decided'] FROM ledger")
        assert counts.fetchall() == [(5,)]


def hour_bar(hour: int) -> bytes:
    flat = ArmBar(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 10_000.0, False)
    return encode(
        BarRow(
            record_id=f"bar {hour}", run_id="run", symbol="A", event_ts_us=hour * 3_600_000_000,
            open=1.0, high=1.0, low=1.0, close=1.0, volume=None, empty_after=0, restarted=False,
            gap=False, warm=True, regime="TREND", bus_regime=None,
            arms={"v3": msgspec.structs.replace(flat, gross=1e-4), "v2": flat,
                  "follow_signal": flat, "flat": flat},
            opponent="q_table", opponent_digest=None, step_decision_id=None, obs=(0.0,) * 64,
            missing_mask=0, policy_digest=DIGEST,
        )
    )  # fmt: skip


def a_run() -> RunRow:
    settings = {"initial_balance": 10_000.0, "step_seconds": 3600.0}
    return RunRow(
        record_id="r", run_id="run", symbol="", event_ts_us=0, policy_digest=DIGEST,
        feature_digest="f", action_table=(), training={}, rl_v2="bus", tables_digest=None,
        settings=settings,
    )  # fmt: skip


def test_collector_keeps_the_verdicts_statistics(
    server: RedisServer, link: redis.Redis, tmp_path: Path
) -> None:
    run = a_run()
    terms = Terms(symbols=("A",), start_us=0, batch_bars=4)
    test, _ = register(tmp_path, terms, now=datetime(2026, 1, 1, tzinfo=UTC), frozen=Frozen.of(run))

    def published() -> dict[str, object]:
        return json.loads(link.get(KEYS.verdict) or b"{}")

    link.xadd(KEYS.comparisons, {"payload": encode(run)})
    for hour in range(1, 12):  # two whole batches, and the three bars that close the second
        link.xadd(KEYS.comparisons, {"payload": hour_bar(hour)})
    run_until(server, tmp_path, lambda: published().get("batches") == 2)
    # 1e-4 a bar, 24 bars a day
    assert (published()["registration"], published()["mean"]) == (test.id, pytest.approx(24.0))
    # another collector goes on from what the store holds
    for hour in range(12, 16):
        link.xadd(KEYS.comparisons, {"payload": hour_bar(hour)})
    run_until(server, tmp_path, lambda: published().get("batches") == 3)
    state = read_state(tmp_path)
    assert state is not None
    assert json.loads(msgspec.json.encode(state)) == published()
    assert state.verdict == "KEEP SHADOWING"


def test_damaged_registration_stops_no_collector(
    server: RedisServer, link: redis.Redis, tmp_path: Path
) -> None:
    (tmp_path / "registrations").mkdir()
    (tmp_path / "registrations" / "0001-x.json").write_text("no registration")
    ids = publish(link, range(10))
    run_until(server, tmp_path, lambda: published(link) == ids[-1])
    assert stored(tmp_path) == expected(10)
    assert read_state(tmp_path) is None


def test_statistics_of_a_damaged_store_are_not_taken_for_whole(
    server: RedisServer, link: redis.Redis, tmp_path: Path
) -> None:
    run = a_run()
    terms = Terms(symbols=("A",), start_us=0, batch_bars=4)
    register(tmp_path, terms, now=datetime(2026, 1, 1, tzinfo=UTC), frozen=Frozen.of(run))
    for record in (encode(run), *map(hour_bar, range(1, 12))):
        last = link.xadd(KEYS.comparisons, {"payload": record}).decode()
    run_until(server, tmp_path, lambda: published(link) == last)
    (segment,) = (tmp_path / "bars").rglob("*.parquet")
    whole = segment.read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    segment.write_bytes(whole[:4] + bytes(footer - 4) + whole[footer:])  # no page is left
    keeper = Keeper(tmp_path)
    for _ in range(2):  # the collector says so and goes on
        with pytest.raises(DataError, match="is damaged"):
            keeper.refresh()
    segment.write_bytes(whole)
    keeper.refresh()
    assert keeper.statistics is not None
    assert len(keeper.statistics.batcher) == 2  # two whole batches of the eleven bars, as above
