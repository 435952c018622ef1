"""Is every wire shape read as documented, and does no input whatever raise?"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import msgpack
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from rlv3.events import (
    BaseDecision,
    Ignored,
    Kline,
    Outcome,
    ReferencePrice,
    Rejected,
    Signal,
    Tick,
    V2Decision,
)
from shadow import codec
from shadow.codec import decode, join_id
from shadow.records import Entry

FIXTURES = json.loads(
    (Path(__file__).parents[1] / "fixtures" / "bus_entries.json").read_text("utf-8")
)["fixtures"]
KINDS = (
    Tick, Signal, BaseDecision, V2Decision, Kline, ReferencePrice, Outcome, Ignored, Rejected,
)  # fmt: skip
ID_MS = 1_771_364_400_000  # 2026-02-17T21:40:00Z
TICK = {"symbol": "BTCUSDT", "price": 96_000.5, "qty": 0.25, "timestamp": 1_771_364_399.5}
SIGNAL = {"symbol": "BTCUSDT", "action": "buy", "confidence": 0.7}
V2 = {
    "schema_version": 1,
    "decision_id": "a2c4",
    "symbol": "BTCUSDT",
    "timestamp": "2026-02-17T21:39:59.000001+00:00",
    "kind": "combined",
    "provenance": "q_table",
}


def entry(event_type: str, /, **fields: bytes) -> Entry:
    """An entry of production's prefix, at ID_MS."""
    raw = {name.encode(): value for name, value in fields.items()}
    return Entry(f"quantum:stream:{event_type}", event_type, f"{ID_MS}-0", raw)


def of(event_type: str, body: object, **fields: bytes) -> object:
    """Decode a JSON body in an otherwise empty envelope."""
    return decode(entry(event_type, payload=json.dumps(body).encode(), **fields))


def tick(**changes: object) -> object:
    return of("market.tick", TICK | changes)


def reason(event: object) -> str:
    assert isinstance(event, Rejected), event
    return event.reason


# -- the 23 entries of the bus description -------------------------------------------------------

EVENT_BY_STREAM = {
    "market.tick": Tick,
    "market.klines": Kline,
    "signal.generated": Signal,
    "ai.signal_generated": Signal,
    "ai.decision.made": BaseDecision,
    "trade.intent": BaseDecision,
    "trade.closed": Outcome,
    "sizing.decided": V2Decision,
    "strategy.selected": V2Decision,
    "exchange.normalized": ReferencePrice,
}
SIDE = {"BUY": 1, "SELL": -1}


def expected_field(event: object, name: str, value: object) -> tuple[object, object]:
    """Return (found, expected) for one name of the fixtures' `normalized` block."""
    ref = event.ref  # type: ignore[attr-defined]
    match name:
        case "ts" | "decision_ts":
            return event.ts_us, round(value * 1e6)  # type: ignore[attr-defined, operator]
        case "bar_close_ts":
            return event.bar_end_us - 1_000, round(value * 1e6)  # type: ignore[attr-defined, operator]
        case "trace_id" | "correlation_id" | "source":
            return getattr(ref, name), value or ""
        case "side":
            return event.direction, SIDE[value]  # type: ignore[attr-defined, index]
        case "bid_ask_spread":
            bid, ask = event.bid, event.ask  # type: ignore[attr-defined]
            return 2 * (ask - bid) / (ask + bid), pytest.approx(value, rel=1e-4)
        case "base_direction":
            return event.signal_direction, value  # type: ignore[attr-defined]
        case "v2_direction":
            return event.direction, value  # type: ignore[attr-defined]
        case "v2_confidence":
            return event.effective_confidence, value  # type: ignore[attr-defined]
        case "v2_version":
            return event.model, value  # type: ignore[attr-defined]
        case "v2_rl_action" | "v2_rl_version":
            return isinstance(event, V2Decision), value is not None
        case "position_size_usd":
            return 200.0, value  # dollars of a sizing decision are not part of the event
    return getattr(event, name), value


@pytest.mark.parametrize("fixture", FIXTURES, ids=[f["id"] for f in FIXTURES])
def test_fixture_is_read_as_documented(fixture: dict[str, dict[str, object]]) -> None:
    event_type = str(fixture["stream"]).removeprefix("quantum:stream:")
    expect = fixture["expect"]
    normalized: dict[str, object] = expect.get("normalized", {})  # type: ignore[assignment]
    seconds = normalized.get("ts", normalized.get("decision_ts", 1_771_364_400.0))
    entry_id = fixture["entry_id"] or f"{int(float(seconds) * 1000)}-0"  # type: ignore[arg-type]
    raw = {name.encode(): str(value).encode() for name, value in fixture["fields"].items()}
    event = decode(Entry(str(fixture["stream"]), event_type, str(entry_id), raw))

    if expect["verdict"] == "dead_letter":
        assert reason(event) == expect["reason"]
    elif expect.get("reason") == "stale":
        assert isinstance(event, Tick)  # whether it is stale is the pipeline's question
        assert event.ts_us == 1_765_843_200_000_000
    elif expect["verdict"] == "ignore_ack":
        assert isinstance(event, Ignored)
        assert event.reason == "priming"
    else:
        opinion = "v2_direction" in normalized
        assert isinstance(event, V2Decision if opinion else EVENT_BY_STREAM[event_type])
        for name, value in normalized.items():
            found, wanted = expected_field(event, name, value)
            assert found == wanted, name


