"""Do spans of commits and decisions reach an OpenTelemetry collector, and is it never waited for?

The collector here is a real HTTP server that decodes what the exporter sends.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from rlv3.errors import ConfigError
from rlv3.extras import require
from shadow.records import Output
from tests.worker.conftest import met
from tests.worker.test_recorder import config_of
from worker import logs
from worker.artifact import policy_at_start
from worker.bus import Bus
from worker.config import WorkerConfig, load_config
from worker.embedded import RedisServer
from worker.keys import Keys
from worker.service import Worker
from worker.spans import BATCH, QUEUE, Applied, Spans, otlp, trace_id_of, traced

KEYS = Keys()
T0 = 1_700_000_040_000
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


class Collector(http.server.ThreadingHTTPServer):
    """Keeps the spans of every request; refuses or holds them when told so."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[tuple[str, ExportTraceServiceRequest]] = []
        self.answer = 200
        self.open = threading.Event()
        self.open.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def spans(self) -> list[Any]:
        return [
            span
            for _, request in list(self.requests)
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.open.wait()
        if self.server.answer == 200:
            self.server.requests.append((self.path, ExportTraceServiceRequest.FromString(body)))
        with contextlib.suppress(OSError):  # who asked may be gone
            self.send_response(self.server.answer)
            self.send_header("Content-Length", "0")
            self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with Collector() as server:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", server.url)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.open.set()
        server.shutdown()
        thread.join()


def decision(**changes: Any) -> dict[str, Any]:
    """Return what a span needs of a decision on a signal."""
    return {
        "symbol": "AAAUSDT", "kind": "advisory", "action_name": "LONG", "confidence": 0.5,
        "decision_id": "d-1", "source_event_type": "signal.generated", "source_stream": "s",
        "source_entry_id": "1-0", "source_trace_id": "", "source_correlation_id": "c-1",
    } | changes  # fmt: skip


def applied(*decisions: dict[str, Any], read: tuple[float, float] | None = None) -> Applied:
    payloads = [msgspec.json.encode(body) for body in decisions]
    return Applied(read, (2.0, 3.0), (3.5, 4.0), 7, 9, "run", 5, payloads)


def attributes(span: Any) -> dict[str, Any]:
    return {
        item.key: getattr(item.value, item.value.WhichOneof("value")) for item in span.attributes
    }


def test_a_trace_id_of_opentelemetry_is_32_hexadecimal_digits() -> None:
    assert trace_id_of("0" * 31 + "a") == 10
    assert trace_id_of("4bf92f35-77b3-4da6-a3ce-929d0e0e4736") == int(TRACE, 16)
    assert trace_id_of("4BF92F3577B34DA6A3CE929D0E0E4736") == int(TRACE, 16)
    for text in ("", "0" * 32, "market-tick-1700000041", TRACE[1:], TRACE + "0"):
        assert trace_id_of(text) is None


@pytest.mark.parametrize("encode", [msgspec.json.encode, msgspec.msgpack.encode])
def test_steps_and_signals_are_traced_and_ordinary_ticks_are_not(encode: Any) -> None:
    step = encode(decision(kind="step", source_event_type="market.tick"))
    signal = encode(decision())
    tick = encode(decision(source_event_type="market.tick"))
    outputs = [Output("rl_v3.decision", payload) for payload in (step, tick, signal)]
    outputs.append(Output("rl_v3.comparison", signal))
    assert traced(outputs) == [step, signal]


def test_a_commit_is_a_span_with_its_steps_and_decisions(collector: Collector) -> None:
    with Spans(otlp(), logs.configure("INFO", StringIO())) as spans:
        spans.put(
            applied(decision(), decision(decision_id="d-2", source_trace_id=TRACE), read=(1.0, 1.5))
        )
    assert spans.dropped == 0
    ((path, request),) = collector.requests
    assert path == "/v1/traces"
    resource = request.resource_spans[0].resource
    assert {item.key: item.value.string_value for item in resource.attributes} == {
        "service.name": "rl_v3_shadow"
    }
    found = {(span.name, span.span_id): span for span in collector.spans()}
    named = {name: span for (name, _), span in found.items() if name != "decide"}
    assert set(named) == {"read", "fold", "append", "commit"}
    whole = named["commit"]
    assert attributes(whole) == {
        "rl_v3.entries": 7, "rl_v3.outputs": 9, "rl_v3.run_id": "run", "rl_v3.seq": 5
    }  # fmt: skip
    # seconds after the commit's begin: read 0 to 0.5, fold 1 to 2, append 2.5 to 3
    for name, begun, ended in (
        ("commit", 0.0, 3.0), ("read", 0.0, 0.5), ("fold", 1.0, 2.0), ("append", 2.5, 3.0)
    ):  # fmt: skip
        span = named[name]
        assert span.trace_id == whole.trace_id
        assert span.parent_span_id == (b"" if name == "commit" else whole.span_id)
        zero = whole.start_time_unix_nano
        assert (span.start_time_unix_nano - zero) / 1e9 == pytest.approx(begun, abs=1e-3)
        assert (span.end_time_unix_nano - zero) / 1e9 == pytest.approx(ended, abs=1e-3)
    decided = {
        attributes(span)["rl_v3.decision_id"]: span
        for (name, _), span in found.items()
        if name == "decide"
    }
    ours, theirs = decided["d-1"], decided["d-2"]
    assert (ours.trace_id, ours.parent_span_id) == (whole.trace_id, whole.span_id)
    assert attributes(ours)["rl_v3.source.correlation_id"] == "c-1"
    assert (theirs.trace_id.hex(), theirs.parent_span_id) == (TRACE, b"")
    assert [(link.trace_id, link.span_id) for link in theirs.links] == [
        (whole.trace_id, whole.span_id)
    ]
    (link,) = whole.links
    assert (link.trace_id, link.span_id) == (theirs.trace_id, theirs.span_id)
    assert attributes(link) == {"rl_v3.decision_id": "d-2"}


def test_a_collector_that_stands_still_costs_spans_and_no_time(collector: Collector) -> None:
    collector.open.clear()
    out = StringIO()
    spans = Spans(otlp(), logs.configure("INFO", out))
    first = BATCH // 3 + 1
    for _ in range(first):
        spans.put(applied())
    # the thread is held by its first request: from here on the queue fills
    begun = time.perf_counter()
    for _ in range(first + 2 * QUEUE):
        spans.put(applied())
    took_s = time.perf_counter() - begun
    assert took_s < 1.0
    assert spans.dropped >= 3 * QUEUE  # three spans a commit
    collector.open.set()
    spans.close()
    assert len(collector.spans()) + spans.dropped == 3 * (2 * first + 2 * QUEUE)


def test_what_the_collector_refuses_is_counted_and_said_once(collector: Collector) -> None:
    collector.answer = 400
    out = StringIO()
    with Spans(otlp(), logs.configure("INFO", out)) as spans:
        for dropped in (3, 6):
            spans.put(applied())
            deadline = time.monotonic() + 60.0
            while spans.dropped < dropped and time.monotonic() < deadline:
                time.sleep(0.01)
    assert spans.dropped == 6
    (line,) = [json.loads(line) for line in out.getvalue().splitlines()]
    assert (line["event"], line["extra"]["spans"]) == ("SPANS_DROPPED", 3)


def test_the_worker_traces_its_commits(
    redis_server: RedisServer, client: redis.Redis, lively_policy: Path, collector: Collector
) -> None:
    config = config_of(redis_server, lively_policy)

    async def main() -> None:
        bus = Bus(config.source_url, config.sink_url, KEYS, config.inputs)
        out = logs.configure("INFO", StringIO())
        spans = Spans(otlp(), out)
        worker = Worker(config, bus, await policy_at_start(config, bus, out), None, out, spans)
        task = asyncio.create_task(worker.run())
        await met(lambda: client.hget(KEYS.meta, "owner"))
        for ms, price in ((1_000, 100.0), (61_000, 101.0)):
            body = {
                "symbol": "AAAUSDT", "price": price, "timestamp": (T0 + ms) / 1e3,
                "trace_id": TRACE,
            }  # fmt: skip
            payload = json.dumps(body)
            client.xadd(KEYS.stream("market.tick"), {"payload": payload}, id=f"{T0 + ms}-0")
        await met(lambda: client.xlen(KEYS.decisions) == 2)
        worker.stop()
        await task
        await bus.close()
        spans.close()

    asyncio.run(main())
    found = collector.spans()
    commits = [span for span in found if span.name == "commit"]
    assert sum(attributes(span)["rl_v3.entries"] for span in commits) == 2
    (step,) = [span for span in found if span.name == "decide"]
    made = [json.loads(fields[b"payload"]) for _, fields in client.xrange(KEYS.decisions)]
    assert attributes(step)["rl_v3.decision_id"] == made[1]["decision_id"]
    assert step.trace_id.hex() == TRACE


# -- switched on and off ---------------------------------------------------------------------------


def test_spans_are_off_unless_asked_for() -> None:
    assert WorkerConfig().otel is False
    assert load_config({}, {}).otel is False
    assert load_config({"otel": True}, {}).otel is True
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        there = {name: "http://127.0.0.1:4318"}
        assert load_config({}, there).otel is True
        assert load_config({}, there | {"RLV3_OTEL": "off"}).otel is False
        assert load_config({}, there | {"OTEL_SDK_DISABLED": "true"}).otel is False


def test_neither_spans_nor_exporter_are_loaded_while_they_are_off() -> None:
    look = (
        "import sys, worker.cli, worker.service; "
        "print({'opentelemetry.sdk.trace', 'opentelemetry.exporter'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"


def test_a_missing_part_is_one_sentence() -> None:
    sentence = (
        r"^expected opentelemetry\.absent\.part to be installed, found none: "
        r"pip install 'rlv3-shadow\[otel\]'$"
    )
    with pytest.raises(ConfigError, match=sentence) as caught:
        require("opentelemetry.absent.part", "otel")
    assert caught.value.exit_code == 2
