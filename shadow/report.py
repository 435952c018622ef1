"""What does a comparison store say about RL v3 and RL v2, as plain numbers?

`summarise` reads one run of a store and returns a frozen `Report`; `shadow.render` turns it into
text, JSON and HTML. Nothing here judges: statistics and the verdict are not part of this version,
and no number claims significance.

Definitions, all over one run and at bar closes:
    net       gross - fees - slippage, in account currency, summed over symbols
    equity    reference capital of all symbols + net so far; a symbol without a new bar keeps its
              last value, one without any bar its capital
    drawdown  fall of equity from its highest value so far, as a fraction of that value
    entries   bar closes with a position where the bar before had none, or the opposite one
    kappa     (p_o - p_e) / (1 - p_e); undefined when p_e is 1

Sums are formed in one fixed order (time, symbol), so equal inputs give equal bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import duckdb
import msgspec
import numpy as np
from numpy.typing import NDArray

from rlv3.errors import DataError
from rlv3.events import ACTION_TABLE
from shadow.bars import Bars, Floats, Ints, Traded, drawdown, equity
from shadow.health import ORDER, Health, count, examine
from shadow.records import ARMS
from shadow.store import TABLES, StoreReader

REPORT_VERSION = 1
BUCKETS = 300
"""Points of a drawn curve; longer series keep the lowest, highest and last value per bucket."""
COLLECTED = ("repeated", "rejected", "lost")
"""Counters of the collector that a reader should see; its others are its own bookkeeping."""
NOT_MODELLED = (
    ("funding", "no funding payments; perpetual positions are held free of charge"),
    ("market impact", "our size does not move the price"),
    ("queue position", "no resting orders; every fill takes liquidity at the observed price"),
    ("partial fills", "every order fills whole, at one price"),
    ("latency distribution", "one fixed latency for both policies, no jitter, no outage"),
    ("liquidation and margin", "no margin calls; an account stops at its ruin limit instead"),
    ("leverage", "RL v2's leverage is recorded but does not scale its exposure"),
    ("exchange limits", "no tick size, lot size, rate limit or rejected order"),
    ("risk vetoes", "production's vetoes, stops and operator exits act on neither policy"),
    ("borrowing and taxes", "none"),
)
"""What the simulated accounts leave out: name and meaning."""


class Verdict(msgspec.Struct, frozen=True):
    """What the report concludes."""

    text: str
    why: tuple[str, ...]


NO_VERDICT = Verdict(
    "no verdict yet",
    ("no registration", "statistics are not part of this version"),
)


class Opponent(msgspec.Struct, frozen=True):
    """Who the v2 arm followed, and in how many bars."""

    name: str
    digest: str | None
    bars: int


class Run(msgspec.Struct, frozen=True):
    """What was frozen for the run that is reported."""

    run_id: str
    policy_digest: str | None
    feature_digest: str | None
    training: dict[str, str]
    rl_v2: str | None
    """reference, bus, off, or v3 in a self-play."""
    tables_digest: str | None
    settings: dict[str, float]
    opponents: tuple[Opponent, ...]
    other_runs: tuple[str, ...]
    """Runs in the same store that are not in this report, oldest first."""


class Period(msgspec.Struct, frozen=True):
    """What the bars cover."""

    start_us: int | None
    """Begin of the first bar."""
    end_us: int | None
    """End of the last bar."""
    symbols: tuple[str, ...]
    bars: int
    warm_bars: int


class Arm(msgspec.Struct, frozen=True):
    """One arm over all symbols; money in account currency."""

    name: str
    net: float
    gross: float
    fees: float
    slippage: float
    turnover: float
    """Traded notional."""
    max_drawdown: float
    """Fraction of the peak, at bar closes."""
    entries: int
    time_in_market: float | None
    """Share of bar closes with a position, over all symbols."""
    net_late: float
    """`net` had every fill come one tick later."""
    max_drawdown_late: float
    final_equity: float
    ruined: tuple[str, ...]
    """Symbols whose account was ruined."""


class Band(msgspec.Struct, frozen=True):
    """A curve: the last, lowest and highest value per point."""

    last: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


class Curves(msgspec.Struct, frozen=True):
    """Portfolio curves on a common grid, per arm; bucketed when long."""

    time_us: tuple[int, ...]
    """End of the bar (or of the bucket's last bar); the first is the start of the first bar."""
    bucketed: bool
    equity: dict[str, Band]
    drawdown: dict[str, Band]
    difference: Band
    """Net profit of v3 minus that of v2."""


class Agreement(msgspec.Struct, frozen=True):
    """How often two policies hold the same side."""

    table: tuple[tuple[int, int, int], ...]
    """Rows v3, columns v2; each short, flat, long."""
    n: int
    raw: float | None
    """Share on the diagonal (p_o); null without data."""
    expected: float | None
    """The same if both were independent (p_e)."""
    kappa: float | None
    """Null when undefined: no data, or p_e = 1."""
    opposite: float | None
    """Share with one long and the other short."""


class PairGroup(msgspec.Struct, frozen=True):
    """Pairs of one opponent made by one rule."""

    opponent: str
    rule: int
    pairs: int
    delta_ms: tuple[float, float, float, float, float]
    """v3's event time minus v2's: minimum, 5 %, 50 %, 95 %, maximum."""
    undirected: int
    """v2 gave no direction; not in the agreement."""
    cold: int
    """The symbol was cold; not in the agreement."""
    agreement: Agreement


class Unpaired(msgspec.Struct, frozen=True):
    """Decisions without a counterpart."""

    side: str
    reason: str
    decisions: int


class ActionMix(msgspec.Struct, frozen=True):
    """What v3 chose, in the order of the action table."""

    actions: tuple[str, ...]
    steps: tuple[int, ...]
    advisory: tuple[int, ...]
    steps_cold: int
    """Steps decided while a market feature lacked history (entries are masked)."""
    advisory_cold: int


class V2Source(msgspec.Struct, frozen=True):
    """Decisions of RL v2 from one source."""

    opponent: str
    decisions: int
    long: int
    flat: int
    short: int
    undirected: int
    moves_arm: int
    """Decisions that the v2 arm follows."""
    multiplier_assumed: int
    """Decisions without a sizing of their own: multiplier 1."""


class Symbol(msgspec.Struct, frozen=True):
    """One symbol."""

    symbol: str
    bars: int
    warm_bars: int
    net: dict[str, float]
    """Per arm."""
    entries: dict[str, int]
    agreement: Agreement


class Regime(msgspec.Struct, frozen=True):
    """Bars that began in one regime."""

    regime: str
    bars: int
    net: dict[str, float]
    """Per arm."""
    in_market: dict[str, float]
    """Per arm: share of these bars that closed with a position."""


class Outcomes(msgspec.Struct, frozen=True):
    """Real closes in production, recorded beside the simulation and part of no arm."""

    closes: int
    with_profit: int
    """Closes that state their profit."""


class Provenance(msgspec.Struct, frozen=True):
    """Where the numbers come from."""

    report_version: int
    schema_versions: dict[str, tuple[int, ...]]
    rows: dict[str, int]
    """Rows per table, all runs."""
    rejected: int
    input_sha256: str
    """Over segment names and row counts."""
    segments: int


class Report(msgspec.Struct, frozen=True):
    """Everything a reader of the report is shown, and nothing else."""

    verdict: Verdict
    notices: tuple[str, ...]
    run: Run
    period: Period
    arms: tuple[Arm, ...]
    curves: Curves
    agreement: Agreement
    pairs: tuple[PairGroup, ...]
    unpaired: tuple[Unpaired, ...]
    actions: ActionMix
    v2: tuple[V2Source, ...]
    symbols: tuple[Symbol, ...]
    regimes: tuple[Regime, ...]
    outcomes: Outcomes
    health: Health
    not_modelled: tuple[tuple[str, str], ...]
    provenance: Provenance


class Inputs(NamedTuple):
    """What a store knows beside its tables."""

    segments: tuple[tuple[str, int], ...] = ()
    """Path inside the store and rows, in name order."""
    collected: Mapping[str, Mapping[str, int]] = {}
    """Stream -> what the collector counted."""


def read_report(directory: str | Path, run_id: str | None = None) -> Report:
    """Summarise a store on disk.

    Args:
        run_id: the run to report; None for the newest.
    Raises:
        DataError: no store, nothing in it, a damaged segment, or no such run.
    """
    reader = StoreReader(directory)
    try:
        with reader.connect() as connection:
            return summarise(connection, _inputs(reader, connection), run_id)
    except duckdb.Error as error:
        first_line = str(error).partition("\n")[0]
        raise DataError(f"expected readable segments in {directory}, found {first_line}") from error


def summarise(
    connection: duckdb.DuckDBPyConnection, inputs: Inputs | None = None, run_id: str | None = None
) -> Report:
    """Summarise one run of a store.

    Args:
        connection: has the views of `StoreReader.connect`; left as it is.
        inputs: names and counters for the provenance.
        run_id: the run to report; None for the newest.
    Raises:
        DataError: no row of ours, or no such run.
    """
    inputs = Inputs() if inputs is None else inputs
    with connection.cursor() as db:
        return _summarise(db, inputs, run_id)


def _summarise(db: duckdb.DuckDBPyConnection, inputs: Inputs, run_id: str | None) -> Report:
    rows = _table_rows(db)
    run = _run(db, run_id)
    bars = Bars.load(db, run.run_id)
    traded = {name: Traded.load(db, bars, name) for name in ARMS}
    agreement = _agreement_of(traded["v3"].side, traded["v2"].side, bars.warm)
    v2 = _v2_sources(db, run.run_id)
    health = examine(db, bars, traded, _step_us(run), inputs.collected)
    return Report(
        verdict=NO_VERDICT,
        notices=_notices(run, bars, v2, health),
        run=run,
        period=_period(bars, run),
        arms=tuple(_arm(bars, name, traded[name]) for name in ARMS),
        curves=_curves(bars, traded, run),
        agreement=agreement,
        pairs=_pairs(db, run.run_id),
        unpaired=_unpaired(db, run.run_id),
        actions=_actions(db, run.run_id),
        v2=v2,
        symbols=_symbols(bars, traded),
        regimes=_regimes(bars, traded),
        outcomes=_outcomes(db, run.run_id),
        health=health,
        not_modelled=NOT_MODELLED,
        provenance=_provenance(db, rows, inputs),
    )


# -- the parts of a report -------------------------------------------------------------------------


def _table_rows(db: duckdb.DuckDBPyConnection) -> dict[str, int]:
    rows = {name: count(db, f"SELECT count(*) FROM {name}") for name in TABLES}
    if not any(rows.values()):
        raise DataError(
            "expected a store with decisions or comparisons of `rlv3-worker collect`, "
            "found no row of either"
        )
    return rows


def _run_ids(db: duckdb.DuckDBPyConnection) -> list[str]:
    """Return the runs of a store, oldest first."""
    tables = ("runs", "bars", "ledger", "v2_decisions")
    rows = " UNION ALL ".join(f"SELECT run_id, {ORDER} AS id FROM {name}" for name in tables)
    found = db.execute(f"SELECT run_id FROM ({rows}) GROUP BY 1 ORDER BY min(id), 1").fetchall()
    if not found:  # decisions only
        found = db.execute(
            "SELECT run_id FROM decisions GROUP BY 1 ORDER BY min(event_ts_us), 1"
        ).fetchall()
    return [run_id for (run_id,) in found]


def _run(db: duckdb.DuckDBPyConnection, run_id: str | None) -> Run:
    known = _run_ids(db)
    if run_id is None:
        run_id = known[-1]
    elif run_id not in known:
        raise DataError(f"expected one of the runs {', '.join(known)}, found {run_id}")
    frozen = db.execute(
        """
        SELECT policy_digest, feature_digest, training, rl_v2, tables_digest, settings
        FROM runs WHERE run_id = ? LIMIT 1
        """,
        [run_id],
    ).fetchall()
    policy, features, training, rl_v2, tables, settings = (
        frozen[0] if frozen else (_policy_of(db, run_id), None, {}, None, None, {})
    )
    opponents = db.execute(
        """
        SELECT opponent, opponent_digest, count(*) FROM bars WHERE run_id = ?
        GROUP BY ALL ORDER BY 3 DESC, 1, 2
        """,
        [run_id],
    ).fetchall()
    return Run(
        run_id=run_id,
        policy_digest=policy,
        feature_digest=features,
        training=dict(training),
        rl_v2=rl_v2,
        tables_digest=tables,
        settings=dict(settings),
        opponents=tuple(Opponent(*row) for row in opponents),
        other_runs=tuple(other for other in known if other != run_id),
    )


def _policy_of(db: duckdb.DuckDBPyConnection, run_id: str) -> str | None:
    """Return the policy of a run whose own row is not in the store."""
    found = db.execute(
        """
        SELECT any_value(policy_digest) FROM bars WHERE run_id = $1
        UNION ALL SELECT any_value(model_sha256) FROM decisions WHERE run_id = $1
        """,
        [run_id],
    ).fetchall()
    return next((digest for (digest,) in found if digest is not None), None)


def _period(bars: Bars, run: Run) -> Period:
    empty = len(bars.grid) == 0
    return Period(
        start_us=None if empty else _start_us(bars, run),
        end_us=None if empty else int(bars.grid[-1]),
        symbols=bars.symbols,
        bars=len(bars.ts_us),
        warm_bars=int(bars.warm.sum()),
    )


def _start_us(bars: Bars, run: Run) -> int:
    return int(bars.grid[0]) - _step_us(run)


def _step_us(run: Run) -> int:
    return int(run.settings.get("step_seconds", 60.0) * 1e6)


def _arm(bars: Bars, name: str, traded: Traded) -> Arm:
    net = float(traded.net.sum())
    return Arm(
        name=name,
        net=net,
        gross=float(traded.gross.sum()),
        fees=float(traded.fee.sum()),
        slippage=float(traded.slippage.sum()),
        turnover=float(traded.turnover.sum()),
        max_drawdown=float(drawdown(equity(bars, traded.net)).max()),
        entries=int(traded.entered.sum()),
        time_in_market=float((traded.side != 0).mean()) if len(traded.side) else None,
        net_late=float(traded.net_late.sum()),
        max_drawdown_late=float(drawdown(equity(bars, traded.net_late)).max()),
        final_equity=bars.total_capital + net,
        ruined=tuple(np.asarray(bars.symbols)[traded.ruined].tolist()),
    )


def _curves(bars: Bars, traded: Mapping[str, Traded], run: Run) -> Curves:
    times = np.concatenate([[_start_us(bars, run)], bars.grid]) if len(bars.grid) else bars.grid
    starts = _buckets(len(times))
    values = {name: equity(bars, arm.net)[: len(times)] for name, arm in traded.items()}
    difference = equity(bars, traded["v3"].net - traded["v2"].net) - bars.total_capital
    return Curves(
        time_us=tuple(times[_ends(starts, len(times))].tolist()),
        bucketed=len(starts) < len(times),
        equity={name: _band(curve, starts, 4) for name, curve in values.items()},
        drawdown={name: _band(drawdown(curve), starts, 8) for name, curve in values.items()},
        difference=_band(difference[: len(times)], starts, 4),
    )


def _buckets(n: int) -> Ints:
    """Return where each bucket of a series of n points starts; the first point stands alone."""
    if n <= BUCKETS:
        return np.arange(n)
    inner = 1 + np.arange(BUCKETS - 1) * (n - 1) // (BUCKETS - 1)
    return np.concatenate([[0], inner])


def _ends(starts: Ints, n: int) -> Ints:
    return np.append(starts[1:], n)[: len(starts)] - 1


def _band(values: Floats, starts: Ints, digits: int) -> Band:
    if len(values) == 0:
        return Band((), (), ())
    low, high = np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)
    last = values[_ends(starts, len(values))]
    return Band(*(tuple(np.round(part, digits).tolist()) for part in (last, low, high)))


