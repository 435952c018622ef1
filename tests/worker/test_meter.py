"""Do the worker's figures say what its loop did?"""

from __future__ import annotations

from pathlib import Path

import pytest

from rlv3.policy import Policy, shipped_policy
from shadow.records import PairRow, UnpairedRow
from worker.meter import Meter
from worker.monitor import quantile
from worker.status import EDGES_S, KEPT


@pytest.fixture
def meter() -> Meter:
    return Meter(Policy.load(shipped_policy()))


def pair(n: int, agree: bool | None) -> PairRow:
    exposure = None if agree is None else -0.1
    return PairRow(
        record_id=f"r{n}", run_id="run", symbol="BTCUSDT", event_ts_us=n, v2_decision_id=f"a{n}",
        v3_decision_id=f"b{n}", rule=1, delta_us=0, opponent="q_table", opponent_digest=None,
        v3_kind="advisory", v3_event_type="signal.generated", v3_action=1, v3_action_name="LONG",
        v3_confidence=0.9, v3_exposure=0.0, v3_target=0.1, v2_direction=-1, v2_exposure=exposure,
        agree=agree, warm=True, policy_digest="p",
    )  # fmt: skip


def test_durations_are_counted_in_their_buckets_bound_included(meter: Meter) -> None:
    for seconds in (0.0001, 0.00011, 0.3, 61.0):
        meter.took("commit", seconds)
    counts = meter.latency["commit"].counts
    found = {i: n for i, n in enumerate(counts) if n}
    assert found == {0: 1, 1: 1, EDGES_S.index(0.5): 1, len(EDGES_S): 1}
    assert meter.latency["commit"].sum_s == pytest.approx(61.30021)


def test_a_commit_counts_each_entry_once_in_seconds(meter: Meter) -> None:
    meter.committed([12.0, 0.4, 90_000.0, 12.5])
    counts = meter.latency["total"].counts
    assert sum(counts) == 4
    assert counts[EDGES_S.index(0.025)] == 2
    assert counts[-1] == 1
    assert meter.latency["total"].sum_s == pytest.approx(90.0249)
    assert meter.commit_age_s == pytest.approx(0.0, abs=5.0)


def test_steps_without_a_histogram_are_passed_over(meter: Meter) -> None:
    meter.took("wait", 1.0)
    assert sum(sum(histogram.counts) for histogram in meter.latency.values()) == 0
    assert meter.commit_age_s is None


def test_pairs_are_counted_by_side_and_the_newest_disagreements_kept(meter: Meter) -> None:
    for n in range(KEPT + 5):
        meter.compared(pair(n, agree=False))
    meter.compared(pair(100, agree=True))
    meter.compared(pair(101, agree=None))
    assert meter.agreement == {"agree": 1, "disagree": KEPT + 5, "undirected": 1}
    kept = [row.event_ts_us for row in meter.disagreements()]
    assert kept == list(range(KEPT + 4, 4, -1))
    row = meter.disagreements()[0]
    assert (row.v2_exposure, row.v3_exposure, row.v3_action_name) == (-0.1, 0.1, "LONG")


def test_unpaired_decisions_are_counted_by_side_and_reason(meter: Meter) -> None:
    row = UnpairedRow("r", "run", "BTCUSDT", 1, "v2", "d", "missing_v3", "q_table", "p")
    meter.compared(row)
    meter.compared(row)
    assert meter.unpaired == {"v2:missing_v3": 2}


@pytest.mark.parametrize(
    ("counts", "q", "seconds"),
    [
        ({0: 10}, 0.5, 0.00005),  # half of the first bucket
        ({5: 1, 6: 1}, 0.5, 0.005),
        ({5: 90, 10: 10}, 0.99, 0.1 + 0.15 * 0.9),
        ({len(EDGES_S): 1}, 0.5, 60.0),
    ],
)
def test_quantiles_are_linear_inside_a_bucket(
    counts: dict[int, int], q: float, seconds: float
) -> None:
    values = [counts.get(i, 0) for i in range(len(EDGES_S) + 1)]
    assert quantile(values, q) == pytest.approx(seconds)


def test_drift_waits_for_bars_and_follows_another_policy(meter: Meter, policy_file: Path) -> None:
    assert meter.features() == ({}, {})
    meter.follow(Policy.load(policy_file))  # without quantiles
    assert meter.features() == ({}, {})
