"""What a registered test concludes, from stores whose answer is known."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import numpy as np
import pytest

from rlv3.errors import ConfigError, DataError, UserError
from rlv3.events import ACTION_TABLE
from rlv3.policy import shipped_policy
from shadow.evaluation import gates as gates_
from shadow.evaluation.behaviour import CLASSES, EXTREMES
from shadow.evaluation.effect import Range
from shadow.evaluation.gates import Gate, Measured, Result, check, read_gates
from shadow.evaluation.measures import Counted, measures
from shadow.evaluation.register import Terms, register
from shadow.evaluation.registration import Frozen, Registration, align, read_registrations
from shadow.evaluation.streaming import Keeper, Statistics, read_state
from shadow.evaluation.verdict import find, judge, primary_gate
from shadow.records import (
    ArmBar,
    BarRow,
    Comparison,
    LedgerRow,
    PairRow,
    RunRow,
    UnpairedRow,
    V2Row,
    encode,
)
from shadow.reporting import render
from shadow.reporting.question import Ask
from shadow.reporting.report import Report, read_report
from shadow.rl_v2 import QTables
from shadow.statistics.multiplicity import version_level
from shadow.statistics.sequential import Look
from shadow.store import COMPARISONS, StoreReader, StoreWriter

HOUR = 3_600_000_000
T0 = 1_700_006_400_000_000  # 2023-11-15T00:00:00Z
CAPITAL = 10_000.0
NOW = datetime(2023, 11, 15, tzinfo=UTC)
FLAT = ArmBar(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, CAPITAL, False)
BARS = 24 * 40
Change = Callable[[BarRow], BarRow]


def run_row(**changes: object) -> RunRow:
    row = RunRow(
        record_id="run", run_id="run-1", symbol="", event_ts_us=T0, policy_digest="ab" * 32,
        feature_digest="cd" * 32, action_table=ACTION_TABLE, training={"reward": "net_return"},
        rl_v2="bus", tables_digest=None,
        settings={"initial_balance": CAPITAL, "fee_rate": 4e-4, "step_seconds": 3600.0},
    )  # fmt: skip
    return msgspec.structs.replace(row, **changes)


EXPOSURES = {
    "v3": (0.1, 0.1, 0.05, 0.0, 0.0, -0.1, -0.05),
    "v2": (0.1, 0.05, 0.05, 0.0, -0.1, -0.1, 0.0, 0.1),
}
"""By hour, again and again: every class of change and every pair of sides occurs."""


def bars(edge: float = 0.0, *, noise: float = 1e-3, seed: int = 0, n: int = BARS) -> list[BarRow]:
    """Two symbols in hourly bars; v3 earns `edge` a bar more than v2, in noise that both share."""
    rng = np.random.default_rng(seed)
    rows = []
    equity = {(symbol, arm): CAPITAL for symbol in "AB" for arm in ("v3", "v2")}
    for hour in range(1, n + 1):
        for symbol in "AB":
            common, own = rng.normal(0.0, noise, 2).tolist()
            arms = {}
            for arm, gross in (("v3", common + own + edge), ("v2", common)):
                equity[symbol, arm] += CAPITAL * (gross - 2e-5)
                held = EXPOSURES[arm][hour % len(EXPOSURES[arm])]
                exposure = held * CAPITAL / equity[symbol, arm]  # the quantity is what is held
                arms[arm] = ArmBar(
                    exposure, gross, 0.02, 1e-5, 1e-5, gross, equity[symbol, arm], False
                )
            rows.append(
                BarRow(
                    record_id=f"bar {symbol} {hour}", run_id="run-1", symbol=symbol,
                    event_ts_us=T0 + hour * HOUR, open=1.0, high=1.0, low=1.0, close=1.0,
                    volume=None, empty_after=0, restarted=False, gap=False, warm=True,
                    regime=("TREND", "RANGE")[hour // 24 % 2], bus_regime=None,
                    arms={**arms, "follow_signal": FLAT, "flat": FLAT}, opponent="q_table",
                    opponent_digest=None, step_decision_id=None, obs=(0.0,) * 64, missing_mask=0,
                    policy_digest="ab" * 32,
                )
            )  # fmt: skip
    return rows


def pair(number: int) -> list[Comparison]:
    at = T0 + (number + 1) * HOUR
    v2 = V2Row(
        record_id=f"v2 {number}", run_id="run-1", symbol="AB"[number % 2], event_ts_us=at,
        source_stream="rl_v2.decision", source_entry_id=f"{number}-0", trace_id="",
        correlation_id="", decision_id=f"q{number}", opponent="q_table", opponent_digest=None,
        decision_kind="combined", strategy=None, model=None, weight=1.0, size_multiplier=1.0,
        multiplier_assumed=False, leverage=5.0, base_direction=1, signal_confidence=0.7,
        effective_confidence=0.7, direction=1, target=0.1, moves_arm=True,
        policy_digest="ab" * 32,
    )  # fmt: skip
    row = PairRow(
        record_id=f"pair {number}", run_id="run-1", symbol=v2.symbol, event_ts_us=at,
        v2_decision_id=v2.decision_id, v3_decision_id=f"d{number}", rule=1, delta_us=0,
        opponent="q_table", opponent_digest=None, v3_kind="advisory",
        v3_event_type="signal.generated", v3_action=0, v3_action_name="HOLD", v3_confidence=0.5,
        v3_exposure=0.1, v3_target=0.1, v2_direction=1, v2_exposure=0.1, agree=True, warm=True,
        policy_digest="ab" * 32,
    )  # fmt: skip
    return [v2, row]


def swapped(row: BarRow) -> BarRow:
    """The same bar with the roles of v3 and v2 exchanged."""
    arms = {**row.arms, "v3": row.arms["v2"], "v2": row.arms["v3"]}
    return msgspec.structs.replace(row, arms=arms)


def holding_on(row: BarRow) -> BarRow:
    """The same bar with both policies long, as ever."""
    arms = {arm: msgspec.structs.replace(row.arms[arm], exposure=0.1) for arm in ("v3", "v2")}
    return msgspec.structs.replace(row, arms={**row.arms, **arms})


def records(rows: Sequence[BarRow], run: RunRow | None = None) -> list[Comparison]:
    ledger = LedgerRow("ledger", "run-1", "", T0, "stop", {"t": {"late": 0, "lost": 0}}, (), "a")
    paired = [record for number in range(400) for record in pair(number)]
    return [run or run_row(), *rows, *paired, ledger]


def write(store: Path, rows: Sequence[Comparison]) -> Path:
    writer = StoreWriter(store)
    for number, record in enumerate(rows, 1):
        writer.append(COMPARISONS, f"{T0 // 1000}-{number}", encode(record))
    writer.flush()
    writer.close()
    return store


TERMS = Terms(symbols=("A", "B"), start_us=T0, batch_bars=4, horizon=240, max_days=60)


def registered(store: Path, terms: Terms = TERMS, run: RunRow | None = None) -> Registration:
    return register(store, terms, now=NOW, frozen=Frozen.of(run or run_row()))[0]


def concluded(
    store: Path, rows: Sequence[BarRow], terms: Terms = TERMS, run: RunRow | None = None
) -> Report:
    registered(store, terms, run)
    return read_report(write(store, records(rows, run)))


@pytest.fixture(scope="module")
def better(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return concluded(tmp_path_factory.mktemp("better"), bars(4e-4))


@pytest.fixture(scope="module")
def worse(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return concluded(tmp_path_factory.mktemp("worse"), [swapped(row) for row in bars(4e-4)])


# -- conclusions -----------------------------------------------------------------------------------


def test_clear_edge_with_every_gate_passed_is_promoted(better: Report) -> None:
    assert [gate.name for gate in better.gates if gate.blocks] == []
    assert (better.verdict.text, better.verdict.exit_code) == ("PROMOTE", 10)
    assert better.finding == "superior"
    # 4e-4 a bar, 24 bars a day
    assert better.effect.sequence.value == pytest.approx(96.0, abs=10.0)
    assert (better.effect.batches, better.effect.days) == (239, pytest.approx(239 / 6))


def mirrors(one: Range | Range, other: Range | Range) -> bool:
    """Tell whether two intervals are each other's negatives, bit for bit."""
    ends = (one.value, one.low, one.high)
    negated = (other.value, other.high, other.low)
    return ends == tuple(None if end is None else -end for end in negated)