def agreement(table: Sequence[Sequence[int]]) -> Agreement:
    """Describe a table of counts, rows v3 and columns v2, each short, flat, long.

    Cohen's kappa is formed from integers, so "undefined" is exact: p_e = 1 only when both policies
    hold one and the same side throughout.
    """
    n = sum(map(sum, table))
    same = sum(table[side][side] for side in range(3))
    chance = sum(sum(table[side]) * sum(row[side] for row in table) for side in range(3))
    rows = tuple((int(row[0]), int(row[1]), int(row[2])) for row in table)
    if n == 0:
        return Agreement(rows, 0, None, None, None, None)
    rest = n * n - chance
    return Agreement(
        table=rows,
        n=n,
        raw=same / n,
        expected=chance / (n * n),
        kappa=(n * same - chance) / rest if rest else None,
        opposite=(table[0][2] + table[2][0]) / n,
    )


def _agreement_of(v3: Ints, v2: Ints, use: NDArray[np.bool_]) -> Agreement:
    cells = (v3[use] + 1) * 3 + v2[use] + 1
    return agreement(np.bincount(cells, minlength=9).reshape(3, 3).tolist())


def _pairs(db: duckdb.DuckDBPyConnection, run_id: str) -> tuple[PairGroup, ...]:
    cells = ", ".join(
        f"count(*) FILTER (usable AND v3 = {v3} AND v2 = {v2})"
        for v3 in (-1, 0, 1)
        for v2 in (-1, 0, 1)
    )
    rows = db.execute(
        f"""
        SELECT opponent, rule, count(*), min(delta_us),
               quantile_disc(delta_us, [0.05, 0.5, 0.95]), max(delta_us),
               count(*) FILTER (v2 IS NULL), count(*) FILTER (v2 IS NOT NULL AND NOT warm), {cells}
        FROM (
            SELECT *, sign(v3_target) AS v3, sign(v2_exposure) AS v2,
                   warm AND v2_exposure IS NOT NULL AS usable
            FROM pairs WHERE run_id = ?
        ) GROUP BY opponent, rule ORDER BY opponent, rule
        """,
        [run_id],
    ).fetchall()
    return tuple(_pair_group(*row[:8], cells=row[8:]) for row in rows)


