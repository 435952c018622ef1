"""How large is the primary effect, how sure is it, and when will it be known? In bps a day.

The confidence sequence may be looked at every day; the interval of one look beside it may not, and
is there to show what one look at a date fixed in advance would have said.
"""

from __future__ import annotations

import math

import msgspec
import numpy as np

from shadow.evaluation.batches import Batches, Floats
from shadow.statistics.inference import (
    batches_sequential,
    ewc_test,
    few_group_test,
    minimum_detectable_effect,
)
from shadow.statistics.sequential import Look, Plan, critical_z, looks, strict_sequence

POINTS = 240
"""Of the drawn sequence; the last look within each slice is kept."""
_GROUPS = 12


class Range(msgspec.Struct, frozen=True):
    """A value and its interval; null where they cannot be formed."""

    value: float | None
    low: float | None = None
    high: float | None = None


class History(msgspec.Struct, frozen=True):
    """The confidence sequence as it was at each look; from the second batch on."""

    time_us: tuple[int, ...]
    """End of the last batch of each slice."""
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    ready: int
    """Index from which the burn-in is over; the length when it is not."""


class Effect(msgspec.Struct, frozen=True):
    """The primary effect: net return of v3 minus v2, bps of the reference capital a day."""

    batches: int
    nonzero: int
    days: float
    ready: bool
    """The burn-in is over."""
    alpha: float
    horizon: int
    sequence: Range
    """Mean and confidence sequence: may be looked at every day."""
    one_look: Range
    """Mean and interval of a single look (equal-weighted cosine test)."""
    groups: Range
    """The same from 12 contiguous groups, which assumes still less."""
    strict: Range
    """Mean and confidence sequence of the clipped batches; no assumption on their tails."""
    strict_bound: float
    clipped: float
    """Share of the batches that were clipped."""
    e_value: float
    p_value: float
    """Always valid."""
    lag_one: float
    """Correlation of neighbouring batches."""
    correlated: bool
    """It lies outside +-2 / sqrt(batches)."""
    sd: float
    """Of the batches."""
    detectable: float | None
    """Smallest effect that the batches so far would show with 80 % power."""
    days_to_decide: float | None
    """From now, with 80 % power, if the estimate is the truth; null if that never comes."""
    days_for_margin: float | None
    """The same if the margin is the truth."""
    money_per_bps: float
    """Account currency a day that one bps a day is."""
    history: History


def last_look(values: Floats, plan: Plan) -> Look | None:
    """Return what may be said after the last batch; None without a batch.

    Args:
        values: [batch], bps a day.
    """
    return last_looks(values[None], plan)[0]


def last_looks(values: Floats, plan: Plan) -> list[Look | None]:
    """Return the same for several series at once, [series, batch]."""
    if not values.shape[1]:
        return [None] * len(values)
    found = [column[:, -1] for column in looks(values, plan)]
    return [Look(*(column[i].item() for column in found)) for i in range(len(values))]


def measure(
    batches: Batches, plan: Plan, *, margin: float, strict_bound: float
) -> tuple[Effect, Look | None]:
    """Describe the primary effect.

    Args:
        margin: bps a day, for which the time to a decision is told as well.
        strict_bound: where batches are clipped in the strict sequence, bps a day.
    """
    values = batches.series("difference") * batches.bps_per_day
    look = last_look(values, plan)
    n = len(values)
    strict = strict_sequence(values, strict_bound, plan.alpha)
    clipped = np.clip(values, -strict_bound, strict_bound)
    effect = Effect(
        batches=n,
        nonzero=0 if look is None else look.nonzero,
        days=batches.days,
        ready=look is not None and look.ready,
        alpha=plan.alpha,
        horizon=plan.horizon,
        sequence=sequence(look),
        one_look=one_look(values, plan.alpha),
        groups=_few_groups(values, plan.alpha),
        strict=Range(float(clipped.mean()), float(strict.low[-1]), float(strict.high[-1]))
        if n
        else Range(None),
        strict_bound=strict_bound,
        clipped=strict.clipped,
        e_value=1.0 if look is None else math.exp(min(look.log_e, 700.0)),
        p_value=1.0 if look is None else look.p,
        lag_one=0.0 if look is None else look.lag1,
        correlated=look is not None and look.correlated,
        sd=0.0 if look is None else look.sd,
        detectable=detectable(look, plan),
        days_to_decide=None if look is None else days_until(look, look.mean, plan, batches),
        days_for_margin=None if look is None else days_until(look, margin, plan, batches),
        money_per_bps=batches.frame.capital * 1e-4,
        history=_history(batches, values, plan),
    )
    return effect, look


def sequence(look: Look | None) -> Range:
    """Return the mean and its confidence sequence, which takes two batches."""
    if look is None:
        return Range(None)
    return Range(look.mean, look.low, look.high) if look.n > 1 else Range(look.mean)


def one_look(values: Floats, alpha: float) -> Range:
    """Return the mean and the interval of a single look; it takes 8 batches."""
    if not len(values):
        return Range(None)
    if len(values) < 8:
        return Range(float(values.mean()))
    test = ewc_test(values, level=1.0 - alpha)
    return Range(test.estimate, test.low, test.high)


def _few_groups(values: Floats, alpha: float) -> Range:
    if len(values) < 2 * _GROUPS:
        return Range(float(values.mean()) if len(values) else None)
    test = few_group_test(values, groups=_GROUPS, level=1.0 - alpha)
    return Range(test.estimate, test.low, test.high)


def detectable(look: Look | None, plan: Plan) -> float | None:
    """Return the smallest effect that these batches would show with 80 % power."""
    if look is None or not look.ready:
        return None
    critical = float(critical_z(look.n, plan.rho2, plan.alpha))
    return minimum_detectable_effect(look.sd, look.n, critical)


def days_until(look: Look, effect: float, plan: Plan, batches: Batches) -> float | None:
    """Return the days from now until the sequence excludes 0 with 80 % power, if that comes.

    Args:
        effect: what is assumed to be the truth, bps a day.
    """
    if not look.ready or effect == 0.0:
        return None
    needed = batches_sequential(effect, look.sd, plan) - look.n
    days = max(needed, 0.0) * batches.frame.batch_us / 86_400e6
    return days if days < 36_500.0 else None


def _history(batches: Batches, values: Floats, plan: Plan) -> History:
    n = len(values)
    if n < 2:
        return History((), (), (), (), 0)
    found = looks(values, plan)
    ends = np.unique(np.linspace(1, n - 1, min(POINTS, n - 1)).round().astype(np.int64))
    times = (batches.window[ends] + 1) * batches.frame.batch_us
    low, high, mean = (np.round(column[ends], 6) for column in (found.low, found.high, found.mean))
    ready = int(np.argmax(found.ready[ends])) if found.ready[ends].any() else len(ends)
    return History(
        time_us=tuple(times.tolist()),
        mean=tuple(mean.tolist()),
        low=tuple(low.tolist()),
        high=tuple(high.tolist()),
        ready=ready,
    )
