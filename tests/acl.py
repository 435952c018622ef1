"""Run the product's own tests under the shipped permissions.

With RLV3_TEST_ACL set, every private server gets the shipped roles for the prefixes that tests use,
and its default user, which is what the product's programs log in as, gets one of them: see `ROLES`.
The tests' own clients (the synchronous ones) become an administrator.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import redis

from worker.embedded import RedisServer

ENABLED = bool(os.environ.get("RLV3_TEST_ACL"))
FILE = Path(__file__).resolve().parents[1] / "deploy" / "redis" / "users.acl"
PREFIXES = ("quantum", "t")
WORKER = ("rlv3-worker",)
ROLES = {
    "test_collector": ("rlv3-collector",),
    "test_dlq": ("rlv3-worker", "rlv3-operator"),  # both at once, from one process
}
"""Test module -> roles of the programs that it starts; the worker's where it is not named."""
ADMIN = "administrator"
PASSWORD = "of-the-tests"

_servers: list[RedisServer] = []
_roles = WORKER


def users(text: str, prefixes: tuple[str, ...] = ("quantum",)) -> dict[str, list[str]]:
    """Return user -> rules; the selectors of the file once for each prefix."""
    found = {}
    for line in text.splitlines():
        _, name, *_ = line.split()
        rules = re.findall(r"\([^)]*\)|\S+", line)[2:]
        plain = [rule for rule in rules if rule[0] != "("]
        found[name] = plain + [
            rule.replace("quantum:", f"{prefix}:")
            for prefix in prefixes
            for rule in rules
            if rule[0] == "("
        ]
    return found


def shipped() -> dict[str, list[str]]:
    """Return the shipped users, for the prefixes of the tests."""
    return users(FILE.read_text("utf-8"), PREFIXES)


def choose(module: str) -> None:
    """Give the programs that a test module starts their role, on every server that runs."""
    global _roles
    _roles = ROLES.get(module, WORKER)
    for server in _servers:
        if server.process is not None:
            with redis.Redis.from_url(server.url) as client:
                client.execute_command("ACL", "SETUSER", "default", *_default())


def _default() -> list[str]:
    rules = [rule for role in _roles for rule in shipped()[role]]
    return ["reset", *(rule for rule in rules if rule[0] != "("),
            *(rule for rule in rules if rule[0] == "("), "on", "nopass"]  # fmt: skip


def install() -> None:
    """Load the users into every server that is started from now on, and log tests in."""
    launch, from_url = RedisServer.launch, redis.Redis.from_url

    def launch_with_users(server: RedisServer) -> None:
        path = server.directory / "users.acl"
        lines = [
            f"user {ADMIN} on >{PASSWORD} allkeys allchannels allcommands",
            f"user default {' '.join(_default())}",
            *(f"user {name} {' '.join(rules)}" for name, rules in shipped().items()),
        ]
        path.write_text("\n".join(lines) + "\n", "utf-8")
        server._options["aclfile"] = str(path)
        _servers.append(server)
        launch(server)

    def from_url_as_administrator(url: str, **options: Any) -> redis.Redis:
        parts = urlsplit(url)
        ours = any(s.port == parts.port or str(s.socket_path) == parts.path for s in _servers)
        if ours and parts.username is None and parts.password is None:
            options |= {"username": ADMIN, "password": PASSWORD}
        return from_url(url, **options)

    RedisServer.launch = launch_with_users  # type: ignore[method-assign]
    redis.Redis.from_url = from_url_as_administrator  # type: ignore[assignment, method-assign]
