"""What does a log line look like?

One JSON object per line on stdout in production's shape: ts, level, service, event, correlation_id,
msg, the well-known fields (symbol, side …) where they apply, and everything else under `extra`.
A terminal gets a readable form instead.
"""

from __future__ import annotations

import json
import sys
from collections.abc import MutableMapping
from datetime import UTC, datetime
from typing import Any, TextIO

import structlog

from shadow.records import BarRow, Comparison, OutcomeRow, Output, PairRow, UnpairedRow

SERVICE = "rl_v3_shadow"
_TOP = (
    "symbol", "side", "qty", "price", "confidence", "latency_ms", "pnl", "order_id", "exception",
)  # fmt: skip

DEAD_LETTER_LINE_S = 60.0
"""At most one line of dead letters a stream in this time: no broken publisher fills a disk."""

Log = structlog.typing.FilteringBoundLogger


def configure(level: str, stream: TextIO | None = None) -> Log:
    """Set up logging of this process and return its logger.

    Args:
        level: DEBUG, INFO, WARNING, ERROR or CRITICAL.
        stream: stdout by default.
    """
    target = sys.stdout if stream is None else stream
    render: list[structlog.typing.Processor] = [_shape, structlog.processors.JSONRenderer()]
    if target.isatty():
        stamp = structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=True)
        render = [stamp, structlog.dev.ConsoleRenderer(event_key="msg")]
    structlog.configure(
        processors=[structlog.processors.add_log_level, *render],
        wrapper_class=structlog.make_filtering_bound_logger(level.lower()),
        logger_factory=structlog.PrintLoggerFactory(target),
        cache_logger_on_first_use=False,
    )
    log: Log = structlog.get_logger()
    return log


def _shape(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> dict[str, Any]:
    """Move an event's values to where production's lines have them."""
    line: dict[str, Any] = {
        "ts": datetime.now(UTC).replace(tzinfo=None).isoformat(timespec="microseconds") + "Z",
        "level": str(event.pop("level")).upper(),
        "service": SERVICE,
        "event": event.pop("event").replace(".", "_").upper(),
        "correlation_id": event.pop("correlation_id", ""),
        "msg": event.pop("msg", ""),
    }
    line.update({name: event.pop(name) for name in _TOP if name in event})
    line["extra"] = dict(event)
    return line


def log_comparison(log: Log, row: Comparison) -> None:
    """Write what became of v2, v3 and the market: a pair, an unpaired decision, a real close.

    Bars are written at DEBUG; the stream and the store have every row in full.
    """
    match row:
        case PairRow():
            log.info(
                "COMPARISON_PAIRED",
                msg=f"v2 and v3 paired by rule {row.rule}",
                symbol=row.symbol,
                **_source(row),
                v2=row.v2_decision_id,
                v3=row.v3_decision_id,
                action=row.v3_action_name,
                delta_us=row.delta_us,
                opponent=row.opponent,
            )
        case UnpairedRow():
            log.info(
                "COMPARISON_UNPAIRED",
                msg=f"{row.side} decision without a counterpart: {row.reason}",
                symbol=row.symbol,
                **_source(row),
                decision=row.decision_id,
            )
        case OutcomeRow():
            log.info(
                "COMPARISON_OUTCOME",
                msg="a position closed in production",
                symbol=row.symbol,
                **_source(row),
                pnl=row.pnl_usd,
                v2_exposure=row.v2_exposure,
                v3_exposure=row.v3_exposure,
            )
        case BarRow():
            log.debug(
                "COMPARISON_BAR",
                msg="bar closed",
                symbol=row.symbol,
                **_source(row),
                price=row.close,
                equity={name: arm.equity for name, arm in row.arms.items()},
            )
        case _:
            return


def _source(row: PairRow | UnpairedRow | OutcomeRow | BarRow) -> dict[str, str]:
    """Return the ids under which other services log the event that a row is about."""
    return {"correlation_id": row.correlation_id, "trace_id": row.trace_id}


class DeadLetterLines:
    """Writes which entries became dead letters: a line a minute and stream, with the newest."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._said_at: dict[str, float] = {}
        self._since: dict[str, int] = {}

    def note(self, output: Output, now_s: float) -> None:
        """Take in a dead letter that was committed.

        Args:
            now_s: a clock that never goes back.
        """
        stream = output.event_type
        unsaid = self._since[stream] = self._since.get(stream, 0) + 1
        if now_s - self._said_at.get(stream, -DEAD_LETTER_LINE_S) < DEAD_LETTER_LINE_S:
            return
        self._said_at[stream], self._since[stream] = now_s, 0
        letter = json.loads(output.payload)
        self._log.warning(
            "ENTRY_DEAD_LETTERED",
            msg=letter["dlq_error"],
            correlation_id=output.correlation_id,
            trace_id=output.trace_id,
            stream=letter["dlq_source_stream"],
            entry_id=letter["dlq_source_id"],
            reason=letter["dlq_reason"],
            letters=unsaid,
        )
