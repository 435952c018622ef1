"""How do RL v3 and RL v2 behave, side by side, and is v3's confidence worth its name?

Both policies are put on one footing: what each bar did to an arm's position is one of five classes
of target change. Bars of cold symbols are left out. Everything is computed from one run of a store;
intervals come from resampling whole batches, never single decisions, and bound each number with
95 % confidence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import duckdb
import msgspec
import numpy as np
from numpy.typing import NDArray

from rlv3.events import ACTION_TABLE
from shadow.evaluation.bars import Bars, Traded
from shadow.evaluation.batches import Floats, Ints
from shadow.evaluation.effect import Range
from shadow.statistics import agreement
from shadow.statistics.inference import DRAWS, interval

CLASSES = ("long", "short", "hold", "reduce", "exit")
"""What a bar did to a position: add or flip long, add or flip short, nothing, less of it, none."""
SIDES = ("short", "flat", "long")
EXPOSURE_BINS = (-0.15, -0.075, -0.01, 0.01, 0.075, 0.15)
HISTOGRAM = tuple(round(0.05 * i - 0.225, 3) for i in range(10))
WINDOWS_US = tuple(int(hours * 3_600e6) for hours in (1, 4, 24, 168, 672, 8_064))
MOST_WINDOWS = 60
HORIZON = 15
"""Bars after which an order is judged."""
EXTREMES = 20
FEW_BATCHES = 8
"""Fewer are not resampled."""
FEW_SAMPLES = 50
"""Fewer orders say nothing about calibration."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.9, 0.95)
_LONG, _SHORT, _HOLD, _REDUCE, _EXIT = range(5)


class Confusion(msgspec.Struct, frozen=True):
    """How often two arms did the same, on the five classes."""

    classes: tuple[str, ...]
    table: tuple[tuple[int, ...], ...]
    """Bars; rows v3, columns v2."""
    n: int
    batches: int
    raw: Range
    """Share on the diagonal."""
    kappa: Range
    ac1: Range
    """Gwet's AC1: unlike kappa, it does not fall when nearly all is HOLD."""
    weighted_kappa: Range
    """Quadratic weights on the exposures at bar closes, by `exposure_bins`."""
    exposure_bins: tuple[float, ...]
    """Inner edges, fractions of equity."""
    exposure_table: tuple[tuple[int, ...], ...]
    """Bars; rows v3, columns v2."""


class Cell(msgspec.Struct, frozen=True):
    """What the bars of one cell brought: v3's net return minus v2's."""

    v3: str
    v2: str
    bars: int
    mean_bps: Range
    """Per bar, in basis points of the symbol's reference capital."""
    total: float
    """Account currency."""


class Window(msgspec.Struct, frozen=True):
    """A mix of actions in one stretch of time, against the reference stretch."""

    start_us: int
    end_us: int
    counts: tuple[int, ...]
    psi: float | None
    """Population stability index; null in the reference and where nothing was counted."""
    p: float | None
    """How often the index is as large when nothing drifts (see `Drift.tau`)."""
    js_bits: float | None
    """Jensen-Shannon divergence (not its root) in bits."""


class Drift(msgspec.Struct, frozen=True):
    """How one arm's mix changed over the run."""

    what: str
    """v3's six actions at steps, or v2's five classes."""
    names: tuple[str, ...]
    total: tuple[int, ...]
    reference: int
    """How many of the first windows, taken together, are the reference."""
    tau: float
    """How many counts are worth one independent count: batches vary so much more than chance."""
    windows: tuple[Window, ...]


class Holding(msgspec.Struct, frozen=True):
    """How long an arm keeps a side, in seconds."""

    arm: str
    closed: int
    """Positions that ended within the run."""
    open: int
    """Positions that the run's end cut short; not in the figures below."""
    mean: Range
    quantiles: tuple[float, ...]
    """At 5, 25, 50, 75, 90 and 95 %; empty without a closed position."""


class Exposure(msgspec.Struct, frozen=True):
    """What an arm held at bar closes, as fractions of equity."""

    arm: str
    mean_abs: Range
    net: Range
    """Signed mean."""
    long: float
    """Share of bar closes; with `short` and `flat` adds up to 1."""
    short: float
    flat: float
    edges: tuple[float, ...]
    """Of the histogram."""
    bars: tuple[int, ...]


