"""A recording holds all that the worker saw, and an audit of it finds every answer again."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import msgpack
import numpy as np
import pytest
import redis
import redis.asyncio

from rlv3.errors import DataError, UserError
from rlv3.events import ACTION_TABLE
from rlv3.features import FEATURES
from rlv3.policy import Policy, shipped_policy
from shadow.backtest import backtest
from shadow.explain import explain
from shadow.recording import Reading, load_snapshot
from shadow.records import Commit, LedgerRow, decode_comparison, decode_decision
from shadow.risk import RiskLimits
from shadow.segments import list_segments, read_position
from shadow.store import StoreReader
from shadow.symbol import pack, unpack
from tests.worker.conftest import met, serving
from worker.artifact import load_policy
from worker.audit import Audit, audit, show
from worker.bus import STATES, Bus
from worker.config import WorkerConfig
from worker.embedded import RedisServer, leashed
from worker.errors import CheckFailed
from worker.keys import Keys
from worker.recorder import _LOOKS, Keep, _drop_parts, record, take_snapshot
from worker.service import Worker

KEYS = Keys()
T0 = 1_700_000_040_000  # a bar boundary
Fields = dict[str, str]
Feed = list[tuple[str, str, Fields]]
PROGRAM = """
import asyncio, sys
from pathlib import Path
from worker.recorder import record
asyncio.run(record(sys.argv[1], sys.argv[1], "quantum", Path(sys.argv[2])))
"""


def feed(seed: int, minutes: int = 25) -> Feed:
    """Ticks of two symbols with signals, v2 decisions and bad entries, in id order."""
    rng = np.random.default_rng(seed)
    prices = {"AAAUSDT": 100.0, "BBBUSDT": 0.01}
    entries: Feed = []
    for number, ms in enumerate(range(T0, T0 + minutes * 60_000, 2_500)):
        for seq, symbol in enumerate(prices):
            prices[symbol] *= float(np.exp(rng.normal(0, 1e-3)))
            price = prices[symbol] if rng.random() > 0.01 else -1.0
            stamp = ms - (40_000 if rng.random() < 0.02 else 0)
            body: dict[str, Any] = {
                "symbol": symbol, "price": price, "qty": 1.0, "timestamp": stamp / 1000
            }  # fmt: skip
            entries.append(envelope("market.tick", f"{ms}-{seq}", body))
            if rng.random() < 0.05:
                side = "BUY" if rng.random() < 0.5 else "SELL"
                body = {
                    "symbol": symbol, "side": side, "confidence": 0.7, "timestamp": ms / 1000
                }  # fmt: skip
                entries.append(envelope("signal.generated", f"{ms}-{seq}", body))
            if rng.random() < 0.03:
                body = {
                    "schema_version": 1, "decision_id": f"v2-{number}-{seq}", "symbol": symbol,
                    "kind": "combined", "strategy": "dual_momentum", "model": "lstm",
                    "weight": 1.25, "size_multiplier": 1.5, "leverage": 5, "signal_side": "BUY",
                    "signal_confidence": 0.8, "provenance": "q_table", "event_ts": ms / 1000,
                    "timestamp": ms / 1000,
                }  # fmt: skip
                entries.append(envelope("rl_v2.decision", f"{ms}-{seq}", body))
    return entries


def envelope(event_type: str, entry_id: str, body: dict[str, Any]) -> tuple[str, str, Fields]:
    fields = {
        "event_type": event_type, "payload": json.dumps(body), "trace_id": "",
        "correlation_id": f"{event_type}-{entry_id}", "timestamp": "", "source": "test",
    }  # fmt: skip
    return KEYS.stream(event_type), entry_id, fields


def append(server: RedisServer, entries: Feed) -> None:
    with redis.Redis.from_url(server.url) as client, client.pipeline(transaction=False) as batch:
        for stream, entry_id, fields in entries:
            batch.xadd(stream, fields, id=entry_id)
        batch.execute()


def config_of(server: RedisServer, policy: Path, **changes: Any) -> WorkerConfig:
    plain = WorkerConfig(
        source_url=server.url, sink_url=server.url, policy=policy, rl_v2="bus", start="oldest",
        max_event_age=None, conflate_after=None,
    )  # fmt: skip
    return replace(plain, **changes)


@asynccontextmanager
async def recording(
    config: WorkerConfig, out: Path, keep: Keep | None = None
) -> AsyncIterator[None]:
    """A recorder in this loop, stopped in order at the end."""
    stop = asyncio.Event()
    task = asyncio.create_task(
        record(config.source_url, config.sink_url, config.prefix, out, keep=keep, stop=stop)
    )
    try:
        yield
        stop.set()
        await task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def folded(worker: Worker, entries: int) -> None:
    await met(lambda: sum(worker.pipeline.counts.values()) == entries)


def snapshot_taken(out: Path) -> Callable[[], bool]:
    return (out / "snapshot.msgpack").exists


def check_complete(found: Audit, decisions: int) -> None:
    assert found.examples == []
    assert found.ok
    assert found.lost == 0
    assert found.equal["decision"] == decisions


def decided(worker: Worker) -> int:
    counts = worker.pipeline.counts
    return sum(n for (_, outcome), n in counts.items() if outcome == "decided")


def test_everything_from_the_first_entry_is_found_again(
    redis_server: RedisServer, lively_policy: Path, tmp_path: Path
) -> None:
    config = config_of(redis_server, lively_policy)
    entries = feed(1)

    async def main() -> int:
        async with recording(config, tmp_path), serving(config) as worker:
            await met(snapshot_taken(tmp_path))
            for start in range(0, len(entries), 300):
                append(redis_server, entries[start : start + 300])
                await asyncio.sleep(0.05)
            await folded(worker, len(entries))
        return decided(worker)

    decisions = asyncio.run(main())
    found = audit(tmp_path)
    check_complete(found, decisions)
    assert found.entries == len(entries)
    assert {"bar", "pair", "v2", "ledger"} <= set(found.equal)
    show(found)


def test_a_recording_may_begin_in_the_middle_and_outlive_the_worker(
    server: RedisServer, lively_policy: Path, tmp_path: Path
) -> None:
    config = config_of(server, lively_policy)
    entries = feed(2)
    third = len(entries) // 3

    async def main() -> None:
        append(server, entries[:third])
        async with serving(config) as worker:
            await folded(worker, third)
            async with recording(config, tmp_path):
                await met(snapshot_taken(tmp_path))
                append(server, entries[third : 2 * third])
                await folded(worker, 2 * third)
                worker.stop()
                async with serving(config) as successor:
                    append(server, entries[2 * third :])
                    await folded(successor, len(entries))

    asyncio.run(main())
    found = audit(tmp_path)
    assert found.ok
    assert found.entries == len(entries) - third
    assert sum(load_snapshot(tmp_path).counts.values()) == third


def test_a_state_of_before_losses_were_counted_is_continued_and_found_again(
    redis_server: RedisServer, lively_policy: Path, tmp_path: Path, tier: str
) -> None:
    config = config_of(redis_server, lively_policy)
    entries = feed(3, minutes=10)
    half = len(entries) // 2

    def counts() -> dict[str, dict[str, int]]:
        with redis.Redis.from_url(redis_server.url) as client:
            (_, fields), *_ = client.xrevrange(KEYS.comparisons, count=1)
        row = decode_comparison(fields[b"payload"])
        assert isinstance(row, LedgerRow)
        assert row.reason == "stop"
        return row.counts

    async def main() -> None:
        append(redis_server, entries[:half])
        async with serving(config) as worker:
            await folded(worker, half)
        assert {n.get("lost") for n in counts().values()} == {0 if tier == "7" else None}
        with redis.Redis.from_url(redis_server.url) as client:
            own = list(unpack(client.hget(KEYS.state(""), "own")))
            own[5] = {}  # nothing was kept of streams that lost nothing
            client.hset(KEYS.state(""), "own", pack(tuple(own)))
        async with recording(config, tmp_path), serving(config) as worker:
            await met(snapshot_taken(tmp_path))
            append(redis_server, entries[half:])
            await folded(worker, len(entries))
        assert {n.get("lost") for n in counts().values()} == {0 if tier == "7" else None}

    asyncio.run(main())
    assert (reasons_of(redis_server)["counting"] == 1) is (tier == "7")
    found = audit(tmp_path)
    assert found.examples == []
    assert found.ok
    assert found.entries >= len(entries) - half


def test_a_strangers_record_is_recorded_like_any_other(
    server: RedisServer, lively_policy: Path, tmp_path: Path
) -> None:
    config = config_of(server, lively_policy)
    entries = feed(4, minutes=2)

    async def main() -> None:
        async with recording(config, tmp_path), serving(config) as worker:
            await met(snapshot_taken(tmp_path))
            with redis.Redis.from_url(server.url) as client:
                client.xadd(KEYS.comparisons, {"payload": '{"kind":"run","action_table":[]}'})
            append(server, entries)
            await folded(worker, len(entries))

    asyncio.run(main())
    found = audit(tmp_path)
    assert found.entries == len(entries)
    assert len(found.damaged) == 1
    assert "action_table" in found.damaged[0]


def test_decisions_left_out_under_load_are_left_out_again(
    server: RedisServer, lively_policy: Path, tmp_path: Path
) -> None:
    config = config_of(server, lively_policy, conflate_after=1.0, max_batch=37)
    entries = feed(3)

    async def main() -> int:
        async with recording(config, tmp_path), serving(config) as worker:
            await met(snapshot_taken(tmp_path))
            append(server, entries)
            await folded(worker, len(entries))
        return decided(worker)

    decisions = asyncio.run(main())
    found = audit(tmp_path)
    check_complete(found, decisions)
    assert found.conflated > 100
    assert found.equal["decision"] + found.conflated > 1_000


@pytest.mark.parametrize("conflate_after", [None, 1.0])
def test_lost_and_disordered_entries_are_found_again(
    redis_server: RedisServer,
    lively_policy: Path,
    tmp_path: Path,
    conflate_after: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("worker.bus.LOSS_CHECK_S", 0.0)
    config = config_of(redis_server, lively_policy, conflate_after=conflate_after)
    entries = feed(7, minutes=40)
    third = len(entries) // 3
    future = int(time.time() * 1000) + 3_600_000
    ahead: Feed = [
        envelope("ai.signal_generated", f"{future + n}-0",
                 {"symbol": "AAAUSDT", "side": "BUY", "confidence": 0.7})
        for n in range(100)
    ]  # fmt: skip

    async def main() -> tuple[int, int]:
        async with recording(config, tmp_path), serving(config) as worker:
            await met(snapshot_taken(tmp_path))
            append(redis_server, entries[:third])
            await folded(worker, third)
            append(redis_server, ahead[:70])
            await folded(worker, third + 70)
            newest = max(id_ for name, id_, _ in entries[:third] if name.endswith("tick"))
            await met(lambda: recorded_to(tmp_path, newest))  # else the recorder loses them, too
            with redis.Redis.from_url(redis_server.url) as client, client.pipeline() as batch:
                for name, entry_id, fields in entries[third : 2 * third]:
                    batch.xadd(name, fields, id=entry_id)
                batch.xtrim(KEYS.stream("market.tick"), maxlen=3, approximate=False)
                batch.execute()  # as one: nobody can read these ticks
            names = [name for name, _, _ in entries[third : 2 * third]]
            ticks = names.count(KEYS.stream("market.tick")) - 3
            await folded(worker, 2 * third - ticks + 70)
            append(redis_server, ahead[70:])
            append(redis_server, entries[2 * third :])
            await folded(worker, len(entries) - ticks + 100)
        return decided(worker), ticks

    decisions, ticks = asyncio.run(main())
    found = audit(tmp_path)
    assert found.examples == []
    assert found.ok
    assert found.equal["decision"] == decisions
    assert found.entries == len(entries) + 100 - ticks
    reasons = reasons_of(redis_server)
    assert reasons["lost"] == 1
    assert reasons["order"] >= 3
    assert reasons["conflated"] > 0 or conflate_after is None


def test_a_swap_of_policy_is_found_again(
    redis_server: RedisServer, lively_policy: Path, tmp_path: Path
) -> None:
    served = tmp_path / "served.safetensors"
    served.write_bytes(lively_policy.read_bytes())
    config = config_of(redis_server, served)
    entries = feed(8)
    half = len(entries) // 2

    async def main() -> tuple[int, Worker]:
        out = tmp_path / "recording"
        async with recording(config, out), serving(config) as worker:
            await met(snapshot_taken(out))
            append(redis_server, entries[:half])
            await folded(worker, half)
            served.write_bytes(shipped_policy().read_bytes())
            await met(lambda: reasons_of(redis_server)["swap"] == 1)
            append(redis_server, entries[half:])
            await folded(worker, len(entries))
        return decided(worker), worker

    decisions, worker = asyncio.run(main())
    assert worker.policy.digest == Policy.load(shipped_policy()).digest
    found = audit(tmp_path / "recording")
    check_complete(found, decisions)
    assert found.equal["run"] == 1


def recorded_to(recorded: Path, entry_id: str) -> bool:
    """Tell whether a recording's cut names an entry."""
    position = read_position(recorded)
    return position is not None and entry_id in position.notes["cut"]