def _pair_group(
    opponent: str,
    rule: int,
    pairs: int,
    least: int,
    quantiles: Sequence[int],
    most: int,
    undirected: int,
    cold: int,
    *,
    cells: Sequence[int],
) -> PairGroup:
    low, middle, high = quantiles
    return PairGroup(
        opponent=opponent,
        rule=rule,
        pairs=pairs,
        delta_ms=(least / 1e3, low / 1e3, middle / 1e3, high / 1e3, most / 1e3),
        undirected=undirected,
        cold=cold,
        agreement=agreement([cells[0:3], cells[3:6], cells[6:9]]),
    )


def _unpaired(db: duckdb.DuckDBPyConnection, run_id: str) -> tuple[Unpaired, ...]:
    rows = db.execute(
        """
        SELECT side, reason, count(*) FROM unpaired WHERE run_id = ?
        GROUP BY side, reason ORDER BY side, 3 DESC, reason
        """,
        [run_id],
    ).fetchall()
    return tuple(Unpaired(*row) for row in rows)


def _actions(db: duckdb.DuckDBPyConnection, run_id: str) -> ActionMix:
    rows = db.execute(
        """
        SELECT kind, action, count(*), count(*) FILTER (NOT warm) FROM decisions WHERE run_id = ?
        GROUP BY kind, action
        """,
        [run_id],
    ).fetchall()
    counts = {(kind, action): n for kind, action, n, _ in rows}
    cold = {kind: sum(row[3] for row in rows if row[0] == kind) for kind in ("step", "advisory")}
    actions = range(len(ACTION_TABLE))
    return ActionMix(
        actions=ACTION_TABLE,
        steps=tuple(counts.get(("step", action), 0) for action in actions),
        advisory=tuple(counts.get(("advisory", action), 0) for action in actions),
        steps_cold=cold["step"],
        advisory_cold=cold["advisory"],
    )


