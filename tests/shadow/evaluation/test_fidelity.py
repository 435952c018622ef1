"""Real closes, training quantiles and audits, by hand: what the report says of the simulation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb
import msgspec
import numpy as np
import pytest

from rlv3.errors import DataError
from rlv3.features import FEATURES, Normaliser
from rlv3.policy import QUANTILE_LEVELS, Policy, build_artifact
from shadow.evaluation.bars import Bars, Scope
from shadow.evaluation.effect import Range
from shadow.evaluation.fidelity import (
    Fidelity,
    examine,
    find_policy,
)
from shadow.evaluation.replayed import Replayed, read_replay, write_replay
from shadow.records import BarRow, Comparison, OutcomeRow
from shadow.reporting.report import Report, read_report
from shadow.store import StoreReader
from tests.shadow.evaluation.test_verdict import bars, concluded, registered, run_row, write
from tests.shadow.evaluation.test_verdict import records as recorded
from tests.shadow.reporting.test_report import MINUTE, T0, Book, write_store
from tests.shadow.reporting.test_report import run_row as minute_run_row

SECOND = 1_000_000
HOUR = 60 * MINUTE


@contextmanager
def scoped(directory: Path, rows: Iterable[Comparison]) -> Iterator[duckdb.DuckDBPyConnection]:
    """Open a store of a run of minute bars as a report does."""
    write_store(directory, [minute_run_row(), *rows])
    with StoreReader(directory).connect() as db:
        Scope(("run-1",)).install(db)
        Bars.load(db)
        yield db


def fidelity(
    directory: Path,
    rows: Iterable[Comparison],
    *,
    policy: Policy | None = None,
    slippage_bps: float = 0.0,
) -> Fidelity:
    with scoped(directory, rows) as db:
        return examine(db, step_us=MINUTE, slippage_bps=slippage_bps, policy=policy, replay=None)


# -- real closes -----------------------------------------------------------------------------------


def close(
    number: int, ts_us: int, side: int, price: float | None, symbol: str = "AAA"
) -> OutcomeRow:
    return OutcomeRow(
        f"o{number}", "run-1", symbol, ts_us, side, 100.0, price, None, None, "tp", 0.1, 0.1, "a"
    )


def rising(minutes: int) -> list[BarRow]:
    """From 100 to 110 within every minute, in a straight line."""
    book = Book("AAA")
    return [book.bar(n, {}, {}, open=100.0, close=110.0) for n in range(1, minutes + 1)]


@pytest.mark.parametrize(
    ("after_s", "side", "paid", "bps"),
    [
        # a long sold at 104 where the simulator had 105, less its 5 bps: 10,000 / 105 - 5
        (30, 1, 104.0, 90.2381),
        # a short bought back at 109 where the simulator had 107.5: 15,000 / 107.5 - 5
        (45, -1, 109.0, 134.5349),
        # production did better: -10,000 / 105 - 5
        (30, 1, 106.0, -100.2381),
        # exactly what the simulator pays: 105 less 5 bps
        (30, 1, 105.0 * (1.0 - 5e-4), 0.0),
        # the end of a minute belongs to it: 110
        (60, 1, 109.0, 85.9091),
    ],
)
def test_a_close_is_held_against_the_price_of_its_moment(
    tmp_path: Path, after_s: int, side: int, paid: float, bps: float
) -> None:
    outcome = close(1, T0 + after_s * SECOND, side, paid)
    found = fidelity(tmp_path, [*rising(1), outcome], slippage_bps=5.0).bias
    assert found.closes == 1
    assert found.bps.value == pytest.approx(bps, abs=1e-4)
    assert (found.bps.low, found.bps.high) == (None, None)  # one close has no interval


def test_closes_that_cannot_be_compared_are_left_out(tmp_path: Path) -> None:
    outcomes = [
        close(1, T0 + 30 * SECOND, 1, None),  # no price
        close(2, T0 + 30 * SECOND, 0, 104.0),  # no side
        close(3, T0 + 30 * SECOND, 1, 104.0, "BBB"),  # no bar of its symbol
        close(4, T0, 1, 104.0),  # before the first bar began
        close(5, T0 + 2 * MINUTE + 1, 1, 104.0),  # after the last bar
        close(6, T0 + 90 * SECOND, 1, 104.0),
    ]
    found = fidelity(tmp_path, [*rising(2), *outcomes]).bias
    assert found.closes == 1
    assert found.bps.value == pytest.approx(1e4 / 105.0)


def test_bias_is_a_mean_with_an_interval_from_eight_closes_on(tmp_path: Path) -> None:
    paid = [104.0, 106.0] * 6  # 95.24 bps too kind, 95.24 too hard
    outcomes = [close(n, T0 + n * MINUTE + 30 * SECOND, 1, p) for n, p in enumerate(paid)]
    few = fidelity(tmp_path / "few", [*rising(12), *outcomes[:7]]).bias.bps
    assert few == Range(pytest.approx(1e4 / 105.0 / 7))
    found = fidelity(tmp_path / "many", [*rising(12), *outcomes]).bias.bps
    assert found.value == pytest.approx(0.0, abs=1e-9)
    assert -1e4 / 105.0 < found.low < -1.0
    assert 1.0 < found.high < 1e4 / 105.0


def with_closes(directory: Path, bps: float) -> Report:
    """A clear edge in hourly bars at a price of 1, and longs sold so many bps below it."""
    registered(directory)
    closes = [close(n, T0 + n * HOUR, 1, 1.0 - bps * 1e-4, "AB"[n % 2]) for n in range(1, 49)]
    return read_report(write(directory, [*recorded(bars(4e-4)), *closes]))


def test_simulator_that_is_too_kind_makes_the_verdict_invalid(tmp_path: Path) -> None:
    # v2 pays 1e-5 of slippage on a turnover of 0.02: 5 bps of what it trades
    fair, kind = with_closes(tmp_path / "fair", 6.0), with_closes(tmp_path / "kind", 10.0)
    assert fair.fidelity.bias.bps.value == pytest.approx(1.0)
    assert (fair.verdict.text, fair.finding) == ("PROMOTE", "superior")
    assert kind.fidelity.bias.bps.value == pytest.approx(5.0)
    assert kind.verdict.text == "INVALID"
    assert kind.verdict.binding == "simulator bias (bps of turnover)"


def test_bias_is_charged_to_the_turnover_of_v3(tmp_path: Path) -> None:
    report = with_closes(tmp_path, 6.0)
    (charged,) = [gate for gate in report.gates if gate.measure == "charged_bias"]
    # 0.02 of the capital an hour is 0.48 a day, at 1 bps of it
    assert float(charged.found) == pytest.approx(report.effect.sequence.value - 0.48, abs=0.01)


# -- training quantiles ----------------------------------------------------------------------------

WATCHED, FLAT_ONE, UNKNOWN = FEATURES[3].name, FEATURES[4].name, FEATURES[5].name
# at the levels 1, 5, 10, 25, 50, 75, 90, 95 and 99 %
STANDARD = (-3.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0)
AS_TRAINED = ((-1.5, 10), (-0.7, 15), (-0.2, 25), (0.2, 25), (0.7, 15), (1.5, 10))
"""Value and bars: the shares of training in every cell between its quantiles."""


def trained() -> Policy:
    """A policy whose feature 3 had mean 10 and scale 2 in training; feature 4 never moved."""
    rng = np.random.default_rng(0)
    tensors = {}
    for net, head in (("policy", 6), ("value", 1)):
        for layer, fan_in, fan_out in (("0", 64, 128), ("2", 128, 128), ("4", 128, head)):
            tensors[f"{net}.{layer}.weight"] = rng.normal(0, 0.1, (fan_out, fan_in)).astype("f4")
            tensors[f"{net}.{layer}.bias"] = np.zeros(fan_out, "f4")
    mean, scale = np.zeros(18), np.ones(18)
    mean[3], scale[3] = 10.0, 2.0
    assert len(STANDARD) == len(QUANTILE_LEVELS)
    return Policy(
        build_artifact(
            tensors,
            Normaliser(mean, scale),
            training={"steps": 1, "seed": 0},
            quantiles={
                WATCHED: [10.0 + 2.0 * z for z in STANDARD],
                FLAT_ONE: [0.0] * len(STANDARD),
            },
            mask_rule="design",
            step_seconds=60,
        )
    )


def observed(values: Iterable[float], **changes: object) -> list[BarRow]:
    """A bar a minute, with these values of feature 3 as the policy saw them."""
    book = Book("AAA")
    return [
        book.bar(n, {}, {}, obs=(0.0, 0.0, 0.0, value, *(0.0,) * 60), **changes)
        for n, value in enumerate(values, 1)
    ]


def test_drift_of_a_market_like_the_one_in_training_is_next_to_nothing(tmp_path: Path) -> None:
    rows = observed([value for value, n in AS_TRAINED for _ in range(n)])
    (found,) = fidelity(tmp_path, rows, policy=trained()).drift
    assert (found.feature, found.n) == (WATCHED, 100)
    # half a bar is added to each of six cells: shares 10.5, 15.5, 25.5 of 103 against .1, .15, .25
    # 2 (.001942 ln 1.01942 + .000485 ln 1.00324 - .002427 ln .99029) = .000125
    assert found.psi == Range(pytest.approx(1.25e-4, abs=1e-6))  # two hours have no interval


def test_drift_of_a_feature_that_left_its_range(tmp_path: Path) -> None:
    (found,) = fidelity(tmp_path, observed([2.0] * 100), policy=trained()).drift
    # all in the last cell: .2878 + .4980 + .9663 + .9663 + .4980 + 1.9949
    assert found.psi.value == pytest.approx(5.2112, abs=1e-3)


def test_drift_looks_at_what_is_known_of_warm_bars(tmp_path: Path) -> None:
    usual = [value for value, n in AS_TRAINED for _ in range(n)]
    strange = observed([2.0] * 300)
    missing = [msgspec.structs.replace(row, missing_mask=1 << 3) for row in strange[100:200]]
    cold = [msgspec.structs.replace(row, warm=False) for row in strange[200:]]
    rows = [*observed(usual), *missing, *cold]
    (found,) = fidelity(tmp_path, rows, policy=trained()).drift
    assert (found.n, found.psi.value) == (100, pytest.approx(1.25e-4, abs=1e-6))
    nothing = fidelity(tmp_path / "cold", cold, policy=trained())
    assert (nothing.drift, nothing.drift_missing) == ((), "no bar")


def test_interval_of_drift_resamples_hours(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    rows = observed(rng.normal(0.3, 0.8, 720).tolist())
    (found,) = fidelity(tmp_path, rows, policy=trained()).drift
    value, low, high = found.psi.value, found.psi.low, found.psi.high
    assert 0.05 < low < value < high < 0.6


def test_artifact_comes_from_the_store_or_ships(tmp_path: Path) -> None:
    policy = trained()
    assert find_policy(tmp_path, policy.digest) is None
    absent = fidelity(tmp_path / "store", observed([0.0] * 10))
    assert (absent.drift, absent.drift_missing) == ((), "the artifact is not in the store")
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / f"{policy.digest}.safetensors").write_bytes(policy.source)
    found = find_policy(tmp_path, policy.digest)
    assert found is not None
    assert found.digest == policy.digest


def test_drifted_feature_stands_in_the_way_of_a_promotion(tmp_path: Path) -> None:
    policy = trained()
    (tmp_path / "artifacts").mkdir(parents=True)
    (tmp_path / "artifacts" / f"{policy.digest}.safetensors").write_bytes(policy.source)
    far = (0.0, 0.0, 0.0, 4.0, *(0.0,) * 60)
    rows = [msgspec.structs.replace(row, obs=far) for row in bars(4e-4)]
    report = concluded(tmp_path, rows, run=run_row(policy_digest=policy.digest))
    assert (report.verdict.text, report.verdict.binding) == (
        "KEEP SHADOWING", "feature drift (largest PSI)",
    )  # fmt: skip
    (gate,) = [gate for gate in report.gates if gate.measure == "feature_drift"]
    assert gate.found.endswith(f" {WATCHED}")


# -- audits ----------------------------------------------------------------------------------------


def test_result_of_an_audit_stays_with_the_store(tmp_path: Path) -> None:
    assert read_replay(tmp_path) is None
    found = Replayed(entries=1_000, equal=900, differences=0, lost=2)
    write_replay(tmp_path, found)
    assert read_replay(tmp_path) == found
    (tmp_path / "audit.json").write_text("{}")
    with pytest.raises(DataError, match="expected the result of an audit in"):
        read_replay(tmp_path)


@pytest.mark.parametrize(("differences", "verdict"), [(0, "PROMOTE"), (1, "INVALID")])
def test_live_must_equal_replay(tmp_path: Path, differences: int, verdict: str) -> None:
    registered(tmp_path)
    write_replay(tmp_path, Replayed(entries=9, equal=8, differences=differences, lost=0))
    report = read_report(write(tmp_path, recorded(bars(4e-4))))
    assert report.verdict.text == verdict
    if differences:
        assert report.verdict.binding == "live equals replay"
