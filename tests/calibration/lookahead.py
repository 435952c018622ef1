"""Does anything look ahead? Cut the input at a random time, run again, compare all before the cut.

Four systems are cut: the whole backtest (ticks and signals from bars, RL v2, RL v3, accounts,
pairing), the bulk path of the features that training uses, the raw entries of the fold with a
published RL v2, and the batches with their evidence. Whatever a system says for times up to the cut
must be equal in every bit. So that the detector is known to work, each of them is also fed by a
publisher that mixes a later bar's close into every bar: that must be noticed.

    python -m tests.calibration.lookahead [--cuts N] [--seed N]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from rlv3.features import feature_matrix
from rlv3.market import Bars, simulate
from rlv3.policy import Policy, shipped_policy
from shadow.backtest import fold
from shadow.history import STREAMS, entries
from shadow.pipeline import Pipeline, Settings
from shadow.records import Commit, Entry
from shadow.rl_v2 import QTables
from shadow.statistics.sequential import Plan, looks

BARS = 60
WARM = 36  # cuts leave at least so many bars
BATCH = 4  # bars
AHEAD = 4  # bars that the dishonest publisher looks ahead, so that no batch escapes
US_PER_MS = 1_000

Said = list[tuple[int, object]]
"""What a system says: event time in microseconds and a comparable value, in order."""


class System(NamedTuple):
    """Something that turns price bars into statements about times."""

    name: str
    run: Callable[[Sequence[Bars]], Said]


@cache
def _policy() -> Policy:
    return Policy.load(shipped_policy())


@cache
def _tables() -> QTables:
    return QTables.load(None)


def _backtest(bars: Sequence[Bars]) -> Said:
    settings = Settings(latency_ms=0, max_event_age_s=None, max_events=1)
    pipeline = Pipeline(_policy(), _tables(), settings, STREAMS)
    return _said(fold(pipeline, entries(bars)))


def _published(bars: Sequence[Bars]) -> Said:
    """The fold with RL v2 on the bus, on the side of the last bar; fills at the next price."""
    inputs = (*STREAMS, "rl_v2.decision")
    settings = Settings(rl_v2="bus", max_event_age_s=None, max_events=1)
    pipeline = Pipeline(_policy(), None, settings, inputs)
    return _said(fold(pipeline, _with_v2(bars)))


def _with_v2(bars: Sequence[Bars]) -> list[Entry]:
    found = list(entries(bars, ticks_per_bar=3))
    for series in bars:
        for i in range(1, len(series.end_us)):
            ms = int(series.end_us[i]) // US_PER_MS + 2
            side = 1 if series.close[i] > series.close[i - 1] else -1
            payload = (
                f'{{"schema_version": 1, "decision_id": "{series.symbol}-{ms}", '
                f'"symbol": "{series.symbol}", "kind": "combined", "provenance": "q_table", '
                f'"direction": {side}, "size_multiplier": 1.0, "timestamp": {ms / 1_000}}}'
            )
            fields = {b"payload": payload.encode(), b"trace_id": b"", b"correlation_id": b""}
            found.append(Entry("rl_v2.decision", "rl_v2.decision", f"{ms}-{i}", fields))
    return sorted(found, key=lambda entry: tuple(map(int, entry.entry_id.split("-"))))


def _said(commits: Iterable[Commit]) -> Said:
    """Note every output under the time of the entry that it came out with, one entry a commit."""
    said: Said = []
    now = 0
    for commit in commits:
        if now and not commit.taken:
            break  # the end of the run, which says that it ends
        now = max((int(at.partition("-")[0]) for at in commit.cursors.values()), default=now)
        said += [(now * US_PER_MS, output.payload) for output in commit.outputs]
    return said


def _features(bars: Sequence[Bars]) -> Said:
    said: Said = []
    for series in bars:
        rows, missing = feature_matrix(series.end_us, series.close, series.volume, series.spread)
        said += [
            (int(end), (row.tobytes(), int(bits)))
            for end, row, bits in zip(series.end_us, rows, missing, strict=True)
        ]
    return said


def _evidence(bars: Sequence[Bars]) -> Said:
    (series, *_) = bars
    returns = np.diff(np.log(series.close))
    k = len(returns) // BATCH
    means = returns[: k * BATCH].reshape(k, BATCH).mean(axis=1)
    found = looks(means, Plan(horizon=10, burn_in=2))
    columns = [np.asarray(column) for column in found if np.shape(column) == (k,)]
    return [
        (int(series.end_us[(i + 1) * BATCH]), tuple(column[i].tobytes() for column in columns))
        for i in range(k)
    ]


SYSTEMS = (
    System("backtest", _backtest),
    System("published v2", _published),
    System("features", _features),
    System("evidence", _evidence),
)


def worlds(seed: int) -> list[Bars]:
    """Return two symbols' bars."""
    return [
        simulate("regime_switching", BARS, seed=seed * 2 + i, symbol=symbol)
        for i, symbol in enumerate(("AAAUSDT", "BBBUSDT"))
    ]


def cut(bars: Sequence[Bars], at: int) -> list[Bars]:
    """Keep the first bars of every symbol."""
    return [series.rows(0, at) for series in bars]


def peek(bars: Sequence[Bars]) -> list[Bars]:
    """Mix a later bar's close into every bar: what no honest publisher can know."""
    later = [np.append(series.close[AHEAD:], series.close[-1:].repeat(AHEAD)) for series in bars]
    return [
        series._replace(close=(series.close + ahead) / 2.0)
        for series, ahead in zip(bars, later, strict=True)
    ]


def leaks(
    run: Callable[[Sequence[Bars]], Said], bars: Sequence[Bars], at: int, whole: Said | None = None
) -> int:
    """Return how many statements up to the cut change when the input ends there.

    Args:
        at: how many bars of every symbol are kept.
        whole: what the system says about all of them, if that is known already.
    """
    until = int(bars[0].end_us[at - 1])
    before = [item for item in (run(bars) if whole is None else whole) if item[0] <= until]
    after = [item for item in run(cut(bars, at)) if item[0] <= until]
    same = sum(a == b for a, b in zip(before, after, strict=False))
    return max(len(before), len(after)) - same


class Found(NamedTuple):
    """Outcome per system."""

    cuts: int
    changed: int
    """Cuts that changed something before them: must be 0."""
    planted: int
    """Cuts of the peeking publisher."""
    caught: int


def search(cuts: int, seed: int) -> dict[str, Found]:
    """Cut every system equally often, in fresh worlds, honest and peeking."""
    rng = np.random.default_rng(seed)
    found = {}
    per_world = 10
    for system in SYSTEMS:
        changed = planted = caught = 0
        todo = cuts // len(SYSTEMS)
        for world in range(-(-todo // per_world)):
            bars = worlds(seed * 10_000 + world)
            whole = system.run(bars)
            for place in rng.integers(WARM, BARS, min(per_world, todo - world * per_world)):
                changed += leaks(system.run, bars, int(place), whole) > 0
            planted += 1
            place = int(rng.integers(WARM, BARS))
            caught += leaks(lambda b, run=system.run: run(peek(b)), bars, place) > 0
        found[system.name] = Found(todo, changed, planted, caught)
    return found


def main() -> int:
    """Search with many cuts and print; exit 1 when something looks ahead, or a plant escapes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cuts", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    good = True
    for name, found in search(args.cuts, args.seed).items():
        good &= found.changed == 0 and found.caught >= 0.99 * found.planted
        sys.stdout.write(
            f"{name:<14} {found.cuts:,} cuts, {found.changed} changed something before them; "
            f"peeking caught in {found.caught} of {found.planted}\n"
        )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
