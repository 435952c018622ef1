"""How do price bars become the raw bus entries that production would have written?

Every bar stands for an open tick one millisecond after it began, without volume, and a close tick
at its end with the volume; simulated worlds may have more trades in between. Entries carry
production's envelope and explicit ids equal to event time, in the one defined order: entry id, then
stream rank. Demo and backtest read the same entries, one through Redis, one without.

A signal says the sign of the 15-bar return of closed bars. It is stamped at the open tick of the
bar after and shares that tick's id, so it follows its own tick whatever the other symbols do.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rlv3.errors import DataError
from rlv3.features import MAX_GAP_BARS
from shadow.records import Entry

if TYPE_CHECKING:
    from rlv3.market import Bars

TICK = "market.tick"
SIGNAL = "signal.generated"
STREAMS = (TICK, SIGNAL)
"""What this module writes, in rank order."""

SIGNAL_WINDOW = 15  # bars in the return that a signal reports, and the longest silence between two
SIGNAL_CONFIDENCE = 0.7
HALF_SPREAD = 5e-5  # of simulated trades: buyers pay this much more than the path, sellers less
MS = 1_000


class Print(NamedTuple):
    """One trade print of one symbol, and the signal that its time carries."""

    ms: int
    rank: int
    """Place of the symbol among the bars: orders prints of one millisecond."""
    payload: dict[str, Any]
    signal: dict[str, Any] | None


def entries(
    bars: Sequence[Bars],
    *,
    stream: Callable[[str], str] = str,
    signals: bool = True,
    ticks_per_bar: int = 2,
    seed: int = 0,
) -> Iterator[Entry]:
    """Yield the ticks and signals of several symbols as raw entries, sorted by (id, stream rank).

    The same arguments give the same bytes.

    Args:
        bars: one series per symbol, each with its own times; symbols differ.
        stream: event type -> stream key; the event type itself where there is no bus.
        signals: publish `signal.generated` as well.
        ticks_per_bar: 2 for the open and close tick; more adds seeded trades between them that
            reach the bar's high and low, with volume and side flags.
    Raises:
        DataError: a symbol appears twice.
        ValueError: fewer than two ticks per bar.
    """
    if ticks_per_bar < 2:
        raise ValueError(f"ticks_per_bar must be >= 2, was {ticks_per_bar}")
    symbols = [series.symbol for series in bars]
    if len(set(symbols)) < len(symbols):
        raise DataError(f"expected one series per symbol, found {', '.join(symbols)}")
    keys = {name: stream(name) for name in STREAMS}
    prints = heapq.merge(
        *(
            _prints(series, rank, ticks_per_bar, np.random.default_rng([seed, rank]), signals)
            for rank, series in enumerate(bars)
        ),
        key=lambda p: (p.ms, p.rank),
    )
    last_ms, n = -1, 0
    for p in prints:
        n = n + 1 if p.ms == last_ms else 0
        last_ms = p.ms
        yield _entry(TICK, keys[TICK], f"{p.ms}-{n}", p.payload)
        if p.signal is not None:
            yield _entry(SIGNAL, keys[SIGNAL], f"{p.ms}-{n}", p.signal)


def _prints(
    series: Bars, rank: int, ticks_per_bar: int, rng: np.random.Generator, signals: bool
) -> Iterator[Print]:
    """Yield one symbol's prints in time order."""
    voice = _Voice(series.symbol, series.step_seconds) if signals else None
    step_ms = series.step_seconds * 1_000
    for bar in _rows(series):
        start_ms = bar.end_ms - step_ms
        opened_ms = start_ms + 1
        signal = None if voice is None else voice.speak(opened_ms)
        between = _between(bar, start_ms, ticks_per_bar - 2, rng)
        rest = bar.volume
        yield Print(opened_ms, rank, _tick(series, opened_ms, bar.open), signal)
        for ms, price, side, share in between:
            qty = None if bar.volume is None else share * bar.volume
            rest = None if rest is None or qty is None else rest - qty
            yield Print(ms, rank, _tick(series, ms, price, qty, side), None)
        payload = _tick(series, bar.end_ms, bar.close, rest)
        if bar.spread is not None:
            payload["bid"] = bar.close * (1.0 - bar.spread / 2)
            payload["ask"] = bar.close * (1.0 + bar.spread / 2)
        yield Print(bar.end_ms, rank, payload, None)
        if voice is not None:
            voice.hear(bar.end_ms, bar.close)


class _Row(NamedTuple):
    end_ms: int
    open: float
    high: float
    low: float
    close: float
    volume: float | None
    spread: float | None


def _rows(series: Bars) -> Iterator[_Row]:
    """Yield the bars as plain numbers; NaN volume or spread is not known."""
    n = len(series.end_us)
    unknown = [math.nan] * n
    columns: Iterable[tuple[Any, ...]] = zip(
        series.end_us.tolist(), series.open.tolist(), series.high.tolist(), series.low.tolist(),
        series.close.tolist(),
        unknown if series.volume is None else series.volume.tolist(),
        unknown if series.spread is None else series.spread.tolist(),
        strict=True,
    )  # fmt: skip
    for end_us, open_, high, low, close, volume, spread in columns:
        yield _Row(
            end_us // MS, open_, high, low, close,
            None if math.isnan(volume) else volume,
            None if math.isnan(spread) else spread,
        )  # fmt: skip


