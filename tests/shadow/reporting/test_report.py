"""The report says what the rows say: numbers worked out by hand, one page that needs nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import duckdb
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlv3.errors import ConfigError, DataError
from rlv3.events import ACTION_TABLE
from rlv3.market import simulate
from rlv3.policy import Policy
from shadow.records import (
    COMPARISONS,
    DECISIONS,
    ArmBar,
    BarRow,
    Comparison,
    Decision,
    LedgerRow,
    OutcomeRow,
    PairRow,
    RunRow,
    UnpairedRow,
    V2Row,
    encode,
    iso,
)
from shadow.reporting import charts, render, text
from shadow.reporting.curves import BUCKETS
from shadow.reporting.overview import agreement
from shadow.reporting.question import Ask
from shadow.reporting.report import Report, read_report, summarise
from shadow.reporting.terminal import Files, summary
from shadow.store import TABLES, StoreWriter

T0 = 1_700_006_400_000_000  # 2023-11-15T00:00:00Z
MINUTE = 60_000_000
CAPITAL = 10_000.0
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
LATER = datetime(2026, 1, 2, 9, 9, 9, tzinfo=UTC)
FLAT = ArmBar(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, CAPITAL, False)


def run_row(run_id: str = "run-1", **changes: object) -> RunRow:
    row = RunRow(
        record_id=f"run {run_id}",
        run_id=run_id,
        symbol="",
        event_ts_us=T0,
        policy_digest="ab" * 32,
        feature_digest="cd" * 32,
        action_table=ACTION_TABLE,
        training={"steps": "1000", "reward": "net_return", "data_end": "2023-11-01"},
        rl_v2="reference",
        tables_digest="ef" * 32,
        settings={"initial_balance": CAPITAL, "fee_rate": 4e-4, "step_seconds": 60.0},
    )
    return msgspec.structs.replace(row, **changes)


class Book:
    """Bars of one symbol whose equity follows from their profits."""

    def __init__(self, symbol: str, run_id: str = "run-1") -> None:
        self.symbol, self.run_id = symbol, run_id
        self.equity = {"v3": CAPITAL, "v2": CAPITAL, "follow_signal": CAPITAL}

    def _arm(self, name: str, values: dict[str, float]) -> ArmBar:
        arm = {"exposure": 0.0, "gross": 0.0, "turnover": 0.0, "fee": 0.0, "slippage": 0.0}
        arm |= values
        arm.setdefault("gross_late", arm["gross"])
        self.equity[name] += CAPITAL * (arm["gross"] - arm["fee"] - arm["slippage"])
        return ArmBar(**arm, equity=self.equity[name], ruined=False)

    def bar(self, minute: int, v3: dict[str, float], v2: dict[str, float], **changes) -> BarRow:
        row = BarRow(
            record_id=f"bar {self.run_id} {self.symbol} {minute}",
            run_id=self.run_id,
            symbol=self.symbol,
            event_ts_us=T0 + minute * MINUTE,
            open=1.0,
            high=1.0,
            low=1.0,
            close=1.0,
            volume=None,
            empty_after=0,
            restarted=False,
            gap=False,
            warm=True,
            regime="TREND",
            bus_regime=None,
            arms={
                "v3": self._arm("v3", v3),
                "v2": self._arm("v2", v2),
                "follow_signal": self._arm("follow_signal", {}),
                "flat": FLAT,
            },
            opponent="local_reference",
            opponent_digest="ef" * 32,
            step_decision_id=None,
            obs=(0.0,) * 64,
            missing_mask=0,
            policy_digest="ab" * 32,
        )
        return msgspec.structs.replace(row, **changes)


def hand_bars(run_id: str = "run-1") -> list[BarRow]:
    """Two symbols; BBB begins a minute later and has no bar in minute 3."""
    a, b = Book("AAA", run_id), Book("BBB", run_id)
    long, short = {"exposure": 0.1}, {"exposure": -0.1}
    costs = {"turnover": 0.1, "fee": 0.001, "slippage": 0.001}
    return [
        a.bar(1, {**long, "gross": 0.010, **costs}, {}, warm=False, regime=None),
        a.bar(2, {**long, "gross": -0.020, "gross_late": -0.015}, long),
        b.bar(2, {**short, "gross": 0.005}, {**short, "gross": 0.002}, empty_after=1),
        a.bar(3, {}, {}, regime="RANGE"),
        a.bar(4, {**short, "gross": 0.030}, long),
        b.bar(4, {**long, "gross": -0.010}, short),
    ]


def decision(number: int, kind: str, action: int, *, warm: bool = True) -> Decision:
    stamp = iso(T0 + number)
    return Decision(
        symbol="AAA", timestamp=stamp, action=action, confidence=0.5, value=0.0,
        source="RL_V3_PPO", shadow_mode=True, trace_id="", raw_obs={}, schema_version=1,
        decision_id=f"d{number}", kind=kind, action_name=ACTION_TABLE[action],
        action_probs=(0.5, 0.1, 0.1, 0.1, 0.1, 0.1), entropy=1.0, direction=None,
        target_position=0.0, standing_decision_id=None, warm=warm, feature_quality={},
        value_confidence=0.0, tp_zone_multiplier=1.0, suggested_tp_pct=0.06, model_id="ab" * 6,
        model_sha256="ab" * 32, feature_version="seed", event_ts=stamp,
        source_event_type="market.tick", source_stream="market.tick",
        source_entry_id=f"{number}-0", source_trace_id="", source_correlation_id="",
        run_id="run-1", latency_ms=1.0,
    )  # fmt: skip


def v2_row(number: int, direction: int | None = 1, *, moves: bool = True) -> V2Row:
    return V2Row(
        record_id=f"v2 {number}", run_id="run-1", symbol="AAA", event_ts_us=T0 + number,
        source_stream="signal.generated", source_entry_id=f"{number}-0", trace_id="",
        correlation_id="", decision_id=f"q{number}", opponent="local_reference",
        opponent_digest=None, decision_kind="combined", strategy=None, model=None, weight=1.0,
        size_multiplier=1.0, multiplier_assumed=False, leverage=5.0, base_direction=direction,
        signal_confidence=0.7, effective_confidence=0.7, direction=direction,
        target=None if direction is None else 0.1 * direction, moves_arm=moves,
        policy_digest="ab" * 32,
    )  # fmt: skip


def pair_row(
    number: int, rule: int, delta_us: int, v3: float, v2: float | None, *, warm: bool = True
) -> PairRow:
    return PairRow(
        record_id=f"pair {number}", run_id="run-1", symbol="AAA", event_ts_us=T0 + number,
        v2_decision_id=f"q{number}", v3_decision_id=f"d{number}", rule=rule, delta_us=delta_us,
        opponent="local_reference", opponent_digest=None, v3_kind="advisory",
        v3_event_type="signal.generated", v3_action=0, v3_action_name="HOLD", v3_confidence=0.5,
        v3_exposure=v3, v3_target=v3, v2_direction=None, v2_exposure=v2, agree=None, warm=warm,
        policy_digest="ab" * 32,
    )  # fmt: skip


def unpaired_row(number: int, side: str, reason: str) -> UnpairedRow:
    return UnpairedRow(
        f"alone {number}", "run-1", "AAA", T0, side, f"x{number}", reason, None, "ab" * 32
    )


def ledger_row(counts: dict[str, dict[str, int]], reason: str = "stop", **changes) -> LedgerRow:
    row = LedgerRow(f"ledger {counts}", "run-1", "", T0, reason, counts, (), "ab" * 32)
    return msgspec.structs.replace(row, **changes)


def write_store(
    directory: Path, records: Iterable[Comparison | Decision], flush_every: int = 0
) -> Path:
    writer = StoreWriter(directory)
    for number, record in enumerate(records, 1):
        stream = DECISIONS if isinstance(record, Decision) else COMPARISONS
        writer.append(stream, f"{T0 // 1000}-{number}", encode(record))
        if flush_every and number % flush_every == 0:
            writer.flush()
    writer.flush()
    writer.close()
    return directory


def hand_records() -> list[Comparison | Decision]:
    return [
        run_row(),
        *hand_bars(),
        decision(1, "step", 0, warm=False),
        decision(2, "step", 1),
        decision(3, "step", 1),
        decision(4, "advisory", 5),
        *(v2_row(n) for n in range(1, 5)),
        v2_row(5, -1),
        v2_row(6, None),
        v2_row(7, 0, moves=False),
        pair_row(1, 1, 0, 0.1, 0.1),
        pair_row(2, 1, 1000, -0.1, 0.1),
        pair_row(3, 1, 2000, 0.1, 0.1, warm=False),
        pair_row(4, 1, 9000, 0.1, None),
        pair_row(5, 5, -20_000_000, -0.1, -0.1),
        unpaired_row(1, "v2", "missing_v3"),
        unpaired_row(2, "v3", "missing_v2"),
        unpaired_row(3, "v3", "missing_v2"),
        OutcomeRow("o", "run-1", "AAA", T0, 1, 1.0, 2.0, None, 3.5, "tp", 0.1, 0.0, "ab" * 32),
        ledger_row({"market.tick": {"decided": 2}}, "minute"),
        ledger_row(
            {
                "market.tick": {"decided": 4, "late": 2, "dead_letter": 1},
                "rl_v2.decision": {"consumed": 3, "lost": 5},
            }
        ),
    ]


@pytest.fixture(scope="module")
def hand_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("hand"), hand_records())


@pytest.fixture(scope="module")
def hand(hand_store: Path) -> Report:
    return read_report(hand_store)


# -- numbers ---------------------------------------------------------------------------------------


def test_arm_sums_are_those_of_the_bars(hand: Report) -> None:
    v3, v2, follow_signal, flat = hand.arms
    # AAA 80 - 200 + 0 + 300, BBB 50 - 100
    assert v3.net == pytest.approx(130)
    assert v3.gross == pytest.approx(150)
    assert (v3.fees, v3.slippage, v3.turnover) == pytest.approx((10, 10, 1000))
    assert v3.net_late == pytest.approx(180)  # the second bar's fills a tick later: -150
    assert v3.final_equity == pytest.approx(20_130)
    assert v2.net == pytest.approx(20)
    assert (follow_signal.net, flat.net, flat.final_equity) == (0, 0, 20_000)
    # AAA long, long, flat, short: 2; BBB short, long: 2
    assert v3.entries == 4
    # AAA flat, long, flat, long: 2; BBB short, short: 1
    assert v2.entries == 3
    assert v3.time_in_market == pytest.approx(5 / 6)
    assert (v3.ruined, follow_signal.entries) == ((), 0)


def test_portfolio_equity_is_the_sum_on_a_common_grid(hand: Report) -> None:
    curves = hand.curves
    assert curves.time_us == tuple(T0 + minute * MINUTE for minute in range(5))
    # BBB counts with its capital before its first bar, and with its last value in minute 3
    assert curves.equity["v3"].last == pytest.approx((20_000, 20_080, 19_930, 19_930, 20_130))
    assert curves.equity["flat"].last == (20_000,) * 5
    assert curves.difference.last == pytest.approx((0, 80, -90, -90, 110))
    fall = 150 / 20_080
    assert curves.drawdown["v3"].last == pytest.approx((0, 0, fall, fall, 0), abs=1e-8)
    assert hand.arms[0].max_drawdown == pytest.approx(fall)
    # late: 20,080 then 19,980
    assert hand.arms[0].max_drawdown_late == pytest.approx(100 / 20_080)


def test_agreement_on_warm_bars_is_worked_by_hand(hand: Report) -> None:
    # rows v3 short, flat, long; n = 5; p_o = 3/5; p_e = (2*2 + 1*1 + 2*2)/25 = 9/25
    found = hand.agreement
    assert found.table == ((1, 0, 1), (0, 1, 0), (1, 0, 1))
    assert (found.n, found.raw, found.expected) == (5, 0.6, 0.36)
    assert found.kappa == pytest.approx((0.6 - 0.36) / (1 - 0.36))
    assert found.kappa == 0.375
    assert found.opposite == 0.4


def test_kappa_is_undefined_when_both_always_hold_the_same_side() -> None:
    found = agreement([[0, 0, 0], [0, 7, 0], [0, 0, 0]])
    assert (found.raw, found.expected, found.kappa) == (1.0, 1.0, None)
    assert text.kappa(found.kappa) == "undefined"


def test_kappa_is_zero_when_one_side_never_moves_and_one_when_equal() -> None:
    assert agreement([[0, 2, 0], [0, 5, 0], [0, 3, 0]]).kappa == 0.0
    assert agreement([[4, 0, 0], [0, 0, 0], [0, 0, 9]]).kappa == 1.0


def test_agreement_without_data_states_nothing() -> None:
    found = agreement([[0] * 3] * 3)
    assert (found.n, found.raw, found.expected, found.kappa, found.opposite) == (
        0, None, None, None, None,
    )  # fmt: skip


@given(
    st.lists(st.lists(st.integers(0, 50), min_size=3, max_size=3), min_size=3, max_size=3).filter(
        lambda table: sum(map(sum, table)) > 0
    )
)
def test_kappa_lies_between_minus_one_and_one_and_ignores_who_is_who(
    table: list[list[int]],
) -> None:
    found = agreement(table)
    mirrored = agreement([list(row) for row in zip(*table, strict=True)])
    assert found.kappa == mirrored.kappa
    assert found.kappa is None or -1.0 <= found.kappa <= 1.0


def test_pairs_are_grouped_by_rule_with_their_deltas(hand: Report) -> None:
    first, fifth = hand.pairs
    assert (first.rule, first.pairs, first.undirected, first.cold) == (1, 4, 1, 1)
    assert first.delta_ms == (0.0, 0.0, 1.0, 9.0, 9.0)
    # compared: (long, long) and (short, long): p_o = 1/2, p_e = (1*0 + 1*2)/4 = 1/2
    assert (first.agreement.n, first.agreement.raw, first.agreement.kappa) == (2, 0.5, 0.0)
    assert (fifth.rule, fifth.pairs, fifth.delta_ms[2]) == (5, 1, -20_000.0)
    assert (fifth.agreement.raw, fifth.agreement.kappa) == (1.0, None)


def test_unpaired_actions_outcomes_and_v2_are_counted(hand: Report) -> None:
    assert [(row.side, row.reason, row.decisions) for row in hand.health.unmatched] == [
        ("v2", "missing_v3", 1), ("v3", "missing_v2", 2),
    ]  # fmt: skip
    mix = hand.actions
    assert mix.steps == (1, 2, 0, 0, 0, 0)
    assert mix.advisory == (0, 0, 0, 0, 0, 1)
    assert (mix.steps_cold, mix.advisory_cold) == (1, 0)
    (source,) = hand.v2
    assert (source.decisions, source.long, source.flat, source.short) == (7, 4, 1, 1)
    assert (source.undirected, source.moves_arm) == (1, 6)
    assert (hand.outcomes.closes, hand.outcomes.with_profit) == (1, 1)
    page = render.html(hand, NOW)
    assert "<strong>Real closes:</strong> 1 in the period, 1 of them with profit or loss;" in page


def test_header_names_policy_run_and_opponent(hand: Report) -> None:
    assert hand.run.run_id == "run-1"
    assert hand.run.policy_digest == "ab" * 32
    assert hand.run.training["reward"] == "net_return"
    assert [(o.name, o.bars) for o in hand.run.opponents] == [("local_reference", 6)]
    assert (hand.period.start_us, hand.period.end_us) == (T0, T0 + 4 * MINUTE)
    assert (hand.verdict.text, hand.verdict.exit_code) == ("exploratory", 0)
    assert hand.verdict.why.startswith("No verdict: nothing is registered")


# -- health ----------------------------------------------------------------------------------------


def test_funnel_is_the_last_ledger_row_and_its_sums_hold(hand: Report) -> None:
    ticks, v2 = hand.health.streams
    assert (ticks.stream, ticks.read, ticks.lost) == ("market.tick", 7, None)
    assert ticks.outcomes == {"decided": 4, "late": 2, "dead_letter": 1}
    assert (v2.read, v2.lost) == (3, 5)
    assert [check.ok for check in hand.health.checks] == [True] * len(hand.health.checks)
    assert hand.notices == ()


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ({"market.tick": 0, "rl_v2.decision": 0}, "0"),  # Redis 7, and nothing is missing
        ({"market.tick": 1_200, "rl_v2.decision": 3}, "1,203"),
        ({}, "not counted"),  # Redis 6.2
        ({"rl_v2.decision": 3}, "≥ 3"),
        ({"rl_v2.decision": 0}, "not counted everywhere"),
    ],
)
def test_losses_are_said_as_far_as_they_are_counted(
    tmp_path: Path, lost: dict[str, int], said: str
) -> None:
    counts = {"market.tick": {"decided": 4}, "rl_v2.decision": {"consumed": 3}}
    ledger = ledger_row({name: n | {"lost": lost[name]} if name in lost else n
                         for name, n in counts.items()})  # fmt: skip
    report = read_report(write_store(tmp_path, [*hand_records()[:-1], ledger]))
    assert report.health.lost_text == said
    assert f"lost {said}, late 0" in "\n".join(summary(report))
    assert f"trimmed before they were read: {said}" in render.html(report, NOW)


def failed(report: Report) -> list[str]:
    return [check.name for check in report.health.checks if not check.ok]


def test_ledger_that_does_not_add_up_is_reported(tmp_path: Path) -> None:
    ledger = ledger_row({"market.tick": {"read": 9, "decided": 4}})
    report = read_report(write_store(tmp_path, [*hand_records()[:-1], ledger]))
    assert failed(report) == ["entries read = sum of their outcomes"]
    assert any("9 read, 4 accounted for" in notice for notice in report.notices)


def test_decisions_missing_from_the_store_are_reported(tmp_path: Path) -> None:
    ledger = ledger_row({"market.tick": {"decided": 6}})
    bars = hand_bars()
    bars[0] = msgspec.structs.replace(bars[0], step_decision_id="nowhere")
    records = [run_row(), *bars, decision(1, "step", 0), v2_row(1), ledger]
    assert failed(read_report(write_store(tmp_path, records))) == [
        "every decision the ledger counts is in the store",
        "the step decision of every bar is in the store",
    ]


def test_missing_bars_are_reported(tmp_path: Path) -> None:
    bars = hand_bars()
    del bars[3:5]  # minutes 3 and 4 of AAA
    bars.append(Book("AAA").bar(5, {}, {}, arms={**bars[0].arms, "v3": FLAT, "v2": FLAT}))
    records = [run_row(), *bars, v2_row(1), ledger_row({"market.tick": {"late": 1}})]
    assert failed(read_report(write_store(tmp_path, records))) == [
        "bars follow each other without a hole",
        "change of equity = sum of net profits, every account",
    ]


def test_conflated_entries_must_be_named(tmp_path: Path) -> None:
    named = ledger_row(
        {"market.tick": {"conflated": 2}}, "conflated", entry_ids=("market.tick|1-0",)
    )
    report = read_report(write_store(tmp_path, [*hand_records()[:7], v2_row(1), named]))
    assert failed(report) == ["every conflated entry is named in the ledger"]


def test_incidents_and_unreadable_rows_are_reported(tmp_path: Path) -> None:
    incident = ledger_row({"market.tick": {"decided": 4}}, "corrupt_state", entry_ids=("AAA",))
    store = write_store(tmp_path, [*hand_records()[:-1], incident])
    writer = StoreWriter(store)
    writer.append(COMPARISONS, f"{T0 // 1000}-999", b"no record")
    writer.counts(COMPARISONS)["lost"] = 7
    writer.flush()
    writer.close()
    report = read_report(store)
    assert failed(report) == [
        "no incident in the ledger",
        "the collector lost nothing and could read everything",
    ]
    assert report.health.checks[-2].found == "corrupt_state 1"
    assert report.health.checks[-1].found.startswith("7 entries trimmed")
    assert report.provenance.rejected == 1


# -- stores of another kind ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rl_v2", "why"),
    [
        ("off", "--rl-v2 off"),
        ("bus", "no decision of RL v2 arrived on the bus"),
        ("reference", "no signal reached the RL v2 reference"),
    ],
)
def test_absent_v2_is_called_silent(tmp_path: Path, rl_v2: str, why: str) -> None:
    store = write_store(tmp_path, [run_row(rl_v2=rl_v2), *hand_bars()])
    report = read_report(store)
    assert report.notices[0].startswith("RL v2 is silent")
    assert why in report.notices[0]
    assert "RL v2 is silent" in "\n".join(summary(report))
    assert "RL v2 is silent" in render.html(report, NOW)


def test_v2_that_moves_no_arm_is_said_to_stay_flat(tmp_path: Path) -> None:
    store = write_store(tmp_path, [run_row(), *hand_bars(), v2_row(1, moves=False)])
    assert "none of its decisions moves the v2 arm" in read_report(store).notices[0]


def test_self_play_is_named(tmp_path: Path) -> None:
    assert "Self-play" in read_report(write_store(tmp_path, [run_row(rl_v2="v3")])).notices[0]


def test_store_without_bars_has_no_curves_but_a_report(tmp_path: Path) -> None:
    report = read_report(write_store(tmp_path, [run_row()]))
    assert report.curves.time_us == ()
    assert (report.agreement.kappa, report.arms[0].time_in_market) == (None, None)
    assert any("No bar has closed yet" in notice for notice in report.notices)
    assert "no closed bar" in "\n".join(summary(report))
    assert balanced(render.html(report, NOW))


def test_newest_run_is_reported_and_others_are_named(tmp_path: Path) -> None:
    old = [run_row("old"), *hand_bars("old")]
    new = [run_row("new", policy_digest="99" * 32), *hand_bars("new")[:1]]
    store = write_store(tmp_path, [*old, *new])
    report = read_report(store)
    assert (report.run.run_id, report.run.other_runs) == ("new", ("old",))
    assert report.period.bars == 1
    assert any("1 other run(s)" in notice for notice in report.notices)
    assert read_report(store, Ask(run="old")).period.bars == 6
    with pytest.raises(DataError, match="expected one of the runs old, new, found nothing-like-it"):
        read_report(store, Ask(run="nothing-like-it"))


def test_run_without_its_own_row_is_reported_from_its_bars(tmp_path: Path) -> None:
    report = read_report(write_store(tmp_path, hand_bars()))
    assert (report.run.policy_digest, report.run.rl_v2) == ("ab" * 32, None)
    assert report.arms[0].net == pytest.approx(130)


def test_second_run_starts_from_its_capital_again(tmp_path: Path) -> None:
    """Accounts go on when the policy is swapped; the profit of the former run is not the new's."""
    book = Book("AAA", "new")
    book.equity["v3"] = 12_345.0
    bars = [book.bar(1, {"gross": 0.01}, {}), book.bar(2, {}, {})]
    report = read_report(write_store(tmp_path, [run_row("new"), *bars]))
    assert report.curves.equity["v3"].last == pytest.approx((10_000, 10_100, 10_100))
    assert "change of equity = sum of net profits, every account" not in failed(report)


