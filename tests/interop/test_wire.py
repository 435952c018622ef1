"""Real bus entries through the running worker, and its output through production's own reading."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgpack
import pytest

from shadow.records import Entry, iso

FIXTURES = Path(__file__).parents[2].parent / "shared" / "fixtures" / "bus_entries.json"
DECIDED = ("market.tick", "signal.generated", "ai.signal_generated")


# -- the shapes, when the fixture file is not beside the checkout ---------------------------------


def shape(
    name: str, event_type: str, verdict: str, fields: dict[str, str], **normalized: Any
) -> dict[str, Any]:
    return {
        "id": name,
        "stream": f"quantum:stream:{event_type}",
        "entry_id": None,
        "fields": fields,
        "expect": {"verdict": verdict, "normalized": normalized},
    }


def envelope(event_type: str, **payload: Any) -> dict[str, str]:
    return {
        "event_type": event_type,
        "payload": json.dumps(payload),
        "trace_id": "",
        "correlation_id": "d16f4330-2dcc-49fb-8197-c31d3ec07d83",
        "timestamp": "2026-02-17T21:39:57.517240",
        "source": "market-publisher",
    }


def flat(**fields: str) -> dict[str, str]:
    return fields


def generated_shapes() -> list[dict[str, Any]]:
    """One entry of every documented shape, with values of our own."""
    s = 1_771_364_397.25
    stamp = "2026-02-17T21:40:20.125000+00:00"
    tick, signal, intent = "market.tick", "ai.signal_generated", "trade.intent"
    return [
        shape("tick_trade", tick, "accept",
              envelope(tick, symbol="SOLUSDT", price=84.94, qty=0.5, is_buyer_maker=False,
                       timestamp=s),
              symbol="SOLUSDT", price=84.94, ts=s),
        shape("tick_mark_price", tick, "accept",
              envelope(tick, symbol="ATOMUSDT", price=2.3, qty=0.0, is_buyer_maker=False,
                       timestamp=s, source="mark_price_fallback"),
              symbol="ATOMUSDT", price=2.3, ts=s),
        shape("tick_payload_only", tick, "accept",
              {"payload": json.dumps({"symbol": "BTCUSDT", "price": 87_612.4, "volume": 0.012,
                                      "timestamp": stamp})},
              symbol="BTCUSDT", price=87_612.4, ts=1_771_364_420.125),
        shape("tick_flat", tick, "accept",
              flat(timestamp="2026-01-19T00:00:00Z", symbol="ETHUSDT", price="3330.51",
                   volume="100", bid="3330.50", ask="3330.52"),
              symbol="ETHUSDT", price=3330.51, ts=1_768_780_800.0),
        shape("klines", "market.klines", "accept",
              envelope("market.klines", symbol="SOLUSDT", interval="1m", open=85.06, high=85.1,
                       low=85.03, close=85.05, volume=153.99, open_time=1_771_364_700_000,
                       close_time=1_771_364_759_999, is_closed=True, timestamp=1_771_364_760.25)),
        shape("ai_signal", signal, "accept",
              envelope(signal, symbol="A2ZUSDT", action="sell", confidence=0.68, consensus=1,
                       model_votes={"SELL": "fallback"}, timestamp=stamp),
              symbol="A2ZUSDT", ts=1_771_364_420.125),
        shape("signal", "signal.generated", "accept",
              envelope("signal.generated", trace_id="test-1", timestamp=s, symbol="BTCUSDT",
                       side="BUY", confidence=0.85, timeframe="1h", metadata={}),
              symbol="BTCUSDT", ts=s, trace_id="test-1"),
        shape("intent", intent, "accept_readonly",
              envelope(intent, symbol="A2ZUSDT", side="SELL", confidence=0.68, timestamp=stamp,
                       entry_price=0.000983, rl_action=None)),
        shape("intent_v2", intent, "accept_readonly",
              envelope(intent, symbol="BTCUSDT", side="SELL", confidence=0.76, timestamp=stamp,
                       entry_price=96_012.5, rl_action="BUY", rl_confidence=0.85,
                       rl_version="v2.0", rl_effect="would_flip")),
        shape("intent_data", intent, "accept_readonly",
              {"data": json.dumps({"symbol": "XRPUSDT", "action": "BUY", "confidence": 0.81,
                                   "timestamp": stamp})}),
        shape("intent_flat", intent, "accept_readonly",
              flat(symbol="NEARUSDT", side="LONG", action="BUY", confidence="0.72",
                   timestamp="1771364563")),
        shape("decision_made", "ai.decision.made", "accept",
              envelope("ai.decision.made", symbol="A2ZUSDT", side="sell", confidence=0.68,
                       entry_price=0.000983, quantity=50.0, timestamp=stamp)),
        shape("trade_closed", "trade.closed", "accept",
              flat(event_type="trade.closed", timestamp="2026-02-17T21:26:35.884213",
                   symbol="ALICEUSDT", side="SHORT", entry_price="0.110", exit_price="0.113",
                   pnl_percent="-3.03", pnl_usd="-6.03", reason="stop")),
        shape("sizing", "sizing.decided", "accept_v2_sizing",
              envelope("sizing.decided", symbol="BTCUSDT", position_size_usd=200.0, leverage=12.0,
                       confidence=0.72, timestamp=stamp)),
        shape("strategy", "strategy.selected", "accept_v2_meta",
              envelope("strategy.selected", symbol="BTCUSDT", strategy_id="momentum",
                       strategy_name="Momentum", regime="high_vol_trending", confidence=0.6,
                       timestamp=stamp)),
        shape("exchange", "exchange.normalized", "accept_if_enabled",
              flat(symbol="ALICEUSDT", timestamp="1771308360", avg_price="0.113",
                   bybit_price="None")),
        shape("priming", tick, "ignore_ack", {"init": "1"}),
        shape("truncated", tick, "dead_letter",
              {**envelope(tick), "payload": '{"symbol": "BTCUSDT", "price": 879'}),
        shape("nan_price", tick, "dead_letter",
              {**envelope(tick),
               "payload": '{"symbol": "BTCUSDT", "price": NaN, "timestamp": 1771364400.0}'}),
        shape("zero_price", tick, "dead_letter",
              envelope(tick, symbol="BTCUSDT", price=0.0, qty=0.0, timestamp=s)),
        shape("no_symbol", tick, "dead_letter",
              {"payload": json.dumps({"price": 101.0, "volume": 1.0, "timestamp": s})}),
        shape("stale_replay", tick, "ignore_ack",
              {"payload": json.dumps({"symbol": "BTCUSDT", "price": 42_500.0, "volume": 100.0,
                                      "timestamp": "2025-12-16T00:00:00+00:00"})}),
    ]  # fmt: skip


def documented() -> list[dict[str, Any]]:
    if FIXTURES.is_file():
        return json.loads(FIXTURES.read_text())["fixtures"]
    return generated_shapes()


# -- every documented entry -----------------------------------------------------------------------


def own_time_ms(fields: Mapping[str, str]) -> int | None:
    """Return the time that an entry states about itself, None where it states none."""
    try:
        body = json.loads(fields.get("payload") or fields.get("data") or "null") or fields
    except ValueError:
        body = fields
    stamp = body.get("timestamp") or fields.get("timestamp")
    if stamp is None:
        return None
    try:
        return int(float(stamp) * 1_000)
    except ValueError:
        parsed = datetime.fromisoformat(stamp)
        aware = parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)
        return (aware - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)


def as_entries(fixtures: list[dict[str, Any]], now_ms: int) -> dict[str, Entry]:
    """Return fixture id -> entry, in id order: own id, else own time, else last of all."""
    keyed: list[tuple[int, int, dict[str, Any]]] = []
    for place, fixture in enumerate(fixtures):
        if fixture["entry_id"] is not None:
            ms, seq = map(int, fixture["entry_id"].split("-"))
        else:
            own = own_time_ms(fixture["fields"])
            ms, seq = (now_ms - 1 if own is None else own), 1_000 + place
        if fixture["id"] == "stale_replay":
            ms = now_ms
        keyed.append((ms, seq, fixture))
    keyed.sort(key=lambda item: item[:2])
    return {
        fixture["id"]: Entry(
            fixture["stream"],
            fixture["stream"].rpartition(":")[2],
            f"{ms}-{seq}",
            {name.encode(): value.encode() for name, value in fixture["fields"].items()},
        )
        for ms, seq, fixture in keyed
    }


def outcome(fixture: dict[str, Any]) -> str:
    """Return the counter that an entry must appear under."""
    verdict = fixture["expect"]["verdict"]
    if verdict == "dead_letter":
        return "dead_letter"
    if verdict == "ignore_ack":
        return "stale" if fixture["id"] == "stale_replay" else "priming"
    decided = fixture["stream"].rpartition(":")[2] in DECIDED
    return "decided" if decided and verdict == "accept" else "consumed"


@pytest.mark.parametrize("shapes", [documented, generated_shapes])
def test_every_documented_entry_gets_its_verdict(
    shapes: Callable[[], list[dict[str, Any]]], bus: Any, start: Any
) -> None:
    fixtures = shapes()
    seconds, _ = bus.link.time()
    entries = as_entries(fixtures, seconds * 1_000)
    bus.add(entries.values())
    worker = start(
        "run", "--redis-url", bus.url, "--inputs", "all", "--start", "oldest",
        "--conflate-after", "off",
    )  # fmt: skip
    counts = bus.wait_for_counts(len(fixtures))
    assert worker.stop() == 0, worker.said()

    assert counts == Counter(
        f"{fixture['stream'].rpartition(':')[2]}:{outcome(fixture)}" for fixture in fixtures
    )
    decisions = {
        (d["source_stream"], d["source_entry_id"]): d for d in bus.payloads("rl_v3.decision")
    }
    dead = {d["dlq_source_id"]: d for d in bus.dead_letters("market.tick")}
    for fixture in fixtures:
        entry = entries[fixture["id"]]
        decision = decisions.pop((entry.stream, entry.entry_id), None)
        assert (decision is not None) == (outcome(fixture) == "decided"), fixture["id"]
        if decision is not None:
            expected = fixture["expect"]["normalized"]
            assert decision["symbol"] == expected["symbol"]
            assert decision["event_ts"] == iso(round(expected["ts"] * 1e6))
            if "price" in expected:
                assert decision["raw_obs"]["price"] == expected["price"]
            if expected.get("trace_id"):
                assert decision["source_trace_id"] == expected["trace_id"]
        if outcome(fixture) == "dead_letter":
            letter = dead.pop(entry.entry_id)
            assert letter["dlq_reason"]
            assert letter["dlq_source_stream"] == entry.stream
    assert (decisions, dead) == ({}, {})


# -- production's reader --------------------------------------------------------------------------


def handle_like_production(entry: dict[str, str]) -> Any:
    """Return what a handler of EventBus v2 receives from a client that decodes replies to text.

    Written from the bus's documentation alone: six string fields, and the handler gets the parsed
    payload.
    """
    assert set(entry) == {
        "event_type", "payload", "trace_id", "correlation_id", "timestamp", "source",
    }  # fmt: skip
    assert datetime.fromisoformat(entry["timestamp"]).tzinfo is None
    return json.loads(entry["payload"])


def test_production_s_reader_decodes_every_decision(
    bus: Any, start: Any, bus_entry: Callable[..., Entry]
) -> None:
    start_ms = (int(bus.link.time()[0]) // 60 - 60) * 60_000
    bus.add(
        bus_entry(
            "market.tick",
            f"{start_ms + i * 20_000}-0",
            {"symbol": "BTCUSDT", "price": 100.0 + i % 7, "timestamp": start_ms / 1e3 + i * 20},
            f"c-{i}",
        )
        for i in range(150)
    )
    worker = start("run", "--redis-url", bus.url, "--start", "oldest", "--conflate-after", "off")
    bus.wait_for_counts(150)
    assert worker.stop() == 0, worker.said()

    types = {
        "symbol": str, "timestamp": str, "action": int, "confidence": float, "value": float,
        "source": str, "shadow_mode": bool, "trace_id": str, "raw_obs": dict,
    }  # fmt: skip
    entries = bus.link.xrange(bus.keys.decisions)
    assert len(entries) == 150
    for i, (_, fields) in enumerate(entries):
        envelope = {name.decode(): value.decode() for name, value in fields.items()}
        payload = handle_like_production(envelope)
        assert {name: type(payload[name]) for name in types} == types
        assert list(payload)[:9] == list(types)
        assert list(payload["raw_obs"]) == ["price", "volatility", "prediction", "position_size"]
        assert payload["source"] == "RL_V3_PPO"
        assert payload["shadow_mode"] is True
        assert envelope["event_type"] == "rl_v3.decision"
        assert envelope["source"] == "rl-v3-shadow"
        assert envelope["correlation_id"] == f"c-{i}"
        assert envelope["trace_id"] == payload["decision_id"]


# -- bad input ------------------------------------------------------------------------------------


def nested(depth: int) -> bytes:
    """Return msgpack that is `depth` arrays deep."""
    return b"\x91" * depth + b"\xc0"


BAD: dict[str, bytes] = {
    "nothing": b"",
    "not json": b"{price: 1}",
    "not utf-8": b'{"symbol": "\xff\xfe", "price": 1.0}',
    "a list": b"[1, 2]",
    "a number": b"7",
    "a price of words": b'{"symbol": "BTCUSDT", "price": "cheap"}',
    "no price": b'{"symbol": "BTCUSDT"}',
    "infinite price": b'{"symbol": "BTCUSDT", "price": Infinity}',
    "overflowing price": b'{"symbol": "BTCUSDT", "price": 1e999}',
    "negative price": b'{"symbol": "BTCUSDT", "price": -1.0}',
    "a boolean price": b'{"symbol": "BTCUSDT", "price": true}',
    "an object as symbol": b'{"symbol": {"a": 1}, "price": 1.0}',
    "5 MB of JSON": b'{"symbol": "BTCUSDT", "price": 1.0, "note": "' + b"x" * 5_000_000 + b'"}',
    "5 MB of noise": b"\x00" * 5_000_000,
    "deep JSON": b'{"symbol": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep msgpack": nested(100_000),
    "msgpack that promises more": b"\xdd\xff\xff\xff\xff",
    "msgpack with a broken end": msgpack.packb({"symbol": "BTCUSDT", "price": 1.0})[:-1],
}


def test_bad_input_becomes_one_dead_letter_each_and_harms_no_neighbour(
    bus: Any, start: Any, bus_entry: Callable[..., Entry]
) -> None:
    start_ms = (int(bus.link.time()[0]) - 60) * 1_000
    ticks, bad = [], {}
    for i, (name, payload) in enumerate(BAD.items()):
        bad[name] = bus_entry("market.tick", f"{start_ms + 2 * i}-0", payload)
        tick = {"symbol": "BTCUSDT", "price": 100.0 + i, "timestamp": (start_ms + 2 * i + 1) / 1e3}
        ticks.append(bus_entry("market.tick", f"{start_ms + 2 * i + 1}-0", tick))
    for pair in zip(bad.values(), ticks, strict=True):
        bus.add(pair)
    worker = start("run", "--redis-url", bus.url, "--start", "oldest", "--conflate-after", "off")
    counts = bus.wait_for_counts(2 * len(BAD))
    assert worker.stop() == 0, worker.said()

    assert counts == {"market.tick:dead_letter": len(BAD), "market.tick:decided": len(BAD)}
    letters = bus.dead_letters("market.tick")
    assert [d["dlq_source_id"] for d in letters] == [e.entry_id for e in bad.values()]
    for letter in letters:
        assert letter["dlq_reason"]
        assert letter["dlq_error"]
        assert sum(len(k) + len(v.encode()) for k, v in letter["original"].items()) <= 3 * 4096
    prices = [d["raw_obs"]["price"] for d in bus.payloads("rl_v3.decision")]
    assert prices == [100.0 + i for i in range(len(BAD))]
