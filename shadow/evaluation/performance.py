"""How do the policies compare beside the primary effect? Metrics, sensitivity, slices.

All of it has intervals, and all but the guardrails that a gate names is exploratory. Metrics are
formed from batches; their intervals come from a stationary bootstrap that takes the same batches of
both policies.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import msgspec
import numpy as np

from shadow.evaluation.batches import Batches, Floats
from shadow.evaluation.effect import Range, last_looks, one_look, sequence
from shadow.evaluation.measures import LEAST_BATCHES, SEED
from shadow.evaluation.registration import ALPHA
from shadow.evaluation.slices import Slice
from shadow.statistics.inference import (
    Compared,
    Estimate,
    bootstrap_length,
    compare,
    drawdown,
    ewc_test,
    expected_shortfall,
    mean,
    sharpe,
    sharpe_difference,
    sortino,
)
from shadow.statistics.multiplicity import benjamini_hochberg, e_benjamini_hochberg
from shadow.statistics.sequential import Look, Plan

FALSE_DISCOVERIES = 0.1
COSTS = (0.5, 1.0, 2.0)
_MAX_SCALE = 5.0
YEAR_DAYS = 365.0


class Metric(msgspec.Struct, frozen=True):
    """One row of the metrics table; intervals are 95 %, of one look."""

    name: str
    unit: str
    v3: Range
    v2: Range
    difference: Range
    more_is_better: bool
    gate: str
    """The measure of a gate that rests on it; empty for the others."""


class Variant(msgspec.Struct, frozen=True):
    """The effect under another assumption: mean and confidence sequence, bps a day."""

    name: str
    effect: Range


class Grid(msgspec.Struct, frozen=True):
    """The effect with costs multiplied, at once and one tick later."""

    costs: tuple[float, ...]
    at_once: tuple[Range, ...]
    one_tick_later: tuple[Range, ...]


class Sensitivity(msgspec.Struct, frozen=True):
    """Does the effect survive other assumptions?"""

    grid: Grid
    rivals: tuple[Variant, ...]
    """v3 against the trivial policies."""
    variants: tuple[Variant, ...]
    without: tuple[Variant, ...]
    """With one symbol left out."""


class SliceRow(msgspec.Struct, frozen=True):
    """One slice: its share of the effect, bps of the whole capital a day."""

    kind: str
    name: str
    bars: int
    nonzero: int
    """Batches in which it has a difference."""
    effect: Range
    """Mean and 95 % interval of one look."""
    p: float | None
    """Of one look."""
    log_e: float
    """Log e-value, valid whenever one looks; 0 is no evidence."""
    snapshot: bool
    """Benjamini-Hochberg rejects "no difference" at 10 %, all slices together, for one look."""
    monitored: bool
    """e-BH does, whenever one looks."""
    weak: bool
    """Too few batches to say anything."""


def metrics(batches: Batches) -> tuple[Metric, ...]:
    """Return the table of metrics; empty before there are enough batches."""
    if len(batches.window) < LEAST_BATCHES:
        return ()
    frame = batches.frame
    per_batch_days = frame.batch_us / 86_400e6
    per_year = math.sqrt(YEAR_DAYS / per_batch_days)
    v3, v2 = (batches.series(name) * frame.bars for name in ("v3", "v2"))
    rng = np.random.default_rng(SEED)
    length = bootstrap_length(v3, v2, v3 - v2)
    found = compare(
        v3,
        v2,
        {
            "net": lambda r: mean(r) * (1e4 / per_batch_days),
            "sharpe": lambda r: sharpe(r) * per_year,
            "sortino": lambda r: sortino(r) * per_year,
            "tail": lambda r: expected_shortfall(r) * 1e4,
            "drawdown": lambda r: drawdown(r) * 100.0,
            "winning": lambda r: (r > 0.0).mean(axis=-1) * 100.0,
        },
        rng=rng,
        length=length,
    )
    for name, factor in (("turnover", frame.per_day), ("cost", batches.bps_per_day)):
        found[name] = compare(
            batches.series(f"v3_{name}") * factor,
            batches.series(f"v2_{name}") * factor,
            {"mean": mean},
            rng=rng,
            length=length,
        )["mean"]
    found["sharpe"] = _with_sharpe_difference(found["sharpe"], v3, v2, per_year, rng)
    return tuple(_metric(found[key], *row) for key, row in _ROWS.items())


_ROWS = {
    "net": ("net return", "bps/day", True, ""),
    "sharpe": ("Sharpe ratio", "annual", True, ""),
    "sortino": ("Sortino ratio", "annual", True, ""),
    "tail": ("loss in the worst 5 %", "bps/batch", False, "es95_ratio"),
    "drawdown": ("largest drawdown", "% of capital", False, ""),
    "winning": ("winning batches", "%", True, ""),
    "turnover": ("turnover", "× capital/day", False, "turnover_ratio"),
    "cost": ("fees and slippage", "bps/day", False, ""),
}
"""Metric -> name, unit, is more better, measure of the gate that rests on it."""


def _metric(found: Compared, name: str, unit: str, better: bool, gate: str) -> Metric:
    return Metric(
        name=name,
        unit=unit,
        v3=Range(*found.first),
        v2=Range(*found.second),
        difference=Range(*found.difference),
        more_is_better=better,
        gate=gate,
    )


def _with_sharpe_difference(
    found: Compared, v3: Floats, v2: Floats, per_year: float, rng: np.random.Generator
) -> Compared:
    """Put the studentised interval of the difference in place of the percentile one."""
    test = sharpe_difference(v3, v2, rng=rng)
    values = (test.difference * per_year, test.low * per_year, test.high * per_year)
    return found._replace(difference=Estimate(*values))


def sensitivity(batches: Batches, plan: Plan) -> Sensitivity:
    """Return the effect under other assumptions."""
    difference, half = batches.series("difference"), len(batches.window) // 2
    symbols = batches.frame.symbols if len(batches.frame.symbols) > 1 else ()
    series = {
        **{f"× {cost}": batches.at(cost) for cost in COSTS},
        **{f"× {cost}, late": batches.at(cost, late=True) for cost in COSTS},
        "v3 − v2": difference,
        "v3 − follow-signal": batches.series("beats_signal"),
        "v3 − flat": batches.series("beats_flat"),
        "v2 − flat": batches.series("v2"),
        "v3 scaled to v2's risk": _risk_matched(batches),
        **{f"without {symbol}": batches.without(i) for i, symbol in enumerate(symbols)},
    }
    scale = batches.bps_per_day
    table = np.array(list(series.values())) * scale
    found = dict(zip(series, map(sequence, last_looks(table, plan)), strict=True))
    halves = {"first half": difference[:half], "second half": difference[half:]}
    for name, values in halves.items():
        found[name] = sequence(last_looks(values[None] * scale, plan)[0])

    def variants(*names: str) -> tuple[Variant, ...]:
        return tuple(Variant(name, found[name]) for name in names)

    return Sensitivity(
        grid=Grid(
            costs=COSTS,
            at_once=tuple(found[f"× {cost}"] for cost in COSTS),
            one_tick_later=tuple(found[f"× {cost}, late"] for cost in COSTS),
        ),
        rivals=variants("v3 − v2", "v3 − follow-signal", "v3 − flat", "v2 − flat"),
        variants=variants("v3 scaled to v2's risk", *halves),
        without=variants(*(f"without {symbol}" for symbol in symbols)),
    )


def _risk_matched(batches: Batches) -> Floats:
    """Return v3 - v2 with v3 scaled, batch by batch, to the spread that v2 had until then."""
    v3, v2 = batches.series("v3"), batches.series("v2")
    n = np.arange(1, len(v3) + 1)

    def spread(values: Floats) -> Floats:
        average = np.cumsum(values) / n
        return np.sqrt(np.maximum(np.cumsum(values**2) / n - average**2, 0.0))

    one, two = spread(v3), spread(v2)
    factor = np.divide(two, one, out=np.ones_like(one), where=one > 0.0)
    before = np.concatenate([[1.0], factor[:-1]])[: len(v3)]
    before[:LEAST_BATCHES] = 1.0
    return np.minimum(before, _MAX_SCALE) * v3 - v2


def slice_rows(found: Iterable[Slice], batches: Batches, plan: Plan) -> tuple[SliceRow, ...]:
    """Judge all slices together."""
    items = list(found)
    table = np.array([item.values for item in items]).reshape(len(items), len(batches.window))
    table = table * batches.bps_per_day
    rows = [
        _slice_row(item, values, look)
        for item, values, look in zip(items, table, last_looks(table, plan), strict=True)
    ]
    tested = [i for i, row in enumerate(rows) if row.p is not None and not row.weak]
    snapshot = benjamini_hochberg([rows[i].p or 0.0 for i in tested], FALSE_DISCOVERIES)
    monitored = e_benjamini_hochberg([rows[i].log_e for i in tested], FALSE_DISCOVERIES)
    for place, i in enumerate(tested):
        rows[i] = msgspec.structs.replace(
            rows[i], snapshot=bool(snapshot[place]), monitored=bool(monitored[place])
        )
    return tuple(rows)


def _slice_row(item: Slice, values: Floats, look: Look | None) -> SliceRow:
    return SliceRow(
        kind=item.kind,
        name=item.name,
        bars=item.bars,
        nonzero=0 if look is None else look.nonzero,
        effect=one_look(values, ALPHA),
        p=ewc_test(values).p if len(values) >= 8 else None,
        log_e=0.0 if look is None else look.log_e,
        snapshot=False,
        monitored=False,
        weak=look is None or not look.ready,
    )
