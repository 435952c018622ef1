"""Batches by hand, one by one and all at once: the same bits, and nothing closed ever changes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shadow.evaluation.batches import (
    PLAYERS,
    SERIES,
    Assigned,
    Batcher,
    Batches,
    Frame,
    Rows,
    columns_of,
    form,
    pay,
)
from shadow.records import ArmBar, BarRow

MINUTE = 60_000_000
CAPITAL = 10_000.0
FLAT = ArmBar(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, CAPITAL, False)


def bar(symbol: str, minute: int, v3: ArmBar = FLAT, v2: ArmBar = FLAT) -> BarRow:
    return BarRow(
        record_id=f"{symbol} {minute}", run_id="run", symbol=symbol, event_ts_us=minute * MINUTE,
        open=1.0, high=1.0, low=1.0, close=1.0, volume=None, empty_after=0, restarted=False,
        gap=False, warm=True, regime=None, bus_regime=None,
        arms={"v3": v3, "v2": v2, "follow_signal": FLAT, "flat": FLAT}, opponent="q_table",
        opponent_digest=None, step_decision_id=None, obs=(), missing_mask=0, policy_digest="p",
    )  # fmt: skip


def arm(
    gross: float, cost: float = 0.0, late: float | None = None, turnover: float = 0.0
) -> ArmBar:
    late = gross if late is None else late
    return ArmBar(0.1, gross, turnover, cost / 2, cost / 2, late, CAPITAL, False)


def frame(symbols: Sequence[str] = ("A", "B"), bars: int = 4, end: int = 10**6) -> Frame:
    return Frame.of(
        tuple(symbols), capital=len(symbols) * CAPITAL, step_us=MINUTE, batch_bars=bars,
        start_us=0, end_us=end * MINUTE,
    )  # fmt: skip


def together(frame: Frame, rows: Sequence[BarRow]) -> tuple[Batches, Assigned]:
    """Form the batches of rows, given in the order of the stream, as a report does."""
    number = {name: place for place, name in enumerate(frame.symbols)}
    arrived = sorted(range(len(rows)), key=lambda i: (rows[i].event_ts_us, rows[i].symbol, i))
    ordered = [rows[i] for i in arrived]
    paid = {}
    for name in PLAYERS:
        arms = [row.arms[name] for row in ordered]
        columns = [
            np.array([getattr(arm, item) for arm in arms], np.float64)
            for item in ("gross", "gross_late", "fee", "slippage", "turnover")
        ]
        paid[name] = pay(*columns, np.full(len(rows), CAPITAL))
    return form(
        frame,
        Rows(
            ts_us=np.array([row.event_ts_us for row in ordered], np.int64),
            symbol=np.array([number.get(row.symbol, -1) for row in ordered], np.int64),
            arrived=np.array(arrived, np.int64),
            paid=paid,
        ),
    )


def one_by_one(frame: Frame, rows: Sequence[BarRow]) -> Batches:
    batcher = Batcher(frame)
    for row in rows:
        batcher.add(row.symbol, row.event_ts_us, columns_of(row))
    return batcher.batches()


def same(first: Batches, second: Batches) -> bool:
    return (
        first.values.tobytes() == second.values.tobytes()
        and first.by_symbol.tobytes() == second.by_symbol.tobytes()
        and first.window.tolist() == second.window.tolist()
        and first[4:] == second[4:]
    )


def test_batch_mean_is_profit_per_bar_and_capital_with_costs_inside() -> None:
    v3 = arm(0.010, cost=0.002, late=0.007, turnover=0.5)
    rows = [bar("A", 1, v3, arm(0.001)), bar("B", 1, arm(0.004), FLAT)]
    rows += [bar(name, minute) for minute in (2, 3, 4, 5, 6, 7) for name in "AB"]
    found, _ = together(frame(), rows)
    assert found.window.tolist() == [0]
    # A: 100 - 20 - 10, B: 40; over 4 bars and 20,000
    assert found.series("difference")[0] == pytest.approx(110 / 20_000 / 4)
    assert found.series("late")[0] == pytest.approx(80 / 20_000 / 4)
    assert found.series("beats_flat")[0] == pytest.approx(120 / 20_000 / 4)
    assert found.series("v3_cost")[0] == pytest.approx(20 / 20_000 / 4)
    assert found.series("v3_turnover")[0] == pytest.approx(5_000 / 20_000 / 4)
    assert found.at(2.0)[0] == pytest.approx(90 / 20_000 / 4)
    assert found.by_symbol[0] == pytest.approx([70 / 20_000 / 4, 40 / 20_000 / 4])
    assert found.without(0)[0] == pytest.approx(40 / 20_000 / 4)
    assert found.at(1.0).tobytes() == found.series("difference").tobytes()


def test_batch_closes_when_the_watermark_is_two_bars_past_it() -> None:
    rows = [bar("A", minute) for minute in range(1, 7)]
    assert len(one_by_one(frame(["A"]), rows).window) == 0
    assert len(one_by_one(frame(["A"]), [*rows, bar("A", 7)]).window) == 1


def test_late_bar_is_booked_into_the_oldest_open_batch() -> None:
    rows = [bar("A", minute) for minute in range(1, 8)]
    late = bar("B", 2, arm(0.01))  # silent until now: its window has closed
    rest = [bar("A", minute) for minute in range(8, 13)]
    found = one_by_one(frame(), [*rows, late, *rest])
    assert found.series("difference") == pytest.approx([0.0, 100 / 20_000 / 4])
    assert found.late_rows == 1
    assert same(found, together(frame(), [*rows, late, *rest])[0])


def test_bar_of_a_run_that_began_again_counts_once() -> None:
    rows = [bar("A", minute, arm(0.01)) for minute in range(1, 8)]
    found = one_by_one(frame(["A"]), [*rows, *rows])
    assert found.repeated_rows == 7
    assert found.series("difference") == pytest.approx([100 / 10_000])
    assert same(found, together(frame(["A"]), [*rows, *rows])[0])


def test_window_with_few_bars_is_discarded_and_its_profit_is_told() -> None:
    rows = [bar("A", 1, arm(0.01)), *(bar("A", minute) for minute in range(9, 20))]
    found = one_by_one(frame(["A"]), rows)
    # windows 1-4 (one bar of four) and 5-8 (none) are discarded
    assert (found.discarded, found.window.tolist()) == (2, [2, 3])
    assert found.discarded_profit == pytest.approx(0.01)
    assert same(found, together(frame(["A"]), rows)[0])


def test_only_whole_windows_between_start_and_end_count() -> None:
    limited = Frame.of(
        ("A",), capital=CAPITAL, step_us=MINUTE, batch_bars=4, start_us=3 * MINUTE,
        end_us=14 * MINUTE,
    )  # fmt: skip
    rows = [bar("A", minute, arm(0.01)) for minute in range(1, 40)]
    found = one_by_one(limited, rows)
    assert found.window.tolist() == [1, 2]  # bars 5-8 and 9-12
    assert same(found, together(limited, rows)[0])


def test_other_symbols_do_not_count() -> None:
    rows = [bar(name, minute, arm(0.01)) for minute in range(1, 8) for name in "AZ"]
    assert one_by_one(frame(["A"]), rows).values.tolist() == (
        one_by_one(frame(["A"]), [row for row in rows if row.symbol == "A"]).values.tolist()
    )


def test_store_without_a_row_has_no_batch() -> None:
    found, assigned = together(frame(), [])
    assert (len(found.window), assigned.watermark_us) == (0, 0)
    assert same(found, one_by_one(frame(), []))


amounts = st.floats(-0.05, 0.05, allow_nan=False).map(lambda x: round(x, 5))
arms = st.builds(arm, amounts, st.floats(0, 0.01), amounts, st.floats(0, 1))
arrivals = st.lists(
    st.tuples(st.sampled_from("ABZ"), st.integers(-9, 6), arms, arms), min_size=1, max_size=80
)


def scripted(arrivals: list[tuple[str, int, ArmBar, ArmBar]]) -> list[BarRow]:
    """Rows whose time goes on by about half a bar each, some of them late or repeated."""
    return [
        bar(symbol, max(number // 2 + shift, 1), v3, v2)
        for number, (symbol, shift, v3, v2) in enumerate(arrivals)
    ]


@settings(max_examples=150, deadline=None)
@given(arrivals)
def test_one_by_one_equals_all_at_once_bit_for_bit(
    script: list[tuple[str, int, ArmBar, ArmBar]],
) -> None:
    rows = scripted(script)
    assert same(one_by_one(frame(), rows), together(frame(), rows)[0])


@settings(max_examples=100, deadline=None)
@given(arrivals, st.integers(0, 80))
def test_what_comes_later_changes_no_closed_batch(
    script: list[tuple[str, int, ArmBar, ArmBar]], cut: int
) -> None:
    rows = scripted(script)
    before, after = one_by_one(frame(), rows[:cut]), one_by_one(frame(), rows)
    n = len(before.window)
    assert after.values[:n].tobytes() == before.values.tobytes()
    assert after.window[:n].tolist() == before.window.tolist()


@settings(max_examples=50, deadline=None)
@given(arrivals)
def test_swapping_the_roles_negates_every_difference(
    script: list[tuple[str, int, ArmBar, ArmBar]],
) -> None:
    rows = scripted(script)
    swapped = scripted([(symbol, shift, v2, v3) for symbol, shift, v3, v2 in script])
    first, second = one_by_one(frame(), rows), one_by_one(frame(), swapped)
    for name in ("difference", "late"):
        assert (first.series(name) == -second.series(name)).all()
    assert (first.at(2.0) == -second.at(2.0)).all()
    assert (first.by_symbol == -second.by_symbol).all()
    assert first.discarded_profit == -second.discarded_profit


def test_series_have_names_and_frames_whole_windows() -> None:
    assert len(set(SERIES)) == len(SERIES)
    assert (frame().bars, frame().per_day) == (4, 1440.0)
