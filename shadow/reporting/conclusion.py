"""What follows from a whole store: every measure, every gate, the finding and the verdict."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from shadow.evaluation.bars import Bars, Traded
from shadow.evaluation.batches import Batches
from shadow.evaluation.effect import Effect
from shadow.evaluation.fidelity import Fidelity
from shadow.evaluation.gates import Measured, Result, check
from shadow.evaluation.health import Health
from shadow.evaluation.measures import Counted, share
from shadow.evaluation.verdict import Finding, Verdict, exploratory, find, judge, primary_gate
from shadow.reporting.question import Run, Test
from shadow.statistics.sequential import Look


def counted(run: Run, bars: Bars, traded: Mapping[str, Traded]) -> Counted:
    """Count what the measures of batches do not see."""
    regimes = np.bincount(bars.regime, minlength=len(bars.regimes)).tolist()
    return Counted(
        opponents={(found.name, found.digest): found.bars for found in run.opponents},
        regimes=dict(zip(bars.regimes, regimes, strict=True)),
        ruined=tuple(np.asarray(bars.symbols)[traded["v3"].ruined].tolist()),
    )


def store_measures(health: Health, fidelity: Fidelity, batches: Batches) -> dict[str, Measured]:
    """Return the measures that only a whole store can tell."""
    failed = [item.name for item in health.checks if item.decides and not item.ok]
    read, lost = health.read, health.lost
    matched = next(stage for stage in health.funnel if stage.name == "matched")
    found = {
        "failed_checks": Measured(float(len(failed)), text=", ".join(failed) or "none failed"),
        "matched_share": share(matched.n, matched.of),
        "asymmetry_p": Measured(health.asymmetry_p),
        "lost_share": Measured(None) if lost is None else share(lost, read + lost),
        "late_share": share(health.entries("late"), read),
        "duplicate_share": share(health.entries("duplicate"), read),
        "unreadable_share": share(health.entries("dead_letter"), read),
        "gap_share": share(health.gap_bars, health.bars),
        "cold_share": share(health.cold_bars, health.bars),
        "poor_share": share(health.poor_bars, health.bars),
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


def conclude(
    test: Test,
    batches: Batches,
    look: Look | None,
    effect: Effect,
    measured: Mapping[str, Measured],
) -> tuple[Finding, Verdict, tuple[Result, ...]]:
    """Judge a test: what was found, what follows, and each gate with the primary one first."""
    finding = find(look, margin=test.margin, shift=test.shift)
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
