"""Is a user that could trade found out, whatever the server lets it ask, and without a trace?"""

from __future__ import annotations

import asyncio
import json
from io import StringIO
from pathlib import Path

import pytest
import redis

from tests.acl import ENABLED, FILE, users
from tests.conftest import TIER_7
from worker import logs
from worker.address import connected
from worker.artifact import load_policy
from worker.bus import Bus
from worker.config import load_config
from worker.embedded import RedisServer
from worker.errors import CheckFailed
from worker.keys import OTHERS, Keys
from worker.permission import Harm, harm
from worker.service import Worker

pytestmark = pytest.mark.skipif(ENABLED, reason="gives users of its own")
KEYS = Keys()
INTENT = KEYS.stream("trade.intent")
MAY_NOT_ASK = "-acl"


@pytest.fixture(autouse=True)
def own_users(redis_server: RedisServer, client: redis.Redis) -> object:
    """Users go when the test ends: the server is shared."""
    yield
    for line in client.execute_command("ACL", "LIST"):
        name = line.decode().split()[1]
        if name != "default":
            client.execute_command("ACL", "DELUSER", name)


def found(server: RedisServer, user: str = "") -> Harm:
    async def ask() -> Harm:
        url = server.url.replace("//", f"//{user}:pw@") if user else server.url
        async with connected(url) as link:
            return await harm(link, KEYS)

    return asyncio.run(ask())


def test_a_user_who_may_do_everything_is_found_out(redis_server, client, tier) -> None:
    said = found(redis_server)
    assert said.user == "default"
    if tier == "7":
        assert said.way == "ACL DRYRUN"
        assert f"XADD {INTENT}" in said.commands
        assert {"FLUSHALL", f"DEL {INTENT}", "SET quantum:kill"} <= set(said.commands)
    else:
        assert said.commands == ("every command on every key",)
    assert client.keys("*") == []


@pytest.mark.parametrize(
    ("rules", "way", "commands"),
    [
        (("+@all", MAY_NOT_ASK, f"~{INTENT}"), "an append from Lua", (f"XADD {INTENT}",)),
        (("+ping", "+xadd", f"~{INTENT}"), "an append that Redis", (f"XADD {INTENT}",)),
        (("+@all", MAY_NOT_ASK, "-xadd", "allkeys"), "an append from Lua", ()),
        (("+ping", "+@read", "allkeys"), "an append that Redis", ()),
        (("+ping", "+eval", "+xadd", "~quantum:mine:*"), "an append from Lua", ()),
    ],
)
def test_a_user_who_may_not_ask_is_tried(redis_server, client, rules, way, commands) -> None:
    client.execute_command("ACL", "SETUSER", "someone", "on", ">pw", *rules)
    said = found(redis_server, "someone")
    assert said.way.startswith(way)
    assert said.commands == commands
    assert client.keys("*") == []


def test_a_user_without_lua_and_all_streams_has_them_all(redis_server, client) -> None:
    client.execute_command("ACL", "SETUSER", "someone", "on", ">pw", "+ping", "+xadd", "allkeys")
    assert found(redis_server, "someone").commands == tuple(
        f"XADD {KEYS.stream(name)}" for name in OTHERS
    )
    assert client.keys("*") == []


@pytest.mark.parametrize("tier", TIER_7, indirect=True, scope="session")
@pytest.mark.parametrize("user", users(FILE.read_text("utf-8")))
def test_shipped_users_can_do_no_harm(redis_server, client, user) -> None:
    rules = users(FILE.read_text("utf-8"))[user]
    client.execute_command("ACL", "SETUSER", user, *rules, "on", ">pw")
    assert found(redis_server, user).commands == ()


def start(url: str, policy: Path, *, require_acl: bool) -> list[dict[str, str]]:
    """Start a worker, stop it at once and return its log lines."""
    given = {"redis_url": url, "policy": str(policy), "require_acl": str(require_acl)}
    config = load_config(given, {})
    out = StringIO()

    async def play() -> None:
        bus = Bus(config.source_url, config.sink_url, KEYS, config.inputs)
        worker = Worker(config, bus, load_policy(config), None, logs.configure("INFO", out))
        worker.stop()
        try:
            await worker.run()
        finally:
            await bus.close()

    asyncio.run(play())
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_worker_warns_loudly_and_refuses_when_told(redis_server, policy_file) -> None:
    warning = [
        line for line in start(redis_server.url, policy_file, require_acl=False)
        if line["event"] == "USER_COULD_TRADE"
    ]  # fmt: skip
    assert [line["level"] for line in warning] == ["WARNING"]
    assert "to refuse its user default all that could trade" in warning[0]["msg"]
    with pytest.raises(CheckFailed, match=r"--require-acl: expected redis://127.*found that") as no:
        start(redis_server.url, policy_file, require_acl=True)
    assert no.value.exit_code == 4


@pytest.mark.parametrize("tier", TIER_7, indirect=True, scope="session")
def test_worker_starts_as_the_shipped_user_where_it_is_required(
    redis_server, client, policy_file
) -> None:
    rules = users(FILE.read_text("utf-8"))["rlv3-worker"]
    client.execute_command("ACL", "SETUSER", "rlv3-worker", *rules, "on", ">pw")
    url = redis_server.url.replace("//", "//rlv3-worker:pw@")
    events = [line["event"] for line in start(url, policy_file, require_acl=True)]
    assert "USER_COULD_TRADE" not in events
    assert events[0] == "REDIS_CONNECTED"
