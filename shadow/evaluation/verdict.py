"""What follows from the evidence: promote, keep shadowing, reject, or nothing can be said?

    INVALID         a gate on the data fails, whatever the profit
    REJECT          v3 is worse, breaches a safety bound, or is merely equal at the end of the test
    PROMOTE         v3 is better (or, where declared, not worse by the margin) and every gate passes
    KEEP SHADOWING  anything else, with the gate that stands in the way

Only the anytime-valid confidence sequence finds v3 better or worse, so looking every day is
allowed. Superiority and inferiority mirror each other; the gates are one-sided by intent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from shadow.evaluation.gates import Otherwise, Result
from shadow.statistics.sequential import Look

Finding = Literal["superior", "inferior", "not inferior", "equivalent", "undecided"]

PROMOTE, KEEP, REJECT, INVALID = "PROMOTE", "KEEP SHADOWING", "REJECT", "INVALID"
EXPLORATORY = "exploratory"
EXIT_CODES = {KEEP: 0, EXPLORATORY: 0, PROMOTE: 10, REJECT: 20, INVALID: 30}


class Verdict(msgspec.Struct, frozen=True):
    """What the report concludes."""

    text: str
    why: str
    """One sentence."""
    binding: str
    """The gate that decides or stands in the way; empty for a promotion."""
    exit_code: int


def find(look: Look | None, *, margin: float, shift: float) -> Finding:
    """Say what the confidence sequence has found.

    Args:
        look: at batches in bps a day; None without any.
        margin: differences within it count as equal, bps a day.
        shift: 0 to ask for superiority, the margin to ask for non-inferiority.
    """
    if look is None or not look.ready:
        return "undecided"
    if look.low > 0.0:
        return "superior"
    if look.high < 0.0:
        return "inferior"
    if shift and look.low > -shift:
        return "not inferior"
    if -margin < look.low and look.high < margin:
        return "equivalent"
    return "undecided"


def primary_gate(look: Look | None, finding: Finding, *, shift: float) -> Result:
    """Return the gate on the primary effect, in the form of all others."""
    if look is None or not look.ready:
        n, nonzero = (0, 0) if look is None else (look.n, look.nonzero)
        found = f"{n} batches, {nonzero} of them not 0"
    else:
        found = f"{look.mean:+.2f} [{look.low:+.2f}, {look.high:+.2f}] bps/day"
    better = finding in ("superior", "not inferior")
    return Result(
        name="non-inferiority" if shift else "superiority",
        measure="difference",
        state="pass" if better else "fail" if finding == "inferior" else "open",
        found=found,
        bound=f"all above {-shift:g}" if shift else "all above 0",
        otherwise="keep",
        section="effect",
        blocks=not better,
    )


def judge(
    finding: Finding, primary: Result, gates: Sequence[Result], *, ended: bool, eta: str = ""
) -> Verdict:
    """Draw the conclusion.

    Args:
        finding: see `find`.
        primary: the gate on the primary effect.
        gates: all others, in the order of the table.
        ended: the last batch of the test has closed.
        eta: when a decision may be expected, as a clause.
    """
    if failed := _first(gates, "invalid"):
        return _verdict(INVALID, f"The data carry no verdict: {_clause(failed)}.", failed.name)
    if finding == "inferior":
        return _verdict(
            REJECT,
            f"RL v3 earns less than RL v2: {primary.found}, all of it below 0.",
            primary.name,
        )
    if breached := _first(gates, "reject"):
        return _verdict(
            REJECT, f"RL v3 breaches a safety bound: {_clause(breached)}.", breached.name
        )
    blocking = [gate for gate in (primary, *gates) if gate.blocks]
    if not blocking:
        word = "earns more than" if finding == "superior" else "is not worse than"
        return _verdict(PROMOTE, f"RL v3 {word} RL v2, {primary.found}, and every gate passes.", "")
    if ended and finding == "equivalent":
        return _verdict(
            REJECT,
            f"The test has ended and RL v3 is no better than RL v2: {primary.found}.",
            primary.name,
        )
    first = blocking[0]
    if ended:
        why = f"The test has ended without a decision: {_clause(first)}."
    elif first is primary:
        why = f"Not decided yet: {_clause(first)}{eta}."
    else:
        why = f"The effect is there, but {_clause(first)}."
    return _verdict(KEEP, why, first.name)


def exploratory(reason: str) -> Verdict:
    """Return the conclusion of a report that must not draw one."""
    return _verdict(EXPLORATORY, f"No verdict: {reason}.", "")


def _first(gates: Sequence[Result], otherwise: Otherwise) -> Result | None:
    return next((g for g in gates if g.otherwise == otherwise and g.state == "fail"), None)


def _clause(gate: Result) -> str:
    return f"{gate.name}: {gate.found}, bound {gate.bound}"


def _verdict(text: str, why: str, binding: str) -> Verdict:
    return Verdict(text, why, binding, EXIT_CODES[text])
