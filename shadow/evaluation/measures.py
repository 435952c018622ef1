"""What do the gates look at? The measures that follow from batches and counted bars.

The collector and the report fill in these alike; what only a whole store can tell (data checks,
the recording's audit, real closes) the report adds in `shadow.reporting.conclusion`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from rlv3.reward import SANE_REWARDS
from shadow.evaluation.batches import Batches, Floats
from shadow.evaluation.effect import last_looks
from shadow.evaluation.gates import Measured
from shadow.statistics.inference import (
    Compared,
    bootstrap_length,
    compare,
    expected_shortfall,
    mean,
)
from shadow.statistics.sequential import Look, Plan

SEED = 20_240_229
"""Of every bootstrap: the same batches give the same intervals."""
LEAST_BATCHES = 20
"""Before so many, a ratio of two policies is no estimate yet."""
_REGIME_SHARE = 0.05


class Counted(NamedTuple):
    """What was counted beside the batches, in the bars of the test."""

    opponents: Mapping[tuple[str, str | None], int]
    """(opponent, digest) -> bars."""
    regimes: Mapping[str, int]
    """Regime known before the bar -> bars."""
    ruined: tuple[str, ...]
    """Symbols whose account of v3 was ruined."""


def measures(
    batches: Batches,
    look: Look | None,
    plan: Plan,
    counted: Counted,
    *,
    reward: str | None,
    reference_digest: str,
) -> dict[str, Measured]:
    """Return what batches and counts say.

    Args:
        reward: what v3 was trained with, as its artifact states it.
        reference_digest: of the Q-tables that this package ships: an opponent that plays them is
            our reference, not production's RL v2.
    """
    scale = batches.bps_per_day
    k = len(batches.window)
    found = {
        "days": Measured(batches.days, text=f"{batches.days:.1f}"),
        "batches": Measured(float(k)),
        "discarded_share": share(batches.discarded, batches.discarded + k),
        "lag_one": Measured(
            None if look is None or not look.ready else abs(look.lag1) * math.sqrt(look.n),
            text=_lag_one(look),
        ),
        "ruined": Measured(float(len(counted.ruined)), text=", ".join(counted.ruined) or "none"),
        "regimes": _regimes(counted),
        "production_share": _production(counted, reference_digest),
        "sane_reward": Measured(
            float(reward in SANE_REWARDS), text=f"reward {reward or 'not stated'}"
        ),
        "double_cost": _mean(batches.at(2.0) * scale),
        "one_tick_later": _mean(batches.at(late=True) * scale),
        "leave_one_out": _leave_one_out(batches),
    }
    rivals = ("beats_signal", "beats_flat")
    table = np.array([batches.series(name) * scale for name in rivals])
    for name, rival in zip(rivals, last_looks(table, plan), strict=True):
        found[name] = _lower_end(rival)
    if k >= LEAST_BATCHES:
        tail, turnover = guardrails(batches)
        silent = turnover.second.value == 0.0 and turnover.first.value > 0.0
        for name, ratio in (("es95_ratio", tail), ("turnover_ratio", turnover)):
            found[name] = Measured(None, text="RL v2 never traded") if silent else _ratio(ratio)
    return found


def guardrails(batches: Batches) -> tuple[Compared, Compared]:
    """Return mean loss in the worst 5 % of batches, and turnover: v3, v2, difference and ratio."""
    v3, v2 = (batches.series(name) * batches.bps_per_day for name in ("v3", "v2"))
    traded = [batches.series(f"{name}_turnover") * batches.frame.per_day for name in ("v3", "v2")]
    rng = np.random.default_rng(SEED)
    length = bootstrap_length(v3, v2, v3 - v2)
    tail = compare(v3, v2, {"tail": _tail_loss}, rng=rng, length=length)["tail"]
    return tail, compare(traded[0], traded[1], {"mean": mean}, rng=rng, length=length)["mean"]


def _lag_one(look: Look | None) -> str:
    if look is None or not look.ready:
        return "burn-in"
    return f"{abs(look.lag1) * math.sqrt(look.n):.2f} (correlation {look.lag1:+.3f})"


def _tail_loss(returns: Floats) -> Floats:
    """Return the expected shortfall, or 0 where even the worst batches earn."""
    return np.maximum(expected_shortfall(returns), 0.0)


def share(n: int, of: int) -> Measured:
    """Return so many of so many; not measured of none."""
    return Measured(n / of, text=f"{n / of:.2%} ({n:,} of {of:,})") if of else Measured(None)


def _regimes(counted: Counted) -> Measured:
    total = sum(counted.regimes.values())
    known = {name: n for name, n in counted.regimes.items() if name != "unknown"}
    some = sorted(name for name, n in known.items() if n >= _REGIME_SHARE * total)
    return Measured(float(len(some)), text=f"{len(some)}: {', '.join(some) or 'none'}")


def _production(counted: Counted, reference_digest: str) -> Measured:
    total = sum(counted.opponents.values())
    if not total:
        return Measured(None)
    own = sum(
        n
        for (name, digest), n in counted.opponents.items()
        if name == "q_table" or (name == "local_reference" and digest != reference_digest)
    )
    text = f"{own / total:.2%} of the bars"
    names = {name for name, _ in counted.opponents}
    if own < total and "local_reference" in names:
        text += "; opponent is our reference"
    return Measured(own / total, text=text)


def _mean(values: Floats) -> Measured:
    return Measured(float(values.mean())) if len(values) else Measured(None)


def _leave_one_out(batches: Batches) -> Measured:
    symbols = batches.frame.symbols
    if not len(batches.window):
        return Measured(None)
    if len(symbols) < 2:
        return Measured(None, text="one symbol only")
    scale = batches.bps_per_day
    means = [float(batches.without(i).mean()) * scale for i in range(len(symbols))]
    least = min(range(len(means)), key=means.__getitem__)
    return Measured(means[least], text=f"{means[least]:+.2f} without {symbols[least]}")


def _lower_end(look: Look | None) -> Measured:
    if look is None or not look.ready:
        return Measured(None, text="burn-in")
    text = f"{look.mean:+.2f} [{look.low:+.2f}, {look.high:+.2f}] bps/day"
    return Measured(look.low, look.low, look.high, text)


def _ratio(found: Compared) -> Measured:
    value, low, high = found.ratio
    return Measured(value, low, high, f"{value:.2f} [{low:.2f}, {high:.2f}]")