def test_fixture_file_has_all_23_entries() -> None:
    assert len(FIXTURES) == 23


# -- bodies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["payload", "data", "message"])
@pytest.mark.parametrize("pack", [lambda b: json.dumps(b).encode(), msgpack.packb])
def test_body_is_found_in_any_field_and_form(name: str, pack: object) -> None:
    event = decode(entry("market.tick", **{name: pack(TICK)}))  # type: ignore[operator]
    assert event == tick()
    assert event.price == 96_000.5  # type: ignore[union-attr]
    assert event.volume == 0.25  # type: ignore[union-attr]


def test_payload_wins_over_data_and_flat_fields() -> None:
    other = json.dumps(TICK | {"price": 1.0}).encode()
    event = decode(
        entry("market.tick", payload=json.dumps(TICK).encode(), data=other, price=b"2.0")
    )
    assert isinstance(event, Tick)
    assert event.price == 96_000.5


def test_body_that_is_a_string_is_decoded_once_more() -> None:
    once = json.dumps(TICK)
    assert of("market.tick", once) == tick()
    assert reason(of("market.tick", json.dumps(once))) == "payload_not_object"
    binary = decode(entry("market.tick", payload=msgpack.packb(msgpack.packb(TICK))))
    assert binary == tick()


@pytest.mark.parametrize("body", [b"[1, 2]", b"null", b"3", b"\x93\x01\x02\x03", b"\xc0"])
def test_body_that_is_no_object_is_rejected(body: bytes) -> None:
    assert reason(decode(entry("market.tick", payload=body))) == "payload_not_object"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"{", "payload_not_json"),
        (b"   ", "payload_not_json"),
        (b'{"symbol": "\xff\xfe", "price": 1}', "payload_not_json"),
        (b"[" * 200_000, "payload_too_deep"),
        (b'{"a":' * 200_000, "payload_too_deep"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "payload_too_deep"),
        (b'{"a":' * 64 + b"1" + b"}" * 64, "missing_symbol"),
        (b"1" * 5_000, "payload_not_json"),
        (b"\x91" * 200_000, "payload_too_deep"),
        (b"\x81\xa1a" * 65 + b"\x01", "payload_too_deep"),
        (b"\x81\xa1a" * 64 + b"\x01", "missing_symbol"),
        (b"\xdf\xff\xff\xff\xff", "payload_not_msgpack"),  # 4 G pairs declared, none there
        (b"\xdd\xff\xff\xff\xff", "payload_not_msgpack"),  # 4 G items
        (b"\xc6\xff\xff\xff\xff", "payload_not_msgpack"),  # 4 GiB of bytes
        (b"\x81\x91\x01\x01", "payload_not_msgpack"),  # a list as key
        (b"\xc7\x0c\xff" + b"\xff" * 12, "payload_not_msgpack"),  # an impossible time stamp
        (b"\xd4\x05\x00", "payload_not_object"),  # an extension type
        (b'{"symbol": "A' + b"A" * 5_000_000 + b'"}', "payload_too_large"),
    ],
)
def test_bomb_is_rejected(body: bytes, expected: str) -> None:
    assert reason(decode(entry("market.tick", payload=body))) == expected


def test_flat_entry_of_5_megabytes_is_rejected() -> None:
    huge = entry("trade.closed", symbol=b"BTCUSDT", side=b"LONG", note=b"x" * 5_000_000)
    assert reason(decode(huge)) == "payload_too_large"


def test_unknown_stream_is_rejected() -> None:
    assert reason(of("market.depth", TICK)) == "unknown_stream"


@pytest.mark.parametrize("fields", [{"init": b"1"}, {"payload": b'{"init": 1}'}])
def test_priming_entry_is_ignored(fields: dict[str, bytes]) -> None:
    event = decode(entry("rl_v2.decision", **fields))
    assert isinstance(event, Ignored)
    assert event.reason == "priming"


