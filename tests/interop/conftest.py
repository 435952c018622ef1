"""Our programs as an operator runs them, and the bus as another program sees it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import redis

from shadow.records import Entry
from worker.embedded import RedisServer, leashed
from worker.keys import Keys

PATIENCE_S = 60.0


class Program:
    """One of our command-line programs, running."""

    def __init__(self, log: Path, module: str, *arguments: str) -> None:
        self.log = log
        self.name = arguments[0]
        command = [sys.executable, "-m", module, *arguments]
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                leashed(*command), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
            )

    def said(self) -> str:
        """Return everything it wrote so far."""
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        """Kill -9."""
        self.process.kill()
        self.process.wait()

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        """Wait for its end; return the exit code."""
        return self.process.wait(timeout_s)

    def stop(self) -> int:
        """Ask it to drain; return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait()


class Bus:
    """A Redis as its other users see it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.keys = Keys()
        self.link = redis.Redis.from_url(url)

    def add(self, entries: Iterable[Entry]) -> None:
        """Append entries in the given order under their own ids."""
        batch = self.link.pipeline(transaction=False)
        for i, entry in enumerate(entries, 1):
            batch.xadd(entry.stream, dict(entry.fields), id=entry.entry_id)
            if i % 500 == 0:
                batch.execute()
        batch.execute()

    def counts(self) -> dict[str, int]:
        """Return the worker's counters: `<event type>:<outcome>` -> entries."""
        meta = self.link.hgetall(self.keys.meta)
        return {name.decode()[2:]: int(value) for name, value in meta.items() if name[:2] == b"n:"}

    def payloads(self, event_type: str) -> list[dict[str, Any]]:
        """Return the JSON payloads of one of our streams, oldest first."""
        return [
            json.loads(fields[b"payload"])
            for _, fields in self.link.xrange(self.keys.stream(event_type))
        ]

    def dead_letters(self, event_type: str) -> list[dict[str, Any]]:
        """Return the payloads of the dead letters about an input stream, oldest first."""
        return [
            json.loads(fields[b"payload"])
            for _, fields in self.link.xrange(self.keys.dlq(event_type))
        ]

    def wait_for_counts(self, entries: int) -> dict[str, int]:
        """Wait until the worker has read so many entries; return its counters."""
        wait_until(lambda: sum(self.counts().values()) >= entries, self.counts)
        return self.counts()


def wait_until(
    condition: Callable[[], object], found: Callable[[], object] = lambda: "nothing"
) -> None:
    """Wait for a condition, or fail showing what was found instead."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {PATIENCE_S:.0f} s, found {found()}")
        time.sleep(0.01)


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # a suite started in the background ignores SIGINT, and so would every program it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(name="wait_until")
def wait_until_fixture() -> Callable[..., None]:
    """Give tests the function of the same name."""
    return wait_until


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """Start `rlv3-worker ARGUMENTS…`; what still runs at the end of the test is killed."""
    running: list[Program] = []

    def begin(*arguments: object, module: str = "worker.cli") -> Program:
        log = tmp_path / f"{len(running)}-{arguments[0]}.log"
        program = Program(log, module, *map(str, arguments))
        running.append(program)
        return program

    yield begin
    for program in running:
        program.kill()


@pytest.fixture
def bus(redis_server: RedisServer) -> Iterator[Bus]:
    """The clean server of each tier."""
    seen = Bus(redis_server.url)
    yield seen
    seen.link.close()


@pytest.fixture
def open_bus() -> Iterator[Callable[..., Bus]]:
    """Look at any other server."""
    opened: list[Bus] = []

    def look(url: str) -> Bus:
        opened.append(Bus(url))
        return opened[-1]

    yield look
    for seen in opened:
        seen.link.close()


@pytest.fixture
def bus_entry() -> Callable[..., Entry]:
    """Return a factory of entries in production's envelope."""

    def make(
        event_type: str,
        entry_id: str,
        payload: Mapping[str, object] | bytes,
        correlation_id: str = "",
    ) -> Entry:
        body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        fields = {
            b"event_type": event_type.encode(),
            b"payload": body,
            b"trace_id": b"",
            b"correlation_id": correlation_id.encode(),
            b"timestamp": b"",
            b"source": b"test",
        }
        return Entry(Keys().stream(event_type), event_type, entry_id, fields)

    return make
