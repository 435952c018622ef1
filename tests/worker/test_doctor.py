"""Does the doctor name what is wrong, and does the exit code say how bad it is?"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import redis
from typer.testing import CliRunner

from tests.acl import ENABLED, FILE, users
from tests.conftest import TIER_7
from worker.cli import app
from worker.config import load_config
from worker.doctor import Row, artifact, clock, memory_rows, server_rows, show, stream_row
from worker.embedded import RedisServer
from worker.errors import CheckFailed, RedisUnavailable
from worker.keys import INPUTS, Keys

KEYS = Keys()


def doctor(*flags: str) -> tuple[BaseException | None, dict[str, dict[str, str]]]:
    """Return the error and check -> row."""
    done = CliRunner().invoke(app, ["doctor", "--json", *flags])
    rows = json.loads(done.stdout) if done.stdout.strip() else []
    assert len({row["check"] for row in rows}) == len(rows)
    return done.exception, {row["check"]: row for row in rows}


def statuses(rows: dict[str, dict[str, str]], status: str) -> list[str]:
    return [name for name, row in rows.items() if row["status"] == status]


def test_the_table_shows_words_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    show([Row("Redis: kind", "ok", "standalone [1]"), Row("memory", "danger", "full", "free it")])
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["check", "found", "what", "to", "do"],
        ["Redis:", "kind", "ok", "standalone", "[1]"],
        ["memory", "danger", "full", "free", "it"],
    ]


@pytest.mark.skipif(ENABLED, reason="expects a server without permissions")
def test_an_open_server_is_a_danger_and_every_problem_has_a_remedy(
    redis_server: RedisServer, client: redis.Redis, tier: str
) -> None:
    client.xadd(KEYS.stream("market.tick"), {"a": 1})
    client.xadd(KEYS.stream("trade.closed"), {"a": 1}, id="1-1")
    before = client.info("commandstats")
    error, rows = doctor("--redis-url", redis_server.url)
    assert isinstance(error, CheckFailed)
    assert error.exit_code == 4
    assert str(error) == "expected no danger, found 1: Redis: permissions"
    assert statuses(rows, "danger") == ["Redis: permissions"]
    assert statuses(rows, "warning") == [
        *(["Redis: version"] if tier == "6.2" else []), "Redis: persistence",
    ]  # fmt: skip
    assert rows["Redis: market.tick"]["status"] == "ok"
    assert re.fullmatch(r"1 entries, grew \d+ s ago", rows["Redis: market.tick"]["found"])
    assert "days ago" in rows["Redis: trade.closed"]["found"]
    assert rows["Redis: market.klines"] == {
        "check": "Redis: market.klines", "status": "note", "found": "absent", "remedy": "",
    }  # fmt: skip
    assert {f"Redis: {name}" for name in INPUTS} <= set(rows)
    assert rows["our state"]["found"] == "none yet: a first start"
    for row in rows.values():
        assert bool(row["remedy"]) == (row["status"] in ("warning", "danger"))
    # nothing was written
    writes = {"cmdstat_xadd", "cmdstat_set", "cmdstat_hset", "cmdstat_del", "cmdstat_xtrim"}
    after = client.info("commandstats")
    calls = {name: after[name]["calls"] for name in writes & set(after)}
    assert calls == {name: before[name]["calls"] for name in calls}


@pytest.mark.skipif(ENABLED, reason="gives a user of its own")
@pytest.mark.parametrize("tier", TIER_7, indirect=True, scope="session")
def test_two_servers_with_the_shipped_users_are_well(
    redis_server: RedisServer, durable_server: RedisServer, client: redis.Redis
) -> None:
    client.xadd(KEYS.stream("market.tick"), {"a": 1})
    urls = []
    for server, user in ((redis_server, "rlv3-source"), (durable_server, "rlv3-worker")):
        with redis.Redis.from_url(server.url) as admin:
            rules = users(FILE.read_text("utf-8"))[user]
            admin.execute_command("ACL", "SETUSER", user, *rules, "on", ">pw")
        urls.append(server.url.replace("//", f"//{user}:pw@"))
    error, rows = doctor("--source-url", urls[0], "--sink-url", urls[1])
    client.execute_command("ACL", "DELUSER", "rlv3-source")
    assert error is None
    assert statuses(rows, "warning") == statuses(rows, "danger") == []
    assert "source: market.tick" in rows
    assert "sink: persistence" in rows
    assert "pw" not in rows["sink: address"]["found"]


def test_a_cluster_is_a_danger(binary: Any) -> None:
    with RedisServer.start(binary, options={"cluster-enabled": "yes"}) as server:
        error, rows = doctor("--redis-url", server.url)
    assert isinstance(error, CheckFailed)
    assert "Redis: kind" in str(error)
    assert "standalone" in rows["Redis: kind"]["remedy"]


@pytest.mark.parametrize(
    ("flags", "code"),
    [(("--redis-url", "redis://127.0.0.1:1/0"), 1), (("--redis-url", "http://nowhere"), 2)],
)
def test_unreachable_and_impossible_have_their_own_codes(flags: tuple[str, ...], code: int) -> None:
    error, rows = doctor(*flags)
    assert getattr(error, "exit_code", None) == code
    assert rows == {}


def test_a_user_who_may_not_look_is_one_sentence(
    redis_server: RedisServer, client: redis.Redis
) -> None:
    client.acl_setuser(
        "shy", enabled=True, passwords=["+p"], keys=["*"], commands=["+ping", "+hello"]
    )
    try:
        error, rows = doctor("--redis-url", redis_server.url.replace("//", "//shy:p@"))
    finally:
        client.acl_deluser("shy")
    assert isinstance(error, RedisUnavailable)
    assert str(error).startswith(f"expected Redis at {redis_server.url} to let us look, found: ")
    assert rows == {}


def test_an_artifact_that_would_be_refused_is_a_danger(untrained_policy_file: Path) -> None:
    row = artifact(load_config({"policy": str(untrained_policy_file)}, {}))
    assert (row.status, "expected a trained policy" in row.found) == ("danger", True)
    assert artifact(load_config({}, {})).status == "ok"


MEMORY = {
    "maxmemory_policy": "noeviction", "maxmemory": 1_000, "used_memory": 100, "evicted_keys": 0,
    "aof_enabled": 1, "aof_last_write_status": "ok", "rdb_last_bgsave_status": "ok",
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "memory", "persistence"),
    [
        ({}, "ok", "ok"),
        ({"used_memory": 801}, "warning", "ok"),
        ({"maxmemory": 0}, "ok", "ok"),
        ({"maxmemory_policy": "volatile-lru"}, "ok", "ok"),  # nothing of ours but the heartbeat
        ({"maxmemory_policy": "allkeys-lru"}, "warning", "ok"),
        ({"maxmemory_policy": "allkeys-lru", "used_memory": 801}, "danger", "ok"),
        ({"maxmemory_policy": "allkeys-lru", "evicted_keys": 1}, "danger", "ok"),
        ({"maxmemory_policy": "allkeys-lru", "maxmemory": 0}, "ok", "ok"),  # never evicts
        ({"aof_enabled": 0}, "ok", "warning"),
        ({"rdb_last_bgsave_status": "err"}, "ok", "danger"),
        ({"aof_last_write_status": "err"}, "ok", "danger"),
    ],
)
def test_memory_and_persistence(changes: dict[str, Any], memory: str, persistence: str) -> None:
    rows = list(memory_rows("sink", MEMORY | changes))
    assert [row.status for row in rows] == [memory, persistence]
    assert list(memory_rows("source", MEMORY | changes)) == []  # nothing of ours is there


@pytest.mark.parametrize(
    ("version", "status"), [("6.0.16", "danger"), ("6.2.14", "warning"), ("7.0.0", "ok")]
)
def test_version(version: str, status: str) -> None:
    first = next(server_rows("Redis", {"redis_version": version, "redis_mode": "standalone"}))
    assert first.status == status


def test_clock_and_silent_or_future_streams() -> None:
    assert [clock("Redis", skew).status for skew in (0.9, -0.9, 1.1, -1.1)] == [
        "ok", "ok", "warning", "warning",
    ]  # fmt: skip
    now_ms = time.time() * 1_000

    def status(event_type: str, age_s: float) -> str:
        last = f"{now_ms - 1_000 * age_s:.0f}-0".encode()
        info = {"length": 1, "last-generated-id": last}
        return stream_row("", event_type, info, now_ms).status

    assert [status("market.tick", age) for age in (59, 61, -2)] == ["ok", "warning", "warning"]
    assert [status("trade.closed", age) for age in (59, 61, -2)] == ["ok", "note", "warning"]
    assert stream_row("", "market.tick", None, now_ms).status == "warning"
    assert stream_row("", "trade.closed", None, now_ms).status == "note"
