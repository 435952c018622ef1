"""Bars become production's entries: ids, order, envelopes, volumes and signals."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest

from rlv3.errors import DataError
from rlv3.market import Bars
from shadow.history import SIGNAL_WINDOW, entries
from shadow.records import Entry

START_MS = 1_700_000_040_000  # a multiple of 60,000 and of 300,000


def series(
    symbol: str,
    closes: Sequence[float],
    *,
    volume: bool = True,
    step: int = 60,
    gap_after: int | None = None,
    gap_bars: int = 0,
) -> Bars:
    n = len(closes)
    index = np.arange(1, n + 1)
    if gap_after is not None:
        index = index + np.where(np.arange(n) >= gap_after, gap_bars, 0)
    close = np.array(closes, dtype=float)
    opened = np.concatenate([close[:1], close[:-1]])
    return Bars(
        symbol=symbol,
        end_us=(START_MS + index * step * 1_000).astype(np.int64) * 1_000,
        open=opened,
        high=np.maximum(opened, close) + 1.0,
        low=np.minimum(opened, close) - 1.0,
        close=close,
        volume=np.arange(1.0, n + 1) if volume else None,
        spread=None,
        step_seconds=step,
    )


def payload(entry: Entry) -> dict:
    return json.loads(entry.fields[b"payload"])


def position(entry: Entry) -> tuple[int, int, int]:
    ms, _, n = entry.entry_id.partition("-")
    return int(ms), int(n), ("market.tick", "signal.generated").index(entry.event_type)


def test_a_bar_is_an_open_tick_without_volume_and_a_close_tick_with_it() -> None:
    opened, closed = entries([series("AAAUSDT", [100.0])], stream="bus:{}".format)
    assert opened.stream == "bus:market.tick"
    assert opened.entry_id == f"{START_MS + 1}-0"
    assert payload(opened) == {
        "symbol": "AAAUSDT",
        "price": 100.0,
        "timestamp": (START_MS + 1) / 1_000,
    }
    assert closed.entry_id == f"{START_MS + 60_000}-0"
    assert payload(closed)["qty"] == 1.0


def test_the_envelope_is_production_s() -> None:
    entry = next(entries([series("AAAUSDT", [100.0])]))
    assert list(entry.fields) == [
        b"event_type", b"payload", b"correlation_id", b"timestamp", b"source", b"trace_id",
    ]  # fmt: skip
    assert entry.fields[b"event_type"] == b"market.tick"
    assert entry.fields[b"timestamp"] == b"2023-11-14T22:14:00.001000"
    assert entry.fields[b"source"] == b"market-publisher"
    assert entry.fields[b"trace_id"] == b""


def test_ties_are_numbered_and_everything_is_sorted() -> None:
    rising = [100.0 + i for i in range(40)]
    falling = [100.0 - i for i in range(40)]
    got = list(entries([series("AAAUSDT", rising), series("BBBUSDT", falling)]))
    assert [e.entry_id for e in got[:2]] == [f"{START_MS + 1}-0", f"{START_MS + 1}-1"]
    order = [position(e) for e in got]
    assert order == sorted(set(order))


def test_a_symbol_given_twice_is_refused() -> None:
    with pytest.raises(DataError, match="one series per symbol"):
        list(entries([series("AAAUSDT", [1.0]), series("AAAUSDT", [1.0])]))


def signals(bars: Bars) -> list[tuple[int, str]]:
    return [
        (position(e)[0], payload(e)["side"])
        for e in entries([bars])
        if e.event_type == "signal.generated"
    ]


def test_a_signal_repeats_every_fifteen_bars_and_when_the_sign_turns() -> None:
    # bars 0..15 give the first 15-bar return, so the first signal comes at the open of bar 16;
    # the next one 15 bars later, at the open of bar 31
    closes = [100.0 + i for i in range(40)]
    first, second = signals(series("AAAUSDT", closes))
    assert first == (START_MS + 16 * 60_000 + 1, "BUY")
    assert second == (START_MS + 31 * 60_000 + 1, "BUY")
    # bar 20 falls below bar 5 (105): known when bar 20 closed, said at the open of bar 21
    closes[20:] = [50.0] * 20
    assert signals(series("AAAUSDT", closes))[1] == (START_MS + 21 * 60_000 + 1, "SELL")


def test_a_signal_knows_closed_bars_only() -> None:
    closes = [100.0 + i for i in range(40)]
    changed = [*closes[:30], *[1.0] * 10]
    cut = START_MS + 30 * 60_000 + 1  # everything said up to the open of bar 30
    early = [s for s in signals(series("AAAUSDT", closes)) if s[0] <= cut]
    assert early == [s for s in signals(series("AAAUSDT", changed)) if s[0] <= cut]


def test_empty_bars_count_as_bars_that_stood_still() -> None:
    # six bars, ten missing: the sixteen closes that a signal needs are there at bar 6's open
    closes = [100.0, 101.0, 102.0, 103.0, 104.0, 105.0, 106.0]
    gapped = series("AAAUSDT", closes, gap_after=6, gap_bars=SIGNAL_WINDOW - 5)
    assert signals(gapped) == [(START_MS + 16 * 60_000 + 1, "BUY")]


def test_a_long_silence_leaves_no_history_to_signal_from() -> None:
    closes = [100.0 + i for i in range(20)]
    assert len(signals(series("AAAUSDT", closes))) == 1
    assert signals(series("AAAUSDT", closes, gap_after=10, gap_bars=61)) == []


def test_trades_between_stay_in_the_bar_reach_its_range_and_share_its_volume() -> None:
    bars = series("AAAUSDT", [100.0, 103.0, 99.0])
    got = [payload(e) for e in entries([bars], ticks_per_bar=10)]
    for i in range(3):
        ticks = got[10 * i : 10 * i + 10]
        prices = [t["price"] for t in ticks]
        assert prices[0] == bars.open[i]
        assert prices[-1] == bars.close[i]
        assert (max(prices), min(prices)) == (bars.high[i], bars.low[i])
        assert sum(t.get("qty", 0.0) for t in ticks) == pytest.approx(bars.volume[i])
        assert {t.get("is_buyer_maker") for t in ticks[1:-1]} == {True, False}
    times = [t["timestamp"] for t in got]
    assert times == sorted(set(times))


def test_unknown_volume_has_no_quantity() -> None:
    got = entries([series("AAAUSDT", [100.0, 101.0], volume=False)], ticks_per_bar=5)
    assert not any("qty" in payload(e) for e in got)


def test_the_same_seed_gives_the_same_bytes_and_another_one_does_not() -> None:
    bars = [series("AAAUSDT", [100.0 + i for i in range(20)])]
    first = list(entries(bars, ticks_per_bar=6, seed=1))
    assert first == list(entries(bars, ticks_per_bar=6, seed=1))
    assert first != list(entries(bars, ticks_per_bar=6, seed=2))


def test_longer_steps_keep_their_own_spacing() -> None:
    got = list(entries([series("AAAUSDT", [100.0, 101.0], step=300)]))
    assert [position(e)[0] - START_MS for e in got] == [1, 300_000, 300_001, 600_000]
