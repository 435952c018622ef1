"""What does an entry of the bus say? Bytes to events, and to dead letters.

`decode` answers for every shape that production is known to write, one row of `READERS` per
stream. Its rules:
  * An entry is an event, ignored, or rejected with a reason; no bytes raise an exception.
  * The body is `payload`, else `data`, else `message`, else the fields themselves; JSON or
    msgpack by its first byte; a body that is a string is decoded once more.
  * `None`, `""`, `"None"`, `"null"` and `"nan"` mean missing; numeric text is a number; a boolean
    is not. What is missing stays `None`: an unknown volume is never 0.
  * Event time is the payload's timestamp, else the envelope's, else the entry id's. A timestamp
    more than 5 s ahead of the id is replaced by the id's and flagged `future`.
  * Everything that leaves is bounded and valid UTF-8, so that it can be written again.
Whether an event is late, stale or from a source that counts is decided by the pipeline.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from reprlib import repr as short

import msgpack
import msgspec

from rlv3.events import (
    BaseDecision,
    EntryRef,
    Event,
    Ignored,
    Kline,
    Outcome,
    ReferencePrice,
    Rejected,
    Replayed,
    Signal,
    Tick,
    V2Decision,
)
from shadow.records import REPLAY, Entry, iso, record_id

MAX_BODY_BYTES = 1 << 20
MAX_DEPTH = 64
"""Nesting of a body; the decoders' own limits depend on the caller's stack, so on no replay."""
MAX_ID_CHARS = 256
"""Ids travel verbatim into every output, so a longer one cannot be carried."""
MAX_TEXT_CHARS = 200
"""Labels and reasons are cut here."""
DEAD_LETTER_BYTES = 4096
MAX_AHEAD_US = 5_000_000
MIN_PRICE, MAX_PRICE = 1e-12, 1e12
"""Beyond these a price is damage; within them products and ratios of prices stay finite."""
MAX_VOLUME = 1e18
DEFAULT_CONFIDENCE = 0.5
"""What production's own subscribers assume for a signal that names none."""

_ENVELOPE = (b"timestamp", b"trace_id", b"correlation_id", b"source")
_BODY_FIELDS = (b"payload", b"data", b"message")
_MISSING = frozenset({"", "none", "null", "nan"})
_PRIMING = frozenset({"init", "_init", "dummy", "placeholder", "ping"})
_UNKNOWN_REGIMES = frozenset({"unknown", "uncertain"})
_SIDES = {
    "BUY": 1, "LONG": 1, "UP": 1,
    "SELL": -1, "SHORT": -1, "DOWN": -1,
    "HOLD": 0, "FLAT": 0, "CLOSE": 0, "EXIT": 0,
}  # fmt: skip
_FLAGS = {"true": True, "1": True, "false": False, "0": False}
_AGENT_KINDS = {
    "rl_meta_strategy_decision": "meta_strategy",
    "rl_position_sizing_decision": "position_sizing",
}
"""What RL v2's domain agents call their decisions, by event_name."""
_KINDS = ("meta_strategy", "position_sizing", "combined")
_PROVENANCES = ("q_table", "local_reference", "static_policy", "ai_engine_sizing")
_SIGNAL_KEYS = ("action", "side", "direction", "signal")
_INTERVAL_US = {"m": 60_000_000, "h": 3_600_000_000, "d": 86_400_000_000}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_MAX_TIME_US = 253_402_300_799_999_999  # the end of year 9999, the last that ISO can write
_SEPARATORS = str.maketrans("", "", "/-_:")
_REPLAY_STREAM, _REPLAY_ID = b"replay_stream", b"replay_id"
_is_entry_id = re.compile(rb"[0-9]{1,20}-[0-9]{1,20}").fullmatch
_is_symbol = re.compile(r"(?!(?:NONE|NULL|NAN)$)[A-Z0-9]{2,20}").fullmatch


class _RefusedError(Exception):
    """Carries the reason and the sentence of a `Rejected` to `decode`."""

    def __init__(self, reason: str, error: str) -> None:
        super().__init__(reason, error)
        self.reason = reason
        self.error = error


