"""Features: hand-worked numbers, an independent oracle, the fold of ticks, no look-ahead."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import sliding_window_view

from rlv3.features import (
    FEATURES,
    MARKET,
    MAX_GAP_BARS,
    N_FEATURES,
    OBS_DIM,
    UNKNOWN,
    WARM_BARS,
    MarketState,
    Normaliser,
    build_feature_vector,
    feature_digest,
    feature_matrix,
    feature_row,
    regime_of,
)
from rlv3.market import Bars

MINUTE = 60_000_000
DAY = 86_400_000_000
INDEX = {feature.name: i for i, feature in enumerate(FEATURES)}
ACCOUNT_BITS = 0b1111 << 6


def matrix(bars: Bars) -> tuple[np.ndarray, np.ndarray]:
    return feature_matrix(bars.end_us, bars.close, bars.volume, bars.spread, bars.step_seconds)


def of_closes(
    closes: list[float], volume: list[float] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    close = np.array(closes, dtype=float)
    end = np.arange(1, len(close) + 1, dtype=np.int64) * MINUTE
    return feature_matrix(end, close, None if volume is None else np.array(volume, float))


# -- hand-worked numbers ---------------------------------------------------------------------------


def test_table_has_the_seeds_order() -> None:
    assert [f.name for f in FEATURES] == [
        "price_change_1m", "price_change_5m", "price_change_15m", "volatility", "rsi", "macd",
        "position_size", "position_side", "equity_ratio", "pnl_ratio", "regime_trend",
        "regime_range", "regime_breakout", "regime_mean_reversion", "trend_strength",
        "volume_ratio", "spread", "time_of_day",
    ]  # fmt: skip
    assert (N_FEATURES, OBS_DIM) == (18, 64)
    assert MARKET == (0, 1, 2, 3, 4, 5, 14, 15, 16, 17)
    assert len(feature_digest()) == 64


def test_price_changes_of_a_doubling_series() -> None:
    raw, missing = of_closes([float(2**k) for k in range(16)])
    # each close is twice the one before: 2 - 1, 2**5 - 1, 2**15 - 1
    assert raw[15, :3].tolist() == [1.0, 31.0, 32767.0]
    assert missing[0] & 0b111 == 0b111
    assert missing[1] & 0b111 == 0b110
    assert missing[5] & 0b111 == 0b100
    assert missing[15] & 0b111 == 0


def test_volatility_of_alternating_returns() -> None:
    # 100, 101, 100, 101 ...: returns +1 % and -1/101; with 15 returns, 8 are up and 7 are down
    raw, missing = of_closes([100.0 + k % 2 for k in range(16)])
    up, down = 0.01, 100 / 101 - 1
    mean = (8 * up + 7 * down) / 15
    std = math.sqrt((8 * (up - mean) ** 2 + 7 * (down - mean) ** 2) / 15)
    assert raw[15, INDEX["volatility"]] == pytest.approx(std, rel=1e-12)
    assert not missing[15] >> 3 & 1
    assert missing[14] >> 3 & 1


def test_rsi_is_wilders() -> None:
    # 14 changes: 7 of +2 and 7 of -1 -> average gain 1, loss 0.5 -> 1 / 1.5; then +3:
    # gain (13 * 1 + 3) / 14 = 16/14, loss 13 * 0.5 / 14 = 6.5/14 -> 16 / 22.5
    closes = [100.0]
    for k in range(14):
        closes.append(closes[-1] + (2.0 if k % 2 == 0 else -1.0))
    closes.append(closes[-1] + 3.0)
    raw, missing = of_closes(closes)
    assert raw[14, 4] == pytest.approx(1 / 1.5, rel=1e-12)
    assert raw[15, 4] == pytest.approx(16 / 22.5, rel=1e-12)
    assert missing[13] >> 4 & 1
    assert not missing[14] >> 4 & 1


def test_rsi_extremes_and_a_price_that_never_moved() -> None:
    assert of_closes([100.0 + k for k in range(20)])[0][19, 4] == 1.0
    assert of_closes([100.0 - k for k in range(20)])[0][19, 4] == 0.0
    assert of_closes([100.0] * 20)[0][19, 4] == 0.5


def test_macd_is_a_fraction_of_the_price() -> None:
    # a step from 100 to 127 after 26 bars: EMA12 moves 2/13 of 27, EMA26 2/27 of 27 = 2
    raw, missing = of_closes([100.0] * 26 + [127.0])
    assert raw[26, 5] == pytest.approx((27 * 2 / 13 - 2.0) / 127, rel=1e-12)
    assert missing[25] >> 5 & 1
    assert not missing[26] >> 5 & 1


def test_trend_strength_is_the_efficiency_ratio() -> None:
    # 15 changes: 10 up, 5 down of 1 each -> net 5 over a path of 15
    steps = [1.0, 1.0, -1.0] * 5
    raw, _ = of_closes(np.concatenate([[100.0], 100.0 + np.cumsum(steps)]).tolist())
    assert raw[15, 14] == pytest.approx(5 / 15, rel=1e-12)
    assert of_closes([100.0] * 16)[0][15, 14] == 0.0


def test_volume_ratio_needs_ten_known_volumes() -> None:
    raw, missing = of_closes([100.0] * 12, [3.0] * 10 + [6.0, np.nan])
    assert missing[9] >> 15 & 1
    assert not missing[10] >> 15 & 1
    assert raw[10, 15] == 2.0  # 6 over a mean of 3
    assert missing[11] >> 15 & 1  # its own volume is not known


def test_volume_ratio_uses_the_last_twenty_known() -> None:
    volumes = [100.0] + [2.0] * 20 + [5.0]
    assert of_closes([100.0] * 22, volumes)[0][21, 15] == 2.5


def test_time_of_day_is_that_of_the_bar_end() -> None:
    end = 3 * DAY + 6 * 3600 * 1_000_000 + np.array([0, 36 * MINUTE])
    # the second bar comes after 35 empty ones; before it begins the last of them has closed
    raw, _ = feature_matrix(end, np.full(2, 100.0))
    assert raw[:, 17].tolist() == [0.25 + 35 / 1440, 0.25 + 36 / 1440]


def regime_after(closes: list[float]) -> str | None:
    raw, _ = of_closes(closes)
    return regime_of(raw[-1].tolist())


def test_regimes() -> None:
    flat = [100.0 + 0.5 * (-1) ** k for k in range(30)]
    assert regime_after([*flat, 101.0]) == "BREAKOUT"
    assert regime_after([*flat, 99.0]) == "BREAKOUT"
    assert regime_after([*flat, 100.5]) == "MEAN_REVERSION"  # lag-1 correlation is -1
    # from far above, a fall without a new low, then 15 rises of 1: efficiency 1, below the high
    assert regime_after([130.0] + [90.0] * 15 + [90.0 + k for k in range(1, 16)]) == "TREND"
    # pairs up, up, down, down: lag-1 correlation near 0, no net move
    steps = np.array([1.0, 1.0, -1.0, -1.0] * 8)
    assert regime_after([104.0, *(100.0 + np.cumsum(steps)).tolist()[:30]]) == "RANGE"
    assert regime_after([100.0] * 30) is None  # 29 bars before it


def test_symbol_is_warm_when_every_bar_feature_is_known() -> None:
    state = MarketState()
    for k in range(60):
        state.append(100.0 + k % 3, 1.0, (k + 1) * MINUTE)
        unknown = state.closed_missing & ~(1 << INDEX["spread"])
        assert state.warm == (unknown == 0)
    assert WARM_BARS == 31


def test_spread_is_that_of_the_last_quote() -> None:
    state = MarketState()
    state.on_tick(1, 100.0)
    assert state.features(100.0, None, 1)[1] >> 16 & 1
    state.on_tick(2, 100.0, bid=99.0, ask=101.0)
    raw, missing = state.features(100.0, None, 2)
    assert raw[16] == 0.02
    assert not missing >> 16 & 1
    assert state.half_spread == 0.01
    state.on_tick(3, 100.0, bid=101.0, ask=99.0)  # crossed: no quote
    assert state.half_spread == 0.01


def test_half_spread_is_estimated_from_trade_sides() -> None:
    state = MarketState()
    assert state.half_spread == 1e-4
    for k in range(60):  # buyers pay 100.05, sellers get 99.95: half of 10 bp
        side = 1 if k % 2 else -1
        state.on_tick(k + 1, 100.0 + 0.05 * side, 1.0, side=side)
    assert state.half_spread == pytest.approx(5e-4, rel=1e-9)


def test_a_bar_is_closed_on_the_left_of_the_next_tick() -> None:
    state = MarketState()
    assert state.on_tick(MINUTE + 1, 100.0) is None
    assert state.on_tick(2 * MINUTE, 103.0, 2.0) is None  # stamped at the end: in the bar
    assert state.on_tick(2 * MINUTE - 5, 99.0, 1.0) is None
    closed = state.on_tick(2 * MINUTE + 1, 50.0)
    assert closed is not None
    assert closed == (2 * MINUTE, 100.0, 103.0, 99.0, 99.0, 3.0, 0, False)


def test_empty_bars_stand_still_with_zero_volume() -> None:
    state = MarketState()
    for k in range(40):
        state.on_tick((k + 1) * MINUTE, 100.0 + k % 2, 4.0)
    closed = state.on_tick(44 * MINUTE, 100.0, 4.0)
    assert closed is not None
    assert closed.empty_after == 3
    assert state.n_bars == 43
    assert state.closes[-4:] == [101.0] * 4
    assert state.volumes[-3:] == [0.0] * 3
    assert state.closed_raw[17] == 43 / 1440


def test_a_long_silence_is_a_cold_start() -> None:
    for silence, restarted in ((MAX_GAP_BARS, False), (MAX_GAP_BARS + 1, True)):
        state = MarketState()
        for k in range(40):
            state.on_tick((k + 1) * MINUTE, 100.0 + k % 2, bid=99.0, ask=101.0)
        closed = state.on_tick((41 + silence) * MINUTE, 100.0)
        assert closed is not None
        assert closed.restarted is restarted
        assert state.warm is not restarted
        assert (state.quote_spread is None) is restarted
        if restarted:
            assert state.closed_missing | ACCOUNT_BITS == (1 << N_FEATURES) - 1
            assert state.closed_raw == list(UNKNOWN)


# -- an independent, vectorised implementation -----------------------------------------------------


def previous(values: np.ndarray, k: int) -> np.ndarray:
    return np.concatenate([np.full(k, np.nan), values])[: len(values)]


def trailing(values: np.ndarray, k: int) -> np.ndarray:
    """Return [T, k]: the last k values up to and including each row, NaN before the beginning."""
    return sliding_window_view(np.concatenate([np.full(k - 1, np.nan), values]), k)


def smoothed(first: float, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    out = np.empty(len(values))
    state = first
    for t, (value, weight) in enumerate(zip(values, weights, strict=True)):
        state = (1.0 - weight) * state + weight * value
        out[t] = state
    return out


def oracle(end: np.ndarray, close: np.ndarray, volume: np.ndarray) -> np.ndarray:
    """Return features of a series without gaps, NaN where missing (spread is left NaN)."""
    n = len(close)
    out = np.full((n, N_FEATURES), np.nan)
    for i, k in ((0, 1), (1, 5), (2, 15)):
        out[:, i] = (close - previous(close, k)) / previous(close, k)
    returns = out[:, 0]
    window = trailing(returns, 15)
    out[:, 3] = np.sqrt(((window - window.mean(axis=1, keepdims=True)) ** 2).mean(axis=1))
    change = np.diff(close, prepend=close[0])
    weights = 1.0 / np.minimum(np.maximum(np.arange(n), 1), 14)
    weights[0] = 0.0
    gain = smoothed(0.0, np.maximum(change, 0.0), weights)
    loss = smoothed(0.0, np.maximum(-change, 0.0), weights)
    with np.errstate(invalid="ignore", divide="ignore"):
        rsi = np.where(gain + loss > 0.0, 1.0 - 1.0 / (1.0 + gain / loss), 0.5)
        rsi[(loss == 0.0) & (gain > 0.0)] = 1.0
    out[14:, 4] = rsi[14:]
    fast = smoothed(close[0], close, np.full(n, 2 / 13))
    slow = smoothed(close[0], close, np.full(n, 2 / 27))
    out[26:, 5] = ((fast - slow) / close)[26:]
    path = np.abs(trailing(np.where(np.arange(n) > 0, change, np.nan), 15)).sum(axis=1)
    net = close - previous(close, 15)
    with np.errstate(invalid="ignore", divide="ignore"):
        trend = np.where(path > 0.0, net / path, np.where(np.isnan(path), np.nan, 0.0))
    out[:, 14] = trend
    products = (window[:, 1:] * window[:, :-1]).sum(axis=1)
    squares = (window**2).sum(axis=1)
    top = previous(trailing(close, 30).max(axis=1), 1)
    bottom = previous(trailing(close, 30).min(axis=1), 1)
    breakout = (close > top) | (close < bottom)
    trending = ~breakout & (np.abs(trend) >= 0.5)
    reverting = ~breakout & ~trending & (squares > 0.0) & (products <= -0.2 * squares)
    flags = np.stack([trending, ~breakout & ~trending & ~reverting, breakout, reverting], axis=1)
    out[30:, 10:14] = flags[30:]
    past = trailing(np.concatenate([[np.nan], volume[:-1]]), 20)
    known = (~np.isnan(past)).sum(axis=1)
    mean = np.nansum(past, axis=1) / np.maximum(known, 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        out[:, 15] = np.where((known >= 10) & (mean > 0.0), volume / mean, np.nan)
    out[:, 17] = (end % DAY) / DAY
    return out


def oracle_with_gaps(bars: Bars) -> np.ndarray:
    """Fill short gaps with standing bars, cut at long ones, and keep the row before each next bar.

    That row is what a policy sees when the next bar begins.
    """
    n = len(bars.close)
    step = bars.step_seconds * 1_000_000
    volume = np.full(n, np.nan) if bars.volume is None else bars.volume
    following = np.append(bars.end_us[1:], bars.end_us[-1] + step)
    empty = (following - bars.end_us) // step - 1
    out = np.full((n, N_FEATURES), np.nan)
    begins = np.concatenate([[0], np.flatnonzero(empty > MAX_GAP_BARS) + 1, [n]])
    for a, b in itertools.pairwise(begins.tolist()):
        if a == b:
            continue
        cold = empty[b - 1] > MAX_GAP_BARS  # its last row is followed by a restart
        repeats = empty[a:b] + 1
        if cold:
            repeats[-1] = 1
        row = np.repeat(np.arange(a, b), repeats)
        offset = np.concatenate([np.arange(r) for r in repeats])
        stands = offset > 0
        quiet = np.where(np.isnan(volume[row]), np.nan, 0.0)
        found = oracle(
            bars.end_us[row] + offset * step,
            bars.close[row],
            np.where(stands, quiet, volume[row]),
        )
        out[a:b] = found[np.cumsum(repeats) - 1]
        if bars.spread is not None:
            known = np.where(np.isnan(bars.spread[a:b]), -1, np.arange(a, b))
            last = np.maximum.accumulate(known)
            out[a:b, 16] = np.where(last >= 0, bars.spread[last], np.nan)
        if cold:
            out[b - 1] = np.nan
    return out


def assert_same(raw: np.ndarray, missing: np.ndarray, expected: np.ndarray) -> None:
    gone = (missing[:, None] >> np.arange(N_FEATURES)) & 1 == 1
    market = [i for i in range(N_FEATURES) if not 6 <= i <= 9]
    assert np.array_equal(gone[:, market], np.isnan(expected[:, market]))
    # a comparison that lies on its threshold may fall on either side in another order of summing
    regimes = np.isclose(raw[:, 10:14], np.nan_to_num(expected[:, 10:14])).all(axis=1)
    assert regimes.mean() > 0.9995
    rest = [i for i in market if not 10 <= i <= 13]
    known = ~gone[:, rest]
    assert np.abs(raw[:, rest][known] - expected[:, rest][known]).max() < 1e-6
    assert np.array_equal(raw[gone], np.broadcast_to(UNKNOWN, raw.shape)[gone])


def test_feature_matrix_agrees_with_the_oracle_on_real_bars(real_bars: Bars) -> None:
    assert_same(*matrix(real_bars), oracle_with_gaps(real_bars))


def test_feature_matrix_agrees_with_the_oracle_across_gaps(gappy_bars: Bars) -> None:
    expected = oracle_with_gaps(gappy_bars)
    assert np.isnan(expected[80:, 0]).sum() > 5  # restarts happen
    assert_same(*matrix(gappy_bars), expected)


def fold_of_ticks(bars: Bars) -> tuple[np.ndarray, np.ndarray]:
    """Feed open and close ticks; row t is what was closed when the tick after bar t arrived."""
    state = MarketState(bars.step_seconds)
    step = bars.step_seconds * 1_000_000
    n = len(bars.close)
    rows, masks = np.empty((n, N_FEATURES)), np.empty(n, dtype=np.int64)
    for t in range(n):
        end = int(bars.end_us[t])
        closed = state.on_tick(end - step + 1_000, float(bars.open[t]))
        if t:
            assert closed is not None
            rows[t - 1], masks[t - 1] = state.closed_raw, state.closed_missing
        quote: tuple[float | None, float | None] = (None, None)
        mid = float(bars.close[t])
        if bars.spread is not None and not math.isnan(bars.spread[t]):
            half = mid * float(bars.spread[t]) / 2
            quote = (mid - half, mid + half)
        volume = math.nan if bars.volume is None else float(bars.volume[t])
        state.on_tick(end, mid, None if math.isnan(volume) else volume, *quote)
    state.on_tick(int(bars.end_us[-1]) + 1_000, float(bars.close[-1]))
    rows[-1], masks[-1] = state.closed_raw, state.closed_missing
    return rows, masks


@pytest.mark.parametrize("name", ["real_bars", "gappy_bars"])
def test_tick_fold_agrees_with_the_bulk_path(name: str, request: pytest.FixtureRequest) -> None:
    bars: Bars = request.getfixturevalue(name)
    bulk, bulk_missing = matrix(bars)
    live, live_missing = fold_of_ticks(bars)
    assert np.array_equal(live_missing, bulk_missing)
    assert np.abs(live - bulk).max() < 1e-6


def test_nothing_after_t_changes_what_is_seen_at_t(gappy_bars: Bars) -> None:
    bars = gappy_bars.rows(0, 400)
    raw, missing = matrix(bars)
    rng = np.random.default_rng(5)
    for t in (0, 31, 120, 250, 398):
        later = np.arange(400) > t
        noise = np.where(later, rng.uniform(0.5, 2.0, 400), 1.0)
        changed = bars._replace(
            close=bars.close * noise,
            volume=np.where(later, 7.0, bars.volume),
            spread=np.where(later, 0.01, bars.spread),
        )
        other, other_missing = matrix(changed)
        assert np.array_equal(other[: t + 1], raw[: t + 1])
        assert np.array_equal(other_missing[: t + 1], missing[: t + 1])
        assert not np.array_equal(other[t + 1 :], raw[t + 1 :])


def test_state_continues_from_its_bytes(gappy_bars: Bars) -> None:
    def feed(state: MarketState, first: int, last: int) -> list[list[float]]:
        seen = []
        for t in range(first, last):
            state.on_tick(int(gappy_bars.end_us[t]), float(gappy_bars.close[t]), 1.0 + t % 7)
            seen.append(state.closed_raw)
        return seen

    whole = MarketState()
    expected = feed(whole, 0, 300)
    for cut in (1, 29, 30, 31, 123):
        first, second = MarketState(), MarketState()
        feed(first, 0, cut)
        second.load(first.dump_open(), first.dump_closed())
        assert feed(second, cut, 300) == expected[cut:]


# -- normaliser ------------------------------------------------------------------------------------


def test_normaliser_scales_clips_and_blanks_what_is_missing() -> None:
    raw = np.tile(np.array(UNKNOWN), (4, 1))
    raw[:, 0] = [1.0, 2.0, 3.0, 1_000.0]
    missing = np.array([0, 0, 0, 1])  # the outlier's first feature is not known
    normaliser = Normaliser.fit(raw, missing)
    # mean 2, population deviation sqrt(2/3)
    assert normaliser.mean[0] == pytest.approx(2.0)
    assert normaliser.scale[0] == pytest.approx(math.sqrt(2 / 3))
    obs = normaliser.apply(raw, missing.tolist())
    assert obs.dtype == np.float32
    assert obs[:, 0].tolist() == pytest.approx([-1.2247449, 0.0, 1.2247449, 0.0])
    assert normaliser.apply(raw, [0, 0, 0, 0])[3, 0] == 5.0
    raw[0, 6:14] = [4.0, -1.0, 9.0, 8.0, 1.0, 0.0, 0.0, 0.0]  # account and regime pass through
    assert normaliser.apply(raw, missing.tolist())[0, 6:14].tolist() == raw[0, 6:14].tolist()
    assert not obs[:, N_FEATURES:].any()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_normaliser_treats_every_row_alone(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    normaliser = Normaliser(rng.normal(size=N_FEATURES), rng.uniform(0.5, 2.0, N_FEATURES))
    raw = rng.normal(0.0, 4.0, (n, N_FEATURES))
    missing = rng.integers(0, 1 << N_FEATURES, n).tolist()
    together = normaliser.apply(raw, missing)
    alone = [normaliser.apply(raw[i : i + 1], missing[i : i + 1])[0] for i in range(n)]
    assert np.array_equal(together, np.array(alone))


# -- the seed's dictionary -------------------------------------------------------------------------


def test_observation_dictionary_of_the_seed() -> None:
    vector = build_feature_vector(
        {
            "price_change_1m": 0.001, "price_change_5m": 0.005, "volatility": 0.02, "rsi": 55.0,
            "macd": 12.0, "price": 48_000.0, "position_size": 0.0, "balance": 10_000.0,
            "equity": 11_000.0, "regime": "BREAKOUT", "bid_ask_spread": 0.0004, "hour_of_day": 6,
        }
    )  # fmt: skip
    assert vector.shape == (64,)
    assert vector.dtype == np.float32
    expected = np.zeros(64, dtype=np.float32)
    expected[:18] = [
        0.001, 0.005, 0.0, 0.02, 0.55, 12 / 48_000, 0.0, 0.0, 1.1, 0.1, 0, 0, 1, 0, 0.0, 1.0,
        0.0004, 0.25,
    ]  # fmt: skip
    assert vector == pytest.approx(expected)


@pytest.mark.parametrize("value", [None, "x", math.nan, math.inf, [], True, "None", ""])
def test_what_is_not_a_number_is_missing(value: object) -> None:
    keys = (
        "price_change_1m", "price_change_5m", "price_change_15m", "volatility", "rsi", "macd",
        "position_size", "position_side", "balance", "equity", "regime", "trend_strength",
        "volume_ratio", "spread", "bid_ask_spread", "time_of_day", "hour_of_day", "price",
    )  # fmt: skip
    assert feature_row(dict.fromkeys(keys, value)) == feature_row({})
    raw, missing = feature_row({})
    assert raw == list(UNKNOWN)
    assert missing == (1 << N_FEATURES) - 1


@pytest.mark.parametrize(
    ("regime", "flags"),
    [
        ("TREND", 0),
        ("range", 1),
        (2, 2),
        ("MEAN_REVERSION", 3),
        ("?", None),
        (7, None),
        (1.5, None),
    ],
)
def test_regime_by_name_or_index(regime: object, flags: int | None) -> None:
    raw, missing = feature_row({"regime": regime})
    assert raw[10:14] == [float(flags == i) for i in range(4)]
    assert bool(missing >> 10 & 1) is (flags is None)
