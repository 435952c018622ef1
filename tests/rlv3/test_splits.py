"""Parts by time, the embargo, and judging a policy only by what it has not seen."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from rlv3.errors import ConfigError, DataError
from rlv3.features import US, WARM_BARS, Normaliser, feature_matrix
from rlv3.market import Bars, bars_from_closes
from rlv3.splits import check_unseen, parse_split, split_by_time, training_end, window

MINUTE = 60 * US


def numbered(n: int, *, after: int = 0, symbol: str = "A") -> Bars:
    """Return bars whose close says which minute they are."""
    bars = bars_from_closes(np.arange(n) + 1.0 + after, symbol=symbol)
    return bars._replace(end_us=bars.end_us + after * MINUTE)


def moment(bars: Bars, row: int) -> datetime:
    return datetime.fromtimestamp(bars.end_us[row] / US, UTC)


def test_shares_are_read_as_parts_of_one_or_of_a_hundred() -> None:
    assert parse_split("70,15,15") == pytest.approx((0.7, 0.15, 0.15))
    assert parse_split("0.8,0.2") == pytest.approx((0.8, 0.2))
    for bad in ("80", "50,60", "a,b", "50,-10,60", "25,25,25,25", "", "nan,1"):
        with pytest.raises(ConfigError, match="expected a split of two or three positive shares"):
            parse_split(bad)


def test_parts_follow_one_another_with_an_embargo_between_them() -> None:
    parts = split_by_time([numbered(1_000)], (0.7, 0.15, 0.15), embargo=40)
    train, validation, test = (part[0].close for part in parts)
    assert (train[0], train[-1]) == (1, 700)
    # 9 bars are left out, 31 warm up: row 740 is the first one that is decided on
    assert (validation[0], validation[WARM_BARS - 1], validation[-1]) == (710, 740, 850)
    assert (test[0], test[-1]) == (860, 1_000)


def test_two_shares_leave_no_validation() -> None:
    parts = split_by_time([numbered(500)], (0.8, 0.2), embargo=WARM_BARS)
    assert parts.validation == []
    assert (parts.train[0].close[-1], parts.test[0].close[0]) == (400, 401)


def test_one_instant_cuts_every_symbol() -> None:
    early, late = numbered(600, symbol="EARLY"), numbered(600, after=300, symbol="LATE")
    parts = split_by_time([early, late], (0.5, 0.5))
    # the pool's half is minute 450 of 900
    assert [bars.close[-1] for bars in parts.train] == [450, 450]
    ends = max(bars.end_us[-1] for bars in parts.train)
    assert all(bars.end_us[0] > ends for bars in parts.test)


def test_gaps_do_not_move_the_embargo() -> None:
    bars = numbered(1_000)
    end_us = bars.end_us + np.where(np.arange(1_000) >= 720, 500 * MINUTE, 0)
    part = split_by_time([bars._replace(end_us=end_us)], (0.7, 0.3), embargo=60).test[0]
    assert part.close[0] == 721  # what came before the silence is within the embargo's time
    assert part.end_us[0] - end_us[699] > 29 * MINUTE


def test_normalisers_of_the_training_part_do_not_know_what_follows() -> None:
    rng = np.random.default_rng(0)
    bars = bars_from_closes(100.0 * np.exp(np.cumsum(rng.normal(0, 1e-3, 1_000))))
    wild = bars._replace(close=np.where(np.arange(1_000) < 700, bars.close, 1.0))

    def fitted(series: Bars) -> Normaliser:
        part = split_by_time([series]).train[0]
        return Normaliser.fit(*feature_matrix(part.end_us, part.close))

    assert np.array_equal(fitted(bars).mean, fitted(wild).mean)
    assert np.array_equal(fitted(bars).scale, fitted(wild).scale)


def test_parts_that_cannot_be_traded_are_refused() -> None:
    with pytest.raises(ConfigError, match="embargo must be >= 31 bars, was 5"):
        split_by_time([numbered(100)], embargo=5)
    with pytest.raises(
        DataError, match="A: expected at least 33 bars in the test part after its embargo, found 1 "
    ):
        split_by_time([numbered(200)], (0.8, 0.2), embargo=70)
    with pytest.raises(DataError, match=r"at least 33 bars in the validation part .* found 30 of"):
        split_by_time([numbered(400)], (0.7, 0.15, 0.15), embargo=61)


def test_a_window_brings_its_warm_up_along() -> None:
    bars = numbered(200)
    part = window(bars, moment(bars, 100), moment(bars, 150))
    assert (part.close[0], part.close[WARM_BARS - 1], part.close[-1]) == (71, 101, 151)
    assert len(window(bars).close) == 200
    with pytest.raises(DataError, match=r"A: expected at least 33 bars between .*, found 32"):
        window(bars, moment(bars, 198))


def test_decisions_before_the_end_of_training_are_refused() -> None:
    bars = numbered(300)
    end = moment(bars, 199)
    training = {"data_end": end.isoformat()}
    assert training_end(training) == end
    check_unseen(training, [window(bars, end)])
    check_unseen({"data_end": None}, [bars])
    check_unseen({}, [bars])
    with pytest.raises(DataError) as caught:
        check_unseen(training, [window(bars, end), window(bars, end - timedelta(minutes=1))])
    assert str(caught.value) == (
        "A: expected data after 2026-01-01T03:20:00+00:00, where the policy's training ended, "
        "found decisions from 2026-01-01T03:19:00+00:00 on; use a later window, or "
        "--allow-overlap for a result that proves nothing"
    )
    assert "\n" not in str(caught.value)


def test_every_part_but_training_may_judge() -> None:
    parts = split_by_time([numbered(1_000), numbered(900, after=50, symbol="B")])
    end = max(moment(bars, -1) for bars in parts.train)
    training = {"data_end": end.isoformat()}
    check_unseen(training, parts.validation)
    check_unseen(training, parts.test)
    with pytest.raises(DataError, match="expected data after"):
        check_unseen(training, parts.train)