# -- values ----------------------------------------------------------------------------------------


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


def _utf8(text: str) -> str:
    """Replace lone surrogates, which JSON can smuggle in and no encoder writes out."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _is_missing(value: object) -> bool:
    if isinstance(value, str):
        return value.strip().lower() in _MISSING if len(value) <= MAX_TEXT_CHARS else False
    return value is None


def _number(value: object) -> float | None:
    """Return a number or numeric text as float, possibly not finite; else None."""
    if type(value) is float:
        return value
    if isinstance(value, str):
        # float() would also read 1_000 and digits of other scripts
        if len(value) > 64 or not value.isascii() or "_" in value:
            return None
        try:
            return float(value)
        except ValueError:
            return None
    if type(value) is not int:
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _time_us(value: object) -> int | None:
    """Return epoch microseconds of a number in s, ms or µs, or of ISO text (naive is UTC)."""
    number = value if type(value) is float else _number(value)
    if number is not None:
        if not 0.0 < number < math.inf:
            return None
        scale = 1 if number >= 1e14 else 1_000 if number >= 1e11 else 1_000_000
        return min(round(number * scale), _MAX_TIME_US)
    if not isinstance(value, str) or len(value) > 64:
        return None
    try:
        stamp = datetime.fromisoformat(value.strip())
    except ValueError:
        return None
    if stamp.tzinfo is None:
        stamp = stamp.replace(tzinfo=UTC)
    time_us = (stamp - _EPOCH) // _MICROSECOND
    return time_us if time_us > 0 else None


def _side_of(value: object) -> int | None:
    """Return +1, -1 or 0; None for a side that nobody is known to write."""
    if isinstance(value, str):
        side = _SIDES.get(value[:64].strip().upper())
        if side is not None:
            return side
    number = _number(value)
    return int(number) if number in (1.0, 0.0, -1.0) else None


def _volume(*candidates: float | None) -> float | None:
    """Return the first plausible volume; None, not 0, when none is known."""
    for volume in candidates:
        if volume is not None and 0.0 <= volume <= MAX_VOLUME:
            return volume
    return None


def _plausible(price: float | None) -> float | None:
    return price if price is not None and MIN_PRICE <= price <= MAX_PRICE else None


def _symbol(value: object) -> str:
    if isinstance(value, str) and value.isascii() and len(value) <= 64:
        symbol = value.strip().upper().translate(_SEPARATORS)
        if _is_symbol(symbol):
            return symbol
    if _is_missing(value):
        raise _RefusedError("missing_symbol", "expected a symbol, found none")
    raise _RefusedError(
        "bad_symbol", f"expected a symbol of 2 to 20 letters and digits, found {short(value)}"
    )


class _Body:
    """The payload of one entry, read by the names that its writers use."""

    __slots__ = ("values",)

    def __init__(self, values: Mapping[str, object]) -> None:
        self.values = values

    def raw(self, key: str) -> object:
        """Return a value as it is; binary msgpack strings count as text."""
        value = self.values.get(key)
        return _text(value) if isinstance(value, bytes) else value

    def get(self, *keys: str) -> object:
        """Return the first value that is not missing."""
        for key in keys:
            value = self.raw(key)
            if not _is_missing(value):
                return value
        return None

    def symbol(self) -> str:
        return _symbol(self.raw("symbol"))

    def text(self, *keys: str) -> str | None:
        value = self.get(*keys)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            return None
        return _utf8(str(value)[:MAX_TEXT_CHARS])

    def id(self, key: str) -> str:
        """Return an id verbatim, "" where absent."""
        value = self.raw(key)
        text = str(value) if type(value) in (str, int) else ""
        if len(text) > MAX_ID_CHARS:
            raise _RefusedError(
                "id_too_long",
                f"expected {key} of at most {MAX_ID_CHARS} characters, found {len(text)}",
            )
        return _utf8(text)

    def number(self, *keys: str) -> float | None:
        """Return the first finite number."""
        for key in keys:
            number = _number(self.get(key))
            if number is not None and math.isfinite(number):
                return number
        return None

    def confidence(self, *keys: str) -> float | None:
        number = self.number(*keys)
        return None if number is None else min(max(number, 0.0), 1.0)

    def flag(self, *keys: str) -> bool | None:
        value = self.get(*keys)
        if isinstance(value, bool):
            return value
        return _FLAGS.get(str(value)[:8].lower()) if isinstance(value, str | int) else None

    def time_us(self, *keys: str) -> int | None:
        for key in keys:
            time_us = _time_us(self.get(key))
            if time_us is not None:
                return time_us
        return None

    def price(self, *keys: str) -> float:
        """Return the first usable price, or refuse for what the first one given is instead."""
        refused = None
        for key in keys:
            value = self.get(key)
            if value is None:
                continue
            number = _number(value)
            price = _plausible(number)
            if price is not None:
                return price
            refused = refused or _RefusedError(
                _price_reason(number), f"expected {key} > 0, found {short(value)}"
            )
        raise refused or _RefusedError(
            "missing_price", f"expected one of {', '.join(keys)}, found none"
        )

    def optional_price(self, *keys: str) -> float | None:
        for key in keys:
            price = _plausible(_number(self.get(key)))
            if price is not None:
                return price
        return None

    def side(self, *keys: str) -> int | None:
        """Return the first side given; blank and "None" are 0 unless another key says more."""
        blank = None
        for key in keys:
            value = self.get(key)
            if value is None:
                if self.values.get(key) is not None:
                    blank = 0
                continue
            side = _side_of(value)
            if side is None:
                raise _RefusedError(
                    "bad_side", f"expected {key} to be a side such as BUY, found {short(value)}"
                )
            return side
        return blank

    def required_side(self, *keys: str) -> int:
        side = self.side(*keys)
        if side is None:
            raise _RefusedError("missing_side", f"expected one of {', '.join(keys)}, found none")
        return side

    def one_of(self, key: str, *allowed: str) -> str:
        value = self.get(key)
        if not isinstance(value, str) or value not in allowed:
            raise _RefusedError(
                f"bad_{key}", f"expected {key} {', '.join(allowed)}, found {short(value)}"
            )
        return value

    def regime(self) -> str | None:
        label = self.text("regime")
        return None if label is None or label.strip().lower() in _UNKNOWN_REGIMES else label


def _price_reason(number: float | None) -> str:
    if number is None:
        return "price_not_a_number"
    if not math.isfinite(number):
        return "non_finite_price"
    return "price_not_positive" if number <= 0.0 else "price_out_of_range"


# -- bodies ----------------------------------------------------------------------------------------


def _parse(raw: bytes) -> object:
    """Decode JSON or msgpack, told apart by the first byte."""
    form, read = ("msgpack", _read_msgpack) if raw[:1] >= b"\x80" else ("json", _read_json)
    try:
        value = read(raw)
    except (RecursionError, msgpack.StackError) as error:
        raise _too_deep() from error
    except (ValueError, OverflowError) as error:
        text = _utf8(str(error)[:MAX_TEXT_CHARS])
        raise _RefusedError(
            f"payload_not_{form}", f"expected an object in {form}, found: {text}"
        ) from error
    _check_depth(value)
    return value


def _read_msgpack(raw: bytes) -> object:
    # the library refuses every declared length beyond the bytes that are there
    return msgpack.unpackb(raw)


def _read_json(raw: bytes) -> object:
    try:
        return msgspec.json.decode(raw)
    except ValueError:
        # production writes bare NaN and Infinity, which only the slower reader takes
        return json.loads(raw.decode())


def _check_depth(value: object) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise _too_deep()


def _too_deep() -> _RefusedError:
    return _RefusedError("payload_too_deep", f"expected at most {MAX_DEPTH} levels, found more")


def _read_body(fields: Mapping[bytes, bytes]) -> _Body:
    """Find and decode the body of an entry."""
    for name in _BODY_FIELDS:
        raw = fields.get(name)
        if not raw:
            continue
        _check_size(len(raw))
        value = _parse(raw)
        if isinstance(value, str):
            value = value.encode("utf-8", "replace")
        if isinstance(value, bytes):
            value = _parse(value)
        if not isinstance(value, dict):
            found = type(value).__name__
            raise _RefusedError("payload_not_object", f"expected an object, found {found}")
        return _Body(value)
    _check_size(sum(len(name) + len(value) for name, value in fields.items()))
    return _Body({_text(name): _text(value) for name, value in fields.items()})


def _check_size(size: int) -> None:
    if size > MAX_BODY_BYTES:
        raise _RefusedError(
            "payload_too_large", f"expected at most {MAX_BODY_BYTES} bytes, found {size}"
        )


# -- where and when --------------------------------------------------------------------------------


def _envelope_ref(entry: Entry) -> EntryRef:
    """Return the reference by the envelope alone, for entries whose body cannot be read."""
    fields = entry.fields
    return EntryRef(
        entry.stream,
        entry.event_type,
        entry.entry_id,
        entry.id_ms,
        _text(fields.get(b"trace_id", b"")[:MAX_ID_CHARS]),
        _text(fields.get(b"correlation_id", b"")[:MAX_ID_CHARS]),
        _text(fields.get(b"source", b"")[:MAX_ID_CHARS]),
    )


def _event_time(time_us: int | None, id_ms: int) -> tuple[int, bool]:
    """Return the event time, and whether the stated one was too far ahead of the entry id."""
    id_us = id_ms * 1_000
    if time_us is None:
        return id_us, False
    if time_us > id_us + MAX_AHEAD_US:
        return id_us, True
    return time_us, False


def _locate(entry: Entry, bare: EntryRef, body: _Body) -> tuple[EntryRef, int]:
    """Return the reference with the body's own ids and source, and the event time."""
    fields = entry.fields
    envelope = _Body({_text(name): _text(fields.get(name, b"")) for name in _ENVELOPE})
    time_us = body.time_us("timestamp", "close_ts")
    if time_us is None:
        time_us = envelope.time_us("timestamp")
    ts_us, future = _event_time(time_us, bare.id_ms)
    ref = EntryRef(
        bare.stream,
        bare.event_type,
        bare.entry_id,
        bare.id_ms,
        body.id("trace_id") or envelope.id("trace_id"),
        body.id("correlation_id") or envelope.id("correlation_id"),
        body.id("source") or envelope.id("source"),
        future,
    )
    return ref, ts_us


