"""Can the data be trusted? What became of every entry, which identities hold, what is missing.

The ledger counts entries since the worker's first start, so its checks and shares cover the whole
store; everything on bars and decisions covers the rows that are reported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import duckdb
import msgspec
import numpy as np

from rlv3.features import MARKET
from shadow.evaluation.bars import ORDER, Bars, Traded, count
from shadow.evaluation.batches import Ints
from shadow.evaluation.slices import VOLATILITY
from shadow.pipeline import OUTCOMES
from shadow.statistics.agreement import asymmetry

STRIP = 160
"""Slices of time in the picture of coverage."""


class Check(msgspec.Struct, frozen=True):
    """One question about the data and its answer."""

    name: str
    ok: bool
    found: str
    decides: bool = True
    """False for what a reader should know and no verdict depends on."""


class Stream(msgspec.Struct, frozen=True):
    """What became of the entries of one input stream, since the worker's first start."""

    stream: str
    read: int
    outcomes: dict[str, int]
    lost: int | None
    """Trimmed before they were read; null where that is not counted, as on Redis 6.2."""


class Stage(msgspec.Struct, frozen=True):
    """One step of the funnel: so many of so many."""

    name: str
    n: int
    of: int
    meaning: str


class Unmatched(msgspec.Struct, frozen=True):
    """Decisions without a counterpart."""

    side: str
    """Whose decision stayed alone."""
    reason: str
    decisions: int


class Asymmetry(msgspec.Struct, frozen=True):
    """Are unmatched decisions of RL v2 spread alike over groups? A chi-squared test."""

    by: str
    """symbol, regime or volatility."""
    groups: tuple[tuple[str, int, int], ...]
    """Group, decisions, unmatched ones."""
    p: float | None
    """Null with too few unmatched decisions to ask."""


class Coverage(msgspec.Struct, frozen=True):
    """Share of the symbols' bars that have a row, lowest within each slice of time."""

    time_us: tuple[int, ...]
    """Begin of each slice."""
    share: tuple[float, ...]


class Health(msgspec.Struct, frozen=True):
    """Can the data be trusted?"""

    funnel: tuple[Stage, ...]
    streams: tuple[Stream, ...]
    checks: tuple[Check, ...]
    unmatched: tuple[Unmatched, ...]
    asymmetry: tuple[Asymmetry, ...]
    asymmetry_p: float | None
    """Smallest p-value, corrected for the number of tests."""
    coverage: Coverage
    bars: int
    gap_bars: int
    restarted_bars: int
    empty_bars: int
    cold_bars: int
    poor_bars: int
    """More than half of the market features are missing."""
    owed_steps: int
    collected: dict[str, dict[str, int]]
    """The collector's own counters per stream: repeated, rejected, lost …"""

    def entries(self, outcome: str) -> int:
        """Return how many entries had an outcome, all streams together."""
        return sum(stream.outcomes.get(outcome, 0) for stream in self.streams)

    @property
    def read(self) -> int:
        """Entries read."""
        return sum(stream.read for stream in self.streams)

    @property
    def lost(self) -> int | None:
        """Entries trimmed before they were read, as far as counted; None where none are."""
        known = [stream.lost for stream in self.streams if stream.lost is not None]
        return sum(known) if known else None

    @property
    def lost_text(self) -> str:
        """Say how many entries were lost, and where that is not known."""
        lost = self.lost
        if lost is None:
            return "not counted"
        if all(stream.lost is not None for stream in self.streams):
            return f"{lost:,}"
        return f"≥ {lost:,}" if lost else "not counted everywhere"


