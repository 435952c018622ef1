"""How does a report look: on a terminal, as JSON, and as one HTML page that needs nothing else?

Every function is pure and works from a `Report` alone, so the three forms cannot disagree; only
`write` touches the disk. The time of writing stands outside what is hashed: equal reports give
equal bodies, byte for byte.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jinja2
import msgspec
from markupsafe import Markup

from rlv3.errors import ConfigError
from shadow import charts
from shadow.records import ARMS
from shadow.report import Agreement, Arm, Band, Report

COLUMNS = 80
LABELS = {"v3": "v3", "v2": "v2", "follow_signal": "follow-signal", "flat": "flat"}
SIDES = ("short", "flat", "long")
RULES = {
    1: "same entry",
    2: "same trace id",
    3: "same correlation id",
    4: "within 1 ms",
    5: "nearest in the window",
}
SETTINGS = {
    "initial_balance": ("reference capital per symbol", "{:,.0f}"),
    "fee_rate": ("fee per side", "{:.2%} of notional"),
    "entry_fraction": ("entry size", "{:.0%} of equity"),
    "min_notional": ("smallest position; less closes", "{:,.0f}"),
    "flatten_cooldown_steps": ("steps aside after EMERGENCY_FLATTEN", "{:.0f}"),
    "latency_ms": ("delay from decision to fill, all arms", "{:.0f} ms"),
    "tau": ("confidence from which RL v2 follows a signal", "{:.2f}"),
    "step_seconds": ("length of a bar and step", "{:.0f} s"),
}
"""Setting -> what it means and how it is written; others appear as they are."""


class Files(NamedTuple):
    """Where a report was written."""

    html: Path
    json: Path


def write(report: Report, directory: str | Path, generated_at: datetime) -> Files:
    """Write `report.html` and `report.json` into a directory, which is made when missing.

    Raises:
        ConfigError: the directory cannot be written.
    """
    directory = Path(directory)
    files = Files(directory / "report.html", directory / "report.json")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        files.html.write_text(html(report, generated_at), "utf-8")
        files.json.write_text(json(report, generated_at), "utf-8")
    except OSError as error:
        raise ConfigError(
            f"expected a directory to write the report to, found {directory}: {error.strerror}"
        ) from error
    return files


def digest(report: Report) -> str:
    """Return the sha256 of everything a report says."""
    return hashlib.sha256(msgspec.json.encode(report)).hexdigest()


def json(report: Report, generated_at: datetime) -> str:
    """Return one line of JSON: the report, its hash, and the time of writing beside them."""
    body = msgspec.json.encode(report).decode()
    stamp = f"{generated_at:%Y-%m-%dT%H:%M:%SZ}"
    return f'{{"report":{body},"report_sha256":"{digest(report)}","generated_at":"{stamp}"}}\n'


# -- terminal --------------------------------------------------------------------------------------


def terminal(report: Report, files: Files | None = None) -> list[str]:
    """Return the summary: at most 24 lines of at most 80 characters (paths may be longer)."""
    lines = [_headline(report), _verdict(report), _period(report)]
    lines += _notices(report.notices)
    lines.append(f"{'':<14}" + "".join(f"{LABELS[arm.name]:>16}" for arm in report.arms))
    lines += [
        f"{label:<14}" + "".join(f"{cell:>16}" for cell in cells)
        for label, cells in arm_rows(report.arms)
    ]
    lines += [_agreement(report.agreement), _pairs(report), _unpaired(report)]
    lines += [_mix("steps", report.actions.steps), _mix("advisory", report.actions.advisory)]
    lines.append(_data(report))
    lines.append(_not_modelled([name for name, _ in report.not_modelled]))
    if files is not None:
        inputs = report.provenance.input_sha256[:12]
        lines += [f"Report {files.html}", f"JSON   {files.json}   inputs sha256:{inputs}"]
    return lines


def arm_rows(arms: Sequence[Arm]) -> Iterator[tuple[str, list[str]]]:
    """Yield the table of arms as text: label and one cell per arm."""
    yield "net profit", [money(arm.net) for arm in arms]
    yield "  1 tick later", [money(arm.net_late) for arm in arms]
    yield "gross profit", [money(arm.gross) for arm in arms]
    yield "fees", [money(-arm.fees) for arm in arms]
    yield "slippage", [money(-arm.slippage) for arm in arms]
    yield "turnover", [amount(arm.turnover) for arm in arms]
    yield "max drawdown", [percent(arm.max_drawdown, 3) for arm in arms]
    yield "entries", [f"{arm.entries:,}" for arm in arms]
    yield "in the market", [percent(arm.time_in_market) for arm in arms]


def _headline(report: Report) -> str:
    policy = (report.run.policy_digest or "unknown")[:12]
    opponents = " and ".join(opponent.name for opponent in report.run.opponents) or "nobody"
    return _cut(f"RL v3 {policy} against {opponents} (simulated, never traded)")


def _verdict(report: Report) -> str:
    return f"{report.verdict.text}: {', '.join(report.verdict.why)}"


def _period(report: Report) -> str:
    period = report.period
    if period.start_us is None or period.end_us is None:
        return f"no closed bar  run {report.run.run_id}"
    symbols = "1 symbol" if len(period.symbols) == 1 else f"{len(period.symbols):,} symbols"
    return _cut(
        f"{moment(period.start_us)} to {moment(period.end_us)} UTC, {symbols}, "
        f"{period.bars:,} bars, run {report.run.run_id[:8]}"
    )


def _notices(notices: Sequence[str]) -> list[str]:
    if len(notices) > 2:
        notices = (notices[0], f"and {len(notices) - 1} more notices, see the page or the JSON")
    return [_cut(f"! {notice}") for notice in notices]


def _agreement(found: Agreement) -> str:
    return (
        f"Agreement {percent(found.raw)} of {found.n:,} warm bars, "
        f"kappa {kappa(found.kappa)}, opposite {percent(found.opposite)}"
    )


def _pairs(report: Report) -> str:
    rules: dict[int, int] = {}
    for group in report.pairs:
        rules[group.rule] = rules.get(group.rule, 0) + group.pairs
    by_rule = ", ".join(f"rule {rule}: {n:,}" for rule, n in sorted(rules.items()))
    total = f"Pairs {sum(rules.values()):,}"
    return _cut(f"{total} ({by_rule})" if by_rule else total)


def _unpaired(report: Report) -> str:
    parts = []
    for side in ("v2", "v3"):
        rows = [row for row in report.unpaired if row.side == side]
        reasons = ", ".join(f"{row.reason} {row.decisions:,}" for row in rows)
        total = f"{side} {sum(row.decisions for row in rows):,}"
        parts.append(f"{total} ({reasons})" if reasons else total)
    return _cut("Unpaired " + "; ".join(parts))


def _mix(kind: str, counts: Sequence[int]) -> str:
    total = sum(counts)
    names = ("HOLD", "LONG", "SHORT", "REDUCE", "CLOSE", "FLATTEN")
    shares = "  ".join(
        f"{name} {100 * n / total:.0f}%" for name, n in zip(names, counts, strict=True) if n
    )
    return _cut(f"v3 {kind} {total:,}: {shares}" if total else f"v3 {kind}: none")


def _data(report: Report) -> str:
    streams = report.health.streams
    total = {
        name: sum(stream.outcomes.get(name, 0) for stream in streams)
        for name in ("decided", "conflated", "dead_letter")
    }
    failed = sum(not check.ok for check in report.health.checks)
    return _cut(
        f"Data checks {'ok' if not failed else f'{failed} FAILED'}, lost {lost(report)}, "
        f"dead {total['dead_letter']:,}, conflated {total['conflated']:,}, "
        f"decided {total['decided']:,} of {sum(stream.read for stream in streams):,}"
    )


def _not_modelled(names: Sequence[str]) -> str:
    """Name as many as fit, and say how many there are beside them."""
    for shown in range(len(names), 0, -1):
        rest = f" and {len(names) - shown} more" if shown < len(names) else ""
        line = f"Not modelled: {', '.join(names[:shown])}{rest}"
        if len(line) <= COLUMNS:
            return line
    return f"Not modelled: {len(names)} things"


def lost(report: Report) -> str:
    """Return how many entries were trimmed before they were read, or that nobody knows."""
    known = [stream.lost for stream in report.health.streams if stream.lost is not None]
    return f"{sum(known):,}" if known else "none noted"


def _cut(line: str) -> str:
    return line if len(line) <= COLUMNS else line[: COLUMNS - 1] + "…"


# -- how values are written ------------------------------------------------------------------------


def money(value: float) -> str:
    """Write a profit: signed, two decimals; an exact or rounded zero has no sign."""
    text = f"{value:+,.2f}"
    return "0.00" if text in ("+0.00", "-0.00") else text


def amount(value: float) -> str:
    """Write an amount of money that is not a profit."""
    return f"{value:,.0f}"


def percent(value: float | None, digits: int = 1) -> str:
    """Write a share of 1; a dash where there is none."""
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def kappa(value: float | None) -> str:
    """Write Cohen's kappa; without data, or when chance alone agrees always, it is undefined."""
    return "undefined" if value is None else f"{value:.3f}"