# -- symbols, prices, numbers --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "symbol"),
    [
        ("BTCUSDT", "BTCUSDT"),
        (" btc/usdt ", "BTCUSDT"),
        ("btc-usdt", "BTCUSDT"),
        ("BTC_USDT", "BTCUSDT"),
        ("BTC:USDT", "BTCUSDT"),
        ("1000CHEEMSUSDT", "1000CHEEMSUSDT"),
        ("A2ZUSDT", "A2ZUSDT"),
        ("A" * 20, "A" * 20),
    ],
)
def test_symbol_is_normalised(raw: str, symbol: str) -> None:
    event = tick(symbol=raw)
    assert isinstance(event, Tick)
    assert event.symbol == symbol


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (None, "missing_symbol"),
        ("", "missing_symbol"),
        ("  ", "missing_symbol"),
        ("None", "missing_symbol"),
        ("A", "bad_symbol"),
        ("A" * 21, "bad_symbol"),
        ("BTC USDT", "bad_symbol"),
        ("BTCUSDT\n\x00", "bad_symbol"),
        ("ßtc", "bad_symbol"),  # upper() would make SSTC of it
        ("ＢＴＣ", "bad_symbol"),
        (7, "bad_symbol"),
        (True, "bad_symbol"),
        (["BTCUSDT"], "bad_symbol"),
        ("\ud800", "bad_symbol"),
    ],
)
def test_symbol_that_names_nothing_is_rejected(raw: object, expected: str) -> None:
    assert reason(tick(symbol=raw)) == expected


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (math.nan, "non_finite_price"),
        (math.inf, "non_finite_price"),
        (-math.inf, "non_finite_price"),
        ("Infinity", "non_finite_price"),
        (10**400, "non_finite_price"),
        (0, "price_not_positive"),
        (-3.0, "price_not_positive"),
        ("0.0", "price_not_positive"),
        (1e13, "price_out_of_range"),
        (1e-13, "price_out_of_range"),
        (True, "price_not_a_number"),
        ("12_000", "price_not_a_number"),
        ("١٢", "price_not_a_number"),
        ("about 5", "price_not_a_number"),
        ([5.0], "price_not_a_number"),
        ({}, "price_not_a_number"),
        (None, "missing_price"),
        ("None", "missing_price"),
        ("nan", "missing_price"),
        ("", "missing_price"),
    ],
)
def test_price_that_is_none_is_rejected(raw: object, expected: str) -> None:
    assert reason(tick(price=raw)) == expected


@pytest.mark.parametrize(
    ("changes", "price"),
    [
        ({"price": "84.94"}, 84.94),
        ({"price": 3}, 3.0),
        ({"price": 0.000961}, 0.000961),
        ({"price": None, "close": 5.5}, 5.5),
        ({"price": 0.0, "avg_price": "6.5"}, 6.5),
        ({"price": "NaN", "mark_price": 7.5, "entry_price": 8.5}, 7.5),
    ],
)
def test_price_is_the_first_usable_one(changes: dict[str, object], price: float) -> None:
    event = tick(**changes)
    assert isinstance(event, Tick)
    assert event.price == price


@pytest.mark.parametrize(
    ("changes", "volume"),
    [
        ({"qty": None}, None),
        ({"qty": "None"}, None),
        ({"qty": math.nan}, None),
        ({"qty": -1.0}, None),
        ({"qty": True}, None),
        ({"qty": 0.0}, 0.0),
        ({"qty": "2.5"}, 2.5),
        ({"volume": 3.0}, 3.0),  # volume before qty
        ({"volume": None}, 0.25),
    ],
)
def test_unknown_volume_is_missing_not_zero(changes: dict[str, object], volume: object) -> None:
    event = tick(**changes)
    assert isinstance(event, Tick)
    assert event.volume == volume


@pytest.mark.parametrize(
    ("changes", "side"),
    [
        ({"is_buyer_maker": True}, -1),  # the buyer waited in the book: a seller crossed
        ({"is_buyer_maker": False}, 1),
        ({"is_buyer_maker": "true"}, -1),
        ({"is_buyer_maker": None}, 0),
        ({}, 0),
        ({"is_buyer_maker": False, "qty": 0.0}, 0),
        ({"is_buyer_maker": False, "qty": None}, 0),
        ({"is_buyer_maker": False, "source": "mark_price_fallback"}, 0),
    ],
)
def test_side_of_a_tick_is_the_aggressor_of_a_real_trade(
    changes: dict[str, object], side: int
) -> None:
    event = tick(**changes)
    assert isinstance(event, Tick)
    assert event.side == side


def test_mark_price_fallback_moves_the_price_and_is_never_volume() -> None:
    event = tick(source="mark_price_fallback", qty=4.0)
    assert isinstance(event, Tick)
    assert event.synthetic
    assert event.volume == 0.0


