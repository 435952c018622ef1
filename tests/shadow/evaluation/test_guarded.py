"""Does the report say what risk limits would have changed, where there were some?"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from shadow.evaluation.guarded import Book, Guarded, Switch, Vetoes
from shadow.records import ArmBar, BarRow, Comparison, Decision
from shadow.reporting.render import html
from shadow.reporting.report import Ask, read_report
from tests.shadow.reporting.test_report import (
    CAPITAL,
    MINUTE,
    T0,
    decision,
    hand_records,
    ledger_row,
    run_row,
    write_store,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def limited(row: BarRow, gross: float, fee: float = 0.0, turnover: float = 0.0) -> BarRow:
    arm = ArmBar(0.0, gross, turnover, fee, 0.0, gross, CAPITAL, False)
    return msgspec.structs.replace(row, guarded=arm)


def ruled(number: int, kind: str, action: int, reason: str | None) -> Decision:
    return msgspec.structs.replace(
        decision(number, kind, action), risk_allowed=reason is None, risk_reason=reason
    )


def kill(n: int, word: str, minute: int, run_id: str = "run-1") -> Comparison:
    return ledger_row(
        {}, "kill", record_id=f"kill {run_id} {n}", run_id=run_id, entry_ids=(f"{n}|{word}",),
        event_ts_us=T0 + minute * MINUTE,
    )  # fmt: skip


def bounded_records() -> list[Comparison | Decision]:
    """The store of the report's tests with limits from its second minute on."""
    profits = iter((0.001, 0.002, -0.004, 0.0, 0.003))
    records: list[Comparison | Decision] = []
    for row in hand_records():
        if isinstance(row, Decision):
            continue
        if isinstance(row, BarRow) and row.event_ts_us > T0 + MINUTE:
            row = limited(row, next(profits), fee=0.0005, turnover=0.1)
        records.append(row)
    return [
        kill(1, "on", 3, "run-0"),  # another run's
        *records,
        decision(1, "step", 1),  # before there were limits
        ruled(2, "step", 1, None),
        ruled(3, "step", 2, "kill_switch"),
        ruled(4, "step", 1, "leverage"),
        ruled(5, "step", 4, None),
        ruled(6, "advisory", 1, "kill_switch"),
        kill(1, "on", 2),
        kill(2, "off", 4),
    ]


def test_figures_are_those_of_the_bars_with_limits(tmp_path: Path) -> None:
    found = read_report(write_store(tmp_path, bounded_records())).guarded
    assert found is not None
    # minute 2: 10 + 20, minute 3: -40, minute 4: 0 + 30, and 5 of fees in each of five bars; the
    # largest fall is from 20 after minute 2 to -25 after minute 3, of 20,000
    guarded = Book(pytest.approx(-5.0), pytest.approx(25.0), 0.0, pytest.approx(5000.0), 0.00225)
    # AAA -200 + 0 + 300, BBB 50 - 100: -150, 0, 200; the costs were in minute 1
    v3 = Book(pytest.approx(50.0), 0.0, 0.0, 0.0, 0.0075)
    assert found == Guarded(
        bars=5,
        guarded=msgspec.structs.replace(guarded, max_drawdown=pytest.approx(0.00225)),
        v3=msgspec.structs.replace(v3, max_drawdown=pytest.approx(0.0075)),
        entries=3,
        vetoes=(Vetoes("kill_switch", 1, 1), Vetoes("leverage", 1, 0)),
        switches=(Switch(T0 + 2 * MINUTE, True), Switch(T0 + 4 * MINUTE, False)),
    )
    assert found.vetoed == 2


def test_nothing_else_in_the_report_knows_of_the_limits(tmp_path: Path) -> None:
    bounded = read_report(write_store(tmp_path / "bounded", bounded_records()))
    free = [
        msgspec.structs.replace(row, guarded=None) if isinstance(row, BarRow)
        else msgspec.structs.replace(row, risk_allowed=None, risk_reason=None)
        if isinstance(row, Decision) else row
        for row in bounded_records()
    ]  # fmt: skip
    assert msgspec.structs.replace(bounded, guarded=None) == read_report(
        write_store(tmp_path / "free", free)
    )


def test_the_page_has_the_part_where_there_were_limits_only(tmp_path: Path) -> None:
    bounded = read_report(write_store(tmp_path / "bounded", bounded_records()))
    page = html(bounded, NOW)
    assert "Under the risk limits" in page
    assert "Steps that chose LONG or SHORT: 3, of which vetoed: 2." in page
    assert "kill switch</th><td>1</td><td>1</td>" in page
    before = read_report(tmp_path / "bounded", Ask(until_us=T0 + MINUTE))
    assert before.guarded is None
    assert "Under the risk limits" not in html(before, NOW)


def test_a_run_without_bars_has_no_limits(tmp_path: Path) -> None:
    assert read_report(write_store(tmp_path, [run_row()])).guarded is None
