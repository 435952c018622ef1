"""Does the daemon start, recover, outlive trouble and drain as an operator is promised?"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator
from datetime import datetime
from io import StringIO
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis

from rlv3.errors import PolicyError
from tests import acl
from tests.worker.conftest import met, serving, until
from worker import logs
from worker.artifact import load_policy, policy_at_start
from worker.bus import Bus
from worker.config import WorkerConfig, load_config
from worker.embedded import RedisServer
from worker.keys import Keys
from worker.service import Worker

KEYS = Keys("t")
TICKS, SIGNALS, KLINES = map(KEYS.stream, ("market.tick", "signal.generated", "market.klines"))
START_MS = 1_760_000_000_000

# -- the market: one symbol a second, all events before now ---------------------------------------


def tick(n: int, symbol: str = "BTCUSDT") -> tuple[str, dict[str, bytes], str]:
    """Return (stream, fields, id) of the n-th tick, a second after the one before."""
    ts_ms = START_MS + 1_000 * n
    price = 100.0 + (n * 7919 % 101) / 50.0
    body = {"symbol": symbol, "price": price, "qty": 1.0, "timestamp": ts_ms / 1000}
    return TICKS, {"payload": json.dumps(body).encode()}, f"{ts_ms}-0"


def publish(client: redis.Redis, first: int, last: int) -> None:
    """Append ticks first … last-1 under their own ids, and a signal with each hundredth."""
    with client.pipeline(transaction=False) as pipe:
        for n in range(first, last):
            stream, fields, entry_id = tick(n)
            pipe.xadd(stream, fields, id=entry_id)
            if n % 100 == 0:
                body = {"symbol": "BTCUSDT", "side": "BUY", "confidence": 0.7,
                        "timestamp": (START_MS + 1_000 * n) / 1000}  # fmt: skip
                pipe.xadd(SIGNALS, {"payload": json.dumps(body)}, id=entry_id)
        pipe.execute()


def decisions(client: redis.Redis) -> list[dict[str, Any]]:
    """Return the payloads of our decision stream."""
    return [json.loads(fields[b"payload"]) for _, fields in client.xrange(KEYS.decisions)]


def comparisons(client: redis.Redis, kind: str) -> list[dict[str, Any]]:
    """Return the comparison records of a kind."""
    rows = [json.loads(fields[b"payload"]) for _, fields in client.xrange(KEYS.comparisons)]
    return [row for row in rows if row["kind"] == kind]


def counters(client: redis.Redis) -> dict[str, int]:
    """Return the worker's counters by `event type:outcome`."""
    meta = client.hgetall(KEYS.meta)
    return {k[2:].decode(): int(v) for k, v in meta.items() if k.startswith(b"n:")}


def events(lines: list[dict[str, Any]]) -> list[str]:
    """Return the event names of log lines."""
    return [line["event"] for line in lines]


def test_every_tick_and_signal_is_decided_and_sigterm_drains(redis_server, client, daemon) -> None:
    publish(client, 0, 500)
    worker = daemon(redis_server.url)
    until(lambda: client.xlen(KEYS.decisions) == 505)
    until(lambda: client.exists(KEYS.heartbeat))  # written after the reading was folded
    assert 0 < client.ttl(KEYS.heartbeat) <= 10
    code, lines, err = worker.end(signal.SIGTERM)
    assert (code, err) == (0, "")
    assert counters(client) == {"market.tick:decided": 500, "signal.generated:decided": 5}
    made = decisions(client)
    assert len({row["decision_id"] for row in made}) == 505
    assert sum(row["kind"] == "step" for row in made) == 500 // 60
    assert comparisons(client, "ledger")[-1]["reason"] == "stop"
    meta = client.hgetall(KEYS.meta)
    assert client.get(KEYS.artifact(meta[b"policy"].decode())) is not None
    heartbeat = lines[-2]
    assert set(heartbeat) == {
        "ts", "level", "service", "event", "correlation_id", "msg", "extra",
    }  # fmt: skip
    assert heartbeat["ts"].endswith("Z")
    assert (heartbeat["level"], heartbeat["service"]) == ("INFO", "rl_v3_shadow")
    assert heartbeat["extra"]["events_total"]["market.tick"] == {"decided": 500}
    assert events(lines)[-2:] == ["WORKER_HEARTBEAT", "WORKER_STOPPED"]
    assert events(lines).count("STREAM_ABSENT") == 5  # of the seven default inputs


