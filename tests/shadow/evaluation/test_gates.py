"""Gates of the default table: each has a store that it stops, and names itself in the verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import pytest

from shadow.records import BarRow, Comparison, LedgerRow
from shadow.reporting.report import Report, read_report
from tests.shadow.evaluation.test_verdict import BARS, CAPITAL, T0, bars, records, registered, write

Change = Callable[[BarRow], BarRow]
EDGE = 4e-4


def hour_of(row: BarRow) -> int:
    return (row.event_ts_us - T0) // 3_600_000_000


def arms(row: BarRow, **changes: dict[str, object]) -> BarRow:
    """The same bar with other values of some arms; their equity follows in `booked`."""
    changed = {
        name: msgspec.structs.replace(row.arms[name], **values) for name, values in changes.items()
    }
    return msgspec.structs.replace(row, arms={**row.arms, **changed})


def earning(row: BarRow, gross: float, *names: str, **more: object) -> BarRow:
    """The same bar with more gross return in some arms, at once and one tick later."""
    return arms(
        row,
        **{
            name: {
                "gross": row.arms[name].gross + gross,
                "gross_late": row.arms[name].gross_late + gross,
                **more,
            }
            for name in names
        },
    )


def booked(rows: Sequence[BarRow]) -> list[BarRow]:
    """Give every account the equity that its bars add up to."""
    equity: dict[tuple[str, str], float] = {}
    found = []
    for row in rows:
        changed = {}
        for name, arm in row.arms.items():
            key = row.symbol, name
            net = CAPITAL * (arm.gross - arm.fee - arm.slippage)
            equity[key] = equity.get(key, CAPITAL) + net
            changed[name] = msgspec.structs.replace(arm, equity=equity[key])
        changed["flat"] = row.arms["flat"]
        found.append(msgspec.structs.replace(row, arms=changed))
    return found


def reported(store: Path, rows: Sequence[BarRow], ledger: dict[str, int] | None = None) -> Report:
    registered(store)
    kept: list[Comparison] = records(booked(rows))
    if ledger is not None:
        kept[-1] = LedgerRow("ledger", "run-1", "", T0, "stop", {"t": ledger}, (), "a")
    return read_report(write(store, kept))


# -- the data --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ledger", "gate"),
    [
        ({"consumed": 998, "late": 2, "lost": 1}, ""),  # 0.1 % lost, 0.2 % late
        ({"consumed": 1_000, "lost": 2}, "lost entries"),
        ({"consumed": 980, "late": 20}, "late entries"),
        ({"consumed": 900, "duplicate": 100}, "duplicate entries"),
        ({"consumed": 980, "dead_letter": 20}, "unreadable entries"),
    ],
)
def test_entries_that_went_wrong_invalidate(
    tmp_path: Path, ledger: dict[str, int], gate: str
) -> None:
    report = reported(tmp_path, bars(EDGE), ledger)
    found = (report.verdict.text, report.verdict.binding)
    assert found == (("INVALID", gate) if gate else ("PROMOTE", ""))


def of_every(n: int, **changes: object) -> Change:
    """Change one in n bars."""

    def change(row: BarRow) -> BarRow:
        return row if hour_of(row) % n else msgspec.structs.replace(row, **changes)

    return change


@pytest.mark.parametrize(
    ("change", "gate"),
    [
        (of_every(50, gap=True), "bars after a gap"),  # 2 % where 1 % is allowed
        (of_every(5, warm=False), "cold bars"),  # 20 %, 10 % allowed
        (of_every(10, missing_mask=2**18 - 1), "bars with poor features"),  # 10 %, 5 % allowed
    ],
)
def test_bars_that_are_no_basis_invalidate(tmp_path: Path, change: Change, gate: str) -> None:
    report = reported(tmp_path, [change(row) for row in bars(EDGE)])
    assert (report.verdict.text, report.verdict.binding) == ("INVALID", gate)


def test_batches_with_too_few_bars_invalidate(tmp_path: Path) -> None:
    # of every 24 hours both symbols are silent for 8, which is 2 batches of 6
    rows = [row for row in bars(EDGE) if (hour_of(row) - 1) % 24 < 16]
    silent = [
        msgspec.structs.replace(row, empty_after=8) if hour_of(row) % 24 == 16 else row
        for row in rows
    ]
    report = reported(tmp_path, silent)
    assert (report.verdict.text, report.verdict.binding) == ("INVALID", "discarded batches")


# -- safety ----------------------------------------------------------------------------------------


def wild(row: BarRow) -> BarRow:
    """v3 swings three times as far as v2 does."""
    gross = 2.0 * row.arms["v2"].gross
    return earning(row, gross, "v3")


def ruined(row: BarRow) -> BarRow:
    return arms(row, v3={"ruined": True}) if hour_of(row) == BARS and row.symbol == "A" else row


@pytest.mark.parametrize(
    ("change", "gate"), [(wild, "tail loss (ES95 of batches)"), (ruined, "ruined accounts")]
)
def test_breach_of_safety_rejects_whatever_the_profit(
    tmp_path: Path, change: Change, gate: str
) -> None:
    report = reported(tmp_path, [change(row) for row in bars(EDGE)])
    assert (report.verdict.text, report.verdict.binding) == ("REJECT", gate)


# -- robustness ------------------------------------------------------------------------------------


def signals_do_better(row: BarRow) -> BarRow:
    return arms(row, follow_signal={"gross": row.arms["v3"].gross + 1e-3})


def both_lose(row: BarRow) -> BarRow:
    lost = earning(row, -2e-3, "v3", "v2")
    return arms(lost, follow_signal={"gross": lost.arms["v3"].gross - 1e-3})


def trades_dearly(row: BarRow) -> BarRow:
    """v3 pays 6e-4 a bar more than v2 and earns it back; at doubled costs it does not."""
    return earning(row, 6e-4, "v3", fee=row.arms["v3"].fee + 6e-4)


def one_symbol_carries_it(row: BarRow) -> BarRow:
    return earning(row, 8e-4 if row.symbol == "A" else -8e-4, "v3")


@pytest.mark.parametrize(
    ("change", "gate"),
    [
        (signals_do_better, "beats follow-signal"),
        (both_lose, "beats flat"),
        (trades_dearly, "edge at doubled costs"),
        (one_symbol_carries_it, "edge without any one symbol"),
    ],
)
def test_edge_that_is_not_robust_is_kept_in_the_shadow(
    tmp_path: Path, change: Change, gate: str
) -> None:
    report = reported(tmp_path, [change(row) for row in bars(EDGE)])
    assert report.finding == "superior"
    assert (report.verdict.text, report.verdict.binding) == ("KEEP SHADOWING", gate)


def test_batches_that_follow_each_other_are_noticed(tmp_path: Path) -> None:
    # for 8 batches of 4 hours the edge is 4e-4 more, for the next 8 so much less
    rows = [
        earning(row, 4e-4 if (hour_of(row) - 1) // 32 % 2 else -4e-4, "v3") for row in bars(EDGE)
    ]
    report = reported(tmp_path, rows)
    assert report.effect.correlated
    assert (report.verdict.text, report.verdict.binding) == (
        "KEEP SHADOWING", "batches independent (lag 1, in 1/sqrt(K))",
    )  # fmt: skip