# -- one function per kind of event ----------------------------------------------------------------


def _make_tick(
    ref: EntryRef,
    symbol: str,
    ts_us: int,
    price: float,
    volume: float | None,
    bid: float | None,
    ask: float | None,
    buyer_is_maker: bool | None,
) -> Tick:
    """Build a tick; only a real trade has an aggressor's side."""
    synthetic = ref.source == "mark_price_fallback"
    side = 0
    if synthetic:
        volume = 0.0
    elif volume and buyer_is_maker is not None:
        side = -1 if buyer_is_maker else 1
    return Tick(
        ref, symbol, ts_us, price, volume, _plausible(bid), _plausible(ask), side, synthetic
    )


def _tick(ref: EntryRef, ts_us: int, body: _Body) -> Tick:
    return _make_tick(
        ref,
        body.symbol(),
        ts_us,
        body.price("price", "close", "avg_price", "mark_price", "entry_price"),
        _volume(body.number("volume"), body.number("qty")),
        body.number("bid"),
        body.number("ask"),
        body.flag("is_buyer_maker"),
    )


def _kline(ref: EntryRef, ts_us: int, body: _Body) -> Kline | Ignored:
    if body.flag("is_closed") is False:
        return Ignored(ref, "unselected")
    symbol = body.symbol()
    interval = body.text("interval", "timeframe") or ""
    close_us, open_us = body.time_us("close_time"), body.time_us("open_time")
    if close_us is not None:
        end_us = close_us + 1_000
    elif open_us is not None and interval[:-1].isdecimal() and interval[-1] in _INTERVAL_US:
        end_us = open_us + int(interval[:-1][:4]) * _INTERVAL_US[interval[-1]]
    else:
        raise _RefusedError("missing_close_time", "expected close_time of a candle, found none")
    if end_us > ref.id_ms * 1_000 + MAX_AHEAD_US:
        raise _RefusedError(
            "candle_not_over", f"expected a candle closed by {ref.entry_id}, found end {end_us} µs"
        )
    return Kline(
        ref,
        symbol,
        ts_us,
        interval,
        open=body.price("open"),
        high=body.price("high"),
        low=body.price("low"),
        close=body.price("close"),
        volume=_volume(body.number("volume")),
        bar_end_us=end_us,
    )


