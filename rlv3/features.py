"""The 64 features: one table, one streaming fold, used by training and serving alike.

Rules of this module
  * Bars are (b - step, b]: a tick stamped exactly b belongs to the bar that ends at b.
  * Everything is a pure function of ticks already folded; there is no clock and no randomness.
  * A feature is computed "as if the open bar closed now" (`MarketState.features`). When the bar
    really closes, the same formula gives the closed-bar value. There is no second implementation:
    the bulk path (`feature_matrix`) calls the same `MarketState` with bars instead of ticks.
  * A value that is not known is marked in the missing-mask; it is never silently a default.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlv3.events import REGIMES

OBS_DIM = 64
FEATURE_SET = "seed"
STEP_SECONDS = 60

RETURN_WINDOW = 15  # returns in volatility, trend and autocorrelation
RSI_WINDOW = 14
EMA_FAST, EMA_SLOW = 12, 26
BREAKOUT_WINDOW = 30
VOLUME_WINDOW = 20
VOLUME_MIN_KNOWN = 10
TREND_RATIO = 0.5  # efficiency ratio from which a market is called trending
REVERSION_RHO = -0.2  # lag-1 autocorrelation below which it is called mean reverting
WARM_BARS = BREAKOUT_WINDOW + 1  # the regime needs that many before the bar itself
MAX_GAP_BARS = 60  # a longer silence leaves no usable history: the indicators start anew
CLIP = 5.0

US = 1_000_000
DAY_US = 86_400 * US


class Feature(NamedTuple):
    """One row of the feature table."""

    name: str
    unit: str
    formula: str
    source: str
    """bar, quote, clock or account; the first three are market features and are normalised."""
    unknown: float
    """Raw value written where the feature is missing."""
    history: int
    """Closed bars needed before the current one."""


FEATURES: tuple[Feature, ...] = (
    Feature("price_change_1m", "fraction", "C[t]/C[t-1] - 1", "bar", 0.0, 1),
    Feature("price_change_5m", "fraction", "C[t]/C[t-5] - 1", "bar", 0.0, 5),
    Feature("price_change_15m", "fraction", "C[t]/C[t-15] - 1", "bar", 0.0, 15),
    Feature("volatility", "fraction", "population std of the last 15 returns", "bar", 0.02, 15),
    Feature("rsi", "0..1", "Wilder RSI(14) of closes / 100", "bar", 0.5, 14),
    Feature("macd", "fraction of price", "(EMA12 - EMA26) of closes / C[t]", "bar", 0.0, 26),
    Feature("position_size", "fraction of equity", "|quantity| * mark / equity", "account", 0.0, 0),
    Feature("position_side", "-1, 0, +1", "sign of the quantity", "account", 0.0, 0),
    Feature("equity_ratio", "ratio", "equity / balance", "account", 1.0, 0),
    Feature("pnl_ratio", "fraction", "equity / balance - 1", "account", 0.0, 0),
    Feature("regime_trend", "0, 1", "one-hot: |efficiency ratio| >= 0.5", "regime", 0.0, 30),
    Feature("regime_range", "0, 1", "one-hot: none of the others", "regime", 0.0, 30),
    Feature(
        "regime_breakout", "0, 1", "one-hot: C[t] beyond the last 30 closes", "regime", 0.0, 30
    ),
    Feature("regime_mean_reversion", "0, 1", "one-hot: lag-1 rho <= -0.2", "regime", 0.0, 30),
    Feature("trend_strength", "-1..1", "(C[t] - C[t-15]) / sum |dC|", "bar", 0.0, 15),
    Feature("volume_ratio", "ratio", "V[t] / mean of the last 20 known", "bar", 1.0, 10),
    Feature("spread", "fraction of mid", "(ask - bid) / mid of the last quote", "quote", 0.001, 0),
    Feature("time_of_day", "0..1", "UTC seconds since midnight / 86400", "clock", 0.5, 0),
)

N_FEATURES = len(FEATURES)
MARKET = tuple(i for i, f in enumerate(FEATURES) if f.source in ("bar", "quote", "clock"))
"""Indices that are normalised with frozen training statistics."""
UNKNOWN = tuple(f.unknown for f in FEATURES)
_FAST, _SLOW = 2 / (EMA_FAST + 1), 2 / (EMA_SLOW + 1)
_REGIME = 10
_REGIME_BITS = 0b1111 << _REGIME
_BIT = tuple(1 << i for i in range(N_FEATURES))


def feature_digest() -> str:
    """Return the sha256 of the feature table, its parameters and its normalisation rule.

    Two programs with the same digest compute the same observation from the same ticks.
    """
    facts = {
        "set": FEATURE_SET,
        "dim": OBS_DIM,
        "rows": [list(f) for f in FEATURES],
        "parameters": [
            RETURN_WINDOW, RSI_WINDOW, EMA_FAST, EMA_SLOW, BREAKOUT_WINDOW, VOLUME_WINDOW,
            VOLUME_MIN_KNOWN, TREND_RATIO, REVERSION_RHO, WARM_BARS, MAX_GAP_BARS,
        ],
        "normalised": list(MARKET),
        "clip": CLIP,
    }  # fmt: skip
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class ClosedBar(NamedTuple):
    """A bar that just closed, and what followed until the tick that closed it."""

    end_us: int
    open: float
    high: float
    low: float
    close: float
    volume: float | None
    empty_after: int
    """Bars without a tick between this one and the tick that closed it."""
    restarted: bool
    """The silence was longer than MAX_GAP_BARS: the symbol is cold again."""


class MarketState:
    """The market of one symbol, folded tick by tick in O(1).

    `n_bars` counts closed bars since the last cold start; the symbol is warm from `WARM_BARS` on.
    """

    __slots__ = (
        "avg_gain", "avg_loss", "bar_end_us", "bar_us", "close", "closed_missing", "closed_raw",
        "closes", "ema_fast", "ema_slow", "high", "last_price", "last_side", "last_ts_us",
        "low", "n_bars", "open", "quote_spread", "side_n", "side_spread", "volume",
        "volumes", "_hi", "_lo", "_path", "_r_last", "_sum_r", "_sum_r2", "_sum_rr", "_vol_mean",
    )  # fmt: skip

    def __init__(self, step_seconds: int = STEP_SECONDS) -> None:
        self.bar_us = step_seconds * US
        self.bar_end_us: int | None = None  # end of the open bar
        self.open = self.high = self.low = self.close = 0.0
        self.volume: float | None = None
        self.last_ts_us = -1
        self.last_price = 0.0
        self.last_side = 0
        self.side_spread = 0.0  # running estimate of the half-spread from the trade side flag
        self.side_n = 0
        self.quote_spread: float | None = None
        self._cold_start()

    def _cold_start(self) -> None:
        self.n_bars = 0
        self.closes: list[float] = []
        self.volumes: list[float | None] = []
        self.avg_gain = self.avg_loss = 0.0
        self.ema_fast = self.ema_slow = 0.0
        self.closed_raw: list[float] = list(UNKNOWN)
        self.closed_missing: int = ~0 & ((1 << N_FEATURES) - 1) & ~(0b1111 << 6)
        self._derive()

    @property
    def warm(self) -> bool:
        """True once every bar feature has the history it needs."""
        return self.n_bars >= WARM_BARS

    @property
    def half_spread(self) -> float:
        """Half of the bid-ask spread as a fraction: quotes, else trade sides, else 1 bp."""
        if self.quote_spread is not None:
            return self.quote_spread / 2
        if self.side_n >= 20:
            return self.side_spread
        return 1e-4

    # -- folding ---------------------------------------------------------------------------------

    def on_tick(
        self,
        ts_us: int,
        price: float,
        volume: float | None = None,
        bid: float | None = None,
        ask: float | None = None,
        side: int = 0,
    ) -> ClosedBar | None:
        """Fold one tick; return the bar that it closed, if it is the first past a boundary.

        The caller has already refused late and duplicate ticks. The tick itself is in the new bar,
        so `closed_raw` describes closed bars only.
        """
        closed = None
        end = self.bar_end_us
        if end is None or ts_us > end:
            new_end = -(-ts_us // self.bar_us) * self.bar_us
            if end is not None:
                closed = self._close(new_end)
            self.bar_end_us = new_end
            self.open = self.high = self.low = price
            self.volume = volume
        else:
            if price > self.high:
                self.high = price
            elif price < self.low:
                self.low = price
            if volume is not None:
                self.volume = volume if self.volume is None else self.volume + volume
        self.close = price
        if bid is not None and ask is not None and 0.0 < bid < ask:
            self.quote_spread = (ask - bid) / ((ask + bid) / 2)
        if side:
            if self.last_side == -side:
                half = side * (price - self.last_price) / (price + self.last_price)
                half = min(max(half, 0.0), 2e-3)
                self.side_n += 1
                self.side_spread += (half - self.side_spread) * max(0.05, 1 / self.side_n)
            self.last_side = side
            self.last_price = price
        self.last_ts_us = ts_us
        return closed

    def _close(self, new_end: int) -> ClosedBar:
        """Close the open bar and the empty ones before the bar that ends at `new_end`."""
        end = self.bar_end_us
        assert end is not None
        empty = (new_end - end) // self.bar_us - 1
        restarted = empty > MAX_GAP_BARS
        bar = ClosedBar(
            end, self.open, self.high, self.low, self.close, self.volume, empty, restarted
        )
        if restarted:
            self._cold_start()
            self.quote_spread = None
            return bar
        self.append(self.close, self.volume, end)
        for k in range(1, empty + 1):
            # nobody traded: the price stands and the volume is a known zero, if volume is known
            quiet = None if bar.volume is None else 0.0
            self.append(self.close, quiet, end + k * self.bar_us)
        return bar

    def append(self, close: float, volume: float | None, end_us: int) -> None:
        """Fold one closed bar: fix its features, then move every window on."""
        self.closed_raw, self.closed_missing = self.features(close, volume, end_us)
        n = self.n_bars
        if n:
            change = close - self.closes[-1]
            k = min(n, RSI_WINDOW)
            self.avg_gain += (max(change, 0.0) - self.avg_gain) / k
            self.avg_loss += (max(-change, 0.0) - self.avg_loss) / k
            self.ema_fast += (close - self.ema_fast) * _FAST
            self.ema_slow += (close - self.ema_slow) * _SLOW
        else:
            self.ema_fast = self.ema_slow = close
        self.closes.append(close)
        if len(self.closes) > BREAKOUT_WINDOW:
            del self.closes[0]
        self.volumes.append(volume)
        if len(self.volumes) > VOLUME_WINDOW:
            del self.volumes[0]
        self.n_bars = n + 1
        self._derive()

    def _derive(self) -> None:
        """Sum over the closed windows, so that `features` is O(1); anew, so that nothing drifts."""
        c = self.closes[-RETURN_WINDOW:]
        returns = [b / a - 1.0 for a, b in itertools.pairwise(c)]
        self._sum_r = math.fsum(returns)
        self._sum_r2 = math.fsum(r * r for r in returns)
        self._sum_rr = math.fsum(a * b for a, b in itertools.pairwise(returns))
        self._r_last = returns[-1] if returns else 0.0
        self._path = math.fsum(abs(b - a) for a, b in itertools.pairwise(c))
        self._hi = max(self.closes, default=0.0)
        self._lo = min(self.closes, default=0.0)
        known = [v for v in self.volumes if v is not None]
        mean = math.fsum(known) / len(known) if len(known) >= VOLUME_MIN_KNOWN else 0.0
        self._vol_mean = mean

    # -- reading ---------------------------------------------------------------------------------

    def features(self, price: float, volume: float | None, ts_us: int) -> tuple[list[float], int]:
        """Return the raw features if the open bar closed now, and the missing-mask.

        Args:
            price: the close of the bar taken as closed.
            volume: its volume, None if not known.
            ts_us: bar end for a closed bar, else the time of the event.
        Returns:
            18 raw values, the account's four at their flat defaults, and a mask whose bit i says
            that feature i is missing (its raw value is then the table's `unknown`).
        """
        n = self.n_bars
        c = self.closes
        raw = list(UNKNOWN)
        missing = 0
        raw[17] = (ts_us % DAY_US) / DAY_US
        if self.quote_spread is None:
            missing |= 1 << 16
        else:
            raw[16] = self.quote_spread
        if volume is None or self._vol_mean <= 0.0:
            missing |= 1 << 15
        else:
            raw[15] = volume / self._vol_mean
        if n == 0:
            return raw, missing | 0b111111 | _REGIME_BITS | 1 << 14
        last = c[-1]
        r = price / last - 1.0
        raw[0] = r
        if n >= 5:
            raw[1] = price / c[-5] - 1.0
        else:
            missing |= 1 << 1
        change = price - last
        if n >= RSI_WINDOW:
            up, down = (change, 0.0) if change > 0.0 else (0.0, -change)
            gain = self.avg_gain + (up - self.avg_gain) / RSI_WINDOW
            loss = self.avg_loss + (down - self.avg_loss) / RSI_WINDOW
            both = gain + loss
            raw[4] = gain / both if both > 0.0 else 0.5
        else:
            missing |= 1 << 4
        if n >= RETURN_WINDOW:
            base = c[-RETURN_WINDOW]
            raw[2] = price / base - 1.0
            mean = (self._sum_r + r) / RETURN_WINDOW
            second = self._sum_r2 + r * r
            variance = second / RETURN_WINDOW - mean * mean
            raw[3] = math.sqrt(variance) if variance > 0.0 else 0.0
            path = self._path + abs(change)
            trend = (price - base) / path if path > 0.0 else 0.0
            raw[14] = trend
            if n >= BREAKOUT_WINDOW:
                if price > self._hi or price < self._lo:
                    raw[12] = 1.0
                elif abs(trend) >= TREND_RATIO:
                    raw[10] = 1.0
                elif second > 0.0 and self._sum_rr + r * self._r_last <= REVERSION_RHO * second:
                    raw[13] = 1.0
                else:
                    raw[11] = 1.0
            else:
                missing |= _REGIME_BITS
        else:
            missing |= 0b1100 | _REGIME_BITS | 1 << 14
        if n >= EMA_SLOW:
            fast = self.ema_fast + (price - self.ema_fast) * _FAST
            slow = self.ema_slow + (price - self.ema_slow) * _SLOW
            raw[5] = (fast - slow) / price
        else:
            missing |= 1 << 5
        return raw, missing

    def open_features(self, ts_us: int) -> tuple[list[float], int]:
        """Return the features as if the open bar closed at `ts_us` (advisory decisions)."""
        if self.bar_end_us is None:
            raw = list(UNKNOWN)
            raw[17] = (ts_us % DAY_US) / DAY_US
            return raw, self.closed_missing & ~(1 << 17)
        return self.features(self.close, self.volume, ts_us)

    # -- bytes -----------------------------------------------------------------------------------

    def dump_open(self) -> tuple[Any, ...]:
        """Return what changes with every tick, as plain values."""
        return (
            self.bar_end_us, self.open, self.high, self.low, self.close, self.volume,
            self.last_ts_us, self.last_price, self.last_side, self.side_spread, self.side_n,
            self.quote_spread,
        )  # fmt: skip

    def dump_closed(self) -> tuple[Any, ...]:
        """Return what changes when a bar closes, as plain values."""
        return (
            self.n_bars, self.closes, self.volumes, self.avg_gain, self.avg_loss,
            self.ema_fast, self.ema_slow, self.closed_raw, self.closed_missing,
        )  # fmt: skip

    def load(self, opened: Sequence[Any], closed: Sequence[Any]) -> None:
        """Restore both dumps; afterwards the state continues as the original would."""
        (
            self.bar_end_us, self.open, self.high, self.low, self.close, self.volume,
            self.last_ts_us, self.last_price, self.last_side, self.side_spread, self.side_n,
            self.quote_spread,
        ) = opened  # fmt: skip
        self.n_bars = closed[0]
        self.closes, self.volumes = list(closed[1]), list(closed[2])
        self.avg_gain, self.avg_loss, self.ema_fast, self.ema_slow = closed[3:7]
        self.closed_raw, self.closed_missing = list(closed[7]), closed[8]
        self._derive()


def regime_of(raw: Sequence[float]) -> str | None:
    """Return the name of the one-hot regime in a raw feature row, None if unknown."""
    for i, name in enumerate(REGIMES):
        if raw[_REGIME + i]:
            return name
    return None


def feature_matrix(
    end_us: NDArray[np.int64],
    close: NDArray[np.float64],
    volume: NDArray[np.float64] | None = None,
    spread: NDArray[np.float64] | None = None,
    step_seconds: int = STEP_SECONDS,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Compute the features of a bar series: row t is what a policy sees after bar t closed.

    Args:
        end_us: int64[T], strictly increasing bar ends; a missing row is a gap, not an error.
        volume: float64[T] or None when unknown; NaN marks single unknown values.
        spread: float64[T] quoted spread as a fraction of mid, NaN where unknown.
    Returns:
        float64[T, 18] raw values and int64[T] missing-masks.
    """
    n = len(end_us)
    rows = np.empty((n, N_FEATURES))
    masks = np.empty(n, dtype=np.int64)
    state = MarketState(step_seconds)
    bar_us = state.bar_us
    for t in range(n):
        state.bar_end_us = int(end_us[t])
        state.close = float(close[t])
        value = math.nan if volume is None else float(volume[t])
        state.volume = None if math.isnan(value) else value
        if spread is not None and not math.isnan(spread[t]):
            state.quote_spread = float(spread[t])
        following = int(end_us[t + 1]) if t + 1 < n else int(end_us[t]) + bar_us
        state._close(following)
        rows[t] = state.closed_raw
        masks[t] = state.closed_missing
    return rows, masks


class Normaliser(NamedTuple):
    """Frozen mean and scale of the market features, from the training split."""

    mean: NDArray[np.float64]  # [18], 0 for features that are left as they are
    scale: NDArray[np.float64]  # [18], 1 for features that are left as they are

    @classmethod
    def identity(cls) -> Normaliser:
        """Return the normaliser that only clips."""
        return cls(np.zeros(N_FEATURES), np.ones(N_FEATURES))

    @classmethod
    def fit(cls, raw: NDArray[np.float64], missing: NDArray[np.int64]) -> Normaliser:
        """Estimate mean and standard deviation per market feature over rows that have it."""
        mean, scale = np.zeros(N_FEATURES), np.ones(N_FEATURES)
        for i in MARKET:
            values = raw[(missing >> i) & 1 == 0, i]
            if len(values) == 0:
                mean[i] = UNKNOWN[i]
                continue
            mean[i] = values.mean()
            std = values.std()
            scale[i] = std if std > 1e-12 else 1.0
        return cls(mean, scale)

    def apply(
        self, raw: NDArray[np.float64] | Sequence[Sequence[float]], missing: Sequence[int]
    ) -> NDArray[np.float32]:
        """Return observations float32[N, 64]: market features scaled and clipped, missing ones 0.

        Every row is computed alone, so a row does not depend on its neighbours.
        """
        if isinstance(raw, np.ndarray):
            scaled = raw.astype(np.float64)
        else:  # three times as quick as numpy's own reading of lists
            packed = b"".join([_pack_row(*row) for row in raw])
            scaled = np.frombuffer(bytearray(packed)).reshape(-1, N_FEATURES)
        obs = np.zeros((len(scaled), OBS_DIM), dtype=np.float32)
        scaled -= self.mean
        scaled /= self.scale
        np.maximum(scaled, -_BOUND, out=scaled)
        np.minimum(scaled, _BOUND, out=scaled)
        bits = np.asarray(missing, dtype=np.int64)
        if bits.any():
            scaled[bits[:, None] & _MARKET_BITS != 0] = 0.0
        obs[:, :N_FEATURES] = scaled
        return obs


_pack_row = struct.Struct(f"{N_FEATURES}d").pack
_BOUND = np.array([CLIP if i in MARKET else math.inf for i in range(N_FEATURES)])
_MARKET_BITS = np.array([1 << i if i in MARKET else 0 for i in range(N_FEATURES)])


# -- the seed's dictionary interface ---------------------------------------------------------------

_KEYS: tuple[tuple[int, tuple[tuple[str, float], ...]], ...] = (
    (0, (("price_change_1m", 1.0),)),
    (1, (("price_change_5m", 1.0),)),
    (2, (("price_change_15m", 1.0),)),
    (3, (("volatility", 1.0),)),
    (4, (("rsi", 0.01),)),
    (6, (("position_size", 1.0),)),
    (7, (("position_side", 1.0),)),
    (14, (("trend_strength", 1.0),)),
    (15, (("volume_ratio", 1.0),)),
    (16, (("spread", 1.0), ("bid_ask_spread", 1.0))),
    (17, (("time_of_day", 1.0), ("hour_of_day", 1 / 24))),
)


def _number(obs: Mapping[str, Any], key: str) -> float | None:
    value = obs.get(key)
    if value is None or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def feature_row(obs: Mapping[str, Any]) -> tuple[list[float], int]:
    """Turn an observation dictionary into the 18 raw features and the missing-mask.

    Keys are the seed's; `spread` or `bid_ask_spread`, `time_of_day` or `hour_of_day` (in hours).
    `rsi` is 0..100; `macd` is in price units and needs `price`. What is absent, None, not a number
    or not finite is missing, never an error. A regime is a name of `REGIMES` or its index; an
    unknown one is all zeros.
    """
    raw = list(UNKNOWN)
    missing = 0
    for index, names in _KEYS:
        for key, factor in names:
            value = _number(obs, key)
            if value is not None:
                raw[index] = value * factor
                break
        else:
            missing |= _BIT[index]
    macd, price = _number(obs, "macd"), _number(obs, "price")
    if macd is not None and (macd == 0.0 or (price is not None and price > 0.0)):
        raw[5] = 0.0 if macd == 0.0 or price is None else macd / price
    else:
        missing |= _BIT[5]
    balance, equity = _number(obs, "balance"), _number(obs, "equity")
    if balance is not None and equity is not None and balance > 0.0:
        raw[8] = equity / balance
        raw[9] = raw[8] - 1.0
    else:
        missing |= _BIT[8] | _BIT[9]
    regime = obs.get("regime")
    index = -1
    if isinstance(regime, str) and regime.upper() in REGIMES:
        index = REGIMES.index(regime.upper())
    elif isinstance(regime, int) and not isinstance(regime, bool) and 0 <= regime < len(REGIMES):
        index = regime
    if index >= 0:
        raw[_REGIME + index] = 1.0
    else:
        missing |= _REGIME_BITS
    return raw, missing


def build_feature_vector(obs_dict: Mapping[str, Any]) -> NDArray[np.float32]:
    """Return the raw feature vector float32[64] of an observation dictionary (see `feature_row`).

    Missing features carry the table's `unknown` value; indices 18 to 63 are zero.
    """
    vector = np.zeros(OBS_DIM, dtype=np.float32)
    vector[:N_FEATURES] = feature_row(obs_dict)[0]
    return vector
