"""The source Redis sees nothing but reads when the sink is another server."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis

from shadow.records import Entry
from worker.embedded import RedisServer

SESSION = {"auth", "client", "exec", "hello", "info", "multi", "ping", "select", "time", "xinfo"}
"""Commands that open a session or ask the server about itself; they touch no key's value."""


@contextmanager
def monitored(url: str) -> Iterator[list[str]]:
    """Collect the commands that a server receives from anyone but the watcher itself."""
    seen: list[str] = []
    watcher = redis.Redis.from_url(url)

    def watch() -> None:
        for command in monitor.listen():
            text = str(command["command"])
            if text.endswith("the end"):
                return
            seen.append(text)

    with watcher.monitor() as monitor:
        thread = threading.Thread(target=watch)
        thread.start()
        yield seen
        with redis.Redis.from_url(url) as last:
            last.echo("the end")
        thread.join()
    watcher.close()


def test_with_another_sink_the_source_sees_nothing_but_reads(
    bus: Any, start: Any, second_server: RedisServer, open_bus: Any, lively_policy: Path,
    bus_entry: Callable[..., Entry],
) -> None:  # fmt: skip
    sink = open_bus(second_server.url)
    start_ms = (int(bus.link.time()[0]) // 60 - 30) * 60_000
    ticks = [
        bus_entry("market.tick", f"{start_ms + i * 10_000}-0",
                  {"symbol": "BTCUSDT", "price": 100.0 + i % 5,
                   "timestamp": start_ms / 1e3 + i * 10})
        for i in range(120)
    ]  # fmt: skip
    bus.add(ticks[:60])
    known = set(bus.link.keys())
    with monitored(bus.url) as seen:
        worker = start(
            "run", "--source-url", bus.url, "--sink-url", sink.url, "--policy", lively_policy,
            "--start", "oldest", "--conflate-after", "off", "--max-event-age", "off",
        )  # fmt: skip
        sink.wait_for_counts(60)
        with redis.Redis.from_url(bus.url, client_name="publisher") as publisher:
            for tick in ticks[60:]:
                publisher.xadd(tick.stream, dict(tick.fields), id=tick.entry_id)
        sink.wait_for_counts(120)
        assert worker.stop() == 0, worker.said()

    commands = {text.split()[0].lower() for text in seen}
    commands -= {"xadd"}  # the publisher's; the ids below show that nobody else appended
    assert {"xread", "time"} <= commands
    flags = {name: facts["flags"] for name, facts in bus.link.command().items()}
    asked = {tuple(text.lower().split()[:2]) for text in seen if text.lower().startswith("acl ")}
    assert asked <= {("acl", "whoami"), ("acl", "dryrun"), ("acl", "getuser")}  # what could we do?
    for name in commands - SESSION - {"acl"}:
        assert "readonly" in flags[name], f"{name} is no read"
    assert len([text for text in seen if text.lower().startswith("xadd")]) == 60
    assert set(bus.link.keys()) == known
    assert len(sink.payloads("rl_v3.decision")) == 120