def test_sigterm_to_exit_takes_less_than_a_second(redis_server, client, daemon) -> None:
    """The fastest of three: a busy machine delays one, a worker that waits delays all."""
    took = []
    for n in range(3):
        publish(client, 300 * n, 300 * n + 300)
        worker = daemon(redis_server.url)
        until(lambda n=n: client.xlen(KEYS.decisions) >= 300 * n + 300)
        began = time.monotonic()
        assert worker.end(signal.SIGTERM)[0] == 0
        took.append(time.monotonic() - began)
    assert min(took) < 1.0


def test_restart_continues_where_the_last_one_was_killed(redis_server, client, daemon) -> None:
    publish(client, 0, 300)
    first = daemon(redis_server.url)
    until(lambda: client.xlen(KEYS.decisions) > 50)
    first.process.kill()
    publish(client, 300, 400)
    second = daemon(redis_server.url)
    until(lambda: client.xlen(KEYS.decisions) >= 404)
    code, lines, _ = second.end(signal.SIGTERM)
    assert code == 0
    assert counters(client) == {"market.tick:decided": 400, "signal.generated:decided": 4}
    made = [row["decision_id"] for row in decisions(client)]
    assert len(made) == len(set(made)) == 404
    assert len(comparisons(client, "run")) == 1
    assert "WORKER_STARTED" in events(lines)


def test_redis_away_for_seconds_loses_and_doubles_nothing(durable_server, daemon) -> None:
    with redis.Redis.from_url(durable_server.url) as client:
        publish(client, 0, 200)
        worker = daemon(durable_server.url)
        until(lambda: client.xlen(KEYS.decisions) > 20)
        durable_server.kill()
        time.sleep(2.0)
        durable_server.restart()
        publish(client, 200, 400)
        until(lambda: client.xlen(KEYS.decisions) >= 404)
        code, lines, _ = worker.end(signal.SIGTERM)
        assert code == 0
        made = [row["decision_id"] for row in decisions(client)]
        assert len(made) == len(set(made)) == 404
        assert counters(client) == {"market.tick:decided": 400, "signal.generated:decided": 4}
    trouble = [name for name in events(lines) if name.startswith("REDIS_")]
    assert trouble == ["REDIS_CONNECTED", "REDIS_LOST", "REDIS_RETURNED"]


def test_lost_replies_lose_and_double_nothing(redis_server, client, proxy, daemon) -> None:
    worker = daemon(proxy.url, "--max-batch", "7")
    until(lambda: client.exists(KEYS.heartbeat))  # at start a cut is an exit, not a pause
    for first in range(0, 400, 20):
        proxy.lose_replies = 1
        publish(client, first, first + 20)
        time.sleep(0.02)
    proxy.lose_replies = 0
    until(lambda: client.xlen(KEYS.decisions) >= 404)
    assert worker.end(signal.SIGTERM)[0] == 0
    made = [row["decision_id"] for row in decisions(client)]
    assert len(made) == len(set(made)) == 404


def test_a_stall_is_logged_within_five_seconds_and_costs_no_time(
    redis_server, client, proxy, daemon
) -> None:
    worker = daemon(proxy.url)
    until(lambda: client.exists(KEYS.heartbeat))
    process = psutil.Process(worker.process.pid)
    proxy.down = True
    proxy.cut()
    time.sleep(1.0)
    before = process.cpu_times()
    time.sleep(4.0)
    after = process.cpu_times()
    assert after.user + after.system - before.user - before.system < 0.5
    proxy.down = False
    publish(client, 0, 10)
    until(lambda: client.xlen(KEYS.decisions) == 11)
    time.sleep(1.0)
    code, lines, _ = worker.end(signal.SIGTERM)
    assert code == 0
    said = [name for name in events(lines) if name in ("STALLED", "PROGRESS_RESUMED")]
    assert said == ["STALLED", "PROGRESS_RESUMED"]
    at = {line["event"]: datetime.fromisoformat(line["ts"]) for line in lines}
    assert (at["STALLED"] - at["REDIS_LOST"]).total_seconds() < 5.0
    assert lines[-2]["extra"]["state"] == "ready"


