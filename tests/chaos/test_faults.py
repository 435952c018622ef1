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