# -- times ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "ts_us"),
    [
        (1771364397.517197, 1_771_364_397_517_197),
        ("1771364397.517197", 1_771_364_397_517_197),
        (1771364397, 1_771_364_397_000_000),
        ("1771364397", 1_771_364_397_000_000),
        (1771364397517, 1_771_364_397_517_000),
        ("1771364397517", 1_771_364_397_517_000),
        (1771364397517197, 1_771_364_397_517_197),
        ("1771364397517197", 1_771_364_397_517_197),
        ("2026-02-17T21:39:57.517197", 1_771_364_397_517_197),
        ("2026-02-17T21:39:57.517197Z", 1_771_364_397_517_197),
        ("2026-02-17T21:39:57.517197+00:00", 1_771_364_397_517_197),
        ("2026-02-17T23:39:57.517197+02:00", 1_771_364_397_517_197),
        ("2026-02-17T21:39:57Z", 1_771_364_397_000_000),
        ("2026-02-17 21:39:57", 1_771_364_397_000_000),
    ],
)
def test_timestamp_is_exact_to_the_microsecond(raw: object, ts_us: int) -> None:
    event = tick(timestamp=raw)
    assert isinstance(event, Tick)
    assert event.ts_us == ts_us
    assert not event.ref.future


@given(st.integers(min_value=1, max_value=4_102_444_800_000_000))
def test_epoch_seconds_as_float_survive_to_the_microsecond(ts_us: int) -> None:
    payload = json.dumps(TICK | {"timestamp": ts_us / 1e6}).encode()
    event = decode(replace(entry("market.tick", payload=payload), entry_id="4102444800000-0"))
    assert isinstance(event, Tick)
    assert event.ts_us == ts_us


@pytest.mark.parametrize(
    ("ahead_us", "future"), [(0, False), (5_000_000, False), (5_000_001, True), (10**9, True)]
)
def test_timestamp_over_5_s_ahead_of_the_id_is_replaced(ahead_us: int, future: bool) -> None:
    event = tick(timestamp=ID_MS * 1_000 + ahead_us)
    assert isinstance(event, Tick)
    assert event.ref.future is future
    assert event.ts_us == ID_MS * 1_000 + (0 if future else ahead_us)


@pytest.mark.parametrize("raw", [None, "", "None", "yesterday", True, [], -5, 0, math.nan])
def test_missing_timestamp_is_the_envelopes_then_the_ids(raw: object) -> None:
    event = tick(timestamp=raw)
    assert isinstance(event, Tick)
    assert event.ts_us == ID_MS * 1_000

    event = of("market.tick", TICK | {"timestamp": raw}, timestamp=b"2026-02-17T21:39:58.250000")
    assert isinstance(event, Tick)
    assert event.ts_us == 1_771_364_398_250_000


@pytest.mark.parametrize("raw", [1e300, 10**30, 1e18, "9999-12-31T23:59:59.999999-14:00"])
def test_absurd_timestamp_is_future(raw: object) -> None:
    event = tick(timestamp=raw)
    assert isinstance(event, Tick)
    assert event.ref.future
    assert event.ts_us == ID_MS * 1_000


# -- ids -----------------------------------------------------------------------------------------


def test_trace_id_is_the_payloads_else_the_envelopes_verbatim() -> None:
    inner = of("market.tick", TICK | {"trace_id": " t-1 "}, trace_id=b"outer")
    outer = of("market.tick", TICK | {"trace_id": ""}, trace_id=b"outer", correlation_id=b"c")
    assert isinstance(inner, Tick)
    assert isinstance(outer, Tick)
    assert inner.ref.trace_id == " t-1 "
    assert (outer.ref.trace_id, outer.ref.correlation_id) == ("outer", "c")


def test_source_is_the_payloads_else_the_envelopes() -> None:
    inner = of("market.tick", TICK | {"source": "inner"}, source=b"outer")
    outer = of("market.tick", TICK, source=b"outer")
    assert isinstance(inner, Tick)
    assert isinstance(outer, Tick)
    assert (inner.ref.source, outer.ref.source) == ("inner", "outer")


def test_id_that_cannot_be_carried_is_rejected() -> None:
    assert reason(tick(trace_id="x" * 257)) == "id_too_long"
    assert isinstance(tick(trace_id="x" * 256), Tick)
    event = of("market.tick", TICK, correlation_id=b"y" * 1_000_000)
    assert reason(event) == "id_too_long"
    assert len(event.ref.correlation_id) == 256  # type: ignore[attr-defined]


def test_lone_surrogate_leaves_as_valid_utf8() -> None:
    event = of("signal.generated", SIGNAL | {"trace_id": "\ud800", "regime": "\udfff"})
    assert isinstance(event, Signal)
    assert (event.ref.trace_id, event.regime) == ("?", "?")


@pytest.mark.parametrize(
    ("raw", "joined"),
    [
        (None, None),
        ("", None),
        ("  ", None),
        ("market-tick-1766552144", None),
        ("test-1f2e3d4c", "test-1f2e3d4c"),
    ],
)
def test_join_id_drops_what_joins_nothing(raw: str | None, joined: str | None) -> None:
    assert join_id(raw) == joined


