"""Does the promise hold under every fault? One seed of each on each tier; `make chaos` has more."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.faults import FAULTS
from tests.chaos.oracle import Verdict
from tests.chaos.run import play
from worker.embedded import ServerBinary


@pytest.mark.parametrize("number", sorted(FAULTS), ids=lambda n: f"{n}: {FAULTS[n].title}")
def test_nothing_is_lost_doubled_out_of_order_or_changed(
    number: int, binary: ServerBinary, lively_policy: Path
) -> None:
    verdict = play(number, int(binary.version[0]), binary, lively_policy)
    assert verdict == Verdict()


def test_an_entry_is_innocent_of_kills_while_its_commit_waits(
    binary: ServerBinary, lively_policy: Path
) -> None:
    """This seed kills three workers in a row with the same entry folded and its commit held."""
    assert play(1, 23, binary, lively_policy) == Verdict()