class Bin(msgspec.Struct, frozen=True):
    """Orders of about equal confidence, a point of the reliability curve."""

    n: int
    confidence: float
    """Mean."""
    came_true: float
    """Share that earned more than holding still would have, after isotonic regression: what this
    confidence is worth."""
    low: float
    """Where 95 % of the curves of a calibrated confidence lie."""
    high: float


class Calibration(msgspec.Struct, frozen=True):
    """Is the probability of the chosen action the probability that it was right?

    Right: over the next `horizon` bars, the order's price gain exceeded its fees and slippage, so
    that it beat HOLD. Samples of a symbol do not overlap.
    """

    horizon: int
    n: int
    left_out: int
    """Orders that overlapped a sample of their symbol, or whose horizon was cut short."""
    base_rate: Range
    ece: Range
    """Expected calibration error: root mean square gap in bins of equal mass, bias removed."""
    brier: Range
    brier_of_base_rate: float | None
    """What always saying the base rate would score: above it, confidence is worse than nothing."""
    bins: tuple[Bin, ...]


class Latency(msgspec.Struct, frozen=True):
    """From the entry's arrival to the commit of its decision, by the worker's clock."""

    kind: str
    """step or advisory."""
    n: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    max_ms: float


class Disagreement(msgspec.Struct, frozen=True):
    """A stretch of bars in which the two held different sides of one symbol."""

    symbol: str
    start_us: int
    """Begin of its first bar."""
    end_us: int
    """End of its last bar."""
    bars: int
    v3: str
    """Side held in the first bar."""
    v2: str
    difference: float
    """v3's net profit minus v2's, account currency."""
    v3_decision_id: str | None
    """The step in force when it began, which `rlv3-shadow explain` takes; null when it began with
    the symbol's first bar."""
    v2_decision_id: str | None
    """The newest decision that the v2 arm followed then."""


class Behaviour(msgspec.Struct, frozen=True):
    """Everything a reader is shown about what both policies did."""

    confusion: Confusion
    cells: tuple[Cell, ...]
    """By what both did in the bar, where they differed."""
    sides: tuple[Cell, ...]
    """By the sides held at the bar's close; all nine add up to the whole difference."""
    drifts: tuple[Drift, ...]
    holding: tuple[Holding, ...]
    exposure: tuple[Exposure, ...]
    calibration: Calibration
    latency: tuple[Latency, ...]
    worst: tuple[Disagreement, ...]
    """The 20 that cost v3 most."""
    best: tuple[Disagreement, ...]
    """The 20 that gained v3 most."""


def behave(
    db: duckdb.DuckDBPyConnection,
    bars: Bars,
    traded: Mapping[str, Traded],
    *,
    step_us: int,
    batch_us: int,
    seed: int = 0,
) -> Behaviour:
    """Describe how both policies behaved.

    Args:
        db: the cursor on which `bars` were loaded.
        step_us: length of a bar.
        batch_us: length of a batch, the unit that is resampled.
        seed: of the resampling; the same gives the same bits.
    """
    rng = np.random.default_rng(seed)
    played = _Played.of(bars, traded, batch_us, rng)
    v3, v2 = played.v3, played.v2
    tables = _count(played, v3.changes, v2.changes, len(CLASSES), bars.warm)
    worst, best = extremes(db, bars, v3.side, v2.side, played.difference, step_us)
    return Behaviour(
        confusion=_confusion(played, tables),
        cells=tuple(_cells(played, CLASSES, v3.changes, v2.changes, bars.warm, differ=True)),
        sides=tuple(_cells(played, SIDES, v3.side + 1, v2.side + 1, None, differ=False)),
        drifts=_drifts(db, played, tables),
        holding=tuple(_holding(played, name, step_us) for name in ("v3", "v2")),
        exposure=tuple(_exposure(played, name) for name in ("v3", "v2")),
        calibration=_calibration(db, played, rng, step_us),
        latency=_latency(db),
        worst=worst,
        best=best,
    )


# -- what both did ---------------------------------------------------------------------------------


