"""Behaviour worked by hand: hours of bars whose every number can be told in advance."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from shadow.evaluation.bars import Bars, Scope, Traded
from shadow.evaluation.behaviour import (
    CLASSES,
    HORIZON,
    Behaviour,
    behave,
)
from shadow.evaluation.effect import Range
from shadow.records import BarRow, Comparison, Decision
from shadow.store import StoreReader
from tests.shadow.reporting.test_report import (
    MINUTE,
    T0,
    Book,
    decision,
    run_row,
    v2_row,
    write_store,
)

BATCH_US = 60 * MINUTE
LONG, SHORT = {"exposure": 0.1}, {"exposure": -0.1}
TRADE = {"turnover": 0.1, "fee": 1e-4, "slippage": 0.0}


def behaviour_of(directory: Path, rows: list[Comparison | Decision]) -> Behaviour:
    with StoreReader(write_store(directory, [run_row(), *rows])).connect() as db:
        Scope(("run-1",)).install(db)
        bars = Bars.load(db)
        traded = {name: Traded.load(db, bars, name) for name in ("v3", "v2")}
        return behave(db, bars, traded, step_us=MINUTE, batch_us=BATCH_US)


def cycle(minutes: int) -> Iterator[BarRow]:
    """Every 10 minutes: v3 enters long at 2, halves at 5, leaves at 8; v2 enters short at 4, flips
    at 6 and leaves at 9. Prices never move; v3 gains 0.001 in minute 3 of each cycle."""
    book = Book("AAA")
    for minute in range(minutes):
        at = minute % 10
        v3: dict[str, float] = {}
        v2: dict[str, float] = {}
        if 2 <= at < 5:
            v3 = dict(LONG)
        elif 5 <= at < 8:
            v3 = {"exposure": 0.05}
        if at in (2, 5, 8):
            v3 |= {"turnover": 0.1 if at == 2 else 0.05}
        if at == 3:
            v3 |= {"gross": 0.001}
        if 4 <= at < 6:
            v2 = dict(SHORT)
        elif 6 <= at < 9:
            v2 = dict(LONG)
        if at in (4, 6, 9):
            v2 |= {"turnover": 0.1}
        # equity moves, and the quantity is what must stay: exposure follows equity
        scale = 10_000.0 / book.equity["v3"]
        if "exposure" in v3:
            v3["exposure"] *= scale
        yield book.bar(minute + 1, v3, v2, step_decision_id=f"s{minute + 1}")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Behaviour:
    rows = [*cycle(600), *(v2_row(60_000_000 * minute + 1) for minute in range(0, 600, 10))]
    return behaviour_of(tmp_path_factory.mktemp("behaviour") / "store", rows)


def test_changes_of_target_are_worked_by_hand(found: Behaviour) -> None:
    table = {
        (v3, v2): found.confusion.table[row][column]
        for row, v3 in enumerate(CLASSES)
        for column, v2 in enumerate(CLASSES)
    }
    expected = {
        ("hold", "hold"): 240,  # minutes 0, 1, 3, 7 of 60 cycles
        ("long", "hold"): 60,
        ("reduce", "hold"): 60,
        ("exit", "hold"): 60,
        ("hold", "short"): 60,
        ("hold", "long"): 60,
        ("hold", "exit"): 60,
    }
    assert {cell: n for cell, n in table.items() if n} == expected
    assert (found.confusion.n, found.confusion.batches) == (600, 10)
    assert found.confusion.raw == Range(0.4, 0.4, 0.4)  # every batch is like the others
    # p_e: both hold in 420 of 600 bars (0.7 each), every other class in 60 of one of them at most
    chance = 0.7 * 0.7 + 0.1 * 0.1 + 0.1 * 0.1
    assert found.confusion.kappa.value == pytest.approx((0.4 - chance) / (1 - chance))
    pi = [0.7, 0.1, 0.1, 0.05, 0.05]
    gwet = sum(p * (1 - p) for p in pi) / 4
    assert found.confusion.ac1.value == pytest.approx((0.4 - gwet) / (1 - gwet))


def test_cells_by_sides_add_up_to_the_whole_difference(found: Behaviour) -> None:
    cells = {(cell.v3, cell.v2): cell for cell in found.sides}
    assert sum(cell.bars for cell in found.sides) == 600
    assert sum(cell.total for cell in found.sides) == pytest.approx(60 * 10.0)
    gained = cells["long", "flat"]  # minutes 2, 3 of each cycle
    assert (gained.bars, gained.total) == (120, pytest.approx(600.0))
    assert gained.mean_bps.value == pytest.approx(5.0)
    assert cells["long", "long"].bars == 120
    assert cells["flat", "long"].bars == 60


def test_cells_of_actions_leave_out_where_both_did_the_same(found: Behaviour) -> None:
    cells = {(cell.v3, cell.v2): cell.bars for cell in found.cells}
    assert ("hold", "hold") not in cells
    assert sum(cells.values()) == 360


def test_holding_times_and_exposures(found: Behaviour) -> None:
    v3, v2 = found.holding
    assert (v3.arm, v3.closed, v3.open) == ("v3", 60, 0)
    assert v3.mean == Range(360.0, 360.0, 360.0)
    assert set(v3.quantiles) == {360.0}
    assert (v2.closed, v2.open) == (120, 0)
    assert v2.mean.value == pytest.approx((120.0 + 180.0) / 2)
    assert v2.quantiles == (120.0, 120.0, 120.0, 180.0, 180.0, 180.0)
    one, two = found.exposure
    assert (one.long, one.short, one.flat) == (0.6, 0.0, 0.4)
    assert (two.long, two.short, two.flat) == (0.3, 0.2, 0.5)
    assert two.net.value == pytest.approx(0.01)
    assert two.mean_abs.value == pytest.approx(0.05)
    assert sum(two.bars) == 600


def test_disagreements_carry_the_ids_of_both_decisions(found: Behaviour) -> None:
    assert found.worst == ()  # nobody lost anything
    assert len(found.best) == 20
    first = min(found.best, key=lambda item: item.start_us)
    assert (first.symbol, first.v3, first.v2, first.bars) == ("AAA", "long", "flat", 2)
    assert first.difference == pytest.approx(10.0)
    minute = (first.start_us - T0) // MINUTE
    assert minute % 10 == 2
    assert first.v3_decision_id == f"s{minute}"  # the step that closed the bar before
    assert first.v2_decision_id == f"q{60_000_000 * (minute - 2) + 1}"


def test_a_steady_mix_does_not_drift(found: Behaviour) -> None:
    steps, v3, v2 = found.drifts
    assert sum(steps.total) == 0  # no decision is in the store
    assert v3.total == (60, 0, 420, 60, 60)
    assert v2.total == (60, 60, 420, 0, 60)
    assert v3.tau == 1.0
    late = [window for window in v3.windows if window.psi is not None]
    assert len(late) == len(v3.windows) - v3.reference
    assert all(window.p == pytest.approx(1.0, abs=0.01) for window in late)
    assert all(window.js_bits == pytest.approx(0.0, abs=1e-12) for window in late)


def test_a_change_of_behaviour_is_seen(tmp_path: Path) -> None:
    rows: list[Comparison | Decision] = []
    for hour in range(24):
        for minute in range(60):
            action = 1 if minute % (10 if hour < 16 else 3) == 0 else 0
            number = (hour * 60 + minute) * MINUTE + 1_000
            rows.append(
                msgspec.structs.replace(
                    decision(number, "step", action), decision_id=f"s{hour}-{minute}"
                )
            )
    book = Book("AAA")
    rows += [book.bar(minute + 1, {}, {}) for minute in range(1_440)]
    steps = behaviour_of(tmp_path / "store", rows).drifts[0]
    assert sum(steps.total) == 1_440
    assert steps.reference == 6
    quiet, changed = steps.windows[6:16], steps.windows[16:]
    assert all(window.p is not None and window.p > 0.05 for window in quiet)
    assert all(window.p is not None and window.p < 1e-4 for window in changed)


def test_self_play_agrees_in_everything(tmp_path: Path) -> None:
    book, rows = Book("AAA"), []
    for minute in range(720):
        arm = {**LONG, "turnover": 0.1 * (minute % 7 == 0)} if minute % 7 < 4 else {}
        rows.append(book.bar(minute + 1, arm, arm))
    found = behaviour_of(tmp_path / "store", rows)
    one = Range(1.0, 1.0, 1.0)
    confusion = found.confusion
    assert (confusion.raw, confusion.kappa, confusion.ac1) == (one, one, one)
    assert confusion.weighted_kappa == one
    assert (found.cells, found.worst, found.best) == ((), (), ())


def orders(directory: Path, rise: float, confidence: float) -> Behaviour:
    """Every 40 minutes, v3 goes long before the price rises and leaves before it falls back."""
    book, rows = Book("AAA"), []
    price = 1.0
    for minute in range(3_000):
        at = minute % 40
        v3: dict[str, float] = {}
        if at == 1:
            v3 = {"exposure": 0.1, **TRADE}
        elif 1 < at < 17:
            v3 = {"exposure": 0.1 * price / 1.0}
        elif at == 17:
            v3 = dict(TRADE)
        opened = price
        price = 1.0 + rise if 10 <= at < 18 else 1.0
        rows.append(
            book.bar(minute + 1, v3, {}, open=opened, close=price,
                     step_decision_id=f"s{minute + 1}")
        )  # fmt: skip
        rows.append(
            msgspec.structs.replace(
                decision((minute + 1) * MINUTE + 1, "step", 1),
                decision_id=f"s{minute + 1}", confidence=confidence,
            )
        )  # fmt: skip
    return behaviour_of(directory, rows)


def test_confidence_is_judged_by_what_the_order_earned(tmp_path: Path) -> None:
    up = orders(tmp_path / "up", 0.01, 0.9).calibration
    assert (up.horizon, up.n, up.left_out) == (HORIZON, 150, 0)
    assert up.base_rate.value == 1.0
    assert up.ece.value == pytest.approx(0.1)
    assert up.brier.value == pytest.approx(0.01)
    assert up.brier_of_base_rate == 0.0
    (bin_,) = up.bins
    assert (bin_.n, bin_.confidence, bin_.came_true) == (150, pytest.approx(0.9), 1.0)
    flat = orders(tmp_path / "flat", 0.0005, 0.9).calibration
    assert flat.base_rate.value == 0.0  # 0.05 % of the notional does not pay 0.1 % of costs
    assert flat.ece.value == pytest.approx(0.9)


def test_without_bars_nothing_is_said(tmp_path: Path) -> None:
    found = behaviour_of(tmp_path / "store", [v2_row(1)])
    assert found.confusion.n == 0
    assert found.confusion.kappa == Range(None)
    assert (found.cells, found.sides, found.worst, found.best) == ((), (), (), ())
    assert found.calibration.n == 0
    assert [arm.mean_abs for arm in found.exposure] == [Range(None)] * 2


def test_latency_is_that_of_the_decisions_of_both_kinds(tmp_path: Path) -> None:
    rows = [
        msgspec.structs.replace(decision(n, kind, 0), decision_id=f"{kind}{n}", latency_ms=float(n))
        for kind in ("step", "advisory")
        for n in range(1, 101)
    ]
    steps, advisory = behaviour_of(tmp_path / "store", rows).latency
    assert (steps.kind, steps.n, steps.p50_ms, steps.p90_ms) == ("step", 100, 50.0, 90.0)
    assert (advisory.p99_ms, advisory.max_ms) == (99.0, 100.0)


def test_same_rows_give_the_same_bits(tmp_path: Path) -> None:
    rows = list(cycle(300))
    one, two = (behaviour_of(tmp_path / name, list(rows)) for name in "ab")
    assert msgspec.json.encode(one) == msgspec.json.encode(two)


def test_rows_are_read_in_stream_order_from_many_segments_and_threads(tmp_path: Path) -> None:
    books = [Book(f"S{number}") for number in range(9)]
    rows: list[Comparison | Decision] = [run_row()]
    for minute in range(1, 301):
        rows += [book.bar(minute, {"turnover": minute * 1e-3}, {}) for book in books]
    names = tuple(book.symbol for book in books)
    store = write_store(tmp_path / "store", rows, flush_every=50)
    with StoreReader(store).connect() as db:
        db.execute("SET threads = 4")
        for scope in (Scope(("run-1",)), Scope(("run-1", "other"), names, T0, T0 + 300 * MINUTE)):
            scope.install(db)
            for _ in range(5):  # what is not in order is so only now and then
                bars = Bars.load(db)
                v3 = Traded.load(db, bars, "v3")
                assert (np.diff(bars.arrived) == 1).all()
                assert (bars.ts_us == T0 + np.repeat(np.arange(1, 301), 9) * MINUTE).all()
                expected = np.repeat(np.arange(1, 301), 9) * 1e-3 * 10_000.0
                np.testing.assert_allclose(v3.paid.turnover, expected, rtol=1e-12)
