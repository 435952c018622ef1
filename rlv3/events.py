"""The vocabulary: actions, the events that enter the fold and the decisions that leave it.

Every type here is immutable. Times are UTC epoch microseconds (`*_us`), so that the microsecond
stamps of production survive exactly; prices and volumes are floats in the venue's units.
`None` means "not known", never zero.
"""

from __future__ import annotations

from enum import IntEnum

import msgspec


class Action(IntEnum):
    """What a policy may do at a step; `len(Action)` is the width of the policy head."""

    HOLD = 0
    LONG = 1
    SHORT = 2
    REDUCE = 3
    CLOSE = 4
    EMERGENCY_FLATTEN = 5


ACTION_TABLE: tuple[str, ...] = tuple(action.name for action in Action)
"""Names by index; carried by every artifact and decision, and compared on load."""

REGIMES: tuple[str, ...] = ("TREND", "RANGE", "BREAKOUT", "MEAN_REVERSION")


class EntryRef(msgspec.Struct, frozen=True, gc=False):
    """Where an event came from: stream, entry id and the envelope's ids, verbatim."""

    stream: str
    """Full stream key, for example `quantum:stream:market.tick`."""
    event_type: str
    """The stream's logical name, as `market.tick`: from configuration, not the envelope."""
    entry_id: str
    id_ms: int
    """Milliseconds part of the entry id."""
    trace_id: str = ""
    correlation_id: str = ""
    source: str = ""
    future: bool = False
    """The payload's timestamp was more than 5 s ahead of the id; the id's time is used instead."""

    @property
    def place(self) -> str:
        """Where its entry lies, as the ledger writes it: `stream|id`."""
        return f"{self.stream}|{self.entry_id}"


class Tick(msgspec.Struct, frozen=True, gc=False):
    """One price of one symbol."""

    ref: EntryRef
    symbol: str
    ts_us: int
    price: float
    volume: float | None = None
    bid: float | None = None
    ask: float | None = None
    side: int = 0
    """+1 buyer was the aggressor, -1 seller was, 0 not known."""
    synthetic: bool = False
    """A repeated mark price: moves the price, is never traded volume."""


class Signal(msgspec.Struct, frozen=True, gc=False):
    """A trading signal of the ensemble: the side that RL v2 judges."""

    ref: EntryRef
    symbol: str
    ts_us: int
    direction: int
    """+1 buy, -1 sell, 0 hold or exit."""
    confidence: float
    price: float | None = None
    regime: str | None = None


class BaseDecision(msgspec.Struct, frozen=True, gc=False):
    """`ai.decision.made` or `trade.intent`: the side production took; read only."""

    ref: EntryRef
    symbol: str
    ts_us: int
    direction: int
    confidence: float | None
    price: float | None = None
    strategy: str | None = None
    regime: str | None = None


class V2Decision(msgspec.Struct, frozen=True, gc=False):
    """A decision of RL v2, ours (`rl_v2.decision`) or adapted from another shape."""

    ref: EntryRef
    symbol: str
    ts_us: int
    """Decision time."""
    decision_id: str
    kind: str
    """meta_strategy, position_sizing or combined."""
    provenance: str
    """q_table, local_reference, static_policy or ai_engine_sizing."""
    strategy: str | None = None
    model: str | None = None
    weight: float | None = None
    size_multiplier: float | None = None
    leverage: float | None = None
    signal_direction: int | None = None
    signal_confidence: float | None = None
    direction: int | None = None
    effective_confidence: float | None = None
    size_fraction: float | None = None
    event_ts_us: int | None = None
    """Market time of the event it judged; `ts_us` where absent."""
    expires_at_us: int | None = None
    source_stream: str | None = None
    source_entry_id: str | None = None
    trace_id: str | None = None
    correlation_id: str | None = None
    price: float | None = None
    tables_digest: str | None = None


class Kline(msgspec.Struct, frozen=True, gc=False):
    """A closed candle of `market.klines`, used to warm up."""

    ref: EntryRef
    symbol: str
    ts_us: int
    interval: str
    open: float
    high: float
    low: float
    close: float
    volume: float | None
    bar_end_us: int
    """First microsecond after the candle (close_time + 1 ms)."""


class ReferencePrice(msgspec.Struct, frozen=True, gc=False):
    """`exchange.normalized`: a price of other venues; recorded, never folded."""

    ref: EntryRef
    symbol: str
    ts_us: int
    price: float


class Outcome(msgspec.Struct, frozen=True, gc=False):
    """A real close (`trade.closed`, `position.closed`)."""

    ref: EntryRef
    symbol: str
    ts_us: int
    closed_side: int
    entry_price: float | None
    exit_price: float | None
    pnl_pct: float | None
    """In percent, as production writes it."""
    pnl_usd: float | None
    """None where the writer does not compute it."""
    reason: str | None = None
    paper: bool = False


Event = Tick | Signal | BaseDecision | V2Decision | Kline | ReferencePrice | Outcome


class Replayed(msgspec.Struct, frozen=True, gc=False):
    """The entry of a dead letter, sent in again: decided, never folded."""

    ref: EntryRef
    """The original entry's, but with the time of the replay in `id_ms`."""
    event: Event


class Ignored(msgspec.Struct, frozen=True, gc=False):
    """An entry that is consumed without effect, for example a priming marker."""

    ref: EntryRef
    reason: str


class Rejected(msgspec.Struct, frozen=True, gc=False):
    """An entry that cannot be read: it becomes one dead letter."""

    ref: EntryRef
    reason: str
    """A constant in snake_case: payload_not_json, non_finite_price, missing_symbol …"""
    error: str
    """One sentence: what was expected and what was found."""
