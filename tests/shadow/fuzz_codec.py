"""The long form of the codec's fuzz test: `make fuzz INPUTS=100000`."""

from __future__ import annotations

import sys
from collections import Counter
from itertools import count

from hypothesis import HealthCheck, given, settings

from rlv3 import console
from shadow.records import Entry
from tests.shadow.test_codec import check_any, decode, entries


def main(inputs: int) -> None:
    """Decode so many drawn entries; the first exception ends it, with the input that caused it."""
    kinds: Counter[str] = Counter()
    drawn = count()

    @settings(
        max_examples=inputs, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(entries())
    def check(raw: Entry) -> None:
        next(drawn)
        check_any(raw)
        kinds[type(decode(raw)).__name__] += 1

    check()
    found = ", ".join(f"{kind} {n:,}" for kind, n in kinds.most_common())
    console.out.print(f"{next(drawn):,} inputs, no exception: {found}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
