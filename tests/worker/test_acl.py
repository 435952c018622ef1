"""Does Redis itself refuse whatever the shipped users must not do, from a client and from Lua?"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import redis

from tests.acl import FILE, users
from tests.conftest import SERVERS, TIER_7
from worker.embedded import RedisServer
from worker.keys import OTHERS, OTHERS_KEYS, Keys

KEYS = Keys()
USERS = users(FILE.read_text("utf-8"))
PASSWORD = "secret"
LUA = "return redis.call(unpack(ARGV))"
FOREIGN = [*map(KEYS.stream, OTHERS), *map(KEYS.other, OTHERS_KEYS), "somebody:else"]
OURS = [
    KEYS.decisions, KEYS.comparisons, KEYS.dlq("market.tick"), KEYS.meta, KEYS.symbols,
    KEYS.state("BTCUSDT"), KEYS.artifact("0" * 64), KEYS.collected, KEYS.heartbeat,
    KEYS.replay, KEYS.verdict, KEYS.status,
]  # fmt: skip
DAMAGING = (
    """
XADD {key} * a 1|XADD {key} 0-0 a 1|XTRIM {key} MAXLEN 0|XDEL {key} 1-1|XSETID {key} 9-9
XGROUP CREATE {key} g 0 MKSTREAM|XGROUP DESTROY {key} g|XGROUP SETID {key} g 0|XACK {key} g 1-1
XREADGROUP GROUP g c STREAMS {key} >|XCLAIM {key} g c 0 1-1|XAUTOCLAIM {key} g c 0 0
DEL {key}|UNLINK {key}|RENAME {key} x|RENAMENX {key} x|COPY x {key} REPLACE|MOVE {key} 1
EXPIRE {key} 1|PERSIST {key}|RESTORE {key} 0 x|DUMP {key}|MIGRATE h 1 {key} 0 1
SORT {key} STORE {key}|BITOP NOT {key} x|SET {key} 1|SETEX {key} 9 1|GETDEL {key}|APPEND {key} 1
INCR {key}|SETRANGE {key} 0 x
HSET {key} a 1|HDEL {key} a|HINCRBY {key} a 1|SADD {key} 1|SREM {key} 1|LPUSH {key} 1|ZADD {key} 1 a
""".replace("\n", "|")
    .strip("|")
    .split("|")
)
"""What hurts a key."""
GLOBAL = [
    "FLUSHALL", "FLUSHDB", "SWAPDB 0 1", "SHUTDOWN NOSAVE", "CONFIG SET maxmemory 1",
    "CONFIG GET requirepass", "CONFIG REWRITE", "CONFIG RESETSTAT", "ACL SETUSER x on", "ACL LIST",
    "ACL DELUSER default", "ACL LOAD", "ACL SAVE", "SCRIPT FLUSH", "SCRIPT KILL", "FUNCTION FLUSH",
    "FUNCTION LOAD x", "FCALL x 0", "DEBUG SLEEP 0", "DEBUG RELOAD", "REPLICAOF NO ONE",
    "SLAVEOF NO ONE", "FAILOVER", "BGSAVE", "BGREWRITEAOF", "SAVE", "CLIENT KILL TYPE normal",
    "CLIENT PAUSE 1", "CLIENT LIST", "MODULE LIST", "MODULE LOAD x", "MONITOR", "KEYS *",
    "PUBLISH quantum:kill 1", "SUBSCRIBE x", "SLOWLOG RESET", "LATENCY RESET", "CLUSTER INFO",
    "MEMORY PURGE", "WAIT 0 1", "RANDOMKEY", "SYNC", "PSYNC ? -1", "REPLCONF x y",
]  # fmt: skip
"""What hurts a server, or tells what is nobody's business."""


@pytest.fixture(scope="module", params=TIER_7)
def guarded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RedisServer]:
    """A server that has loaded the shipped file; selectors need Redis 7."""
    path = tmp_path_factory.mktemp("acl") / "users.acl"
    path.write_text(FILE.read_text("utf-8"), "utf-8")
    # without its own locks on DEBUG and MODULE, so that it is the permissions that refuse them
    options = {"aclfile": str(path), "enable-debug-command": "yes", "enable-module-command": "yes"}
    with RedisServer.start(SERVERS[request.param], options=options) as server:
        with redis.Redis.from_url(server.url) as admin:
            admin.execute_command("ACL LOAD")
            for name in USERS:
                admin.execute_command("ACL", "SETUSER", name, "on", f">{PASSWORD}")
            for key in FOREIGN:
                admin.xadd(key, {"a": 1}) if ":stream:" in key else admin.set(key, "theirs")
        yield server


