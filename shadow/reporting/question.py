"""Which test is reported, what does it cover, and may it carry a verdict?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import duckdb
import msgspec
import numpy as np

from rlv3.errors import DataError
from shadow.evaluation.bars import ORDER, Bars, Scope, Traded
from shadow.evaluation.batches import GRACE_BARS, Assigned, Batches, Frame, Rows, form
from shadow.evaluation.gates import Gate, digest, read_gates
from shadow.evaluation.registration import ALPHA, Frozen, Pilot, Registration, find, step_us
from shadow.reporting.contents import Inputs
from shadow.statistics.sequential import Plan

MARGIN = 2.0
STRICT_BOUND = 500.0
"""Bps a day, where nothing is registered."""
EXPLORATORY_BARS = 60


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


class Test(NamedTuple):
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


def choose(
    db: duckdb.DuckDBPyConnection, known: Sequence[str], inputs: Inputs, ask: Ask
) -> tuple[Test, list[str]]:
    """Find out what is reported, whether it may carry a verdict, and what must be said about it.

    Args:
        known: runs of the store, oldest first.
    Raises:
        DataError: no such run or registration.
        ConfigError: a table of gates that is none.
    """
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
        return Test(
            scope, None, reason, gates, MARGIN, 0.0, STRICT_BOUND, Plan(alpha=ALPHA)
        ), notices
    frame = registration.frame
    scope = Scope(
        runs,
        registration.symbols,
        frame.first * frame.batch_us,
        frame.end * frame.batch_us + (GRACE_BARS + 1) * frame.step_us,
    )
    return Test(
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


def registered(found: Registration) -> Registered:
    """Return what a reader is shown of a registration."""
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


def read_run(db: duckdb.DuckDBPyConnection, known: Sequence[str], scope: Scope) -> Run:
    """Read what was frozen for a scope's newest run, and whom the v2 arm followed.

    Args:
        db: the cursor on which `Bars.load` ran.
        known: runs of the store, oldest first.
    """
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


class Period(msgspec.Struct, frozen=True):
    """What the bars cover."""

    start_us: int | None
    """Begin of the first bar."""
    end_us: int | None
    """End of the last bar."""
    symbols: tuple[str, ...]
    bars: int
    warm_bars: int


def period(bars: Bars, bar_us: int) -> Period:
    """Say what the bars cover."""
    empty = len(bars.grid) == 0
    return Period(
        start_us=None if empty else int(bars.grid[0]) - bar_us,
        end_us=None if empty else int(bars.grid[-1]),
        symbols=bars.symbols,
        bars=len(bars.ts_us),
        warm_bars=int(bars.warm.sum()),
    )


def frame_of(test: Test, bars: Bars, run: Run) -> Frame:
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


def form_batches(
    frame: Frame, bars: Bars, traded: Mapping[str, Traded]
) -> tuple[Batches, Assigned]:
    """Put bars into the batches of a frame."""
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