def _signal(ref: EntryRef, ts_us: int, body: _Body) -> Signal:
    confidence = body.confidence("confidence")
    return Signal(
        ref,
        body.symbol(),
        ts_us,
        direction=body.required_side(*_SIGNAL_KEYS),
        confidence=DEFAULT_CONFIDENCE if confidence is None else confidence,
        price=body.optional_price("price", "entry_price"),
        regime=body.regime(),
    )


def _base_decision(ref: EntryRef, ts_us: int, body: _Body) -> BaseDecision:
    side = body.required_side("side", "action", "direction")
    return BaseDecision(
        ref,
        body.symbol(),
        ts_us,
        # an order that may only reduce is an exit, whatever its side
        direction=0 if body.flag("reduceOnly", "reduce_only") else side,
        confidence=body.confidence("confidence"),
        price=body.optional_price("price", "entry_price"),
        strategy=body.text("strategy", "meta_strategy"),
        regime=body.regime(),
    )


def _trade_intent(ref: EntryRef, ts_us: int, body: _Body) -> BaseDecision | V2Decision:
    """Read the side production took, or the opinion labelled RL v2 that rides on it."""
    base = _base_decision(ref, ts_us, body)
    if body.get("rl_action") is None:
        return base
    return V2Decision(
        ref,
        base.symbol,
        ts_us,
        decision_id=record_id("v2", ref.stream, ref.entry_id),
        kind="meta_strategy",
        provenance="static_policy",  # a hand-set table publishes it, nothing learns
        model=body.text("rl_version"),
        signal_direction=base.direction,
        signal_confidence=base.confidence,
        direction=body.required_side("rl_action"),
        effective_confidence=body.confidence("rl_confidence"),
        trace_id=ref.trace_id or None,
        correlation_id=ref.correlation_id or None,
        price=base.price,
    )