def _v2_sources(db: duckdb.DuckDBPyConnection, run_id: str) -> tuple[V2Source, ...]:
    rows = db.execute(
        """
        SELECT opponent, count(*), count(*) FILTER (direction > 0),
               count(*) FILTER (direction = 0), count(*) FILTER (direction < 0),
               count(*) FILTER (direction IS NULL), count(*) FILTER (moves_arm),
               count(*) FILTER (multiplier_assumed)
        FROM v2_decisions WHERE run_id = ? GROUP BY opponent ORDER BY opponent
        """,
        [run_id],
    ).fetchall()
    return tuple(V2Source(*row) for row in rows)


def _symbols(bars: Bars, traded: Mapping[str, Traded]) -> tuple[Symbol, ...]:
    ones = np.ones(len(bars.ts_us))
    n, warm = bars.per_symbol(ones), bars.per_symbol(bars.warm)
    net = {name: bars.per_symbol(arm.net) for name, arm in traded.items()}
    entries = {name: bars.per_symbol(arm.entered) for name, arm in traded.items()}
    cells = bars.symbol * 9 + (traded["v3"].side + 1) * 3 + traded["v2"].side + 1
    tables = np.bincount(cells[bars.warm], minlength=9 * len(bars.symbols)).reshape(-1, 3, 3)
    return tuple(
        Symbol(
            symbol=symbol,
            bars=int(n[i]),
            warm_bars=int(warm[i]),
            net={name: float(values[i]) for name, values in net.items()},
            entries={name: int(values[i]) for name, values in entries.items()},
            agreement=agreement(tables[i].tolist()),
        )
        for i, symbol in enumerate(bars.symbols)
    )


