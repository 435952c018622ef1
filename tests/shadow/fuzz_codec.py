"""The long form of the codec's fuzz test: `make fuzz INPUTS=100000`."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable

from hypothesis import HealthCheck, Phase, given, seed, settings

from rlv3 import console
from shadow.records import Entry
from tests.shadow.test_codec import check_any, decode, entries

ROUND = 1_000
"""Inputs drawn with one seed: Hypothesis remembers them all, so more at once take ever longer."""


def main(inputs: int) -> None:
    """Decode so many drawn entries; the first exception ends it, with the input that caused it."""
    kinds: Counter[str] = Counter()
    number = 0
    while kinds.total() < inputs:
        check = _round(number, min(ROUND, inputs - kinds.total()), kinds)
        before, number = kinds.total(), number + 1
        check()
        if kinds.total() == before:
            raise SystemExit(f"expected round {number} to draw inputs, found none")
        if sys.stderr.isatty() or number % 10 == 0:
            console.err.print(f"{kinds.total():,} of {inputs:,}")
    found = ", ".join(f"{kind} {n:,}" for kind, n in kinds.most_common())
    console.out.print(f"{kinds.total():,} inputs, no exception: {found}")


def _round(number: int, inputs: int, kinds: Counter[str]) -> Callable[[], None]:
    """Return a test of so many inputs, the same ones for the same number."""

    @seed(number)
    @settings(
        max_examples=inputs, deadline=None, database=None,
        suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink),
    )  # fmt: skip
    @given(entries())
    def check(raw: Entry) -> None:
        check_any(raw)
        kinds[type(decode(raw)).__name__] += 1

    return check


if __name__ == "__main__":
    main(int(sys.argv[1]))
