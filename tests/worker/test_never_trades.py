"""Would a change that publishes to a trading stream be caught? Such changes are made here.

Three guards, each of which has to catch the mutants that reach it: the list below of every place
that can write to Redis; the publisher's allow-list of keys; and Redis itself, under the shipped
users.
"""

from __future__ import annotations

import ast
import asyncio
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import redis

from shadow.records import Commit, Output
from tests.acl import ENABLED, FILE, users
from tests.conftest import TIER_7
from worker import bus as bus_module
from worker.bus import Bus, BusError
from worker.keys import ALL_INPUTS, INPUTS, OTHERS, Keys

ROOT = Path(__file__).resolve().parents[2]
KEYS = Keys()

WRITING = frozenset(
    re.findall(
        r"\w+",
        """
        APPEND BITOP COPY DECR DEL EVAL EVALSHA EXPIRE FCALL FLUSHALL FLUSHDB GETDEL GETSET HDEL
        HINCRBY HMSET HSET HSETNX INCR INCRBY LPUSH LREM LTRIM MIGRATE MOVE MSET PERSIST PEXPIRE
        PSETEX PUBLISH RENAME RESTORE RPUSH SADD SET SETEX SETNX SETRANGE SMOVE SPOP SREM SWAPDB
        UNLINK XACK XADD XAUTOCLAIM XCLAIM XDEL XGROUP XREADGROUP XSETID XTRIM ZADD ZREM
        """,
    )
)
PYTHONS = {"append", "copy", "move", "restore"}
"""Methods of that name here are Python's own, not the client's."""
METHODS = {name.lower() for name in WRITING} - PYTHONS | {
    "delete", "execute_command", "register_script", "xgroup_create", "xgroup_destroy",
    "xgroup_setid", "eval", "evalsha", "script", "flushall", "flushdb",
}  # fmt: skip
PLACES = {
    ("acquire.lua", "HINCRBY"): 1,  # epoch
    ("acquire.lua", "HSET"): 4,  # owner, number of symbols (twice), cursors
    ("acquire.lua", "SREM"): 2,
    ("acquire.lua", "DEL"): 1,  # what a warm-up that was cut short left behind
    ("commit.lua", "XADD"): 1,  # the one publisher: KEYS, of `Bus._outputs`
    ("commit.lua", "DEL"): 2,  # damaged and orphaned state
    ("commit.lua", "SADD"): 1,
    ("commit.lua", "HSET"): 3,
    ("commit.lua", "HINCRBY"): 1,  # number of symbols
    ("trim.lua", "XTRIM"): 2,  # our own streams
    ("trim.lua", "HINCRBY"): 1,
    ("bus.py", "EVALSHA"): 1,
    ("bus.py", "EVAL"): 1,
    ("bus.py", "SET"): 1,  # artifact
    ("bus.py", "SETEX"): 1,  # heartbeat
    ("bus.py", "script()"): 5,  # acquire, commit, trim, publish, suspect
    ("bus.py", "HINCRBY"): 1,  # how often one was fenced
    ("publish.lua", "HSET"): 1,  # status
    ("suspect.lua", "HSET"): 1,  # the suspect entry
    ("collector.py", "set()"): 1,  # newest statistics
    ("dlq.py", "xadd()"): 1,  # our replay stream
    ("collector.py", "hset()"): 1,  # position
    ("demo.py", "unlink()"): 1,  # the demo's own prefix
    ("demo.py", "publish()"): 1,  # a count of its own, not Redis's command
    ("demo.py", "xadd()"): 1,  # the demo's publisher
    ("permission.py", "XADD"): 3,  # twice id 0-0, which Redis always rejects; ACL DRYRUN
    ("permission.py", "XTRIM"): 1,  # ACL DRYRUN
    ("permission.py", "XGROUP"): 1,
    ("permission.py", "DEL"): 1,
    ("permission.py", "RENAME"): 1,
    ("permission.py", "SET"): 2,  # ACL DRYRUN SET, CONFIG SET
    ("permission.py", "FLUSHALL"): 1,
    ("permission.py", "FLUSHDB"): 1,
    ("permission.py", "SWAPDB"): 1,
    ("permission.py", "EVAL"): 1,
    ("permission.py", "execute_command()"): 1,
    ("service.py", "publish()"): 2,  # the bus's, which runs publish.lua
    ("uninstall.py", "unlink()"): 1,
}
"""(file, command) -> how often it is written there. Whoever adds one has to argue for it here."""


def sources() -> dict[str, str]:
    """Return file name -> text of everything that could talk to Redis."""
    found = [*(ROOT / "worker").glob("*.py"), *(ROOT / "worker").glob("*.lua")]
    return {path.name: path.read_text("utf-8") for path in found}


def places(texts: Mapping[str, str]) -> dict[tuple[str, str], int]:
    """Return every place that can write to Redis."""
    found: dict[tuple[str, str], int] = {}

    def note(name: str, command: str) -> None:
        found[name, command] = found.get((name, command), 0) + 1

    for name, text in texts.items():
        if name.endswith(".lua"):
            for command in re.findall(r"redis\.p?call\(\s*['\"](\w+)", text):
                if command.upper() in WRITING:
                    note(name, command.upper())
            for _ in re.findall(r"redis\.p?call\(\s*[^'\"\s]", text):
                note(name, "a computed command")
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                if node.value in WRITING:
                    note(name, node.value)
                for command in re.findall(r"redis\.p?call\(\s*['\"](\w+)", node.value):
                    note(name, command)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                method = node.func.attr
                many = len(node.args) + len(node.keywords) > 1
                if method in METHODS and (method != "set" or many):  # an Event's has no argument
                    note(name, f"{method}()")
    return found


