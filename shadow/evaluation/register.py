"""How does a test get its terms? From the store's newest run, a pilot that is not used again, and
what the analyst declares.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import duckdb
import numpy as np

from rlv3.errors import ConfigError, UserError
from rlv3.metrics import integrated_autocorrelation
from rlv3.policy import Policy
from shadow.evaluation.bars import ORDER, Bars, Scope, Traded, equity
from shadow.evaluation.batches import PLAYERS
from shadow.evaluation.gates import read_gates
from shadow.evaluation.registration import (
    ALPHA,
    DAY_US,
    FORMAT,
    Frozen,
    Mode,
    Pilot,
    Registration,
    align,
    read_registrations,
    step_us,
    write,
)
from shadow.pipeline import Pipeline, Settings
from shadow.records import RunRow, decode_comparison
from shadow.rl_v2 import QTables
from shadow.segments import read_position
from shadow.statistics.multiplicity import version_level
from shadow.statistics.sequential import batch_length
from shadow.store import StoreReader


class Terms(NamedTuple):
    """What an analyst declares; everything has a default."""

    symbols: tuple[str, ...] | None = None
    """Those of the pilot for None."""
    start_us: int | None = None
    """Now, or the end of the store's newest bar if that is later."""
    batch_bars: int = 60
    """At least so many; the pilot may ask for more."""
    horizon: int = 720
    max_days: int = 180
    mode: Mode = "superiority"
    margin: float = 2.0
    strict_bound: float = 500.0
    earlier_versions: int = 0
    """Versions of v3 that were tested elsewhere."""
    gates: Path | None = None
    again: bool = False


def run_of(policy: Policy, settings: Settings, tables: QTables | None) -> Frozen:
    """Return what a run of a worker with these settings will freeze."""
    pipeline = Pipeline(policy, tables, settings, ())
    for output in pipeline.begin({}).outputs:
        row = decode_comparison(output.payload)
        if isinstance(row, RunRow):
            return Frozen.of(row)
    raise AssertionError("a run begins with its own row")


def register(
    store: Path, terms: Terms, *, now: datetime, frozen: Frozen | None = None
) -> tuple[Registration, Path]:
    """Freeze a test in a store.

    Args:
        now: wall clock.
        frozen: both policies and the settings; None for those of the store's newest run.
    Raises:
        UserError: the pair is registered already, the start lies in known data, or a term is
            missing or out of range.
        DataError: the store cannot be used.
    """
    seen = _look(store)
    frozen = frozen or seen.frozen
    if frozen is None:
        raise UserError(
            f"expected a run in {store}, found none: name --policy (and --rl-v2, --latency-ms) "
            "as the worker will have them"
        )
    symbols = terms.symbols or seen.symbols
    if not symbols:
        raise UserError("expected symbols that count, found no bar to take them from: --symbols")
    bar_us = step_us(frozen.settings)
    pilot = seen.pilot
    bars = max(terms.batch_bars, 0 if pilot is None else pilot.batch_bars)
    start_us = max(int(now.timestamp() * 1e6), seen.newest_us)
    earlier = read_registrations(store) if store.is_dir() else ()
    number = len(earlier) + terms.earlier_versions + 1
    registration = Registration(
        format=FORMAT,
        number=number,
        frozen=frozen,
        symbols=tuple(sorted(set(symbols))),
        start_us=align(start_us if terms.start_us is None else terms.start_us, bars, bar_us),
        batch_bars=bars,
        horizon=terms.horizon,
        max_days=terms.max_days,
        mode=terms.mode,
        margin=terms.margin,
        strict_bound=terms.strict_bound,
        alpha=version_level(ALPHA, number),
        gates=read_gates(terms.gates),
        pilot=pilot,
        registered_at=f"{now.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}",
    )
    _check(registration)
    path = write(store, registration, newest_us=seen.newest_us, again=terms.again)
    return registration, path


def _check(found: Registration) -> None:
    for name, value, least in (
        ("--batches", found.horizon, 20),
        ("--max-days", found.max_days, 1),
        ("--batch-bars", found.batch_bars, 1),
    ):
        if value < least:
            raise ConfigError(f"expected {name} of at least {least}, found {value}")
    for name, size in (("--margin", found.margin), ("--strict-bound", found.strict_bound)):
        if not size > 0.0:
            raise ConfigError(f"expected {name} above 0, found {size}")
    if found.frame.end <= found.frame.first:
        raise ConfigError(
            f"expected --max-days to hold a batch of {found.batch_bars} bars, "
            f"found {found.max_days}"
        )


class _Seen(NamedTuple):
    """What the store shows already, and what therefore cannot be part of the test."""

    frozen: Frozen | None = None
    newest_us: int = 0
    symbols: tuple[str, ...] = ()
    pilot: Pilot | None = None


def _look(store: Path) -> _Seen:
    if not store.is_dir() or read_position(store) is None:
        return _Seen()
    with StoreReader(store).connect() as db:
        found = db.execute(
            f"""
            SELECT run_id, policy_digest, feature_digest, rl_v2, tables_digest, settings
            FROM runs ORDER BY {ORDER} DESC LIMIT 1
            """
        ).fetchall()
        if not found:
            return _Seen()
        run_id, policy, features, rl_v2, tables, settings = found[0]
        frozen = Frozen(policy, features, rl_v2, tables, dict(sorted(settings.items())))
        newest_us = db.execute("SELECT coalesce(max(event_ts_us), 0) FROM bars").fetchall()[0][0]
        Scope((run_id,), since_us=newest_us - DAY_US).install(db)
        bars = Bars.load(db)
        if not len(bars.grid):
            return _Seen(frozen, newest_us)
        return _Seen(frozen, newest_us, bars.symbols, _pilot(db, bars))


def _pilot(db: duckdb.DuckDBPyConnection, bars: Bars) -> Pilot:
    """Return what the last day says about the length of batches."""
    arms = {name: Traded.load(db, bars, name) for name in PLAYERS[:2]}
    held = np.concatenate([_holding_bars(bars, arm) for arm in arms.values()])
    p90 = float(np.quantile(held, 0.9)) if len(held) else 0.0
    difference = np.diff(equity(bars, arms["v3"].net - arms["v2"].net))
    return Pilot(
        bars=len(bars.grid),
        holding_p90_bars=p90,
        tau=integrated_autocorrelation(difference),
        batch_bars=batch_length(difference, p90),
    )


def _holding_bars(bars: Bars, arm: Traded) -> np.ndarray:
    """Return how many bar closes each position was held, those cut short at the ends included."""
    first, last, _ = bars.stretches(arm.side)
    held = arm.side[first] != 0
    place = bars.place
    return place[last[held]] - place[first[held]] + 1
