"""How does a report look as JSON, and as one HTML page that needs nothing else?

Every function is pure and works from a `Report` alone, so the forms cannot disagree; only `write`
touches the disk. The time of writing stands outside what is hashed: equal reports give equal
bodies, byte for byte.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path

import jinja2
import msgspec
from markupsafe import Markup

from rlv3.errors import ConfigError
from shadow.evaluation.effect import Effect, Range
from shadow.records import ARMS
from shadow.reporting import charts, text
from shadow.reporting.curves import Band
from shadow.reporting.overview import Arm
from shadow.reporting.report import Report
from shadow.reporting.terminal import Files
from shadow.reporting.text import LABELS, amount, money, percent

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
SECTIONS = {
    "verdict": "Verdict",
    "effect": "Primary effect",
    "evidence": "Evidence over time",
    "gates": "Gates",
    "data": "Data health",
    "equity": "Equity and drawdown",
    "metrics": "Metrics",
    "behaviour": "Behaviour",
    "slices": "Slices",
    "sensitivity": "Sensitivity",
    "calibration": "Calibration",
    "disagreements": "Disagreements",
    "method": "Method and provenance",
}
"""Anchor -> title, in the order of the page."""
STATES = {"pass": "✓ pass", "open": "○ open", "fail": "✗ fail"}
VERDICT_MARKS = {"PROMOTE": "▲", "REJECT": "▼", "INVALID": "✕", "KEEP SHADOWING": "◆"}


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
        sections=SECTIONS,
        states=STATES,
        mark=VERDICT_MARKS.get(report.verdict.text, "◇"),
        level=f"{100 * (1 - report.effect.alpha):.1f} %",
        reach=_reach,
        embedded=_embedded(report),
        body_sha256=digest(report),
        generated_at=f"{generated_at:%Y-%m-%d %H:%M:%S} UTC",
    )


def arm_rows(arms: Sequence[Arm]) -> Iterator[tuple[str, list[str]]]:
    """Yield the table of arms as text: label and one cell per arm."""
    yield "net profit", [money(arm.net) for arm in arms]
    yield "net profit, 1 tick later", [money(arm.net_late) for arm in arms]
    yield "gross profit", [money(arm.gross) for arm in arms]
    yield "fees", [money(-arm.fees) for arm in arms]
    yield "slippage", [money(-arm.slippage) for arm in arms]
    yield "turnover", [amount(arm.turnover) for arm in arms]
    yield "max drawdown", [percent(arm.max_drawdown, 3) for arm in arms]
    yield "max drawdown, 1 tick later", [percent(arm.max_drawdown_late, 3) for arm in arms]
    yield "entries", [f"{arm.entries:,}" for arm in arms]
    yield "in the market", [percent(arm.time_in_market) for arm in arms]
    yield "ruined accounts", [", ".join(arm.ruined) or "none" for arm in arms]


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("shadow.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "money": money, "amount": amount, "percent": percent, "kappa": text.kappa,
        "moment": text.moment, "signed": text.signed, "plain": text.plain, "bounds": text.bounds,
        "span": text.span,
        "probability": text.probability, "evidence": text.evidence, "days": text.days,
        "count": "{:,}".format, "decimal": "{:,.2f}".format, "exp": _exponential,
    }  # fmt: skip
    environment.globals |= {
        "swatch": _swatch, "bar": _bar, "interval_bar": _interval_bar, "zip": zip,
    }  # fmt: skip
    return environment.get_template("report.html.j2")


def _exponential(log_e: float) -> float:
    return float(2.718281828459045 ** min(log_e, 700.0))


def _swatch(key: str) -> Markup:
    return Markup(charts.swatch(key))


def _bar(share: float, key: str) -> Markup:
    return Markup(charts.bar(share, key))


def _interval_bar(found: Range, reach: float, more_is_better: bool = True) -> Markup:
    if found.value is None or found.low is None or found.high is None:
        return Markup("")
    ends = found.value, found.low, found.high
    return Markup(charts.interval_bar(*ends, reach, more_is_better=more_is_better))


def _reach(ranges: Sequence[Range]) -> float:
    """Return the scale on which all intervals of a table can be drawn."""
    ends = [abs(end) for found in ranges for end in (found.low, found.high) if end is not None]
    return max(ends, default=1.0)


def _embedded(report: Report) -> Markup:
    """Return the report's JSON, safe inside the page: nothing in it can end the element."""
    body = msgspec.json.encode(report).decode()
    for sign, code in (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026")):
        body = body.replace(sign, code)
    return Markup(body)


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


# -- drawings --------------------------------------------------------------------------------------


def _charts(report: Report) -> Iterator[tuple[str, Markup]]:
    """Yield the drawings by name; an empty one for what cannot be drawn yet."""
    yield from dict.fromkeys(
        ("number_line", "evidence", "coverage", "reliability", "equity"), Markup("")
    ).items()
    yield from _effect_charts(report)
    covered = report.health.coverage
    if covered.time_us:
        title = "Share of the bars that are there, by hour"
        yield "coverage", Markup(charts.strip(covered.time_us, covered.share, title=title))
    bins = [
        charts.Bin(item.confidence, item.came_true, item.low, item.high)
        for item in report.behaviour.calibration.bins
    ]
    if bins:
        yield "reliability", Markup(charts.reliability(bins, title="Reliability of confidence"))
    curves = report.curves
    if not curves.time_us:
        return
    drawn = ("flat", "follow_signal", "v2", "v3")  # what matters most lies on top
    draw = partial(charts.line_chart, curves.time_us)
    equity = [charts.Line(name, *_parts(curves.equity[name])) for name in drawn]
    fall = [charts.Line(name, *_fall(curves.drawdown[name])) for name in drawn]
    difference = [charts.Line("difference", *_parts(curves.difference))]
    for name, lines, title, height, label in (
        ("equity", equity, "Equity of the four arms over time", 300, _axis_money),
        ("difference", difference, "Net profit of v3 minus v2 over time", 150, _axis_money),
        ("drawdown", fall, "Drawdown of the four arms over time", 170, _axis_percent),
    ):
        yield name, Markup(draw(lines, title=title, height=height, text=label))


def _effect_charts(report: Report) -> Iterator[tuple[str, Markup]]:
    effect = report.effect
    sequence, one_look = _ends(effect.sequence), _ends(effect.one_look)
    margin = report.registration.margin if report.registration else 0.0
    if sequence is not None:
        yield (
            "number_line",
            Markup(charts.number_line(sequence, one_look, margin=margin, title=_in_words(effect))),
        )
    history = effect.history
    if len(history.time_us) > 1:
        lines = [charts.Line("difference", history.mean, history.low, history.high)]
        late = min(history.ready, len(history.time_us) - 1)
        ends = (history.low[late:], history.high[late:])
        yield (
            "evidence",
            Markup(
                charts.line_chart(
                    history.time_us,
                    lines,
                    title="Mean difference and its confidence sequence over time",
                    height=260,
                    text=_axis_plain,
                    within=(min(0.0, *ends[0]), max(0.0, *ends[1])),
                    quiet_until_us=history.time_us[late],
                )
            ),
        )


def _in_words(effect: Effect) -> str:
    found = effect.sequence
    return (
        f"Effect {text.signed(found.value)} bps a day, confidence sequence {text.bounds(found)}, "
        f"interval of one look {text.bounds(effect.one_look)}"
    )


def _ends(found: Range) -> tuple[float, float, float] | None:
    if found.value is None or found.low is None or found.high is None:
        return None
    return found.value, found.low, found.high


def _parts(band: Band) -> tuple[Sequence[float], Sequence[float], Sequence[float]]:
    return band.last, band.low, band.high


def _fall(band: Band) -> tuple[Sequence[float], Sequence[float], Sequence[float]]:
    """Turn drawdowns upside down: they are drawn as falls below zero."""
    last, low, high = ([-value for value in part] for part in (band.last, band.high, band.low))
    return last, low, high


def _axis_plain(value: float, step: float) -> str:
    return f"{value + 0.0:+,.{charts.places(step)}f}" if value else "0"


def _axis_money(value: float, step: float) -> str:
    return f"{value + 0.0:,.{charts.places(step)}f}"


def _axis_percent(value: float, step: float) -> str:
    return f"{abs(100 * value):.{charts.places(100 * step)}f} %"
