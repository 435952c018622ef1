"""Does uninstall remove exactly what is ours, and only when it is meant?"""

from __future__ import annotations

import time

import pytest
import redis
from typer.testing import CliRunner, Result

from tests.acl import ENABLED
from worker.cli import app
from worker.embedded import RedisServer
from worker.errors import CheckFailed, RedisUnavailable
from worker.keys import OTHERS, OTHERS_KEYS, Keys

pytestmark = pytest.mark.skipif(ENABLED, reason="is the operator's work, not the worker's")
KEYS = Keys()
OURS = [
    KEYS.decisions, KEYS.comparisons, KEYS.dlq("market.tick"), KEYS.meta, KEYS.symbols,
    KEYS.dlq("rl_v3.replay"), KEYS.state("BTCUSDT"), KEYS.state(""), KEYS.artifact("0" * 64),
    KEYS.collected,
]  # fmt: skip
ENVELOPE = {"event_type": "x", "payload": "{}", "source": "rl-v3-shadow"}


@pytest.fixture
def theirs(client: redis.Redis) -> set[bytes]:
    """Everything of ours is there, and of others what looks most like it."""
    for key in OURS:
        if ":stream:" in key or ":dlq:" in key:
            client.xadd(key, ENVELOPE)
        else:
            client.set(key, "ours")
    client.xadd(KEYS.replay, ENVELOPE | {"source": "market-publisher"})  # a copy of theirs
    names = [
        *map(KEYS.stream, OTHERS), *map(KEYS.other, OTHERS_KEYS), "quantum:dlq:somebody",
        "quantum:rl_v3_shadow", "quantum:rl_v3_shadows:x", "xquantum:rl_v3_shadow:meta",
        "quantumxrl_v3_shadow:meta", "other:stream:rl_v3.decision",
        "quantum:stream:rl_v3.decision.copy", "quantum:svc:rl_v3_shadow2:heartbeat",
    ]  # fmt: skip
    for name in names:
        client.set(name, "theirs")
    return {name.encode() for name in names}


def uninstall(server: RedisServer, *flags: str, answer: str = "") -> Result:
    command = ["uninstall", "--redis-url", server.url, *flags]
    return CliRunner().invoke(app, command, input=answer)


def test_exactly_our_keys_go(redis_server, client, theirs) -> None:
    done = uninstall(redis_server, "--yes")
    assert done.exception is None
    assert set(client.keys("*")) == theirs
    assert f"removed {len(OURS) + 1} keys from {redis_server.url}" in done.stdout
    again = uninstall(redis_server, "--yes")
    assert "nothing of ours is in" in again.stdout


def test_a_dry_run_lists_them_all_and_removes_nothing(redis_server, client, theirs) -> None:
    before = set(client.keys("*"))
    done = uninstall(redis_server, "--dry-run", "--yes")
    flat = done.stdout.replace("\n", "").replace(" ", "")
    assert [key for key in OURS if key not in flat and key != KEYS.artifact("0" * 64)] == []
    assert set(client.keys("*")) == before


def test_a_stream_with_a_strangers_entry_stays_and_is_named(redis_server, client, theirs) -> None:
    client.xadd(KEYS.decisions, ENVELOPE | {"source": "backend_api"})
    done = uninstall(redis_server, "--yes")
    assert set(client.keys("*")) == theirs | {KEYS.decisions.encode()}
    assert client.xlen(KEYS.decisions) == 2
    assert "stays: 1 entries" in " ".join(done.stdout.split())


def test_nobody_is_asked_without_a_terminal(redis_server, client, theirs) -> None:
    before = set(client.keys("*"))
    done = uninstall(redis_server, answer="y\n")
    assert "expected --yes where nobody can be asked" in str(done.exception)
    assert set(client.keys("*")) == before


def test_a_running_worker_is_not_robbed_unless_forced(redis_server, client, theirs) -> None:
    client.set(KEYS.heartbeat, repr(time.time()), ex=10)
    done = uninstall(redis_server, "--yes")
    assert isinstance(done.exception, CheckFailed)
    assert set(client.keys("*")) > theirs
    assert uninstall(redis_server, "--yes", "--force").exception is None
    assert set(client.keys("*")) == theirs


def test_a_user_who_may_not_is_one_sentence(redis_server, client, theirs) -> None:
    client.acl_setuser(
        "shy", enabled=True, passwords=["+p"], keys=["*"], categories=["+@all"],
        commands=["-unlink"],
    )  # fmt: skip
    try:
        url = redis_server.url.replace("//", "//shy:p@")
        done = CliRunner().invoke(app, ["uninstall", "--redis-url", url, "--yes"])
    finally:
        client.acl_deluser("shy")
    assert isinstance(done.exception, RedisUnavailable)
    sentence = f"expected Redis at {redis_server.url} to let us remove our keys, found: "
    assert str(done.exception).startswith(sentence)