# -- signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["action", "side", "direction", "signal"])
@pytest.mark.parametrize(
    ("raw", "direction"),
    [
        ("BUY", 1), ("buy", 1), ("Long", 1), ("UP", 1), (1, 1), ("1", 1), (1.0, 1),
        ("SELL", -1), (" sell ", -1), ("short", -1), ("DOWN", -1), (-1, -1), ("-1", -1),
        ("HOLD", 0), ("flat", 0), ("NONE", 0), (0, 0), ("0", 0), ("", 0),
        ("CLOSE", 0), ("exit", 0),
    ],
)  # fmt: skip
def test_signal_side_is_normalised(key: str, raw: object, direction: int) -> None:
    event = of("ai.signal_generated", {"symbol": "BTCUSDT", key: raw, "confidence": 0.7})
    assert isinstance(event, Signal)
    assert event.direction == direction


@pytest.mark.parametrize("raw", ["STRONG", 2, 0.5, True, [], {}, "BUYSELL", "x" * 100_000])
def test_signal_with_unknown_side_is_rejected(raw: object) -> None:
    assert reason(of("signal.generated", SIGNAL | {"action": raw})) == "bad_side"


def test_signal_without_side_is_rejected() -> None:
    assert reason(of("signal.generated", {"symbol": "BTCUSDT"})) == "missing_side"


def test_blank_side_gives_way_to_another_key() -> None:
    event = of("signal.generated", SIGNAL | {"action": "", "side": "SELL"})
    assert isinstance(event, Signal)
    assert event.direction == -1


@pytest.mark.parametrize(
    ("raw", "confidence"),
    [(0.7, 0.7), ("0.7", 0.7), (1.7, 1.0), (-1, 0.0), (None, 0.5), (math.nan, 0.5), (True, 0.5)],
)
def test_signal_confidence_is_clipped_and_defaults_to_a_half(
    raw: object, confidence: float
) -> None:
    event = of("signal.generated", SIGNAL | {"confidence": raw})
    assert isinstance(event, Signal)
    assert event.confidence == confidence


def test_signal_of_the_injector_carries_price_and_regime() -> None:
    event = of("ai.signal_generated", SIGNAL | {"price": 96_000.0, "regime": "TRENDING"})
    assert isinstance(event, Signal)
    assert (event.price, event.regime) == (96_000.0, "TRENDING")


def test_signal_of_the_ai_service_has_explicit_nulls() -> None:
    event = of(
        "signal.generated",
        {"symbol": "ethusdt", "action": "HOLD", "confidence": 0.4, "price": None, "regime": None},
        timestamp=b"2026-02-17T21:39:58",
    )
    assert event == Signal(
        event.ref,  # type: ignore[attr-defined]
        "ETHUSDT",
        1_771_364_398_000_000,
        0,
        0.4,
    )


# -- RL v2 ---------------------------------------------------------------------------------------


def test_rl_v2_decision_is_read_whole() -> None:
    event = of(
        "rl_v2.decision",
        V2
        | {
            "strategy": "momentum_flip", "model": "gru", "weight": 1.25,
            "size_multiplier": 1.5, "leverage": 20,
            "signal_side": "SELL", "signal_confidence": 0.66,
            "direction": -1, "effective_confidence": 0.825, "size_fraction": 0.15,
            "event_ts": "2026-02-17T21:39:58.500000+00:00",
            "expires_at": "2026-02-17T21:55:00+00:00",
            "source_stream": "quantum:stream:signal.generated",
            "source_entry_id": "1771364398500-0",
            "trace_id": "t-1", "correlation_id": "c-1", "price": 96_000.0,
        },
    )  # fmt: skip
    assert isinstance(event, V2Decision)
    assert event == V2Decision(
        ref=event.ref,
        symbol="BTCUSDT",
        ts_us=1_771_364_399_000_001,
        decision_id="a2c4",
        kind="combined",
        provenance="q_table",
        strategy="momentum_flip",
        model="gru",
        weight=1.25,
        size_multiplier=1.5,
        leverage=20.0,
        signal_direction=-1,
        signal_confidence=0.66,
        direction=-1,
        effective_confidence=0.825,
        size_fraction=0.15,
        event_ts_us=1_771_364_398_500_000,
        expires_at_us=1_771_365_300_000_000,
        source_stream="quantum:stream:signal.generated",
        source_entry_id="1771364398500-0",
        trace_id="t-1",
        correlation_id="c-1",
        price=96_000.0,
    )


def test_rl_v2_decision_keeps_what_is_absent_absent() -> None:
    event = of("rl_v2.decision", V2 | {"direction": None, "weight": "", "trace_id": None})
    assert isinstance(event, V2Decision)
    assert event.direction is None
    assert event.weight is None
    assert event.trace_id is None
    assert event.event_ts_us is None
    assert event.expires_at_us is None


