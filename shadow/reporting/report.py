"""What does a comparison store say about RL v3 and RL v2, and what follows from it?

`read_report` reads one test of a store (a registration, or one run without a verdict) and returns a
frozen `Report`; `shadow.reporting.render` turns it into text, JSON and HTML. Here it is only put
together: each part is worked out in the module that it is imported from.

Sums are formed in one fixed order (time, symbol), so equal inputs give equal bits.
"""

from __future__ import annotations

from pathlib import Path

import duckdb
import msgspec

from rlv3.errors import DataError
from shadow.evaluation import effect as effect_
from shadow.evaluation import fidelity as fidelity_
from shadow.evaluation import health as health_
from shadow.evaluation.bars import Bars, Traded
from shadow.evaluation.behaviour import Behaviour, behave
from shadow.evaluation.effect import Effect
from shadow.evaluation.fidelity import Fidelity, find_policy
from shadow.evaluation.gates import Result
from shadow.evaluation.guarded import Guarded, guard
from shadow.evaluation.health import Health
from shadow.evaluation.measures import SEED, measures
from shadow.evaluation.performance import (
    Metric,
    Sensitivity,
    SliceRow,
    metrics,
    sensitivity,
    slice_rows,
)
from shadow.evaluation.slices import slices, volatility_groups
from shadow.evaluation.verdict import Finding, Verdict
from shadow.records import ARMS
from shadow.reporting import overview
from shadow.reporting.conclusion import conclude, counted, store_measures
from shadow.reporting.contents import Inputs, Provenance, provenance, read_contents, read_inputs
from shadow.reporting.curves import Curves, curves
from shadow.reporting.notices import notices
from shadow.reporting.overview import ActionMix, Agreement, Arm, Outcomes, PairGroup, V2Source
from shadow.reporting.question import (
    Ask,
    Period,
    Registered,
    Run,
    choose,
    form_batches,
    frame_of,
    period,
    read_run,
    registered,
)
from shadow.rl_v2 import QTables
from shadow.segments import within_memory
from shadow.store import StoreReader

REPORT_VERSION = 2
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


class Discarded(msgspec.Struct, frozen=True):
    """Closed batches that do not count, and rows that came late."""

    batches: int
    profit_bps: float
    """Sum of their differences, bps of the capital: what the effect does not hold."""
    late_rows: int
    """Bars that came after their batch had closed, booked into the next one."""
    repeated_rows: int
    """Bars that came twice; the second does not count."""


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


def read_report(directory: str | Path, ask: Ask | None = None) -> Report:
    """Summarise a store on disk.

    Raises:
        DataError: no store, nothing in it, a damaged segment or registration, or no such run.
        ConfigError: a table of gates that is none.
        OutOfMemory: the store needs more.
    """
    reader = StoreReader(directory)
    try:
        with within_memory(f"read {directory}"), reader.connect() as connection:
            return summarise(connection, read_inputs(reader, connection), ask)
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


def _summarise(db: duckdb.DuckDBPyConnection, inputs: Inputs, ask: Ask) -> Report:
    contents = read_contents(db)
    test, said = choose(db, contents.runs, inputs, ask)
    test.scope.install(db)
    bars = Bars.load(db)
    traded = {name: Traded.load(db, bars, name) for name in ARMS}
    run = read_run(db, contents.runs, test.scope)
    frame = frame_of(test, bars, run)
    batches, assigned = form_batches(frame, bars, traded)
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
        counted(run, bars, traded),
        reward=run.training.get("reward"),
        reference_digest=QTables.load().digest,
    ) | store_measures(health, fidelity, batches)
    finding, verdict, gates = conclude(test, batches, look, effect, measured)
    difference = traded["v3"].net - traded["v2"].net
    v2 = overview.v2_sources(db)
    return Report(
        verdict=verdict,
        finding=finding,
        notices=(*said, *notices(run, bars, v2, health)),
        registration=None if test.registration is None else registered(test.registration),
        run=run,
        period=period(bars, frame.step_us),
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
        curves=curves(bars, traded, frame.step_us),
        arms=tuple(overview.arm(bars, name, traded[name], batches) for name in ARMS),
        guarded=guard(db, test.scope),
        metrics=metrics(batches),
        behaviour=behave(
            db, bars, traded, step_us=frame.step_us, batch_us=frame.batch_us, seed=SEED
        ),
        agreement=overview.agreement_of(traded["v3"].side, traded["v2"].side, bars.warm),
        pairs=overview.pairs(db),
        actions=overview.actions(db),
        v2=v2,
        slices=slice_rows(
            slices(bars, difference, volatility, batches, assigned), batches, test.plan
        ),
        sensitivity=sensitivity(batches, test.plan),
        outcomes=overview.outcomes(db),
        not_modelled=NOT_MODELLED,
        provenance=provenance(db, contents, inputs, REPORT_VERSION),
    )


def _slippage_bps(v2: Traded) -> float:
    traded = float(v2.paid.turnover.sum())
    return 1e4 * v2.slippage / traded if traded else 0.0