def test_a_commit_that_is_refused_is_a_stall(redis_server, client, policy_file) -> None:
    async def play() -> str:
        async with working(redis_server.url, policy_file) as (worker, out):
            await met(lambda: client.exists(KEYS.heartbeat))
            publish(client, 0, 10)
            await settled(client, 11)
            client.config_set("maxmemory", 1)
            try:
                await met(lambda: "STALLED" in out.getvalue())
                assert worker.figures()["ready"] is False
            finally:
                client.config_set("maxmemory", 0)
            await met(lambda: "PROGRESS_RESUMED" in out.getvalue())
        return out.getvalue()

    stalled = [line for line in map(json.loads, asyncio.run(play()).splitlines())
               if line["event"] == "STALLED"]  # fmt: skip
    assert len(stalled) == 1
    assert "command not allowed" in stalled[0]["msg"]


def test_stop_while_redis_is_away_says_so(redis_server, client, proxy, daemon) -> None:
    worker = daemon(proxy.url)
    until(lambda: client.exists(KEYS.heartbeat))
    proxy.down = True
    proxy.cut()
    time.sleep(0.3)
    code, _, err = worker.end(signal.SIGTERM)
    assert code == 1
    assert "stopped while Redis was away" in err


def test_second_worker_fences_the_first_which_exits_3(redis_server, client, daemon) -> None:
    first = daemon(redis_server.url)
    until(lambda: client.hget(KEYS.meta, "run_id"))
    second = daemon(redis_server.url)
    code, _, err = first.end()  # without an input: trimming finds out, too
    assert code == 3
    assert err.startswith("error: another worker took over: expected to own epoch 1 in ")
    publish(client, 0, 10)
    until(lambda: client.xlen(KEYS.decisions) == 11)
    assert second.end(signal.SIGTERM)[0] == 0


def test_missing_state_exits_4_when_told_to_fail(redis_server, client, daemon) -> None:
    client.xadd(KEYS.decisions, {"payload": "{}"})
    code, _, err = daemon(redis_server.url, "--on-gap", "fail").end()
    assert code == 4
    assert "the cursors are missing although our outputs" in err


@pytest.mark.parametrize(
    ("policy", "decided", "lost"),
    [("resume-oldest", 110, 90), ("resume-latest", 100, 100), ("fail", 100, 0)],
)
def test_each_policy_of_on_gap_does_what_it_says(
    redis_server, client, daemon, policy, decided, lost
) -> None:
    publish(client, 1, 100)
    first = daemon(redis_server.url)
    until(lambda: client.xlen(KEYS.decisions) == 99)
    assert first.end(signal.SIGTERM)[0] == 0
    publish(client, 101, 201)  # 100 ticks and a signal, of which 10 and the signal stay
    client.xtrim(TICKS, maxlen=10, approximate=False)
    before = client.xlen(KEYS.comparisons), client.hget(KEYS.meta, "cursors")
    second = daemon(redis_server.url, "--on-gap", policy)
    if policy == "fail":
        code, _, err = second.end()
        assert code == 4
        assert "choose --on-gap resume-oldest or resume-latest" in err
        assert (client.xlen(KEYS.comparisons), client.hget(KEYS.meta, "cursors")) == before
        return
    until(lambda: client.xlen(KEYS.decisions) == decided)
    code, lines, _ = second.end(signal.SIGTERM)
    assert code == 0
    (said,) = [line for line in lines if line["event"] == "ENTRIES_LOST"]
    exact = int(client.info("server")["redis_version"].split(".")[0]) >= 7
    assert said["extra"]["entries"] == (lost if exact else "unknown")
    assert counters(client)["signal.generated:decided"] == 1


@pytest.mark.parametrize(
    ("flags", "sentence", "expected"),
    [
        (("--redis-url", "redis://:pw@127.0.0.1:1/0"), "127.0.0.1:1/0 to answer, found: ", 1),
        (("--redis-url", "http://nowhere"), "--redis-url must start with redis://", 2),
        (("--policy", "/nowhere"), "policy file /nowhere cannot be read", 2),
        (("--inputs", "market.tock"), "--inputs must be all or among", 2),
    ],
)
def test_user_errors_are_one_sentence_and_an_exit_code(daemon, flags, sentence, expected) -> None:
    code, lines, err = daemon("redis://127.0.0.1:1/0", *flags).end()
    assert code == expected
    assert sentence in err
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert "pw@" not in err
    assert lines == []


def test_wrong_password_exits_1(redis_server, client, daemon) -> None:
    client.config_set("requirepass", "right")
    try:
        code, _, err = daemon(redis_server.url.replace("//", "//:wrong@")).end()
    finally:
        client.config_set("requirepass", "")
    assert code == 1
    assert "to accept our user and password" in err


