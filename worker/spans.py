"""What does a trace viewer see of the worker? Its commits, their steps, and what they decided.

A span per commit with its steps (read, fold, commit) as children, and a span per decision on a step
or a signal. Where the source's trace id is one of OpenTelemetry's (32 hexadecimal digits, dashes
allowed), the decision is a span of that very trace, linked with its commit both ways; else it is
another child of its commit. Decisions on ordinary ticks are not traced.

The loop only puts what it has at hand into a bounded queue. One thread makes spans of it and sends
them; when it does not keep up, because the collector is slow or away, what does not fit is dropped
and counted. The collector and everything else is set by OpenTelemetry's own variables.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import re
import sys
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

import msgspec

from rlv3.extras import require
from shadow.records import DECISIONS, Output
from worker.logs import SERVICE, Log

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.trace import Span

QUEUE = 1_024
"""Commits that may wait for the thread: some seconds at full speed."""
BATCH = 512
"""Spans per request, about."""
SWITCH_S = 0.0005
"""So long at most the loop waits while the thread has the interpreter; Python's 5 ms are more than
an event takes from bus to bus."""
EVERY_S = 1.0
CLOSING_S = 3.0
FAILED_LINE_S = 60.0
_STEP = (b'"kind":"step"', b"\xa4kind\xa4step")
_TICK = (b'"source_event_type":"market.tick"', b"\xb1source_event_type\xabmarket.tick")
"""As JSON and as msgpack write it."""
_TRACE_ID = re.compile(r"[0-9a-f]{32}")
Interval = tuple[float, float]
"""Begin and end by `time.perf_counter`."""


class Applied(NamedTuple):
    """A commit that Redis applied."""

    read: Interval | None
    """None where its entries came with the reading before."""
    fold: Interval
    commit: Interval
    entries: int
    outputs: int
    run_id: str
    seq: int
    traced: list[bytes]
    """Decisions on steps and signals, as they were appended."""


class Decided(msgspec.Struct):
    """What a span says of a decision."""

    symbol: str
    kind: str
    action_name: str
    confidence: float
    decision_id: str
    source_event_type: str
    source_stream: str
    source_entry_id: str
    source_trace_id: str
    source_correlation_id: str


_from_json = msgspec.json.Decoder(Decided).decode
_from_msgpack = msgspec.msgpack.Decoder(Decided).decode


def traced(outputs: Sequence[Output]) -> list[bytes]:
    """Return the decisions on steps and signals among what a commit appended."""
    return [
        output.payload
        for output in outputs
        if output.event_type == DECISIONS and _is_traced(output.payload)
    ]


def _is_traced(payload: bytes) -> bool:
    form = payload[:1] != b"{"
    return _STEP[form] in payload or _TICK[form] not in payload


def trace_id_of(text: str) -> int | None:
    """Return a source's trace id as OpenTelemetry's, None where it is none."""
    plain = text.replace("-", "").lower()
    return (int(plain, 16) or None) if _TRACE_ID.fullmatch(plain) else None


class Exporter(Protocol):
    """Where spans go: OpenTelemetry's exporters fit."""

    def export(self, spans: Sequence[ReadableSpan]) -> Any:
        """Send spans; returns what has `value` 0 when they arrived."""

    def shutdown(self) -> None:
        """Give up what is under way."""


def otlp() -> Exporter:
    """Return what sends spans to the collector that the environment names.

    Raises:
        ConfigError: the extra is not installed.
    """
    for name in ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http"):
        require(name, "otel")
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    quiet = logging.getLogger("opentelemetry")  # it would write to stderr, at each failed request
    quiet.addHandler(logging.NullHandler())
    quiet.propagate = False
    return OTLPSpanExporter()