def test_every_place_that_can_write_is_known() -> None:
    assert places(sources()) == PLACES


MUTANTS: dict[str, tuple[str, str, str]] = {
    "a publish through the bus's own connection": (
        "bus.py",
        '        await self._sink.call("SETEX"',
        '        await self._sink.call("XADD", self.keys.stream("trade.intent"), "*", "a", "1")\n'
        '        await self._sink.call("SETEX"',
    ),
    "a publish by a reader's client": (
        "collector.py",
        "        position = self.store.position\n",
        "        position = self.store.position\n"
        '        await self.link.xadd(self.keys.stream("trade.intent"), {"side": "BUY"})\n',
    ),
    "a publish in the commit": (
        "commit.lua",
        "if #fields > 0 then",
        "redis.call('XADD', 'quantum:stream:trade.intent', '*', 'side', 'BUY')\n"
        "if #fields > 0 then",
    ),
    "a computed command in the commit": (
        "commit.lua",
        "if #fields > 0 then",
        "redis.call(ARGV[1], ARGV[2])\nif #fields > 0 then",
    ),
    "a new script": (
        "service.py",
        "        self._log_start(start)",
        "        await self.bus._sink.script(object(), ['quantum:stream:trade.intent'], [])\n"
        "        self._log_start(start)",
    ),
    "an overwritten kill switch": (
        "recorder.py",
        "        self._redis.succeeded()",
        '        await self.sink.set("quantum:kill", "0")\n        self._redis.succeeded()',
    ),
    "a trimmed trading stream": (
        "service.py",
        "        self._log_start(start)",
        "        await self.bus._source.call('XTRIM', 'quantum:stream:trade.intent', 'MAXLEN', 0)\n"
        "        self._log_start(start)",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_change_that_trades_is_caught_by_the_list(name: str) -> None:
    file, before, after = MUTANTS[name]
    texts = sources()
    changed = texts[file].replace(before, after, 1)
    assert changed != texts[file], "the mutant's place is gone: choose another"
    assert places(texts | {file: changed}) != PLACES


@pytest.mark.parametrize("name", [*OTHERS, "rl_v3.decisions", "dlq:trade.executed", ""])
def test_the_publisher_has_an_allow_list(redis_server, client: redis.Redis, name: str) -> None:
    """A pipeline that was changed to emit an order: the whole commit fails before Redis sees it."""

    async def publish() -> None:
        bus = Bus(redis_server.url, redis_server.url, KEYS, ALL_INPUTS)
        try:
            await bus.connect()
            await bus.acquire(start="oldest", on_gap="fail", owner="test")
            outputs = [Output("rl_v3.decision", b"{}", "", ""), Output(name, b"{}", "", "")]
            await bus.commit(Commit(outputs, {}, {}, {}, 0))
        finally:
            await bus.close()

    with pytest.raises(KeyError):
        asyncio.run(publish())
    assert client.keys("quantum:stream:*") == []


def test_the_allow_list_holds_nothing_of_others() -> None:
    bus = Bus("redis://127.0.0.1:1", "redis://127.0.0.1:1", KEYS, ALL_INPUTS)
    allowed = {KEYS.decisions, KEYS.comparisons, *map(KEYS.dlq, ALL_INPUTS)}
    assert set(bus._outputs.values()) == allowed
    assert allowed & set(map(KEYS.stream, OTHERS)) == set()


@pytest.mark.skipif(ENABLED, reason="gives a user of its own")
@pytest.mark.parametrize("tier", TIER_7, indirect=True, scope="session")
def test_a_commit_that_trades_is_refused_by_redis(
    redis_server, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Should both other guards be removed: the mutated script under the shipped user."""
    _, before, after = MUTANTS["a publish in the commit"]
    script = bus_module._Script("commit.lua")
    script.text = script.text.replace(before.encode(), after.encode(), 1)
    script.sha = "0" * 40
    monkeypatch.setattr(bus_module, "_COMMIT", script)
    rules = users(FILE.read_text("utf-8"))["rlv3-worker"]
    client.execute_command("ACL", "SETUSER", "rlv3-worker", *rules, "on", ">pw")
    url = redis_server.url.replace("//", "//rlv3-worker:pw@")

    async def commit() -> None:
        bus = Bus(url, url, KEYS, INPUTS)
        try:
            await bus.connect()
            await bus.acquire(start="oldest", on_gap="fail", owner="test")
            await bus.commit(Commit([], {}, {}, {}, 0))
        finally:
            await bus.close()

    with pytest.raises(BusError, match=r"can't access|NOPERM"):
        asyncio.run(commit())
    assert client.exists(KEYS.stream("trade.intent")) == 0
    client.execute_command("ACL", "DELUSER", "rlv3-worker")