def moment(ts_us: int) -> str:
    """Write a time of the data, UTC, to the minute."""
    return f"{datetime.fromtimestamp(ts_us // 1_000_000, UTC):%Y-%m-%d %H:%M}"


def _axis_money(value: float, step: float) -> str:
    return f"{value + 0.0:,.{_digits(step)}f}"


def _axis_percent(value: float, step: float) -> str:
    return f"{abs(100 * value):.{_digits(100 * step)}f} %"


def _digits(step: float) -> int:
    """Return how many decimals tell neighbouring labels apart without rounding them."""
    return next((n for n in range(6) if abs(step - round(step, n)) < 1e-6 * step), 6)


# -- HTML ------------------------------------------------------------------------------------------


def html(report: Report, generated_at: datetime) -> str:
    """Return one self-contained page: no script, no request, light and dark, fit to print."""
    return _template().render(
        report=report,
        charts=dict(_charts(report)),
        arm_rows=list(arm_rows(report.arms)),
        labels=LABELS,
        sides=SIDES,
        rules=RULES,
        arms=ARMS,
        traders=[name for name in ARMS if name != "flat"],
        settings=list(_settings(report)),
        outcomes=_outcome_columns(report),
        lost=lost(report),
        body_sha256=digest(report),
        generated_at=f"{generated_at:%Y-%m-%d %H:%M:%S} UTC",
    )


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("shadow"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "money": money, "amount": amount, "percent": percent, "kappa": kappa, "moment": moment,
        "count": "{:,}".format, "decimal": "{:,.2f}".format,
    }  # fmt: skip
    environment.globals |= {"swatch": _swatch, "bar": _bar, "zip": zip}
    return environment.get_template("report.html.j2")