class Spans:
    """The queue, and the thread that makes spans of what is in it.

    Attributes:
        dropped: spans that did not reach the collector.
    """

    def __init__(self, exporter: Exporter, log: Log) -> None:
        self.dropped = 0
        self._exporter = exporter
        self._log = log
        self._queue: queue.Queue[Applied | None] = queue.Queue(QUEUE)
        self._ended: list[ReadableSpan] = []
        self._sent_at = time.monotonic()
        self._failed_at: float | None = None
        self._begin = _recorder(self._ended)
        # perf_counter has no epoch of its own
        self._epoch_s = time.time() - time.perf_counter()
        sys.setswitchinterval(SWITCH_S)
        self._thread = threading.Thread(target=self._work, name="spans", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def put(self, applied: Applied) -> None:
        """Take in a commit; never waits."""
        try:
            self._queue.put_nowait(applied)
        except queue.Full:
            self.dropped += 3 + len(applied.traced) + (applied.read is not None)

    def close(self) -> None:
        """Send what waits, for some seconds at most."""
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=CLOSING_S)
        self._thread.join(CLOSING_S)
        self._exporter.shutdown()  # a request under way gives up

    # -- in the thread ----------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            try:
                applied = self._queue.get(timeout=EVERY_S)
            except queue.Empty:
                self._send()
                continue
            if applied is None:
                break
            self._record(applied)
            if len(self._ended) >= BATCH or time.monotonic() - self._sent_at >= EVERY_S:
                self._send()
        self._send()

    def _record(self, applied: Applied) -> None:
        began = (applied.read or applied.fold)[0]
        whole = self._begin(
            "commit",
            self._ns(began),
            attributes={
                "rl_v3.entries": applied.entries,
                "rl_v3.outputs": applied.outputs,
                "rl_v3.run_id": applied.run_id,
                "rl_v3.seq": applied.seq,
            },
        )
        for name, step in (("read", applied.read), ("fold", applied.fold)):
            if step is not None:
                self._begin(name, self._ns(step[0]), whole).end(self._ns(step[1]))
        begun, ended = map(self._ns, applied.commit)
        self._begin("append", begun, whole).end(ended)
        for payload in applied.traced:
            self._decided(payload, whole, self._ns(applied.fold[0]), ended)
        whole.end(ended)

    def _decided(self, payload: bytes, whole: Span, begun: int, ended: int) -> None:
        found = (_from_json if payload[:1] == b"{" else _from_msgpack)(payload)
        attributes = {
            "rl_v3.decision_id": found.decision_id,
            "rl_v3.symbol": found.symbol,
            "rl_v3.kind": found.kind,
            "rl_v3.action": found.action_name,
            "rl_v3.confidence": found.confidence,
            "rl_v3.source.event_type": found.source_event_type,
            "rl_v3.source.stream": found.source_stream,
            "rl_v3.source.entry_id": found.source_entry_id,
            "rl_v3.source.trace_id": found.source_trace_id,
            "rl_v3.source.correlation_id": found.source_correlation_id,
        }
        trace_id = trace_id_of(found.source_trace_id)
        span = self._begin("decide", begun, whole, trace_id, attributes)
        if trace_id is not None:
            span.add_link(whole.get_span_context())
            own = {"rl_v3.decision_id": found.decision_id}
            whole.add_link(span.get_span_context(), own)
        span.end(ended)

    def _ns(self, at: float) -> int:
        return int((self._epoch_s + at) * 1e9)

    def _send(self) -> None:
        self._sent_at = time.monotonic()
        if not self._ended:
            return
        spans = tuple(self._ended)
        self._ended.clear()
        if self._exporter.export(spans).value == 0:
            self._failed_at = None
            return
        self.dropped += len(spans)
        if self._failed_at is None or self._sent_at - self._failed_at >= FAILED_LINE_S:
            self._failed_at = self._sent_at
            self._log.warning(
                "SPANS_DROPPED",
                msg="the collector of OTEL_EXPORTER_OTLP_ENDPOINT did not take the spans",
                spans=self.dropped,
            )


class _Begin(Protocol):
    """Starts a span: of the parent, or of no parent where it has a trace id of its own."""

    def __call__(
        self,
        name: str,
        begun: int,
        parent: Span | None = None,
        trace_id: int | None = None,
        attributes: dict[str, Any] | None = None,
    ) -> Span: ...


def _recorder(ended: list[ReadableSpan]) -> _Begin:
    """Return what starts spans; those that end, and that the sampler keeps, come into the list."""
    from opentelemetry.context import Context
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
    from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
    from opentelemetry.trace import set_span_in_context

    class Ids(RandomIdGenerator):
        """Random ids, except the trace id that is asked for."""

        trace_id: int | None = None

        def generate_trace_id(self) -> int:
            return super().generate_trace_id() if self.trace_id is None else self.trace_id

    class Keep(SpanProcessor):
        def on_end(self, span: ReadableSpan) -> None:
            ended.append(span)

    ids = Ids()
    provider = TracerProvider(
        resource=Resource({"service.name": SERVICE}).merge(OTELResourceDetector().detect()),
        id_generator=ids,
        shutdown_on_exit=False,
    )
    provider.add_span_processor(Keep())
    tracer = provider.get_tracer(SERVICE)

    def begin(
        name: str,
        begun: int,
        parent: Span | None = None,
        trace_id: int | None = None,
        attributes: dict[str, Any] | None = None,
    ) -> Span:
        ids.trace_id = trace_id
        context = Context()
        if parent is not None and trace_id is None:
            context = set_span_in_context(parent, context)
        return tracer.start_span(name, context, attributes=attributes, start_time=begun)

    return begin