def test_swapped_roles_mirror_the_effect_and_the_finding(better: Report, worse: Report) -> None:
    one, other = better.effect, worse.effect
    for name in ("sequence", "one_look", "groups", "strict"):
        assert mirrors(getattr(one, name), getattr(other, name)), name
    signed = {"sequence", "one_look", "groups", "strict", "history"}
    for name in set(one.__struct_fields__) - signed:
        assert getattr(one, name) == getattr(other, name), name
    assert one.history.time_us == other.history.time_us
    assert one.history.mean == tuple(-mean for mean in other.history.mean)
    assert one.history.low == tuple(-high for high in other.history.high)
    assert one.history.high == tuple(-low for low in other.history.low)
    assert (better.finding, worse.finding) == ("superior", "inferior")
    assert (worse.verdict.text, worse.verdict.exit_code) == ("REJECT", 20)


def test_swapped_roles_mirror_arms_curves_and_metrics(better: Report, worse: Report) -> None:
    v3, v2, *rivals = better.arms
    assert (v3.name, v2.name) == ("v3", "v2")
    renamed = [msgspec.structs.replace(arm, name=name) for arm, name in ((v2, "v3"), (v3, "v2"))]
    assert list(worse.arms) == [*renamed, *rivals]
    for name in ("equity", "drawdown"):
        one, other = getattr(better.curves, name), getattr(worse.curves, name)
        assert (one["v3"], one["v2"]) == (other["v2"], other["v3"])
    drawn, negated = better.curves.difference, worse.curves.difference
    for end, opposite in (("last", "last"), ("low", "high"), ("high", "low")):
        assert getattr(drawn, end) == tuple(-x for x in getattr(negated, opposite))
    for row, mirrored in zip(better.metrics, worse.metrics, strict=True):
        assert (row.v3, row.v2) == (mirrored.v2, mirrored.v3)
        assert mirrors(row.difference, mirrored.difference)