def examine(
    db: duckdb.DuckDBPyConnection,
    bars: Bars,
    traded: Mapping[str, Traded],
    volatility: Ints,
    step_us: int,
    collected: Mapping[str, Mapping[str, int]],
) -> Health:
    """Check the data of a scope whose bars are loaded.

    Args:
        db: the cursor on which `Bars.load` ran.
        volatility: group of each bar, known before it began; see `shadow.evaluation.slices`.
        step_us: length of a bar.
        collected: stream -> what the collector counted.
    """
    ledger = db.execute(f"SELECT counts FROM ledger ORDER BY {ORDER} DESC LIMIT 1").fetchall()
    counts: dict[str, dict[str, int]] = ledger[0][0] if ledger else {}
    streams = tuple(_stream(name, dict(counts[name])) for name in sorted(counts))
    checks = [
        *_ledger_checks(db, counts),
        _step_check(db),
        _v2_check(db),
        _hole_check(bars, step_us),
        _equity_check(bars, traded),
        _incident_check(db),
        _collector_check(db, collected),
    ]
    asymmetry = tuple(_asymmetries(db, bars, volatility, step_us))
    known = [test.p for test in asymmetry if test.p is not None]
    return Health(
        funnel=tuple(_funnel(db, bars, streams)),
        streams=streams,
        checks=tuple(checks),
        unmatched=_unmatched(db),
        asymmetry=asymmetry,
        asymmetry_p=min(min(known) * len(known), 1.0) if known else None,
        coverage=_coverage(bars, step_us),
        bars=len(bars.ts_us),
        gap_bars=bars.gap_bars,
        restarted_bars=bars.restarted_bars,
        empty_bars=bars.empty_bars,
        cold_bars=int((~bars.warm).sum()),
        poor_bars=_poor_bars(db),
        owed_steps=bars.owed_steps,
        collected={name: dict(values) for name, values in sorted(collected.items())},
    )


def _funnel(
    db: duckdb.DuckDBPyConnection, bars: Bars, streams: Sequence[Stream]
) -> Iterator[Stage]:
    read = sum(stream.read for stream in streams)
    lost = sum(stream.lost or 0 for stream in streams)
    dead = sum(stream.outcomes.get("dead_letter", 0) for stream in streams)
    yield Stage("received", read, read + lost, "entries of the bus that were read before trimming")
    yield Stage("valid", read - dead, read, "of these, entries that could be decoded")
    pairs = count(db, "SELECT count(*) FROM scoped_pairs")
    alone = count(
        db, "SELECT count(*) FROM scoped_unpaired WHERE side = 'v2' AND reason <> 'duplicate'"
    )
    yield Stage("matched", pairs, pairs + alone, "decisions of RL v2 that have their v3 decision")
    n = len(bars.ts_us)
    yield Stage(
        "simulated", n, n + bars.empty_bars, "bars in which the arms were marked and traded"
    )


def _unmatched(db: duckdb.DuckDBPyConnection) -> tuple[Unmatched, ...]:
    rows = db.execute(
        """
        SELECT side, reason, count(*) FROM scoped_unpaired
        GROUP BY side, reason ORDER BY side, 3 DESC, reason
        """
    ).fetchall()
    return tuple(Unmatched(*row) for row in rows)


def _asymmetries(
    db: duckdb.DuckDBPyConnection, bars: Bars, volatility: Ints, step_us: int
) -> Iterator[Asymmetry]:
    """Yield a test per grouping: v3 failing in fast markets would be survivorship."""
    rows = (
        db.execute(_DUE, [step_us]).fetchnumpy()
        if len(bars.ts_us)
        else {"symbol": np.zeros(0, np.int64)}
    )
    symbol = np.ma.filled(np.ma.asarray(rows["symbol"]).astype(np.int64), -1)
    if not (symbol >= 0).any():
        return
    n, alone = (np.asarray(rows[name], np.int64) for name in ("n", "alone"))
    bar = bars.at(symbol, np.asarray(rows["ts_us"], np.int64))
    groups = {
        "symbol": (symbol, bars.symbols),
        "regime": (np.where(bar < 0, -1, bars.regime[bar]), bars.regimes),
        "volatility": (np.where(bar < 0, -1, volatility[bar]), VOLATILITY[:-1]),
    }
    for by, (group, names) in groups.items():
        names = (*names, "not known")
        total, missing = (np.bincount(group % len(names), x, len(names)) for x in (n, alone))
        counts = [
            (name, int(total[i]), int(missing[i])) for i, name in enumerate(names) if total[i]
        ]
        yield Asymmetry(by, tuple(counts), _alike([row[1:] for row in counts]))


