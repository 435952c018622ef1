"""How would RL v2 and RL v3 have done on these prices? The worker's fold over history, no Redis.

The entries are those that the demo publishes (`shadow.history`) or those that a recording holds,
RL v2's own decisions among them. The fold is the worker's (`shadow.pipeline`), and the rows go into
a store that the same report reads. Nothing depends on the clock: the same files and policies give
the same rows with the same ids. Streams of price files have no key, only their names.

On price files orders fill at latency 0 by default, that is at the open at which they were decided,
as in training. Files hold two prices a bar; with the live default of 250 ms every fill would wait
for the close, a minute too late, which is a worse guess of the price 250 ms after the open than the
open itself. Recordings hold every tick, so there the worker's own latency is the default.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rlv3 import console
from rlv3.errors import DataError, UserError
from rlv3.market import Bars, read_bars
from rlv3.policy import Policy
from shadow.history import STREAMS, entries
from shadow.pipeline import Pipeline, Settings
from shadow.recording import Reading, load_snapshot
from shadow.records import (
    COMPARISONS,
    DECISIONS,
    BarRow,
    Commit,
    Entry,
    decode_comparison,
    iso,
    parse_id,
)
from shadow.rl_v2 import QTables
from shadow.segments import make_directory, write_durably
from shadow.store import StoreWriter

FLUSH_ROWS = 20_000


class SelfPlayError(UserError):
    """RL v3 against itself did not come out equal: the comparison is unfair; the program stops."""

    exit_code = 4


@dataclass(frozen=True, slots=True)
class Summary:
    """What a backtest did."""

    store: Path
    symbols: tuple[str, ...]
    entries: int
    decisions: int
    bars: int
    pairs: int
    rejected: int
    """Entries that could not be read, for example a price of zero."""
    equity: dict[str, float]
    """Account currency by arm, summed over symbols, at the last price."""
    seconds: float
    covered_s: float
    """From the first entry to the last."""

    @property
    def speed(self) -> float:
        """How many times faster than real time it went."""
        return self.covered_s / self.seconds


class _History(NamedTuple):
    """What is run through the fold."""

    entries: Iterable[Entry]
    inputs: tuple[str, ...]
    settings: Settings
    unit: str
    total: int
    """Bars or entries, as `unit` says."""


def backtest(
    policy: Policy | str | Path,
    data: Sequence[Bars | str | Path] = (),
    *,
    store_dir: str | Path,
    recording: str | Path | None = None,
    rl_v2: str = "reference",
    rl_v2_tables: str | Path | None = None,
    self_play: bool = False,
    latency_ms: int | None = None,
    bar_stamp: str = "close",
) -> Summary:
    """Run both policies over history and write every decision and comparison to a new store.

    Args:
        policy: an artifact or its path.
        data: one series or CSV/Parquet file per symbol.
        store_dir: a directory that is no store yet.
        recording: directory that `rlv3-worker record` wrote, instead of `data`.
        rl_v2: `reference`, which follows RL v2's recorded decisions from a symbol's first one;
            `bus`, which has no other; or `off`.
        rl_v2_tables: directory of RL v2's Q-tables, None for the shipped ones.
        self_play: let RL v3 play RL v2's part as well; every difference must be exactly 0.
        latency_ms: delay from a decision to its fill; see the module for the default.
        bar_stamp: `open` or `close`: what a file's timestamps mean.
    Raises:
        PolicyError: the artifact is missing, foreign, or of another env.
        DataError: a file cannot be used, its bars have another length than the policy's steps, or
            the store is in use.
        SelfPlayError: the two sides of a self-play differ.
    """
    if not isinstance(policy, Policy):
        policy = Policy.load(policy)
    policy.check_serving(allow_untrained=True)
    if recording is None:
        history = _of_bars(policy, [_load(item, bar_stamp) for item in data])
    else:
        history = _of_recording(Path(recording))
    settings = replace(
        history.settings,
        latency_ms=history.settings.latency_ms if latency_ms is None else latency_ms,
        rl_v2="off" if self_play else rl_v2,
        self_play=self_play,
    )
    tables = QTables.load(rl_v2_tables) if settings.rl_v2 == "reference" else None
    pipeline = Pipeline(policy, tables, settings, history.inputs)
    pipeline.keeps_state = False
    if recording is None:
        pipeline.count_losses(history.inputs)  # files are read whole
    started = time.perf_counter()
    with closing(_Store(store_dir)) as store, _progress() as progress:
        store.keep(policy)
        task = progress.add_task(history.unit, total=history.total)
        for commit in fold(pipeline, history.entries):
            if self_play:
                check_equal(commit)
            closed = store.write(commit)
            progress.advance(task, closed if history.unit == "bars" else commit.taken)
        store.writer.flush()
    snapshot = pipeline.snapshot()
    return Summary(
        store=Path(store_dir),
        symbols=tuple(pipeline.symbols),
        entries=sum(pipeline.counts.values()),
        decisions=snapshot["decisions"],
        bars=store.bars,
        pairs=snapshot["pairs"],
        rejected=store.rejected,
        equity=snapshot["equity"],
        seconds=time.perf_counter() - started,
        covered_s=store.covered_s,
    )


def _of_bars(policy: Policy, bars: Sequence[Bars]) -> _History:
    check_steps(bars, policy)
    return _History(
        entries=entries(bars),
        inputs=STREAMS,
        settings=Settings(latency_ms=0, max_event_age_s=None),
        unit="bars",
        total=sum(len(series.end_us) for series in bars),
    )


def _of_recording(recording: Path) -> _History:
    """Return what a worker read, in the one defined order, from the recording's start on."""
    snapshot = load_snapshot(recording)
    reader = Reading(recording, snapshot)
    streams = [
        ((parse_id(entry.entry_id), rank, entry) for entry in reader.inputs(name))
        for rank, name in enumerate(snapshot.inputs)
    ]
    return _History(
        entries=(entry for _, _, entry in heapq.merge(*streams, key=lambda item: item[:2])),
        inputs=tuple(snapshot.inputs),
        settings=snapshot.settings,
        unit="entries",
        total=sum(reader.position.groups[name].rows for name in snapshot.inputs),
    )