def test_swapped_roles_mirror_slices_and_sensitivity(better: Report, worse: Report) -> None:
    for row, mirrored in zip(better.slices, worse.slices, strict=True):
        assert mirrors(row.effect, mirrored.effect)
        unsigned = msgspec.structs.replace(row, effect=mirrored.effect)
        assert unsigned == mirrored
    one, other = better.sensitivity, worse.sensitivity
    for name in ("at_once", "one_tick_later"):
        cells = zip(getattr(one.grid, name), getattr(other.grid, name), strict=True)
        assert all(mirrors(*pair) for pair in cells)
    assert all(mirrors(a.effect, b.effect) for a, b in zip(one.without, other.without, strict=True))
    variants = [
        {item.name: item.effect for item in (*found.rivals, *found.variants)}
        for found in (one, other)
    ]
    # scaling v3 to v2's risk is not the same as scaling v2 to v3's
    for name in ("v3 − v2", "first half", "second half"):
        assert mirrors(variants[0][name], variants[1][name]), name
    assert variants[0]["v3 − flat"] == variants[1]["v2 − flat"]


def test_swapped_roles_mirror_behaviour(better: Report, worse: Report) -> None:
    one, other = better.behaviour, worse.behaviour
    for name in ("table", "exposure_table"):
        table, transposed = getattr(one.confusion, name), getattr(other.confusion, name)
        assert table == tuple(zip(*transposed, strict=True))
    for name in ("n", "batches", "raw", "kappa", "ac1", "weighted_kappa"):
        assert getattr(one.confusion, name) == getattr(other.confusion, name), name
    assert one.confusion.kappa.value is not None
    assert 0.0 < one.confusion.kappa.value < 1.0
    for name in ("cells", "sides"):
        found = {(cell.v3, cell.v2): cell for cell in getattr(one, name)}
        opposite = {(cell.v2, cell.v3): cell for cell in getattr(other, name)}
        assert found.keys() == opposite.keys()
        assert len(found) > 3
        for key, cell in found.items():
            assert (cell.bars, cell.total) == (opposite[key].bars, -opposite[key].total)
            assert mirrors(cell.mean_bps, opposite[key].mean_bps), key
    (_, mine, others), (_, theirs, ours) = one.drifts, other.drifts  # the first is of steps
    for drift, mirrored in ((mine, ours), (others, theirs)):
        assert msgspec.structs.replace(drift, what=mirrored.what) == mirrored
    for name in ("holding", "exposure"):
        v3, v2 = getattr(one, name)
        assert getattr(other, name) == (
            msgspec.structs.replace(v2, arm="v3"), msgspec.structs.replace(v3, arm="v2"),
        )  # fmt: skip
    assert len(one.worst) == len(one.best) == EXTREMES
    for found, mirrored in ((one.worst, other.best), (one.best, other.worst)):
        for item, opposite_item in zip(found, mirrored, strict=True):
            assert item == msgspec.structs.replace(
                opposite_item, v3=item.v3, v2=item.v2, difference=-opposite_item.difference
            )
            assert (item.v3, item.v2) == (opposite_item.v2, opposite_item.v3)
    counts, turned = better.agreement, worse.agreement
    assert counts.table == tuple(zip(*turned.table, strict=True))
    assert msgspec.structs.replace(counts, table=turned.table) == turned