def _swatch(key: str) -> Markup:
    return Markup(charts.swatch(key))


def _bar(share: float, key: str) -> Markup:
    return Markup(charts.bar(share, key))


def _settings(report: Report) -> Iterator[tuple[str, str, str]]:
    for name, value in report.run.settings.items():
        meaning, form = SETTINGS.get(name, ("", "{:g}"))
        yield name, form.format(value), meaning


def _outcome_columns(report: Report) -> list[str]:
    """Return the outcomes that occurred, in the ledger's order."""
    found: dict[str, None] = {}
    for stream in report.health.streams:
        found |= dict.fromkeys(stream.outcomes)
    return list(found)


def _charts(report: Report) -> Iterator[tuple[str, Markup]]:
    """Yield the drawings by name; nothing when no bar has closed."""
    curves = report.curves
    if not curves.time_us:
        return
    drawn = ("flat", "follow_signal", "v2", "v3")  # what matters most lies on top
    draw = partial(charts.line_chart, curves.time_us)
    equity = [charts.Line(name, *_parts(curves.equity[name])) for name in drawn]
    fall = [charts.Line(name, *_fall(curves.drawdown[name])) for name in drawn]
    difference = [charts.Line("difference", *_parts(curves.difference))]
    for name, lines, title, height, text in (
        ("equity", equity, "Equity of the four arms over time", 300, _axis_money),
        ("difference", difference, "Net profit of v3 minus v2 over time", 150, _axis_money),
        ("drawdown", fall, "Drawdown of the four arms over time", 170, _axis_percent),
    ):
        yield name, Markup(draw(lines, title=title, height=height, text=text))


def _parts(band: Band) -> tuple[Sequence[float], Sequence[float], Sequence[float]]:
    return band.last, band.low, band.high


def _fall(band: Band) -> tuple[Sequence[float], Sequence[float], Sequence[float]]:
    """Turn drawdowns upside down: they are drawn as falls below zero."""
    last, low, high = ([-value for value in part] for part in (band.last, band.high, band.low))
    return last, low, high