def _v2(ref: EntryRef, ts_us: int, body: _Body, kind: str, provenance: str) -> V2Decision:
    """Read a v2 decision by the names of our contract, and the adapted shapes' own names."""
    event_ts_us = body.time_us("event_ts")
    if event_ts_us is not None and event_ts_us > ref.id_ms * 1_000 + MAX_AHEAD_US:
        event_ts_us = None
    size = body.number("size_fraction")
    return V2Decision(
        ref,
        body.symbol(),
        ts_us,
        # a decision without an id gets the same derived one for ever
        decision_id=body.id("decision_id") or record_id("v2", ref.stream, ref.entry_id),
        kind=kind,
        provenance=provenance,
        strategy=body.text("strategy", "strategy_id", "selected_strategy"),
        model=body.text("model"),
        weight=body.number("weight"),
        size_multiplier=body.number("size_multiplier"),
        leverage=body.number("leverage", "recommended_leverage"),
        signal_direction=body.side("signal_side"),
        signal_confidence=body.confidence("signal_confidence"),
        direction=body.side("direction"),
        effective_confidence=body.confidence("effective_confidence"),
        size_fraction=size if size is not None and 0.0 <= size <= 1.0 else None,
        event_ts_us=event_ts_us,
        expires_at_us=body.time_us("expires_at"),
        source_stream=body.id("source_stream") or None,
        source_entry_id=body.id("source_entry_id") or None,
        trace_id=ref.trace_id or None,
        correlation_id=ref.correlation_id or None,
        price=body.optional_price("price"),
        tables_digest=body.id("tables_digest") or None,
    )