def test_untrained_policy_is_refused_unless_allowed(untrained_policy_file) -> None:
    config = WorkerConfig(policy=untrained_policy_file)
    with pytest.raises(PolicyError, match="expected a trained policy, found 0 training steps"):
        load_policy(config)
    allowed = load_config({"policy": str(untrained_policy_file), "allow_untrained": True}, {})
    assert load_policy(allowed).trained_steps == 0


# -- in process -----------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def working(url: str, policy: Path, **flags: Any) -> AsyncIterator[tuple[Worker, StringIO]]:
    """Run a worker in this process; it drains at the end."""
    given = {
        "redis_url": url, "prefix": "t", "policy": str(policy), "rl_v2": "bus",
        "start": "oldest", "conflate_after": "off", "max_event_age": "off",
    }  # fmt: skip
    out = StringIO()
    async with serving(load_config(given | flags, {}), logs.configure("INFO", out)) as worker:
        yield worker, out


async def settled(client: redis.Redis, n: int) -> None:
    """Wait until so many entries were counted."""
    await met(lambda: sum(counters(client).values()) >= n)


def test_first_start_warms_up_from_candles_outside_all_counts(
    redis_server, client, policy_file
) -> None:
    for n in range(40):
        open_ms = START_MS - 60_000 * (40 - n)
        body = {"symbol": "BTCUSDT", "interval": "1m", "open": 100.0, "high": 101.0, "low": 99.0,
                "close": 100.0 + n % 3, "volume": 5.0, "open_time": open_ms,
                "close_time": open_ms + 59_999, "is_closed": True,
                "timestamp": open_ms / 1000 + 60}  # fmt: skip
        client.xadd(KLINES, {"payload": json.dumps(body)}, id=f"{open_ms + 60_000}-0")

    async def play() -> None:
        async with working(redis_server.url, policy_file, start="new"):
            await met(lambda: client.hget(KEYS.meta, "run_id"))
            publish(client, 0, 3)
            await settled(client, 4)

    asyncio.run(play())
    assert counters(client) == {"market.tick:decided": 3, "signal.generated:decided": 1}
    assert {row["warm"] for row in decisions(client)} == {True}


def state(client: redis.Redis) -> dict[str, dict[bytes, bytes]]:
    """Return what is stored of every symbol, and of the pipeline under ""."""
    names = sorted(name.decode() for name in client.smembers(KEYS.symbols))
    return {name: client.hgetall(KEYS.state(name)) for name in names}


def test_a_warm_up_of_many_symbols_is_committed_in_parts_and_again_when_cut_short(
    redis_server, client, policy_file, monkeypatch
) -> None:
    """One script for all would hold Redis for milliseconds; half a warm-up must not be served."""

    def publish_history() -> None:
        with client.pipeline(transaction=False) as pipe:
            for n in range(450):
                stream, fields, entry_id = tick(n, f"S{n % 150:03d}USDT")
                pipe.xadd(stream, fields, id=entry_id)
            pipe.execute()

    async def start() -> list[int]:
        """Start and stop in order; returns the bytes of cells of each commit before the run's."""
        commit, sizes, begun = Bus.commit, [], []

        async def measured(self: Bus, made: Any, **options: Any) -> str:
            if "" in made.cells:
                begun.append(made)
            elif not begun:
                cells = [cell for changed in made.cells.values() for cell in changed.values()]
                sizes.append(sum(map(len, cells)))
            return await commit(self, made, **options)

        with monkeypatch.context() as patch:
            patch.setattr(Bus, "commit", measured)
            async with working(redis_server.url, policy_file, start="new") as (_, out):
                await met(lambda: "WORKER_STARTED" in out.getvalue())
                assert "first start" in out.getvalue()
        return sizes

    async def start_and_die(commits: int) -> None:
        """Start and end after so many commits."""
        commit, made = Bus.commit, []

        async def dying(self: Bus, *args: Any, **options: Any) -> str:
            if len(made) == commits:
                raise MemoryError("as good as a kill")
            made.append(await commit(self, *args, **options))
            return made[-1]

        with monkeypatch.context() as patch:
            patch.setattr(Bus, "commit", dying)
            async with working(redis_server.url, policy_file, start="new"):
                await met(lambda: len(made) == commits)

    publish_history()
    parts = asyncio.run(start())
    whole = state(client)
    assert len(whole) == 151
    assert len(parts) > 2
    assert min(parts) > 0
    assert max(parts) < 40_000
    for commits in (1, len(parts)):  # the last: only the run's own commit is missing
        for evicted in (False, True):  # meta as well, before the next start
            client.flushall()
            publish_history()
            with pytest.raises(MemoryError):
                asyncio.run(start_and_die(commits))
            cut = state(client)
            assert 0 < len(cut) < 151
            assert "" not in cut
            if evicted:
                client.delete(KEYS.meta)
            asyncio.run(start())
            assert state(client) == whole
    client.flushall()
    publish_history()
    with pytest.raises(MemoryError):
        asyncio.run(start_and_die(1))
    stored = [name for name in state(client) if name]
    client.xtrim(TICKS, maxlen=0, approximate=False)
    asyncio.run(start())
    assert stored
    assert set(state(client)) == {""}, "what nothing says any more is not kept"