class _Arm(NamedTuple):
    """One arm's bars, in the order of `Bars`."""

    side: Ints
    exposure: Floats
    change: Floats
    """Of the quantity held, in units of the symbol."""
    changes: Ints
    """Index into `CLASSES`."""
    turnover: Floats
    cost: Floats


class _Played(NamedTuple):
    """Bars, arms and the batches that are resampled."""

    bars: Bars
    v3: _Arm
    v2: _Arm
    difference: Floats
    """v3's net profit minus v2's, account currency."""
    batch: Ints
    """Of every bar."""
    starts_us: Ints
    """Begin of every batch."""
    batch_us: int
    weights: Floats
    """How often every batch is in each sample of batches; all intervals use the same samples."""

    @classmethod
    def of(
        cls,
        bars: Bars,
        traded: Mapping[str, Traded],
        batch_us: int,
        rng: np.random.Generator,
    ) -> _Played:
        number = (bars.ts_us - 1) // batch_us
        first = int(number[0]) if len(number) else 0
        count = int(number[-1]) - first + 1 if len(number) else 0
        return cls(
            bars=bars,
            v3=_arm(bars, traded["v3"]),
            v2=_arm(bars, traded["v2"]),
            difference=traded["v3"].net - traded["v2"].net,
            batch=number - first,
            starts_us=(first + np.arange(count)) * batch_us,
            batch_us=batch_us,
            weights=_weights(count, rng),
        )

    def ratio(self, bars: NDArray[np.intp], top: Floats, bottom: Floats) -> Range:
        """Return sum(top) / sum(bottom) of some bars, its interval from resampled batches."""
        n = len(self.starts_us)
        sums = np.stack([np.bincount(self.batch[bars], values, n) for values in (top, bottom)])
        above, below = sums.sum(axis=1)
        if below == 0.0:
            return Range(None)
        value = float(above / below)
        if n < FEW_BATCHES:
            return Range(value)
        # no BLAS: the last bits of its products depend on how many threads it has
        above, below = np.einsum("db,cb->cd", self.weights, sums)
        if not (below > 0.0).all():  # too rare: some samples of the run have none of it
            return Range(value)
        return Range(*interval(value, above / below))


def _weights(batches: int, rng: np.random.Generator) -> Floats:
    """Return float64[draws, batches]: samples with replacement of whole batches."""
    weights = np.zeros((DRAWS, batches))
    for row in weights if batches >= FEW_BATCHES else ():
        row[:] = np.bincount(rng.integers(batches, size=batches), minlength=batches)
    return weights


def _arm(bars: Bars, traded: Traded) -> _Arm:
    quantity = traded.exposure * traded.equity / bars.close
    before = bars.before(quantity)
    change = quantity - before
    moved = (traded.paid.turnover > 0.0) & (
        np.abs(change) > 1e-9 * np.maximum(np.abs(quantity), np.abs(before))
    )
    flipped = np.sign(quantity) != np.sign(before)
    more = flipped | (np.abs(quantity) > np.abs(before))
    changes = np.full(len(quantity), _HOLD)
    changes[moved] = _REDUCE
    changes[moved & more & (quantity > 0.0)] = _LONG
    changes[moved & more & (quantity < 0.0)] = _SHORT
    changes[moved & (quantity == 0.0)] = _EXIT
    return _Arm(
        side=traded.side,
        exposure=traded.exposure,
        change=np.where(moved, change, 0.0),
        changes=changes,
        turnover=traded.paid.turnover,
        cost=traded.paid.cost,
    )


def _count(played: _Played, rows: Ints, columns: Ints, size: int, use: NDArray[np.bool_]) -> Floats:
    """Return a table of counts per batch, float64[batches, size, size]."""
    n = len(played.starts_us)
    cells = (played.batch * size + rows) * size + columns
    counts = np.bincount(cells[use], minlength=n * size * size)
    return counts.reshape(n, size, size).astype(np.float64)