def fold(pipeline: Pipeline, history: Iterable[Entry]) -> Iterator[Commit]:
    """Start a run on a fresh pipeline just before the first entry; yield its commits to the end."""
    stream = iter(history)
    waiting = list(itertools.islice(stream, 1))
    start = waiting[0].id_ms - 1 if waiting else 0
    yield pipeline.begin(dict.fromkeys(pipeline.inputs, f"{start}-0"))
    while waiting:
        waiting += itertools.islice(stream, pipeline.settings.max_events - len(waiting))
        commit = pipeline.run(waiting, now_ms=float(waiting[0].id_ms))
        del waiting[: commit.taken]
        yield commit
        if not waiting:
            waiting += itertools.islice(stream, 1)
    yield pipeline.stop()


def check_steps(bars: Sequence[Bars], policy: Policy) -> None:
    """Refuse bars of another length than the policy's steps.

    Raises:
        DataError: naming both lengths.
    """
    for series in bars:
        if series.step_seconds != policy.step_seconds:
            raise DataError(
                f"expected bars of {policy.step_seconds} s, the step of the policy, "
                f"found {series.step_seconds} s for {series.symbol}"
            )


def check_equal(commit: Commit) -> None:
    """Refuse a bar in which the two sides of a self-play differ at all.

    Raises:
        SelfPlayError: naming the bar and what was found.
    """
    for output in commit.outputs:
        row = decode_comparison(output.payload) if output.event_type == COMPARISONS else None
        if isinstance(row, BarRow) and row.arms["v3"] != row.arms["v2"]:
            raise SelfPlayError(
                f"expected no difference between v3 and itself, found {row.arms['v3']} and "
                f"{row.arms['v2']} in the bar of {row.symbol} that ended at {iso(row.event_ts_us)}"
            )


class _Store:
    """Writes commits to a new store under ids that follow from the entries' own."""

    def __init__(self, directory: str | Path) -> None:
        self.writer = StoreWriter(directory)
        if self.writer.position:
            self.writer.close()
            raise DataError(f"expected a directory without a store, found one in {directory}")
        self.bars = 0
        self.rejected = 0
        self._ms = 0
        self._first_ms: int | None = None
        self._n = dict.fromkeys((DECISIONS, COMPARISONS), 0)

    def write(self, commit: Commit) -> int:
        """Write one commit; return how many bars closed in it.

        An output's id has the time of the last entry folded, which never runs backwards.
        """
        ms = max((int(id_.partition("-")[0]) for id_ in commit.cursors.values()), default=self._ms)
        if ms > self._ms:
            self._ms = ms
            if self._first_ms is None and commit.taken:
                self._first_ms = ms
            self._n = dict.fromkeys(self._n, 0)
        closed = 0
        for output in commit.outputs:
            if output.event_type not in self._n:
                self.rejected += 1
                continue
            self._n[output.event_type] += 1
            entry_id = f"{self._ms}-{self._n[output.event_type]}"
            table = self.writer.append(output.event_type, entry_id, output.payload)
            closed += table == "bars"
        if self.writer.pending >= FLUSH_ROWS:
            self.writer.flush()
        self.bars += closed
        return closed

    def keep(self, policy: Policy) -> None:
        """Copy the artifact, so that its decisions can be explained from the store alone."""
        folder = self.writer.directory / "artifacts"
        make_directory(folder)
        write_durably(folder / f"{policy.digest}.safetensors", policy.source)

    @property
    def covered_s(self) -> float:
        """Time from the first commit to the last, by the entries."""
        return 0.0 if self._first_ms is None else (self._ms - self._first_ms) / 1_000

    def close(self) -> None:
        """Let the next writer in."""
        self.writer.close()


def _load(item: Bars | str | Path, bar_stamp: str) -> Bars:
    return read_bars(item, bar_stamp=bar_stamp) if isinstance(item, str | Path) else item


def _progress() -> Progress:
    """Return a progress bar for a person who watches, and nothing for a pipe."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console.err,
        disable=not console.err.is_terminal,
    )
