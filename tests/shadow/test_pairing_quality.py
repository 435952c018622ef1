"""Pairing under loss, duplicates, jitter and wrong ids, through the whole fold."""

from __future__ import annotations

from rlv3.policy import Policy, shipped_policy
from tests.calibration.pairing import PRECISION, RECALL, play


def test_pairs_are_true_and_complete_and_every_other_row_has_a_reason() -> None:
    found = play(Policy.load(shipped_policy()), 1_500, seed=1)
    assert found.decisions > 1_450
    assert found.precision >= PRECISION
    assert found.recall >= RECALL
    assert found.adds_up
    assert set(found.unpaired) == {
        ("v2", "missing_v3"), ("v2", "duplicate"), ("v3", "missing_v2"),
    }  # fmt: skip
    assert found.unpaired["v2", "duplicate"] == found.rows - found.decisions