def _regimes(bars: Bars, traded: Mapping[str, Traded]) -> tuple[Regime, ...]:
    n = bars.per_regime(np.ones(len(bars.ts_us)))
    net = {name: bars.per_regime(arm.net) for name, arm in traded.items()}
    held = {name: bars.per_regime(arm.side != 0) for name, arm in traded.items()}
    return tuple(
        Regime(
            regime=regime,
            bars=int(n[i]),
            net={name: float(values[i]) for name, values in net.items()},
            in_market={name: float(values[i] / n[i]) for name, values in held.items()},
        )
        for i, regime in enumerate(bars.regimes)
    )


def _outcomes(db: duckdb.DuckDBPyConnection, run_id: str) -> Outcomes:
    closes, known = db.execute(
        """
        SELECT count(*), count(*) FILTER (pnl_usd IS NOT NULL OR pnl_pct IS NOT NULL)
        FROM outcomes WHERE run_id = ?
        """,
        [run_id],
    ).fetchall()[0]
    return Outcomes(closes, known)


# -- what a reader must know first -----------------------------------------------------------------


def _notices(run: Run, bars: Bars, v2: Sequence[V2Source], health: Health) -> tuple[str, ...]:
    return tuple(_find_notices(run, bars, v2, health))


def _find_notices(run: Run, bars: Bars, v2: Sequence[V2Source], health: Health) -> Iterator[str]:
    """Yield what a reader must know before the numbers."""
    if run.rl_v2 == "v3":
        yield "Self-play: the v2 arm is RL v3 again, so every difference must be exactly 0."
    elif not v2:
        reason = {
            "off": "the run was started with --rl-v2 off",
            "bus": "no decision of RL v2 arrived on the bus",
            "reference": "no signal reached the RL v2 reference",
        }.get(run.rl_v2 or "", "the store holds no decision of it")
        yield f"RL v2 is silent: {reason}. Its arm stayed flat; there is nothing to compare with."
    elif not any(source.moves_arm for source in v2):
        yield "RL v2 decided, but none of its decisions moves the v2 arm; it stayed flat."
    if len(run.opponents) > 1:
        yield (
            "The opponent changed during the run; the v2 arm mixes "
            + ", ".join(f"{opponent.name} ({opponent.bars:,} bars)" for opponent in run.opponents)
            + "."
        )
    if not len(bars.grid):
        yield "No bar has closed yet: there is no equity, no agreement and no cost to show."
    if run.other_runs:
        yield (
            f"The store holds {len(run.other_runs)} other run(s), which are not in this report: "
            f"{', '.join(run.other_runs)}."
        )
    for check in health.checks:
        if not check.ok:
            yield f"Data check failed: {check.name}: {check.found}."


