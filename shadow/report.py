"""What does a comparison store say about RL v3 and RL v2, and what follows from it?

`read_report` reads one test of a store (a registration, or one run without a verdict) and returns a
frozen `Report`; `shadow.render` turns it into text, JSON and HTML. Its parts are worked out in
batches, effect, performance, slices, health, fidelity, gates and verdict.

Definitions, at bar closes:
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
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import msgspec
import numpy as np
from numpy.typing import NDArray

from rlv3.errors import DataError
from rlv3.events import ACTION_TABLE
from shadow import effect as effect_
from shadow import fidelity as fidelity_
from shadow import health as health_
from shadow.bars import ORDER, Bars, Scope, Traded, drawdown, equity
from shadow.batches import GRACE_BARS, Assigned, Batches, Floats, Frame, Ints, Rows, form
from shadow.behaviour import Behaviour, behave
from shadow.effect import Effect, Range, one_look
from shadow.fidelity import Fidelity, Replayed, find_policy, read_replay
from shadow.gates import Gate, Measured, Result, check, digest, read_gates
from shadow.guarded import Guarded, guard
from shadow.health import Health, count
from shadow.measures import SEED, Counted, measures
from shadow.performance import (
    Metric,
    Sensitivity,
    SliceRow,
    metrics,
    sensitivity,
    slice_rows,
)
from shadow.records import ARMS
from shadow.registration import (
    ALPHA,
    Frozen,
    Pilot,
    Registration,
    find,
    read_registrations,
    step_us,
)
from shadow.rl_v2 import QTables
from shadow.sequential import Look, Plan
from shadow.slices import slices, volatility_groups
from shadow.store import TABLES, StoreReader
from shadow.verdict import Finding, Verdict, exploratory, judge, primary_gate
from shadow.verdict import find as find_effect

REPORT_VERSION = 2
MARGIN = 2.0
STRICT_BOUND = 500.0
"""Bps a day, where nothing is registered."""
EXPLORATORY_BARS = 60
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


class Registered(msgspec.Struct, frozen=True):
    """The registration that is reported."""

    id: str
    number: int
    registered_at: str
    start_us: int
    end_us: int
    symbols: tuple[str, ...]
    batch_bars: int
    horizon: int
    mode: str
    margin: float
    """Bps a day."""
    alpha: float
    gates_sha256: str
    pilot: Pilot | None


class Opponent(msgspec.Struct, frozen=True):
    """Who the v2 arm followed, and in how many bars."""

    name: str
    digest: str | None
    bars: int


class Run(msgspec.Struct, frozen=True):
    """What was frozen for the run that is reported."""

    run_id: str
    """The newest one, where a test covers several."""
    covered: tuple[str, ...]
    """All runs of the test, oldest first."""
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
    net_per_day: Range
    """Bps of the capital a day, with the 95 % interval of one look at the batches."""
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
    """v3's event time minus v2's: minimum, 5 %, 50 %, 95 %, maximum; quantiles in whole ones."""
    undirected: int
    """v2 gave no direction; not in the agreement."""
    cold: int
    """The symbol was cold; not in the agreement."""
    agreement: Agreement


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


class Discarded(msgspec.Struct, frozen=True):
    """Closed batches that do not count, and rows that came late."""

    batches: int
    profit_bps: float
    """Sum of their differences, bps of the capital: what the effect does not hold."""
    late_rows: int
    """Bars that came after their batch had closed, booked into the next one."""
    repeated_rows: int
    """Bars that came twice; the second does not count."""


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
    """Everything a reader of the report is shown, and nothing else; in the order of the page."""

    verdict: Verdict
    finding: Finding
    notices: tuple[str, ...]
    registration: Registered | None
    run: Run
    period: Period
    effect: Effect
    gates: tuple[Result, ...]
    health: Health
    fidelity: Fidelity
    discarded: Discarded
    curves: Curves
    arms: tuple[Arm, ...]
    guarded: Guarded | None
    """Where risk limits were in force."""
    metrics: tuple[Metric, ...]
    behaviour: Behaviour
    agreement: Agreement
    """Of the sides held at warm bar closes."""
    pairs: tuple[PairGroup, ...]
    actions: ActionMix
    v2: tuple[V2Source, ...]
    slices: tuple[SliceRow, ...]
    sensitivity: Sensitivity
    outcomes: Outcomes
    not_modelled: tuple[tuple[str, str], ...]
    provenance: Provenance


class Ask(NamedTuple):
    """What a reader wants to see. Anything but the registered test gives no verdict."""

    run: str | None = None
    """One run, whatever is registered; None for the test, or else the newest run."""
    registration: str | None = None
    """Id or the beginning of one; None for the newest."""
    symbols: tuple[str, ...] | None = None
    since_us: int | None = None
    until_us: int | None = None
    gates: Path | None = None
    """Another table of gates than the registered or the default one."""


class Inputs(NamedTuple):
    """What a store knows beside its tables."""

    segments: tuple[tuple[str, int], ...] = ()
    """Path inside the store and rows, in name order."""
    collected: Mapping[str, Mapping[str, int]] = {}
    """Stream -> what the collector counted."""
    registrations: tuple[Registration, ...] = ()
    replay: Replayed | None = None
    directory: Path | None = None
    """Where artifacts are looked for."""


def read_report(directory: str | Path, ask: Ask | None = None) -> Report:
    """Summarise a store on disk.

    Raises:
        DataError: no store, nothing in it, a damaged segment or registration, or no such run.
        ConfigError: a table of gates that is none.
    """
    reader = StoreReader(directory)
    try:
        with reader.connect() as connection:
            return summarise(connection, _inputs(reader, connection), ask)
    except duckdb.Error as error:
        first_line = str(error).partition("\n")[0]
        raise DataError(f"expected readable segments in {directory}, found {first_line}") from error


def summarise(
    connection: duckdb.DuckDBPyConnection, inputs: Inputs | None = None, ask: Ask | None = None
) -> Report:
    """Summarise one test or run of a store.

    Args:
        connection: has the views of `StoreReader.connect`; left as it is.
        inputs: what is not in the tables.
    Raises:
        DataError: no row of ours, or no such run.
    """
    with connection.cursor() as db:
        return _summarise(db, inputs or Inputs(), ask or Ask())


class _Test(NamedTuple):
    """What is asked, and under which rules."""

    scope: Scope
    registration: Registration | None
    reason: str
    """Why there is no verdict; empty where there is one."""
    gates: tuple[Gate, ...]
    margin: float
    shift: float
    strict_bound: float
    plan: Plan


def _summarise(db: duckdb.DuckDBPyConnection, inputs: Inputs, ask: Ask) -> Report:
    overview = _overview(db)
    test, notices = _choose(db, overview.runs, inputs, ask)
    test.scope.install(db)
    bars = Bars.load(db)
    traded = {name: Traded.load(db, bars, name) for name in ARMS}
    run = _run(db, overview.runs, test.scope)
    frame = _frame(test, bars, run)
    batches, assigned = _form(frame, bars, traded)
    volatility = volatility_groups(bars)
    effect, look = effect_.measure(
        batches, test.plan, margin=test.margin, strict_bound=test.strict_bound
    )
    health = health_.examine(db, bars, traded, volatility, frame.step_us, inputs.collected)
    fidelity = fidelity_.examine(
        db,
        step_us=frame.step_us,
        slippage_bps=_slippage_bps(traded["v2"]),
        policy=find_policy(inputs.directory, run.policy_digest),
        replay=inputs.replay,
    )
    measured = measures(
        batches,
        look,
        test.plan,
        _counted(run, bars, traded),
        reward=run.training.get("reward"),
        reference_digest=QTables.load().digest,
    ) | _store_measures(health, fidelity, batches)
    finding, verdict, gates = _conclude(test, batches, look, effect, measured)
    difference = traded["v3"].net - traded["v2"].net
    v2 = _v2_sources(db)
    return Report(
        verdict=verdict,
        finding=finding,
        notices=(*notices, *_notices(run, bars, v2, health)),
        registration=None if test.registration is None else _registered(test.registration),
        run=run,
        period=_period(bars, frame.step_us),
        effect=effect,
        gates=gates,
        health=health,
        fidelity=fidelity,
        discarded=Discarded(
            batches.discarded,
            batches.discarded_profit * 1e4,
            batches.late_rows,
            batches.repeated_rows,
        ),
        curves=_curves(bars, traded, frame.step_us),
        arms=tuple(_arm(bars, name, traded[name], batches) for name in ARMS),
        guarded=guard(db, test.scope),
        metrics=metrics(batches),
        behaviour=behave(
            db, bars, traded, step_us=frame.step_us, batch_us=frame.batch_us, seed=SEED
        ),
        agreement=_agreement_of(traded["v3"].side, traded["v2"].side, bars.warm),
        pairs=_pairs(db),
        actions=_actions(db),
        v2=v2,
        slices=slice_rows(
            slices(bars, difference, volatility, batches, assigned), batches, test.plan
        ),
        sensitivity=sensitivity(batches, test.plan),
        outcomes=_outcomes(db),
        not_modelled=NOT_MODELLED,
        provenance=_provenance(db, overview, inputs),
    )


# -- which test ------------------------------------------------------------------------------------


def _choose(
    db: duckdb.DuckDBPyConnection, known: Sequence[str], inputs: Inputs, ask: Ask
) -> tuple[_Test, list[str]]:
    """Find out what is reported, whether it may carry a verdict, and what must be said about it."""
    registration = find(inputs.registrations, ask.registration)
    narrowed = [
        name
        for name, value in (
            ("--run", ask.run), ("--symbols", ask.symbols), ("--since", ask.since_us),
            ("--until", ask.until_us),
        )
        if value is not None
    ]  # fmt: skip
    notices: list[str] = []
    reason = ""
    runs: tuple[str, ...] = ()
    if registration is None:
        reason = "nothing is registered (`rlv3-shadow register`)"
    elif narrowed:
        reason = f"{' and '.join(narrowed)} narrowed the report"
    else:
        runs, others = _covered(db, registration)
        if not runs:
            reason = f"no run in the store is the one that registration {registration.id} froze"
            notices += others
    gates = read_gates(ask.gates) if registration is None or ask.gates else registration.gates
    if registration is not None and not reason and digest(gates) != digest(registration.gates):
        reason = f"the table of gates is not the one that registration {registration.id} froze"
    if reason or registration is None:
        run_id = known[-1] if ask.run is None else ask.run
        if run_id not in known:
            raise DataError(f"expected one of the runs {', '.join(known)}, found {run_id}")
        scope = Scope(runs or (run_id,), ask.symbols, ask.since_us, ask.until_us)
        return _Test(
            scope, None, reason, gates, MARGIN, 0.0, STRICT_BOUND, Plan(alpha=ALPHA)
        ), notices
    frame = registration.frame
    scope = Scope(
        runs,
        registration.symbols,
        frame.first * frame.batch_us,
        frame.end * frame.batch_us + (GRACE_BARS + 1) * frame.step_us,
    )
    return _Test(
        scope, registration, "", gates, registration.margin, registration.shift,
        registration.strict_bound, registration.plan,
    ), notices  # fmt: skip


def _covered(
    db: duckdb.DuckDBPyConnection, registration: Registration
) -> tuple[tuple[str, ...], list[str]]:
    """Return the runs that a registration covers, oldest first, and why the newest is none."""
    rows = db.execute(
        f"""
        SELECT run_id, policy_digest, feature_digest, rl_v2, tables_digest, settings
        FROM runs ORDER BY {ORDER}
        """
    ).fetchall()
    frozen = {
        run_id: Frozen(policy, features, rl_v2, tables, dict(sorted(settings.items())))
        for run_id, policy, features, rl_v2, tables, settings in rows
    }
    runs = tuple(run_id for run_id, found in frozen.items() if found == registration.frozen)
    if runs or not frozen:
        return runs, []
    newest, found = list(frozen.items())[-1]
    names = [
        name
        for name in Frozen.__struct_fields__
        if getattr(found, name) != getattr(registration.frozen, name)
    ]
    return (), [f"Run {newest} differs from the registered one in {', '.join(names)}."]


def _registered(found: Registration) -> Registered:
    frame = found.frame
    return Registered(
        id=found.id,
        number=found.number,
        registered_at=found.registered_at,
        start_us=frame.first * frame.batch_us,
        end_us=frame.end * frame.batch_us,
        symbols=frame.symbols,
        batch_bars=found.batch_bars,
        horizon=found.horizon,
        mode=found.mode,
        margin=found.margin,
        alpha=found.alpha,
        gates_sha256=digest(found.gates),
        pilot=found.pilot,
    )


def _frame(test: _Test, bars: Bars, run: Run) -> Frame:
    """Return the registered frame, or one that holds all bars of an exploratory report."""
    if test.registration is not None:
        return test.registration.frame
    bar_us = step_us(run.settings)
    empty = not len(bars.grid)
    return Frame.of(
        bars.symbols,
        capital=bars.total_capital or 1.0,
        step_us=bar_us,
        batch_bars=EXPLORATORY_BARS,
        start_us=0 if empty else int(bars.grid[0]) - bar_us,
        end_us=0 if empty else int(bars.grid[-1]) + bar_us * EXPLORATORY_BARS,
    )


def _form(frame: Frame, bars: Bars, traded: Mapping[str, Traded]) -> tuple[Batches, Assigned]:
    place = np.array([frame.symbols.index(name) for name in bars.symbols], np.int64)
    return form(
        frame,
        Rows(
            ts_us=bars.ts_us,
            symbol=place[bars.symbol] if len(place) else bars.symbol,
            arrived=bars.arrived,
            paid={name: arm.paid for name, arm in traded.items()},
        ),
    )


# -- what follows ----------------------------------------------------------------------------------


def _counted(run: Run, bars: Bars, traded: Mapping[str, Traded]) -> Counted:
    regimes = np.bincount(bars.regime, minlength=len(bars.regimes)).tolist()
    return Counted(
        opponents={(found.name, found.digest): found.bars for found in run.opponents},
        regimes=dict(zip(bars.regimes, regimes, strict=True)),
        ruined=tuple(np.asarray(bars.symbols)[traded["v3"].ruined].tolist()),
    )


def _store_measures(health: Health, fidelity: Fidelity, batches: Batches) -> dict[str, Measured]:
    """Return the measures that only a whole store can tell."""
    failed = [item.name for item in health.checks if item.decides and not item.ok]
    read, lost = health.read, health.lost
    matched = next(stage for stage in health.funnel if stage.name == "matched")
    found = {
        "failed_checks": Measured(float(len(failed)), text=", ".join(failed) or "none failed"),
        "matched_share": _share(matched.n, matched.of),
        "asymmetry_p": Measured(health.asymmetry_p),
        "lost_share": Measured(None) if lost is None else _share(lost, read + lost),
        "late_share": _share(health.entries("late"), read),
        "duplicate_share": _share(health.entries("duplicate"), read),
        "unreadable_share": _share(health.entries("dead_letter"), read),
        "gap_share": _share(health.gap_bars, health.bars),
        "cold_share": _share(health.cold_bars, health.bars),
        "poor_share": _share(health.poor_bars, health.bars),
    }
    if fidelity.replay is not None:
        found["replay_differences"] = Measured(float(fidelity.replay.differences))
    bias = fidelity.bias.bps
    if bias.value is not None and bias.low is not None and bias.high is not None:
        size = abs(bias.value)
        least = max(bias.low, -bias.high, 0.0)
        text = f"{bias.value:+.2f} [{bias.low:+.2f}, {bias.high:+.2f}]"
        found["simulator_bias"] = Measured(size, least, max(-bias.low, bias.high), text)
        charge = size * float(batches.series("v3_turnover").sum())
        if len(batches.window):
            left = float(batches.series("difference").sum()) * 1e4 - charge
            found["charged_bias"] = Measured(left * batches.frame.per_day / len(batches.window))
    if fidelity.drift:
        worst = fidelity.drift[0]
        found["feature_drift"] = Measured(
            worst.psi.value, worst.psi.low, worst.psi.high, f"{worst.psi.value:.3f} {worst.feature}"
        )
    return found


def _share(n: int, of: int) -> Measured:
    return Measured(n / of, text=f"{n / of:.2%} ({n:,} of {of:,})") if of else Measured(None)


def _conclude(
    test: _Test,
    batches: Batches,
    look: Look | None,
    effect: Effect,
    measured: Mapping[str, Measured],
) -> tuple[Finding, Verdict, tuple[Result, ...]]:
    finding = find_effect(look, margin=test.margin, shift=test.shift)
    primary = primary_gate(look, finding, shift=test.shift)
    gates = check(test.gates, measured, margin=test.shift)
    if test.reason:
        return finding, exploratory(test.reason), (primary, *gates)
    frame = batches.frame
    ended = int(frame.open_at(np.asarray(batches.watermark_us))) >= frame.end
    verdict = judge(finding, primary, gates, ended=ended, eta=_eta(effect))
    return finding, verdict, (primary, *gates)


def _eta(effect: Effect) -> str:
    days = effect.days_to_decide
    return "" if days is None else f"; about {days:.0f} more days if the estimate is the truth"


def _slippage_bps(v2: Traded) -> float:
    traded = float(v2.paid.turnover.sum())
    return 1e4 * v2.slippage / traded if traded else 0.0


# -- the parts of a report -------------------------------------------------------------------------


class _Overview(NamedTuple):
    """What all tables hold, in one pass over each."""

    rows: dict[str, int]
    versions: dict[str, tuple[int, ...]]
    """Schema versions of the tables that have rows."""
    runs: tuple[str, ...]
    """Oldest first."""


def _overview(db: duckdb.DuckDBPyConnection) -> _Overview:
    rows: dict[str, int] = {}
    versions: dict[str, tuple[int, ...]] = {}
    known: set[str] = set()
    for name in TABLES:
        found = db.execute(f"SELECT run_id, count(*) FROM {name} GROUP BY 1").fetchall()
        rows[name] = sum(n for _, n in found)
        if found:
            distinct = f"SELECT DISTINCT schema_version FROM {name} ORDER BY 1"
            versions[name] = tuple(version for (version,) in db.execute(distinct).fetchall())
        if name in _BEGINNINGS:
            known |= {run_id for run_id, _ in found}
    if not any(rows.values()):
        raise DataError(
            "expected a store with decisions or comparisons of `rlv3-worker collect`, "
            "found no row of either"
        )
    return _Overview(rows, versions, tuple(_by_age(db, known)))


_BEGINNINGS = ("runs", "bars", "ledger", "v2_decisions")


def _by_age(db: duckdb.DuckDBPyConnection, known: set[str]) -> list[str]:
    """Order runs by their first row; its own row is the first of a run, where it is there."""
    begins: dict[str, int] = {}
    for name in _BEGINNINGS:
        if missing := sorted(known - set(begins)):
            begins |= db.execute(
                f"SELECT run_id, min({ORDER}) FROM {name} "
                "WHERE run_id IN (SELECT unnest(?)) GROUP BY 1",
                [missing],
            ).fetchall()
    if not begins:  # decisions only
        begins |= db.execute("SELECT run_id, min(event_ts_us) FROM decisions GROUP BY 1").fetchall()
    return sorted(begins, key=lambda run_id: (begins[run_id], run_id))


def _run(db: duckdb.DuckDBPyConnection, known: Sequence[str], scope: Scope) -> Run:
    run_id = scope.runs[-1]
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
        SELECT opponent, opponent_digest, count(*) FROM report_bars
        GROUP BY ALL ORDER BY 3 DESC, 1, 2
        """
    ).fetchall()
    return Run(
        run_id=run_id,
        covered=scope.runs,
        policy_digest=policy,
        feature_digest=features,
        training=dict(training),
        rl_v2=rl_v2,
        tables_digest=tables,
        settings=dict(settings),
        opponents=tuple(Opponent(*row) for row in opponents),
        other_runs=tuple(other for other in known if other not in scope.runs),
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


def _period(bars: Bars, bar_us: int) -> Period:
    empty = len(bars.grid) == 0
    return Period(
        start_us=None if empty else int(bars.grid[0]) - bar_us,
        end_us=None if empty else int(bars.grid[-1]),
        symbols=bars.symbols,
        bars=len(bars.ts_us),
        warm_bars=int(bars.warm.sum()),
    )


def _arm(bars: Bars, name: str, traded: Traded, batches: Batches) -> Arm:
    net = float(traded.net.sum())
    v3 = batches.series("v3")
    values = {
        "v3": v3,
        "v2": batches.series("v2"),
        "follow_signal": v3 - batches.series("beats_signal"),
        "flat": v3 - batches.series("beats_flat"),
    }[name]
    return Arm(
        name=name,
        net_per_day=one_look(values * batches.bps_per_day, ALPHA),
        net=net,
        gross=traded.gross,
        fees=traded.fee,
        slippage=traded.slippage,
        turnover=float(traded.paid.turnover.sum()),
        max_drawdown=float(drawdown(equity(bars, traded.net)).max()),
        entries=int(traded.entered.sum()),
        time_in_market=float((traded.side != 0).mean()) if len(traded.side) else None,
        net_late=float(traded.paid.net_late.sum()),
        max_drawdown_late=float(drawdown(equity(bars, traded.paid.net_late)).max()),
        final_equity=bars.total_capital + net,
        ruined=tuple(np.asarray(bars.symbols)[traded.ruined].tolist()),
    )


def _curves(bars: Bars, traded: Mapping[str, Traded], bar_us: int) -> Curves:
    times = np.concatenate([bars.grid[:1] - bar_us, bars.grid])
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


def _pairs(db: duckdb.DuckDBPyConnection) -> tuple[PairGroup, ...]:
    rows = db.execute(
        """
        SELECT opponent, rule, sign(v3_target)::INT AS v3, sign(v2_exposure)::INT AS v2, warm,
               delta_us // 1000 AS delta_ms, count(*), min(delta_us), max(delta_us)
        FROM scoped_pairs GROUP BY 1, 2, 3, 4, 5, 6 ORDER BY 1, 2, 6, 3, 4, 5
        """
    ).fetchall()
    return tuple(
        _pair_group(opponent, rule, [row[2:] for row in group])
        for (opponent, rule), group in groupby(rows, key=lambda row: row[:2])
    )


def _pair_group(opponent: str, rule: int, rows: Sequence[tuple[Any, ...]]) -> PairGroup:
    """Describe pairs counted by side of v3, side of v2, warm and whole milliseconds apart."""
    table = [[0, 0, 0] for _ in range(3)]
    undirected = cold = 0
    for v3, v2, warm, _, n, _, _ in rows:
        if v2 is None:
            undirected += n
        elif not warm:
            cold += n
        else:
            table[v3 + 1][v2 + 1] += n
    counts = np.cumsum([row[4] for row in rows])
    low, middle, high = (
        float(rows[int(np.searchsorted(counts, max(q * counts[-1], 1.0)))][3])
        for q in (0.05, 0.5, 0.95)
    )
    least, most = min(row[5] for row in rows) / 1e3, max(row[6] for row in rows) / 1e3
    return PairGroup(
        opponent=opponent,
        rule=rule,
        pairs=int(counts[-1]),
        delta_ms=(least, low, middle, high, most),
        undirected=undirected,
        cold=cold,
        agreement=agreement(table),
    )


def _actions(db: duckdb.DuckDBPyConnection) -> ActionMix:
    rows = db.execute(
        """
        SELECT kind, action, count(*), count(*) FILTER (NOT warm) FROM scoped_decisions
        GROUP BY kind, action
        """
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


def _v2_sources(db: duckdb.DuckDBPyConnection) -> tuple[V2Source, ...]:
    rows = db.execute(
        """
        SELECT opponent, count(*), count(*) FILTER (direction > 0),
               count(*) FILTER (direction = 0), count(*) FILTER (direction < 0),
               count(*) FILTER (direction IS NULL), count(*) FILTER (moves_arm),
               count(*) FILTER (multiplier_assumed)
        FROM scoped_v2_decisions GROUP BY opponent ORDER BY opponent
        """
    ).fetchall()
    return tuple(V2Source(*row) for row in rows)


def _outcomes(db: duckdb.DuckDBPyConnection) -> Outcomes:
    closes, known = db.execute(
        """
        SELECT count(*), count(*) FILTER (pnl_usd IS NOT NULL OR pnl_pct IS NOT NULL)
        FROM scoped_outcomes
        """
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
    for item in health.checks:
        if not item.ok:
            yield f"Data check failed: {item.name}: {item.found}."


# -- provenance ------------------------------------------------------------------------------------


def _provenance(db: duckdb.DuckDBPyConnection, overview: _Overview, inputs: Inputs) -> Provenance:
    lines = "".join(f"{name} {n}\n" for name, n in inputs.segments)
    lines += "".join(f"registration {item.id}\n" for item in inputs.registrations)
    return Provenance(
        report_version=REPORT_VERSION,
        schema_versions=overview.versions,
        rows=overview.rows,
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
    return Inputs(
        tuple(segments),
        collected,
        read_registrations(reader.directory),
        read_replay(reader.directory),
        reader.directory,
    )