def test_v3_against_itself_differs_nowhere_and_is_kept(tmp_path: Path) -> None:
    rows = [
        msgspec.structs.replace(row, arms={**row.arms, "v2": row.arms["v3"]}, opponent="v3")
        for row in bars(4e-4)
    ]
    report = concluded(tmp_path, rows, run=run_row(rl_v2="v3"))
    curve = report.curves.difference
    assert {*curve.last, *curve.low, *curve.high} == {0.0}
    assert report.effect.nonzero == 0
    assert (report.effect.sequence.value, report.effect.sd) == (0.0, 0.0)
    assert {row.difference for row in report.metrics} == {Range(0.0, 0.0, 0.0)}
    assert {(row.nonzero, row.effect.value) for row in report.slices} == {(0, 0.0)}
    one, behaviour = Range(1.0, 1.0, 1.0), report.behaviour
    found = behaviour.confusion
    assert sum(n > 0 for n in np.diag(found.table)) == len(CLASSES)  # all five occur
    assert (found.raw, found.kappa, found.ac1, found.weighted_kappa) == (one, one, one, one)
    assert (behaviour.cells, behaviour.worst, behaviour.best) == ((), (), ())
    assert {cell.total for cell in behaviour.sides} == {0.0}
    assert (report.agreement.raw, report.agreement.kappa) == (1.0, 1.0)
    assert (report.verdict.text, report.verdict.exit_code) == ("KEEP SHADOWING", 0)
    assert (report.finding, report.verdict.binding) == ("undecided", "superiority")


def test_no_edge_is_kept_with_the_time_it_would_take(tmp_path: Path) -> None:
    report = concluded(tmp_path, bars(0.0))
    assert (report.verdict.text, report.verdict.binding) == ("KEEP SHADOWING", "superiority")
    assert "Not decided yet" in report.verdict.why
    assert report.effect.days_to_decide is None or report.effect.days_to_decide > 30


OURS = QTables.load().digest


def opponent_is_ours(row: BarRow) -> BarRow:
    return msgspec.structs.replace(row, opponent="local_reference", opponent_digest=OURS)


def one_regime(row: BarRow) -> BarRow:
    return msgspec.structs.replace(row, regime="TREND")


def paid_late(row: BarRow) -> BarRow:
    v3 = msgspec.structs.replace(row.arms["v3"], gross_late=row.arms["v3"].gross - 5e-4)
    return msgspec.structs.replace(row, arms={**row.arms, "v3": v3})


@pytest.mark.parametrize(
    ("change", "gate"),
    [
        (opponent_is_ours, "opponent is production's RL v2"),
        (one_regime, "regimes"),
        (paid_late, "edge one tick later"),
    ],
)
def test_edge_alone_does_not_promote(tmp_path: Path, change: Change, gate: str) -> None:
    report = concluded(tmp_path, [change(row) for row in bars(4e-4)])
    assert report.finding == "superior"
    assert (report.verdict.text, report.verdict.binding) == ("KEEP SHADOWING", gate)


def test_policy_trained_with_a_reward_that_is_not_sane_is_kept(tmp_path: Path) -> None:
    run = run_row(training={"reward": "seed"})
    report = concluded(tmp_path, bars(4e-4), run=run)
    assert report.verdict.binding == "training reward audited sane"


def test_fewer_than_14_days_are_kept(tmp_path: Path) -> None:
    report = concluded(tmp_path, bars(1e-3, n=24 * 10))
    assert (report.finding, report.verdict.binding) == ("superior", "days")