def test_empty_and_foreign_directories_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a store"):
        read_report(tmp_path / "absent")
    (tmp_path / "position.json").write_text("[]")
    with pytest.raises(DataError, match="not readable"):
        read_report(tmp_path)
    writer = StoreWriter(tmp_path / "empty")
    writer.flush()
    writer.close()
    with pytest.raises(DataError, match="expected a store"):
        read_report(tmp_path / "empty")


def test_damaged_segment_is_one_sentence(tmp_path: Path) -> None:
    store = write_store(tmp_path, hand_records())
    next(store.glob("bars/**/*.parquet")).write_bytes(b"PAR1 no longer")
    with pytest.raises(DataError, match=r"bars|segment"):
        read_report(store)


# -- long series -----------------------------------------------------------------------------------


def generated(symbols: int, bars: int) -> duckdb.DuckDBPyConnection:
    """Return tables as a store has them, filled by DuckDB: every account wanders and trades."""
    db = duckdb.connect()
    for name, table in TABLES.items():
        columns = ", ".join(f'"{column}" {kind}' for column, (kind, _) in table.columns.items())
        late = ", event_ts_us BIGINT" if name == "decisions" else ""
        db.execute(f"CREATE TABLE {name} ({columns}{late})")
    db.execute("CREATE TABLE rejected (stream_id VARCHAR)")
    arms = ", ".join(
        f"""sign(sin({k} * minute + s)) * 0.1 AS {arm}_exposure,
            sin({k} * minute * s) * 1e-3 AS {arm}_gross, 0.2 AS {arm}_turnover,
            8e-5 AS {arm}_fee, 2e-5 AS {arm}_slippage, 0.0 AS {arm}_gross_late,
            0.0 AS {arm}_equity, false AS {arm}_ruined"""
        for k, arm in ((0.11, "v3"), (0.07, "v2"), (0.05, "follow_signal"))
    )
    db.execute(
        f"""
        INSERT INTO bars BY NAME
        SELECT 'run-1' AS run_id, minute || '-' || s AS stream_id, {T0} + minute * {MINUTE}
               AS event_ts_us, 'SYMBOL' || s AS symbol,
               100.0 + sin(minute) AS close, true AS warm, false AS gap,
               false AS restarted, 0 AS empty_after, 1 AS schema_version,
               ['TREND', 'RANGE', NULL][minute // 100 % 3 + 1] AS regime,
               'local_reference' AS opponent, {CAPITAL} AS flat_equity, 0.0 AS flat_exposure,
               0.0 AS flat_gross, 0.0 AS flat_turnover, 0.0 AS flat_fee, 0.0 AS flat_slippage,
               0.0 AS flat_gross_late, false AS flat_ruined, {arms}
        FROM range(1, {bars} + 1) AS t(minute), range(1, {symbols} + 1) AS u(s)
        """
    )
    return db