def reasons_of(server: RedisServer) -> Counter[str]:
    """Count ledger rows by reason."""
    with redis.Redis.from_url(server.url) as client:
        found = [json.loads(fields[b"payload"]) for _, fields in client.xrange(KEYS.comparisons)]
    return Counter(row["reason"] for row in found if row["kind"] == "ledger")


def test_source_and_sink_may_be_two_servers(
    redis_server: RedisServer, second_server: RedisServer, lively_policy: Path, tmp_path: Path
) -> None:
    config = config_of(redis_server, lively_policy, sink_url=second_server.url)
    entries = feed(4, minutes=5)

    async def main() -> int:
        async with recording(config, tmp_path), serving(config) as worker:
            await met(snapshot_taken(tmp_path))
            append(redis_server, entries)
            await folded(worker, len(entries))
        return decided(worker)

    decisions = asyncio.run(main())
    check_complete(audit(tmp_path), decisions)


def test_killed_recorder_continues_and_an_interrupted_recording_can_be_audited(
    server: RedisServer, lively_policy: Path, tmp_path: Path
) -> None:
    config = config_of(server, lively_policy)
    entries = feed(5)
    command = leashed(sys.executable, "-c", PROGRAM, server.url, str(tmp_path))
    half = len(entries) // 2

    async def main() -> int:
        async with serving(config) as worker:
            recorder = subprocess.Popen(command, stdout=subprocess.DEVNULL)  # noqa: ASYNC220
            await met(snapshot_taken(tmp_path))
            append(server, entries[:half])
            await folded(worker, half)
            await met(lambda: read_position(tmp_path) is not None)
            append(server, entries[half:])
            recorder.kill()
            recorder.wait()
            interrupted = await asyncio.to_thread(audit, tmp_path)
            assert interrupted.ok
            assert interrupted.entries > 0
            await folded(worker, len(entries))
            async with recording(config, tmp_path):
                pass  # a stop takes what is there
        return decided(worker)

    decisions = asyncio.run(main())
    check_complete(audit(tmp_path), decisions)