def test_three_times_the_turnover_is_rejected(tmp_path: Path) -> None:
    def busy(row: BarRow) -> BarRow:
        v3 = msgspec.structs.replace(row.arms["v3"], turnover=0.06)
        return msgspec.structs.replace(row, arms={**row.arms, "v3": v3})

    report = concluded(tmp_path, [busy(row) for row in bars(4e-4)])
    assert (report.verdict.text, report.verdict.binding) == ("REJECT", "turnover")


def test_failed_data_make_the_verdict_invalid_whatever_the_profit(tmp_path: Path) -> None:
    rows = bars(4e-4)
    del rows[100:140]  # bars that are nowhere
    report = concluded(tmp_path, rows)
    assert (report.verdict.text, report.verdict.exit_code) == ("INVALID", 30)
    assert report.verdict.binding == "data checks"


def test_unmatched_decisions_make_the_verdict_invalid(tmp_path: Path) -> None:
    registered(tmp_path)
    alone: list[Comparison] = []
    for number in range(0, 40, 2):
        decided, _ = pair(number)
        alone += [
            msgspec.structs.replace(decided, record_id=f"alone {number}"),
            UnpairedRow(
                f"u{number}", "run-1", "A", T0 + HOUR, "v2", f"x{number}", "missing_v3", None, "a"
            ),
        ]
    report = read_report(write(tmp_path, [*records(bars(4e-4)), *alone]))
    assert (report.verdict.text, report.verdict.binding) == ("INVALID", "matched decisions")
    # 20 of 220 of A, none of 200 of B: not spread alike
    assert report.health.asymmetry_p is not None
    assert report.health.asymmetry_p < 0.001


def test_non_inferiority_promotes_what_is_equal_within_the_margin(tmp_path: Path) -> None:
    terms = TERMS._replace(mode="non_inferiority", margin=60.0)
    report = concluded(tmp_path, bars(2e-5, noise=4e-4), terms)
    assert (report.finding, report.verdict.text) == ("not inferior", "PROMOTE")
    plain = concluded(tmp_path / "plain", bars(2e-5, noise=4e-4), TERMS._replace(margin=60.0))
    assert (plain.finding, plain.verdict.text) == ("equivalent", "KEEP SHADOWING")


def test_equal_at_the_end_of_the_test_is_rejected(tmp_path: Path) -> None:
    terms = TERMS._replace(margin=60.0, max_days=30)
    report = concluded(tmp_path, bars(2e-5, noise=4e-4), terms)
    assert report.effect.batches == 180  # nothing after 30 days counts
    assert (report.finding, report.verdict.text) == ("equivalent", "REJECT")
    assert "has ended" in report.verdict.why


@pytest.mark.parametrize(
    ("ask", "reason"),
    [
        (Ask(since_us=T0 + HOUR), "--since"),
        (Ask(until_us=T0 + 900 * HOUR), "--until"),
        (Ask(symbols=("A",)), "--symbols"),
        (Ask(run="run-1"), "--run"),
    ],
)
def test_narrowed_report_gives_no_verdict(
    tmp_path_factory: pytest.TempPathFactory, ask: Ask, reason: str
) -> None:
    store = tmp_path_factory.getbasetemp() / "narrowed"
    if not store.exists():
        concluded(store, bars(4e-4))
    report = read_report(store, ask)
    assert (report.verdict.text, report.verdict.exit_code) == ("exploratory", 0)
    assert reason in report.verdict.why


def test_run_with_other_settings_belongs_to_no_registration(tmp_path: Path) -> None:
    registered(tmp_path)
    other = run_row(settings={**run_row().settings, "fee_rate": 1e-4})
    report = read_report(write(tmp_path, records(bars(4e-4), other)))
    assert report.verdict.text == "exploratory"
    assert any("differs from the registered one in settings" in item for item in report.notices)


def test_report_does_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    hourly = TERMS._replace(batch_bars=1, horizon=900)  # batches that BLAS would split
    report = concluded(tmp_path, bars(4e-4, n=720), hourly)
    program = (
        "import sys; from shadow.reporting import render; "
        "from shadow.reporting.report import read_report; "
        "print(render.digest(read_report(sys.argv[1])))"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program, tmp_path],
            env={**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads},
            capture_output=True, text=True, check=True,
        ).stdout.strip()
        for threads in ("1", "2", "7")
    }  # fmt: skip
    assert digests == {render.digest(report)}


# -- registration ----------------------------------------------------------------------------------