def log_in(server: RedisServer, user: str) -> redis.Redis:
    return redis.Redis.from_url(server.url, username=user, password=PASSWORD)


def contents(server: RedisServer) -> dict[bytes, bytes]:
    with redis.Redis.from_url(server.url) as admin:
        return {key: admin.dump(key) for key in sorted(admin.keys())}


def answers(client: redis.Redis, commands: list[list[str]]) -> list[str]:
    """Return per command what Redis says against it, or "" when it did what it was told."""
    with client.pipeline(transaction=False) as batch:
        for command in commands:
            batch.execute_command(*command)
        replies = batch.execute(raise_on_error=False)
    return [f"{type(r).__name__}: {r}" if isinstance(r, Exception) else "" for r in replies]


def refused(said: str) -> bool:
    """Return True for what permissions answer; some commands a script may not even try."""
    return (
        re.search("NoPermission|NOPERM|executing the script can't|not allowed from", said)
        is not None
    )


@pytest.mark.parametrize("user", USERS)
def test_nobody_touches_what_is_not_ours(guarded: RedisServer, user: str) -> None:
    """Every damaging command, on every key of the trading system, plainly and from Lua."""
    before = contents(guarded)
    commands = []
    for key in FOREIGN:
        for line in DAMAGING:
            command = line.format(key=key).split()
            commands += [command, ["EVAL", LUA, "0", *command], ["EVAL", LUA, "1", key, *command]]
    with log_in(guarded, user) as client:
        said = answers(client, commands)
    assert [pair for pair in zip(commands, said, strict=True) if not refused(pair[1])] == []
    assert contents(guarded) == before


@pytest.mark.parametrize("user", USERS)
def test_nobody_touches_the_server(guarded: RedisServer, user: str) -> None:
    before = contents(guarded)
    commands = [line.split() for line in GLOBAL]
    commands += [["EVAL", LUA, "0", *command] for command in commands]
    with log_in(guarded, user) as client:
        said = answers(client, commands)
    assert [pair for pair in zip(commands, said, strict=True) if not refused(pair[1])] == []
    assert contents(guarded) == before


def permitted(server: RedisServer, user: str) -> dict[str, set[str]]:
    """Return key -> what of `DAMAGING` a user may do to it; keys without anything are left out."""
    with redis.Redis.from_url(server.url) as admin:
        found: dict[str, set[str]] = {}
        for key in OURS:
            for line in DAMAGING:
                command = line.format(key=key).split()
                if admin.execute_command("ACL", "DRYRUN", user, *command) == b"OK":
                    found.setdefault(key, set()).add(command[0])
    return found


def test_each_user_may_do_only_its_own_work_with_our_keys(guarded: RedisServer) -> None:
    outputs = (KEYS.decisions, KEYS.comparisons, KEYS.dlq("market.tick"))
    shell = {"SET", "HSET", "HINCRBY", "SADD", "SREM"}
    own = (KEYS.meta, KEYS.symbols, KEYS.artifact("0" * 64), KEYS.collected)
    own += (KEYS.verdict, KEYS.status)
    assert permitted(guarded, "rlv3-worker") == {
        **{key: {"XADD", "XTRIM"} for key in outputs},
        **dict.fromkeys(own, frozenset(shell)),
        KEYS.state("BTCUSDT"): shell | {"DEL"},
        KEYS.heartbeat: {"SETEX"},
        KEYS.replay: {"XTRIM"},
    }
    assert permitted(guarded, "rlv3-source") == {}
    assert permitted(guarded, "rlv3-analyst") == {}
    assert permitted(guarded, "rlv3-collector") == {
        KEYS.collected: {"HSET"},
        KEYS.verdict: {"SET"},
    }
    assert permitted(guarded, "rlv3-operator") == {
        **{key: {"UNLINK"} for key in OURS},
        KEYS.replay: {"UNLINK", "XADD"},
    }


def test_users_are_off_and_without_a_password_as_shipped() -> None:
    text = FILE.read_text("utf-8")
    assert all(re.match(r"user rlv3-[a-z]+ off resetkeys resetchannels -@all ", line)
               for line in text.splitlines())  # fmt: skip
    assert not re.search(r"nopass|[>#<!]", text)