def _confusion(played: _Played, tables: Floats) -> Confusion:
    v3, v2 = (np.digitize(arm.exposure, EXPOSURE_BINS) for arm in (played.v3, played.v2))
    binned = _count(played, v3, v2, len(EXPOSURE_BINS) + 1, played.bars.warm)
    return Confusion(
        classes=CLASSES,
        table=_whole(tables.sum(axis=0)),
        n=int(tables.sum()),
        batches=int((tables.sum(axis=(1, 2)) > 0.0).sum()),
        raw=_coefficient(played, tables, agreement.observed_agreement),
        kappa=_coefficient(played, tables, agreement.kappa),
        ac1=_coefficient(played, tables, agreement.ac1),
        weighted_kappa=_coefficient(played, binned, agreement.weighted_kappa),
        exposure_bins=EXPOSURE_BINS,
        exposure_table=_whole(binned.sum(axis=0)),
    )


def _coefficient(played: _Played, tables: Floats, coefficient: Callable[[Floats], Floats]) -> Range:
    total = tables.sum(axis=0)
    if total.sum() == 0.0:
        return Range(None)
    value = float(coefficient(total))
    if len(tables) < FEW_BATCHES:
        return Range(value)
    draws = played.weights @ tables.reshape(len(tables), -1)
    return Range(*interval(value, coefficient(draws.reshape(-1, *total.shape))))


def _whole(table: Floats) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in table.astype(np.int64).tolist())


def _cells(
    played: _Played,
    names: Sequence[str],
    v3: Ints,
    v2: Ints,
    use: NDArray[np.bool_] | None,
    *,
    differ: bool,
) -> Iterator[Cell]:
    """Yield what the bars of each cell brought, where there are any."""
    cell = v3 * len(names) + v2
    bps = 1e4 * played.difference / played.bars.capital
    for row, mine in enumerate(names):
        for column, other in enumerate(names):
            if differ and row == column:
                continue
            here = cell == row * len(names) + column
            bars = np.flatnonzero(here if use is None else here & use)
            if len(bars):
                yield Cell(
                    v3=mine,
                    v2=other,
                    bars=len(bars),
                    mean_bps=played.ratio(bars, bps[bars], np.ones(len(bars))),
                    total=float(played.difference[bars].sum()),
                )


# -- drift -----------------------------------------------------------------------------------------


def _drifts(db: duckdb.DuckDBPyConnection, played: _Played, tables: Floats) -> tuple[Drift, ...]:
    steps = np.zeros((len(played.starts_us), len(ACTION_TABLE)))
    if len(steps):
        rows = db.execute(
            """
            SELECT epoch_us((hour || ':00:00')::TIMESTAMP) AS ts_us, action, n FROM (
                SELECT event_ts[:13] AS hour, action, count(*) AS n FROM scoped_decisions
                WHERE kind = 'step' AND warm GROUP BY ALL
            )
            """
        ).fetchnumpy()  # hours, since reading a text as a time costs more than all the rest
        batch = rows["ts_us"] // played.batch_us - played.starts_us[0] // played.batch_us
        np.add.at(steps, (np.clip(batch, 0, len(steps) - 1), rows["action"]), rows["n"])
    return (
        _drift(played, "v3's actions at steps", ACTION_TABLE, steps),
        _drift(played, "v3's changes of target", CLASSES, tables.sum(axis=2)),
        _drift(played, "v2's changes of target", CLASSES, tables.sum(axis=1)),
    )


