"""What did the loop do, how long did it take, and what came of it? Figures, kept as it runs.

Everything is counted once per commit or per comparison row, and added up when somebody asks.
"""

from __future__ import annotations

import os
import time
from bisect import bisect_left, bisect_right
from collections import Counter, deque
from pathlib import Path

from rlv3.policy import Policy
from shadow.drift import Window
from shadow.records import BarRow, Comparison, PairRow, UnpairedRow, V2Row
from worker.status import (
    EDGES_S,
    KEPT,
    STEPS,
    Disagreement,
    FeatureDrift,
    Histogram,
)

DRIFT_S = 30.0
"""Drift is computed anew at most this often: it takes a millisecond or three."""


class Meter:
    """Figures of one process.

    Attributes:
        started_s: epoch seconds.
        latency: step -> histogram.
        agreement: agree, disagree, undirected -> pairs.
        unpaired: `side:reason` -> decisions.
        v2_heard: opponent -> epoch seconds of its last decision.
        bars: closed bars.
    """

    def __init__(self, policy: Policy) -> None:
        self.started_s = time.time()
        self.latency = {step: Histogram([0] * (len(EDGES_S) + 1)) for step in STEPS}
        self.agreement = dict.fromkeys(("agree", "disagree", "undirected"), 0)
        self.unpaired: Counter[str] = Counter()
        self.v2_heard: dict[str, float] = {}
        self.bars = 0
        self._committed_at: float | None = None
        self._disagreements: deque[Disagreement] = deque(maxlen=KEPT)
        self.follow(policy)

    def follow(self, policy: Policy) -> None:
        """Compare features with what another policy was trained on."""
        self._window = Window(policy.normaliser, policy.metadata["quantiles"])
        self._drift: dict[str, FeatureDrift] = {}
        self._missing: dict[str, float] = {}
        self._compared = (0, 0.0)  # bars, monotonic time

    def took(self, step: str, seconds: float) -> None:
        """Note how long a step took; steps without a histogram are passed over."""
        histogram = self.latency.get(step)
        if histogram is not None:
            histogram.counts[bisect_left(EDGES_S, seconds)] += 1
            histogram.sum_s += seconds

    def committed(self, waits_ms: list[float]) -> None:
        """Take in an applied commit, and of some of its entries the time from their ids to now."""
        self._committed_at = time.monotonic()
        _add(self.latency["total"], [wait / 1_000 for wait in waits_ms])

    def compared(self, row: Comparison) -> None:
        """Take in a comparison row."""
        match row:
            case BarRow():
                self.bars += 1
                if row.obs:
                    self._window.add(row.event_ts_us, row.obs, row.missing_mask)
            case V2Row():
                self.v2_heard[row.opponent] = time.time()
            case UnpairedRow():
                self.unpaired[f"{row.side}:{row.reason}"] += 1
            case PairRow():
                self._paired(row)
            case _:
                return

    def _paired(self, row: PairRow) -> None:
        if row.agree is None or row.v2_exposure is None:
            self.agreement["undirected"] += 1
        elif row.agree:
            self.agreement["agree"] += 1
        else:
            self.agreement["disagree"] += 1
            self._disagreements.append(
                Disagreement(
                    row.event_ts_us, row.symbol, row.opponent, row.v2_exposure, row.v3_target,
                    row.v3_action_name, row.v2_decision_id, row.v3_decision_id,
                )
            )  # fmt: skip

    @property
    def commit_age_s(self) -> float | None:
        """Seconds since the last commit; None before the first."""
        return None if self._committed_at is None else time.monotonic() - self._committed_at

    def disagreements(self) -> tuple[Disagreement, ...]:
        """Return the newest pairs whose sides differ, newest first."""
        return tuple(reversed(self._disagreements))

    def features(self) -> tuple[dict[str, float], dict[str, FeatureDrift]]:
        """Return share missing and drift per feature, from the newest closed bars."""
        bars, at = self._compared
        now = time.monotonic()
        if self._window.added != bars and now - at >= DRIFT_S:
            self._compared = self._window.added, now
            self._missing = self._window.missing()
            self._drift = {
                name: FeatureDrift(*drift) for name, drift in self._window.compare().items()
            }
        return self._missing, self._drift


def _add(histogram: Histogram, seconds: list[float]) -> None:
    """Count many values with one search per bucket that they reach."""
    seconds.sort()
    counts, done, n = histogram.counts, 0, len(seconds)
    for bucket, edge in enumerate(EDGES_S):
        upto = bisect_right(seconds, edge, done)
        counts[bucket] += upto - done
        done = upto
        if done == n:
            break
    counts[-1] += n - done
    histogram.sum_s += sum(seconds)


def rss_bytes() -> int | None:
    """Return the resident memory of this process where the kernel tells (Linux)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")
