"""Do the programs run where their systemd units refuse them to change their own priority?"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.worker import confined
from worker.cli import Niceness
from worker.embedded import RedisServer

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = Path(confined.__file__)
PROGRAMS = {
    "run": (("--rl-v2", "off"), "WORKER_STARTED"),
    "collect": (("--store", "{place}"), "COLLECTOR_STARTED"),
    "api": (("--http", "127.0.0.1:0"), "API_LISTENS"),
}
"""Flags, and the line that says that the program has started."""


def test_the_launcher_refuses_a_lower_priority() -> None:
    look = "import os\ntry:\n os.nice(1)\nexcept PermissionError:\n print('refused')"
    done = subprocess.run(
        [sys.executable, str(LAUNCHER), sys.executable, "-c", look],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "refused\n"


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_starts_and_stops_under_its_unit(
    name: str, redis_server: RedisServer, tmp_path: Path
) -> None:
    flags, line = PROGRAMS[name]
    given = [flag.format(place=tmp_path / "store") for flag in flags]
    log = tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, str(LAUNCHER), sys.executable, "-m", "worker.cli", name,
             "--redis-url", redis_server.url, *given],
            stdout=out, stderr=subprocess.STDOUT, cwd=ROOT,
        )  # fmt: skip
    deadline = time.monotonic() + 60
    while line not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0, log.read_text()


def test_production_comes_first_then_worker_collector_and_http_process() -> None:
    def priority(name: str) -> tuple[int, int]:
        text = (ROOT / "deploy" / "systemd" / f"quantum-rl-v3-{name}.service").read_text("utf-8")
        found = {key: int(n) for key, n in re.findall(r"^(Nice|CPUWeight)=(\d+)$", text, re.M)}
        return found["Nice"], found["CPUWeight"]

    units = [priority("shadow"), priority("collector"), priority("api")]
    assert [niceness for niceness, _ in units] == list(Niceness)
    weights = [weight for _, weight in units]
    assert 100 > weights[0] > weights[1] > weights[2]