def _drift(played: _Played, what: str, names: tuple[str, ...], counts: Floats) -> Drift:
    """Compare each window's mix with that of the first quarter of the windows."""
    starts = played.starts_us
    if not len(starts):
        return Drift(what, names, (0,) * len(names), 0, 1.0, ())
    span = int(starts[-1] - starts[0]) + played.batch_us
    fitting = [us for us in WINDOWS_US if us >= played.batch_us and span <= us * MOST_WINDOWS]
    length = fitting[0] if fitting else span
    window = starts // length - starts[0] // length
    sums = np.stack([np.bincount(window, column) for column in counts.T], axis=1)
    reference = max(1, len(sums) // 4)
    before = sums[:reference].sum(axis=0)
    tau = _overdispersion(counts, window)
    ends = np.append(np.flatnonzero(np.diff(window)), len(starts) - 1)
    firsts = np.append(0, ends[:-1] + 1)
    windows = []
    for number, row in enumerate(sums):
        found = None
        if number >= reference and before.sum() > 0.0 and row.sum() > 0.0:
            found = agreement.drift(before, row, tau_before=tau, tau_after=tau)
        windows.append(
            Window(
                start_us=int(starts[firsts[number]]),
                end_us=int(starts[ends[number]]) + played.batch_us,
                counts=tuple(row.astype(np.int64).tolist()),
                psi=None if found is None else found.psi,
                p=None if found is None else found.p,
                js_bits=None if found is None else found.js_bits,
            )
        )
    total = tuple(sums.sum(axis=0).astype(np.int64).tolist())
    return Drift(what, names, total, reference, tau, tuple(windows))


def _overdispersion(counts: Floats, window: Ints) -> float:
    """Return how much more the batches of a window differ than independent counts would, >= 1.

    Pearson's chi-square over its degrees of freedom, summed over windows, so that a change from
    one window to the next does not hide itself.
    """
    statistic = freedom = 0.0
    for number in range(int(window[-1]) + 1):
        table = counts[window == number]
        table = table[table.sum(axis=1) > 0.0][:, table.sum(axis=0) > 0.0]
        if min(table.shape) < 2:
            continue
        expected = np.outer(table.sum(axis=1), table.sum(axis=0)) / table.sum()
        statistic += float(((table - expected) ** 2 / expected).sum())
        freedom += (table.shape[0] - 1) * (table.shape[1] - 1)
    return max(1.0, statistic / freedom) if freedom else 1.0


# -- positions -------------------------------------------------------------------------------------


def _holding(played: _Played, name: str, step_us: int) -> Holding:
    bars, arm = played.bars, played.v3 if name == "v3" else played.v2
    first, last, cut = bars.stretches(arm.side)
    held = arm.side[first] != 0
    first, last, cut = first[held], last[held], cut[held]
    seconds = (bars.ts_us[last] - bars.ts_us[first] + step_us) / 1e6
    done = ~cut
    closed = seconds[done]
    quantiles = np.quantile(closed, QUANTILES, method="inverted_cdf").tolist() if done.any() else []
    return Holding(
        arm=name,
        closed=int(done.sum()),
        open=int(cut.sum()),
        mean=played.ratio(last[done], closed, np.ones(len(closed))),
        quantiles=tuple(quantiles),
    )


def _exposure(played: _Played, name: str) -> Exposure:
    bars, arm = played.bars, played.v3 if name == "v3" else played.v2
    n = len(bars.ts_us)
    every, ones = np.arange(n), np.ones(n)
    inside = np.clip(arm.exposure, HISTOGRAM[0], HISTOGRAM[-1])
    return Exposure(
        arm=name,
        mean_abs=played.ratio(every, np.abs(arm.exposure), ones),
        net=played.ratio(every, arm.exposure, ones),
        long=_share(arm.side == 1),
        short=_share(arm.side == -1),
        flat=_share(arm.side == 0),
        edges=HISTOGRAM,
        bars=tuple(np.histogram(inside, HISTOGRAM)[0].tolist()),
    )


def _share(which: NDArray[np.bool_]) -> float:
    return float(which.mean()) if len(which) else 0.0


# -- confidence ------------------------------------------------------------------------------------


def _calibration(
    db: duckdb.DuckDBPyConnection, played: _Played, rng: np.random.Generator, step_us: int
) -> Calibration:
    decided, filled, later, left_out = _samples(played, step_us)
    bars, arm = played.bars, played.v3
    gain = np.sign(arm.change[filled]) * arm.turnover[filled]
    gain *= bars.close[later] / bars.open[filled] - 1.0
    right = gain > arm.cost[filled]
    confidence = _confidence_of(db, bars, decided)
    known = np.isfinite(confidence)
    scores, outcomes = confidence[known], right[known].astype(np.float64)
    left_out += int((~known).sum())
    n = len(scores)
    if n < FEW_SAMPLES:
        unknown = Range(None)
        return Calibration(HORIZON, n, left_out, unknown, unknown, unknown, None, ())
    found = agreement.calibration_intervals(scores, outcomes, rng=rng)
    rate = found["rate"].value
    base_rate, ece, brier = (Range(*found[name]) for name in ("rate", "ece", "brier"))
    curve = agreement.reliability(scores, outcomes, rng=rng)
    bins = tuple(
        Bin(int(mass), float(score), float(frequency), float(low), float(high))
        for mass, score, frequency, low, high in zip(
            curve.n, curve.score, curve.frequency, curve.low, curve.high, strict=True
        )
    )
    return Calibration(HORIZON, n, left_out, base_rate, ece, brier, rate * (1.0 - rate), bins)


def _samples(played: _Played, step_us: int) -> tuple[Ints, Ints, Ints, int]:
    """Return the bars in which v3 decided, in which the order filled and after which it is judged.

    The last number counts orders that are no sample.
    """
    bars, arm = played.bars, played.v3
    order = bars.by_symbol
    orders = np.flatnonzero((arm.change != 0.0) & bars.warm)
    orders = orders[np.lexsort((bars.ts_us[orders], bars.symbol[orders]))]
    at = bars.place[orders]
    ends = np.searchsorted(bars.symbol[order], bars.symbol[orders], side="right")
    whole = (at + HORIZON - 1 < ends) & ~np.isin(orders, bars.first)
    at, found = at[whole], orders[whole]
    later = order[at + HORIZON - 1]
    steady = bars.ts_us[later] - bars.ts_us[found] == (HORIZON - 1) * step_us
    at, found, later = at[steady], found[steady], later[steady]
    taken, free = [], -1
    for number, position in enumerate(at.tolist()):
        if position >= free:
            taken.append(number)
            free = position + HORIZON
    chosen = np.asarray(taken, np.int64)
    return order[at[chosen] - 1], found[chosen], later[chosen], len(orders) - len(chosen)


def _confidence_of(db: duckdb.DuckDBPyConnection, bars: Bars, decided: Ints) -> Floats:
    """Return the confidence of the steps of some bars; nan where the decision is not there.

    A step is decided at the first tick past its bar, so its bar is the newest that ended before.
    """
    confidence = np.full(len(bars.ts_us), np.nan)
    if len(decided):
        rows = db.execute(
            """
            SELECT enum_code(TRY_CAST(symbol AS report_symbol)) AS symbol, event_ts_us, confidence
            FROM scoped_decisions WHERE kind = 'step' AND action <> 0
            """
        ).fetchnumpy()
        symbol = np.ma.filled(np.ma.asarray(rows["symbol"]).astype(np.int64), -1)
        bar = bars.at(symbol, np.asarray(rows["event_ts_us"], np.int64) - 1)
        there = (bar >= 0) & (symbol >= 0)
        confidence[bar[there]] = np.asarray(rows["confidence"], np.float64)[there]
    return confidence[decided]


def _latency(db: duckdb.DuckDBPyConnection) -> tuple[Latency, ...]:
    """Return the latencies of both kinds; nothing where time was not measured (a backtest)."""
    rows = db.execute(
        """
        SELECT kind, count(*), quantile_disc(latency_ms, [0.5, 0.9, 0.99]), max(latency_ms)
        FROM scoped_decisions GROUP BY kind ORDER BY kind DESC
        """
    ).fetchall()
    if all(most <= 0.0 for *_, most in rows):
        return ()
    return tuple(Latency(kind, n, p50, p90, p99, most) for kind, n, (p50, p90, p99), most in rows)


# -- the widest disagreements ----------------------------------------------------------------------


def extremes(
    db: duckdb.DuckDBPyConnection,
    bars: Bars,
    v3: Ints,
    v2: Ints,
    difference: Floats,
    step_us: int,
) -> tuple[tuple[Disagreement, ...], tuple[Disagreement, ...]]:
    """Return the stretches of disagreement that cost and that gained v3 most, at most 20 each.

    Args:
        db: the cursor on which `bars` were loaded.
        v3: side per bar; `v2` too.
        difference: v3's net profit minus v2's per bar, account currency.
    """
    first, last, _ = bars.stretches((v3 + 1) * 3 + v2 + 1)
    place = bars.place
    gains = np.append(0.0, np.cumsum(difference[bars.by_symbol]))
    gain = gains[place[last] + 1] - gains[place[first]]
    apart = np.flatnonzero(v3[first] != v2[first])
    rank = apart[np.lexsort((bars.ts_us[first[apart]], bars.symbol[first[apart]], gain[apart]))]
    worst = [i for i in rank[:EXTREMES].tolist() if gain[i] < 0.0]
    best = [i for i in rank[: -EXTREMES - 1 : -1].tolist() if gain[i] > 0.0]
    begins = first[worst + best].tolist()
    steps = _steps_before(db, bars, begins, place)
    others = _v2_before(db, bars, begins)
    found = [
        Disagreement(
            symbol=bars.symbols[bars.symbol[first[i]]],
            start_us=int(bars.ts_us[first[i]]) - step_us,
            end_us=int(bars.ts_us[last[i]]),
            bars=int(place[last[i]] - place[first[i]]) + 1,
            v3=SIDES[v3[first[i]] + 1],
            v2=SIDES[v2[first[i]] + 1],
            difference=float(
                difference[bars.by_symbol[place[first[i]] : place[last[i]] + 1]].sum()
            ),
            v3_decision_id=steps.get(number),
            v2_decision_id=others.get(number),
        )
        for number, i in enumerate(worst + best)
    ]
    return tuple(found[: len(worst)]), tuple(found[len(worst) :])


def _steps_before(
    db: duckdb.DuckDBPyConnection, bars: Bars, begins: Sequence[int], place: Ints
) -> dict[int, str]:
    """Return the step of the bar before each of these, by its place among them."""
    wanted = []
    for number, bar in enumerate(begins):
        before = bars.by_symbol[place[bar] - 1]
        if place[bar] and bars.symbol[before] == bars.symbol[bar]:
            wanted.append((number, int(bars.ts_us[before]), bars.symbols[bars.symbol[bar]]))
    times = ", ".join(str(ts_us) for _, ts_us, _ in wanted) or "NULL"
    return _look_up(
        db,
        wanted,
        f"""
        SELECT wanted.number, any_value(step_decision_id) FROM scoped_bars AS bars
        JOIN wanted ON bars.event_ts_us = wanted.ts_us AND bars.symbol = wanted.symbol
        WHERE step_decision_id IS NOT NULL AND event_ts_us IN ({times}) GROUP BY 1
        """,
    )


def _v2_before(db: duckdb.DuckDBPyConnection, bars: Bars, begins: Sequence[int]) -> dict[int, str]:
    """Return the newest v2 decision that moved the arm, at most a day before each bar's end.

    First its time, then its id: ids are most of what a store holds, so only few are read.
    """
    newest = _look_up(
        db,
        [
            (number, int(bars.ts_us[bar]), bars.symbols[bars.symbol[bar]])
            for number, bar in enumerate(begins)
        ],
        """
        SELECT wanted.number, max(event_ts_us) FROM wanted
        JOIN scoped_v2_decisions AS v2 ON v2.symbol = wanted.symbol
            AND v2.event_ts_us BETWEEN wanted.ts_us - 86400000000 AND wanted.ts_us
        WHERE v2.moves_arm GROUP BY 1
        """,
    )
    times = ", ".join(map(str, sorted(set(newest.values())))) or "NULL"
    return _look_up(
        db,
        [
            (number, ts_us, bars.symbols[bars.symbol[begins[number]]])
            for number, ts_us in newest.items()
        ],
        f"""
        SELECT wanted.number, max(decision_id) FROM scoped_v2_decisions AS v2
        JOIN wanted ON v2.event_ts_us = wanted.ts_us AND v2.symbol = wanted.symbol
        WHERE v2.moves_arm AND event_ts_us IN ({times}) GROUP BY 1
        """,
    )


def _look_up(
    db: duckdb.DuckDBPyConnection, wanted: Sequence[tuple[int, int, str]], query: str
) -> dict[int, Any]:
    if not wanted:
        return {}
    values = ", ".join(f"({number}, {ts_us}, ?)" for number, ts_us, _ in wanted)
    rows = f"WITH wanted(number, ts_us, symbol) AS (VALUES {values}) "
    return dict(db.execute(rows + query, [symbol for *_, symbol in wanted]).fetchall())