def test_a_record_that_nobody_computes_and_a_changed_value_are_found(
    server: RedisServer, lively_policy: Path, tmp_path: Path
) -> None:
    config = config_of(server, lively_policy)
    entries = feed(6, minutes=3)

    async def main() -> None:
        async with recording(config, tmp_path), serving(config) as worker:
            await met(snapshot_taken(tmp_path))
            append(server, entries)
            await folded(worker, len(entries))

    asyncio.run(main())
    whole = audit(tmp_path)
    assert whole.ok
    _change_first_decision(tmp_path, b'"risk_allowed":null', b'"risk_allowed":true')
    found = audit(tmp_path)
    assert found.different == {"decision": 1}
    assert "risk_allowed is" in found.examples[0]
    _change_first_decision(tmp_path, b'"risk_allowed":true', b'"risk_allowed":null')
    _change_first_decision(tmp_path, b'"action":', b'"action":1')  # 1 becomes 11, 0 becomes 10
    found = audit(tmp_path)
    assert found.different == {"decision": 1}
    assert "action is" in found.examples[0]
    _change_first_decision(tmp_path, b'"decision_id":"', b'"decision_id":"forged-')
    found = audit(tmp_path)
    assert found.missing == found.unexpected == {"decision": 1}
    with pytest.raises(CheckFailed, match="found 2 that differ") as caught:
        show(found)
    assert caught.value.exit_code == 4