@pytest.fixture(scope="module")
def month() -> Report:
    return summarise(generated(5, 30 * 1440))


def test_month_of_five_symbols_makes_a_small_page(month: Report) -> None:
    page = render.html(month, NOW)
    assert month.period.bars == 5 * 30 * 1440
    assert len(page.encode()) < 1_000_000
    assert balanced(page)


def test_bucketed_curve_keeps_ends_and_extremes(month: Report) -> None:
    equity = month.curves.equity["v3"]
    assert month.curves.bucketed
    assert len(month.curves.time_us) == len(equity.last) == BUCKETS
    minutes, numbers = np.meshgrid(np.arange(1, 30 * 1440 + 1), np.arange(1, 6), indexing="ij")
    net = (np.sin(0.11 * minutes * numbers) * 1e-3 - 1e-4).sum(axis=1) * CAPITAL
    expected = np.concatenate([[0.0], np.cumsum(net)]) + 5 * CAPITAL
    assert equity.last[0] == 5 * CAPITAL
    assert equity.last[-1] == pytest.approx(expected[-1])
    assert (min(equity.low), max(equity.high)) == pytest.approx((expected.min(), expected.max()))
    assert month.curves.time_us[-1] == T0 + 30 * 1440 * MINUTE
    peak = np.maximum.accumulate(expected)
    assert month.arms[0].max_drawdown == pytest.approx(((peak - expected) / peak).max())