def test_registration_is_written_once_and_cannot_change(tmp_path: Path) -> None:
    first = registered(tmp_path)
    assert read_registrations(tmp_path) == (first,)
    for terms in (TERMS, TERMS._replace(batch_bars=8), TERMS._replace(horizon=100)):
        with pytest.raises(UserError, match=f"found {first.id}, which froze batches of 4 bars"):
            registered(tmp_path, terms)
    second = registered(tmp_path, TERMS._replace(again=True, batch_bars=8))
    assert (second.number, second.batch_bars) == (2, 8)
    assert (first.alpha, second.alpha) == (version_level(0.05, 1), version_level(0.05, 2))
    assert read_report(write(tmp_path, records(bars()))).registration.id == second.id  # type: ignore[union-attr]


def test_changed_registration_is_refused(tmp_path: Path) -> None:
    registered(tmp_path)
    (path,) = (tmp_path / "registrations").iterdir()
    path.chmod(0o644)
    path.write_text(path.read_text().replace('"batch_bars":4', '"batch_bars":8'))
    with pytest.raises(DataError, match="found that it was changed"):
        read_registrations(tmp_path)


def test_start_in_data_that_can_be_seen_is_refused(tmp_path: Path) -> None:
    write(tmp_path, records([holding_on(row) for row in bars(n=48)]))
    with pytest.raises(UserError, match="expected a start after the data"):
        registered(tmp_path)
    found = register(tmp_path, TERMS._replace(start_us=None, symbols=None), now=NOW)[0]
    assert found.start_us == align(T0 + 48 * HOUR, 60, HOUR)
    assert found.frozen == Frozen.of(run_row())
    assert found.symbols == ("A", "B")
    # the pilot's positions were held for all of its 24 bars: 48, rounded up
    assert found.pilot is not None
    assert (found.pilot.holding_p90_bars, found.batch_bars) == (24.0, 60)


def test_terms_out_of_range_and_missing_ones_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected --batches of at least 20, found 3"):
        registered(tmp_path, TERMS._replace(horizon=3))
    with pytest.raises(ConfigError, match="expected --margin above 0"):
        registered(tmp_path, TERMS._replace(margin=0.0))
    with pytest.raises(UserError, match="expected a run in"):
        register(tmp_path, TERMS, now=NOW)
    with pytest.raises(UserError, match="expected symbols that count"):
        registered(tmp_path, TERMS._replace(symbols=None))


def test_start_is_aligned_to_whole_batches() -> None:
    assert align(T0 + 1, 4, HOUR) == T0 + 4 * HOUR
    assert align(T0, 4, HOUR) == T0


# -- streaming -------------------------------------------------------------------------------------


@pytest.fixture
def rows() -> list[Comparison]:
    return records(bars(2e-4, seed=5, n=400))


def test_statistics_row_by_row_are_those_of_the_report(
    tmp_path: Path, rows: list[Comparison]
) -> None:
    statistics = Statistics(registered(tmp_path))
    for record in rows:
        statistics.observe(record)
    report = read_report(write(tmp_path, rows))
    state, effect = statistics.state(), report.effect
    assert (state.batches, state.mean, state.low, state.high) == (
        effect.batches, effect.sequence.value, effect.sequence.low, effect.sequence.high,
    )  # fmt: skip
    assert state.e_value == pytest.approx(effect.e_value, rel=1e-12)
    assert (state.p_value, state.mde) == pytest.approx(
        (effect.p_value, effect.detectable), rel=1e-12
    )
    found = {gate.name: gate for gate in report.gates}
    measured = [gate for gate in state.gates if gate.found != "not measured"]
    assert len(measured) > 12
    for gate in measured:
        assert (gate.state, gate.found) == (found[gate.name].state, found[gate.name].found)
    # it cannot promote: what only the store can tell is open
    assert state.verdict == "KEEP SHADOWING"


def test_statistics_are_read_again_from_the_store(tmp_path: Path, rows: list[Comparison]) -> None:
    live = Statistics(registered(tmp_path))
    for record in rows:
        live.observe(record)
    write(tmp_path, rows)
    again = Statistics(live.registration)
    with StoreReader(tmp_path).connect() as db:
        again.load(db)
    assert again.state() == live.state()
    assert again.batcher.batches().values.tobytes() == live.batcher.batches().values.tobytes()
    assert again.evidence == live.evidence