def test_rl_v2_event_time_ahead_of_its_entry_is_dropped() -> None:
    event = of("rl_v2.decision", V2 | {"event_ts": "2026-02-17T22:40:00Z"})
    assert isinstance(event, V2Decision)
    assert event.event_ts_us is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"schema_version": 2}, "unknown_version"),
        ({"schema_version": None}, "unknown_version"),
        ({"schema_version": "one"}, "unknown_version"),
        ({"schema_version": True}, "unknown_version"),
        ({"kind": "guess"}, "bad_kind"),
        ({"kind": None}, "bad_kind"),
        ({"provenance": "oracle"}, "bad_provenance"),
        ({"provenance": None}, "bad_provenance"),
        ({"direction": 2}, "bad_side"),
        ({"signal_side": "sideways"}, "bad_side"),
        ({"symbol": None}, "missing_symbol"),
    ],
)
def test_rl_v2_decision_against_its_contract_is_rejected(
    changes: dict[str, object], expected: str
) -> None:
    assert reason(of("rl_v2.decision", V2 | changes)) == expected


def test_decision_without_id_gets_the_same_derived_one() -> None:
    body = {name: value for name, value in V2.items() if name != "decision_id"}
    first, again = of("rl_v2.decision", body), of("rl_v2.decision", body)
    assert isinstance(first, V2Decision)
    assert first == again
    assert len(first.decision_id) == 32


@pytest.mark.parametrize("stream", ["rl_v2.decision", "custom"])
def test_domain_agents_are_read_by_event_name(stream: str) -> None:
    meta = of(
        stream,
        {
            "event_name": "rl_meta_strategy_decision", "symbol": "BTCUSDT",
            "strategy": "dual_momentum", "model": "lstm", "weight": 0.75,
        },
    )  # fmt: skip
    sizing = of(
        stream,
        {
            "event_name": "rl_position_sizing_decision", "symbol": "BTCUSDT",
            "size_multiplier": 2.0, "leverage": 50,
        },
    )  # fmt: skip
    assert isinstance(meta, V2Decision)
    assert isinstance(sizing, V2Decision)
    assert (meta.kind, meta.provenance, meta.strategy, meta.model, meta.weight) == (
        "meta_strategy", "q_table", "dual_momentum", "lstm", 0.75,
    )  # fmt: skip
    assert (sizing.kind, sizing.size_multiplier, sizing.leverage) == ("position_sizing", 2.0, 50.0)


def test_custom_events_of_others_are_not_ours() -> None:
    event = of("custom", {"event_name": "something_else"})
    assert isinstance(event, Ignored)
    assert event.reason == "unselected"


def test_rl_decision_of_the_schema_is_adapted() -> None:
    sizing = of(
        "rl.decision",
        {"decision_type": "position_sizing", "symbol": "BTCUSDT", "recommended_leverage": 10.0},
    )
    meta = of(
        "rl.decision",
        {"decision_type": "meta_strategy", "symbol": "BTCUSDT", "selected_strategy": "momentum"},
    )
    assert isinstance(sizing, V2Decision)
    assert isinstance(meta, V2Decision)
    assert (sizing.kind, sizing.leverage) == ("position_sizing", 10.0)
    assert (meta.kind, meta.strategy) == ("meta_strategy", "momentum")
    assert isinstance(of("rl.decision", {"decision_type": "dynamic_tpsl"}), Ignored)
    assert reason(of("rl.decision", {"symbol": "BTCUSDT"})) == "bad_decision_type"


def test_intent_that_may_only_reduce_is_an_exit() -> None:
    event = of("trade.intent", {"symbol": "BTCUSDT", "side": "SELL", "reduceOnly": True})
    assert isinstance(event, BaseDecision)
    assert event.direction == 0
    assert event.confidence is None


def test_intent_with_an_opinion_to_hold_is_a_v2_decision() -> None:
    event = of("trade.intent", {"symbol": "BTCUSDT", "side": "BUY", "rl_action": "HOLD"})
    assert isinstance(event, V2Decision)
    assert (event.signal_direction, event.direction, event.provenance) == (1, 0, "static_policy")


# -- candles and outcomes ------------------------------------------------------------------------

KLINE = {
    "symbol": "SOLUSDT", "interval": "1m", "open": 85.06, "high": 85.1, "low": 85.03,
    "close": 85.05, "volume": 153.99, "open_time": ID_MS - 60_000, "close_time": ID_MS - 1,
    "is_closed": True,
}  # fmt: skip


def test_candle_ends_one_millisecond_after_its_close_time() -> None:
    event = of("market.klines", KLINE)
    assert isinstance(event, Kline)
    assert event.bar_end_us == ID_MS * 1_000
    assert (event.open, event.high, event.low, event.close) == (85.06, 85.1, 85.03, 85.05)


def test_candle_without_close_time_ends_an_interval_after_its_open() -> None:
    event = of("market.klines", KLINE | {"close_time": None, "interval": None, "timeframe": "1m"})
    assert isinstance(event, Kline)
    assert event.bar_end_us == ID_MS * 1_000


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"close_time": None, "open_time": None}, "missing_close_time"),
        ({"close_time": None, "interval": "soon"}, "missing_close_time"),
        ({"close_time": ID_MS + 60_000}, "candle_not_over"),
        ({"high": None}, "missing_price"),
        ({"low": math.nan}, "non_finite_price"),
        ({"close": 0.0}, "price_not_positive"),
    ],
)
def test_candle_that_cannot_be_placed_is_rejected(
    changes: dict[str, object], expected: str
) -> None:
    assert reason(of("market.klines", KLINE | changes)) == expected