def test_records_of_before_they_named_their_source_are_audited(
    server: RedisServer, lively_policy: Path, tmp_path: Path
) -> None:
    config = config_of(server, lively_policy)

    async def main() -> None:
        async with recording(config, tmp_path), serving(config) as worker:
            await met(snapshot_taken(tmp_path))
            entries = feed(6, minutes=3)
            append(server, entries)
            await folded(worker, len(entries))

    asyncio.run(main())
    whole = audit(tmp_path)
    later = {"trace_id", "correlation_id", "v3_trace_id", "v3_correlation_id"}
    cut = 0

    def earlier(packed: bytes) -> bytes:
        nonlocal cut
        rows = msgpack.unpackb(packed, raw=True)
        for _, fields in rows:
            at = fields.index(b"payload") + 1
            body = json.loads(fields[at])
            if body["kind"] not in ("decision", "run", "ledger"):
                kept = {name: value for name, value in body.items() if name not in later}
                cut += any(body[name] for name in later & body.keys())
                fields[at] = json.dumps(kept).encode()
        return msgpack.packb(rows)

    _change(tmp_path, "rl_v3.comparison", earlier, honest=True)
    assert cut > 0
    found = audit(tmp_path)
    assert found.ok
    assert found.equal == whole.equal


def _change_first_decision(recorded: Path, old: bytes, new: bytes) -> None:
    """Forge the payload of the first recorded decision."""

    def forge(packed: bytes) -> bytes:
        rows = msgpack.unpackb(packed, raw=True)
        at = rows[0][1].index(b"payload") + 1
        rows[0][1][at] = rows[0][1][at].replace(old, new, 1)
        return msgpack.packb(rows)

    _change(recorded, "rl_v3.decision", forge, honest=True)