def test_another_policy_at_restart_begins_a_new_run(
    redis_server, client, policy_file, other_policy_file
) -> None:
    async def play() -> None:
        publish(client, 0, 150)
        async with working(redis_server.url, policy_file):
            await settled(client, 152)
        publish(client, 150, 300)
        async with working(redis_server.url, other_policy_file) as (_, out):
            await settled(client, 303)
        assert "POLICY_CHANGED" in out.getvalue()
        async with working(redis_server.url, other_policy_file) as (_, out):
            await asyncio.sleep(0.1)
        assert "POLICY_CHANGED" not in out.getvalue()

    asyncio.run(play())
    runs = comparisons(client, "run")
    assert len({row["run_id"] for row in runs}) == len(runs) == 2
    assert counters(client)["market.tick:decided"] == 300
    assert len({row["model_sha256"] for row in decisions(client)}) == 2


def test_a_new_file_is_swapped_in_and_a_bad_one_is_not(
    redis_server, client, policy_file, other_policy_file, untrained_policy_file, tmp_path
) -> None:
    path = tmp_path / "policy.safetensors"
    path.write_bytes(policy_file.read_bytes())

    async def play() -> None:
        async with working(redis_server.url, path) as (worker, out):
            publish(client, 0, 150)
            await settled(client, 152)
            path.write_bytes(untrained_policy_file.read_bytes())
            await met(lambda: "expected a trained policy" in out.getvalue())
            path.write_bytes(b"half a file")
            await met(lambda: out.getvalue().count("POLICY_REFUSED") == 2)
            path.write_bytes(other_policy_file.read_bytes())
            await met(lambda: "POLICY_SWAPPED" in out.getvalue())
            publish(client, 150, 300)
            await settled(client, 303)
            worker.reload()
            await met(lambda: "POLICY_UNCHANGED" in out.getvalue())
        # a restart continues with what was committed when the file is bad
        path.write_bytes(b"half a file")
        config = load_config({"redis_url": redis_server.url, "prefix": "t", "policy": path}, {})
        bus = Bus(config.source_url, config.sink_url, KEYS, config.inputs)
        out = StringIO()
        found = await policy_at_start(config, bus, logs.configure("INFO", out))
        assert found.source == other_policy_file.read_bytes()
        assert "continues with the committed artifact" in out.getvalue()
        client.delete(KEYS.artifact(found.digest))
        with pytest.raises(PolicyError, match="is not a policy artifact"):
            await policy_at_start(config, bus, logs.configure("INFO", out))
        await bus.close()

    asyncio.run(play())
    made = decisions(client)
    digests = [hashlib.sha256(f.read_bytes()).hexdigest() for f in (policy_file, other_policy_file)]
    assert [row["model_sha256"] for row in made] == [digests[0]] * 152 + [digests[1]] * 151
    runs = comparisons(client, "run")
    assert [row["policy_digest"] for row in runs] == digests
    assert [row["run_id"] for row in made] == [runs[0]["run_id"]] * 152 + [runs[1]["run_id"]] * 151
    assert client.hget(KEYS.meta, "policy").decode() == digests[1]
    assert [row["policy_digest"] for row in comparisons(client, "ledger")
            if row["reason"] == "swap"] == digests[1:]  # fmt: skip