def _between(
    bar: _Row, start_ms: int, count: int, rng: np.random.Generator
) -> list[tuple[int, float, int, float]]:
    """Return (ms, price, side, share of the volume) of trades between open and close.

    A noisy walk from open to close inside [low, high]; with two or more trades, one is the high
    and one is the low.
    """
    if count == 0:
        return []
    inner = bar.end_ms - start_ms - 2
    times = np.sort(rng.choice(inner, size=count, replace=False)) + start_ms + 2
    along = np.arange(1, count + 1) / (count + 1)
    walk = bar.open + (bar.close - bar.open) * along
    walk = walk + rng.normal(0.0, (bar.high - bar.low) / 6, count)
    sides = np.where(rng.random(count) < 0.5, -1, 1)
    prices = np.clip(walk * (1.0 + sides * HALF_SPREAD), bar.low, bar.high)
    if count >= 2:
        top, bottom = rng.choice(count, size=2, replace=False)
        prices[top], sides[top] = bar.high, 1
        prices[bottom], sides[bottom] = bar.low, -1
    shares = rng.random(count + 1)
    shares /= shares.sum()
    return list(zip(times.tolist(), prices.tolist(), sides.tolist(), shares.tolist(), strict=False))


def _tick(
    series: Bars, ms: int, price: float, qty: float | None = None, side: int = 0
) -> dict[str, Any]:
    """Return production's tick payload; an unknown quantity or side has no key."""
    payload: dict[str, Any] = {"symbol": series.symbol, "price": price}
    if qty is not None:
        payload["qty"] = max(qty, 0.0)
    if side:
        payload["is_buyer_maker"] = side < 0
    payload["timestamp"] = ms / 1_000
    return payload


class _Voice:
    """The signal publisher of one symbol: hears closed bars, speaks at the next open."""

    def __init__(self, symbol: str, step_seconds: int) -> None:
        self.symbol = symbol
        self.step_ms = step_seconds * 1_000
        self.timeframe = f"{SIGNAL_WINDOW * step_seconds // 60}m"
        self.closes: list[float] = []
        self.last_end_ms = 0
        self.said = 0
        self.silent = 0

    def hear(self, end_ms: int, close: float) -> None:
        """Fold one closed bar."""
        self.closes.append(close)
        del self.closes[: -SIGNAL_WINDOW - 1]
        self.silent += 1
        self.last_end_ms = end_ms

    def _stand_still(self, start_ms: int) -> None:
        """Close the empty bars before `start_ms`; a long silence leaves no usable history."""
        empty = (start_ms - self.last_end_ms) // self.step_ms if self.closes else 0
        if empty > MAX_GAP_BARS:
            self.closes.clear()
        elif empty:
            self.closes += self.closes[-1:] * empty
            del self.closes[: -SIGNAL_WINDOW - 1]
        self.silent += empty

    def speak(self, ms: int) -> dict[str, Any] | None:
        """Return a signal payload when the sign changed or the last one is 15 bars old."""
        self._stand_still(ms - 1)
        if len(self.closes) <= SIGNAL_WINDOW:
            return None
        change = self.closes[-1] - self.closes[0]
        sign = (change > 0.0) - (change < 0.0) or self.said
        if sign == 0 or (sign == self.said and self.silent < SIGNAL_WINDOW):
            return None
        self.said, self.silent = sign, 0
        return {
            "trace_id": f"signal-{self.symbol}-{ms}",
            "timestamp": ms / 1_000,
            "symbol": self.symbol,
            "side": "BUY" if sign > 0 else "SELL",
            "confidence": SIGNAL_CONFIDENCE,
            "timeframe": self.timeframe,
            "model_version": "return_sign_15",
            "metadata": {},
        }


_SOURCES = {TICK: "market-publisher", SIGNAL: "quantum_trader"}


def _entry(event_type: str, stream: str, entry_id: str, payload: dict[str, Any]) -> Entry:
    """Wrap a payload in production's six-field envelope."""
    ms = int(entry_id.partition("-")[0])
    stamp = datetime.fromtimestamp(ms / 1_000, UTC).replace(tzinfo=None)
    name = hashlib.blake2b(f"{event_type}\x00{entry_id}".encode(), digest_size=16).digest()
    fields = {
        b"event_type": event_type.encode(),
        b"payload": json.dumps(payload).encode(),
        b"correlation_id": str(uuid.UUID(bytes=name)).encode(),
        b"timestamp": stamp.isoformat(timespec="microseconds").encode(),
        b"source": _SOURCES[event_type].encode(),
        b"trace_id": b"",
    }
    return Entry(stream, event_type, entry_id, fields)
