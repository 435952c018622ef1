"""Does the runbook know whatever the programs can say, and do its commands work?"""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import redis

from tests.conftest import TIER_7
from worker import errors
from worker.embedded import RedisServer
from worker.keys import Keys

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "runbook.md").read_text("utf-8")
SOURCES = [
    *sorted((ROOT / "worker").glob("*.py")),
    ROOT / "rlv3" / "policy.py",
    ROOT / "shadow" / "segments.py",
    ROOT / "shadow" / "store.py",
]
"""What can speak while `rlv3-worker` runs."""
KEYS = Keys()


def template(node: ast.expr) -> str:
    """Return a text with … for what varies."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(template, node.values))
    return "…"


def calls() -> Iterator[tuple[str, ast.Call]]:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and node.args:
                yield ast.unparse(node.func), node


def exit_codes() -> dict[str, str]:
    """Return error class -> exit code as the runbook writes it."""
    found = {"StateLost": "—"}
    for module in (errors, importlib.import_module("rlv3.errors")):
        for name, kind in vars(module).items():
            if isinstance(kind, type) and hasattr(kind, "exit_code"):
                found[name] = str(kind.exit_code)
    return found


def sentences() -> set[tuple[str, str]]:
    """Return (exit code, sentence) of every error."""
    codes = exit_codes()
    return {
        (codes[name], template(call.args[0]).replace("`", "").replace("|", "/"))
        for name, call in calls()
        if name in codes and template(call.args[0]) != "…"
    }


def events() -> set[str]:
    """Return every log event."""
    subjects = {
        str(call.args[0].value)
        for name, call in calls()
        if name == "Backoff" and isinstance(call.args[0], ast.Constant)
    }
    found = set()
    for name, call in calls():
        if re.fullmatch(r"(\w+\.)*_?log\.(debug|info|warning|error|critical)", name):
            event = template(call.args[0])
            if event == "…":
                continue  # a choice between constants, said elsewhere as well
            found |= {event.replace("…", s) for s in subjects} if "…" in event else {event}
    return found


def test_every_error_has_a_row_with_its_exit_code() -> None:
    rows = set(re.findall(r"^\| (\d|—) \| (.*) \| [^|]+ \|$", TEXT, re.MULTILINE))
    assert len(sentences()) > 60
    assert sorted(sentences() - rows) == []


def test_every_log_event_has_a_row() -> None:
    table = TEXT.partition("## Log events")[2].partition("\n## ")[0]
    assert len(events()) > 30
    assert sorted(events() - set(re.findall(r"`([A-Z0-9_]+)`", table))) == []


def test_every_alert_leads_to_a_heading() -> None:
    headings = {
        re.sub(r"[^a-z0-9 -]", "", line.lower()).replace(" ", "-")
        for line in re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)
    }
    alerts = [path.read_text("utf-8") for path in (ROOT / "deploy").rglob("alerts.yml")]
    anchors = {anchor for text in alerts for anchor in re.findall(r"runbook\.md#([\w-]+)", text)}
    assert anchors - headings == set()


# -- its commands ---------------------------------------------------------------------------------

BLOCK = re.compile(r"<!-- run: ([\w-]+) -->\n((?:    .*\n)+)")


class Host:
    """A machine on which the runbook is followed: a Redis, a folder and a shell."""

    def __init__(self, server: RedisServer, folder: Path) -> None:
        self.server = server
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.http = free.getsockname()[1]
        self.blocks = {name: body.replace("    ", "") for name, body in BLOCK.findall(TEXT)}

    def lines(self, block: str) -> list[str]:
        text = self.blocks.pop(block).replace("HOST:6379", f"127.0.0.1:{self.server.port}")
        text = text.replace("127.0.0.1:9127", f"127.0.0.1:{self.http}")
        return text.replace("DIR", str(self.folder)).replace("PASSWORD", "secret").splitlines()

    def start(self, script: str) -> subprocess.Popen[str]:
        tools = (
            f'redis-cli() {{ command redis-cli -e -p {self.server.port} "$@"; }}\n'
            f'rlv3-worker() {{ {sys.executable} -m worker.cli "$@"; }}\n'
        )
        if "redis-cli" not in script:  # the program itself, so that it gets our signals
            script = script.replace("rlv3-worker", f"exec {sys.executable} -m worker.cli", 1)
        environ = {k: v for k, v in os.environ.items() if not k.startswith(("REDIS_", "RLV3_"))}
        return subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", tools + script], cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ,
        )  # fmt: skip

    def ask(self, path: str) -> Any:
        """Return what the HTTP process answers, None while there is none."""
        try:
            with urlopen(f"http://127.0.0.1:{self.http}{path}", timeout=5) as answer:
                return json.load(answer)
        except OSError:
            return None

    def run(self, block: str) -> str:
        """Run a block's lines; each must succeed."""
        said = ""
        for line in self.lines(block):
            process = self.start(line)
            out, err = process.communicate(timeout=60)
            assert process.returncode == 0, f"{line}\n{out}\n{err}"
            said += out
        return said


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("tier", TIER_7, indirect=True, scope="session")
def test_a_new_operator_installs_starts_backs_up_and_removes(binary, tmp_path: Path) -> None:
    """Everything between the installation of packages and of units, as it is written there."""
    (tmp_path / "store").mkdir()
    with (
        RedisServer.start(binary) as server,
        redis.Redis.from_url(server.url) as client,
    ):
        client.set("quantum:kill", "theirs")
        client.xadd(KEYS.stream("market.tick"), {"payload": "{}"})
        host = Host(server, tmp_path)
        host.run("users")
        assert "danger" not in host.run("doctor")
        programs = [host.start(line) for line in host.lines("start")]
        try:
            until(lambda: client.hget(KEYS.meta, "run_id"))
            for price in (100.0, 101.0):
                body = {"symbol": "BTCUSDT", "price": price, "qty": 1.0, "timestamp": time.time()}
                client.xadd(KEYS.stream("market.tick"), {"payload": json.dumps(body)})
            until(lambda: client.xlen(KEYS.decisions) == 2)
            until(lambda: client.hget(KEYS.collected, KEYS.decisions))
            until(lambda: host.ask("/readyz") == {"ready": True, "state": "ready", "reason": ""})
            for program in programs:
                program.send_signal(signal.SIGTERM)
            said = [program.communicate(timeout=30) for program in programs]
            assert [program.returncode for program in programs] == [0, 0, 0], said
        finally:
            for program in programs:
                program.kill()
                program.communicate()
        assert "WORKER_STARTED" in said[0][0]
        assert "USER_COULD_TRADE" not in said[0][0]
        host.run("backup")
        assert (tmp_path / "backup.rdb").read_bytes().startswith(b"REDIS")
        assert list((tmp_path / "store-backup").rglob("*.parquet"))
        until(lambda: not client.exists(KEYS.heartbeat))  # a stopped worker's stays for 10 s
        assert "removed" in host.run("remove")
        host.run("users-gone")
        assert sorted(client.keys("*")) == [b"quantum:kill", b"quantum:stream:market.tick"]
        assert client.execute_command("ACL", "USERS") == [b"default"]
    assert host.blocks == {}  # every block that is marked was run