def test_sighup_swaps(redis_server, client, daemon, policy_file, other_policy_file, tmp_path):
    path = tmp_path / "policy.safetensors"
    path.write_bytes(policy_file.read_bytes())
    worker = daemon(redis_server.url, policy=path)
    until(lambda: client.hget(KEYS.meta, "run_id"))
    os.replace(shutil.copy(other_policy_file, tmp_path / "new"), path)
    worker.process.send_signal(signal.SIGHUP)
    until(lambda: len(comparisons(client, "run")) == 2)
    code, lines, _ = worker.end(signal.SIGTERM)
    assert code == 0
    assert "POLICY_SWAPPED" in events(lines)


def test_damaged_state_restarts_that_symbol_cold_and_is_logged(
    redis_server, client, policy_file
) -> None:
    async def play() -> None:
        publish(client, 0, 150)
        async with working(redis_server.url, policy_file):
            await settled(client, 152)
        client.hset(KEYS.state("BTCUSDT"), "arms", b"\x01damaged")
        publish(client, 150, 200)
        async with working(redis_server.url, policy_file) as (_, out):
            await settled(client, 202)
        assert "STATE_DAMAGED" in out.getvalue()

    asyncio.run(play())
    assert counters(client)["market.tick:decided"] == 200


def test_damaged_state_is_gone_with_the_next_commit(redis_server, client, policy_file) -> None:
    async def play() -> None:
        publish(client, 0, 150)
        async with working(redis_server.url, policy_file):
            await settled(client, 152)
        client.hset(KEYS.state("BTCUSDT"), "d63", b"\x01damaged")
        publish(client, 150, 200)  # fifty ticks: they do not reach slot 63
        async with working(redis_server.url, policy_file) as (_, out):
            await settled(client, 202)
        assert "STATE_DAMAGED" in out.getvalue()
        publish(client, 200, 210)
        async with working(redis_server.url, policy_file) as (worker, out):
            await settled(client, 213)
            assert worker.pipeline.symbols["BTCUSDT"].n_recent == 60
        assert "STATE_DAMAGED" not in out.getvalue()

    asyncio.run(play())
    assert not client.hexists(KEYS.state("BTCUSDT"), "d63")


def test_damaged_state_of_its_own_is_gone_with_the_next_commit(
    redis_server, client, policy_file
) -> None:
    async def play() -> None:
        publish(client, 0, 50)
        async with working(redis_server.url, policy_file):
            await settled(client, 51)
        client.hset(KEYS.state(""), "replay:0", b"\x01damaged")
        async with working(redis_server.url, policy_file) as (worker, out):
            await met(lambda: "WORKER_STARTED" in out.getvalue())
            run_id = worker.pipeline.run_id
        assert "STATE_DAMAGED" in out.getvalue()
        async with working(redis_server.url, policy_file) as (worker, out):
            await met(lambda: "WORKER_STARTED" in out.getvalue())
            assert worker.pipeline.run_id == run_id  # once is enough for another run
        assert "STATE_DAMAGED" not in out.getvalue()

    asyncio.run(play())


def test_state_lost_while_running_starts_again(redis_server, client, policy_file) -> None:
    async def play() -> None:
        publish(client, 0, 50)
        async with working(redis_server.url, policy_file) as (_, out):
            await settled(client, 51)
            client.delete(KEYS.meta)
            publish(client, 50, 60)
            await met(lambda: "STATE_GAP" in out.getvalue())
            await settled(client, 61)
        assert "STATE_LOST" in out.getvalue()

    asyncio.run(play())
    # the fifty were read again from the oldest; the surviving state knows them: not decided twice
    made = [row["decision_id"] for row in decisions(client)]
    ticks = [row for row in decisions(client) if row["source_event_type"] == "market.tick"]
    assert len({row["source_entry_id"] for row in ticks}) == len(ticks) == 60
    assert len(made) >= 61


def test_state_lost_while_redis_refuses_everything_is_waited_out(
    redis_server, client, policy_file
) -> None:
    """A worker that runs backs off for ever, also in the middle of starting again."""

    async def play() -> None:
        publish(client, 0, 50)
        async with working(redis_server.url, policy_file) as (worker, out):
            await settled(client, 51)
            # Redis refuses a reading as well then: who is not waiting cannot find its state gone
            await met(lambda: worker.progress.step == "wait")
            try:
                with client.pipeline(transaction=True) as at_once:
                    at_once.flushall()
                    at_once.config_set("maxmemory", "1")
                    at_once.execute()
                await met(lambda: "STATE_LOST" in out.getvalue())
                await met(lambda: "REDIS_LOST" in out.getvalue())
            finally:
                client.config_set("maxmemory", "0")
            publish(client, 50, 60)
            await settled(client, 10)

    asyncio.run(play())
    assert counters(client)["market.tick:decided"] == 10