def test_keeper_follows_a_registration_that_comes_later(
    tmp_path: Path, rows: list[Comparison]
) -> None:
    write(tmp_path, rows)
    keeper = Keeper(tmp_path)
    keeper.refresh()
    assert keeper.save() is not None
    state = read_state(tmp_path)
    assert state is not None
    assert (state.verdict, state.registration) == ("exploratory", None)
    terms = TERMS._replace(start_us=T0 + 400 * HOUR)
    registration = registered(tmp_path, terms)
    keeper.refresh()
    # the pilot asks for batches of 60 bars: the first whole one begins 456 hours after T0
    for row in bars(2e-4, n=700)[800:]:
        keeper.observe(row)
    assert keeper.save() is not None
    state = read_state(tmp_path)
    assert state is not None
    assert (state.registration, state.batches) == (registration.id, 4)
    assert keeper.save() is None
    (tmp_path / "verdict.json").write_text("[]")
    with pytest.raises(DataError, match="expected a collector's statistics"):
        read_state(tmp_path)


# -- gates -----------------------------------------------------------------------------------------


def gate(**changes: object) -> Gate:
    values = {"name": "g", "measure": "turnover_ratio", "otherwise": "reject", "section": "metrics"}
    return Gate(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("bound", "found", "state"),
    [
        ({"at_most": 2.0}, Measured(1.5, 1.0, 3.0), "pass"),
        ({"at_most": 2.0}, Measured(2.5, 1.9, 3.0), "open"),
        ({"at_most": 2.0}, Measured(2.5, 2.1, 3.0), "fail"),
        ({"at_most": 2.0}, Measured(2.5), "fail"),
        ({"at_most": 2.0}, Measured(None), "open"),
        ({"at_least": 0.0}, Measured(-1.0, -1.0, 1.0), "open"),
        ({"at_least": 0.0}, Measured(-2.0, -3.0, -1.0), "fail"),
        ({"at_least": 0.0}, Measured(0.0), "pass"),
        ({"at_least": 0.0, "margin": True}, Measured(-1.5), "pass"),
    ],
)
def test_gate_fails_only_when_the_whole_interval_breaks_the_bound(
    bound: dict[str, object], found: Measured, state: str
) -> None:
    (result,) = check([gate(**bound)], {"turnover_ratio": found}, margin=2.0)
    assert (result.state, result.blocks) == (state, state != "pass")


def test_optional_gate_blocks_only_what_was_measured() -> None:
    (absent,) = check([gate(at_most=1.0, optional=True)], {})
    (wrong,) = check([gate(at_most=1.0, optional=True)], {"turnover_ratio": Measured(2.0)})
    assert (absent.state, absent.blocks, wrong.blocks) == ("open", False, True)


def test_default_table_has_every_rule_once() -> None:
    found = {item.name: item for item in read_gates()}
    assert found["tail loss (ES95 of batches)"].at_most == 1.1
    assert found["turnover"].at_most == 2.0
    assert found["matched decisions"].at_least == 0.99
    assert [found[name].at_least for name in ("days", "batches", "regimes")] == [14, 20, 2]
    assert found["opponent is production's RL v2"].at_least == 0.99
    assert {item.measure for item in found.values()} == set(gates_.MEASURES)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[[gate]]\nname = 'x'", "missing required field"),
        ("gate = 3", "Expected `array`"),
        ("[[gate]]\nname='x'\nmeasure='y'\notherwise='keep'\nsection='s'\nat_most=1", "a known"),
        ("[[gate]]\nname='x'\nmeasure='days'\notherwise='keep'\nsection='s'", "either at_least"),
        ("[[gate]]\nname='x'\nmeasure='days'\notherwise='no'\nsection='s'\nat_most=1", "Invalid"),
        ("not toml", "expected a table of gates"),
    ],
)
def test_damaged_table_of_gates_is_one_sentence(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "gates.toml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_gates(path)


def test_other_gates_than_the_registered_ones_give_no_verdict(tmp_path: Path) -> None:
    store = tmp_path / "store"
    concluded(store, bars(4e-4, n=200))
    path = tmp_path / "gates.toml"
    path.write_text(gates_.default_file().read_text().replace("at_least = 14", "at_least = 1"))
    report = read_report(store, Ask(gates=path))
    assert report.verdict.text == "exploratory"
    assert "table of gates" in report.verdict.why
    assert read_report(store, Ask(gates=gates_.default_file())).verdict.text != "exploratory"


def look(low: float, high: float, *, ready: bool = True) -> Look:
    values = dict.fromkeys(Look._fields, 0.0)
    return Look(**{**values, "low": low, "high": high, "ready": ready, "n": 30})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("found", "shift", "finding"),
    [
        (None, 0.0, "undecided"),
        (look(1.0, 2.0, ready=False), 0.0, "undecided"),
        (look(1.0, 2.0), 0.0, "superior"),
        (look(-2.0, -1.0), 0.0, "inferior"),
        (look(-1.0, 1.0), 0.0, "equivalent"),
        (look(-1.0, 9.0), 2.0, "not inferior"),
        (look(-3.0, 1.0), 2.0, "undecided"),
        (look(-1.5, -0.5), 2.0, "inferior"),
    ],
)
def test_finding_follows_from_the_sequence_alone(
    found: Look | None, shift: float, finding: str
) -> None:
    assert find(found, margin=2.0, shift=shift) == finding