def _v2_decision(ref: EntryRef, ts_us: int, body: _Body) -> V2Decision:
    """Read our own contract, or a domain agent's event on the same stream."""
    kind = _AGENT_KINDS.get(str(body.get("event_name")))
    if kind is not None:
        return _v2(ref, ts_us, body, kind, "q_table")
    version = body.get("schema_version")
    if _number(version) != 1.0:
        raise _RefusedError("unknown_version", f"expected schema_version 1, found {short(version)}")
    kind = body.one_of("kind", *_KINDS)
    return _v2(ref, ts_us, body, kind, body.one_of("provenance", *_PROVENANCES))


def _custom(ref: EntryRef, ts_us: int, body: _Body) -> V2Decision | Ignored:
    """Read the domain agents' events; the stream also carries everybody else's."""
    kind = _AGENT_KINDS.get(str(body.get("event_name")))
    return Ignored(ref, "unselected") if kind is None else _v2(ref, ts_us, body, kind, "q_table")


def _sizing_decided(ref: EntryRef, ts_us: int, body: _Body) -> V2Decision:
    return _v2(ref, ts_us, body, "position_sizing", "ai_engine_sizing")


def _strategy_selected(ref: EntryRef, ts_us: int, body: _Body) -> V2Decision:
    # a heuristic of the AI engine with strategy names of its own, not RL v2's Q-tables
    return _v2(ref, ts_us, body, "meta_strategy", "static_policy")


def _rl_decision(ref: EntryRef, ts_us: int, body: _Body) -> V2Decision | Ignored:
    kind = body.one_of("decision_type", "position_sizing", "meta_strategy", "dynamic_tpsl")
    if kind == "dynamic_tpsl":
        return Ignored(ref, "unselected")
    return _v2(ref, ts_us, body, kind, "q_table")


def _reference_price(ref: EntryRef, ts_us: int, body: _Body) -> ReferencePrice:
    return ReferencePrice(ref, body.symbol(), ts_us, body.price("avg_price", "price", "close"))


def _outcome(ref: EntryRef, ts_us: int, body: _Body) -> Outcome:
    side = body.side("side")
    if side is None:
        is_long = body.flag("is_long")
        side = 0 if is_long is None else 1 if is_long else -1
    pnl_usd = body.number("pnl_usd", "pnl_usdt")
    if pnl_usd == 0.0 and (
        ref.source == "intent_executor_main" or body.get("model_id") == "main_lane_close"
    ):
        pnl_usd = None  # this writer puts the literal 0.0 and computes nothing
    return Outcome(
        ref,
        body.symbol(),
        ts_us,
        closed_side=side,
        entry_price=body.optional_price("entry_price"),
        exit_price=body.optional_price("exit_price"),
        pnl_pct=body.number("pnl_percent", "pnl_pct"),
        pnl_usd=pnl_usd,
        reason=body.text("reason", "exit_reason", "close_reason"),
        paper=body.flag("paper_trade") is True,
    )


Reader = Callable[[EntryRef, int, _Body], Event | Ignored]

READERS: dict[str, Reader] = {
    "market.tick": _tick,
    "market.klines": _kline,
    "signal.generated": _signal,
    "ai.signal_generated": _signal,
    "ai.decision.made": _base_decision,
    "trade.intent": _trade_intent,
    "trade.closed": _outcome,
    "position.closed": _outcome,
    "exchange.normalized": _reference_price,
    "rl_v2.decision": _v2_decision,
    "sizing.decided": _sizing_decided,
    "strategy.selected": _strategy_selected,
    "rl.decision": _rl_decision,
    "custom": _custom,
}
"""Every stream that can be read, by its logical name."""


# -- the hot variant -------------------------------------------------------------------------------