def _change(
    recorded: Path, name: str, change: Callable[[bytes], bytes], *, honest: bool = False
) -> None:
    """Change the first row of a recorded stream; an honest forger mends the checksum as well."""
    (segments,) = list_segments(recorded, f"entries/{name}").values()
    path = segments[0].path
    with duckdb.connect(":memory:") as connection:
        connection.execute(f"CREATE TABLE t AS SELECT * FROM '{path}'")
        first, packed, crc = connection.execute(
            "SELECT first_id, entries, crc FROM t ORDER BY first_id LIMIT 1"
        ).fetchone()
        changed = change(packed)
        connection.execute(
            "UPDATE t SET entries = ?, crc = ? WHERE first_id = ?",
            [changed, zlib.crc32(changed) if honest else crc, first],
        )
        connection.execute(f"COPY (FROM t ORDER BY first_id) TO '{path}' (FORMAT parquet)")


def test_one_changed_byte_is_found_and_named(
    server: RedisServer, lively_policy: Path, tmp_path: Path
) -> None:
    config = config_of(server, lively_policy)
    entries = feed(9, minutes=40)
    whole = tmp_path / "whole"

    async def main() -> None:
        async with recording(config, whole), serving(config) as worker:
            await met(snapshot_taken(whole))
            append(server, entries)
            await folded(worker, len(entries))

    asyncio.run(main())
    assert audit(whole).ok

    def altered(name: str, change: Callable[[bytes], bytes], *, honest: bool) -> Audit:
        copy = Path(tempfile.mkdtemp(dir=tmp_path)) / "copy"
        shutil.copytree(whole, copy)
        _change(copy, name, change, honest=honest)
        return audit(copy)

    def price(packed: bytes) -> bytes:
        at = packed.index(b'"price": ') + 9
        return packed[:at] + (b"7" if packed[at : at + 1] != b"7" else b"8") + packed[at + 1 :]

    def label(packed: bytes) -> bytes:
        return packed.replace(b"LONG", b"LENG", 1).replace(b"HOLD", b"HELD", 1)

    found = altered("market.tick", price, honest=True)
    assert not found.ok
    assert found.damaged == ()
    assert found.different["decision"] > 0
    assert found.examples[0].startswith("decision ")
    found = altered("market.tick", price, honest=False)
    assert found.different["decision"] > 0
    assert f"of {KEYS.stream('market.tick')}" in found.damaged[0]
    found = altered("rl_v3.decision", label, honest=True)
    assert found.different["decision"] in (1, 2)
    assert "action_name is" in found.examples[0]
    found = altered("rl_v3.decision", lambda p: p.replace(b'{"symbol', b'["symbol', 1), honest=True)
    assert (found.missing["decision"], len(found.damaged)) == (1, 1)
    with pytest.raises(CheckFailed, match="found 1 that differ and 1 damages"):
        show(found)


