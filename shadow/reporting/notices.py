"""What must a reader know before the numbers?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from shadow.evaluation.bars import Bars
from shadow.evaluation.health import Health
from shadow.reporting.overview import V2Source
from shadow.reporting.question import Run


def notices(run: Run, bars: Bars, v2: Sequence[V2Source], health: Health) -> Iterator[str]:
    """Yield one sentence for each thing."""
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