# -- provenance ------------------------------------------------------------------------------------


def _provenance(db: duckdb.DuckDBPyConnection, rows: dict[str, int], inputs: Inputs) -> Provenance:
    versions = {
        name: tuple(
            version
            for (version,) in db.execute(
                f"SELECT DISTINCT schema_version FROM {name} ORDER BY 1"
            ).fetchall()
        )
        for name, n in rows.items()
        if n
    }
    lines = "".join(f"{name} {n}\n" for name, n in inputs.segments)
    return Provenance(
        report_version=REPORT_VERSION,
        schema_versions=versions,
        rows=rows,
        rejected=count(db, "SELECT count(*) FROM rejected"),
        input_sha256=hashlib.sha256(lines.encode()).hexdigest(),
        segments=len(inputs.segments),
    )


def _inputs(reader: StoreReader, connection: duckdb.DuckDBPyConnection) -> Inputs:
    paths = [path for table in TABLES for path in reader.files(table)]
    segments: list[tuple[str, int]] = []
    if paths:
        found = connection.execute(
            "SELECT file_name, num_rows FROM parquet_file_metadata(?)", [list(map(str, paths))]
        ).fetchall()
        segments = sorted(
            (Path(name).relative_to(reader.directory).as_posix(), n) for name, n in found
        )
    collected = {
        name: {"rows": group.rows}
        | {what: group.counts[what] for what in COLLECTED if what in group.counts}
        for name, group in reader.position.groups.items()
    }
    return Inputs(tuple(segments), collected)