class _PlainTick(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    """A tick in the names and types that production's live publishers write, and nothing else."""

    symbol: str
    price: float
    timestamp: float | str
    qty: float | None = None
    volume: float | None = None
    bid: float | None = None
    ask: float | None = None
    is_buyer_maker: bool | None = None
    source: str | None = None
    trace_id: str | None = None
    correlation_id: str | None = None


_decode_json_tick = msgspec.json.Decoder(_PlainTick).decode
_decode_msgpack_tick = msgspec.msgpack.Decoder(_PlainTick).decode
_symbol_is_plain = lru_cache(maxsize=4096)(_is_symbol)


def _plain_tick(entry: Entry) -> Tick | None:
    """Decode a well-formed tick at once; None leaves the entry to the general reader.

    It may only accept what the general reader accepts, with the same result.
    """
    fields = entry.fields
    payload = fields.get(b"payload")
    if not payload or len(payload) > MAX_BODY_BYTES:
        return None
    decode = _decode_msgpack_tick if payload[0] >= 0x80 else _decode_json_tick
    try:
        tick = decode(payload)
    except (ValueError, RecursionError):
        return None
    symbol, price, stated = tick.symbol, tick.price, tick.timestamp
    if type(stated) is float and 1e8 <= stated < 1e11:  # what `_time_us` makes of most of them
        time_us: int | None = round(stated * 1_000_000)
    else:
        time_us = _time_us(stated)
    trace_id, correlation_id, source = tick.trace_id, tick.correlation_id, tick.source
    if not trace_id:
        trace_id = _text(raw) if (raw := fields.get(b"trace_id")) else ""
    if not correlation_id:
        correlation_id = _text(raw) if (raw := fields.get(b"correlation_id")) else ""
    if not source:
        source = _text(raw) if (raw := fields.get(b"source")) else ""
    if (
        time_us is None
        or not MIN_PRICE <= price <= MAX_PRICE
        or _symbol_is_plain(symbol) is None
        or len(trace_id) > MAX_ID_CHARS
        or len(correlation_id) > MAX_ID_CHARS
        or len(source) > MAX_ID_CHARS
    ):
        return None
    id_ms = entry.id_ms
    ts_us, future = _event_time(time_us, id_ms)
    ref = EntryRef(
        entry.stream, entry.event_type, entry.entry_id, id_ms, trace_id, correlation_id, source,
        future,
    )  # fmt: skip
    volume = tick.volume
    if volume is None or not 0.0 <= volume <= MAX_VOLUME:
        volume = _volume(tick.qty)
    return _make_tick(ref, symbol, ts_us, price, volume, tick.bid, tick.ask, tick.is_buyer_maker)


# -- the public functions --------------------------------------------------------------------------


def decode(entry: Entry) -> Event | Ignored | Rejected | Replayed:
    """Read one raw entry; `entry.event_type` selects how.

    Never raises, whatever the bytes of the fields are. `Ignored.reason` is the outcome under which
    the entry is counted: priming or unselected.
    """
    if entry.event_type == "market.tick":
        tick = _plain_tick(entry)
        if tick is not None:
            return tick
    elif entry.event_type == REPLAY:
        return _replayed(entry)
    ref = _envelope_ref(entry)
    try:
        read = READERS.get(entry.event_type)
        if read is None:
            raise _RefusedError(
                "unknown_stream", f"expected a known stream, found {entry.event_type}"
            )
        body = _read_body(entry.fields)
        if body.values and body.values.keys() <= _PRIMING:
            return Ignored(ref, "priming")
        ref, ts_us = _locate(entry, ref, body)
        return read(ref, ts_us, body)
    except _RefusedError as refused:
        return Rejected(ref, refused.reason, refused.error)


def _replayed(entry: Entry) -> Replayed | Ignored | Rejected:
    """Read the original of a replay; what is wrong with that is wrong with the replay."""
    bare = _envelope_ref(entry)
    stream = _text(entry.fields.get(_REPLAY_STREAM, b""))
    entry_id = entry.fields.get(_REPLAY_ID, b"")
    event_type = stream.rpartition(":")[2]
    if event_type not in READERS or _is_entry_id(entry_id) is None:
        return Rejected(
            bare,
            "bad_replay",
            f"expected replay_stream and replay_id of an input's entry, found {short(stream)} and "
            f"{short(_text(entry_id))}",
        )
    fields = {k: v for k, v in entry.fields.items() if k not in (_REPLAY_STREAM, _REPLAY_ID)}
    event = decode(Entry(stream, event_type, entry_id.decode(), fields))
    if isinstance(event, Rejected):
        return msgspec.structs.replace(event, ref=bare)
    if isinstance(event, Ignored | Replayed):
        return Ignored(bare, "unselected")
    return Replayed(msgspec.structs.replace(event.ref, id_ms=bare.id_ms), event)


def replay_fields(original: Entry) -> dict[bytes, bytes]:
    """Return the fields of the replay of an entry: its own ones and where it came from."""
    origin = {_REPLAY_STREAM: original.stream.encode(), _REPLAY_ID: original.entry_id.encode()}
    return {**original.fields, **origin}


def envelope_ids(entry: Entry) -> tuple[str, str]:
    """Return trace and correlation id as an entry's envelope states them, without its body."""
    ref = _envelope_ref(entry)
    return ref.trace_id, ref.correlation_id


def crashed(entry: Entry, deaths: int) -> Rejected:
    """Return the verdict on an entry with which in hand, alone, the process died."""
    return Rejected(
        _envelope_ref(entry),
        "crash",
        f"expected an entry that can be folded, found that the process ended {deaths} times with "
        "it in hand",
    )


def join_id(raw: str | None) -> str | None:
    """Return a trace or correlation id that can join two events, None if it cannot.

    Empty ids, and the `market-tick-<second>` ids that all symbols of a second share, join nothing.
    """
    if not raw or not raw.strip() or raw.startswith("market-tick-"):
        return None
    return raw


def dead_letter(entry: Entry, rejected: Rejected, at_us: int) -> bytes:
    """Return the JSON payload of the dead letter about an entry that cannot be read.

    `trace_id` and `correlation_id` are the entry's, as far as they could be read. `original` holds
    the fields as text, together at most 4 KiB of their bytes; `original_sha256` is `fields_digest`
    of all of them. Where they are whole, but no UTF-8, `original_msgpack` holds them as well: a map
    in msgpack, in base64.
    """
    fields = entry.fields
    original: dict[str, str] = {}
    size, room = 0, DEAD_LETTER_BYTES
    for name, value in fields.items():
        size += len(name) + len(value)
        if len(name) < room:
            original[_text(name)] = _text(value[: room - len(name)])
            room -= min(len(name) + len(value), room)
    letter: dict[str, object] = {
        "dlq_reason": rejected.reason,
        "dlq_error": rejected.error,
        "dlq_source_stream": entry.stream,
        "dlq_source_id": entry.entry_id,
        "dlq_at": iso(at_us),
        "trace_id": rejected.ref.trace_id,
        "correlation_id": rejected.ref.correlation_id,
        "original_sha256": fields_digest(fields),
        "original_bytes": size,
        "truncated": size > DEAD_LETTER_BYTES,
        "original": original,
    }
    if (
        size <= DEAD_LETTER_BYTES
        and {k.encode(): v.encode() for k, v in original.items()} != fields
    ):
        letter["original_msgpack"] = b64encode(msgpack.packb(dict(fields))).decode()
    return msgspec.json.encode(letter)


def fields_digest(fields: Mapping[bytes, bytes]) -> str:
    """Return the sha256 of an entry: for each field the name, then the value, each after its
    length in 8 bytes, big-endian.
    """
    digest = hashlib.sha256()
    for pair in fields.items():
        for part in pair:
            digest.update(len(part).to_bytes(8, "big"))
            digest.update(part)
    return digest.hexdigest()


def letter_fields(letter: Mapping[str, object]) -> dict[bytes, bytes] | None:
    """Return the fields of the entry that a dead letter is about, exactly; None where it was cut.

    Args:
        letter: a decoded payload of `dead_letter`.
    Raises:
        ValueError: it is none.
    """
    raw, original = letter.get("original_msgpack"), letter.get("original")
    if isinstance(raw, str):
        fields = msgpack.unpackb(b64decode(raw))
    elif isinstance(original, dict):
        fields = {str(name).encode(): str(value).encode() for name, value in original.items()}
    else:
        raise ValueError("expected a dead letter with its original, found none")
    return fields if fields_digest(fields) == letter.get("original_sha256") else None