_DUE = """
    SELECT enum_code(TRY_CAST(symbol AS report_symbol)) AS symbol,
           event_ts_us // $1 * $1 AS ts_us,
           count(*) AS n, count(*) FILTER (alone) AS alone
    FROM (
        SELECT symbol, event_ts_us, false AS alone FROM scoped_pairs
        UNION ALL
        SELECT symbol, event_ts_us, true FROM scoped_unpaired
        WHERE side = 'v2' AND reason <> 'duplicate'
    ) GROUP BY ALL
"""
"""Decisions of RL v2 by symbol and step: those of one step share their bar."""


def _alike(groups: Sequence[tuple[int, int]]) -> float | None:
    """Return the p-value of equal shares; None where a count of less than 5 is expected."""
    total, alone = sum(n for n, _ in groups), sum(n for _, n in groups)
    if len(groups) < 2 or alone == 0:
        return None
    least = min(n for n, _ in groups) * min(alone, total - alone) / total
    if least < 5.0:
        return None
    missing, totals = [missing for _, missing in groups], [n for n, _ in groups]
    return asymmetry(missing, totals, rng=np.random.default_rng(0))


def _coverage(bars: Bars, step_us: int) -> Coverage:
    """Return how complete the bars are, hour by hour, in at most `STRIP` slices."""
    if not len(bars.ts_us):
        return Coverage((), ())
    hour = 3_600_000_000
    number = (bars.ts_us - 1) // hour
    first = int(number[0])
    rows = np.bincount(number - first)
    expected = len(bars.symbols) * hour / step_us
    share = np.minimum(rows / expected, 1.0)
    share = share[:-1] if len(share) > 1 else share  # the last hour is not over yet
    slices = -(-len(share) // STRIP)
    starts = np.arange(0, len(share), slices)
    lowest = np.minimum.reduceat(share, starts)
    times = (first + starts) * hour
    return Coverage(tuple(times.tolist()), tuple(np.round(lowest, 4).tolist()))


def _poor_bars(db: duckdb.DuckDBPyConnection) -> int:
    mask = sum(1 << i for i in MARKET)
    return count(
        db,
        "SELECT count(*) FROM report_bars "
        f"WHERE bit_count(missing_mask & {mask}) > {len(MARKET)} / 2",
    )


def _stream(name: str, counts: Mapping[str, int]) -> Stream:
    beside = ("read", "lost", "produced", "unread")
    known = {outcome: counts[outcome] for outcome in OUTCOMES if outcome in counts}
    other = {key: n for key, n in sorted(counts.items()) if key not in (*OUTCOMES, *beside)}
    outcomes = known | other
    return Stream(name, counts.get("read", sum(outcomes.values())), outcomes, counts.get("lost"))


def _ledger_checks(
    db: duckdb.DuckDBPyConnection, counts: Mapping[str, Mapping[str, int]]
) -> Iterator[Check]:
    if not counts:
        yield Check("the worker's ledger is in the store", False, "no ledger row")
        return
    streams = [_stream(name, values) for name, values in counts.items()]
    read = sum(stream.read for stream in streams)
    accounted = sum(sum(stream.outcomes.values()) for stream in streams)
    yield Check(
        "entries read = sum of their outcomes",
        all(stream.read == sum(stream.outcomes.values()) for stream in streams),
        f"{read:,} read, {accounted:,} accounted for",
    )
    decided = {stream.stream: stream.outcomes.get("decided", 0) for stream in streams}
    stored = dict(
        db.execute("SELECT source_event_type, count(*) FROM decisions GROUP BY 1").fetchall()
    )
    missing = sum(max(n - stored.get(stream, 0), 0) for stream, n in decided.items())
    yield Check(
        "every decision the ledger counts is in the store",
        missing == 0,
        f"{sum(decided.values()):,} counted by the last ledger row, {sum(stored.values()):,} in "
        f"the store" + (f", {missing:,} missing" if missing else ""),
    )
    conflated = sum(stream.outcomes.get("conflated", 0) for stream in streams)
    named = count(
        db, "SELECT coalesce(sum(len(entry_ids)), 0) FROM ledger WHERE reason = 'conflated'"
    )
    if conflated or named:
        yield Check(
            "every conflated entry is named in the ledger",
            named >= conflated,
            f"{conflated:,} counted, {named:,} named",
        )


def _step_check(db: duckdb.DuckDBPyConnection) -> Check:
    steps = "FROM scoped_decisions WHERE kind = 'step'"
    sums = "SELECT count(*), bit_xor(hash({0})) FROM (SELECT {0} {1})"
    wanted, found = (
        db.execute(sums.format(name, source)).fetchall()
        for name, source in (
            ("step_decision_id", "FROM report_bars WHERE step_decision_id IS NOT NULL"),
            ("decision_id", steps),
        )
    )
    missing = 0
    if wanted != found:  # there may be more steps than bars; a sum is quicker where there are not
        missing = count(
            db,
            f"""
            SELECT count(*) FROM report_bars
            ANTI JOIN (SELECT decision_id {steps}) AS steps
            ON report_bars.step_decision_id = steps.decision_id
            WHERE step_decision_id IS NOT NULL
            """.replace("scoped_decisions", "decisions"),
        )
    text = "all there" if missing == 0 else f"{missing:,} missing"
    return Check("the step decision of every bar is in the store", missing == 0, text)


def _v2_check(db: duckdb.DuckDBPyConnection) -> Check:
    decided = count(db, "SELECT count(*) FROM v2_decisions")
    paired = count(db, "SELECT count(*) FROM pairs")
    alone = count(db, "SELECT count(*) FROM unpaired WHERE side = 'v2'")
    waiting = decided - paired - alone
    return Check(
        "RL v2's decisions = paired + unpaired + still open",
        waiting >= 0,
        f"{decided:,} = {paired:,} + {alone:,} + {waiting:,}",
    )


def _hole_check(bars: Bars, step_us: int) -> Check:
    due = bars.ts_us + step_us * (1 + bars.empty_after)
    order = bars.by_symbol[np.argsort(bars.run[bars.by_symbol], kind="stable")]
    before, after = order[:-1], order[1:]
    follow = (bars.symbol[before] == bars.symbol[after]) & (bars.run[before] == bars.run[after])
    holes = int((follow & (bars.ts_us[after] != due[before])).sum())
    found = "none missing" if holes == 0 else f"bars are missing in {holes:,} places"
    return Check("bars follow each other without a hole", holes == 0, found)


def _equity_check(bars: Bars, traded: Mapping[str, Traded]) -> Check:
    """Compare every account's own equity with the profits of its bars."""
    worst = 0.0
    account = bars.run * len(bars.symbols) + bars.symbol  # a run's accounts may begin anew
    order = np.argsort(account, kind="stable")
    _, first, n = np.unique(account[order], return_index=True, return_counts=True)
    begin, end = order[first], order[first + n - 1]
    for arm in traded.values():
        earned = np.add.reduceat(arm.net[order], first) if len(first) else arm.net
        start = arm.equity[begin] - arm.net[begin]
        difference = np.abs(arm.equity[end] - start - earned)
        worst = max(worst, float(difference.max(initial=0.0)))
    ok = worst <= 1e-9 * max(bars.total_capital, 1.0)
    found = "equal within rounding" if ok else f"differs by up to {worst:,.2f}"
    return Check("change of equity = sum of net profits, every account", ok, found)


def _incident_check(db: duckdb.DuckDBPyConnection) -> Check:
    found = db.execute(
        """
        SELECT reason, count(*) FROM ledger
        WHERE reason NOT IN ('minute', 'stop', 'conflated', 'counting', 'swap')
        GROUP BY 1 ORDER BY 1
        """
    ).fetchall()
    text = ", ".join(f"{reason} {n:,}" for reason, n in found) or "none"
    return Check("no incident in the ledger", not found, text, decides=False)


def _collector_check(
    db: duckdb.DuckDBPyConnection, collected: Mapping[str, Mapping[str, int]]
) -> Check:
    lost = sum(counts.get("lost", 0) for counts in collected.values())
    parked = count(db, "SELECT count(*) FROM rejected")
    return Check(
        "the collector lost nothing and could read everything",
        lost == 0 and parked == 0,
        f"{lost:,} entries trimmed before they were collected, {parked:,} unreadable",
    )