def test_series_just_above_the_limit_has_every_point_in_one_bucket() -> None:
    for bars in (BUCKETS - 1, BUCKETS, BUCKETS + 1, 2 * BUCKETS + 7):
        curves = summarise(generated(1, bars)).curves
        assert curves.bucketed == (bars + 1 > BUCKETS)
        assert list(curves.time_us) == sorted(set(curves.time_us))
        assert curves.time_us[0] == T0
        assert curves.time_us[-1] == T0 + bars * MINUTE


# -- what is rendered ------------------------------------------------------------------------------

VOID = {"meta", "br", "link", "img", "input", "hr"}
SHAPES = {"path", "circle", "rect"}  # SVG's self-closing ones


class Page(HTMLParser):
    """Collects tags, attributes and text, and whether every tag is closed where it should be."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[set[str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append(set())
        elif self.tables:
            self.tables[-1].add(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in SHAPES:
            self.wrong.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def parse(page: str) -> Page:
    parser = Page()
    parser.feed(page)
    parser.close()
    return parser


def balanced(page: str) -> bool:
    parser = parse(page)
    return not parser.open and not parser.wrong


def test_page_is_well_formed_and_asks_for_nothing(hand: Report) -> None:
    page = render.html(hand, NOW)
    assert balanced(page)
    assert "http:" not in page
    assert "https:" not in page
    parser = parse(page)
    names = {tag for tag, _ in parser.tags}
    assert not names & {"link", "img", "iframe", "object", "embed", "base", "form"}
    (data,) = (attributes for tag, attributes in parser.tags if tag == "script")
    assert data == {"type": "application/json", "id": "report-json"}  # data, nothing that runs
    for _, attributes in parser.tags:
        assert "src" not in attributes
        assert attributes.get("href", "#").startswith("#")
        assert not any(name.startswith("on") for name in attributes)
    policy = [a["content"] for t, a in parser.tags if a.get("http-equiv")]
    assert policy[0].startswith("default-src 'none'")
    assert "url(" not in page
    assert "@import" not in page


def test_tables_have_captions_and_headings_have_scopes(hand: Report) -> None:
    parser = parse(render.html(hand, NOW))
    assert len(parser.tables) >= 10
    assert all("caption" in found for found in parser.tables)
    assert all(a.get("scope") in ("row", "col") for tag, a in parser.tags if tag == "th")
    anchors = {a["href"][1:] for tag, a in parser.tags if tag == "a"}
    assert anchors <= {a["id"] for tag, a in parser.tags if a.get("id")}
    assert all(a.get("aria-label") for tag, a in parser.tags if a.get("role") == "img")


def test_page_shows_the_curves_of_all_arms(hand: Report) -> None:
    page = render.html(hand, NOW)
    equity = page[page.index("Equity of the four arms") : page.index("Portfolio equity")]
    for arm in ("v3", "v2", "follow_signal", "flat"):
        assert f'class="line arm-{arm}"' in equity


def test_page_says_what_is_not_modelled_and_claims_nothing(hand: Report) -> None:
    page = render.html(hand, NOW)
    for name in ("funding", "market impact", "queue position", "partial fills", "leverage"):
        assert name in page
    assert "No verdict: nothing is registered" in page


def test_names_from_the_bus_are_escaped(tmp_path: Path) -> None:
    symbol = "<script>alert(1)</script>"
    bars = [Book(symbol).bar(1, {}, {}, opponent="<b>&\"'")]
    page = render.html(read_report(write_store(tmp_path, [run_row(), *bars])), NOW)
    assert page.count("<script") == 1  # the JSON
    assert "alert(1)</script>" not in page
    assert "&lt;script&gt;" in page
    assert balanced(page)


def test_equal_inputs_give_equal_bytes_apart_from_the_time_of_writing(hand_store: Path) -> None:
    first, again = read_report(hand_store), read_report(hand_store)
    assert render.html(first, NOW) == render.html(again, NOW)
    assert render.json(first, NOW) == render.json(again, NOW)
    body, footer = render.html(first, NOW).split("<footer>")
    assert body == render.html(again, LATER).split("<footer>")[0]
    assert "2026-01-02 03:04:05 UTC" in footer


def test_numbers_do_not_depend_on_how_rows_were_cut_into_segments(
    hand: Report, tmp_path: Path
) -> None:
    other = read_report(write_store(tmp_path, hand_records(), flush_every=3))
    assert other.provenance.input_sha256 != hand.provenance.input_sha256
    same = msgspec.structs.replace(other, provenance=hand.provenance)
    assert msgspec.json.encode(same) == msgspec.json.encode(hand)


def test_terminal_fits_and_agrees_with_the_json(hand: Report) -> None:
    files = Files(Path("report.html"), Path("report.json"))
    lines = summary(hand, files)
    assert len(lines) <= 24
    assert all(len(line) <= 80 for line in lines)
    assert lines[0].endswith("exploratory")
    assert lines[1].startswith("No verdict: nothing is registered")
    said = {line[:23].strip(): line[23:].split() for line in lines}
    report = json.loads(render.json(hand, NOW))["report"]
    arms = report["arms"]
    assert said["net profit"] == [f"{arm['net']:+,.2f}" for arm in arms]
    assert said["net profit"][0] == "+130.00"
    assert said["max drawdown"][0] == f"{100 * arms[0]['max_drawdown']:.3f}"
    shown = "\n".join(lines)
    found = report["behaviour"]["confusion"]
    assert found["n"] == 5
    assert f"Agree {100 * found['raw']['value']:.1f} % of 5 warm bars" in shown
    assert f"kappa {found['kappa']['value']:.3f}" in shown
    # six pairs due: five made, one of RL v2's decisions stayed alone
    assert "Data ok: matched 83.33 %, lost ≥ 5, late 2, dup 0, dead 1, gap bars 0" in shown


def test_terminal_fits_in_the_worst_case(tmp_path: Path) -> None:
    ledger = ledger_row({"market.tick": {"read": 10**12, "decided": 10**12}})
    store = write_store(
        tmp_path, [run_row("old"), run_row(), *hand_bars(), *hand_bars("zzz"), ledger]
    )
    lines = summary(read_report(store), Files(Path("a"), Path("b")))
    assert len(lines) <= 24
    assert all(len(line) <= 80 for line in lines)
    assert sum(line.startswith("! ") for line in lines) == 2


def test_json_hash_covers_the_report_and_not_the_time(hand: Report) -> None:
    first = json.loads(render.json(hand, NOW))
    second = json.loads(render.json(hand, LATER))
    assert first["generated_at"] == "2026-01-02T03:04:05Z"
    assert first["report_sha256"] == second["report_sha256"] == render.digest(hand)
    assert first["report"] == second["report"]


def test_report_cannot_be_written_into_a_file(hand: Report, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(ConfigError, match="expected a directory"):
        render.write(hand, tmp_path / "taken", NOW)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 10.0, [0.0, 2.5, 5.0, 7.5, 10.0]),
        (-3.0, 9.0, [-5.0, 0.0, 5.0, 10.0]),
        (20_000.0, 20_000.0, [19_980, 19_990, 20_000, 20_010, 20_020]),
        (0.0, 0.0, [-1.0, -0.5, 0.0, 0.5, 1.0]),
    ],
)
def test_value_axis_is_round_and_covers_the_data(
    low: float, high: float, ticks: list[float]
) -> None:
    assert charts.value_ticks(low, high)[0] == pytest.approx(ticks)


@pytest.mark.parametrize(
    ("step", "digits"), [(500.0, 0), (2.5, 1), (1.0, 0), (0.25, 2), (0.1, 1), (2.5e-3, 4)]
)
def test_axis_labels_are_not_rounded(step: float, digits: int) -> None:
    assert charts.places(step) == digits


@settings(max_examples=200, deadline=None)
@given(st.floats(-1e9, 1e9), st.floats(0, 1e6))
def test_value_axis_always_covers_the_data(low: float, span: float) -> None:
    ticks, step = charts.value_ticks(low, low + span)
    slack = 1e-6 * step + 1e-9 * abs(low)
    assert ticks[0] <= low + slack
    assert ticks[-1] >= low + span - slack
    assert 2 <= len(ticks) <= 8


def test_time_axis_uses_round_utc_times() -> None:
    labels = charts.time_ticks(T0 - 2 * MINUTE, T0 + 118 * MINUTE)
    assert [label for _, label in labels] == [
        "11-15 00:00", "00:15", "00:30", "00:45", "01:00", "01:15", "01:30", "01:45",
    ]  # fmt: skip
    days = charts.time_ticks(T0, T0 + 30 * 1440 * MINUTE)
    assert len(days) <= 9
    assert all(at % (1440 * MINUTE) == 0 for at, _ in days)


# -- the command -----------------------------------------------------------------------------------


def shadow(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    program = "from shadow.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_report_command_writes_three_forms_and_exits_0(hand_store: Path, tmp_path: Path) -> None:
    done = shadow("report", "--store", hand_store, "--out", tmp_path / "out", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "No verdict: nothing is registered" in done.stdout
    assert len(done.stdout.splitlines()) <= 24
    page = (tmp_path / "out" / "report.html").read_text()
    assert balanced(page)
    saved = json.loads((tmp_path / "out" / "report.json").read_text())
    assert saved["report"]["arms"][0]["entries"] == 4


def test_report_command_prints_json_alone(hand_store: Path, tmp_path: Path) -> None:
    done = shadow("report", "--store", hand_store, "--json", cwd=tmp_path)
    assert done.returncode == 0
    assert json.loads(done.stdout)["report"]["run"]["run_id"] == "run-1"
    assert list(tmp_path.iterdir()) == []


def test_report_command_on_no_store_is_one_sentence_and_exits_2(tmp_path: Path) -> None:
    done = shadow("report", "--store", tmp_path / "absent", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: expected a store")
    assert "Traceback" not in done.stderr
    assert shadow("report", cwd=tmp_path).returncode == 2


def write_csv(path: Path, n_bars: int) -> Path:
    bars = simulate("regime_switching", n_bars, seed=7, symbol="BTCUSDT")
    rows = [
        f"{end // 1_000_000},{o},{h},{low},{c},{v}"
        for end, o, h, low, c, v in zip(
            bars.end_us, bars.open, bars.high, bars.low, bars.close, bars.volume, strict=True
        )
    ]
    path.write_text("\n".join(["timestamp,open,high,low,close,volume", *rows, ""]))
    return path


def test_backtest_command_reports_v3_against_itself(
    make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    (tmp_path / "policy.safetensors").write_bytes(make_policy(seed=1, scale=1.0).source)
    data = write_csv(tmp_path / "BTCUSDT.csv", 90)
    command = ("backtest", "--policy", "policy.safetensors", "--data", data, "--self")
    done = shadow(*command, "--json", "--store", "rows", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)["report"]
    v3, v2 = report["arms"][:2]
    assert {**v3, "name": "v2"} == v2
    assert set(report["curves"]["difference"]["last"]) == {0.0}
    assert report["health"]["checks"][0]["ok"]
    assert "Self-play" in report["notices"][0]
    again = shadow("report", "--store", "rows", "--json", cwd=tmp_path)
    assert json.loads(again.stdout)["report"] == report
    absent = shadow("backtest", "--policy", "none.safetensors", "--data", data, cwd=tmp_path)
    assert absent.returncode == 2
    assert absent.stderr.startswith("error: ")