def test_open_candle_does_not_count() -> None:
    assert isinstance(of("market.klines", KLINE | {"is_closed": False}), Ignored)


CLOSED = {"symbol": "BTCUSDT", "side": "LONG", "pnl_percent": "1.5", "pnl_usd": "0.0"}


@pytest.mark.parametrize(
    ("changes", "pnl_usd"),
    [
        ({"source": "intent_executor_main"}, None),
        ({"model_id": "main_lane_close"}, None),
        ({"source": "intent_executor_main", "pnl_usd": "2.5"}, 2.5),
        ({"source": "autonomous_trader"}, 0.0),
    ],
)
def test_profit_that_is_never_computed_is_missing(
    changes: dict[str, str], pnl_usd: float | None
) -> None:
    fields = {name: value.encode() for name, value in (CLOSED | changes).items()}
    event = decode(entry("trade.closed", **fields))
    assert isinstance(event, Outcome)
    assert event.pnl_usd == pnl_usd
    assert event.pnl_pct == 1.5


def test_paper_trade_is_marked() -> None:
    event = decode(
        entry(
            "trade.closed", symbol=b"BTCUSDT", side=b"SHORT", pnl_pct=b"-0.5", pnl_usdt=b"-3",
            close_ts=b"1771364390", paper_trade=b"True",
        )
    )  # fmt: skip
    assert isinstance(event, Outcome)
    assert event.paper
    assert (event.closed_side, event.pnl_usd, event.ts_us) == (-1, -3.0, 1_771_364_390_000_000)


def test_position_closed_says_its_side_by_is_long() -> None:
    event = of(
        "position.closed",
        {"symbol": "BTCUSDT", "is_long": False, "exit_price": 96_000.0, "exit_reason": "tp"},
    )
    assert isinstance(event, Outcome)
    assert (event.closed_side, event.exit_price, event.reason) == (-1, 96_000.0, "tp")
    assert not event.paper


# -- envelopes and dead letters ------------------------------------------------------------------


def test_the_six_fields_of_an_envelope_are_read() -> None:
    fields = {
        "event_type": b"market.tick",
        "payload": json.dumps(TICK).encode(),
        "trace_id": b"t",
        "correlation_id": b"c",
        "timestamp": b"2026-02-17T21:40:00.000000",
        "source": b"market-publisher",
    }
    event = decode(entry("market.tick", **fields))
    assert isinstance(event, Tick)
    assert (event.ref.trace_id, event.ref.correlation_id) == ("t", "c")
    assert event.ref.source == "market-publisher"


def test_dead_letter_tells_where_why_and_what() -> None:
    bad = entry("market.tick", payload=b'{"price": NaN, "trace_id": "t-1"}')
    rejected = decode(bad)
    assert isinstance(rejected, Rejected)
    letter = json.loads(codec.dead_letter(bad, rejected, 1_771_364_400_000_001))
    # every part after its length: 7 bytes of name, 33 bytes of value
    body = b'{"price": NaN, "trace_id": "t-1"}'
    whole = b"\0\0\0\0\0\0\0\x07payload\0\0\0\0\0\0\0\x21" + body
    assert letter == {
        "dlq_reason": "missing_symbol",
        "dlq_error": "expected a symbol, found none",
        "dlq_source_stream": "quantum:stream:market.tick",
        "dlq_source_id": "1771364400000-0",
        "dlq_at": "2026-02-17T21:40:00.000001+00:00",
        "original_sha256": hashlib.sha256(whole).hexdigest(),
        "trace_id": "t-1",
        "correlation_id": "",
        "original_bytes": 40,
        "truncated": False,
        "original": {"payload": body.decode()},
    }


def test_dead_letter_keeps_4_kib_of_a_5_megabyte_entry() -> None:
    bad = entry("market.tick", event_type=b"market.tick", payload=b"\xff" * 5_000_000, source=b"s")
    rejected = decode(bad)
    assert isinstance(rejected, Rejected)
    raw = codec.dead_letter(bad, rejected, 0)
    letter = json.loads(raw)
    assert letter["truncated"] is True
    # event_type 10+11, payload 7+5,000,000, source 6+1
    assert letter["original_bytes"] == 5_000_035
    assert sum(len(name) + len(value) for name, value in letter["original"].items()) == 4_096
    assert len(raw) < 16_384


# -- any input -----------------------------------------------------------------------------------