def test_what_is_kept_for_a_while_lies_in_parts_that_follow_each_other(
    server: RedisServer, lively_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.recorder.FLUSH_S", 0.1)
    config = config_of(server, lively_policy)
    entries = feed(10, minutes=60)
    keep = Keep(hours=2.0 / 3_600)  # parts of half a second

    def parts() -> list[str]:
        return sorted(path.name for path in tmp_path.glob("part-*"))

    async def main() -> tuple[set[str], int]:
        seen: set[str] = set()
        async with recording(config, tmp_path, keep), serving(config) as worker:
            await met(lambda: bool(parts()))
            for start in range(0, len(entries), 400):
                append(server, entries[start : start + 400])
                await met(lambda: not set(parts()) <= seen)  # a part began
                seen.update(parts())
            await folded(worker, len(entries))
        async with recording(config, tmp_path, keep):  # continues the newest part
            pass
        return seen, decided(worker)

    seen, decisions = asyncio.run(main())
    assert len(seen) >= 4
    left = parts()
    assert left == sorted(seen | set(left))[-len(left) :]  # the newest
    assert min(seen) not in left  # it began long before what is kept
    found = audit(tmp_path)
    assert found.examples == []
    assert found.ok
    assert found.lost == 0
    assert 0 < found.equal["decision"] < decisions
    one = audit(tmp_path / left[-2])
    assert one.ok
    shutil.rmtree(tmp_path / left[-2])
    found = audit(tmp_path)
    assert found.damaged == (f"there is a gap before {tmp_path / left[-1]}",)


def test_a_part_that_cannot_begin_is_one_sentence_and_the_former_one_goes_on(
    server: RedisServer, lively_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.recorder.FLUSH_S", 0.1)
    config = config_of(server, lively_policy)
    entries = feed(10, minutes=4)
    half = len(entries) // 2
    name = f"{load_policy(config).digest}.safetensors"
    gone = tmp_path / name

    def kept() -> Path:
        (part,) = tmp_path.glob("part-*")
        return part / "artifacts" / name

    async def until_it_ends(worker: Worker) -> None:
        async with recording(config, tmp_path, Keep(hours=2.0 / 3_600)):
            await met(lambda: any(tmp_path.glob("part-*/snapshot.msgpack")))
            kept().rename(gone)
            append(server, entries[:half])
            await folded(worker, half)
            await asyncio.sleep(1.0)

    async def main() -> None:
        async with serving(config) as worker:
            with pytest.raises(
                UserError, match=r"to take another part .* found: .*No such"
            ) as told:
                await until_it_ends(worker)
            assert told.value.exit_code == 1
            gone.rename(kept())
            append(server, entries[half:])
            await folded(worker, len(entries))
            async with recording(config, tmp_path, Keep(hours=1.0)):
                pass

    asyncio.run(main())
    found = audit(tmp_path)
    assert found.examples == []
    assert found.ok
    assert found.entries == len(entries)


def test_parts_are_dropped_by_age_and_by_size(tmp_path: Path) -> None:
    now_ms = int(time.time() * 1_000)

    def make(*ages_s: float) -> list[str]:
        for age_s in ages_s:
            part = tmp_path / f"part-{now_ms - int(age_s * 1_000):013d}"
            part.mkdir(exist_ok=True)
            (part / "data").write_bytes(b"x" * 1_000)
        return sorted(path.name for path in tmp_path.glob("part-*"))

    names = make(9_000, 5_000, 3_000, 1_000)
    _drop_parts(tmp_path, Keep(hours=1.0))  # the second one ended 3,000 s ago
    assert make() == names[1:]
    _drop_parts(tmp_path, Keep(gb=3.0e-6))  # three quarters of 3,000 bytes: room for two parts
    assert make() == names[2:]
    assert Keep(hours=1.0).part_is_full(900.0, 0)
    assert not Keep(hours=1.0).part_is_full(899.0, 1 << 40)
    assert Keep(gb=4.0).part_is_full(0.0, 1_000_000_000)


def test_a_whole_recording_is_not_continued_in_parts(tmp_path: Path, server: RedisServer) -> None:
    (tmp_path / "snapshot.msgpack").write_bytes(b"")
    with pytest.raises(DataError, match="expected a directory for parts"):
        asyncio.run(record(server.url, server.url, "quantum", tmp_path, keep=Keep(gb=1.0)))


MANY = [f"S{n:02d}USDT" for n in range(40)]
MANY_LOOK = range(0, len(MANY), STATES)
"""Readings of a few symbols in a look at all of them."""


@asynccontextmanager
async def owning(server: RedisServer) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Own the state; gives what commits a cell of each of `MANY` with the commit's number."""
    bus = Bus(server.url, server.url, KEYS, ("market.tick",))
    meta = {"policy": "p", "frozen": json.dumps({"inputs": ["market.tick"]})}

    async def commit() -> None:
        cells = {symbol: {"open": b"%d" % (bus.seq + 1)} for symbol in MANY}
        await bus.commit(Commit([], cells, {}, {}, 0), meta=meta)

    await bus.connect()
    try:
        await bus.acquire(start="oldest", on_gap="fail", owner="test")
        yield commit
    finally:
        await bus.close()


class Overtaken(redis.asyncio.Redis):
    """A client after each of whose first readings, but those at one moment, somebody commits."""

    commit: Callable[[], Awaitable[None]]
    commits = 0
    moments = 0

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> Any:
        pipe = super().pipeline(transaction, shard_hint)
        execute = pipe.execute

        async def read_and_commit() -> Any:
            found = await execute()
            if transaction:
                self.moments += 1
            elif self.commits:
                self.commits -= 1
                await self.commit()
            return found

        pipe.execute = read_and_commit
        return pipe


@pytest.mark.parametrize(
    ("commits", "moments"),
    [
        (0, 1),
        (1, 2),  # the second look finds what it was told
        (10_000, _LOOKS + 2),  # no look does: all at one moment, which first must know the symbols
    ],
)
def test_a_snapshot_is_of_one_commit_however_many_come_meanwhile(
    server: RedisServer, commits: int, moments: int
) -> None:
    async def play() -> None:
        async with owning(server) as commit, Overtaken.from_url(server.url) as link:
            assert await take_snapshot(link, KEYS) is None
            await commit()
            await link.hset(KEYS.meta, "warming", "1")
            assert await take_snapshot(link, KEYS) is None
            await link.hset(KEYS.meta, "warming", "")
            link.commit, link.commits, link.moments = commit, commits, 0
            found = await take_snapshot(link, KEYS)
        assert found is not None
        number = b"%d" % json.loads(found.meta["cursors"])["seq"]
        assert found.cells == {symbol: {"open": number} for symbol in MANY}
        assert link.moments == moments

    asyncio.run(play())


def test_a_state_that_vanishes_while_it_is_read_is_none(server: RedisServer) -> None:
    """In the last look: what is then read all at once must be asked again whether it is whole."""

    async def play() -> None:
        async with owning(server) as commit, Overtaken.from_url(server.url) as link:

            async def commit_or_flush() -> None:
                if link.commits % len(MANY_LOOK):
                    return
                if link.commits == 0:
                    with redis.Redis.from_url(server.url) as operator:
                        operator.flushall()
                else:
                    await commit()

            await commit()
            link.commit, link.commits = commit_or_flush, _LOOKS * len(MANY_LOOK)
            assert await take_snapshot(link, KEYS) is None
            assert link.commits == 0
            assert link.moments == _LOOKS + 1

    asyncio.run(play())


def test_binary_fields_survive(server: RedisServer, lively_policy: Path, tmp_path: Path) -> None:
    config = config_of(server, lively_policy)
    odd = {b"\x00\xff": b"\xfe\x00", b"payload": bytes(range(256)), "ключ".encode(): b""}

    async def main() -> None:
        async with recording(config, tmp_path), serving(config) as worker:
            await met(snapshot_taken(tmp_path))
            with redis.Redis.from_url(server.url) as client:
                client.xadd(KEYS.stream("market.tick"), odd, id=f"{T0}-7")
                client.xadd(
                    KEYS.stream("market.tick"), {b"payload": b"x" * (13 << 20)}, id=f"{T0}-8"
                )
            await folded(worker, 2)

    asyncio.run(main())
    first, second = Reading(tmp_path, load_snapshot(tmp_path)).inputs("market.tick")
    assert (first.entry_id, first.fields) == (f"{T0}-7", odd)
    assert len(second.fields[b"payload"]) == 13 << 20
    assert audit(tmp_path).ok


def test_missing_or_damaged_recordings_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a recording"):
        audit(tmp_path)
    (tmp_path / "snapshot.msgpack").write_bytes(b"\x93")
    with pytest.raises(DataError, match="is damaged"):
        audit(tmp_path)


def test_a_recording_of_another_prefix_is_refused(
    server: RedisServer, lively_policy: Path, tmp_path: Path
) -> None:
    config = config_of(server, lively_policy)

    async def main() -> None:
        async with recording(config, tmp_path), serving(config):
            await met(snapshot_taken(tmp_path))
        with pytest.raises(DataError, match="expected a recording of prefix other"):
            await record(server.url, server.url, "other", tmp_path)

    asyncio.run(main())


@pytest.mark.parametrize("value", [b"1", None])
def test_kill_switch_is_committed_where_it_was_read_and_audited_there(
    server: RedisServer, lively_policy: Path, tmp_path: Path, value: bytes | None
) -> None:
    """A key of another type is not a clear "off": it stops as well."""
    limits = RiskLimits(max_leverage=1.0, kill_switch="quantum:kill")
    config = config_of(server, lively_policy, risk_limits=limits)
    entries = feed(11)
    third = len(entries) // 3

    async def main() -> None:
        with redis.Redis.from_url(server.url) as client:
            client.delete("quantum:kill")
            async with recording(config, tmp_path), serving(config) as worker:
                await met(snapshot_taken(tmp_path))
                append(server, entries[:third])
                await folded(worker, third)
                client.set("quantum:kill", value) if value else client.rpush("quantum:kill", "x")
                await met(lambda: worker.pipeline.killed)
                append(server, entries[third : 2 * third])
                await folded(worker, 2 * third)
                client.delete("quantum:kill")
                await met(lambda: not worker.pipeline.killed)
                append(server, entries[2 * third :])
                await folded(worker, len(entries))

    asyncio.run(main())
    assert audit(tmp_path).ok
    with redis.Redis.from_url(server.url) as client:
        rows = [decode_comparison(f[b"payload"]) for _, f in client.xrange(KEYS.comparisons)]
    kills = [row for row in rows if isinstance(row, LedgerRow) and row.reason == "kill"]
    assert [row.entry_ids for row in kills] == [("1|on",), ("2|off",)]
    assert [sum(sum(c.values()) for c in row.counts.values()) for row in kills] == [
        third,
        2 * third,
    ]


def test_a_recording_is_backtested_and_explains_its_advisory_decisions(
    server: RedisServer, lively_policy: Path, tmp_path: Path
) -> None:
    """Without Redis the same policy decides the same, beside RL v2's recorded decisions."""
    config = config_of(server, lively_policy)
    recorded = tmp_path / "recording"
    entries = feed(4)

    async def main() -> None:
        async with recording(config, recorded), serving(config) as worker:
            await met(snapshot_taken(recorded))
            append(server, entries)
            await folded(worker, len(entries))

    asyncio.run(main())
    done = backtest(lively_policy, recording=recorded, store_dir=tmp_path / "store", rl_v2="bus")
    assert done.symbols == ("AAAUSDT", "BBBUSDT")
    assert done.entries == len(entries)
    assert done.speed > 1.0
    with redis.Redis.from_url(server.url) as client:
        published = [
            decode_decision(fields[b"payload"]) for _, fields in client.xrange(KEYS.decisions)
        ]
    with StoreReader(tmp_path / "store").connect() as store:
        columns = "decision_id, kind, action, action_probs, value, target_position"
        rows = store.execute(f"SELECT {columns} FROM decisions ORDER BY decision_id").fetchall()
        ((moved, opponents),) = store.execute(
            "SELECT count(*) FILTER (moves_arm), list(DISTINCT opponent) FROM v2_decisions"
        ).fetchall()
    assert rows == sorted(
        (d.decision_id, d.kind, d.action, list(d.action_probs), d.value, d.target_position)
        for d in published
    )
    assert moved > 20
    assert opponents == ["q_table"]

    advisory = [d for d in published if d.kind == "advisory"]
    for decision in (advisory[3], advisory[len(advisory) // 2], advisory[-1]):
        found = explain(decision.decision_id, tmp_path / "store", recorded)
        assert found.source == "recording"
        assert found.probabilities == {
            name: p for name, p in zip(ACTION_TABLE, decision.action_probs, strict=True) if p
        }
        assert found.missing == tuple(
            feature.name
            for i, feature in enumerate(FEATURES)
            if decision.feature_quality["missing_mask"] >> i & 1
        )
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match="expected a recording of `rlv3-worker record`"):
        explain(advisory[0].decision_id, tmp_path / "store", tmp_path / "other")


def test_a_backtest_takes_files_or_a_recording_and_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "shadow.cli", "backtest"], cwd=tmp_path, capture_output=True,
        text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 2
    assert "expected price files with --data or a --recording, found neither" in done.stderr
