"""What does an analyst see on the terminal? At most 24 lines of at most 80 characters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from textwrap import wrap
from typing import NamedTuple

from shadow.evaluation.effect import Effect, Range
from shadow.reporting.report import Report
from shadow.reporting.text import days, evidence, percent, probability, signed

COLUMNS = 80
_LINE = 34  # characters of the number line
_SHOWN = {
    "net return": "net bps/d",
    "Sharpe ratio": "Sharpe",
    "loss in the worst 5 %": "ES95 bps/batch",
    "turnover": "turnover x/d",
    "largest drawdown": "max drawdown %",
}


class Files(NamedTuple):
    """Where a report was written."""

    html: Path
    json: Path


def summary(report: Report, files: Files | None = None) -> list[str]:
    """Return the lines of the summary (those with paths may be longer)."""
    lines = [_headline(report), *_why(report), *_effect(report)]
    lines += _metrics(report)
    lines += [_behaviour(report), _data(report), *_gates(report)]
    lines += _notices(report.notices)
    if files is not None:
        inputs = report.provenance.input_sha256[:12]
        lines += [f"Report {files.html}", f"JSON   {files.json}   inputs sha256:{inputs}"]
    return lines


def _headline(report: Report) -> str:
    policy = (report.run.policy_digest or "unknown")[:6]
    opponents = " and ".join(found.name for found in report.run.opponents) or "nobody"
    digest = report.run.tables_digest
    rival = f"{opponents}@{digest[:6]}" if digest else opponents
    right = f"  {_period(report)}  {report.verdict.text}"
    return _cut(f"SHADOW v3@{policy} vs v2 {rival}", COLUMNS - len(right)) + right


def _period(report: Report) -> str:
    period = report.period
    if period.start_us is None or period.end_us is None:
        return "no closed bar"
    begin, end = (
        f"{datetime.fromtimestamp(at // 1_000_000, UTC):%m-%d}"
        for at in (period.start_us, period.end_us)
    )
    return f"{begin}..{end} ({report.effect.days:.1f} d, {report.effect.batches:,} batches)"


def _why(report: Report) -> list[str]:
    lines = wrap(report.verdict.why, COLUMNS)
    return lines if len(lines) <= 3 else [*lines[:2], _cut(" ".join(lines[2:]))]


def _effect(report: Report) -> Iterator[str]:
    effect = report.effect
    level = f"{100 * (1 - effect.alpha):.0f}%"
    yield _cut(
        f"d net {signed(effect.sequence.value)} bps/d  {level} CS {_bounds(effect.sequence)}  "
        f"CI {_bounds(effect.one_look)}  e {evidence(effect.e_value)}  "
        f"p {probability(effect.p_value)}"
    )
    wait = effect.days_to_decide
    eta = f"  ETA {days(wait)}" if wait is not None and report.finding == "undecided" else ""
    found = "" if effect.detectable is None else f"  MDE {effect.detectable:.1f} bps/d"
    picture = _number_line(effect)
    if picture or found or eta:
        yield _cut(f"{picture}{found}{eta}".strip())


def _number_line(effect: Effect) -> str:
    """Draw the confidence sequence on a line with 0 and the mean."""
    value, low, high = effect.sequence.value, effect.sequence.low, effect.sequence.high
    if value is None or low is None or high is None or not effect.ready:
        return ""
    reach = 1.15 * max(abs(low), abs(high))
    if reach == 0.0:
        return ""

    def place(at: float) -> int:
        return round((at + reach) / (2.0 * reach) * (_LINE - 1))

    cells = ["-"] * _LINE
    cells[place(0.0)] = "0"
    cells[place(low)], cells[place(high)] = "[", "]"
    cells[place(value)] = "*"
    return f"{-reach:+.0f} {''.join(cells)} {reach:+.0f}"


def _metrics(report: Report) -> Iterator[str]:
    rows = [row for row in report.metrics if row.name in _SHOWN]
    if not rows:
        yield f"{'':<23}" + "".join(f"{arm.name:>14}" for arm in report.arms)
        yield f"{'net profit':<23}" + "".join(f"{arm.net:>+14,.2f}" for arm in report.arms)
        yield f"{'fees and slippage':<23}" + "".join(
            f"{0.0 - arm.fees - arm.slippage:>+14,.2f}" for arm in report.arms
        )
        yield f"{'max drawdown':<23}" + "".join(
            f"{percent(arm.max_drawdown, 3):>14}" for arm in report.arms
        )
        return
    states = {gate.measure: gate.state for gate in report.gates}
    yield f"{'':<15}{'v2 sim':>10}{'v3 sim':>10}{'d':>9}  95% CI of one look"
    for row in rows:
        guard = states.get(row.gate)
        mark = "" if guard is None else "  guard ok" if guard == "pass" else f"  guard {guard}"
        values = "".join(f"{_short(item.value):>10}" for item in (row.v2, row.v3))
        yield _cut(
            f"{_SHOWN[row.name]:<15}{values}{signed(row.difference.value):>9}  "
            f"{_bounds(row.difference)}{mark}"
        )


def _behaviour(report: Report) -> str:
    found, ece = report.behaviour.confusion, report.behaviour.calibration.ece
    parts = [f"Agree {percent(found.raw.value)} of {found.n:,} warm bars"]
    for name, item in (("kappa", found.kappa), ("AC1", found.ac1), ("ECE", ece)):
        if item.value is not None:
            parts.append(f"{name} {item.value:.3f}")
    return _cut("  ".join(parts))


def _data(report: Report) -> str:
    health = report.health
    stage = {item.name: item for item in health.funnel}
    matched = stage["matched"]
    share = percent(matched.n / matched.of, 2) if matched.of else "–"
    failed = sum(item.decides and not item.ok for item in health.checks)
    return _cut(
        f"Data {'ok' if not failed else f'{failed} checks FAILED'}: matched {share}, "
        f"lost {health.lost_text}, "
        f"late {health.entries('late'):,}, dup {health.entries('duplicate'):,}, "
        f"dead {health.entries('dead_letter'):,}, gap bars {health.gap_bars:,}"
    )


def _gates(report: Report) -> Iterator[str]:
    passed = sum(gate.state == "pass" for gate in report.gates)
    blocking = [gate.name for gate in report.gates if gate.blocks]
    yield _cut(
        f"Gates {passed}/{len(report.gates)} pass"
        + (f"   blocking: {', '.join(blocking)}" if blocking else "")
    )


def _notices(notices: Sequence[str]) -> list[str]:
    if len(notices) > 2:
        notices = (notices[0], f"and {len(notices) - 1} more notices, see the page or the JSON")
    return [_cut(f"! {notice}") for notice in notices]


def _bounds(found: Range) -> str:
    if found.low is None or found.high is None:
        return "[not yet]"
    digits = 2 if max(abs(found.low), abs(found.high)) < 10.0 else 1
    return f"[{signed(found.low, digits)},{signed(found.high, digits)}]"


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}" if abs(value) < 1_000.0 else f"{value:,.0f}"


def _cut(line: str, columns: int = COLUMNS) -> str:
    return line if len(line) <= columns else line[: columns - 1] + "…"