NAMES = st.sampled_from(
    [
        "symbol", "price", "close", "qty", "volume", "bid", "ask", "timestamp", "is_buyer_maker",
        "source", "trace_id", "correlation_id", "action", "side", "direction", "confidence",
        "regime", "schema_version", "kind", "provenance", "decision_id", "weight", "expires_at",
        "event_ts", "event_name", "decision_type", "rl_action", "open", "high", "low", "interval",
        "open_time", "close_time", "is_closed", "pnl_usd", "paper_trade", "is_long", "init",
        "reduceOnly", "signal_side", "model", "avg_price", "source_stream",
    ]
) | st.text(max_size=8)  # fmt: skip
PLAUSIBLE = st.sampled_from(
    [
        "BTCUSDT", "btc/usdt", 96_000.5, "96000.5", 1, -1, 0, "BUY", "sell", "None", "", "nan",
        1_771_364_399.5, "2026-02-17T21:39:57.517197", "2026-02-17T21:39:57Z", 1_771_364_397_517,
        "combined", "q_table", "rl_meta_strategy_decision", "position_sizing", "true", "1m", True,
        False, None, math.nan, math.inf, 2**63, 2**64 - 1, -(2**63), 1e300, -0.0, "\ud800", "１",
        b"\xff\x00", "mark_price_fallback", ID_MS, ID_MS - 1,
    ]
)  # fmt: skip
VALUES = st.recursive(
    PLAUSIBLE | st.floats() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
BODIES = st.dictionaries(NAMES, VALUES, max_size=12)


def as_json(body: object) -> bytes:
    return json.dumps(body, default=str).encode()


def as_msgpack(body: object) -> bytes:
    return msgpack.packb(body, unicode_errors="surrogatepass")


@st.composite
def entries(draw: st.DrawFn) -> Entry:
    """Entries from nearly right to noise, in every form."""
    event_type = draw(st.sampled_from([*codec.READERS, "market.tick", "nobody.reads"]))
    form = draw(st.sampled_from(["json", "msgpack", "flat", "noise", "damaged", "string"]))
    name = draw(st.sampled_from(["payload", "data", "message"]))
    body = draw(BODIES | BODIES.map(lambda body: TICK | body) | BODIES.map(lambda b: V2 | b))
    envelope = draw(
        st.dictionaries(
            st.sampled_from([b"trace_id", b"correlation_id", b"timestamp", b"source", b"x"]),
            st.binary(max_size=300) | st.just(b"2026-02-17T21:39:57.517197"),
        )
    )
    match form:
        case "json":
            fields = {name.encode(): as_json(body)}
        case "msgpack":
            fields = {name.encode(): as_msgpack(body)}
        case "string":
            fields = {name.encode(): as_json(as_json(body).decode())}
        case "flat":
            fields = {
                key.encode("utf-8", "replace"): str(value).encode("utf-8", "replace")
                for key, value in body.items()
            }
        case "noise":
            fields = draw(st.dictionaries(st.binary(max_size=8), st.binary(max_size=64)))
            fields |= {name.encode(): draw(st.binary(max_size=200))}
        case _:
            pack = draw(st.sampled_from([as_json, as_msgpack]))
            raw = bytearray(pack(body))
            for _ in range(draw(st.integers(1, 3))):
                raw[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255))
            fields = {name.encode(): bytes(raw[: draw(st.integers(1, len(raw)))])}
    entry_id = f"{draw(st.sampled_from([0, 1, ID_MS, 2**63]))}-{draw(st.integers(0, 9))}"
    return Entry(f"quantum:stream:{event_type}", event_type, entry_id, envelope | fields)


def check_any(raw: Entry) -> None:
    """Decoding answers with a bounded event that can be written again."""
    event = decode(raw)
    assert isinstance(event, KINDS)
    assert decode(raw) == event
    built = msgspec.to_builtins(event)
    for value in built.values():
        if isinstance(value, float):
            assert math.isfinite(value)
    assert len(msgspec.json.encode(built)) < 8_192
    if isinstance(event, Rejected):
        letter = codec.dead_letter(raw, event, 1)
        assert len(letter) < 40_960
        assert json.loads(letter)["dlq_reason"] == event.reason


@given(entries())
@settings(max_examples=600, deadline=None)
def test_decode_answers_whatever_comes(raw: Entry) -> None:
    check_any(raw)


@given(st.dictionaries(st.sampled_from([*TICK, "bid", "ask", "is_buyer_maker", "source"]), VALUES))
@settings(max_examples=500, deadline=None)
def test_hot_path_and_general_reader_agree(changes: dict[str, object]) -> None:
    # only `payload` is tried on the hot path
    raw = as_json(TICK | changes)
    assert decode(entry("market.tick", payload=raw)) == decode(entry("market.tick", data=raw))


@given(st.sampled_from(sorted(codec.READERS)), BODIES)
@settings(max_examples=300, deadline=None)
def test_json_and_msgpack_say_the_same(event_type: str, body: dict[str, object]) -> None:
    body = json.loads(as_json(V2 | body))
    raw = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")  # no lone surrogates
    same = as_msgpack(json.loads(raw))
    assert decode(entry(event_type, payload=raw)) == decode(entry(event_type, payload=same))