def test_pairs_are_logged(redis_server, client, policy_file) -> None:
    body = {
        "schema_version": 1, "decision_id": "v2-1", "symbol": "BTCUSDT",
        "timestamp": f"{START_MS / 1000}", "kind": "combined", "strategy": "dual_momentum",
        "model": "lstm", "weight": 1.0, "size_multiplier": 1.0, "leverage": 5,
        "signal_side": "BUY", "signal_confidence": 0.7, "provenance": "q_table",
        "source_stream": SIGNALS, "source_entry_id": f"{START_MS}-0",
        "trace_id": "t-1", "correlation_id": "c-1",
    }  # fmt: skip
    client.xadd(
        KEYS.stream("rl_v2.decision"), {"payload": json.dumps(body)}, id=f"{START_MS + 5}-0"
    )
    publish(client, 0, 120)

    async def play() -> str:
        async with working(redis_server.url, policy_file) as (_, out):
            await settled(client, 123)
        return out.getvalue()

    lines = [json.loads(line) for line in asyncio.run(play()).splitlines()]
    paired = [line for line in lines if line["event"] == "COMPARISON_PAIRED"]
    assert len(paired) == len(comparisons(client, "pair")) == 1
    assert (paired[0]["symbol"], paired[0]["extra"]["v2"]) == ("BTCUSDT", "v2-1")
    assert (paired[0]["correlation_id"], paired[0]["extra"]["trace_id"]) == ("c-1", "t-1")


def test_source_of_a_running_worker_sees_nothing_but_reads(
    redis_server, second_server, client, policy_file
) -> None:
    publish(client, 0, 50)

    async def play() -> None:
        async with working(
            redis_server.url, policy_file, redis_url=None,
            source_url=redis_server.url, sink_url=second_server.url,
        ):  # fmt: skip
            with redis.Redis.from_url(second_server.url) as sink:
                await settled(sink, 51)

    with client.monitor() as monitor:
        asyncio.run(play())
        client.echo("the end")
        seen = set()
        while (command := monitor.next_command()["command"]) != "ECHO the end":
            seen.add(command.split()[0].upper())
    asks = {"HELLO", "PING", "ACL"}  # ACL WHOAMI: what could our user do?
    if acl.ENABLED:
        asks.add("EVAL")  # who may not ask that is tried, by an append that Redis always rejects
    assert seen <= asks | {"XINFO", "MULTI", "TIME", "XREAD", "EXEC", "XREVRANGE"}


def test_cluster_exits_1(binary, daemon) -> None:
    with RedisServer.start(binary, options={"cluster-enabled": "yes"}) as server:
        code, _, err = daemon(server.url).end()
    assert code == 1
    assert "found Redis Cluster" in err


def test_status_is_shown_again_after_a_worker_stood_still(redis_server, client, daemon) -> None:
    publish(client, 0, 10)
    worker = daemon(redis_server.url)
    until(lambda: client.exists(KEYS.status))
    worker.process.send_signal(signal.SIGSTOP)
    time.sleep(3.5)  # longer than a reply may take: every connection is given up
    shown = client.hget(KEYS.status, "at_ms")
    worker.process.send_signal(signal.SIGCONT)
    until(lambda: client.hget(KEYS.status, "at_ms") != shown)
    code, lines, _ = worker.end(signal.SIGTERM)
    assert code == 0
    assert "TASK_FAILED" not in events(lines)
    assert json.loads(client.hget(KEYS.status, "body"))["state"] == "stopped"


def test_status_of_a_fenced_worker_is_refused(redis_server, client) -> None:
    async def scenario() -> None:
        first = Bus(redis_server.url, redis_server.url, KEYS, ("market.tick",))
        second = Bus(redis_server.url, redis_server.url, KEYS, ("market.tick",))
        for bus in (first, second):
            await bus.acquire(start="new", on_gap="fail", owner="test")
        await second.publish(b"second")
        await first.publish(b"first")
        for bus in (first, second):
            await bus.close()

    asyncio.run(scenario())
    assert client.hget(KEYS.status, "body") == b"second"
    seconds, _ = client.time()
    assert abs(int(client.hget(KEYS.status, "at_ms")) - seconds * 1_000) < 60_000