def test_invalid_comes_before_reject_and_reject_before_promote() -> None:
    def result(otherwise: str, state: str) -> Result:
        return Result(
            otherwise, "days", state, "found", "bound", otherwise, "data", state != "pass"
        )  # type: ignore[arg-type]

    best = look(1.0, 2.0)
    primary = primary_gate(best, "superior", shift=0.0)
    failed = [result("reject", "fail"), result("invalid", "fail")]
    assert judge("superior", primary, failed, ended=False).text == "INVALID"
    assert judge("superior", primary, failed[:1], ended=False).text == "REJECT"
    assert judge("superior", primary, [result("keep", "open")], ended=False).text == (
        "KEEP SHADOWING"
    )
    assert judge("superior", primary, [result("keep", "pass")], ended=False).text == "PROMOTE"


def test_measures_of_nothing_are_open(tmp_path: Path) -> None:
    statistics = Statistics(registered(tmp_path))
    found = measures(
        statistics.batcher.batches(), None, statistics.registration.plan, Counted({}, {}, ()),
        reward=None, reference_digest="",
    )  # fmt: skip
    results = check(read_gates(), found)
    assert {item.state for item in results if item.otherwise == "invalid"} == {"open"}
    assert json.loads(msgspec.json.encode(statistics.state()))["verdict"] == "KEEP SHADOWING"


# -- commands --------------------------------------------------------------------------------------


def shadow(*arguments: object) -> subprocess.CompletedProcess[str]:
    program = "from shadow.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_commands_register_once_and_exit_as_the_verdict_says(tmp_path: Path) -> None:
    terms = ("register", "--store", tmp_path, "--policy", shipped_policy(), "--symbols", "B,A")
    done = shadow(*terms, "--start", "2023-11-15", "--rl-v2", "self")
    assert (done.returncode, done.stderr) == (0, "")
    assert "symbols  A, B" in done.stdout
    assert "counts   from 2023-11-15 00:00 to 2024-05-13 00:00 UTC at the latest" in done.stdout
    again = shadow(*terms, "--start", "2023-11-15", "--rl-v2", "self", "--batches", 100)
    assert (again.returncode, len(again.stderr.splitlines())) == (1, 1)
    assert shadow("register", "--store", tmp_path, "--start", "tomorrow").returncode == 2
    (registration,) = read_registrations(tmp_path)
    assert (registration.frozen.rl_v2, registration.frozen.tables_digest) == ("v3", None)
    assert registration.frozen.settings["latency_ms"] == 250.0


def test_report_of_a_rejected_policy_exits_20_in_every_form(tmp_path: Path) -> None:
    registered(tmp_path / "store")
    write(tmp_path / "store", records([swapped(row) for row in bars(1e-3, n=400)]))
    shown = shadow("report", "--store", tmp_path / "store", "--out", tmp_path / "out")
    assert shown.returncode == 20
    lines = shown.stdout.splitlines()
    assert len(lines) <= 24
    assert lines[0].endswith("REJECT")
    assert all(len(line) <= 80 for line in lines[:-2])
    told = shadow("report", "--store", tmp_path / "store", "--json")
    assert told.returncode == 20
    assert json.loads(told.stdout)["report"]["verdict"]["text"] == "REJECT"
    assert "REJECT" in (tmp_path / "out" / "report.html").read_text()
